"""Gaussians bound to the faces of a head: triangle frames, binding, animation (DESIGN §4; paper §3.1, §4.3).

Letters: V vertices, F faces, P points (one Gaussian each), J joints.
"""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pointillist_jax.files import UserError
from pointillist_jax.flame.lbs import deform
from pointillist_jax.flame.model import FlameModel, FlameParams
from pointillist_jax.flame.rotations import (
    exact_einsum,
    inverse_3x3,
    nearest_rotation,
    normalize,
    quat_conjugate,
    quat_multiply,
    rotation_to_quat,
)

if TYPE_CHECKING:
    from pointillist_jax.gaussians import Avatar, Gaussians


class FaceFrames(NamedTuple):
    """The local frame of every triangle (facts/avatars_gsplat.md A.2).

    Attributes:
      rotation: [..., F, 3, 3]; columns are the first edge, the normal, and their cross product.
      scale: [..., F] metres per local unit: the mean of the first edge's length and the height over it.
      center: [..., F, 3] metres.
    """

    rotation: Float[Array, "*b F 3 3"]
    scale: Float[Array, "*b F"]
    center: Float[Array, "*b F 3"]


@flax.struct.dataclass
class PointRig:
    """What moves canonical points with a head. Made by `bind_points`.

    Attributes:
      binding: [P] int32 face of each point.
      barycentrics: [P, 3] of the point's projection onto its face, clamped to the triangle if so asked.
      skin_weights: [P, J] interpolated with the barycentrics.
      rest_offset: [P, 3] metres from the surface point to the point, in the unposed (rest) space.
      rest_linear: [P, 3, 3] inverse of the canonical pose's blended joint rotations.
      canonical_scale: [P] scale of the point's triangle on the canonical mesh.
      canonical: parameters of the canonical mesh, without leading axes; they carry the identity.
      num_faces: of the head the points are bound to (static).
      model_sha256: of that head's file (static).
    """

    binding: Int[Array, "P"]
    barycentrics: Float[Array, "P 3"]
    skin_weights: Float[Array, "P J"]
    rest_offset: Float[Array, "P 3"]
    rest_linear: Float[Array, "P 3 3"]
    canonical_scale: Float[Array, "P"]
    canonical: FlameParams
    num_faces: int = flax.struct.field(pytree_node=False)
    model_sha256: str = flax.struct.field(pytree_node=False, default="")


@jax.jit
def face_frames(vertices: Float[Array, "*b V 3"], faces: Int[Array, "F 3"]) -> FaceFrames:
    """Frames of all triangles: GaussianAvatars' definition (facts A.2). Degenerate faces give finite frames."""
    v0, v1, v2 = (vertices[..., faces[:, i], :] for i in range(3))
    edge = v1 - v0
    a0 = normalize(edge)
    a1 = normalize(jnp.cross(a0, v2 - v0))
    a2 = jnp.cross(a0, a1)
    return FaceFrames(jnp.stack([a0, a1, a2], axis=-1), _face_scale(edge, a2, v2 - v0), (v0 + v1 + v2) / 3)


def local_to_global(local: Gaussians, frames: FaceFrames) -> Gaussians:
    """Triangle-local Gaussians → world space: μ' = k R μ + T, s' = k s, q' = q_face ⊗ q (paper eq. 3.1, facts A.2).

    Args:
      local: with `binding` [P]; SH are not rotated, as in GaussianAvatars.
      frames: leading axes become leading axes of the result.

    Returns:
      World-space Gaussians with `binding=None`.

    Raises:
      UserError: no binding, or one outside the mesh (checked when its values are known, i.e. outside jit).
    """
    rotation, scale, center = _frames_of(local, frames)
    means = scale[..., None] * exact_einsum("...pab,...pb->...pa", rotation, local.means) + center
    quats = quat_multiply(rotation_to_quat(rotation), normalize(local.quats))
    return local.replace(means=means, quats=quats, scales=scale[..., None] * local.scales, binding=None)


def global_to_local(world: Gaussians, binding: Int[Array, "P"], frames: FaceFrames) -> Gaussians:
    """World-space Gaussians → local to the triangles named by `binding`: the exact inverse of `local_to_global`.

    Raises:
      UserError: as `local_to_global`.
    """
    bound = world.replace(binding=jnp.asarray(binding))
    rotation, scale, center = _frames_of(bound, frames)
    means = exact_einsum("...pba,...pb->...pa", rotation, world.means - center) / scale[..., None]
    quats = quat_multiply(quat_conjugate(rotation_to_quat(rotation)), normalize(world.quats))
    return bound.replace(means=means, quats=quats, scales=world.scales / scale[..., None])


def bind_points(
    model: FlameModel,
    canonical: FlameParams,
    points: Float[Array, "P 3"],
    binding: Int[Array, "P"],
    *,
    clamp_barycentrics: bool = True,
) -> PointRig:
    """Binds canonical points to faces of a head (paper §4.3).

    Args:
      model: the head.
      canonical: parameters of the mesh the points lie around, usually `params.canonical()`; no leading axes.
      points: [P, 3] metres.
      binding: [P] face index of each point.
      clamp_barycentrics: True (ours) takes the nearest point of the triangle, so that skin weights stay convex for
        points far from their face, such as hair; False extrapolates the triangle's plane, as the formula says.

    Raises:
      UserError: wrong shapes, a binding outside the mesh, points that are not finite, batched `canonical`.
    """
    points, binding = jnp.asarray(points, model.v_template.dtype), jnp.asarray(binding)
    binding = binding.astype(jnp.int32) if binding.size == 0 else binding  # An empty list is an array of floats.
    if points.ndim != 2 or points.shape[-1] != 3 or binding.shape != points.shape[:1]:
        raise UserError(f"points {points.shape} and binding {binding.shape} must be [P, 3] and [P].")
    if any(jnp.ndim(x) > (2 if name == "static_offset" else 1) for name, x in vars(canonical).items() if x is not None):
        raise UserError(
            "bind_points takes one identity: `canonical` must have no leading axes (use jax.vmap for more)."
        )
    check_binding(binding, model.num_faces)
    if not _traced(points) and not bool(jnp.isfinite(points).all()):
        raise UserError(
            f"{int((~jnp.isfinite(points)).any(-1).sum())} points are not finite; remove them before binding."
        )
    return _bind(model, canonical, points, binding.astype(jnp.int32), clamp_barycentrics)


def animate(
    avatar: Avatar,
    flame_model: FlameModel,
    params: FlameParams,
    *,
    follow_stretch: bool = True,
    skinning: str = "surface",
) -> Gaussians:
    """Moves an avatar's canonical Gaussians by FLAME pose and expression (DESIGN §4).

    The identity (shape and static offset) is the avatar's own, whatever `params` says, so that any person's motion can
    drive it. Memory is O(P + V): nothing of size P × V or P × E is built, because expression and pose directions are
    contracted with their coefficients on the vertices before they are interpolated, which is the same by linearity.

    Args:
      avatar: canonical Gaussians and their rig.
      flame_model: the head they are bound to.
      params: leading axes become leading axes of the result.
      follow_stretch: scale each Gaussian by the growth of its triangle against the canonical mesh (ours).
      skinning: "surface" (ours) interpolates the corners' skinned positions and adds the point's offset, skinned with
        the interpolated weights: a point on the mesh follows the mesh exactly. "interpolated" is the paper's equation
        (5) to the letter: interpolated weights and directions, then LBS. The two differ inside a triangle whose
        corners have different weights (measured on the open head in experiments/LOG.md).

    Returns:
      World-space Gaussians, every field with the leading axes of `params`. Spherical harmonics are not rotated.

    Raises:
      UserError: the rig belongs to a head with another number of faces, or to other Gaussians; unknown `skinning`.
    """
    rig, num = avatar.rig, avatar.gaussians.num_gaussians
    if avatar.gaussians.binding is not None:
        warnings.warn(
            "an avatar's Gaussians are in world space, but these carry a binding as triangle-local ones do: if they "
            "came out of a GaussianAvatars file, use local_to_global first.",
            stacklevel=2,
        )
    if num != rig.binding.shape[0]:
        raise UserError(f"the avatar has {num} Gaussians, but its rig {rig.binding.shape[0]} points: bind them again.")
    if rig.num_faces != flame_model.num_faces:
        raise UserError(
            f"the avatar is bound to a head with {rig.num_faces} faces, but {flame_model.source or 'this model'} has "
            f"{flame_model.num_faces}: animate it with the head it was made for."
        )
    if rig.model_sha256 and flame_model.sha256 and rig.model_sha256 != flame_model.sha256:
        warnings.warn(
            f"the avatar was bound to another file than {flame_model.source}; FLAME editions are not interchangeable.",
            stacklevel=2,
        )
    if skinning not in ("surface", "interpolated"):
        raise UserError(f'skinning={skinning!r}: it must be "surface" or "interpolated".')
    return _animate(avatar, flame_model, params, follow_stretch, skinning)


def check_binding(binding: Int[Array, "P"], num_faces: int) -> None:
    """Raises UserError for a binding outside the mesh. Inside jit the values are unknown and nothing is checked."""
    if not jnp.issubdtype(binding.dtype, jnp.integer):
        raise UserError(f"binding has dtype {binding.dtype}; face indices must be integers.")
    if _traced(binding) or not binding.size:
        return
    values = np.asarray(binding)
    if outside := int(((values < 0) | (values >= num_faces)).sum()):
        raise UserError(
            f"{outside} bindings lie outside the mesh ({values.min()}..{values.max()}, its faces 0..{num_faces - 1}): "
            "the points belong to another head model, or it was loaded without teeth."
        )


@functools.partial(jax.jit, static_argnames=("follow_stretch", "skinning"))
def _animate(avatar: Avatar, model: FlameModel, params: FlameParams, follow_stretch: bool, skinning: str) -> Gaussians:
    with jax.named_scope("animate"):
        rig = avatar.rig
        identity = {"shape": rig.canonical.shape, "static_offset": rig.canonical.static_offset}
        posed = deform(model, params.replace(**identity))
        corners = model.faces[rig.binding]
        linear = _blend_joints(rig.skin_weights, posed.rotation)
        if skinning == "surface":
            means = _interpolate(posed.vertices, corners, rig.barycentrics) + _apply(linear, rig.rest_offset)
        else:
            rest = _interpolate(posed.shaped, corners, rig.barycentrics) + _rest_offset_interpolated(model, rig)
            shift = exact_einsum("pj,...ja->...pa", rig.skin_weights, posed.shift)
            means = _apply(linear, rest) + shift + params.translation[..., None, :]
        turn = nearest_rotation(exact_einsum("...pab,pbc->...pac", linear, rig.rest_linear))
        moved = avatar.gaussians.replace(
            means=means, quats=quat_multiply(rotation_to_quat(turn), avatar.gaussians.quats), binding=None
        )
        if follow_stretch:
            growth = _scales(posed.vertices, model.faces)[..., rig.binding] / rig.canonical_scale
            moved = moved.replace(scales=avatar.gaussians.scales * growth[..., None])
        # One set of leading axes for all fields, whichever of the parameters had them.
        batch = means.shape[:-2]
        ranks = {"means": 2, "quats": 2, "scales": 2, "opacities": 1, "colors": 2, "sh": 3}
        fields = {name: getattr(moved, name) for name in ranks}
        return moved.replace(
            **{
                name: jnp.broadcast_to(x, (*batch, *x.shape[x.ndim - ranks[name] :]))
                for name, x in fields.items()
                if x is not None
            }
        )


@functools.partial(jax.jit, static_argnames="clamp")
def _bind(model, canonical, points, binding, clamp: bool) -> PointRig:
    posed = deform(model, canonical)
    corners = model.faces[binding]
    triangle = posed.vertices[corners]
    barycentrics = _closest_barycentrics(points, triangle) if clamp else _plane_barycentrics(points, triangle)
    skin_weights = exact_einsum("pc,pcj->pj", barycentrics, model.skin_weights[corners])
    rest_linear = inverse_3x3(_blend_joints(skin_weights, posed.rotation))
    offset = points - exact_einsum("pc,pca->pa", barycentrics, triangle)
    return PointRig(
        binding=binding,
        barycentrics=barycentrics,
        skin_weights=skin_weights,
        rest_offset=_apply(rest_linear, offset),
        rest_linear=rest_linear,
        canonical_scale=_scales(posed.vertices, model.faces)[binding],
        canonical=canonical,
        num_faces=model.num_faces,
        model_sha256=model.sha256,
    )


def _rest_offset_interpolated(model: FlameModel, rig: PointRig):
    """[P, 3]: the offset for which the paper's formula gives the canonical points back in the canonical pose."""
    posed = deform(model, rig.canonical)
    corners = model.faces[rig.binding]
    shift = exact_einsum("pj,ja->pa", rig.skin_weights, posed.shift)
    surface = _interpolate(posed.vertices, corners, rig.barycentrics) - rig.canonical.translation
    unposed = _apply(rig.rest_linear, surface - shift)
    return unposed + rig.rest_offset - _interpolate(posed.shaped, corners, rig.barycentrics)


def _interpolate(vertices, corners, barycentrics):
    """[..., V, 3], [P, 3], [P, 3] → [..., P, 3]."""
    return sum(barycentrics[:, i, None] * vertices[..., corners[:, i], :] for i in range(3))


def _blend_joints(skin_weights, rotation):
    """[P, J], [..., J, 3, 3] → [..., P, 3, 3]."""
    return exact_einsum("pj,...jab->...pab", skin_weights, rotation)


def _apply(matrix, vector):
    return exact_einsum("...pab,...pb->...pa", matrix, vector)


def _face_scale(edge, height_direction, other_edge):
    height = jnp.abs(jnp.sum(height_direction * other_edge, axis=-1))
    return 0.5 * (jnp.sqrt(jnp.maximum(jnp.sum(edge * edge, axis=-1), 1e-20)) + height)


def _scales(vertices, faces):
    return face_frames(vertices, faces).scale


def _plane_barycentrics(points, triangle):
    """[P, 3], [P, 3, 3] → [P, 3] of the projection onto the triangle's plane; extrapolates outside."""
    a, b = triangle[:, 1] - triangle[:, 0], triangle[:, 2] - triangle[:, 0]
    p = points - triangle[:, 0]
    # By the normal rather than by dot products of the edges, whose differences cancel on slivers.
    normal = jnp.cross(a, b)
    area = jnp.sum(normal * normal, axis=-1)
    # A triangle without area has no plane: such a point hangs on the first corner.
    flat = area <= 1e-12 * jnp.sum(a * a, axis=-1) * jnp.sum(b * b, axis=-1)
    area = jnp.where(flat, 1.0, area)
    u = jnp.where(flat, 0.0, jnp.sum(jnp.cross(p, b) * normal, axis=-1) / area)
    v = jnp.where(flat, 0.0, jnp.sum(jnp.cross(a, p) * normal, axis=-1) / area)
    return jnp.stack([1 - u - v, u, v], axis=-1)


def _closest_barycentrics(points, triangle):
    """Barycentrics of the point of each triangle nearest to its point: [P, 3], [P, 3, 3] → [P, 3], all in [0, 1]."""
    inside = _plane_barycentrics(points, triangle)
    best = inside
    off = points - exact_einsum("pc,pca->pa", inside, triangle)
    distance = jnp.where((inside >= 0).all(axis=-1), jnp.sum(off * off, axis=-1), jnp.inf)
    for i in range(3):
        j = (i + 1) % 3
        start, edge = triangle[:, i], triangle[:, j] - triangle[:, i]
        length = jnp.maximum(jnp.sum(edge * edge, axis=-1), 1e-20)
        t = jnp.clip(jnp.sum((points - start) * edge, axis=-1) / length, 0, 1)
        off = points - start - t[:, None] * edge
        candidate = jnp.zeros_like(inside).at[:, i].set(1 - t).at[:, j].set(t)
        d = jnp.sum(off * off, axis=-1)
        nearer = d < distance
        best, distance = jnp.where(nearer[:, None], candidate, best), jnp.where(nearer, d, distance)
    return best


def _frames_of(local: Gaussians, frames: FaceFrames):
    if local.binding is None:
        raise UserError("these Gaussians have no binding: only triangle-local ones can be placed on a mesh.")
    b = jnp.asarray(local.binding)
    if b.shape != (local.num_gaussians,):
        raise UserError(f"binding has shape {b.shape}, expected ({local.num_gaussians},): one face for each Gaussian.")
    check_binding(b, frames.center.shape[-2])
    return frames.rotation[..., b, :, :], frames.scale[..., b], frames.center[..., b, :]


def _traced(x) -> bool:
    return isinstance(x, jax.core.Tracer)
