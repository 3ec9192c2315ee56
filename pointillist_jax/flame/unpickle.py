"""A restricted unpickler for FLAME `.pkl` files: it rebuilds arrays and runs nothing.

FLAME's releases are pickles, and a pickle can call any function. Here every name a pickle refers to is mapped to a
small data class of this file, so nothing of numpy, scipy, chumpy or the standard library is ever called by the
stream; the classes only record what they are given and are turned into plain NumPy arrays after the load. Anything
else raises `UnsafeFileError`. Old files need `latin1` strings and stand-ins for chumpy (facts/avatars_gsplat.md F).
"""

from __future__ import annotations

import io
import math
import pickle
import re
from typing import Any

import numpy as np

from pointillist_jax.files import FileFormatError, UnsafeFileError

# Kinds of plain data an array may hold; "O" (objects) stays a list of already rebuilt values.
_DTYPE = re.compile(r"[<>|=]?([biufSUcO]|bool|float|int|uint|complex)\d*")


def load_flame_pickle(data: bytes, source: str) -> dict[str, Any]:
    """Returns the pickle's dictionary with arrays as NumPy arrays, sparse matrices dense and bytes keys decoded.

    Args:
      data: the file's bytes.
      source: its path, for messages.

    Raises:
      UnsafeFileError: the pickle refers to something that is not array data; nothing of it was executed.
      FileFormatError: not a pickle, truncated, or not a dictionary.
    """
    try:
        content = _Unpickler(io.BytesIO(data), source).load()
        if not isinstance(content, dict):
            kind = type(content).__name__.strip("_")
            raise FileFormatError(f"{source} holds a {kind}, expected FLAME's dictionary; is this a FLAME model file?")
        return {_text(key): _plain(value, 0) for key, value in content.items()}
    except (UnsafeFileError, FileFormatError):
        raise
    except RecursionError:
        raise FileFormatError(f"{source} is nested too deeply for a FLAME file; download it again.") from None
    except Exception as error:  # A damaged stream can raise nearly anything inside the pickle machine.
        reason = str(error) or type(error).__name__
        raise FileFormatError(f"{source} is damaged or not a pickle ({reason}); download it again.") from None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, source: str):
        super().__init__(file, fix_imports=False, encoding="latin1")
        self._source = source

    def find_class(self, module: str, name: str) -> Any:
        if found := _NAMES.get((module, name)):
            return found
        root = module.partition(".")[0]
        if root == "numpy" and name in _NUMPY:
            return _NUMPY[name]
        if (
            root == "scipy"
            and module.startswith("scipy.sparse")
            and re.fullmatch(r"(csc|csr|coo)_(matrix|array)", name)
        ):
            return _SPARSE[name[:3]]
        if root == "chumpy":
            return _Select if name == "Select" else _Chumpy
        raise UnsafeFileError(
            f"{self._source} refers to {module}.{name}, which a FLAME model file never needs; "
            "nothing was executed: do not use this file, download FLAME from its own site."
        )

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafeFileError(f"{self._source} refers to data outside itself; nothing was executed: do not use it.")


class _Ndarray:
    """Stands for the class `numpy.ndarray` where a pickle passes it as an argument."""


class _Object:
    """Stands for `object` where old pickles pass it to `copy_reg._reconstructor`."""


class _Dtype:
    def __init__(self, code: Any = "", *_flags: Any):
        code = _text(code)
        if not isinstance(code, str) or not _DTYPE.fullmatch(code):
            raise ValueError(f"array of unexpected type {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        order = _text(state[1])
        if order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """An array while it is being rebuilt: numpy's `_reconstruct` makes it, its state fills it."""

    value: Any = None

    def __setstate__(self, state: tuple) -> None:
        _version, shape, dtype, fortran, raw = state
        self.value = _array(raw, dtype, shape, "F" if fortran else "C")


def _array(raw: Any, dtype: Any, shape: tuple, order: str) -> Any:
    shape = tuple(int(n) for n in shape)
    dtype = dtype.dtype if isinstance(dtype, _Dtype) else _Dtype(dtype).dtype
    if isinstance(raw, list):
        if dtype.kind != "O":
            raise ValueError("array whose data are a list")
        return raw[0] if shape == () and len(raw) == 1 else raw
    raw = raw.encode("latin1") if isinstance(raw, str) else bytes(raw)
    if dtype.kind == "O" or any(n < 0 for n in shape) or len(raw) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"array of shape {shape} with {len(raw)} bytes")
    return np.frombuffer(raw, dtype).reshape(shape, order=order)


def _reconstruct(_subtype: Any, _shape: Any = (0,), _code: Any = b"b") -> _Array:
    return _Array()


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: str = "C") -> _Array:
    array = _Array()
    array.value = _array(raw, dtype, shape if isinstance(shape, (tuple, list)) else (shape,), _text(order))
    return array


def _scalar(dtype: Any, raw: Any = b"") -> _Array:
    return _frombuffer(raw, dtype, ())


def _encode(text: str, _encoding: str = "latin1") -> bytes:
    # Python 3 writes bytes at protocol 2 as `_codecs.encode(text, "latin1")`.
    return text.encode("latin1")


def _bytes(*args: Any) -> bytes:
    # Protocols below 3 write empty bytes as `bytes()`, those below 5 write bytearrays as a call with text and encoding.
    if args and not isinstance(args[0], (str, bytes)):
        raise ValueError("bytes made from something that is not text")
    return b"" if not args else args[0] if isinstance(args[0], bytes) else args[0].encode("latin1")


def _reconstructor(cls: Any, _base: Any = None, _state: Any = None) -> Any:
    if cls not in (_Chumpy, _Select, *_SPARSE.values()):
        raise ValueError("object of unexpected class")
    return cls()


class _Stateful:
    """Keeps the attributes a pickle sets on an object; subclasses say what array they stand for."""

    def __init__(self, *_args: Any):
        self.state: dict[str, Any] = {}

    def __new__(cls, *_args: Any):
        made = super().__new__(cls)
        made.state = {}
        return made

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.state.update({_text(k): v for k, v in part.items()})

    def get(self, key: str, depth: int) -> Any:
        if key not in self.state:
            raise ValueError(f"{type(self).__name__.strip('_').lower()} object without {key}")
        return _plain(self.state[key], depth)


class _Chumpy(_Stateful):
    """Any chumpy class: the value of a plain `chumpy.ch.Ch` lies under `x`; expressions have none and are refused."""

    def array(self, depth: int) -> np.ndarray:
        return np.asarray(self.get("x", depth))


class _Select(_Stateful):
    """`chumpy.reordering.Select`: elements `idxs` of the flattened `a`, reshaped to `preferred_shape`."""

    def array(self, depth: int) -> np.ndarray:
        picked = np.asarray(self.get("a", depth)).ravel()[np.asarray(self.get("idxs", depth), np.int64)]
        shape = _plain(self.state.get("preferred_shape"), depth)
        return picked if shape is None else picked.reshape([int(n) for n in shape])


class _Sparse(_Stateful):
    def dense(self, rows: np.ndarray, cols: np.ndarray, depth: int) -> np.ndarray:
        shape = tuple(int(n) for n in (self.state.get("_shape") or self.state.get("shape") or ()))
        data = np.asarray(self.get("data", depth), np.float64)
        # FLAME's regressor is (5, 5023): anything near this bound is not one.
        if len(shape) != 2 or min(shape) < 0 or math.prod(shape) > 1 << 26:
            raise ValueError(f"sparse matrix of shape {shape}")
        if not (len(rows) == len(cols) == len(data)):
            raise ValueError("sparse matrix with index and data of different lengths")
        for name, index, n in (("row", rows, shape[0]), ("column", cols, shape[1])):
            if len(index) and not 0 <= index.min() <= index.max() < n:
                raise ValueError(f"sparse matrix with a {name} index outside {shape}")
        out = np.zeros(shape)
        np.add.at(out, (rows, cols), data)
        return out

    def compressed(self, depth: int) -> tuple[np.ndarray, np.ndarray]:
        indptr = np.asarray(self.get("indptr", depth), np.int64)
        indices = np.asarray(self.get("indices", depth), np.int64)
        counts = np.diff(indptr)
        if (counts < 0).any() or counts.sum() != len(indices):
            raise ValueError("sparse matrix with a damaged index")
        return np.repeat(np.arange(len(counts)), counts), indices


class _Csc(_Sparse):
    def array(self, depth: int) -> np.ndarray:
        cols, rows = self.compressed(depth)
        return self.dense(rows, cols, depth)


class _Csr(_Sparse):
    def array(self, depth: int) -> np.ndarray:
        rows, cols = self.compressed(depth)
        return self.dense(rows, cols, depth)


class _Coo(_Sparse):
    def array(self, depth: int) -> np.ndarray:
        if "coords" in self.state:
            rows, cols = self.get("coords", depth)
        else:
            rows, cols = self.get("row", depth), self.get("col", depth)
        return self.dense(np.asarray(rows, np.int64), np.asarray(cols, np.int64), depth)


_SPARSE = {"csc": _Csc, "csr": _Csr, "coo": _Coo}
_NUMPY = {
    "_reconstruct": _reconstruct,
    "_frombuffer": _frombuffer,
    "scalar": _scalar,
    "ndarray": _Ndarray,
    "dtype": _Dtype,
}
_NAMES = {
    ("copy_reg", "_reconstructor"): _reconstructor,
    ("copyreg", "_reconstructor"): _reconstructor,
    ("__builtin__", "object"): _Object,
    ("builtins", "object"): _Object,
    # Bookkeeping of chumpy objects: sets of names, never values.
    ("__builtin__", "set"): set,
    ("builtins", "set"): set,
    **{(module, name): _bytes for module in ("__builtin__", "builtins") for name in ("bytes", "bytearray")},
    ("_codecs", "encode"): _encode,
}


def _text(value: Any) -> Any:
    return value.decode("latin1") if isinstance(value, bytes) else value


def _plain(value: Any, depth: int) -> Any:
    """Turns the recorded objects into NumPy arrays, lists, dicts, strings and numbers."""
    if depth > 32:
        raise ValueError("nested too deeply")
    if isinstance(value, _Array):
        return _plain(value.value, depth + 1)
    if isinstance(value, (_Chumpy, _Select, _Sparse)):
        return value.array(depth + 1)
    if isinstance(value, dict):
        return {_text(k): _plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, depth + 1) for v in value]
    return _text(value)
