"""Pointillist-JAX: one portrait to an animatable 3D Gaussian head, in JAX/Flax."""

__version__ = "0.1.0"
