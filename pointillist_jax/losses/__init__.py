"""Losses and image metrics."""

from pointillist_jax.losses.cross_entropy import token_cross_entropy
from pointillist_jax.losses.lpips import lpips
from pointillist_jax.losses.photometric import l1, psnr, ssim

__all__ = ["l1", "lpips", "psnr", "ssim", "token_cross_entropy"]
