"""Whole fits of a ball of 32 faces: quality, budget, resume, growth, and what the user is told."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from pointillist_jax.data.fits import load_fit, save_fit
from pointillist_jax.files import UserError
from pointillist_jax.fitting import ArrayViews, FitData, evaluate, fit, render_views
from pointillist_jax.fitting.evaluate import count_by_part
from pointillist_jax.fitting.state import state_of
from pointillist_jax.fitting.step import make_scene
from tests.fitting.scenes import SCHEDULE, SIZE, person

# One bucket and one size of picture, so that all fits here share two compiled programs.


@pytest.fixture(scope="module")
def ball(tmp_path_factory):
    return person(tmp_path_factory.mktemp("ball"))


@pytest.fixture(scope="module")
def fitted(ball, tmp_path_factory):
    data, model = ball
    config = dataclasses.replace(SCHEDULE, iterations=160, densify_interval=20, opacity_reset_interval=0)
    return fit(data, model, config), config


def same_bytes(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a.state), jax.tree.leaves(b.state), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def test_a_fit_learns_and_keeps_to_its_budget(ball, fitted):
    data, model = ball
    result, config = fitted
    first = fit(data, model, dataclasses.replace(config, iterations=1))
    look = {"capacity": result.capacity}
    before, after = evaluate(first.state, first.scene, data, **look), evaluate(result.state, result.scene, data, **look)
    for split, gain in {"train": 4, "val": 3, "test": 1}.items():
        assert after[split]["psnr"] > before[split]["psnr"] + gain, split
        assert after[split]["ssim"] > before[split]["ssim"], split
        assert len(after[split]["per_view"]) == len(data.splits[split]) == after[split]["views"]
    assert result.gaussians.num_gaussians == config.max_points
    assert set(np.asarray(result.gaussians.binding)) == set(range(model.num_faces))
    grew = [row["gaussians"] for row in result.history]
    assert max(grew) > config.max_points
    assert any(row.get("cloned", 0) + row.get("split", 0) > 0 for row in result.history)


def test_scores_are_of_the_renders(ball, fitted):
    data, _ = ball
    result, _ = fitted
    views = data.splits["val"]
    # A capacity that cannot suffice is grown, not obeyed.
    images = list(render_views(result.state, result.scene, views, capacity=7))
    only = FitData(data.subject, data.params, 1.0, {"val": views})
    scores = evaluate(result.state, result.scene, only, capacity=result.capacity)
    for n, (image, row) in enumerate(zip(images, scores["val"]["per_view"], strict=True)):
        truth = views.image(n)
        assert image.shape == (SIZE, SIZE, 3)
        assert row["psnr"] == pytest.approx(-10 * np.log10(np.mean((image - truth) ** 2)), abs=1e-3)
        assert row["l1"] == pytest.approx(np.abs(image - truth).mean(), abs=1e-5)
        assert (row["timestep"], row["camera"]) == (views.timesteps[n], views.camera_indices[n])


def test_parts_count_every_gaussian_once(ball, fitted):
    data, model = ball
    result, _ = fitted
    grouped = dataclasses.replace(data, face_groups={"two": np.array([0, 5]), "none": np.array([], int)})
    parts = count_by_part(result.state, grouped, model)
    assert set(parts) == {"below", "above", "two"}
    assert parts["below"]["gaussians"] + parts["above"]["gaussians"] == result.gaussians.num_gaussians
    assert parts["two"]["gaussians"] == np.isin(result.gaussians.binding, [0, 5]).sum()
    assert parts["two"]["faces"] == 2
    above = parts["above"]
    assert (above["faces"], above["added"]) == (16, above["gaussians"] - 16)
    assert above["per_cm2"] == pytest.approx(above["gaussians"] / above["area_cm2"], rel=1e-3, abs=1e-3)


def test_resuming_gives_the_same_bits(ball, tmp_path):
    data, model = ball
    checkpoint = tmp_path / "checkpoint.npz"
    straight = fit(data, model, SCHEDULE)
    rng = np.random.default_rng()
    stops = np.sort(rng.choice(np.arange(1, SCHEDULE.iterations), 3, replace=False))
    for stop in stops:

        def interrupt(iteration, figures, stop=stop):
            if iteration >= stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit(data, model, SCHEDULE, checkpoint=checkpoint, progress=interrupt)
    resumed = fit(data, model, SCHEDULE, checkpoint=checkpoint)
    assert same_bytes(straight, resumed), stops
    assert straight.history == resumed.history
    assert not same_bytes(straight, fit(data, model, dataclasses.replace(SCHEDULE, seed=1)))


@pytest.mark.slow
def test_view_dependent_colours_resets_and_fine_tuning(ball, tmp_path):
    """Degrees 0 to 2, two resets of the opacities and moving parameters: resumed bit for bit, saved and rendered."""
    data, model = ball
    config = dataclasses.replace(
        SCHEDULE, sh_degree=2, sh_interval=8, lr_f_rest=0.02, lr_opacities=0.5, finetune_flame=True, save_interval=1
    )  # fmt: skip
    straight = fit(data, model, config)
    reset = config.opacity_reset_interval
    assert [r["iteration"] for r in straight.history if r.get("opacities_reset")] == [config.densify_from, reset]

    checkpoint, highest = tmp_path / "checkpoint.npz", {}
    stops = (reset - 1, reset, int(np.random.default_rng().integers(reset + 1, config.iterations)))
    for stop in stops:

        def interrupt(iteration, figures, stop=stop):
            if iteration == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit(data, model, config, checkpoint=checkpoint, progress=interrupt)
        with np.load(checkpoint) as saved:
            assert saved["step"] == stop
            highest[stop] = float(jax.nn.sigmoid(saved["params.opacities"][: saved["num"][0]]).max())
    assert highest[reset] == pytest.approx(0.01)
    assert highest[reset - 1] > 0.05
    result = fit(data, model, config, checkpoint=checkpoint)
    assert same_bytes(straight, result), stops
    assert straight.history == result.history
    assert np.abs(np.asarray(result.params.expr - data.params.expr)).max() > 1e-3

    sh = np.asarray(result.gaussians.sh)
    assert sh.shape == (config.max_points, 9, 3)
    for band in (sh[:, :1], sh[:, 1:4], sh[:, 4:]):
        assert np.abs(band).max() > 0.05
    save_fit(tmp_path / "fit", result.gaussians, result.params, model)
    loaded = load_fit(tmp_path / "fit", model)
    np.testing.assert_array_equal(loaded.gaussians.sh, sh)
    np.testing.assert_array_equal(loaded.gaussians.binding, result.gaussians.binding)

    look = {"sh_degree": 2, "capacity": result.capacity}
    scores = evaluate(result.state, result.scene, data, **look)
    plain = evaluate(result.state, result.scene, data, **look | {"sh_degree": 0})
    for split in data.splits:
        assert abs(scores[split]["psnr"] - plain[split]["psnr"]) > 0.05, split
    # What was saved looks like what was fitted, from all sides.
    scene = make_scene(model, loaded.params, finetune_flame=False)
    again = evaluate(state_of(loaded.gaussians, result.state.bucket), scene, data, **look)
    for split in data.splits:
        assert again[split]["psnr"] == pytest.approx(scores[split]["psnr"], abs=2e-3), split


def test_buckets_grow_without_a_budget(ball):
    data, model = ball
    config = dataclasses.replace(
        SCHEDULE, iterations=17, max_points=0, densify_interval=3, densify_grad=0.0, prune_opacity=0.0,
        prune_large_from=1000, opacity_reset_interval=0, densify_from=1,
    )  # fmt: skip
    result = fit(data, model, config)
    assert result.gaussians.num_gaussians == result.state.bucket == 1024
    assert np.isfinite(result.history[-1]["loss"])


def test_flame_is_fine_tuned_only_when_asked(ball, fitted):
    data, model = ball
    config = dataclasses.replace(SCHEDULE, iterations=6, finetune_flame=True, views_per_step=2)
    tuned = fit(data, model, config)
    assert np.abs(np.asarray(tuned.params.expr - data.params.expr)).max() > 1e-4
    assert np.abs(np.asarray(tuned.params.rotation - data.params.rotation)).max() > 1e-7
    np.testing.assert_array_equal(tuned.params.shape, data.params.shape)
    np.testing.assert_array_equal(fitted[0].params.expr, data.params.expr)
    # The test's timesteps are never seen, so that nothing of it leaks.
    unseen = sorted(set(range(data.num_timesteps)) - set(data.splits["train"].timesteps.tolist()))
    assert unseen
    np.testing.assert_array_equal(tuned.params.expr[np.array(unseen)], data.params.expr[np.array(unseen)])


def test_wrong_data_and_checkpoints_are_sentences(ball, tmp_path):
    data, model = ball
    checkpoint = tmp_path / "checkpoint.npz"
    short = dataclasses.replace(SCHEDULE, iterations=4)
    fit(data, model, short, checkpoint=checkpoint)
    with pytest.raises(UserError, match=r"lr_quats=0.01 \(now 0.5\)"):
        fit(data, model, dataclasses.replace(short, lr_quats=0.5), checkpoint=checkpoint)
    # The open heads lie in one file and differ by their faces.
    fewer = model.replace(faces=model.faces[:-1], face_regions=model.face_regions[:-1])
    with pytest.raises(UserError, match="another head"):
        fit(data, fewer, short, checkpoint=checkpoint)
    with pytest.raises(UserError, match="other cameras, timesteps or parameters"):
        fit(dataclasses.replace(data, subject="someone"), model, short, checkpoint=checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"checkpoint.npz cannot be read"):
        fit(data, model, short, checkpoint=checkpoint)
    with pytest.raises(UserError, match="no training views"):
        fit(dataclasses.replace(data, splits={}), model, short)
    train = data.splits["train"]
    late = ArrayViews(np.zeros((1, SIZE, SIZE, 3)), train.viewmats[:1], train.Ks[:1], np.array([9]), np.array([0]))
    with pytest.raises(UserError, match="timesteps beyond"):
        fit(dataclasses.replace(data, splits={"train": late}), model, short)
