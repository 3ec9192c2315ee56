"""FLAME-layout heads and the rig of points on them, in PyTorch (DESIGN §3, §4; facts/avatars_gsplat.md A.1–A.3, F).

Letters: V vertices, F faces, J joints, S shape and E expression coefficients, P points. Leading axes are a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from experiments.torch_reference.rotations import (
    matrix_to_quat,
    nearest_rotation,
    normalize,
    quat_multiply,
    rodrigues,
)


class Head(NamedTuple):
    """A head model; `make_head` builds one from arrays."""

    v_template: Tensor  # [V, 3] metres
    faces: Tensor  # [F, 3]
    shape_dirs: Tensor  # [V, 3, S]
    expr_dirs: Tensor  # [V, 3, E]
    pose_dirs: Tensor  # [V, 3, 9 (J - 1)]
    joint_regressor: Tensor  # [J, V]
    skin_weights: Tensor  # [V, J]
    parents: tuple[int, ...]  # -1 for the root


class Posed(NamedTuple):
    """A deformed mesh: posed = Σ_j w_j (rotation_j · shaped + shift_j) + translation."""

    vertices: Tensor  # [..., V, 3]
    shaped: Tensor  # [..., V, 3] with pose correctives, before skinning
    rotation: Tensor  # [..., J, 3, 3]
    shift: Tensor  # [..., J, 3]


class Frames(NamedTuple):
    """Of triangles: columns of `rotation` are the first edge, the normal and their product; `scale` is metres."""

    rotation: Tensor  # [..., F, 3, 3]
    scale: Tensor  # [..., F]
    center: Tensor  # [..., F, 3]


class Rig(NamedTuple):
    """Points bound to faces of a head in its canonical pose."""

    binding: Tensor  # [P]
    barycentrics: Tensor  # [P, 3] of the point on the face
    skin_weights: Tensor  # [P, J]
    rest_offset: Tensor  # [P, 3] from there to the point, unposed
    rest_linear: Tensor  # [P, 3, 3] canonical → unposed directions
    canonical_scale: Tensor  # [P] of the face
    canonical: Mapping[str, Tensor]  # parameters


Params = Mapping[str, Tensor]


def make_head(arrays: Mapping[str, Any], dtype: torch.dtype | None = None) -> Head:
    """From named arrays (`vars` of a `FlameModel`, or an `.npz` with its fields); `dtype` of the floating ones."""

    def tensor(name: str) -> Tensor:
        value = torch.tensor(np.asarray(arrays[name]))
        return value.long() if name == "faces" else value.to(dtype or value.dtype)

    names = [name for name in Head._fields if name != "parents"]
    return Head(*map(tensor, names), parents=tuple(int(p) for p in arrays["parents"]))


def vertices(head: Head, params: Params) -> Tensor:
    """[..., V, 3] metres.

    Args:
      params: axis-angle radians and metres, leading axes broadcast: shape [..., ≤ S], expr [..., ≤ E], rotation,
        neck_pose, jaw_pose [..., 3], eyes_pose [..., 6], translation [..., 3], static_offset [..., V, 3] or None.
    """
    return deform(head, params).vertices


def deform(head: Head, params: Params) -> Posed:
    """As `vertices`, with what a rig needs beside them."""
    neutral = head.v_template + _blend(head.shape_dirs, params["shape"]) + _blend(head.expr_dirs, params["expr"])
    if params.get("static_offset") is not None:
        neutral = neutral + params["static_offset"]
    joints = head.joint_regressor @ neutral
    eyes = params["eyes_pose"]
    pose = [params["rotation"], params["neck_pose"], params["jaw_pose"], eyes[..., :3], eyes[..., 3:]]
    local = rodrigues(torch.stack(torch.broadcast_tensors(*pose), dim=-2))
    feature = (local[..., 1:, :, :] - torch.eye(3, dtype=local.dtype, device=local.device)).flatten(-3)
    shaped = neutral + _blend(head.pose_dirs, feature)

    rotation, origin = [local[..., 0, :, :]], [joints[..., 0, :]]
    for j, parent in enumerate(head.parents[1:], 1):
        bone = joints[..., j, :] - joints[..., parent, :]
        origin.append(origin[parent] + _apply(rotation[parent], bone))
        rotation.append(rotation[parent] @ local[..., j, :, :])
    rotation, origin = torch.stack(rotation, -3), torch.stack(torch.broadcast_tensors(*origin), -2)
    shift = origin - _apply(rotation, joints)
    moved = _apply(rotation[..., None, :, :, :], shaped[..., None, :]) + shift[..., None, :, :]
    skinned = (head.skin_weights[..., None] * moved).sum(-2)
    return Posed(skinned + params["translation"][..., None, :], shaped, rotation, shift)


def face_frames(mesh: Tensor, faces: Tensor) -> Frames:
    """GaussianAvatars' triangle frames."""
    v0, v1, v2 = (mesh[..., faces[:, i], :] for i in range(3))
    a0 = normalize(v1 - v0)
    a1 = normalize(torch.linalg.cross(a0, v2 - v0))
    a2 = -normalize(torch.linalg.cross(a1, a0))
    length = (v1 - v0).square().sum(-1).clamp(min=1e-20).sqrt()
    height = (a2 * (v2 - v0)).sum(-1).abs()
    return Frames(torch.stack([a0, a1, a2], -1), (length + height) / 2, (v0 + v1 + v2) / 3)


def bind(head: Head, canonical: Params, points: Tensor, binding: Tensor, clamp: bool = True) -> Rig:
    """Binds [P, 3] points around the mesh of `canonical` (no leading axes) to faces [P].

    Args:
      clamp: take the nearest point of the triangle; else of its plane, whose barycentrics extrapolate.
    """
    posed = deform(head, canonical)
    corners = head.faces[binding]
    triangle = posed.vertices[corners]
    barycentrics = (nearest_barycentrics if clamp else plane_barycentrics)(points, triangle)
    skin_weights = (barycentrics[..., None] * head.skin_weights[corners]).sum(1)
    linear = torch.einsum("pj,jab->pab", skin_weights, posed.rotation)
    rest_linear = torch.linalg.inv(linear)
    offset = points - (barycentrics[..., None] * triangle).sum(1)
    scale = face_frames(posed.vertices, head.faces).scale[binding]
    return Rig(binding, barycentrics, skin_weights, _apply(rest_linear, offset), rest_linear, scale, canonical)


def animate(
    head: Head,
    rig: Rig,
    quats: Tensor,  # [P, 4] canonical
    scales: Tensor,  # [P, 3] canonical, metres
    params: Params,
    *,
    offsets: Tensor | None = None,  # [P, 3] canonical, metres
    follow_stretch: bool = True,
    skinning: str = "surface",
) -> tuple[Tensor, Tensor, Tensor]:
    """Means [..., P, 3], quats [..., P, 4] and scales [..., P, 3] of the rig's points under `params`.

    Args:
      params: pose and expression; the identity is the rig's own.
      offsets: that displace the points, which stay bound where they are.
      follow_stretch: scales grow with their triangle.
      skinning: "surface" moves the point on the face with the corners and adds the rest, skinned; "interpolated" is
        the paper's equation (5): weights and shape interpolated, then LBS.
    """
    identity = {name: rig.canonical.get(name) for name in ("shape", "static_offset")}
    posed = deform(head, {**params, **identity})
    rest_offset = rig.rest_offset if offsets is None else rig.rest_offset + _apply(rig.rest_linear, offsets)
    linear = torch.einsum("pj,...jab->...pab", rig.skin_weights, posed.rotation)
    if skinning == "surface":
        means = _on_faces(head, rig, posed.vertices) + _apply(linear, rest_offset)
    else:
        shift = torch.einsum("pj,...ja->...pa", rig.skin_weights, posed.shift)
        rest = _on_faces(head, rig, posed.shaped) + _interpolated_rest(head, rig, rest_offset)
        means = _apply(linear, rest) + shift + params["translation"][..., None, :]
    turn = nearest_rotation(linear @ rig.rest_linear)
    quats = quat_multiply(matrix_to_quat(turn), quats)
    if follow_stretch:
        growth = face_frames(posed.vertices, head.faces).scale[..., rig.binding] / rig.canonical_scale
        scales = scales * growth[..., None]
    batch = means.shape[:-1]
    return means, quats.expand(*batch, 4), scales.expand(*batch, 3)


def plane_barycentrics(points: Tensor, triangle: Tensor) -> Tensor:
    """[P, 3] of each point's projection onto the plane of its triangle [P, 3, 3]; the first corner if it has none."""
    a, b, p = triangle[:, 1] - triangle[:, 0], triangle[:, 2] - triangle[:, 0], points - triangle[:, 0]
    normal = torch.linalg.cross(a, b)
    area = normal.square().sum(-1)
    flat = area <= 1e-12 * a.square().sum(-1) * b.square().sum(-1)
    area = torch.where(flat, 1, area)
    u, v = ((torch.linalg.cross(*pair) * normal).sum(-1) / area for pair in ((p, b), (a, p)))
    u, v = torch.where(flat, 0, u), torch.where(flat, 0, v)
    return torch.stack([1 - u - v, u, v], -1)


def nearest_barycentrics(points: Tensor, triangle: Tensor) -> Tensor:
    """[P, 3] of the point of each triangle [P, 3, 3] that is nearest to its point: inside, or on one of the edges."""
    inside = plane_barycentrics(points, triangle)
    candidates, lengths = [inside], [torch.where((inside >= 0).all(-1), 0.0, torch.inf).to(points.dtype)]
    off = points - (inside[..., None] * triangle).sum(1)
    lengths[0] = lengths[0] + off.square().sum(-1)
    for i in range(3):
        start, edge = triangle[:, i], triangle[:, (i + 1) % 3] - triangle[:, i]
        t = ((points - start) * edge).sum(-1) / edge.square().sum(-1).clamp(min=1e-20)
        t = t.clamp(0, 1)
        weights = torch.zeros_like(inside)
        weights[:, i], weights[:, (i + 1) % 3] = 1 - t, t
        candidates.append(weights)
        lengths.append((points - start - t[:, None] * edge).square().sum(-1))
    nearest = torch.stack(lengths).argmin(0)
    return torch.stack(candidates)[nearest, torch.arange(len(points), device=points.device)]


class SurfacePoints(NamedTuple):
    """Where a topology is sampled, and the template's box."""

    faces: Tensor  # [P]
    barycentrics: Tensor  # [P, 3]
    center: Tensor  # [3] metres
    half_side: Tensor  # metres


def surface_points(head: Head, count: int) -> SurfacePoints:
    """Places spread evenly over the template's area, without randomness (DESIGN §6, ours).

    Point i lies where the running sum of the areas reaches (i + ½) / P of the whole, and in its face at the i-th term
    of the sequence R2, folded.
    """
    mesh = head.v_template.double()
    a, b, c = mesh[head.faces].unbind(1)
    area = torch.linalg.cross(b - a, c - a).norm(dim=-1) / 2
    ends = area.cumsum(0)
    places = torch.arange(count, dtype=torch.float64, device=mesh.device) + 0.5
    faces = torch.searchsorted(ends, places / count * ends[-1], right=True).clamp(max=int(area.nonzero().max()))
    root = 1.32471795724474602596  # Of x³ = x + 1.
    u, v = (places / root % 1, places / root**2 % 1)
    outside = u + v > 1
    u, v = torch.where(outside, 1 - u, u), torch.where(outside, 1 - v, v)
    low, high, dtype = mesh.amin(0), mesh.amax(0), head.v_template.dtype
    return SurfacePoints(
        faces,
        torch.stack([1 - u - v, u, v], -1).to(dtype),
        ((low + high) / 2).to(dtype),
        ((high - low).max() / 2).to(dtype),
    )


def head_points(head: Head, mesh: Tensor, table: SurfacePoints) -> Tensor:
    """[..., V, 3] → [..., P, 6]: places in the template's box, scaled to [-1, 1], and unit normals."""
    a, b, c = (mesh[..., head.faces[table.faces, i], :] for i in range(3))
    points = sum(table.barycentrics[:, i, None] * x for i, x in enumerate((a, b, c)))
    normals = normalize(torch.linalg.cross((b - a) / table.half_side, (c - a) / table.half_side))
    return torch.cat([(points - table.center) / table.half_side, normals.expand_as(points)], -1)


def _blend(directions: Tensor, coefficients: Tensor) -> Tensor:
    """[V, 3, C], [..., ≤ C] → [..., V, 3]."""
    return torch.einsum("vkc,...c->...vk", directions[..., : coefficients.shape[-1]], coefficients)


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _on_faces(head: Head, rig: Rig, mesh: Tensor) -> Tensor:
    corners = head.faces[rig.binding]
    return sum(rig.barycentrics[:, i, None] * mesh[..., corners[:, i], :] for i in range(3))


def _interpolated_rest(head: Head, rig: Rig, rest_offset: Tensor) -> Tensor:
    """[P, 3]: with it the interpolated formula gives the canonical points in the canonical pose."""
    posed = deform(head, rig.canonical)
    shift = torch.einsum("pj,ja->pa", rig.skin_weights, posed.shift)
    surface = _on_faces(head, rig, posed.vertices) - rig.canonical["translation"]
    return _apply(rig.rest_linear, surface - shift) + rest_offset - _on_faces(head, rig, posed.shaped)
