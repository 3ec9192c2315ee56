"""Losses and image metrics."""

from pointillist_jax.losses.photometric import l1, psnr, ssim

__all__ = ["l1", "psnr", "ssim"]
