"""Triangle frames, the GaussianAvatars transform, binding and animation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.files import UserError
from pointillist_jax.flame import (
    animate,
    bind_points,
    face_frames,
    global_to_local,
    load_flame,
    local_to_global,
    open_head,
)
from pointillist_jax.flame import flame_vertices as unjitted_vertices
from pointillist_jax.flame.rotations import quat_to_rotation
from pointillist_jax.gaussians import Avatar, Gaussians
from tests.conftest import random_params
from tests.flame import numpy_twin

# One compiled program instead of a compilation per operation: the suite has to stay quick.
flame_vertices = jax.jit(unjitted_vertices)


def random_gaussians(rng, means, binding=None, dtype=jnp.float32) -> Gaussians:
    g = len(means)
    quats = rng.normal(size=(g, 4))
    return Gaussians(
        means=jnp.asarray(means, dtype),
        quats=jnp.asarray(quats / np.linalg.norm(quats, axis=1, keepdims=True), dtype),
        scales=jnp.asarray(rng.uniform(1e-3, 1e-2, (g, 3)), dtype),
        opacities=jnp.asarray(rng.uniform(0.1, 0.9, g), dtype),
        colors=jnp.asarray(rng.uniform(size=(g, 3)), dtype),
        binding=binding,
    )


def points_on_mesh(rng, model, vertices, num=2000):
    """Random points inside random faces: (points [P, 3], faces [P], barycentrics [P, 3])."""
    faces = rng.integers(0, model.num_faces, num)
    barycentrics = rng.dirichlet([1, 1, 1], num)
    corners = np.asarray(model.faces)[faces]
    return np.einsum("pc,pca->pa", barycentrics, np.asarray(vertices, np.float64)[corners]), faces, barycentrics


# --- the numeric fixtures of facts/avatars_gsplat.md A.2 ---


def test_frame_fixture_axis_aligned():
    frames = face_frames(jnp.array([[0.0, 0, 0], [2, 0, 0], [0, 1, 0]]), jnp.array([[0, 1, 2]]))
    np.testing.assert_allclose(frames.rotation[0], [[1, 0, 0], [0, 0, -1], [0, 1, 0]], atol=1e-6)
    np.testing.assert_allclose(frames.scale, [1.5], atol=1e-6)
    np.testing.assert_allclose(frames.center[0], [0.6666667, 0.3333333, 0], atol=1e-6)


def test_transform_fixture():
    vertices = jnp.array([[2.0, 0, 0], [0.5, -0.25, 0.75], [0, 1, 0]])
    frames = face_frames(vertices, jnp.array([[0, 1, 2]]))
    rotation = [
        [-0.8846517, -0.2873479, 0.3671818],
        [-0.1474420, -0.5746958, -0.8049756],
        [0.4423259, -0.7662610, 0.4660385],
    ]
    np.testing.assert_allclose(frames.rotation[0], rotation, atol=1e-6)
    np.testing.assert_allclose(frames.scale, [1.617461], atol=1e-6)
    np.testing.assert_allclose(frames.center[0], [0.8333333, 0.25, 0.25], atol=1e-6)
    local = Gaussians(
        means=jnp.array([[0.1, -0.2, 0.3]]),
        quats=jnp.array([[0.9, 0.1, -0.3, 0.2]]),
        scales=jnp.array([[1.0, 2.0, 0.5]]),
        opacities=jnp.array([0.5]),
        colors=jnp.zeros((1, 3)),
        binding=jnp.array([0]),
    )
    world = local_to_global(local, frames)
    np.testing.assert_allclose(world.means[0], [0.9613698, 0.0214565, 0.7955636], atol=1e-6)
    np.testing.assert_allclose(world.scales[0], 1.617461 * np.array([1, 2, 0.5]), atol=1e-5)
    want = np.array([-0.3033720, 0.3916804, -0.3975385, 0.7723438])
    np.testing.assert_allclose(world.quats[0] * np.sign(world.quats[0, 0]) * np.sign(want[0]), want, atol=1e-6)
    assert world.binding is None


@pytest.mark.usefixtures("x64")
def test_local_global_round_trip_is_exact_both_ways(flame_pickle, rng):
    model = load_flame(flame_pickle, n_shape=10, n_expr=10)
    frames = face_frames(flame_vertices(model, random_params(rng, model)), model.faces)
    binding = jnp.asarray(rng.integers(0, model.num_faces, 5000))
    local = random_gaussians(rng, rng.normal(0, 0.5, (5000, 3)), binding, jnp.float64)
    back = global_to_local(local_to_global(local, frames), binding, frames)
    for name in ("means", "scales", "opacities"):
        np.testing.assert_allclose(getattr(back, name), getattr(local, name), rtol=1e-9, atol=1e-12)
    same_sign = jnp.sign(jnp.sum(back.quats * local.quats, axis=1, keepdims=True))
    np.testing.assert_allclose(back.quats * same_sign, local.quats, atol=1e-12)
    np.testing.assert_array_equal(back.binding, binding)
    # The rotation is the composition of matrices, whatever the quaternions' signs.
    world = local_to_global(local, frames)
    want = np.asarray(frames.rotation)[binding] @ np.asarray(quat_to_rotation(local.quats))
    np.testing.assert_allclose(quat_to_rotation(world.quats), want, atol=1e-12)


def test_frames_are_rotations_and_batched(flame_model, rng):
    vertices = flame_vertices(flame_model, random_params(rng, flame_model, (2,)))
    frames = face_frames(vertices, flame_model.faces)
    eye = np.tile(np.eye(3), (2, flame_model.num_faces, 1, 1))
    np.testing.assert_allclose(np.swapaxes(frames.rotation, -1, -2) @ frames.rotation, eye, atol=2e-5)
    np.testing.assert_allclose(np.linalg.det(frames.rotation), 1, atol=2e-5)
    local = random_gaussians(rng, rng.normal(size=(50, 3)), jnp.arange(50))
    assert local_to_global(local, frames).means.shape == (2, 50, 3)


def test_degenerate_faces_give_finite_frames_and_gradients():
    vertices = jnp.zeros((3, 3)).at[2, 0].set(1.0)

    def total(v):
        return sum(x.sum() for x in face_frames(v, jnp.array([[0, 1, 2], [0, 0, 0]])))

    assert np.isfinite(float(total(vertices)))
    assert bool(jnp.isfinite(jax.grad(total)(vertices)).all())


# --- binding and animation ---


@pytest.mark.parametrize("clamp", [True, False])
def test_a_point_on_the_mesh_follows_the_mesh(flame_model, rng, clamp):
    identity = random_params(rng, flame_model)
    canonical = identity.canonical()
    points, faces, barycentrics = points_on_mesh(rng, flame_model, flame_vertices(flame_model, canonical))
    rig = bind_points(flame_model, canonical, points, faces, clamp_barycentrics=clamp)
    avatar = Avatar(random_gaussians(rng, points), rig)
    moved = random_params(rng, flame_model, (3,)).replace(shape=identity.shape, static_offset=identity.static_offset)
    got = jax.jit(animate)(avatar, flame_model, moved)
    vertices = np.asarray(flame_vertices(flame_model, moved), np.float64)
    want = np.einsum("pc,bpca->bpa", barycentrics, vertices[:, np.asarray(flame_model.faces)[faces]])
    np.testing.assert_allclose(got.means, want, rtol=0, atol=1e-6)


def test_the_open_head_follows_too(rng):
    model = open_head("coarse")
    identity = random_params(rng, model).replace(static_offset=None)
    canonical = identity.canonical()
    points, faces, barycentrics = points_on_mesh(rng, model, flame_vertices(model, canonical))
    avatar = Avatar(random_gaussians(rng, points), bind_points(model, canonical, points, faces))
    moved = random_params(rng, model).replace(shape=identity.shape, static_offset=None)
    vertices = np.asarray(flame_vertices(model, moved), np.float64)
    want = np.einsum("pc,pca->pa", barycentrics, vertices[np.asarray(model.faces)[faces]])
    np.testing.assert_allclose(animate(avatar, model, moved).means, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("skinning", ["surface", "interpolated"])
@pytest.mark.parametrize("jaw", [0.0, 0.3])
def test_the_canonical_pose_gives_the_canonical_gaussians_back(flame_model, rng, skinning, jaw):
    canonical = random_params(rng, flame_model).canonical(jaw)
    points, faces, _ = points_on_mesh(rng, flame_model, flame_vertices(flame_model, canonical))
    points = points + rng.normal(0, 0.02, points.shape)
    gaussians = random_gaussians(rng, points)
    avatar = Avatar(gaussians, bind_points(flame_model, canonical, points, faces))
    # Another person's shape in the driving parameters must not matter.
    driver = canonical.replace(shape=canonical.shape + 1, static_offset=None)
    back = animate(avatar, flame_model, driver, skinning=skinning)
    np.testing.assert_allclose(back.means, gaussians.means, atol=2e-6)
    np.testing.assert_allclose(back.scales, gaussians.scales, rtol=1e-4)
    dots = np.abs(np.sum(np.asarray(back.quats) * np.asarray(gaussians.quats), axis=-1))
    np.testing.assert_allclose(dots, 1, atol=1e-5)


@pytest.mark.usefixtures("x64")
def test_interpolated_skinning_is_the_papers_formula(flame_pickle, rng):
    """Equation (5) and LBS, point by point in NumPy: every point is treated as a vertex of its own little model."""
    model = load_flame(flame_pickle, n_shape=8, n_expr=6)
    canonical = random_params(rng, model).canonical(0.0)
    points, faces, _ = points_on_mesh(rng, model, flame_vertices(model, canonical), 40)
    points = points + rng.normal(0, 0.01, points.shape)
    rig = bind_points(model, canonical, points, faces)
    params = random_params(rng, model).replace(shape=canonical.shape, static_offset=canonical.static_offset)
    got = animate(Avatar(random_gaussians(rng, points, dtype=jnp.float64), rig), model, params, skinning="interpolated")

    corners = np.asarray(model.faces)[faces]
    b = np.asarray(rig.barycentrics)

    def at(x):
        return np.einsum("pc,pc...->p...", b, np.asarray(x)[corners])

    little = model.replace(
        # With zero canonical pose the points are their own rest positions, so identity is inside the template.
        v_template=np.concatenate([model.v_template, points]),
        shape_dirs=np.concatenate([model.shape_dirs, np.zeros((40, 3, 8))]),
        expr_dirs=np.concatenate([model.expr_dirs, at(model.expr_dirs)]),
        pose_dirs=np.concatenate([model.pose_dirs, at(model.pose_dirs)]),
        joint_regressor=np.concatenate([model.joint_regressor, np.zeros((5, 40))], axis=1),
        skin_weights=np.concatenate([model.skin_weights, at(model.skin_weights)]),
    )
    offset = np.concatenate([params.static_offset, np.zeros((40, 3))])
    want = numpy_twin.vertices(little, params.replace(static_offset=offset))[-40:]
    np.testing.assert_allclose(got.means, want, atol=1e-11)


@pytest.mark.usefixtures("x64")
def test_points_rotate_with_the_head_rigidly(flame_pickle, rng):
    """A global rotation about the root must turn everything as one body: offsets, quaternions, unchanged scales."""
    model = load_flame(flame_pickle, n_shape=4, n_expr=4)
    canonical = random_params(rng, model).canonical()
    points, faces, _ = points_on_mesh(rng, model, flame_vertices(model, canonical), 300)
    points = points + rng.normal(0, 0.05, points.shape)
    gaussians = random_gaussians(rng, points, dtype=jnp.float64)
    avatar = Avatar(gaussians, bind_points(model, canonical, points, faces))
    turn = jnp.array([0.3, -0.8, 0.4])
    shift = jnp.array([0.1, 0.2, -0.3])
    moved = animate(avatar, model, canonical.replace(rotation=turn, translation=shift))
    rotation = numpy_twin.rotation(np.asarray(turn))
    root = np.asarray(model.joint_regressor[0]) @ numpy_twin.vertices(model, canonical.replace(jaw_pose=jnp.zeros(3)))
    np.testing.assert_allclose(moved.means, (points - root) @ rotation.T + root + np.asarray(shift), atol=1e-10)
    np.testing.assert_allclose(moved.scales, gaussians.scales, rtol=1e-9)
    want = rotation @ np.asarray(quat_to_rotation(gaussians.quats))
    np.testing.assert_allclose(quat_to_rotation(moved.quats), want, atol=1e-9)


def test_stretch_follows_the_triangle(flame_model, rng):
    canonical = flame_model.neutral_params()
    vertices = flame_vertices(flame_model, canonical)
    points, faces, _ = points_on_mesh(rng, flame_model, vertices, 200)
    gaussians = random_gaussians(rng, points)
    avatar = Avatar(gaussians, bind_points(flame_model, canonical, points, faces))
    params = canonical.replace(expr=canonical.expr + 1.0)
    before = face_frames(vertices, flame_model.faces).scale[faces]
    after = face_frames(flame_vertices(flame_model, params), flame_model.faces).scale[faces]
    growth = np.asarray(after / before)[:, None]
    np.testing.assert_allclose(animate(avatar, flame_model, params).scales, gaussians.scales * growth, rtol=1e-4)
    rigid = animate(avatar, flame_model, params, follow_stretch=False)
    np.testing.assert_array_equal(rigid.scales, gaussians.scales)


@pytest.mark.usefixtures("x64")
def test_clamped_barycentrics_are_the_nearest_point_of_the_triangle(flame_pickle, rng):
    model = load_flame(flame_pickle, n_shape=1, n_expr=1)
    vertices = np.asarray(flame_vertices(model, model.neutral_params()))
    faces = rng.integers(0, model.num_faces, 300)
    triangles = vertices[np.asarray(model.faces)[faces]]
    points = triangles.mean(axis=1) + rng.normal(0, 0.1, (300, 3))
    rig = bind_points(model, model.neutral_params(), points, faces)
    b = np.asarray(rig.barycentrics)
    assert b.min() >= 0
    np.testing.assert_allclose(b.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(np.asarray(rig.skin_weights).sum(axis=1), 1, atol=1e-9)
    distance = np.linalg.norm(np.einsum("pc,pca->pa", b, triangles) - points, axis=1)
    # No point of a dense sample of the triangle may be nearer.
    samples = rng.dirichlet([0.5, 0.5, 0.5], 4000)
    sampled = np.linalg.norm(np.einsum("sc,pca->psa", samples, triangles) - points[:, None], axis=2).min(axis=1)
    assert (distance <= sampled + 1e-12).all()
    free = bind_points(model, model.neutral_params(), points, faces, clamp_barycentrics=False).barycentrics
    foot = np.einsum("pc,pca->pa", free, triangles) - points
    for i in (1, 2):  # Perpendicular to the plane.
        np.testing.assert_allclose(np.sum(foot * (triangles[:, i] - triangles[:, 0]), axis=1), 0, atol=1e-9)
    assert np.asarray(free).min() < -0.1


def test_animating_many_points_builds_nothing_of_size_p_times_v(flame_model, rng):
    num = 100_000
    canonical = flame_model.neutral_params()
    points, faces, _ = points_on_mesh(rng, flame_model, flame_vertices(flame_model, canonical), num)
    avatar = Avatar(random_gaussians(rng, points), bind_points(flame_model, canonical, points, faces))
    compiled = jax.jit(animate).lower(avatar, flame_model, canonical).compile()
    # 1 kB a point is some thirty 3 × 3 matrices; P × V float32 would be 20 kB a point, P × E × 3 1.2 kB.
    assert compiled.memory_analysis().temp_size_in_bytes < num * 1000


def test_gradients_reach_gaussians_and_parameters(flame_model, rng):
    canonical = random_params(rng, flame_model).canonical()
    points, faces, _ = points_on_mesh(rng, flame_model, flame_vertices(flame_model, canonical), 100)
    avatar = Avatar(random_gaussians(rng, points), bind_points(flame_model, canonical, points, faces))

    def loss(avatar, params):
        moved = animate(avatar, flame_model, params)
        return (moved.means**2).sum() + (moved.quats[:, 1:] ** 3).sum() + moved.scales.sum()

    grads = jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))(avatar, canonical)
    floats = [g for g in jax.tree.leaves(grads) if jnp.issubdtype(g.dtype, jnp.floating)]
    assert all(bool(jnp.isfinite(g).all()) for g in floats)
    assert float(jnp.abs(grads[1].expr).max()) > 0
    assert float(jnp.abs(grads[0].gaussians.quats).max()) > 0


def test_all_fields_get_the_leading_axes_of_whichever_parameter_has_them(flame_model, rng):
    canonical = flame_model.neutral_params()
    points, faces, _ = points_on_mesh(rng, flame_model, flame_vertices(flame_model, canonical), 20)
    avatar = Avatar(random_gaussians(rng, points), bind_points(flame_model, canonical, points, faces))
    moved = animate(avatar, flame_model, canonical.replace(expr=jnp.zeros((4, 100))))
    shapes = {name: value.shape for name, value in vars(moved).items() if value is not None}
    want = {"means": (4, 20, 3), "quats": (4, 20, 4), "scales": (4, 20, 3), "opacities": (4, 20), "colors": (4, 20, 3)}
    assert shapes == want


# --- errors ---


def test_errors_name_what_is_wrong(flame_model, rng):
    canonical = flame_model.neutral_params()
    points = np.zeros((3, 3))
    with pytest.raises(UserError, match=r"outside the mesh.*10144"):
        bind_points(flame_model, canonical, points, np.array([0, 1, 10144]))
    with pytest.raises(UserError, match="integers"):
        bind_points(flame_model, canonical, points, np.zeros(3))
    with pytest.raises(UserError, match="not finite"):
        bind_points(flame_model, canonical, points * np.nan, np.zeros(3, int))
    with pytest.raises(UserError, match=r"\[P, 3\] and \[P\]"):
        bind_points(flame_model, canonical, points, np.zeros(2, int))
    with pytest.raises(UserError, match="leading axes"):
        bind_points(flame_model, flame_model.neutral_params((2,)), points, np.zeros(3, int))
    frames = face_frames(flame_model.v_template, flame_model.faces)
    gaussians = random_gaussians(rng, points)
    with pytest.raises(UserError, match="no binding"):
        local_to_global(gaussians, frames)
    with pytest.raises(UserError, match="outside the mesh"):
        local_to_global(gaussians.replace(binding=jnp.array([0, -1, 2])), frames)
    avatar = Avatar(gaussians, bind_points(flame_model, canonical, points, np.zeros(3, int)))
    with pytest.raises(UserError, match="faces"):
        animate(avatar, open_head("coarse"), open_head("coarse").neutral_params())
    with pytest.raises(UserError, match="skinning"):
        animate(avatar, flame_model, canonical, skinning="dual")
    fewer = Avatar(jax.tree.map(lambda x: x[:2], gaussians), avatar.rig)
    with pytest.raises(UserError, match="2 Gaussians, but its rig 3"):
        animate(fewer, flame_model, canonical)
    with pytest.warns(UserWarning, match="not interchangeable"):
        animate(avatar, flame_model.replace(sha256="0" * 64), canonical)
    with pytest.warns(UserWarning, match="local_to_global first"):
        animate(Avatar(gaussians.replace(binding=jnp.arange(3)), avatar.rig), flame_model, canonical)
    with pytest.raises(UserError, match="one face for each"):
        local_to_global(gaussians.replace(binding=jnp.arange(2)), frames)
