"""LPIPS with VGG16, version 0.1, as the `lpips` package computes it with `net="vgg"` (facts/encoders_and_metrics.md 3).

The trunk's weights are the user's: torchvision's `vgg16-397923af.pth`, through `convert.lpips_from_torch`. The five
linear weight vectors lie in this package (`lpips_vgg_lin.npz`, BSD-2: LPIPS_LICENSE.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pointillist_jax.files import ArraySpec, UserError, read_npz

# Index of each convolution in torchvision's `features`, with its channels; a tuple per slice, a pool between slices.
SLICES = (
    ((0, 3, 64), (2, 64, 64)),
    ((5, 64, 128), (7, 128, 128)),
    ((10, 128, 256), (12, 256, 256), (14, 256, 256)),
    ((17, 256, 512), (19, 512, 512), (21, 512, 512)),
    ((24, 512, 512), (26, 512, 512), (28, 512, 512)),
)
# Four poolings: below this the last features would have no pixel.
MIN_SIDE = 16
# Of inputs in [-1, 1]; ImageNet's mean and deviation up to rounding.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_LIN = Path(__file__).with_name("lpips_vgg_lin.npz")


def lpips(image: Float[Array, "*b H W 3"], target: Float[Array, "*b H W 3"], params: Any) -> Float[Array, "*b"]:
    """Perceptual distance of images in [0, 1]; one value per image.

    Args:
      image, target: RGB in [0, 1] (not [-1, 1], which the package wants). Differentiable in both, with gradient 0 where
        a feature vector is zero (NaN in the package).
      params: from `convert.lpips_from_torch`.

    Raises:
      UserError: different shapes, no RGB, fewer than 16 pixels a side.
    """
    if image.shape != target.shape or image.ndim < 3 or image.shape[-1] != 3 or min(image.shape[-3:-1]) < MIN_SIDE:
        raise UserError(
            f"LPIPS compares RGB images of one shape, at least {MIN_SIDE} pixels a side, not {image.shape} and "
            f"{target.shape}."
        )
    with jax.named_scope("lpips"):
        batch = image.shape[:-3]
        both = jnp.stack([image, target]).reshape(-1, *image.shape[-3:])
        distance = jnp.zeros(both.shape[0] // 2, both.dtype)
        for features, weights in zip(_features(both, params["convolutions"]), params["linear"], strict=True):
            a, b = jnp.split(_unit(features), 2)
            distance += jnp.mean(jnp.einsum("nhwc,c->nhw", (a - b) ** 2, weights), axis=(-2, -1))
        return distance.reshape(batch)


def linear_weights() -> tuple[np.ndarray, ...]:
    """The five vectors [64], [128], [256], [512], [512] of LPIPS 0.1 for VGG, float32, none negative."""
    specs = {f"lin{i}": ArraySpec((s[-1][-1],), low=0.0) for i, s in enumerate(SLICES)}
    return tuple(read_npz(_LIN, specs, "the linear weights of LPIPS").values())


def _features(images, slices):
    """Activations after the last ReLU of each slice."""
    x = (2 * images - 1 - jnp.asarray(_SHIFT, images.dtype)) / jnp.asarray(_SCALE, images.dtype)
    for i, convolutions in enumerate(slices):
        if i:
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        for p in convolutions:
            x = lax.conv_general_dilated(
                x, p["kernel"].astype(x.dtype), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x + p["bias"].astype(x.dtype))
        yield x


def _unit(features):
    square = jnp.sum(features * features, axis=-1, keepdims=True)
    # The root has no gradient at zero, and ReLU features can all be zero.
    zero = square == 0
    return jnp.where(zero, 0, features / (jnp.sqrt(jnp.where(zero, 1, square)) + 1e-10))
