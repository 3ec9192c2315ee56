"""What the converters share: a PyTorch state dict, checked name by name against what a model has (DESIGN §13)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from pointillist_jax.convert.torch_files import as_numpy
from pointillist_jax.files import FileFormatError, UserError

_NAMED = 8  # Keys of each kind that one sentence names; the rest are counted.


def require_mapping(state: Any, what: str) -> Mapping[str, Any]:
    """`state` itself; raises UserError unless it maps names to tensors."""
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise UserError(
            f"{what} is converted from a state dict, name → tensor, not from a {type(state).__name__}: pass "
            "load_torch_file(path) or module.state_dict()."
        )
    if bare := [name for name, value in state.items() if not hasattr(value, "shape")]:
        raise UserError(f"the state dict of {what} holds {_list(bare)}, no tensor; pass the state dict inside it.")
    return state


def check_state(
    what: str,
    state: Mapping[str, Any],
    expected: Mapping[str, tuple[int, ...]],
    ignored: Iterable[str] = (),
    kind: str = "the state dict",
) -> None:
    """Raises FileFormatError that names every missing, unexpected and mis-shaped key in one sentence.

    Args:
      what: the model, for the message.
      expected: shape of each key that must be there.
      ignored: keys that may be there.
      kind: of container, for the message.
    """
    missing = [name for name in expected if name not in state]
    unexpected = sorted(set(state) - set(expected) - set(ignored))
    shaped = [
        f"{name} of shape {tuple(state[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    kinds = {"lacks": missing, "has unexpected": unexpected, "holds": shaped}
    if problems := [f"{verb} {_list(names)}" for verb, names in kinds.items() if names]:
        raise FileFormatError(f"{kind} of {what} {'; '.join(problems)}: is it a checkpoint of another model?")


class Tensors:
    """Arrays of a checked state dict: finite, and all of one dtype."""

    def __init__(self, what: str, state: Mapping[str, Any], dtype: Any):
        self._what, self._state, self._dtype = what, state, np.dtype(dtype)

    def __call__(self, *names: str) -> np.ndarray:
        """The array under a name, or those under several joined on their first axis. Raises FileFormatError for NaN."""
        arrays = []
        for name in names:
            array = as_numpy(name, self._state[name], f"the state dict of {self._what}").astype(self._dtype)
            if bad := int((~np.isfinite(array)).sum()):
                raise FileFormatError(f"{name} of {self._what} holds {bad} NaN or infinite values; download it again.")
            arrays.append(array)
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def norm(self, name: str) -> dict[str, np.ndarray]:
        return {"scale": self(f"{name}.weight"), "bias": self(f"{name}.bias")}

    def linear(self, *names: str) -> dict[str, np.ndarray]:
        """PyTorch keeps [out, in]; joined layers of several names have their outputs side by side."""
        kernel, bias = (self(*(f"{name}.{part}" for name in names)) for part in ("weight", "bias"))
        return {"kernel": kernel.T, "bias": bias}


def stack(layers: int, read: Callable[[int], Any]) -> Any:
    """`read(layer)` of every layer, a nested dict of arrays → one, whose arrays are stacked on a first axis.

    Written into place, so that two copies of a large model never exist.
    """
    stacked: Any = None
    for i in range(layers):
        layer = read(i)
        if stacked is None:
            stacked = _map(lambda x: np.empty((layers, *x.shape), x.dtype), layer)
        _map(lambda to, x, i=i: to.__setitem__(i, x), stacked, layer)
    return stacked


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(name[:120] for name in names[:_NAMED]) + more


def _map(function: Callable, *trees: Any) -> Any:
    if isinstance(trees[0], dict):
        return {key: _map(function, *(tree[key] for tree in trees)) for key in trees[0]}
    return function(*trees)
