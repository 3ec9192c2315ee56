"""Writing pictures and videos, atomically."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import imageio.v3 as iio
import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe

from pointillist_jax.files import WriteError, atomic_path


def write_image(path: Path, image: np.ndarray) -> None:
    """Writes float [H, W, 3] in [0, 1] as PNG or JPEG, by the suffix."""
    with atomic_path(path) as temporary:
        iio.imwrite(temporary, _to_bytes(image))


def write_video(path: Path, frames: Sequence[np.ndarray], fps: int = 24) -> None:
    """Writes float [H, W, 3] frames in [0, 1] as an H.264 MP4; sides are padded to even lengths, which H.264 needs.

    Not through imageio's plugin, which does not look at how the encoder ended: a full disk would leave half a file.

    Raises:
      WriteError: says what the encoder said.
    """
    height, width, _ = frames[0].shape
    pad = ((0, height % 2), (0, width % 2), (0, 0))
    size = f"{width + width % 2}x{height + height % 2}"
    command = [
        get_ffmpeg_exe(), "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", str(fps),
        "-i", "-", "-an", "-vcodec", "libx264", "-pix_fmt", "yuv420p", "-crf", "10",
    ]  # fmt: skip
    with atomic_path(path) as temporary, tempfile.TemporaryFile() as said:
        encoder = _start([*command, str(temporary)], said)
        try:
            with contextlib.suppress(BrokenPipeError), encoder.stdin as pipe:  # What went wrong, its exit code tells.
                for frame in frames:
                    pipe.write(np.pad(_to_bytes(frame), pad, mode="edge").tobytes())
            failed = encoder.wait()
        finally:
            encoder.kill()
            encoder.wait()
        if failed:
            said.seek(0)
            raise WriteError(path, said.read(2000).decode(errors="replace") or f"ffmpeg ended with {failed}")


def _start(command: Sequence[str], said: IO[bytes]) -> subprocess.Popen:
    with warnings.catch_warnings():
        # JAX warns of every fork; the encoder's is followed by exec at once, which is safe.
        warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning)
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=said)


def _to_bytes(image: np.ndarray) -> np.ndarray:
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
