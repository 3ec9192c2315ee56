"""Untrusted images: headers checked before anything is decoded, masks composited, a cache with a bound in bytes."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
from PIL import Image

from pointillist_jax.files import FileFormatError, require_file

_FORMATS = ("PNG", "JPEG", "WEBP")
# What stands at the end of a whole file: MPO is a JPEG with others behind it, and WebP says its length in the header.
_ENDS = {"PNG": b"IEND", "JPEG": b"\xff\xd9", "MPO": b"\xff\xd9"}
# Some programs append a few words of their own.
_TAIL_BYTES = 4096
# 8k × 8k: far above any capture, far below what would fill a machine's memory.
_MAX_PIXELS = 1 << 26
# JPEG and rounding leave white backgrounds a little below 255.
_WHITE = 250
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK")


def check_header(path: str | os.PathLike, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """(width, height) of an untrusted image, from its header; a file that broke off is known by its missing end.

    Pixels are not decoded: damage between header and end shows in `load_rgba`.

    Args:
      path: a PNG, JPEG or WebP file.
      size: what it has to be.

    Raises:
      FileNotFoundError: no such file.
      FileFormatError: not an image, truncated, of another size, or too large to be decoded safely.
    """
    path = require_file(path, "an image")
    with _open(path) as image:
        _check(path, image, size)
        if image.format in _ENDS:
            # Behind the header, where Pillow stands now: the thumbnail in a JPEG's has an end of its own.
            start = max(image.fp.tell(), path.stat().st_size - _TAIL_BYTES)
            with open(path, "rb") as file:
                file.seek(start)
                if _ENDS[image.format] not in file.read():
                    raise FileFormatError(f"{path} is a truncated {image.format}; copy it again.")
        return image.size


def load_rgba(
    path: str | os.PathLike,
    mask_path: str | os.PathLike | None = None,
    size: tuple[int, int] | None = None,
    resize: tuple[int, int] | None = None,
) -> np.ndarray:
    """An image with its mask or alpha → uint8 [H, W, 4]: colour multiplied by the mask, and the mask.

    With both a mask and an alpha channel, the smaller of the two counts; with neither, everything is foreground. An
    image that is white wherever its mask is 0 was composited before (VHAP): on white it is returned as it is.

    Args:
      path, mask_path: untrusted files of one size.
      size: (width, height) they have to have.
      resize: (width, height) to return; shrinks by area averaging.

    Raises:
      FileNotFoundError: no such file.
      FileFormatError: as `check_header`, and data that cannot be decoded.
    """
    path = require_file(path, "an image")
    with _open(path) as image:
        _check(path, image, size)
        size = image.size
        rgba = _decode(path, image, "RGBA")
    alpha = rgba[..., 3]
    if mask_path is not None:
        mask_path = require_file(mask_path, "a foreground mask")
        with _open(mask_path) as mask:
            _check(mask_path, mask, size)
            alpha = np.minimum(alpha, _decode(mask_path, mask, "L"))
    out = np.empty_like(rgba)
    color, outside = rgba[..., :3].astype(np.int32), alpha == 0
    if mask_path is not None and outside.any() and color[outside].min() >= _WHITE:
        # Cut out on white by its own soft mask already, as VHAP exports it: a second time would bleach the edges.
        out[..., :3] = np.clip(color - 255 + alpha[..., None], 0, alpha[..., None])
    else:
        out[..., :3] = (color * alpha[..., None] + 127) // 255
    out[..., 3] = alpha
    if resize is not None and tuple(resize) != size:
        smaller = resize[0] <= size[0] and resize[1] <= size[1]
        method = Image.Resampling.BOX if smaller else Image.Resampling.BILINEAR
        # Channel by channel: the colours are multiplied already, and PIL would multiply an RGBA image once more.
        channels = [Image.fromarray(np.ascontiguousarray(out[..., c])).resize(resize, method) for c in range(4)]
        out = np.stack([np.asarray(c) for c in channels], axis=-1)
    return out


def square_portrait(rgba: np.ndarray, side: int, background: int = 255) -> np.ndarray:
    """uint8 [H, W, 4] as from `load_rgba` → uint8 [side, side, 3]: the whole picture, centred on a plain square.

    Nothing is cut off, so every photograph of a head gives the encoder its full context; wide or high pictures lose
    resolution instead.
    """
    h, w, _ = rgba.shape
    longest = max(h, w)
    image = np.full((longest, longest, 3), background, np.uint8)
    top, left = (longest - h) // 2, (longest - w) // 2
    alpha = rgba[..., 3:].astype(np.uint16)
    image[top : top + h, left : left + w] = rgba[..., :3] + ((255 - alpha) * background + 127) // 255
    if longest == side:
        return image
    return np.array(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


class ImageCache:
    """Decoded images, the least recently used of which are dropped at a bound. Safe to share between threads.

    A copy in another process (pickling) starts empty.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self._images: OrderedDict[tuple, np.ndarray] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, path: Path, mask_path: Path | None, size: tuple[int, int], resize: tuple[int, int]) -> np.ndarray:
        """As `load_rgba`; read-only."""
        key = (path, mask_path, resize)
        with self._lock:
            if key in self._images:
                self._images.move_to_end(key)
                return self._images[key]
        # Outside the lock, so that threads decode side by side; two may decode the same image, which costs only time.
        image = load_rgba(path, mask_path, size, resize)
        image.flags.writeable = False
        with self._lock:
            if key not in self._images and image.nbytes <= self.max_bytes:
                self._images[key] = image
                self._bytes += image.nbytes
                while self._bytes > self.max_bytes:
                    self._bytes -= self._images.popitem(last=False)[1].nbytes
        return image

    @property
    def num_bytes(self) -> int:
        return self._bytes

    def __getstate__(self) -> dict:
        return {"max_bytes": self.max_bytes}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["max_bytes"])


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path, formats=_FORMATS)
    except Exception as error:  # Pillow raises a dozen different errors for damaged headers.
        reason = str(error)[:200] or type(error).__name__
        raise FileFormatError(f"{path} is not a readable PNG, JPEG or WebP ({reason}); write it again.") from None


def _check(path: Path, image: Image.Image, size: tuple[int, int] | None) -> None:
    if size is not None and image.size != tuple(size):
        raise FileFormatError(
            f"{path} is {image.width} × {image.height} pixels, expected {size[0]} × {size[1]}: correct w and h, or the "
            "image."
        )
    if image.width * image.height > _MAX_PIXELS:
        raise FileFormatError(f"{path} claims {image.width} × {image.height} pixels, more than this program reads.")
    if image.mode not in _MODES:
        raise FileFormatError(f"{path} has pixels of kind {image.mode}, expected grey, RGB or RGBA of 8 bits.")


def _decode(path: Path, image: Image.Image, mode: str) -> np.ndarray:
    try:
        if image.mode == "I;16":
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return np.array(image.convert(mode))
    except Exception as error:
        reason = str(error)[:200] or type(error).__name__
        raise FileFormatError(f"{path} cannot be decoded ({reason}); copy or write it again.") from None
