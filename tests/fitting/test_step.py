"""One step: gradients, padding, units of the density statistic, Adam, schedules, capacity."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.configs import FitConfig
from pointillist_jax.data.captures import cameras_extent
from pointillist_jax.files import UserError
from pointillist_jax.fitting import density, schedule
from pointillist_jax.fitting.data import view_order
from pointillist_jax.fitting.state import RAW, FitState, init_state
from pointillist_jax.fitting.step import Batch, StepOptions, blending_weights, make_scene, render, train_step, view_loss
from tests.fitting.scenes import SCHEDULE, ball_head, person

CAPACITY = 4096


@pytest.fixture(scope="module")
def ball(tmp_path_factory):
    return person(tmp_path_factory.mktemp("ball"))


def batch_of(data, *chosen: int) -> Batch:
    views = data.splits["train"]
    at = np.array(chosen)
    return Batch(
        images=jnp.stack([jnp.asarray(views.image(n)) for n in chosen]),
        viewmats=jnp.asarray(views.viewmats[at]),
        Ks=jnp.asarray(views.Ks[at]),
        timesteps=jnp.asarray(views.timesteps[at]),
    )


def perturbed(data, model, config: FitConfig, bucket: int = 512) -> FitState:
    """A state away from its symmetric start, so that no gradient is zero for a wrong reason."""
    state = init_state(model, data.params, config)
    cloud = density.to_host(state)
    rng = np.random.default_rng(3)
    params = {k: v + rng.normal(0, 0.2, v.shape).astype(np.float32) for k, v in cloud.params.items()}
    params["opacities"] = params["opacities"] + 2
    return density.from_host(state, dataclasses.replace(cloud, params=params), bucket)


@functools.partial(jax.jit, static_argnames="options")
def gradients_of(params, probe, state, view, scene, options):
    return jax.grad(lambda *x: view_loss(*x, state, view, scene, options)[0], (0, 1))(params, probe)


def rates_of(config, data):
    return {k: np.float32(v) for k, v in schedule.learning_rates(config, 1, data.extent).items()}


def test_padding_changes_nothing(ball):
    data, model = ball
    batch = batch_of(data, 0)
    scene = make_scene(model, data.params, False)
    options = StepOptions.of(SCHEDULE, CAPACITY, 0)
    num, steps = model.num_faces, {}
    for bucket in (512, 1024):
        state = perturbed(data, model, SCHEDULE, bucket)
        steps[bucket], metrics = train_step(state, batch, scene, rates_of(SCHEDULE, data), options)
        assert int(metrics.overflow) == 0
    small, large = steps[512], steps[1024]
    # The first moment is a tenth of the gradient. Two programs round differently in the last bit, and Adam's first step
    # is the gradient's sign, so the parameters themselves are no measure.
    for tree in ("mu", "nu"):
        for key in RAW:
            a, b = (np.asarray(getattr(x, tree)[key]) for x in (small, large))
            np.testing.assert_allclose(a[:num], b[:num], rtol=1e-4, atol=1e-5 * np.abs(a).max(initial=0))
            assert not b[num:].any()
            assert key == "f_rest" or a.any()
    np.testing.assert_allclose(small.grad_sum[:num], large.grad_sum[:num], rtol=1e-4, atol=1e-9)
    assert np.asarray(large.grad_sum)[:num].max() > 0
    assert not np.asarray(large.grad_sum)[num:].any()
    assert not np.asarray(large.max_radii)[num:].any()


def test_gradients_by_finite_differences(ball):
    data, model = ball
    sh_degree = 1
    config = dataclasses.replace(SCHEDULE, finetune_flame=True, sh_degree=sh_degree, threshold_position=0.1)
    with jax.enable_x64(True):
        state = perturbed(data, model, config)
        state, data64 = jax.tree.map(
            lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, (state, data.params)
        )
        scene = make_scene(model.astype(jnp.float64), data64, True)
        view = jax.tree.map(lambda x: x[0], batch_of(data, 4))
        options = StepOptions.of(config, CAPACITY, sh_degree)
        probe = jnp.zeros((state.bucket, 2), jnp.float64)

        @jax.jit
        def loss(params, probe):
            return view_loss(params, probe, state, view, scene, options)[0]

        gradients = jax.grad(loss)(state.params, probe)
        rng = np.random.default_rng(0)
        for key, gradient in gradients.items():
            if gradient.size == 0 or (key in ("neck_pose", "jaw_pose", "eyes_pose")):
                continue  # No colour bands, or joints that the ball's skin does not follow.
            wrong = []
            for _ in range(3):
                direction = jnp.asarray(rng.normal(size=gradient.shape))
                ends = [loss(state.params | {key: state.params[key] + h * direction}, probe) for h in (1e-8, -1e-8)]
                difference, along = float(ends[0] - ends[1]) / 2e-8, float(jnp.vdot(gradient, direction))
                assert abs(along) > 1e-9, key
                wrong.append(abs(along - difference) / (abs(along) + 1e-4))
            # The median, because a pixel may cross the alpha threshold, where the picture jumps.
            assert np.median(wrong) < 2e-3, (key, wrong)


def test_density_statistic_is_in_normalised_device_coordinates(ball):
    """The probe's gradient is per pixel; moving a Gaussian by one ndc unit moves it by half the image."""
    data, model = ball
    state, batch = perturbed(data, model, SCHEDULE), batch_of(data, 1)
    scene, options = make_scene(model, data.params, False), StepOptions.of(SCHEDULE, CAPACITY, 0)
    view = jax.tree.map(lambda x: x[0], batch)
    _, of_pixels = gradients_of(state.params, jnp.zeros((state.bucket, 2)), state, view, scene, options)
    H, W = view.images.shape[:2]
    expected = np.hypot(*(np.asarray(of_pixels) * [W / 2, H / 2]).T)
    stepped, _ = train_step(state, batch, scene, rates_of(SCHEDULE, data), options)
    np.testing.assert_allclose(stepped.grad_sum, expected, rtol=1e-4, atol=1e-9)
    assert expected.max() > 1e-6
    seen = np.asarray(stepped.grad_count)
    assert set(np.unique(seen)) == {0.0, 1.0}
    assert ((np.asarray(stepped.max_radii) > 0) == (seen > 0)).all()
    # Two views add up, whatever the step's mean over views.
    both, _ = train_step(state, batch_of(data, 1, 3), scene, rates_of(SCHEDULE, data), options)
    other, _ = train_step(state, batch_of(data, 3), scene, rates_of(SCHEDULE, data), options)
    np.testing.assert_allclose(both.grad_sum, stepped.grad_sum + other.grad_sum, rtol=1e-4, atol=1e-8)


def test_adam_is_torchs(ball):
    torch = pytest.importorskip("torch")
    data, model = ball
    state, batch = perturbed(data, model, SCHEDULE), batch_of(data, 0)
    scene, options = make_scene(model, data.params, False), StepOptions.of(SCHEDULE, CAPACITY, 0)
    rates = rates_of(SCHEDULE, data)
    view = jax.tree.map(lambda x: x[0], batch)
    leaves = {k: torch.tensor(np.asarray(v), requires_grad=True) for k, v in state.params.items()}
    adam = torch.optim.Adam([{"params": [leaves[k]], "lr": float(rates[k])} for k in leaves], eps=1e-15)
    for _ in range(3):
        gradients, _ = gradients_of(state.params, jnp.zeros((512, 2)), state, view, scene, options)
        for key, leaf in leaves.items():
            leaf.grad = torch.tensor(np.asarray(gradients[key]))
        adam.step()
        state, _ = train_step(state, batch, scene, rates, options)
        for key, leaf in leaves.items():
            # Where a gradient is rounding noise, Adam's step is its sign, which is noise too: few entries may differ.
            off = np.abs(np.asarray(state.params[key]) - leaf.detach().numpy()) > 1e-4
            assert off.sum() <= 0.02 * off.size, key
            leaf.data = torch.tensor(np.asarray(state.params[key]))


def test_a_step_without_room_is_not_taken(ball):
    data, model = ball
    state = perturbed(data, model, SCHEDULE)
    options = StepOptions.of(SCHEDULE, 8, 0)
    stepped, metrics = train_step(
        state, batch_of(data, 0), make_scene(model, data.params, False), rates_of(SCHEDULE, data), options
    )
    assert int(metrics.overflow) > 0
    for a, b in zip(jax.tree.leaves(stepped), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_blending_weights_sum_to_alpha(ball):
    """A Gaussian hidden by all others weighs nothing, and all weights together are what covers the background."""
    data, model = ball
    state, scene = perturbed(data, model, SCHEDULE), make_scene(model, data.params, False)
    view = jax.tree.map(lambda x: x[0], batch_of(data, 0))
    weights, overflow = blending_weights(
        state, scene, view.timesteps, view.viewmats, view.Ks, width=32, height=32, capacity=CAPACITY
    )
    assert int(overflow) == 0

    @jax.jit
    def on_black(colors):
        image, info = render(
            state.params, state.binding, state.num, scene, view.timesteps, view.viewmats, view.Ks, 32, 32,
            capacity=CAPACITY, sh_degree=0, background=0.0, colors=colors,
        )  # fmt: skip
        return image, info["radii"][0]

    covered, radii = on_black(jnp.ones((state.bucket, 1)))
    weights = np.asarray(weights)
    assert weights.sum() == pytest.approx(float(covered.sum()), rel=1e-4)
    unseen = ~(np.asarray(radii) > 0).all(-1)
    assert unseen.any()
    assert not weights[unseen].any()


def test_initialisation_is_one_flat_start_per_face():
    model = ball_head()
    flame = model.neutral_params((4,)).replace(shape=jnp.zeros(2))
    state = init_state(model, flame, FitConfig(sh_degree=1))
    num = model.num_faces
    assert int(state.num) == num
    np.testing.assert_array_equal(state.binding[:num], np.arange(num))
    p = {k: np.asarray(v) for k, v in state.params.items()}
    assert not p["means"].any()
    assert not p["scales"].any()
    np.testing.assert_allclose(1 / (1 + np.exp(-p["opacities"][:num])), 0.1, rtol=1e-5)
    np.testing.assert_array_equal(p["quats"], np.tile([1, 0, 0, 0], (len(p["quats"]), 1)))
    assert 0 <= p["f_dc"].min() <= p["f_dc"].max() < 1 / 255
    assert p["f_rest"].shape == (len(p["means"]), 3, 3)
    assert p["expr"].shape == (4, 3)


def test_learning_rates_are_log_linear_and_scaled():
    config = FitConfig(iterations=1000, finetune_flame=True)
    first, middle, last = (schedule.learning_rates(config, i, 2.0) for i in (0, 500, 1000))
    assert first["means"] == pytest.approx(0.01)
    assert last["means"] == pytest.approx(0.0001)
    assert middle["means"] == pytest.approx((first["means"] * last["means"]) ** 0.5)
    assert {k: v for k, v in first.items() if k != "means"} == {
        "f_dc": 0.0025, "f_rest": 0.000125, "opacities": 0.05, "scales": 0.017, "quats": 0.001, "expr": 1e-3,
        "translation": 1e-6, "rotation": 1e-5, "neck_pose": 1e-5, "jaw_pose": 1e-5, "eyes_pose": 1e-5,
    }  # fmt: skip


def test_gaussian_avatars_schedule():
    config = FitConfig()
    events = [i for i in range(1, 200_001) if schedule.densifies(config, i)]
    assert events[:2] == [12_000, 14_000]
    assert np.unique(np.diff(events)).tolist() == [2000]
    resets = [i for i in range(1, 200_001) if schedule.resets_opacities(config, i)]
    assert resets == [10_000, 60_000, 120_000, 180_000]
    assert not schedule.prunes_large(config, 60_000)
    assert schedule.prunes_large(config, 60_001)
    assert not schedule.densifies(config, 600_000)
    assert [schedule.active_sh_degree(FitConfig(sh_degree=3), i) for i in (1, 1000, 2500, 9000)] == [0, 1, 2, 3]


def test_budget_rounds_end_at_the_budget():
    config = FitConfig(iterations=1000, max_points=500, budget_at=0.6, budget_steps=3)
    num = 800
    rounds = [(i, n) for i in range(1, 1001) if (n := schedule.budget_at(config, i, num)) is not None]
    assert next(i for i, _ in rounds) == 600
    for i in range(1, 1001):
        if (n := schedule.budget_at(config, i, num)) is not None:
            assert n < num
            num = n
    assert num == 500
    assert schedule.budget_at(config, 600, 400) is None
    assert not any(schedule.densifies(config, i) for i in range(600, 1001))


def test_views_are_shuffled_passes():
    order = view_order(7, 3, 0, 21)
    assert all(sorted(order[k : k + 7]) == list(range(7)) for k in (0, 7, 14))
    np.testing.assert_array_equal(order[5:17], view_order(7, 3, 5, 12))
    assert not np.array_equal(order[:7], order[7:14])
    assert not np.array_equal(order[:7], view_order(7, 4, 0, 7))


def test_cameras_extent():
    viewmats = np.tile(np.eye(4), (2, 1, 1))
    viewmats[1, 0, 3] = -3.0
    assert cameras_extent(viewmats) == pytest.approx(1.1 * 1.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_points": 31}, "less than one Gaussian for each of the head's 32 faces"),
        ({"iterations": 0}, "fit.iterations is 0"),
        ({"sh_degree": 4}, "fit.sh_degree is 4"),
        ({"split_std": "x"}, "fit.split_std is 'x'"),
        ({"lr_means_final": 0.0}, "both must be above 0"),
    ],
)
def test_impossible_configurations_are_sentences(change, message):
    with pytest.raises(UserError, match=message):
        schedule.check(dataclasses.replace(FitConfig(), **change), 32)
