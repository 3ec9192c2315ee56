"""What the parity tests share: arrays across, and one measure of error."""

from __future__ import annotations

import jax
import numpy as np
import torch

TOLERANCE = 1e-10


def to_torch(tree):
    """Arrays → tensors of the same dtype; everything else stays."""
    return jax.tree.map(lambda x: torch.tensor(np.asarray(x)) if hasattr(x, "dtype") else x, tree)


def assert_close(found, expected, tolerance: float = TOLERANCE, name: str = "") -> None:
    """Largest difference ≤ tolerance times the largest value expected. Either may be of either framework."""
    found, expected = (np.asarray(x.detach() if torch.is_tensor(x) else x, np.float64) for x in (found, expected))
    assert found.shape == expected.shape, (name, found.shape, expected.shape)
    scale = np.abs(expected).max(initial=0)
    error = np.abs(found - expected).max(initial=0)
    assert error <= tolerance * scale, f"{name}: {error / scale:.3g} of {scale:.3g}"
    # Zeros agree with everything.
    assert scale > 0, name


def assert_same_gradients(twin: torch.nn.Module, arrays, load, tolerance: float = TOLERANCE) -> None:
    """Every parameter's gradient in `twin` against `arrays`, JAX's by its own names.

    Args:
      load: (module, arrays) → None, of the model; it carries the gradients to torch's names and layouts.
    """
    found = {name: p.grad for name, p in twin.named_parameters()}
    load(twin, jax.tree.map(np.asarray, arrays))
    for name, expected in twin.named_parameters():
        assert found[name] is not None, name
        assert_close(found[name], expected, tolerance, name)
