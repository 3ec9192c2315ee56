"""Rigged fits on disk: found where GaussianAvatars puts them, read back as written, refused by name."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.data.fits import find_fits, load_fit, save_fit
from pointillist_jax.files import FileFormatError, UserError
from pointillist_jax.flame import face_frames, flame_vertices, open_head
from pointillist_jax.gaussians import Gaussians, save_ply
from tests.conftest import random_params


@pytest.fixture(scope="module")
def model():
    return open_head("coarse")


def random_fit(rng, model, num: int = 50, timesteps: int = 2) -> tuple[Gaussians, object]:
    quats = rng.normal(size=(num, 4))
    gaussians = Gaussians(
        means=jnp.asarray(rng.normal(size=(num, 3)), jnp.float32),
        quats=jnp.asarray(quats / np.linalg.norm(quats, axis=1, keepdims=True), jnp.float32),
        scales=jnp.asarray(rng.uniform(0.1, 1, (num, 3)), jnp.float32),
        opacities=jnp.asarray(rng.uniform(0.05, 0.95, num), jnp.float32),
        colors=jnp.asarray(rng.uniform(size=(num, 3)), jnp.float32),
        binding=jnp.asarray(rng.integers(0, model.num_faces, num), jnp.int32),
    )
    params = random_params(rng, model, (timesteps,))
    return gaussians, params.replace(shape=params.shape[0], static_offset=params.static_offset[0])


def test_round_trip_through_the_layout_of_gaussianavatars(rng, model, tmp_path):
    gaussians, params = random_fit(rng, model)
    older, _ = random_fit(rng, model, 10)
    save_fit(tmp_path / "306" / "point_cloud" / "iteration_900", older, params, model)
    save_fit(tmp_path / "306" / "point_cloud" / "iteration_1000", gaussians, params, model)
    save_fit(tmp_path / "synthetic" / "truth", older, params, model)
    (tmp_path / "notes").mkdir()
    found = find_fits(tmp_path)
    assert list(found) == ["306", "synthetic"]
    fit = load_fit(found["306"], model)
    assert fit.folder.name == "iteration_1000"
    assert load_fit(found["synthetic"], model).gaussians.num_gaussians == 10
    np.testing.assert_array_equal(fit.gaussians.binding, gaussians.binding)
    for name in ("means", "scales", "opacities", "colors"):
        np.testing.assert_allclose(getattr(fit.gaussians, name), getattr(gaussians, name), rtol=2e-6, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, fit.params, params)


def test_canonical_points_lie_on_the_identitys_canonical_mesh(rng, model, tmp_path):
    gaussians, params = random_fit(rng, model)
    save_fit(tmp_path / "a", gaussians.replace(means=jnp.zeros_like(gaussians.means)), params, model)
    canonical, world = load_fit(tmp_path / "a", model).canonical(model, jaw=0.2)
    neutral = model.neutral_params().replace(
        shape=params.shape, static_offset=params.static_offset, jaw_pose=jnp.array([0.2, 0.0, 0.0])
    )
    jax.tree.map(np.testing.assert_array_equal, canonical, neutral)
    frames = face_frames(flame_vertices(model, neutral), model.faces)
    np.testing.assert_allclose(world.means, frames.center[gaussians.binding], atol=1e-7)
    assert world.binding is None


def test_what_is_no_fit_is_refused_by_name(rng, model, tmp_path):
    gaussians, params = random_fit(rng, model)
    with pytest.raises(FileNotFoundError, match="holds no fits"):
        find_fits(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no fit;"):
        load_fit(tmp_path / "missing", model)
    with pytest.raises(UserError, match="binding"):
        save_fit(tmp_path / "x", gaussians.replace(binding=None), params, model)
    with pytest.raises(UserError, match=f"the head has {model.num_faces} faces"):
        save_fit(tmp_path / "x", gaussians.replace(binding=gaussians.binding + model.num_faces), params, model)
    save_fit(tmp_path / "x", gaussians, params, model)
    save_ply(tmp_path / "x" / "point_cloud.ply", gaussians.replace(binding=None))
    with pytest.raises(FileFormatError, match="has no binding_0"):
        load_fit(tmp_path / "x", model)
    save_ply(tmp_path / "x" / "point_cloud.ply", jax.tree.map(lambda value: value[:0], gaussians))
    with pytest.raises(FileFormatError, match="holds no Gaussians"):
        load_fit(tmp_path / "x", model)
    (tmp_path / "x" / "flame_param.npz").unlink()
    save_ply(tmp_path / "x" / "point_cloud.ply", gaussians)
    with pytest.raises(FileNotFoundError, match=r"flame_param\.npz does not exist"):
        load_fit(tmp_path / "x", model)
