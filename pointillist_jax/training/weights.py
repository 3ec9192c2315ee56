"""Trained weights as one small file: what is passed on, and what this package ships (`pretrained/`).

A `.npz` with the parameters in half precision and one JSON string, the `card`: step, meta of the run (config, token
store, provenance) and the name and shape of every parameter. Untrusted like any file: the card is checked, then exactly
the arrays it names are read (`files.read_npz`). `load_params` reads such a file wherever it reads a workdir.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from pointillist_jax.files import ArraySpec, FileFormatError, UserError, read_npz, write_npz

_CARD = "card"
_WHAT = "a file of weights"
_FORMAT = "pointillist_jax weights"
# Far more than any preset here needs; a card that asks for more is damaged.
_MAX_PARAMETERS = 10_000


def save_weights(path: str | os.PathLike, params: Any, meta: Mapping[str, Any], step: int) -> None:
    """Writes nested dicts of arrays in half precision.

    Args:
      path: ends in .npz; written atomically, the same bytes for the same parameters.
      params: as `checkpoints.load_params` gives them.
      meta: JSON, as the run's checkpoints hold it. step: of the checkpoint.

    Raises:
      UserError: another suffix, or parameters that half precision cannot hold.
    """
    if not os.fspath(path).endswith(".npz"):
        raise UserError(f"{path}: weights are written as .npz; name such a file.")
    flat = _flatten(params)
    half = {}
    for name, value in flat.items():
        with np.errstate(over="ignore"):
            half[name] = np.asarray(value, np.float16)
        if not np.isfinite(half[name]).all():
            raise UserError(f"{name} has values beyond 65504, the largest half-precision number: keep the checkpoint.")
    card = {"format": _FORMAT, "step": int(step), "meta": meta, "shapes": {k: list(v.shape) for k, v in half.items()}}
    write_npz(path, {_CARD: np.array([json.dumps(card, sort_keys=True)]), **half})


def load_weights(path: str | os.PathLike) -> tuple[Any, dict[str, Any], int]:
    """(parameters as nested dicts of float32, meta, step) of what `save_weights` wrote.

    Raises:
      FileNotFoundError: no such file.
      FileFormatError: damaged, or another kind of .npz.
    """
    text = read_npz(path, {_CARD: ArraySpec((1,), "str")}, _WHAT)[_CARD][0]
    try:
        card = json.loads(str(text))
        if card["format"] != _FORMAT:
            raise ValueError(f"its format is {card['format']!r}")
        step, meta, shapes = card["step"], card["meta"], card["shapes"]
        if type(step) is not int or step < 0 or not isinstance(meta, dict) or len(shapes) > _MAX_PARAMETERS:
            raise ValueError("step or meta are none")
        specs = {name: ArraySpec(tuple(int(n) for n in shape)) for name, shape in shapes.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileFormatError(f"{path} is not {_WHAT} of this program ({error!s:.200}); copy it again.") from None
    arrays = read_npz(path, specs, _WHAT)
    return _unflatten(str(path), {name: value.astype(np.float32) for name, value in arrays.items()}), meta, step


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key in sorted(tree):
        if not key or "." in key:
            raise UserError(f"a parameter is named {key!r}, which a file of weights cannot hold.")
        flat |= _flatten(tree[key], f"{prefix}.{key}" if prefix else key)
    return flat


def _unflatten(path: str, flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise FileFormatError(f"{path}: {name} lies below another parameter; copy the file again.")
        if last in node:
            raise FileFormatError(f"{path}: {name} lies above another parameter; copy the file again.")
        node[last] = value
    return tree
