"""FLAME, triangle frames, binding, animation and surface points with their gradients, JAX against PyTorch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.flame import FlameParams, animate, bind_points, face_frames, flame_vertices, load_flame
from pointillist_jax.flame.surface_points import head_points, surface_points
from pointillist_jax.gaussians import Avatar, Gaussians
from tests.parity.heads import params_of, random_head

torch = pytest.importorskip("torch")
from experiments.torch_reference import flame as twin  # noqa: E402
from experiments.torch_reference import teeth  # noqa: E402
from tests.parity.compare import assert_close, to_torch  # noqa: E402

pytestmark = pytest.mark.usefixtures("x64")


def leaves(params) -> dict:
    return {name: torch.tensor(value, requires_grad=True) for name, value in params.items()}


def test_vertices_frames_and_gradients(rng):
    """Batched poses; one of them at rest, where a rotation's derivative is delicate."""
    head = random_head(rng)
    params = params_of(rng, head, 3)
    for name in ("rotation", "neck_pose", "jaw_pose", "eyes_pose"):
        params[name][0] = 0
        params[name][1] *= 1e-3
    bars = [rng.normal(size=shape) for shape in ((3, 18, 3), (3, 32, 3, 3), (3, 32), (3, 32, 3))]

    def total(params):
        mesh = flame_vertices(head, FlameParams(**params))
        found = mesh, *face_frames(mesh, head.faces)
        return sum(jnp.sum(x * bar) for x, bar in zip(found, bars, strict=True)), found

    (_, expected), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    as_torch, tensors = twin.make_head(vars(head)), leaves(params)
    mesh = twin.vertices(as_torch, tensors)
    found = mesh, *twin.face_frames(mesh, as_torch.faces)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)
    sum((x * torch.tensor(bar)).sum() for x, bar in zip(found, bars, strict=True)).backward()
    for name, tensor in tensors.items():
        assert_close(tensor.grad, gradients[name], name=name)


@pytest.mark.parametrize(("clamp", "skinning"), [(True, "surface"), (False, "interpolated")])
def test_bind_and_animate(rng, clamp, skinning):
    head = random_head(rng)
    canonical, driving = params_of(rng, head), params_of(rng, head, 2)
    canonical_params = FlameParams(**canonical)
    # Near their faces, far from them, and exactly on them.
    binding = rng.integers(0, 32, 60)
    mesh = np.asarray(flame_vertices(head, canonical_params))
    corners = mesh[np.asarray(head.faces)[binding]]
    points = np.einsum("pc,pca->pa", rng.dirichlet(np.ones(3), 60), corners)
    points[:40] += rng.normal(0, 0.03, (40, 3))
    quats, scales = rng.normal(size=(60, 4)), rng.uniform(1e-3, 1e-2, (60, 3))
    quats /= np.linalg.norm(quats, axis=1, keepdims=True)
    bars = [rng.normal(size=(2, 60, n)) for n in (3, 4, 3)]
    rig = bind_points(head, canonical_params, points, binding, clamp_barycentrics=clamp)

    def total(driving, quats, scales):
        gaussians = Gaussians(means=points, quats=quats, scales=scales, opacities=np.ones(60), colors=np.ones((60, 3)))
        posed = animate(Avatar(gaussians, rig), head, FlameParams(**driving), skinning=skinning)
        found = posed.means, posed.quats, posed.scales
        return sum(jnp.sum(x * bar) for x, bar in zip(found, bars, strict=True)), found

    (_, expected), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(driving, quats, scales)
    as_torch, tensors = twin.make_head(vars(head)), leaves(driving)
    own = [torch.tensor(x, requires_grad=True) for x in (quats, scales)]
    bound = twin.bind(as_torch, to_torch(canonical), torch.tensor(points), torch.tensor(binding), clamp)
    for name in ("barycentrics", "skin_weights", "rest_offset", "rest_linear", "canonical_scale"):
        assert_close(getattr(bound, name), getattr(rig, name), name=name)
    found = twin.animate(as_torch, bound, *own, tensors, skinning=skinning)
    for name, a, b in zip(("means", "quats", "scales"), found, expected, strict=True):
        assert_close(a, b, name=name)
    sum((x * torch.tensor(bar)).sum() for x, bar in zip(found, bars, strict=True)).backward()
    for name, tensor in tensors.items():
        if name in ("shape", "static_offset"):  # The identity is the avatar's own.
            assert tensor.grad is None
        else:
            assert_close(tensor.grad, gradients[0][name], name=name)
    for tensor, gradient in zip(own, gradients[1:], strict=True):
        assert_close(tensor.grad, gradient)


def test_offsets_move_the_points_and_nothing_else(rng):
    head = random_head(rng)
    canonical, points = params_of(rng, head), rng.normal(0, 0.1, (20, 3))
    as_torch, params = twin.make_head(vars(head)), to_torch(canonical)
    rig = twin.bind(as_torch, params, torch.tensor(points), torch.arange(20))
    offsets, quats, scales = (torch.tensor(rng.normal(0, 0.01, (20, n))) for n in (3, 4, 3))
    means, turned, stretched = twin.animate(as_torch, rig, quats, scales, params, offsets=offsets)
    # In the canonical pose nothing moves but by the offset.
    assert_close(means, points + offsets.numpy())
    assert_close(turned, quats)
    assert_close(stretched, scales)


def test_surface_points(rng):
    head = random_head(rng)
    mesh = np.asarray(flame_vertices(head, FlameParams(**params_of(rng, head, 2))))
    table, as_torch = surface_points(head, 300), twin.make_head(vars(head))
    found = twin.surface_points(as_torch, 300)
    np.testing.assert_array_equal(found.faces, table.faces)
    for a, b in zip(found[1:], table[1:], strict=True):
        assert_close(a, b)
    assert_close(
        twin.head_points(as_torch, torch.tensor(mesh), found), head_points(head, jnp.asarray(mesh), table=table)
    )


def test_teeth(flame_pickle):
    """GaussianAvatars' own checks of its list, then every array."""
    faces = teeth.faces()
    assert faces[[0, 84, 133, 167]].tolist() == [
        [5023, 5054, 5053], [5068, 5069, 5038], [5124, 5139, 5138], [5141, 5142, 5082],
    ]  # fmt: skip
    plain, expected = (load_flame(flame_pickle, n_shape=4, n_expr=3, teeth=with_them) for with_them in (False, True))
    found = teeth.with_teeth(twin.make_head(vars(plain)))
    np.testing.assert_array_equal(found.faces, expected.faces)
    for name in twin.Head._fields:
        if name not in ("faces", "parents"):
            assert_close(getattr(found, name), getattr(expected, name), 1e-12, name)
    with pytest.raises(ValueError, match="5143"):
        teeth.with_teeth(found)
