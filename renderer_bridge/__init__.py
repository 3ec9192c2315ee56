"""Differentiable 3D Gaussian rasterisation for JAX. Stand-alone: it imports nothing of `pointillist_jax`."""

from renderer_bridge.errors import RasterizeError
from renderer_bridge.render import estimate_capacity, rasterize

__all__ = ["RasterizeError", "estimate_capacity", "rasterize"]
