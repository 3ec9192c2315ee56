"""Pickles as older FLAME releases wrote them: chumpy objects, and Python 2's byte strings."""

from __future__ import annotations

import pickle
import struct
import sys
import types

import numpy as np
import scipy.sparse


def chumpy_dumps(content: dict, chumpy_keys: tuple[str, ...]) -> bytes:
    """As `pickle.dumps`, with some arrays inside chumpy objects (FLAME 2017–2020 releases). Needs no chumpy."""
    ch, reordering = types.ModuleType("chumpy.ch"), types.ModuleType("chumpy.reordering")
    ch.Ch = type("Ch", (), {"__module__": "chumpy.ch"})
    reordering.Select = type("Select", (), {"__module__": "chumpy.reordering"})
    modules = {"chumpy": types.ModuleType("chumpy"), "chumpy.ch": ch, "chumpy.reordering": reordering}
    sys.modules.update(modules)
    try:
        wrapped = dict(content)
        for i, key in enumerate(chumpy_keys):
            plain = ch.Ch()
            plain.x, plain._dirty_vars, plain._itr = content[key], {"x"}, None
            wrapped[key] = plain
            if i % 2:  # A selection out of a longer flat vector, as the body models of the time have.
                flat = np.concatenate([np.full(3, 7.0), content[key].ravel()])
                plain.x = flat
                picked = reordering.Select()
                picked.a, picked.idxs, picked.preferred_shape = plain, np.arange(3, len(flat)), content[key].shape
                wrapped[key] = picked
        return pickle.dumps(wrapped, protocol=2)
    finally:
        for name in modules:
            del sys.modules[name]


def python2_dumps(content: dict) -> bytes:
    """The bytes Python 2's cPickle wrote (protocol 2, byte strings), for a dict of arrays, csc matrices and strings."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    def glob(module: str, name: str) -> bytes:
        return f"c{module}\n{name}\n".encode()

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    def array(value: np.ndarray) -> bytes:
        code = value.dtype.str[1:].encode()
        shape = b"(" + b"".join(integer(n) for n in value.shape) + b"t"
        head = glob("numpy.core.multiarray", "_reconstruct") + b"(" + glob("numpy", "ndarray")
        head += b"(" + integer(0) + b"t" + text(b"b") + b"tR"
        dtype = glob("numpy", "dtype") + b"(" + text(code) + integer(0) + integer(1) + b"tR"
        dtype += b"(" + integer(3) + text(b"<") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
        return head + b"(" + integer(1) + shape + dtype + b"\x89" + text(value.tobytes()) + b"tb"

    def csc(value: scipy.sparse.csc_matrix) -> bytes:
        state = {"data": value.data, "indices": value.indices, "indptr": value.indptr}
        items = b"".join(text(k.encode()) + array(v) for k, v in state.items())
        items += text(b"_shape") + b"(" + b"".join(integer(n) for n in value.shape) + b"t"
        return glob("scipy.sparse.csc", "csc_matrix") + b")\x81}(" + items + b"ub"

    body = b""
    for key, value in content.items():
        body += text(key.encode())
        if isinstance(value, str):
            body += text(value.encode())
        else:
            body += csc(value) if scipy.sparse.issparse(value) else array(np.ascontiguousarray(value))
    return b"\x80\x02}(" + body + b"u."
