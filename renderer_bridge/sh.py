"""Real spherical harmonics of degree 0 to 3, in the sign and order of 3D Gaussian splatting files."""

from __future__ import annotations

import jax
import jax.numpy as jnp

MAX_DEGREE = 3


def spherical_harmonics(degree: int, directions: jax.Array, coefficients: jax.Array) -> jax.Array:
    """Evaluates the harmonics up to `degree`; coefficients beyond it are ignored.

    Args:
      degree: 0 to 3 (static).
      directions: [..., 3], normalised here; a zero direction counts as +z.
      coefficients: [..., K, D] with K ≥ (degree + 1)².

    Returns:
      [..., D], without the +0.5 and the clamp that turn it into a colour. Source: facts C.2, gsplat's convention.
    """
    basis = _basis(degree, _unit(directions))
    return sum(b[..., None] * coefficients[..., k, :] for k, b in enumerate(basis))


def _unit(v: jax.Array) -> jax.Array:
    # Guarded before the square root: the derivative of sqrt at 0 is infinite and would poison the gradient.
    squared = jnp.sum(v * v, axis=-1, keepdims=True)
    zero = squared < 1e-30
    pole = jnp.asarray([0.0, 0.0, 1.0], v.dtype)
    return jnp.where(zero, pole, v * jax.lax.rsqrt(jnp.where(zero, 1.0, squared)))


def _basis(degree: int, unit: jax.Array) -> list[jax.Array]:
    """The (degree + 1)² basis values, each [...], in the order (l, m) = (0,0), (1,-1), (1,0), (1,1), (2,-2) …"""
    x, y, z = unit[..., 0], unit[..., 1], unit[..., 2]
    basis = [jnp.full_like(x, 0.28209479177387814)]
    if degree >= 1:
        basis += [-0.4886025119029199 * y, 0.4886025119029199 * z, -0.4886025119029199 * x]
    if degree >= 2:
        xx, yy, zz = x * x, y * y, z * z
        basis += [
            1.0925484305920792 * x * y,
            -1.0925484305920792 * y * z,
            0.31539156525252005 * (2 * zz - xx - yy),
            -1.0925484305920792 * x * z,
            0.5462742152960396 * (xx - yy),
        ]
    if degree >= 3:
        basis += [
            -0.5900435899266435 * y * (3 * xx - yy),
            2.890611442640554 * x * y * z,
            -0.4570457994644658 * y * (4 * zz - xx - yy),
            0.3731763325901154 * z * (2 * zz - 3 * xx - 3 * yy),
            -0.4570457994644658 * x * (4 * zz - xx - yy),
            1.445305721320277 * z * (xx - yy),
            -0.5900435899266435 * x * (xx - 3 * yy),
        ]
    return basis
