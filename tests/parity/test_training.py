"""Optimiser steps of both stages from the same weights and batches: losses, parameters, moments; JAX and PyTorch."""

from __future__ import annotations

import copy
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pointillist_jax.configs import EncoderConfig, TrainConfig, preset
from pointillist_jax.models.gaussian_decoder import param_specs
from pointillist_jax.models.layers import init_params
from pointillist_jax.training import ar, decoder
from pointillist_jax.training.state import TrainState, make_optimizer, make_schedule, train_step
from tests.models.test_gaussian_decoder import CONFIG as DECODER
from tests.models.tiny_ar import changed, random_batch
from tests.parity.heads import params_of, random_head
from tests.renderer_bridge.scenes import cameras

torch = pytest.importorskip("torch")
from experiments.torch_parity import stage_two  # noqa: E402
from experiments.torch_reference import condition, flame, training  # noqa: E402
from experiments.torch_reference.gaussian_decoder import GaussianDecoder  # noqa: E402
from experiments.torch_reference.layers import RMSNorm, load_arrays  # noqa: E402
from experiments.torch_reference.point_step import PointStepTransformer  # noqa: E402
from experiments.torch_reference.point_transformer import PointTransformer  # noqa: E402
from tests.parity.compare import assert_close, assert_same_gradients, to_torch  # noqa: E402

pytestmark = pytest.mark.usefixtures("x64")
TRAIN = TrainConfig(
    steps=7, learning_rate=3e-3, schedule="cosine", warmup_steps=3, weight_decay=0.1, clip_norm=0.5, accumulate=2,
    z_loss=0.1,
)  # fmt: skip


def random_weights(rng, specs):
    params = nn.unbox(init_params(specs, jax.random.PRNGKey(0), jnp.float64))
    return jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape), params)


def assert_same_steps(params, module, step, loss_fn, config: TrainConfig, batches) -> None:
    """As many steps as batches: every loss, and at the end every parameter and both moments.

    Adam divides gradients by their own size. Where they are nothing but rounding (the bias of keys has none, for
    example) its steps are noise in both programs; such entries are left out.

    Args:
      module: that trains; `step` (optimizer, batch) → metrics.
    """
    load_arrays(module, jax.tree.map(np.asarray, params))
    theirs, ours = training.Optimizer(module, config), make_optimizer(config)
    state = TrainState(jnp.zeros((), jnp.int32), params, ours.init(params), None, jax.random.PRNGKey(0))
    take = jax.jit(functools.partial(train_step, loss_fn=loss_fn, optimizer=ours, config=config))
    clipped = []
    for batch in batches:
        state, metrics = take(state, batch)
        found = step(theirs, to_torch(batch))
        assert found.finite
        assert_close(found.loss, metrics["loss"], 1e-8)
        # Reported in float32 there.
        assert_close(found.grad_norm, metrics["grad_norm"], 1e-5)
        clipped.append(float(found.grad_norm) > config.clip_norm)
    assert any(clipped)
    found = {}
    for name, parameter in module.named_parameters():
        moments = theirs.adamw.state[parameter]
        found[name] = parameter.detach().clone(), moments["exp_avg"], moments["exp_avg_sq"]
    expected = []
    for tree in (state.params, adam_state(state.opt_state).mu, adam_state(state.opt_state).nu):
        load_arrays(module, jax.tree.map(np.asarray, tree))
        expected.append({name: p.detach().clone() for name, p in module.named_parameters()})
    left_out = 0
    for name, values in found.items():
        size = expected[1][name].abs()
        sure = size > max(1e-12, 1e-6 * float(size.max()))
        left_out += int((~sure).sum())
        if sure.any():
            for kind, mine, other in zip(("parameter", "mean", "variance"), values, expected, strict=True):
                assert_close(mine[sure], other[name][sure], 1e-7, f"{kind} {name}")
    assert left_out < 0.2 * sum(x[0].numel() for x in found.values())


def adam_state(opt_state):
    is_adam = lambda x: hasattr(x, "mu")  # noqa: E731
    return next(x for x in jax.tree.leaves(opt_state, is_leaf=is_adam) if is_adam(x))


def test_optimizer_on_given_gradients(rng):
    """Decay of matrices only, clipping now and then, warm-up, bias corrections: to rounding."""
    config = dataclasses.replace(TRAIN, clip_norm=5.0)
    params = {"up": {"kernel": rng.normal(size=(3, 5)), "bias": rng.normal(size=5)}, "norm": rng.normal(size=4)}

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.norm = torch.nn.Linear(3, 5), RMSNorm(4)

    module = Module()
    load_arrays(module, params)
    theirs, ours = training.Optimizer(module, config), make_optimizer(config)
    current, state = jax.tree.map(jnp.asarray, params), ours.init(params)
    norms = []
    for step in range(9):
        gradients = jax.tree.map(lambda x, step=step: (1 + step % 3) * rng.normal(size=x.shape), params)
        updates, state = ours.update(gradients, state, current)
        current = optax.apply_updates(current, updates)
        module.up.weight.grad = torch.tensor(gradients["up"]["kernel"].T.copy())
        module.up.bias.grad = torch.tensor(gradients["up"]["bias"])
        module.norm.weight.grad = torch.tensor(gradients["norm"])
        norms.append(float(theirs.apply(torch.zeros(())).grad_norm))
        for found, expected in (
            (module.up.weight.T, current["up"]["kernel"]),
            (module.up.bias, current["up"]["bias"]),
            (module.norm.weight, current["norm"]),
        ):
            assert_close(found, expected, 1e-13)
    assert min(norms) < 5 < max(norms)


def test_schedule():
    for config in (TRAIN, dataclasses.replace(TRAIN, schedule="constant"), dataclasses.replace(TRAIN, warmup_steps=0)):
        expected = [float(make_schedule(config)(step)) for step in range(10)]
        np.testing.assert_allclose([training.learning_rate(config, step) for step in range(10)], expected, rtol=1e-12)


def conditioned_window(rng, config, head):
    """Four windows with some targets masked, and the portraits and FLAME parameters of their people."""
    batch = {name: np.asarray(x) for name, x in random_batch(rng, config, batch=4).items() if name != "context"}
    batch |= {"positions": np.tile(np.arange(32), (4, 1)), "mask": rng.random((4, 32)) < 0.8}
    portrait = rng.integers(0, 256, (4, 28, 28, 3)).astype(np.uint8)
    return {**batch, "condition": {"portrait": portrait, "flame": params_of(rng, head, 4)}}


def stage_one_of(config, head):
    transformer = PointStepTransformer if config.step == "point" else PointTransformer
    return training.StageOne(transformer(config), condition.Condition(config, flame.make_head(vars(head))))


@pytest.mark.parametrize("options", [
    {"condition_loss": 0.7}, {"condition_loss": 1.0, "step": "point", "window": 8},
    {"condition_loss": 2.0, "loss_support": "vocab", "coord_tables": "learned"},
], ids=["token", "point", "vocab"])  # fmt: skip
def test_the_loss_of_marginals(rng, options):
    """Alone, and with the next-token loss: both sums and the gradient of every parameter."""
    config = changed(dtype="float64", layers=1, encoder=EncoderConfig(image_size=28, num_points=40), **options)
    head = random_head(rng)
    params = random_weights(rng, ar.init_params(config).args[0])
    batch = conditioned_window(rng, config, head)
    loss_fn = ar.make_loss(config, head, 0.1)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def total(params):
        total, count, extra = loss_fn(params, batch, None)
        return total, (count, extra["marginal"][0])

    (expected, (count, marginal)), gradients = total(params)
    model, given = stage_one_of(config, head), to_torch(batch)
    load_arrays(model, jax.tree.map(np.asarray, params))
    alone = model.marginal_loss(model.condition(given["condition"]), given["targets"], given["mask"])
    assert_close(alone, marginal)
    alone.backward()
    assert all(p.grad is None for p in model.transformer.parameters())
    assert all(p.grad.abs().max() > 0 for p in model.condition.marginals.parameters())
    model.zero_grad()
    found, number = model(given, 0.1)
    assert int(number) == int(count)
    assert_close(found, expected)
    found.backward()
    assert_same_gradients(model, gradients, load_arrays)


@pytest.mark.slow
@pytest.mark.parametrize("condition_loss", [0.0, 1.0])
def test_stage_one(rng, condition_loss):
    """With the tiny encoders trained along; windows with different numbers of supervised tokens in two parts."""
    config = changed(
        dtype="float64", layers=1, encoder=EncoderConfig(image_size=28, num_points=40), condition_loss=condition_loss
    )
    head = random_head(rng)
    params = random_weights(rng, ar.init_params(config).args[0])
    batches = [conditioned_window(rng, config, head) for _ in range(4)]
    model = stage_one_of(config, head)
    loss_fn = ar.make_loss(config, head, TRAIN.z_loss)
    step = lambda optimizer, batch: training.stage_one_step(model, optimizer, batch)  # noqa: E731
    assert_same_steps(params, model, step, loss_fn, TRAIN, batches)


@pytest.mark.slow
def test_stage_two(rng):
    """Two subjects, two views each, one view of no weight."""
    config = dataclasses.replace(DECODER, layers=1, dtype="float64", cross_attention=False)
    settings = dataclasses.replace(TRAIN, weight_decay=0.0, b2=0.999, clip_norm=0.01)
    head = random_head(rng)
    params = random_weights(rng, param_specs(config))
    viewmats, Ks = (np.asarray(x, np.float64) for x in cameras(2, 20, 18, distance=0.5))
    batches = []
    for _ in range(3):
        canonical = {name: value for name, value in params_of(rng, head, 2).items() if name != "static_offset"}
        driving = {name: value for name, value in params_of(rng, head, 2, 2).items() if name != "static_offset"}
        for pose in ("rotation", "translation"):
            canonical[pose] *= 0
            driving[pose] *= 0.1
        batches.append({
            "points": rng.normal(0, 0.06, (2, 24, 3)),
            "hidden": rng.normal(size=(2, 24, 4, config.feature_width)),
            "num_points": np.array([24, 15]),
            "binding": rng.integers(0, 32, (2, 24)),
            "canonical": canonical,
            "flame": driving,
            "viewmats": np.stack([viewmats] * 2),
            "Ks": np.stack([Ks] * 2),
            "image": rng.integers(0, 256, (2, 2, 18, 20, 3)).astype(np.uint8),
            "weight": np.array([[1.0, 1.0], [1.0, 0.0]]),
        })  # fmt: skip
    decoder_twin = GaussianDecoder(config)
    model = training.StageTwo(decoder_twin, flame.make_head(vars(head)))
    loss_fn = decoder.make_loss(config, {"head": head}, 20, 18, capacity=2048, backend="jax")
    step = lambda optimizer, batch: training.stage_two_step(model, optimizer, batch)  # noqa: E731
    assert_same_steps(params, decoder_twin, step, loss_fn, settings, batches)


@pytest.mark.slow
@pytest.mark.usefixtures("one_torch_thread")
def test_stage_two_parts_from_itself_where_it_takes_large_steps(rng):
    """Why `compare_torch` takes few steps of stage two: thresholds of the rasteriser switch pixels on and off.

    Torch against itself, weights moved by one rounding in float64.
    """
    config = dataclasses.replace(preset("tiny").decoder, dtype="float64", lambda_lpips=0.0)
    scenes = [stage_two.make_scene(rng, config, 32, np.float64) for _ in range(30)]
    first = GaussianDecoder(config).double()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.05 * to_torch(rng.normal(size=parameter.shape)))
    apart = {}
    for rate in (2e-3, 1e-4):
        curves = []
        for ulps in (0, 1):
            twin = copy.deepcopy(first)
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.mul_(1 + ulps * 2.0**-52 * to_torch(rng.choice([-1.0, 1.0], parameter.shape)))
            model = training.StageTwo(twin, flame.make_head(vars(scenes[0].head)))
            optimizer = training.Optimizer(twin, dataclasses.replace(config.train, learning_rate=rate))
            curves.append([float(training.stage_two_step(model, optimizer, to_torch(s.batch)).loss) for s in scenes])
        apart[rate] = np.abs(np.divide(*curves) - 1)
    assert apart[2e-3][:10].max() < 1e-13
    assert apart[2e-3].max() > 1e-10
    assert apart[1e-4].max() < 1e-13


def test_a_step_that_is_not_finite_changes_nothing(rng):
    config = changed()
    model = training.StageOne(PointTransformer(config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = to_torch(random_batch(rng, config))
    batch["context"][0, 0, 0] = torch.nan
    optimizer = training.Optimizer(model, TRAIN)
    assert not training.stage_one_step(model, optimizer, batch).finite
    assert (optimizer.step, optimizer.updates) == (1, 0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
