"""L1, SSIM and PSNR of images in [0, 1] (facts/encoders_and_metrics.md 3, 4).

Letters: H rows, W columns, X channels. Leading axes are a batch: one value per image.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pointillist_jax.files import UserError

_TAPS, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


def l1(image: Float[Array, "*b H W X"], target: Float[Array, "*b H W X"]) -> Float[Array, "*b"]:
    """Mean absolute difference."""
    _check(image, target)
    return jnp.mean(jnp.abs(image - target), axis=(-3, -2, -1))


def psnr(image: Float[Array, "*b H W X"], target: Float[Array, "*b H W X"]) -> Float[Array, "*b"]:
    """Peak signal-to-noise ratio in dB for a peak of 1; infinite for equal images."""
    _check(image, target)
    return -10 * jnp.log10(jnp.mean((image - target) ** 2, axis=(-3, -2, -1)))


def ssim(
    image: Float[Array, "*b H W X"],
    target: Float[Array, "*b H W X"],
    *,
    padding: Literal["same", "valid"] = "same",
) -> Float[Array, "*b"]:
    """Structural similarity as 3DGS and GaussianAvatars define it: 11 × 11 Gaussian window, σ 1.5, biased moments.

    Args:
      image, target: differentiable in both; float32 or wider, because E[x²] − E[x]² cancels.
      padding: "same" puts zeros around both images (the definition of the losses and of published 3DGS tables),
        "valid" leaves out the five pixels at each border (pytorch-msssim's value).

    Raises:
      UserError: different shapes, half precision, another padding, an image smaller than the window with "valid".
    """
    _check(image, target)
    if padding not in ("same", "valid"):
        raise UserError(f'padding={padding!r}: it must be "same" or "valid".')
    H, W = image.shape[-3:-1]
    if padding == "valid" and min(H, W) < _TAPS:
        raise UserError(f"the image is {H} × {W}; SSIM with padding='valid' needs at least {_TAPS} pixels a side.")
    if jnp.finfo(image.dtype).bits < 32:
        raise UserError(f"SSIM needs float32 images, not {image.dtype}; convert them first.")
    moments = jnp.stack([image, target, image * image, target * target, image * target])
    mx, my, mxx, myy, mxy = _blur(moments, padding)
    luminance = (2 * mx * my + _C1) / (mx * mx + my * my + _C1)
    structure = (2 * (mxy - mx * my) + _C2) / ((mxx - mx * mx) + (myy - my * my) + _C2)
    return jnp.mean(luminance * structure, axis=(-3, -2, -1))


def _blur(x: Array, padding: str) -> Array:
    """[..., H, W, X] → the windowed means. As two products with banded matrices: on CPU twenty times faster than XLA's
    convolution of few channels, at 512² still four times, and as fast backwards."""
    rows, columns = (jnp.asarray(_band(n, padding), x.dtype) for n in x.shape[-3:-1])
    # Without HIGHEST, TF32 on GPUs leaves three digits, which the differences of moments do not survive.
    return jnp.einsum("ij,...jkx,lk->...ilx", rows, x, columns, precision=lax.Precision.HIGHEST)


def _band(n: int, padding: str) -> np.ndarray:
    """[m, n]: row i holds the window around pixel i (m = n), or around pixel i + 5 (valid, m = n − 10)."""
    window = np.exp(-0.5 * ((np.arange(_TAPS) - _TAPS // 2) / _SIGMA) ** 2)
    band = np.zeros((n + _TAPS - 1, n))
    for tap, weight in enumerate(window / window.sum()):
        band[np.arange(n) + _TAPS - 1 - tap, np.arange(n)] = weight
    margin = _TAPS // 2 if padding == "same" else _TAPS - 1
    return band[margin : len(band) - margin]


def _check(image: Array, target: Array) -> None:
    if jnp.shape(image) != jnp.shape(target) or jnp.ndim(image) < 3:
        raise UserError(f"images of shapes {jnp.shape(image)} and {jnp.shape(target)} cannot be compared.")
