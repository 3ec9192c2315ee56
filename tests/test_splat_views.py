"""What viewers are sent: half floats keep it, it is where the renderer has it, and colours tell what they should."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.flame import animate, bind_points, flame_vertices, open_head
from pointillist_jax.gaussians import Avatar, Gaussians
from pointillist_jax.splat_views import (
    DensityScale,
    binding_colors,
    distinct_colors,
    importance,
    own_colors,
    point_density,
    pose_splats,
    region_colors,
)

HEAD = open_head("coarse")


@pytest.fixture
def avatar(rng) -> Avatar:
    canonical, num = HEAD.neutral_params().canonical(), 50
    binding = rng.integers(0, HEAD.num_faces, num)
    points = np.asarray(flame_vertices(HEAD, canonical))[np.asarray(HEAD.faces)[binding]].mean(axis=1)
    gaussians = Gaussians(
        means=jnp.asarray(points),
        quats=jnp.asarray(rng.normal(size=(num, 4)), jnp.float32),
        scales=jnp.asarray(np.exp(rng.uniform(np.log(2e-4), np.log(2e-2), (num, 3))), jnp.float32),
        opacities=jnp.asarray(rng.uniform(0.1, 0.9, num), jnp.float32),
        colors=jnp.asarray(rng.uniform(-0.1, 1.1, (num, 3)), jnp.float32),
    )
    return Avatar(gaussians, bind_points(HEAD, canonical, gaussians.means, binding))


def test_poses_are_those_of_animate_in_centimetres_and_survive_half_floats(avatar):
    params = HEAD.neutral_params().replace(
        jaw_pose=jnp.array([0.3, 0.0, 0.0]), neck_pose=jnp.array([0.1, 0.4, 0.0]), translation=jnp.array([0.1, 0, 0])
    )
    world = animate(avatar, HEAD, params)
    posed = pose_splats(avatar, HEAD, params)
    np.testing.assert_allclose(posed.centers, 100 * np.asarray(world.means), atol=1e-4)
    # Standard deviations are the square roots of the covariances' eigenvalues: from 0.2 mm to 2 cm, in half floats.
    halves = posed.covariances.astype(np.float16).astype(np.float64)
    traces = np.trace(halves, axis1=1, axis2=2)
    np.testing.assert_allclose(traces, 1e4 * (np.asarray(world.scales, np.float64) ** 2).sum(axis=1), rtol=1e-3)
    largest = np.sqrt(np.linalg.eigvalsh(halves)[:, -1])
    np.testing.assert_allclose(largest, 100 * np.asarray(world.scales).max(axis=1), rtol=1e-3)
    # Their long axes point where the quaternion turns them.
    quat = np.asarray(world.quats)[0] / np.linalg.norm(world.quats[0])
    w, x, y, z = quat
    axes = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    expected = axes @ np.diag((100 * np.asarray(world.scales[0])) ** 2) @ axes.T
    np.testing.assert_allclose(posed.covariances[0], expected, atol=1e-4 * expected.max())
    small = pose_splats(avatar, HEAD, params, size=0.5)
    np.testing.assert_allclose(small.covariances, posed.covariances / 4, rtol=1e-4, atol=1e-7)


def test_own_colors_clip_and_take_the_even_part_of_harmonics(avatar):
    colors = own_colors(avatar.gaussians)
    np.testing.assert_allclose(colors, np.clip(np.asarray(avatar.gaussians.colors), 0, 1))
    sh = np.zeros((50, 4, 3), np.float32)
    sh[:, 0] = (np.asarray(avatar.gaussians.colors) - 0.5) / 0.28209479
    sh[:, 1:] = 7.0
    harmonic = avatar.gaussians.replace(colors=None, sh=jnp.asarray(sh))
    np.testing.assert_allclose(own_colors(harmonic), colors, atol=1e-6)


def test_colors_of_bindings_and_regions(avatar):
    binding = np.array([5, 5, 6, 2000])
    colors = binding_colors(binding)
    np.testing.assert_array_equal(colors[0], colors[1])
    assert np.abs(colors[0] - colors[2]).max() > 0.2
    lips, scalp = HEAD.region_faces("lips"), HEAD.region_faces("scalp")
    regions = region_colors(np.array([lips[0], lips[-1], scalp[0]]), HEAD)
    np.testing.assert_array_equal(regions[0], regions[1])
    assert np.abs(regions[0] - regions[2]).max() > 0.2
    many = distinct_colors(np.arange(40))
    apart = np.abs(many[:, None] - many[None]).max(axis=-1) + np.eye(40)
    assert apart.min() > 0.03
    assert many.min() >= 0
    assert many.max() <= 1


def test_density_counts_points_of_a_surface():
    """A sheet of 1 mm squares has 100 points a square centimetre, one of 2 mm squares 25."""
    fine, coarse = (
        np.stack(np.meshgrid(*[np.arange(41) * step] * 2, [0.0]), -1).reshape(-1, 3) for step in (1e-3, 2e-3)
    )
    densities = point_density(fine), point_density(coarse)
    np.testing.assert_allclose(np.median(densities[0]), 100, rtol=0.2)
    np.testing.assert_allclose(densities[0], 4 * densities[1], rtol=1e-3)
    scale = DensityScale.of(*densities)
    dense, sparse = scale.colors(np.array([1e3, 1.0]))
    assert dense[0] > dense[2]  # Red, and blue.
    assert sparse[2] > sparse[0]
    assert point_density(np.zeros((1, 3))).tolist() == [0]
    assert np.isfinite(point_density(np.zeros((30, 3)))).all()


def test_importance_is_opacity_times_area(avatar):
    scales = np.sort(np.asarray(avatar.gaussians.scales), axis=1)
    area = np.pi * scales[:, 1] * scales[:, 2]
    np.testing.assert_allclose(importance(avatar.gaussians), np.asarray(avatar.gaussians.opacities) * area, rtol=1e-5)
