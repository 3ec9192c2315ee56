"""head_points: even, fixed, oriented outwards, and measured in the template's box."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.files import UserError
from pointillist_jax.flame import flame_vertices, open_head
from pointillist_jax.flame.surface_points import head_points, surface_points
from tests.conftest import random_params


@pytest.fixture(scope="module")
def model():
    return open_head("coarse")


def areas(vertices, faces) -> np.ndarray:
    a, b, c = (np.asarray(vertices, np.float64)[np.asarray(faces)[:, i]] for i in range(3))
    return np.linalg.norm(np.cross(b - a, c - a), axis=-1) / 2


def test_every_face_gets_the_points_its_area_asks_for(model):
    table = surface_points(model, 4096)
    assert table.faces.shape == (4096,)
    assert table.barycentrics.min() >= 0
    np.testing.assert_allclose(table.barycentrics.sum(-1), 1, atol=1e-6)
    area = areas(model.v_template, model.faces)
    expected = 4096 * area / area.sum()
    assert np.abs(np.bincount(table.faces, minlength=model.num_faces) - expected).max() < 1 + 1e-6
    # Inside a triangle they are even too: the mean is the centroid, with the deviation of a uniform distribution.
    np.testing.assert_allclose(table.barycentrics.mean(0), 1 / 3, atol=0.01)
    np.testing.assert_allclose(table.barycentrics.std(0), 18**-0.5, atol=0.01)


def test_they_lie_on_the_mesh_and_look_outwards(model, rng):
    params = random_params(rng, model, (2,)).replace(static_offset=None)
    vertices = flame_vertices(model, params)
    points = head_points(model, vertices, 500)
    assert points.shape == (2, 500, 6)
    table = surface_points(model, 500)
    corners = np.asarray(vertices, np.float64)[:, np.asarray(model.faces)[table.faces]]
    back = np.asarray(points[..., :3]) * table.half_side + table.center
    np.testing.assert_allclose(back, np.einsum("pc,bpca->bpa", table.barycentrics, corners), atol=1e-6)
    normal = np.cross(corners[:, :, 1] - corners[:, :, 0], corners[:, :, 2] - corners[:, :, 0])
    large = np.linalg.norm(normal, axis=-1) > 1e-7
    assert large.mean() > 0.95
    normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-30)
    np.testing.assert_allclose(np.asarray(points[..., 3:])[large], normal[large], atol=2e-3)


def test_the_template_fills_the_box_and_a_larger_head_is_larger(model):
    template = head_points(model, model.v_template, 2000)
    low, high = template[:, :3].min(0), template[:, :3].max(0)
    assert float(low.min()) >= -1
    assert float(high.max()) <= 1
    assert float((high - low).max()) > 1.95
    large = head_points(model, 1.1 * model.v_template, 2000)
    np.testing.assert_allclose(jnp.ptp(large[:, :3], axis=0), 1.1 * jnp.ptp(template[:, :3], axis=0), rtol=1e-5)


def test_degenerate_faces_are_finite_with_a_finite_gradient(model):
    flat = jnp.zeros_like(model.v_template)
    assert bool(jnp.isfinite(head_points(model, flat, 50)).all())
    assert bool(jnp.isfinite(jax.grad(lambda v: head_points(model, v, 50).sum())(flat)).all())


def test_it_runs_inside_jit_with_a_table_made_outside(model):
    table = surface_points(model, 64)
    expected = head_points(model, model.v_template, 64)
    again = jax.jit(lambda m, v: head_points(m, v, table=table))(model, model.v_template)
    np.testing.assert_allclose(again, expected, atol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda v: head_points(model, v, 64))(model.v_template), expected, atol=1e-6)
    with pytest.raises(UserError, match="make `table = surface_points"):
        jax.jit(lambda m, v: head_points(m, v))(model, model.v_template)


def test_bad_input_is_refused(model):
    with pytest.raises(UserError, match="vertices have shape"):
        head_points(model, jnp.zeros((7, 3)))
    with pytest.raises(UserError, match="0 points"):
        surface_points(model, 0)
    with pytest.raises(UserError, match="both must be positive"):
        surface_points(model.replace(v_template=jnp.zeros_like(model.v_template)))
