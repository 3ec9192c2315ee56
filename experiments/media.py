"""Writing pictures and videos, atomically."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import imageio.v3 as iio
import numpy as np

from pointillist_jax.files import atomic_path


def write_image(path: Path, image: np.ndarray) -> None:
    """Writes float [H, W, 3] in [0, 1] as PNG or JPEG, by the suffix."""
    with atomic_path(path) as temporary:
        iio.imwrite(temporary, _to_bytes(image))


def write_video(path: Path, frames: Sequence[np.ndarray], fps: int = 24) -> None:
    """Writes float [H, W, 3] frames in [0, 1] as an H.264 MP4; sides are padded to even lengths, which H.264 needs."""
    height, width, _ = frames[0].shape
    pad = ((0, height % 2), (0, width % 2), (0, 0))
    with atomic_path(path) as temporary, warnings.catch_warnings():
        # JAX warns of every fork; the encoder's is followed by exec at once, which is safe.
        warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning)
        iio.imwrite(
            temporary,
            np.stack([np.pad(_to_bytes(frame), pad, mode="edge") for frame in frames]),
            plugin="FFMPEG",
            fps=fps,
            codec="libx264",
            quality=8,
            macro_block_size=2,
        )


def _to_bytes(image: np.ndarray) -> np.ndarray:
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
