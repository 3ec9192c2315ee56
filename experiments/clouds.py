"""Bound point clouds to look at: splats coloured by the part of the head that each point is bound to."""

from __future__ import annotations

import colorsys
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from experiments.pictures import BACKGROUND, contact_sheet
from pointillist_jax.cameras import orbit
from pointillist_jax.flame import FlameModel, flame_vertices
from pointillist_jax.gaussians import Gaussians
from renderer_bridge import rasterize

# sRGB: neighbours on the head differ, and what matters in a face stands out.
_COLORS = {
    "face": (0.91, 0.71, 0.58),
    "nose": (0.95, 0.58, 0.42),
    "brows": (0.35, 0.24, 0.20),
    "scalp": (0.42, 0.38, 0.62),
    "lips": (0.85, 0.25, 0.32),
    "lids": (0.60, 0.42, 0.68),
    "ears": (0.36, 0.66, 0.56),
    "neck": (0.52, 0.68, 0.84),
    "shoulders": (0.36, 0.48, 0.72),
    "eyes": (0.97, 0.97, 0.97),
    "iris": (0.10, 0.52, 0.68),
    "pupil": (0.03, 0.03, 0.05),
    "sockets": (0.55, 0.20, 0.45),
    "mouth_inside": (0.50, 0.12, 0.16),
    "teeth": (0.98, 0.90, 0.60),
    "tongue": (0.90, 0.45, 0.58),
    "head": (0.91, 0.71, 0.58),
}
VIEWS = {"front": 0.0, "three-quarter": 45.0, "side": 90.0}
# Square metres of a head with neck and shoulders, to choose how large a point is drawn.
_AREA = 0.25
_BUCKET = 8192


def region_colors(head: FlameModel) -> Float[np.ndarray, "F 3"]:
    """sRGB of every face by its region; regions without a colour of their own get one from their place in the list."""
    table = [
        _COLORS.get(name) or colorsys.hsv_to_rgb(0.618 * i % 1, 0.45, 0.85) for i, name in enumerate(head.region_names)
    ]
    return np.asarray(table, np.float32)[np.asarray(head.face_regions)]


def cloud_gaussians(
    points: Float[np.ndarray, "P 3"], binding: Int[np.ndarray, "P"], head: FlameModel, radius: float = 0.0
) -> Gaussians:
    """Points as round, nearly opaque splats, coloured by region.

    Args:
      radius: standard deviation in metres; 0 chooses one by the number of points, so that a head's surface closes.
    """
    num = len(points)
    radius = radius or float(np.clip(0.42 * math.sqrt(_AREA / max(num, 1)), 3e-4, 4e-3))
    return Gaussians(
        means=jnp.asarray(points, jnp.float32).reshape(-1, 3),
        quats=jnp.tile(jnp.array([1.0, 0.0, 0.0, 0.0]), (num, 1)),
        scales=jnp.full((num, 3), radius, jnp.float32),
        opacities=jnp.full(num, 0.95, jnp.float32),
        colors=jnp.asarray(region_colors(head)[np.asarray(binding, np.int64)]),
    )


def shaded(
    gaussians: Gaussians, binding: Int[np.ndarray, "P"], head: FlameModel, shape: np.ndarray, jaw: float
) -> Gaussians:
    """The same, lit from the front: a point is as bright as the face that it is bound to, on this person's head."""
    params = head.neutral_params().replace(shape=jnp.asarray(shape)).canonical(jaw)
    corners = np.asarray(flame_vertices(head, params), np.float64)[np.asarray(head.faces)]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    light = np.array([0.25, 0.35, 0.9]) / np.linalg.norm([0.25, 0.35, 0.9])
    level = 0.55 + 0.45 * np.clip(0.35 + 0.65 * normals @ light, 0, 1)
    return gaussians.replace(colors=gaussians.colors * jnp.asarray(level, jnp.float32)[np.asarray(binding)][:, None])


def render_views(
    gaussians: Gaussians, size: int = 256, azimuths: Sequence[float] = tuple(VIEWS.values())
) -> list[np.ndarray]:
    """One picture [size, size, 3] per azimuth (degrees, 0 in front), on light grey."""
    names = ("means", "quats", "scales", "opacities", "colors")
    # Clouds of every length run through few programs; what is added is transparent.
    num = gaussians.means.shape[0]
    padded = max(-(-num // _BUCKET), 1) * _BUCKET
    arrays = [
        np.concatenate([x, np.ones((padded - num, *x.shape[1:]), np.float32) * (name != "opacities")])
        for name, x in ((name, np.asarray(getattr(gaussians, name))) for name in names)
    ]
    where = {"width": size, "height": size, "distance": 1.2, "target": (0.0, -0.03, -0.04)}
    cameras = [orbit(1, azimuth=(math.radians(a), math.radians(a)), **where) for a in azimuths]
    viewmats, Ks = (jnp.concatenate([getattr(c, name) for c in cameras]) for name in ("viewmats", "Ks"))
    capacity = 4 * padded * len(cameras)
    while True:
        images, missing = _splat(*arrays, viewmats, Ks, size, capacity)
        if not int(missing):
            return list(np.asarray(images))
        capacity *= 2


@functools.partial(jax.jit, static_argnums=(7, 8))
def _splat(means, quats, scales, opacities, colors, viewmats, Ks, size: int, capacity: int):
    background = jnp.tile(jnp.array([BACKGROUND]), (len(viewmats), 1))
    image, _, info = rasterize(
        means, quats, scales, opacities, colors, viewmats, Ks, size, size, backgrounds=background, capacity=capacity
    )
    return image, info["overflow"]


def cloud_sheet(rows: Sequence[tuple[str, np.ndarray | None, Gaussians]], size: int = 256) -> np.ndarray:
    """One row per cloud: a portrait, or an empty field, and the three views.

    Args:
      rows: (label, portrait uint8 [h, w, 3] or None, splats).
    """
    from PIL import Image

    images, labels = [], []
    for label, portrait, gaussians in rows:
        field = np.full((size, size, 3), BACKGROUND, np.float32)
        if portrait is not None:
            field = (
                np.asarray(Image.fromarray(portrait).resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255
            )
        images += [field, *render_views(gaussians, size)]
        labels += [label, *VIEWS]
    return contact_sheet(images, labels, 1 + len(VIEWS))
