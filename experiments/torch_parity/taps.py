"""Torch modules looked at from outside: what their parts are given and what they give back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def tensors(tree: Any) -> Any:
    """Nested dicts and tuples of arrays → of tensors of the same dtype; integers become int64."""
    if isinstance(tree, Mapping):
        return {key: tensors(value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return tuple(tensors(value) for value in tree)
    if str(tree.dtype) == "bfloat16":
        return torch.tensor(np.asarray(tree, np.float32)).to(torch.bfloat16)
    array = np.asarray(tree)
    return torch.tensor(array.astype(np.int64) if array.dtype.kind in "iu" else array)


def load_arrays(module: nn.Module, state: Mapping[str, np.ndarray]) -> nn.Module:
    """Gives a module the arrays of a state dict (`convert.reference`), in their dtypes."""
    # Assigned, not copied: float64 stays float64.
    module.load_state_dict({name: torch.tensor(value) for name, value in state.items()}, assign=True)
    return module


def run_with(
    module: nn.Module,
    call: Callable[[], Any],
    inputs: Mapping[str, Tensor] | None = None,
    watched: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Calls `call`, which runs `module`, and returns what its named parts gave back.

    Args:
      inputs: name of a part → what it is to be given as its first argument in place of what it was given, so that its
        result says nothing about the parts before it. Its other arguments stay the module's own.
      watched: further parts, which run on what they are given.
    """
    found: dict[str, Tensor] = {}
    inputs = inputs or {}
    handles = []
    for name, part in module.named_modules():
        if name in inputs:
            handles.append(part.register_forward_pre_hook(lambda _, args, name=name: (inputs[name], *args[1:])))
        if name in inputs or name in watched:
            handles.append(part.register_forward_hook(lambda _, args, out, name=name: found.__setitem__(name, out)))
    if unknown := {*inputs, *watched} - {name for name, _ in module.named_modules()}:
        raise ValueError(f"no parts {sorted(unknown)}")
    try:
        with torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    return found
