"""Avatars in motion: a turned head is a camera turned the other way; rigs of displaced points; what is refused."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.cameras import orbit
from pointillist_jax.files import UserError
from pointillist_jax.flame import animate, bind_points, face_frames, flame_vertices, global_to_local, open_head
from pointillist_jax.gaussians import Avatar, Gaussians
from pointillist_jax.models.gaussian_decoder import Decoded, rigged
from pointillist_jax.playback import AvatarRenderer, RiggedPerson, _frame, bucket
from renderer_bridge import rasterize

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


def test_padding_to_buckets_changes_no_picture(rng):
    avatar = random_avatar(rng, 300)
    canonical = avatar.rig.canonical
    vertices = flame_vertices(HEAD, canonical)
    local = global_to_local(avatar.gaussians, avatar.rig.binding, face_frames(vertices, HEAD.faces))
    cameras = orbit(5, width=SIZE, height=SIZE, distance=1.2, azimuth=(-0.7, 0.7))
    motion = HEAD.neutral_params((5,))
    motion = motion.replace(jaw_pose=jnp.asarray(rng.uniform(0, 0.3, (5, 3)), jnp.float32))
    for held in (avatar, RiggedPerson(local, canonical)):
        renderer = AvatarRenderer(held, HEAD, SIZE, SIZE)
        frames = renderer.frames(motion, cameras.viewmats, cameras.Ks)
        assert frames.shape == (5, SIZE, SIZE, 3)
        world = renderer.pose(motion.timestep(3))
        assert world.num_gaussians == 300
        unpadded, _, info = rasterize(
            world.means, world.quats, world.scales, world.opacities, world.colors, cameras.viewmats[3:4],
            cameras.Ks[3:4], SIZE, SIZE, backgrounds=jnp.ones((1, 3)),
        )  # fmt: skip
        assert info["overflow"] == 0
        np.testing.assert_allclose(frames[3], np.clip(unpadded[0], 0, 1), atol=1e-6)
        np.testing.assert_allclose(
            renderer(motion.timestep(3), cameras.viewmats[3], cameras.Ks[3]), frames[3], atol=1e-6
        )
    # Of their own shape both move alike, but for skinning beside the triangles' own motion.
    assert np.abs(frames - 1).mean() > 0.01


def test_people_of_about_one_size_share_a_program_and_grow_it_together(rng):
    people = [random_avatar(rng, num) for num in (200, 350, 1030)]
    camera = orbit(1, width=SIZE, height=SIZE, distance=1.2)
    first = AvatarRenderer(people[0], HEAD, SIZE, SIZE)
    shown = [first.with_person(person) for person in people]
    assert [renderer.capacity for renderer in shown] == [None] * 3
    shown[0](HEAD.neutral_params(), camera.viewmats[0], camera.Ks[0])
    before = _frame._cache_size()
    picture = shown[1](HEAD.neutral_params(), camera.viewmats[0], camera.Ks[0])
    assert _frame._cache_size() == before
    assert shown[0].capacity == shown[1].capacity == first.capacity is not None
    assert shown[2].capacity is None
    own = AvatarRenderer(people[1], HEAD, SIZE, SIZE)(HEAD.neutral_params(), camera.viewmats[0], camera.Ks[0])
    np.testing.assert_allclose(picture, own, atol=1e-6)
    # Too little room for any of the frames.
    shown[1].capacity = 8
    cameras = orbit(3, width=SIZE, height=SIZE, distance=0.6)
    grown = shown[1].frames(HEAD.neutral_params((3,)), cameras.viewmats, cameras.Ks)
    assert first.capacity > 8
    np.testing.assert_allclose(grown[2], shown[1](HEAD.neutral_params(), cameras.viewmats[2], cameras.Ks[2]), atol=1e-6)


@pytest.mark.parametrize(("num", "expected"), [(0, 1024), (1, 1024), (1024, 1024), (1025, 2048), (100_000, 106_496)])
def test_buckets(num, expected):
    assert bucket(num) == expected
    assert num <= 8192 or expected <= 1.125 * num
