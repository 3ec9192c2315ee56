"""A restricted reader of pickled arrays, such as FLAME's `.pkl`: it rebuilds arrays and runs nothing.

FLAME's releases and trackers' outputs are pickles, and a pickle can call any function. Here the stream is first scanned
without being executed (number of operations, size of integers). Then it is loaded with every name it refers to replaced
by an inert record, which only remembers the arguments and the state it is given. Afterwards the few keys a head needs
are turned into plain NumPy arrays, by code that looks at the records and checks every size. Nothing of numpy, scipy,
chumpy or the standard library is ever called by the stream. Old files need `latin1` strings and chumpy objects (facts
F).
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from pointillist_jax.files import FileFormatError, UnsafeFileError

# A FLAME file takes some 500 pickle operations; deep nesting and long loops of a hostile one end here.
_MAX_OPERATIONS = 20_000
_MAX_SPARSE_CELLS = 1 << 26
_DTYPE = re.compile(r"[<>|=]?(?:[biufS]\d*|bool|float\d+|u?int\d+)")


def load_flame_pickle(data: bytes, source: str, keys: Iterable[str]) -> dict[str, np.ndarray]:
    """Returns the arrays under `keys` of a FLAME model's pickle: `load_pickled_arrays`, with sentences about FLAME."""
    return load_pickled_arrays(data, source, keys, what="a FLAME model file", again="download it from its own site")


def load_pickled_arrays(
    data: bytes, source: str, keys: Iterable[str], *, optional: Iterable[str] = (), what: str, again: str
) -> dict[str, np.ndarray]:
    """Returns the arrays under `keys` of a pickled dictionary; other keys are not even looked at.

    Args:
      data: the pickle's bytes.
      source: the file's path, for messages.
      keys: what to read. Sparse matrices become dense, chumpy objects their values. A key with a slash, "a/b", may
        also be "b" of a dictionary "a".
      optional: further keys, which may be absent.
      what: the file should be, and how to get it anew (`again`), for messages.

    Raises:
      UnsafeFileError: the pickle refers to something that is not array data; nothing of it was executed.
      FileFormatError: not a pickle, truncated, not a dictionary, a key is missing or not an array.
    """
    try:
        _scan(data)
        content = _Unpickler(io.BytesIO(data), source, what, again).load()
    except FileFormatError:
        raise
    except Exception as error:  # A damaged stream can raise nearly anything inside the pickle machine.
        reason = str(error)[:200] or type(error).__name__
        raise FileFormatError(f"{source} is damaged or not a pickle ({reason}); {again}.") from None
    if type(content) is not dict:
        kind = type(content).__name__.strip("_")
        raise FileFormatError(f"{source} holds a {kind}, expected a dictionary of arrays; is this {what}?")
    named = _named(content)
    arrays = {}
    for key, needed in (*((key, True) for key in keys), *((key, False) for key in optional)):
        if key not in named:
            if not needed:
                continue
            found = ", ".join(name[:40] for name in sorted(named)[:20]) or "no names"
            raise FileFormatError(f"{source}: key {key} is missing (found: {found}); is this {what}?")
        try:
            arrays[key] = _array(named[key])
        except Exception as error:  # Whatever a hostile record makes NumPy say.
            reason = str(error)[:200] or type(error).__name__
            raise FileFormatError(f"{source}: {key} is not an array ({reason}); {again}.") from None
    return arrays


def _named(content: dict) -> dict[str, Any]:
    """Name → value; the values of a dictionary inside as "name/inner name"."""
    named = {_text(key): value for key, value in content.items() if isinstance(key, (str, bytes))}
    for name, value in list(named.items()):
        if type(value) is dict:
            inner = {_text(key): v for key, v in value.items() if isinstance(key, (str, bytes))}
            named |= {f"{name}/{key}": v for key, v in inner.items() if f"{name}/{key}" not in named}
    return named


def _scan(data: bytes) -> None:
    """Walks through the stream without executing it, and refuses what no FLAME file holds."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if count >= _MAX_OPERATIONS:
            raise ValueError(f"more than {_MAX_OPERATIONS} operations")
        if isinstance(argument, int) and not -(1 << 63) <= argument < 1 << 64:
            raise ValueError("an integer of more than 64 bits")
        # The C unpickler allocates its memo as large as the largest index.
        if "PUT" in opcode.name and int(argument) > _MAX_OPERATIONS:
            raise ValueError("a memo index out of range")


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, source: str, what: str, again: str):
        super().__init__(file, fix_imports=False, encoding="latin1")
        self._source, self._what, self._again = source, what, again

    def find_class(self, module: str, name: str) -> Any:
        root, record = module.partition(".")[0], _NAMES.get((module, name))
        if root == "numpy":
            record = _NUMPY.get(name)
        elif root == "scipy" and module.startswith("scipy.sparse"):
            sparse = re.fullmatch(r"(csc|csr|coo|bsr|dia|dok|lil)_(matrix|array)", name)
            record = _SPARSE.get(name[:3], _Opaque) if sparse else None
        elif root == "chumpy":
            record = _Select if name == "Select" else _Chumpy
        if record is None:
            raise UnsafeFileError(
                f"{self._source} refers to {module[:60]}.{name[:60]}, which {self._what} never needs; "
                f"nothing was executed: do not use this file, {self._again}."
            )
        return record

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafeFileError(f"{self._source} refers to data outside itself; nothing was executed: do not use it.")


class _Inert(type):
    """Classes that a stream cannot change: BUILD on a class would otherwise set its attributes for every later load."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise TypeError("a record cannot be altered")

    __delattr__ = __setattr__


class _Record(metaclass=_Inert):
    """What a stream makes of a name: its arguments and its state, remembered and not interpreted.

    No `__dict__`: an attribute such as `__array_interface__` on a record would make NumPy read any address.
    """

    __slots__ = ("args", "state")

    def __new__(cls, *args: Any) -> _Record:
        made = super().__new__(cls)
        object.__setattr__(made, "args", args)
        object.__setattr__(made, "state", None)
        return made

    def __init__(self, *args: Any):
        pass

    def __setattr__(self, name: str, value: Any) -> None:
        raise TypeError("a record cannot be altered")

    def __setstate__(self, state: Any) -> None:
        object.__setattr__(self, "state", state)

    # Containers such as OrderedDict are filled after they are made; their contents are never needed.
    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute out of the recorded state, which is a dictionary or a pair that holds one."""
        for part in self.state if type(self.state) is tuple else (self.state,):
            if type(part) is dict:
                for key in (name, name.encode()):
                    if key in part:
                        return part[key]
        return default


class _Opaque(_Record):
    """Something harmless that no head needs, such as an OrderedDict under an extra key."""

    __slots__ = ()


class _Ndarray(_Record):
    """The class `numpy.ndarray`, only ever an argument."""

    __slots__ = ()


class _Dtype(_Record):
    __slots__ = ()


class _Encode(_Record):
    """`_codecs.encode(text, "latin1")` and `bytes(…)`: how old protocols write bytes."""

    __slots__ = ()


class _Reconstruct(_Record):
    """`numpy.…._reconstruct`: makes an array, which its state (version, shape, dtype, fortran, bytes) then fills."""

    __slots__ = ()


class _FromBuffer(_Record):
    """`numpy.…._frombuffer(bytes, dtype, shape, order)`, of protocol 5."""

    __slots__ = ()


class _Scalar(_Record):
    __slots__ = ()


class _Reconstructor(_Record):
    """`copy_reg._reconstructor(cls, object, None)`: an object of an old protocol, which its state then fills."""

    __slots__ = ()


class _Chumpy(_Record):
    """Any chumpy class: the value of a plain `chumpy.ch.Ch` lies under `x`; expressions have none and are refused."""

    __slots__ = ()


class _Select(_Record):
    """`chumpy.reordering.Select`: elements `idxs` of the flattened `a`, reshaped to `preferred_shape`."""

    __slots__ = ()


class _Csc(_Record):
    __slots__ = ()


class _Csr(_Record):
    __slots__ = ()


class _Coo(_Record):
    __slots__ = ()


_SPARSE = {"csc": _Csc, "csr": _Csr, "coo": _Coo}
_NUMPY = {
    "_reconstruct": _Reconstruct,
    "_frombuffer": _FromBuffer,
    "scalar": _Scalar,
    "ndarray": _Ndarray,
    "dtype": _Dtype,
    "matrix": _Opaque,
}
_NAMES = {
    ("copy_reg", "_reconstructor"): _Reconstructor,
    ("copyreg", "_reconstructor"): _Reconstructor,
    ("collections", "OrderedDict"): _Opaque,
    ("_codecs", "encode"): _Encode,
    **{
        (module, name): record
        for module in ("__builtin__", "builtins")
        for name, record in {
            "bytes": _Encode,
            "bytearray": _Encode,
            **dict.fromkeys(("object", "set", "frozenset", "complex", "slice"), _Opaque),
        }.items()
    },
}


def _array(value: Any, depth: int = 0) -> np.ndarray:
    """The array a record stands for. Every branch checks what it is given: records hold whatever the stream said."""
    if depth > 8:
        raise ValueError("nested too deeply")
    kind, args = type(value), value.args if isinstance(value, _Record) else ()
    if kind is _Reconstructor and args and isinstance(args[0], type) and issubclass(args[0], _Record):
        kind = args[0]
    if kind is _Reconstruct and type(value.state) is tuple and len(value.state) == 5:
        _version, shape, dtype, fortran, raw = value.state
        if type(raw) is list and shape == () and len(raw) == 1:
            return _array(raw[0], depth + 1)  # A sparse matrix inside an array of objects.
        return _filled(raw, dtype, shape, "F" if fortran is True or fortran == 1 else "C")
    if kind is _FromBuffer and len(args) in (3, 4):
        raw, dtype, shape = args[:3]
        order = _text(args[3]) if len(args) == 4 else "C"
        return _filled(raw, dtype, shape, "F" if order == "F" else "C")
    if kind is _Scalar and len(args) == 2:
        return _filled(args[1], args[0], (), "C")
    if kind is _Chumpy:
        return _array(value.attribute("x"), depth + 1)
    if kind is _Select:
        picked = _array(value.attribute("a"), depth + 1).ravel()[_indices(value, "idxs", depth)]
        shape = value.attribute("preferred_shape")
        return picked if shape is None else picked.reshape(_shape(shape))
    if kind in (_Csc, _Csr, _Coo):
        return _dense(value, kind, depth)
    raise ValueError(f"it is a {kind.__name__.strip('_').lower()}")


def _filled(raw: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    shape, dtype, raw = _shape(shape), _dtype(dtype), _raw(raw)
    if len(raw) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(raw)} bytes for shape {shape}")
    return np.frombuffer(raw, dtype).reshape(shape, order=order)


def _shape(value: Any) -> tuple[int, ...]:
    if type(value) is int:
        value = (value,)
    if type(value) not in (tuple, list) or len(value) > 4 or any(type(n) is not int for n in value):
        raise ValueError("a shape that is no tuple of integers")
    if any(not 0 <= n < 1 << 31 for n in value):
        raise ValueError(f"shape {tuple(value)}")
    return tuple(value)


def _dtype(value: Any) -> np.dtype:
    if type(value) is not _Dtype or not value.args:
        raise ValueError("an array without a type")
    code = _text(value.args[0])
    if type(code) is not str or not _DTYPE.fullmatch(code):
        raise ValueError(f"an array of unexpected type {str(code)[:20]!r}")
    dtype = np.dtype(code)
    order = _text(value.state[1]) if type(value.state) is tuple and len(value.state) > 1 else None
    return dtype.newbyteorder(order) if order in ("<", ">") else dtype


def _raw(value: Any) -> bytes:
    if type(value) is _Encode:
        value = value.args[0] if value.args else b""
    if type(value) is str:
        return value.encode("latin1")
    if type(value) not in (bytes, bytearray):
        raise ValueError("an array without bytes")
    return bytes(value)


def _dense(value: _Record, kind: type, depth: int) -> np.ndarray:
    shape = value.attribute("_shape")
    shape = _shape(value.attribute("shape") if shape is None else shape)
    if len(shape) != 2 or math.prod(shape) > _MAX_SPARSE_CELLS:
        raise ValueError(f"a sparse matrix of shape {shape}")
    data = _numbers(_array(value.attribute("data"), depth + 1))
    if kind is _Coo:
        coords = value.attribute("coords")
        pair = coords if type(coords) in (tuple, list) else (value.attribute("row"), value.attribute("col"))
        rows, cols = (_numbers(_array(x, depth + 1)).astype(np.int64) for x in pair)
    else:
        counts = np.diff(_indices(value, "indptr", depth))
        inner = _indices(value, "indices", depth)
        if (counts < 0).any() or counts.sum() != len(inner) or len(counts) > max(shape):
            raise ValueError("a sparse matrix with a damaged index")
        outer = np.repeat(np.arange(len(counts)), counts)
        rows, cols = (inner, outer) if kind is _Csc else (outer, inner)
    if not rows.shape == cols.shape == data.shape or data.ndim != 1:
        raise ValueError("a sparse matrix with indices and data of different lengths")
    for index, n in ((rows, shape[0]), (cols, shape[1])):
        if index.size and not 0 <= index.min() <= index.max() < n:
            raise ValueError(f"a sparse matrix with an index outside {shape}")
    out = np.zeros(shape)
    np.add.at(out, (rows, cols), data)
    return out


def _indices(value: _Record, name: str, depth: int) -> np.ndarray:
    return _numbers(_array(value.attribute(name), depth + 1)).astype(np.int64).ravel()


def _numbers(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "iuf":
        raise ValueError(f"numbers of type {array.dtype}")
    return array


def _text(value: Any) -> Any:
    return value.decode("latin1") if type(value) is bytes else value
