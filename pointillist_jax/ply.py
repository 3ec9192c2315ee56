"""Vertices out of untrusted binary PLY files: Gaussians, and meshes of trackers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from pointillist_jax.files import FileFormatError

_PLY_TYPES = {
    **dict.fromkeys(("char", "int8"), "i1"),
    **dict.fromkeys(("uchar", "uint8"), "u1"),
    **dict.fromkeys(("short", "int16"), "i2"),
    **dict.fromkeys(("ushort", "uint16"), "u2"),
    **dict.fromkeys(("int", "int32"), "i4"),
    **dict.fromkeys(("uint", "uint32"), "u4"),
    **dict.fromkeys(("float", "float32"), "f4"),
    **dict.fromkeys(("double", "float64"), "f8"),
}
_PLY_ORDERS = {"binary_little_endian": "<", "binary_big_endian": ">"}
_MAX_HEADER = 1 << 16


def read_ply_vertices(path: Path) -> dict[str, np.ndarray]:
    """Columns of a binary PLY's `vertex` element, each [N], after the header's promises are checked against its size.

    Raises:
      FileFormatError: as `check_ply`.
    """
    count, dtype, offset = check_ply(path)
    rows = np.fromfile(path, dtype, count, offset=offset)
    return {name: rows[name] for name in dtype.names or ()}


def check_ply(path: Path) -> tuple[int, np.dtype, int]:
    """Reads the header of a binary PLY alone, and checks its promises against the file's size.

    Returns:
      Number of vertices, the dtype of one, and the byte where the first begins.

    Raises:
      FileFormatError: no PLY, an ASCII one, truncated, oversized, lists among the vertices' properties.
    """
    with open(path, "rb") as file:
        head = file.read(_MAX_HEADER)
        end = re.search(rb"\r?\nend_header\r?\n", head)
        if not re.match(rb"ply\r?\n", head) or end is None:
            raise FileFormatError(f"{path} is not a PLY file (no ply … end_header); check the path.")
        # Not splitlines: in latin1 it also splits at bytes that UTF-8 comments are made of.
        lines = [line.rstrip("\r") for line in head[: end.start()].decode("latin1").split("\n")[1:]]
        order, elements = _parse_header(path, lines)
        if "vertex" not in elements:
            raise FileFormatError(f"{path}: no vertex element, found: {', '.join(elements) or 'none'}.")
        names = list(elements)
        offset = end.end()
        # Only fixed-size elements may stand before the vertices, because their bytes have to be skipped.
        for name in names[: names.index("vertex")]:
            count, dtype = _row_type(path, name, elements[name], order)
            offset += count * dtype.itemsize
        count, dtype = _row_type(path, "vertex", elements["vertex"], order)
        needed, size = offset + count * dtype.itemsize, path.stat().st_size
        if needed > size:
            raise FileFormatError(
                f"{path} is truncated: the header promises {count} points ({needed} bytes), the file has {size}; "
                "copy it again."
            )
        if needed < size and names[-1] == "vertex":
            raise FileFormatError(
                f"{path} is oversized: {count} points need {needed} bytes, the file has {size}; the header's count "
                "is wrong or something was appended: write it again."
            )
    return count, dtype, offset


def ply_matrix(path: Path, columns: dict[str, np.ndarray], names: list[str], what: str) -> np.ndarray:
    """[N, len(names)] float32 of the named columns, all there and all finite.

    Args:
      path: for messages. columns: from `read_ply_vertices`.
      what: was expected, for messages: "is this <what>?"

    Raises:
      FileFormatError: a column is missing, or holds NaN or infinity.
    """
    if missing := [name for name in names if name not in columns]:
        raise FileFormatError(
            f"{path}: property {missing[0]} is missing (found: {', '.join(list(columns)[:20])}); is this {what}?"
        )
    num = len(next(iter(columns.values())))
    out = np.empty((num, len(names)), np.float32)
    for i, name in enumerate(names):
        with np.errstate(over="ignore"):
            out[:, i] = columns[name]
        if bad := int((~np.isfinite(out[:, i])).sum()):
            raise FileFormatError(f"{path}: {name} is NaN or infinite for {bad} points; remove them and save again.")
    return out


def _parse_header(path: Path, lines: list[str]) -> tuple[str, dict[str, list[list[str]]]]:
    order, elements, current = "", {}, None
    for line in lines:
        words = line.split()
        match words:
            case [] | ["comment" | "obj_info", *_]:
                continue
            case ["format", name, _] if name in _PLY_ORDERS:
                order = _PLY_ORDERS[name]
            case ["format", *_]:
                raise FileFormatError(f"{path}: {line!r}; only binary PLY is read: save it as binary_little_endian.")
            case ["element", name, count] if re.fullmatch("[0-9]{1,15}", count) and name not in elements:
                current = elements[name] = [["count", count]]
            case ["property", *rest] if current is not None and len(rest) >= 2:
                current.append(rest)
            case _:
                raise FileFormatError(f"{path}: header line {line[:80]!r} is no PLY; the file is damaged.")
    if not order:
        raise FileFormatError(f"{path}: the header has no format line; the file is damaged.")
    return order, elements


def _row_type(path: Path, element: str, rows: list[list[str]], order: str) -> tuple[int, np.dtype]:
    fields = []
    for kind, *name in rows[1:]:
        if kind not in _PLY_TYPES or len(name) != 1:
            raise FileFormatError(
                f"{path}: property {kind} {' '.join(name)} of {element} is not a number; save it without."
            )
        fields.append((name[0], order + _PLY_TYPES[kind]))
    if not fields:
        raise FileFormatError(f"{path}: element {element} has no properties; the file is damaged.")
    if len({name for name, _ in fields}) != len(fields):
        raise FileFormatError(f"{path}: a property of {element} is named twice; write the file again.")
    return int(rows[0][1]), np.dtype(fields)
