"""Skinning against two independent twins, and its gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.files import UserError
from pointillist_jax.flame import FlameModel, flame_vertices, load_flame
from pointillist_jax.flame.rotations import (
    inverse_3x3,
    nearest_rotation,
    quat_conjugate,
    quat_multiply,
    quat_to_rotation,
    rodrigues,
    rotation_to_quat,
)
from tests.conftest import random_params
from tests.flame import numpy_twin


@pytest.mark.usefixtures("x64")
def test_agrees_with_numpy_twin_in_float64(flame_pickle, rng):
    model = load_flame(flame_pickle)
    assert model.v_template.dtype == jnp.float64
    params = random_params(rng, model, (3,))
    got = jax.jit(flame_vertices)(model, params)
    for i in range(3):
        want = numpy_twin.vertices(model, jax.tree.map(lambda x, i=i: x[i], params))
        np.testing.assert_allclose(got[i], want, rtol=0, atol=1e-12)


def test_agrees_with_body_models(flame_pickle, rng):
    torch = pytest.importorskip("torch")
    flame = pytest.importorskip("body_models.flame.torch")
    reference = flame.FLAME(model_path=str(flame_pickle))
    model = load_flame(flame_pickle, teeth=False)
    params = random_params(rng, model, (4,)).replace(static_offset=None)
    t = {name: torch.tensor(np.asarray(value)) for name, value in vars(params).items() if value is not None}
    pose = torch.stack([t["neck_pose"], t["jaw_pose"], t["eyes_pose"][:, :3], t["eyes_pose"][:, 3:]], dim=1)
    with torch.no_grad():
        want = reference.forward_vertices(
            pose,
            head_rotation=t["rotation"],
            shape=t["shape"],
            expression=t["expr"],
            global_translation=t["translation"],
        )
    np.testing.assert_allclose(flame_vertices(model, params), want.numpy(), rtol=0, atol=1e-6)


def test_leading_axes_broadcast_and_vmap_agree(flame_model, rng):
    params = random_params(rng, flame_model, (2, 3))
    got = flame_vertices(flame_model, params)
    assert got.shape == (2, 3, flame_model.num_vertices, 3)
    mapped = jax.vmap(jax.vmap(flame_vertices, (None, 0)), (None, 0))(flame_model, params)
    np.testing.assert_allclose(got, mapped, atol=1e-6)
    one_identity = params.replace(shape=params.shape[0, 0], static_offset=None, rotation=jnp.zeros(3))
    full = one_identity.replace(
        shape=jnp.broadcast_to(one_identity.shape, params.shape.shape), rotation=jnp.zeros((2, 3, 3))
    )
    np.testing.assert_allclose(flame_vertices(flame_model, one_identity), flame_vertices(flame_model, full), atol=1e-6)


def test_fewer_coefficients_are_zero_padded(flame_model, rng):
    params = random_params(rng, flame_model)
    short = params.replace(shape=params.shape[:10], expr=params.expr[:7])
    zeroed = params.replace(shape=params.shape.at[10:].set(0), expr=params.expr.at[7:].set(0))
    np.testing.assert_allclose(flame_vertices(flame_model, short), flame_vertices(flame_model, zeroed), atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_gradients_are_finite_at_zero_and_match_finite_differences(flame_pickle, rng):
    model = load_flame(flame_pickle)
    weight = jnp.asarray(rng.normal(size=(model.num_vertices, 3)))

    @jax.jit
    def loss(params):
        return (weight * flame_vertices(model, params)).sum()

    directions = random_params(rng, model)
    neutral = model.neutral_params().replace(static_offset=jnp.zeros((model.num_vertices, 3)))
    for params in (neutral, random_params(rng, model), jax.tree.map(lambda x: 1e-3 * x, random_params(rng, model))):
        gradient = jax.jit(jax.grad(loss))(params)
        assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))
        for name, direction in vars(directions).items():
            value, h = getattr(params, name), 1e-5
            ahead, behind = (loss(params.replace(**{name: value + s * h * direction})) for s in (1, -1))
            numeric = (ahead - behind) / (2 * h)
            np.testing.assert_allclose(jnp.vdot(getattr(gradient, name), direction), numeric, rtol=1e-6, atol=1e-7)


def test_gradients_finite_at_zero_in_float32(flame_model):
    gradient = jax.grad(lambda p: flame_vertices(flame_model, p).sum())(flame_model.neutral_params())
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))
    assert float(jnp.abs(gradient.jaw_pose).max()) > 0


def test_global_rotation_pivots_about_the_root_joint(flame_model):
    neutral = flame_model.neutral_params()
    root = flame_model.joint_regressor[0] @ flame_vertices(flame_model, neutral)
    turned = neutral.replace(rotation=jnp.array([0.0, 1.0, 0.0]))
    want = (flame_vertices(flame_model, neutral) - root) @ rodrigues(turned.rotation).T + root
    np.testing.assert_allclose(flame_vertices(flame_model, turned), want, atol=1e-6)


@pytest.mark.parametrize("field", ["shape", "expr", "rotation", "eyes_pose", "static_offset"])
def test_wrong_lengths_are_named(flame_model: FlameModel, field):
    params = flame_model.neutral_params()
    wrong = jnp.zeros((5023, 3)) if field == "static_offset" else jnp.zeros(999)
    with pytest.raises(UserError, match=field):
        flame_vertices(flame_model, params.replace(**{field: wrong}))


@pytest.mark.usefixtures("x64")
def test_rotations_against_scipy(rng):
    scipy_rotation = pytest.importorskip("scipy.spatial.transform").Rotation
    # Angles from 0 to beyond π, with the switch to the series at |r|² = 1e-3 well covered.
    length = np.concatenate([[0.0, 1e-12, 1e-6], np.geomspace(1e-4, 0.1, 200), rng.uniform(0, 7, 400), [np.pi]])
    axis = rng.normal(size=(len(length), 3))
    r = axis / np.linalg.norm(axis, axis=1, keepdims=True) * length[:, None]
    want = scipy_rotation.from_rotvec(r).as_matrix()
    got = rodrigues(jnp.asarray(r))
    np.testing.assert_allclose(got, want, atol=1e-14)
    quat = rotation_to_quat(got)
    np.testing.assert_allclose(quat_to_rotation(quat), want, atol=1e-13)
    np.testing.assert_allclose(quat_to_rotation(3.7 * quat), want, atol=1e-13)
    np.testing.assert_allclose(quat_to_rotation(quat_multiply(quat, quat[::-1])), want @ want[::-1], atol=1e-13)
    identity = np.tile([1.0, 0, 0, 0], (len(quat), 1))
    np.testing.assert_allclose(quat_multiply(quat, quat_conjugate(quat)), identity, atol=1e-14)


@pytest.mark.usefixtures("x64")
def test_nearest_rotation_is_the_polar_factor(rng):
    a, b = (rodrigues(jnp.asarray(rng.normal(0, 0.6, (500, 3)))) for _ in range(2))
    w = rng.uniform(0, 1, (500, 1, 1))
    blend = w * a + (1 - w) * b
    u, _, vt = np.linalg.svd(blend)
    np.testing.assert_allclose(nearest_rotation(blend), u @ vt, atol=1e-9)
    np.testing.assert_allclose(blend @ inverse_3x3(blend), np.tile(np.eye(3), (500, 1, 1)), atol=1e-12)
