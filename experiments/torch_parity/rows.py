"""One measure of error for everything that is compared, and the bounds it is held to.

The relative error of an array is the largest difference over the largest value expected: entries near zero are sums
of large ones that cancel, and a ratio entry by entry would measure that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

# float64 and float32: the bounds this project promises (measured errors lie a factor of ten and more below).
# bfloat16 keeps 8 bits, so one rounding is up to 2^-9 = 0.2 % of a value. The two programs round in different places
# (products are accumulated in blocks of different sizes, XLA keeps what it fuses in float32): a block rounds its
# inputs, products, softmax weights and output, half a dozen times with errors that partly cancel, hence 2 %; a whole
# model stacks blocks on a residual stream, hence 5 %; gradients pass through it twice, hence 15 % of the largest entry.
TOLERANCES = {
    "float64": {"blocks": 1e-10, "models": 1e-9, "gradients": 1e-9, "losses": 1e-8, "state": 1e-7},
    "float32": {"blocks": 1e-5, "models": 1e-4, "gradients": 1e-4, "losses": 1e-3, "state": 5e-2},
    "bfloat16": {"blocks": 2e-2, "models": 5e-2, "gradients": 1.5e-1, "losses": 5e-2, "state": 1.0},
}


@dataclasses.dataclass(frozen=True)
class Row:
    """Two arrays that should be equal.

    Attributes:
      section: "blocks", "models", "gradients", "steps" or "sampling".
      name: of what was computed; rows of a section stand in the order of the data flow.
      max_abs: largest difference. max_rel: the same over the largest expected value.
      cosine: of the two arrays as vectors.
      tolerance: on max_rel.
    """

    section: str
    name: str
    max_abs: float
    max_rel: float
    cosine: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.max_rel <= self.tolerance  # False for NaN.


def compare(section: str, name: str, expected: Any, found: Any, tolerance: float) -> Row:
    """JAX's array `expected` against torch's `found`: arrays or tensors of any dtype, or lists of them."""
    expected, found = _vector(expected), _vector(found)
    if expected.shape != found.shape:
        raise ValueError(f"{section} {name}: {expected.size} numbers against {found.size}")
    difference = np.abs(found - expected)
    max_abs, scale = (float(np.max(x, initial=0)) for x in (difference, np.abs(expected)))
    norms = float(np.linalg.norm(expected) * np.linalg.norm(found))
    cosine = float(expected @ found) / norms if norms else float(max_abs == 0)
    # Where zeros are expected only zeros will do.
    relative = max_abs / scale if scale else (0.0 if max_abs == 0 else np.inf)
    return Row(section, name, max_abs, float(relative), cosine, tolerance)


def first_diverging(rows: Iterable[Row]) -> Row | None:
    """The first block in the order of the data flow that breaks its tolerance, else the first row that does."""
    broken = [row for row in rows if not row.holds]
    return next((row for row in broken if row.section == "blocks"), broken[0] if broken else None)


def worst_first(rows: Sequence[Row]) -> list[Row]:
    """Sorted by error over tolerance, and by error where they are equal."""

    def badness(row: Row) -> tuple[float, float]:
        error = np.inf if np.isnan(row.max_rel) else row.max_rel
        # No error at all is fine even where none is allowed.
        return error / row.tolerance if row.tolerance else np.inf if error else 0.0, error

    return sorted(rows, key=badness, reverse=True)


def table(rows: Sequence[Row]) -> str:
    """Lines of text, worst first."""
    width = max((len(row.name) for row in rows), default=4)
    lines = [f"  {'':<10} {'':<{width}} {'max abs':>10} {'max rel':>10} {'1 - cosine':>11} {'tolerance':>10}"]
    for row in worst_first(rows):
        mark = "" if row.holds else "  BROKEN"
        lines.append(
            f"  {row.section:<10} {row.name:<{width}} {row.max_abs:>10.2e} {row.max_rel:>10.2e} "
            f"{1 - row.cosine:>11.2e} {row.tolerance:>10.0e}{mark}"
        )
    return "\n".join(lines)


def _vector(x: Any) -> np.ndarray:
    if isinstance(x, (list, tuple)):
        return np.concatenate([_vector(part) for part in x])
    if hasattr(x, "detach"):
        x = x.detach().double().cpu().numpy()
    return np.asarray(x, np.float64).reshape(-1)
