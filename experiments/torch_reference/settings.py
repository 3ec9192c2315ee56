"""What the reference reads of a config, so that it also runs where `pointillist_jax` and JAX are not installed.

Any object with the fields of `pointillist_jax.configs` will do: those dataclasses themselves, or `from_fields` of what
`dataclasses.asdict` gave and a file kept. Properties that the dataclasses derive are derived here anew.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch


class Vocabulary(NamedTuple):
    """Ids of DESIGN §5: coordinates, then bindings, then S, E and P."""

    bins: int
    num_faces: int

    @property
    def bos(self) -> int:
        return self.bins + self.num_faces

    @property
    def eos(self) -> int:
        return self.bos + 1

    @property
    def pad(self) -> int:
        return self.bos + 2

    @property
    def padded_size(self) -> int:
        """Rows of the embedding table: all ids, up to a multiple of 512."""
        return (self.pad + 512) // 512 * 512

    @property
    def class_counts(self) -> tuple[int, int, int, int]:
        """Classes of the x (coordinates, then E), y, z and b slots."""
        return self.bins + 1, self.bins, self.bins, self.num_faces


def vocabulary(config: Any) -> Vocabulary:
    return Vocabulary(config.bins, config.num_faces)


def kv_heads(config: Any) -> int:
    return config.kv_heads or config.heads


def working_dtype(config: Any) -> torch.dtype:
    """Of products and activations."""
    return getattr(torch, config.dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of norms, softmax, angles and losses: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def from_fields(fields: Mapping[str, Any]) -> types.SimpleNamespace:
    """A config from the nested dict of its fields."""
    return types.SimpleNamespace(
        **{name: from_fields(value) if isinstance(value, Mapping) else value for name, value in fields.items()}
    )
