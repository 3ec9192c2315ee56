"""torchvision's VGG16 → parameters of `losses.lpips` (facts/encoders_and_metrics.md 3)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pointillist_jax.convert.state_dicts import Tensors, check_state, require_mapping
from pointillist_jax.losses.lpips import SLICES, linear_weights

_WHAT = "VGG16 (torchvision's vgg16-397923af.pth)"


def lpips_from_torch(state_dict: Mapping[str, Any], *, dtype: Any = np.float32) -> dict[str, Any]:
    """Parameters of `losses.lpips` from a VGG16, with LPIPS's own linear weights, which the package holds.

    Args:
      state_dict: name → torch tensor or array: torchvision's (`features.0.weight` …; its classifier is left out), or
        that of an `lpips.LPIPS(net="vgg")` (`net.slice1.0.weight` …; its linear layers, the same, are left out).
      dtype: of the result.

    Returns:
      {"convolutions": five tuples of {"kernel" [3, 3, I, O], "bias" [O]}, "linear": five [O]}.

    Raises:
      FileFormatError: names every key that is missing, unexpected or of another shape; NaN.
      UserError: not a state dict.
    """
    state = {
        re.sub(r"^net\.slice[1-5]\.", "features.", name): value
        for name, value in require_mapping(state_dict, _WHAT).items()
    }
    expected = {}
    for index, size_in, size_out in (c for s in SLICES for c in s):
        expected[f"features.{index}.weight"] = (size_out, size_in, 3, 3)
        expected[f"features.{index}.bias"] = (size_out,)
    ignored = [name for name in state if re.match(r"classifier\.|lins?\d*\.|scaling_layer\.", name)]
    check_state(_WHAT, state, expected, ignored)
    read = Tensors(_WHAT, state, dtype)

    def convolution(index: int) -> dict[str, np.ndarray]:
        kernel, bias = read(f"features.{index}.weight"), read(f"features.{index}.bias")
        return {"kernel": kernel.transpose(2, 3, 1, 0), "bias": bias}

    params = {
        "convolutions": tuple(tuple(convolution(index) for index, *_ in s) for s in SLICES),
        "linear": tuple(w.astype(dtype) for w in linear_weights()),
    }
    return jax.tree.map(jnp.asarray, params)
