"""Linear blend skinning of FLAME-layout heads (facts/avatars_gsplat.md F; DESIGN §3).

Everything is a pure function of pytrees, batched over any leading axes, and keeps the dtype it is given
(float32 or float64). Letters: V vertices, J joints, S shape and E expression coefficients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pointillist_jax.files import UserError
from pointillist_jax.flame.rotations import exact_einsum, rodrigues

if TYPE_CHECKING:
    from pointillist_jax.flame.model import FlameModel, FlameParams


class Deformation(NamedTuple):
    """A posed head and the joint transforms that posed it.

    Attributes:
      vertices: [..., V, 3] metres, translation included.
      shaped: [..., V, 3] before skinning: template + shape + offset + expression + pose correctives.
      rotation: [..., J, 3, 3] rotation of each joint's rest-to-posed transform.
      shift: [..., J, 3] its translation, without the global one: posed = rotation @ rest + shift.
    """

    vertices: Float[Array, "*b V 3"]
    shaped: Float[Array, "*b V 3"]
    rotation: Float[Array, "*b J 3 3"]
    shift: Float[Array, "*b J 3"]


def flame_vertices(model: FlameModel, params: FlameParams) -> Float[Array, "*b V 3"]:
    """Vertices of a posed head in metres (facts F; paper §4.3).

    Args:
      model: a head from `load_flame` or `open_head`.
      params: leading axes broadcast against each other, so one identity (`shape [S]`) can be posed by many
        expressions (`expr [B, E]`) and is then computed once. Fewer coefficients than the model has are allowed.

    Returns:
      [..., V, 3] in the params' dtype.

    Raises:
      UserError: a parameter's last axis does not fit the model.
    """
    return deform(model, params).vertices


def deform(model: FlameModel, params: FlameParams) -> Deformation:
    """As `flame_vertices`, with the joint transforms that a rig needs beside the vertices."""
    _check(model, params)
    return _deform(model, params)


# Compiled as a whole also when called outside jit, where every operation would be compiled by itself.
@jax.jit
def _deform(model: FlameModel, params: FlameParams) -> Deformation:
    with jax.named_scope("flame"):
        identity = model.v_template + _blend(model.shape_dirs, params.shape)
        if params.static_offset is not None:
            identity = identity + params.static_offset
        neutral = identity + _blend(model.expr_dirs, params.expr)
        joints = exact_einsum("jv,...vk->...jk", model.joint_regressor, neutral)

        pose = _full_pose(params)
        local = rodrigues(pose)
        feature = (local[..., 1:, :, :] - jnp.eye(3, dtype=local.dtype)).reshape(*local.shape[:-3], -1)
        shaped = neutral + _blend(model.pose_dirs, feature)

        rotation, shift = _chain(local, joints, model.parents)
        vertices = _skin(model.skin_weights, rotation, shift, shaped) + params.translation[..., None, :]
    return Deformation(vertices, shaped, rotation, shift)


def _blend(directions, coefficients):
    """[V, 3, C] · [..., C] → [..., V, 3]; coefficients may be fewer than directions."""
    directions = directions[..., : coefficients.shape[-1]]
    v, k, c = directions.shape
    flat = exact_einsum("rc,...c->...r", directions.reshape(v * k, c), coefficients)
    return flat.reshape(*flat.shape[:-1], v, k)


def _full_pose(params):
    """[..., J, 3]: root, neck, jaw, left eye, right eye."""
    parts = [params.rotation, params.neck_pose, params.jaw_pose, params.eyes_pose[..., :3], params.eyes_pose[..., 3:]]
    return jnp.stack(jnp.broadcast_arrays(*parts), axis=-2)


def _chain(local, joints, parents):
    """Forward kinematics: rest-to-posed rotation [..., J, 3, 3] and shift [..., J, 3] of every joint."""
    # `parents` is static and five long: the loop unrolls into the traced program.
    rotation, origin = [local[..., 0, :, :]], [joints[..., 0, :]]
    for j in range(1, len(parents)):
        p = parents[j]
        rotation.append(exact_einsum("...ab,...bc->...ac", rotation[p], local[..., j, :, :]))
        bone = joints[..., j, :] - joints[..., p, :]
        origin.append(origin[p] + exact_einsum("...ab,...b->...a", rotation[p], bone))
    rotation = jnp.stack(rotation, axis=-3)
    origin = jnp.stack(jnp.broadcast_arrays(*origin), axis=-2)
    return rotation, origin - exact_einsum("...jab,...jb->...ja", rotation, joints)


def _skin(weights, rotation, shift, points):
    """Σ_j w_vj (R_j x_v + t_j): [V, J], [..., J, 3, 3], [..., J, 3], [..., V, 3] → [..., V, 3]."""
    # Coordinates apart and joints unrolled: one fused loop over the vertices, without a 3 × 4 matrix per vertex in
    # memory (2 instead of 6 ms for 64 × 5143 vertices).
    x, y, z = (points[..., k] for k in range(3))
    moved = []
    for a in range(3):
        row, t = rotation[..., a, :, None], shift[..., a, None]
        moved.append(
            sum(
                weights[:, j] * (row[..., j, 0, :] * x + row[..., j, 1, :] * y + row[..., j, 2, :] * z + t[..., j, :])
                for j in range(weights.shape[-1])
            )
        )
    return jnp.stack(moved, axis=-1)


def _check(model: FlameModel, params: FlameParams) -> None:
    limits = {
        "shape": (0, model.shape_dirs.shape[-1]),
        "expr": (0, model.expr_dirs.shape[-1]),
        "rotation": (3, 3),
        "neck_pose": (3, 3),
        "jaw_pose": (3, 3),
        "eyes_pose": (6, 6),
        "translation": (3, 3),
    }
    for name, (low, high) in limits.items():
        value = getattr(params, name)
        n = value.shape[-1] if jnp.ndim(value) else None
        if n is None or not low <= n <= high:
            want = str(high) if low == high else f"at most {high}"
            raise UserError(f"FlameParams.{name} has shape {jnp.shape(value)}; its last axis must be {want} long.")
    offset, v = params.static_offset, model.v_template.shape[0]
    if offset is not None and offset.shape[-2:] != (v, 3):
        raise UserError(
            f"FlameParams.static_offset has shape {jnp.shape(offset)}, expected [..., {v}, 3]; "
            "an offset for the 5023 vertices without teeth is padded with 120 zero rows."
        )
