"""One record of the token store: named arrays behind a JSON header. Self-describing, no pickle, read without copying.

Layout, little-endian: magic "PJR1" · uint32 length of the header · header (JSON, UTF-8) · arrays, each on a multiple of
64 bytes after the header. The header is {"info": {...}, "arrays": {name: [dtype, shape, offset]}}.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from pointillist_jax.files import FileFormatError

_MAGIC, _ALIGN = b"PJR1", 64
_DTYPES = ("<i4", "<f4", "<f2", "|u1")
_MAX_HEADER = 1 << 20


def pack_record(info: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of a record; the same for the same content.

    Args:
      info: what JSON can hold.
      arrays: int32, float32, float16 or uint8.
    """
    parts, entries, offset = [], {}, 0
    for name, value in arrays.items():
        value = np.ascontiguousarray(value)
        dtype = value.dtype.newbyteorder("<").str
        if dtype not in _DTYPES:
            raise TypeError(f"{name} has dtype {value.dtype}; a record holds int32, float32, float16 or uint8")
        entries[name] = [dtype, list(value.shape), offset]
        data = value.astype(dtype, copy=False).tobytes()
        padding = -len(data) % _ALIGN
        parts += [data, b"\0" * padding]
        offset += len(data) + padding
    header = json.dumps({"info": dict(info), "arrays": entries}, allow_nan=False, sort_keys=True).encode()
    header += b" " * (-(len(header) + 8) % _ALIGN)
    return b"".join([_MAGIC, struct.pack("<I", len(header)), header, *parts])


def unpack_record(data: bytes, source: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(info, arrays) of an untrusted record; the arrays are read-only views of `data`.

    Args:
      data: the record.
      source: for messages.

    Raises:
      FileFormatError: not a record, truncated, or a header that promises what is not there.
    """
    if len(data) < 8 or data[:4] != _MAGIC:
        raise FileFormatError(f"{source} is not a record of a token store; tokenise again.")
    (size,) = struct.unpack("<I", data[4:8])
    if size > min(_MAX_HEADER, len(data) - 8):
        raise FileFormatError(f"{source} is truncated ({len(data)} bytes); copy the store again.")
    try:
        header = json.loads(data[8 : 8 + size])
        info, entries = header["info"], header["arrays"]
        if not isinstance(info, dict) or not isinstance(entries, dict):
            raise ValueError("info and arrays must be objects")
        arrays = {name: _view(data, 8 + size, *entry) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FileFormatError(f"{source} has a damaged header ({str(error)[:200]}); tokenise again.") from None
    return info, arrays


def _view(data: bytes, start: int, dtype: str, shape: list[int], offset: int) -> np.ndarray:
    whole = all(type(n) is int and 0 <= n < 1 << 40 for n in [*shape, offset])
    if dtype not in _DTYPES or not whole or len(shape) > 8:
        raise ValueError(f"an array of dtype {dtype!r} and shape {shape}")
    count = math.prod(shape)
    if start + offset + count * np.dtype(dtype).itemsize > len(data):
        raise ValueError(f"an array of shape {shape} ends behind the record")
    return np.frombuffer(data, dtype, count, start + offset).reshape(shape)
