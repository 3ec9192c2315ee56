"""Pictures to numbers: every metric of a set of pictures against photographs, and what is needed for it (DESIGN §11).

A metric whose network or weights are not there is not available; it never becomes a number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8

from pointillist_jax.evaluation import metrics
from pointillist_jax.losses import lpips, psnr, ssim

# Pictures that are exactly alike have an infinite PSNR, which JSON cannot hold.
_MAX_PSNR = 100.0


class Metric(NamedTuple):
    """A column of a table.

    Attributes:
      title: with its unit.
      better: "higher" or "lower".
      needs: the field of `Networks` it is made with; "" for none.
      pixels: whether it needs the photograph of what is rendered, so that cross-reenactment has none.
      digits: behind the point.
      what: a line of definition.
    """

    title: str
    better: str
    needs: str
    pixels: bool
    digits: int
    what: str


METRICS = {
    "psnr": Metric("PSNR dB", "higher", "", True, 2, "peak signal-to-noise ratio of a picture, mean over pictures"),
    "ssim": Metric("SSIM", "higher", "", True, 4, "11 × 11 Gaussian window, zero padding, as 3DGS defines it"),
    "lpips": Metric("LPIPS", "lower", "lpips", True, 4, "version 0.1 on VGG16, pictures in [-1, 1]"),
    "fid": Metric("FID", "lower", "inception", False, 1, "Fréchet distance of Inception-v3 pool features"),
    "akd_px": Metric("AKD px", "lower", "landmarks", False, 2, "mean distance of MediaPipe's 478 landmarks, in pixels "
                     "of a picture 512 wide"),
    "akd": Metric("AKD 1e-3", "lower", "landmarks", False, 2, "the same in thousandths of the picture's width"),
    "apd_deg": Metric("APD °", "lower", "pose", False, 2, "geodesic angle between the head poses 6DRepNet sees"),
    "apd_mrad": Metric("APD 1e-3 rad", "lower", "pose", False, 1, "mean absolute difference of their three Euler "
                       "angles"),
    "apd_mp_deg": Metric("APD-MP °", "lower", "landmarks", False, 2, "geodesic angle between the head poses of "
                         "MediaPipe's facial transformation"),
    "apd_mp_mrad": Metric("APD-MP 1e-3 rad", "lower", "landmarks", False, 1, "mean absolute difference of their three "
                          "Euler angles"),
    "clip": Metric("CLIP", "higher", "clip", False, 4, "cosine of CLIP's image embeddings of the portrait and the "
                   "picture"),
}  # fmt: skip
# Of a person's pictures one number each; FID is one of all people's.
PER_PICTURE = tuple(name for name in METRICS if name != "fid")


class Face(NamedTuple):
    """What a landmark network finds. points: [K, 2] in units of the picture's width; rotation: [3, 3] of the head."""

    points: Float[np.ndarray, "K 2"]
    rotation: Float[np.ndarray, "3 3"]


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks there are; None for those that are not (see `networks.py`).

    Attributes:
      lpips: parameters from `convert.lpips_from_torch`.
      inception: uint8 [N, H, W, 3] → [N, D].
      landmarks: uint8 [H, W, 3] → `Face`, or None where no face is found.
      pose: uint8 [N, H, W, 3] → rotations [N, 3, 3].
      clip: uint8 [N, H, W, 3] → [N, D].
    """

    lpips: Any = None
    inception: Callable[[UInt8[np.ndarray, "N H W 3"]], np.ndarray] | None = None
    landmarks: Callable[[UInt8[np.ndarray, "H W 3"]], Face | None] | None = None
    pose: Callable[[UInt8[np.ndarray, "N H W 3"]], np.ndarray] | None = None
    clip: Callable[[UInt8[np.ndarray, "N H W 3"]], np.ndarray] | None = None

    def available(self, protocol: str) -> tuple[str, ...]:
        """Names of the metrics that these networks give in a protocol, in the order of tables."""
        cross = protocol == "cross"
        return tuple(
            name
            for name, m in METRICS.items()
            if (not m.needs or getattr(self, m.needs) is not None) and not (cross and m.pixels)
        )


@dataclasses.dataclass(frozen=True)
class Seen:
    """What the networks see in N pictures; None where there is no such network.

    Attributes:
      pictures: [N, H, W, 3] in [0, 1].
      features: [N, D] of Inception. faces: one a picture, None where none was found. poses: [N, 3, 3].
      embeddings: [N, D] of CLIP.
    """

    pictures: Float[np.ndarray, "N H W 3"]
    features: np.ndarray | None
    faces: tuple[Face | None, ...] | None
    poses: np.ndarray | None
    embeddings: np.ndarray | None


def look(pictures: Float[np.ndarray, "N H W 3"], networks: Networks) -> Seen:
    """Runs the networks that there are. Pictures are rounded to the 256 levels of files for them."""
    levels = np.uint8(np.round(np.clip(pictures, 0, 1) * 255))
    return Seen(
        pictures=pictures,
        features=None if networks.inception is None else np.asarray(networks.inception(levels)),
        faces=None if networks.landmarks is None else tuple(networks.landmarks(picture) for picture in levels),
        poses=None if networks.pose is None else np.asarray(networks.pose(levels)),
        embeddings=None if networks.clip is None else np.asarray(networks.clip(levels)),
    )


def compare(
    seen: Seen, truth: Seen, networks: Networks, *, portrait: np.ndarray | None = None, pixels: bool = True
) -> dict[str, Float[np.ndarray, "N"]]:
    """Every metric of `PER_PICTURE` that is available: [N], NaN where a picture has no value (no face found).

    Args:
      seen, truth: renders, and photographs of the same poses and cameras.
      networks: that looked at both.
      portrait: CLIP's embedding [D] of the portrait.
      pixels: False in cross-reenactment, where the photographs show somebody else.
    """
    found: dict[str, np.ndarray] = {}
    if pixels:
        found |= {name: np.asarray(value) for name, value in _pixel_scores(seen.pictures, truth.pictures).items()}
        found["psnr"] = np.minimum(found["psnr"], _MAX_PSNR)
        if networks.lpips is not None:
            found["lpips"] = np.asarray(_lpips(seen.pictures, truth.pictures, networks.lpips))
    if seen.faces is not None and truth.faces is not None:
        pairs = [None if a is None or b is None else (a, b) for a, b in zip(seen.faces, truth.faces, strict=True)]

        def of_pairs(distance: Callable) -> np.ndarray:
            return np.array([np.nan if pair is None else distance(*pair) for pair in pairs])

        widths = of_pairs(lambda a, b: metrics.keypoint_distance(a.points, b.points))
        found |= {"akd_px": metrics.AKD_WIDTH * widths, "akd": 1e3 * widths}
        found["apd_mp_deg"] = of_pairs(lambda a, b: np.degrees(metrics.geodesic_angle(a.rotation, b.rotation)))
        found["apd_mp_mrad"] = of_pairs(lambda a, b: 1e3 * metrics.euler_distance(a.rotation, b.rotation))
    if seen.poses is not None and truth.poses is not None:
        found["apd_deg"] = np.degrees(metrics.geodesic_angle(seen.poses, truth.poses))
        found["apd_mrad"] = 1e3 * metrics.euler_distance(seen.poses, truth.poses)
    if seen.embeddings is not None and portrait is not None:
        found["clip"] = metrics.cosine(seen.embeddings, portrait)
    return found


def mean_scores(per_picture: Mapping[str, Any]) -> dict[str, float | None]:
    """The mean of each metric over the pictures that have a value; None if none has."""
    means: dict[str, float | None] = {}
    for name, values in per_picture.items():
        numbers = np.array([np.nan if v is None else v for v in values], np.float64)
        means[name] = None if np.isnan(numbers).all() else float(np.nanmean(numbers))
    return means


@jax.jit
def _pixel_scores(pictures, truth):
    return {"psnr": psnr(pictures, truth), "ssim": ssim(pictures, truth)}


_lpips = jax.jit(lpips)
