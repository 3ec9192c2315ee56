"""Rotations as axis-angle, matrix and wxyz quaternion: pure, batched, differentiable, any float dtype."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Products of coordinates. Left to itself a GPU rounds the factors of a float32 product to TF32's ten bits: half a
# millimetre a metre.
exact_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def rodrigues(axis_angle: Float[Array, "*b 3"]) -> Float[Array, "*b 3 3"]:
    """Rotation matrices of axis-angle vectors (radians); value and gradient are exact and finite at zero."""
    t = jnp.sum(axis_angle * axis_angle, axis=-1)
    small = t < 1e-3
    # Two `where`s: the unused branch must stay finite too, or its NaN would reach the gradient.
    angle = jnp.sqrt(jnp.where(small, 1.0, t))
    half = 0.5 * angle
    # R = I + a K + b K²; 1 - cos θ = 2 sin²(θ/2) keeps b accurate in float32. The series' next terms are < 1e-17.
    a = jnp.where(small, 1 - t / 6 * (1 - t / 20 * (1 - t / 42 * (1 - t / 72))), jnp.sin(angle) / angle)
    b = jnp.where(small, 0.5 - t / 24 * (1 - t / 30 * (1 - t / 56)), 2 * (jnp.sin(half) / angle) ** 2)
    x, y, z = jnp.moveaxis(axis_angle, -1, 0)
    return _matrix(
        [
            [1 - b * (y * y + z * z), b * x * y - a * z, b * x * z + a * y],
            [b * x * y + a * z, 1 - b * (x * x + z * z), b * y * z - a * x],
            [b * x * z - a * y, b * y * z + a * x, 1 - b * (x * x + y * y)],
        ]
    )


def rotation_to_quat(rotation: Float[Array, "*b 3 3"]) -> Float[Array, "*b 4"]:
    """Unit quaternions wxyz of rotation matrices; the sign of the largest component is positive."""
    m = [[rotation[..., i, j] for j in range(3)] for i in range(3)]
    # Four times the square of each component; dividing by the largest never loses digits.
    w = 1 + m[0][0] + m[1][1] + m[2][2]
    x = 1 + m[0][0] - m[1][1] - m[2][2]
    y = 1 - m[0][0] + m[1][1] - m[2][2]
    z = 1 - m[0][0] - m[1][1] + m[2][2]
    wx, wy, wz = m[2][1] - m[1][2], m[0][2] - m[2][0], m[1][0] - m[0][1]
    xy, xz, yz = m[1][0] + m[0][1], m[0][2] + m[2][0], m[2][1] + m[1][2]
    is_w = (w >= x) & (w >= y) & (w >= z)
    is_x = (x >= y) & (x >= z)
    is_y = y >= z
    rows = [[w, wx, wy, wz], [wx, x, xy, xz], [wy, xy, y, yz], [wz, xz, yz, z]]
    picked = [jnp.where(is_w, a, jnp.where(is_x, b, jnp.where(is_y, c, d))) for a, b, c, d in zip(*rows, strict=True)]
    return normalize(jnp.stack(picked, axis=-1))


def quat_to_rotation(quat: Float[Array, "*b 4"]) -> Float[Array, "*b 3 3"]:
    """Rotation matrices of wxyz quaternions, which need not be normalised."""
    w, x, y, z = jnp.moveaxis(normalize(quat), -1, 0)
    return _matrix(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def quat_multiply(a: Float[Array, "*b 4"], b: Float[Array, "*b 4"]) -> Float[Array, "*b 4"]:
    """Hamilton product a ⊗ b, wxyz: the rotation b followed by a."""
    aw, ax, ay, az = jnp.moveaxis(a, -1, 0)
    bw, bx, by, bz = jnp.moveaxis(b, -1, 0)
    return jnp.stack(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ],
        axis=-1,
    )


def quat_conjugate(quat: Float[Array, "*b 4"]) -> Float[Array, "*b 4"]:
    """The inverse rotation of a unit quaternion."""
    return quat * jnp.array([1, -1, -1, -1], quat.dtype)


def nearest_rotation(matrix: Float[Array, "*b 3 3"], iterations: int = 8) -> Float[Array, "*b 3 3"]:
    """The rotation nearest to each matrix (its polar factor) by Newton's iteration.

    Meant for blends of rotations, whose singular values lie in (0, 1]. Eight steps reach float32 precision down to a
    smallest singular value of about 0.02 (two joints 177° apart), far beyond what a neck or a jaw does. An SVD of 10⁵
    matrices would take a hundred times longer.
    """

    def newton(_, m):
        cofactor, det = _cofactors(m)
        # (M + M⁻ᵀ) / 2, and M⁻ᵀ is the cofactor matrix over the determinant.
        scale = 1 / jnp.where(jnp.abs(det) < 1e-12, 1e-12, det)
        return [[0.5 * (m[i][j] + cofactor[i][j] * scale) for j in range(3)] for i in range(3)]

    # Nine component arrays make every operation one vectorised loop over the points. A real loop, not an unrolled one:
    # XLA would fuse the whole chain into each of the nine results and compute it nine times (36 against 8 ms for 10⁵).
    components = [[matrix[..., i, j] for j in range(3)] for i in range(3)]
    return _matrix(jax.lax.fori_loop(0, iterations, newton, components))


def inverse_3x3(matrix: Float[Array, "*b 3 3"]) -> Float[Array, "*b 3 3"]:
    """Inverse by cofactors: no LAPACK call per matrix."""
    cofactor, det = _cofactors([[matrix[..., i, j] for j in range(3)] for i in range(3)])
    return _matrix([[cofactor[j][i] / det for j in range(3)] for i in range(3)])


def normalize(x: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
    """x / sqrt(max(x·x, 1e-20)): finite, with a finite gradient, at zero too (facts/avatars_gsplat.md A.2)."""
    return x / jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-20))


def _cofactors(m):
    c = [[None] * 3 for _ in range(3)]
    for i in range(3):
        for j in range(3):
            a, b, p, q = (i + 1) % 3, (i + 2) % 3, (j + 1) % 3, (j + 2) % 3
            c[i][j] = m[a][p] * m[b][q] - m[a][q] * m[b][p]
    det = m[0][0] * c[0][0] + m[0][1] * c[0][1] + m[0][2] * c[0][2]
    return c, det


def _matrix(rows):
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)
