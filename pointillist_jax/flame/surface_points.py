"""A fixed sampling of a head's surface: oriented points for a point encoder (DESIGN §6, ours).

Every head of one topology is sampled at the same places (face, barycentrics), and brought into the unit cube by the
template's box rather than by its own: a large head stays larger than a small one. Letters: V vertices, F faces,
P points.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pointillist_jax.files import UserError
from pointillist_jax.flame.model import FlameModel
from pointillist_jax.flame.rotations import normalize

# Steps of the plane-filling sequence R2: powers of 1 / 1.3247…, the root of x³ = x + 1.
_STEPS = np.array([0.7548776662466927, 0.5698402909980532])


class SurfacePoints(NamedTuple):
    """Where a topology is sampled, and the box it is measured in.

    Attributes:
      faces: [P] int32.
      barycentrics: [P, 3], of each point in its face.
      center: [3] metres, of the template's bounding box.
      half_side: metres, half of its longest side.
    """

    faces: Int[Array, "P"]
    barycentrics: Float[Array, "P 3"]
    center: Float[Array, "3"]
    half_side: Float[Array, ""]


def surface_points(model: FlameModel, num_points: int = 4096) -> SurfacePoints:
    """The sampling for a head model: even over the template's area, without any randomness, as NumPy arrays.

    A face gets as many points as its area asks for, rounded up or down.

    Raises:
      UserError: fewer than one point, a model without area, or one that is being traced by jit.
    """
    if isinstance(model.v_template, jax.core.Tracer) or isinstance(model.faces, jax.core.Tracer):
        raise UserError(
            "head_points: the model is an argument of a jitted function; make `table = surface_points(model)` outside "
            "and pass it along."
        )
    vertices = np.asarray(model.v_template, np.float64)
    corners = vertices[np.asarray(model.faces)]
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=-1) / 2
    if num_points < 1 or not area.sum() > 0:
        raise UserError(f"{num_points} points on a surface of {area.sum():.3g} m²: both must be positive.")
    ends = np.cumsum(area)
    faces = np.searchsorted(ends, (np.arange(num_points) + 0.5) / num_points * ends[-1], side="right")
    faces = np.minimum(faces, np.flatnonzero(area)[-1])
    u, v = ((np.arange(num_points)[:, None] + 0.5) * _STEPS % 1).T
    # Folds the unit square onto the triangle, evenly.
    outside = u + v > 1
    u, v = np.where(outside, 1 - u, u), np.where(outside, 1 - v, v)
    low, high, dtype = vertices.min(0), vertices.max(0), model.v_template.dtype
    return SurfacePoints(
        faces=faces.astype(np.int32),
        barycentrics=np.stack([1 - u - v, u, v], axis=-1).astype(dtype),
        center=((low + high) / 2).astype(dtype),
        half_side=((high - low).max() / 2).astype(dtype),
    )


def head_points(
    model: FlameModel,
    vertices: Float[Array, "*b V 3"],
    num_points: int = 4096,
    *,
    table: SurfacePoints | None = None,
) -> Float[Array, "*b P 6"]:
    """Points on a head with the unit normals of their faces: what `models.PointEncoder` reads.

    Args:
      model: the head model, for its faces and its template.
      vertices: metres, without global translation and rotation, which would carry the head out of the box.
      num_points: P; the encoder was trained on 4096.
      table: `surface_points(model, num_points)`, to make it once, or where `model` is traced; overrides `num_points`.

    Returns:
      [..., P, 6]: positions, the template's within [-1, 1] and its longest side spanning it; then outward normals.

    Raises:
      UserError: vertices of another topology; see also `surface_points`.
    """
    vertices = jnp.asarray(vertices)
    if vertices.ndim < 2 or vertices.shape[-2:] != model.v_template.shape:
        raise UserError(
            f"vertices have shape {vertices.shape}, but {model.source or 'the model'} has {model.num_vertices}: "
            f"expected [..., {model.num_vertices}, 3]."
        )
    table = surface_points(model, num_points) if table is None else table
    return _sample(vertices, model.faces, table)


@jax.jit
def _sample(vertices, faces, table: SurfacePoints):
    with jax.named_scope("head_points"):
        corners = faces[table.faces]
        a, b, c = (vertices[..., corners[:, i], :] for i in range(3))
        points = sum(table.barycentrics[:, i, None] * x for i, x in enumerate((a, b, c)))
        # Edges of a face are millimetres: their product is scaled up before it is normalised.
        normals = normalize(jnp.cross((b - a) / table.half_side, (c - a) / table.half_side))
        return jnp.concatenate([(points - table.center) / table.half_side, normals], axis=-1)
