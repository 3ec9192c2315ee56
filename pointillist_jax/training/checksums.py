"""Checksums of arrays and JSON, so that a checkpoint whose bytes have changed on disk is never trained on.

Neither Orbax nor TensorStore notices a flipped bit inside an array's data, and a chunk that is gone reads as zeros.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from pointillist_jax.files import FileFormatError

_BLOCK = 1 << 22


def checksums(arrays: Any, texts: Mapping[str, Any]) -> dict[str, int]:
    """A number for every array and every JSON object, by name.

    The numbers are the same on every mesh and in every process: sums of whole numbers do not depend on their order. A
    changed bit always changes its array's number; any other damage passes once in four thousand million times.

    Args:
      arrays: pytree of NumPy or JAX arrays. Every process of a job has to ask for the same ones.
      texts: name → JSON content.
    """
    # One after the other: programs that talk to other processes at the same time can wait for each other for ever.
    sums = {jax.tree_util.keystr(path): int(_sum(x)) for path, x in jax.tree_util.tree_leaves_with_path(arrays)}
    return sums | {name: zlib.crc32(json.dumps(text, sort_keys=True).encode()) for name, text in texts.items()}


def check_sums(expected: Mapping[str, int], arrays: Any, texts: Mapping[str, Any]) -> None:
    """Raises FileFormatError, naming the first that differs, unless everything is what `checksums` was given."""
    for name, value in checksums(arrays, texts).items():
        if expected.get(name) != value:
            raise FileFormatError(f"{name} is not what was saved: its checksum differs; the disk has changed it.")


def _sum(x: np.ndarray | Array) -> int | Array:
    """Σ (2i + 1) wᵢ mod 2³² over the words of x: odd factors keep every bit, and tell places apart."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable and next(iter(x.devices())).platform == "cpu"):
        return _sum_on_devices(x)
    # The same on the host: there XLA would compile longer, for every shape, than NumPy computes.
    x = np.ascontiguousarray(x)
    words = x.reshape(-1).view(f"u{min(x.dtype.itemsize, 4)}")
    factors, total = np.arange(1, 2 * min(len(words), _BLOCK), 2, dtype=np.uint32), 0
    for start in range(0, len(words), _BLOCK):
        block = words[start : start + _BLOCK].astype(np.uint32)
        total += int(np.sum(block * (factors[: len(block)] + np.uint32(2 * start % 2**32)), dtype=np.uint32))
    return total % 2**32


@jax.jit
def _sum_on_devices(x: Array) -> UInt32[Array, ""]:
    size = x.dtype.itemsize
    words = x if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(size, 4)}"))
    # By axis, not over a flattened array, which would have to be gathered from the mesh first.
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = jnp.uint32(math.prod(words.shape[axis + 1 :]) % 2**32)
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * stride
    return jnp.sum(words.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)
