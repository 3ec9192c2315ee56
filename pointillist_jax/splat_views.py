"""Avatars for viewers that take centres, covariances, colours and opacities; and colours that show how they are made.

Letters: G Gaussians, F faces.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.spatial import cKDTree

from pointillist_jax.flame import FlameModel, FlameParams, animate
from pointillist_jax.flame.rotations import exact_einsum, quat_to_rotation
from pointillist_jax.gaussians import SH_C0, Avatar, Gaussians

# Viewers hold covariances as half floats (facts/encoders_and_metrics.md 8.1), whose full precision begins at 6e-5: in
# metres a Gaussian of 0.2 mm is 4e-8 and vanishes or doubles, in centimetres it is 4e-4.
CENTIMETRES = 100.0
# A metre: no Gaussian of a head is larger, and the square of 100 cm is still a half float.
_MAX_SCALE = 1.0
# Hues that differ by the golden ratio's fraction stay apart however many there are.
_GOLDEN = 0.61803398875


class PosedSplats(NamedTuple):
    """What moves of an avatar in one pose.

    Attributes:
      centers: [G, 3] float32, centimetres.
      covariances: [G, 3, 3] float32, square centimetres.
    """

    centers: np.ndarray
    covariances: np.ndarray


def pose_splats(
    avatar: Avatar, head: FlameModel, params: FlameParams, *, size: float = 1.0, follow_stretch: bool = True
) -> PosedSplats:
    """The avatar at a pose, in centimetres.

    Args:
      avatar, head, params, follow_stretch: as `flame.animate`; params without leading axes.
      size: factor on all standard deviations: small splats show the points.
    """
    return PosedSplats(*map(np.asarray, _posed(avatar, head, params, jnp.float32(size), follow_stretch)))


@functools.partial(jax.jit, static_argnames="follow_stretch")
def _posed(avatar, head, params, size, follow_stretch: bool):
    world = animate(avatar, head, params, follow_stretch=follow_stretch)
    scales = jnp.minimum(size * world.scales, _MAX_SCALE)
    axes = CENTIMETRES * quat_to_rotation(world.quats) * scales[..., None, :]
    return CENTIMETRES * world.means, exact_einsum("gai,gbi->gab", axes, axes)


def own_colors(gaussians: Gaussians) -> np.ndarray:
    """[G, 3] RGB in [0, 1]: the colours; of spherical harmonics the part that is the same from all sides."""
    colors = gaussians.colors if gaussians.sh is None else 0.5 + SH_C0 * gaussians.sh[..., 0, :]
    return np.clip(np.asarray(colors, np.float32), 0, 1)


def binding_colors(binding: Int[Array, "G"]) -> np.ndarray:
    """[G, 3]: a colour for each face, unlike its neighbours'; Gaussians of one face look alike."""
    return distinct_colors(np.asarray(binding))


def region_colors(binding: Int[Array, "G"], head: FlameModel) -> np.ndarray:
    """[G, 3]: a colour for each region of the head (nose, lips, scalp, …), by the face a Gaussian is bound to."""
    return distinct_colors(np.asarray(head.face_regions)[np.asarray(binding)])


def distinct_colors(numbers: np.ndarray) -> np.ndarray:
    """[N] integers ≥ 0 → [N, 3] RGB: the same for the same number, far apart for numbers that follow each other."""
    numbers = np.asarray(numbers, np.int64)
    hue = (numbers * _GOLDEN) % 1.0
    # Three brightnesses beside the hue, for thousands of faces.
    value = 0.95 - 0.2 * (numbers % 3)
    ramp = np.abs((6 * hue[:, None] + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1
    return (value[:, None] * (0.3 + 0.7 * np.clip(ramp, 0, 1))).astype(np.float32)


def point_density(points: Float[Array, "G 3"], neighbors: int = 16) -> np.ndarray:
    """[G] points per square centimetre around each point: neighbours in the disc that reaches the last of them.

    Args:
      points: metres; on surfaces, as those of a head are.
      neighbors: how many of the nearest others count; fewer where there are not so many.
    """
    points = np.asarray(points, np.float64)
    count = min(neighbors, len(points) - 1)
    if count < 1:
        return np.zeros(len(points), np.float32)
    distance = cKDTree(points).query(points, k=count + 1)[0][:, -1]
    # Points of one place would have any density: a hundredth of a millimetre is below what tokens tell apart.
    radius = np.maximum(CENTIMETRES * distance, 1e-3)
    return (count / (np.pi * radius**2)).astype(np.float32)


class DensityScale(NamedTuple):
    """Densities in points per square centimetre at both ends of a heat map; between them it is logarithmic."""

    low: float
    high: float

    @classmethod
    def of(cls, *densities: np.ndarray) -> DensityScale:
        """Holds 96 % of the points of all these avatars, so that their heat maps compare."""
        low, high = np.percentile(np.concatenate(densities), (2, 98))
        return cls(float(max(low, 1e-3)), float(max(high, 1.001 * max(low, 1e-3))))

    def colors(self, density: np.ndarray) -> np.ndarray:
        """[G] → [G, 3]: blue where points are few, red where they are many."""
        import matplotlib

        span = np.log(self.high) - np.log(self.low)
        place = (np.log(np.maximum(density, 1e-6)) - np.log(self.low)) / span
        return matplotlib.colormaps["turbo"](np.clip(place, 0, 1))[:, :3].astype(np.float32)


def importance(gaussians: Gaussians) -> np.ndarray:
    """[G]: opacity times the area of the largest cross-section, in square metres: how much a Gaussian can cover."""
    scales = np.sort(np.asarray(gaussians.scales, np.float64), axis=-1)
    return np.asarray(gaussians.opacities, np.float64) * np.pi * scales[:, 1] * scales[:, 2]
