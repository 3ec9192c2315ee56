"""Avatars in motion: a turned head is a camera turned the other way; rigs of displaced points; what is refused."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.cameras import orbit
from pointillist_jax.files import UserError
from pointillist_jax.flame import animate, bind_points, flame_vertices, open_head
from pointillist_jax.gaussians import Avatar, Gaussians
from pointillist_jax.models.gaussian_decoder import Decoded, rigged
from pointillist_jax.playback import AvatarRenderer

HEAD, SIZE = open_head("coarse"), 96


def random_avatar(rng, num: int = 400, offset: float = 0.004) -> Avatar:
    """Long, thin, coloured Gaussians near the canonical mesh, decoded with offsets."""
    params = HEAD.neutral_params().replace(
        shape=jnp.asarray(rng.normal(0, 0.5, HEAD.shape_dirs.shape[-1]), jnp.float32)
    )
    canonical = params.canonical()
    triangles = np.asarray(flame_vertices(HEAD, canonical))[np.asarray(HEAD.faces)]
    binding = rng.integers(0, HEAD.num_faces, num)
    points = jnp.asarray(np.einsum("pc,pca->pa", rng.dirichlet(np.ones(3), num), triangles[binding]), jnp.float32)
    offsets = jnp.asarray(rng.normal(0, offset, (num, 3)), jnp.float32)
    gaussians = Gaussians(
        means=points + offsets,
        quats=jnp.asarray(rng.normal(size=(num, 4)), jnp.float32),
        scales=jnp.asarray(np.exp(rng.uniform(-7.5, -4.5, (num, 3))), jnp.float32),
        opacities=jnp.asarray(rng.uniform(0.4, 0.95, num), jnp.float32),
        colors=jnp.asarray(rng.uniform(size=(num, 3)), jnp.float32),
    )
    return rigged(Decoded(gaussians, offsets), bind_points(HEAD, canonical, points, jnp.asarray(binding)))


def rigid(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """[4, 4] that moves the points `before` onto `after`."""
    a, b = before - before.mean(0), after - after.mean(0)
    u, _, vt = np.linalg.svd(b.T @ a)
    rotation = u @ np.diag([1, 1, np.sign(np.linalg.det(u @ vt))]) @ vt
    motion = np.eye(4)
    motion[:3, :3], motion[:3, 3] = rotation, after.mean(0) - rotation @ before.mean(0)
    np.testing.assert_allclose(before @ rotation.T + motion[:3, 3], after, atol=1e-5)
    return motion


def test_a_head_turned_by_60_degrees_is_a_camera_turned_the_other_way(rng):
    avatar = random_avatar(rng)
    straight = HEAD.neutral_params()
    turned = straight.replace(rotation=jnp.array([0.0, np.pi / 3, 0.0]))
    # The whole head turns about its root joint: what that does to space is read off the mesh.
    of_avatar = [avatar.rig.canonical.replace(jaw_pose=p.jaw_pose, rotation=p.rotation) for p in (straight, turned)]
    motion = rigid(*(np.asarray(flame_vertices(HEAD, p), np.float64) for p in of_avatar))
    assert np.degrees(np.arccos((np.trace(motion[:3, :3]) - 1) / 2)) == pytest.approx(60, abs=0.01)
    camera = orbit(1, width=SIZE, height=SIZE, distance=1.2, target=(0.0, -0.03, -0.04), azimuth=(0.3, 0.3))
    viewmat, K = np.asarray(camera.viewmats[0]), camera.Ks[0]
    renderer = AvatarRenderer(avatar, HEAD, SIZE, SIZE)
    by_head = renderer(turned, viewmat, K)
    by_camera = renderer(straight, viewmat @ motion, K)
    assert np.abs(by_head - renderer(straight, viewmat, K)).mean() > 0.02
    assert by_head.std() > 0.1
    error = np.mean((by_head.astype(np.float64) - by_camera) ** 2)
    assert -10 * np.log10(max(error, 1e-12)) > 45


def test_displaced_points_are_rigged_to_the_faces_of_the_undisplaced(rng):
    avatar = random_avatar(rng, 60)
    canonical = avatar.rig.canonical
    np.testing.assert_allclose(animate(avatar, HEAD, canonical).means, avatar.gaussians.means, atol=1e-6)

    on_mesh = random_avatar(rng, 60, offset=0.0)
    params = canonical.replace(
        shape=on_mesh.rig.canonical.shape,
        expr=jnp.asarray(rng.normal(0, 0.5, HEAD.expr_dirs.shape[-1]), jnp.float32),
        jaw_pose=jnp.array([0.2, 0.05, 0.0]),
        neck_pose=jnp.array([0.1, 0.6, 0.0]),
    )
    corners = flame_vertices(HEAD, params)[np.asarray(HEAD.faces)[np.asarray(on_mesh.rig.binding)]]
    expected = jnp.einsum("pc,pca->pa", on_mesh.rig.barycentrics, corners)
    moved = animate(on_mesh, HEAD, params).means
    np.testing.assert_allclose(moved, expected, atol=1e-5)
    assert np.abs(moved - on_mesh.gaussians.means).max() > 0.01


def test_play_grows_its_capacity_and_checks_its_cameras(rng):
    avatar = random_avatar(rng)
    far = orbit(1, width=SIZE, height=SIZE, distance=6.0)
    near = orbit(1, width=SIZE, height=SIZE, distance=0.5)
    poses = HEAD.neutral_params((2,))
    renderer = AvatarRenderer(avatar, HEAD, SIZE, SIZE)
    small = [renderer(HEAD.neutral_params(), far.viewmats[0], far.Ks[0])]
    renderer.capacity = 8  # Too little for any frame of a head.
    both = near.replace(viewmats=jnp.concatenate([far.viewmats, near.viewmats]), Ks=jnp.concatenate([far.Ks, near.Ks]))
    frames = list(renderer.play(poses, both))
    assert renderer.capacity > 8
    np.testing.assert_allclose(frames[0], small[0], atol=1e-6)
    assert (frames[1] < 0.99).any(axis=-1).mean() > 3 * (frames[0] < 0.99).any(axis=-1).mean()
    with pytest.raises(UserError, match="3 cameras of 96 × 96 cannot show 2 frames"):
        list(renderer.play(poses, orbit(3, width=SIZE, height=SIZE)))
