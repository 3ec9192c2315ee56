"""Types inside `jax.shard_map`: which mesh axes a value varies over. Outside of it every function here does nothing.

With `check_vma=True` a loop's initial state must vary over the axes its later states do, and only then are gradients of
replicated parameters summed over the devices (without the check they silently are not; facts D.3).
"""

from __future__ import annotations

from typing import Any

import jax


def axes_of(tree: Any) -> frozenset:
    """Mesh axes that any leaf of `tree` varies over."""
    return frozenset().union(*(_axes(leaf) for leaf in jax.tree.leaves(tree)))


def vary(tree: Any, axes: frozenset) -> Any:
    """Marks every leaf as varying over (at least) `axes`. The transpose of this mark is the sum over those axes."""

    def mark(leaf):
        missing = tuple(sorted(axes - _axes(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, tree) if axes else tree


def _axes(leaf: Any) -> frozenset:
    kind = jax.typeof(leaf)
    # The attribute has moved between JAX versions: `.manual_axis_type.varying` (0.10), `.vma` (before).
    if hasattr(kind, "manual_axis_type"):
        return kind.manual_axis_type.varying
    return getattr(kind, "vma", frozenset())
