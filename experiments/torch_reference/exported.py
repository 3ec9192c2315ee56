"""Weights that `experiments.export --format=torch` wrote, in a process without JAX."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

from torch import Tensor

from experiments.torch_reference.settings import from_fields


def load_exported(path: str | os.PathLike) -> tuple[dict[str, Tensor], SimpleNamespace]:
    """The state dict of a file, and its metadata.

    Returns:
      The tensors, and `kind` ("ar" or "decoder"), `step`, `config` (what the models of this folder take: `config.model`
      or `config.decoder`), `meta` (tokenizer, head and provenance). Names of an AR model begin with `transformer.` or
      `condition.`: see `part`.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        content = json.loads((file.metadata() or {})["pointillist_jax"])
    return state, from_fields(content)


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of one module ("transformer" or "condition") of an AR model, under that module's own names."""
    return {name.removeprefix(f"{prefix}."): x for name, x in state.items() if name.startswith(f"{prefix}.")}
