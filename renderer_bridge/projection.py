"""EWA projection of 3D Gaussians to 2D ones: shared by every back end, differentiable in everything incl. `Ks`.

The rules are those of gsplat's CUDA projection (facts C.4); autodiff supplies the gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

# A Gaussian whose alpha is below 1/255 everywhere is invisible; the kernel uses the same floor per pixel.
ALPHA_FLOOR = 1.0 / 255.0
# Radius in standard deviations of an opaque Gaussian: alpha 1 falls to the floor there (sqrt(2 ln 255) = 3.329).
MAX_EXTENT = 3.33
# Of a 2D covariance, pixels⁴: float32 holds neither a larger one nor the square of a smaller one's inverse.
_LARGEST_DETERMINANT, _SMALLEST_DETERMINANT = 1e36, 1e-18
# Metres, of positions and scales. What is larger is a mistake, and its square on the image plane would not be finite.
LARGEST_LENGTH = 1e15


class Projected(NamedTuple):
    """C cameras × G Gaussians on the image plane. A culled Gaussian has radii 0, finite values and zero gradients."""

    means2d: jax.Array  # [C, G, 2] pixels
    depths: jax.Array  # [C, G] camera z
    conics: jax.Array  # [C, G, 3] upper triangle (xx, xy, yy) of the inverse 2D covariance, 1/pixel²
    opacities: jax.Array  # [C, G] after compensation
    radii: jax.Array  # [C, G, 2] int32 pixels, 0 = culled
    too_large: jax.Array  # [C, G] bool: culled because its covariance on the image plane is beyond what float32 holds


def usable(means: jax.Array, quats: jax.Array, scales: jax.Array, opacities: jax.Array) -> jax.Array:
    """[G] bool: no NaN or Inf, nothing beyond `LARGEST_LENGTH`, scales ≥ 0, a quaternion that is not zero."""
    return (
        jnp.all(jnp.abs(means) <= LARGEST_LENGTH, -1)
        & jnp.all(jnp.isfinite(quats), -1)
        & jnp.all((scales >= 0) & (scales <= LARGEST_LENGTH), -1)
        & jnp.any(quats != 0, -1)
        & jnp.isfinite(opacities)
    )


def project(
    means: jax.Array,  # [G, 3]
    quats: jax.Array,  # [G, 4] wxyz, any length but 0
    scales: jax.Array,  # [G, 3] standard deviations ≥ 0
    opacities: jax.Array,  # [G]
    viewmats: jax.Array,  # [C, 4, 4] world to camera
    Ks: jax.Array,  # [C, 3, 3] pixels
    width: int,
    height: int,
    *,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    eps2d: float = 0.3,
    radius_clip: float = 0.0,
    antialiased: bool = False,
) -> Projected:
    """Projects every Gaussian, all of them `usable`, into every camera. Source: facts C.4."""
    # Products with the cameras' rotations are written out, component by component: as matrix products a GPU would round
    # them to TF32 (a tenth of a pixel at 512²), and neither they nor their transposes would fuse.
    rotations = viewmats[:, :3, :3, None]
    x, y, depths = (_dot(rotations[:, i].swapaxes(0, 1), means.T) + viewmats[:, i, 3, None] for i in range(3))
    in_depth = (depths >= near_plane) & (depths <= far_plane)
    # The z used for dividing; a culled Gaussian gets 1 so that neither value nor gradient overflows.
    z = jnp.where(in_depth & (jnp.abs(depths) > 1e-20), depths, 1.0)

    fx, fy = Ks[:, 0, 0, None], Ks[:, 1, 1, None]
    cx, cy = Ks[:, 0, 2, None], Ks[:, 1, 2, None]  # K's skew is not read: gsplat's pinhole kernel has none
    x, y = jnp.where(in_depth, x, 0.0), jnp.where(in_depth, y, 0.0)
    means2d = jnp.stack([fx * x / z + cx, fy * y / z + cy], -1)

    # J R M with M = R(q) diag(s): 2×3 per pair; the covariance is its square, so it is never negative definite.
    half_x, half_y = 0.15 * width / fx, 0.15 * height / fy  # 0.3 · tan(fov/2) with tan(fov/2) = W / (2 fx)
    u = jnp.clip(x / z, -cx / fx - half_x, (width - cx) / fx + half_x)
    v = jnp.clip(y / z, -cy / fy - half_y, (height - cy) / fy + half_y)
    jacobian_x = [fx / z * (rotations[:, 0, j] - u * rotations[:, 2, j]) for j in range(3)]
    jacobian_y = [fy / z * (rotations[:, 1, j] - v * rotations[:, 2, j]) for j in range(3)]
    xx = xy = yy = 0.0
    for *column, scale in zip(*_rotation(quats), scales.T, strict=True):
        axis = [component * scale for component in column]
        row_x, row_y = _dot(jacobian_x, axis), _dot(jacobian_y, axis)
        xx, xy, yy = xx + row_x * row_x, xy + row_x * row_y, yy + row_y * row_y

    # Replaced before they are multiplied: 0 · Inf would reach the gradient.
    too_large = in_depth & ~(xx * yy < _LARGEST_DETERMINANT)
    in_depth = in_depth & ~too_large
    xx, xy, yy = (jnp.where(too_large, harmless, x) for x, harmless in ((xx, 1.0), (xy, 0.0), (yy, 1.0)))
    determinant_sharp = xx * yy - xy * xy
    xx, yy = xx + eps2d, yy + eps2d
    determinant = xx * yy - xy * xy
    in_depth = in_depth & (determinant > _SMALLEST_DETERMINANT)
    safe = jnp.where(in_depth, determinant, 1.0)
    conics = jnp.where(in_depth[..., None], jnp.stack([yy / safe, -xy / safe, xx / safe], -1), 0.0)
    opacities = jnp.broadcast_to(opacities, depths.shape)
    if antialiased:
        ratio = determinant_sharp / safe
        lit = in_depth & (ratio > 0)
        opacities = opacities * jnp.where(lit, jnp.sqrt(jnp.where(lit, ratio, 1.0)), 0.0)

    radii = _radii(means2d, xx, yy, opacities, in_depth, width, height, radius_clip)
    return Projected(means2d, depths, conics, opacities, radii, too_large)


def camera_positions(viewmats: jax.Array) -> jax.Array:
    """World positions [C, 3] of the cameras: −A⁻¹ t, also for a view matrix that is not orthonormal."""
    a, b, c = viewmats[:, 0, :3], viewmats[:, 1, :3], viewmats[:, 2, :3]
    t = viewmats[:, :3, 3]
    bc, ca, ab = jnp.cross(b, c), jnp.cross(c, a), jnp.cross(a, b)
    determinant = jnp.sum(a * bc, -1, keepdims=True)
    return -(t[:, :1] * bc + t[:, 1:2] * ca + t[:, 2:] * ab) / determinant


def _dot(a, b) -> jax.Array:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _rotation(quats: jax.Array) -> list[list[jax.Array]]:
    """[G, 4] wxyz of any non-zero length → three rows of three components [G]."""
    # Scaled by the largest component first: the square of a tiny quaternion underflows. Before that, into a range where
    # that component has an inverse.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(quats), -1, keepdims=True))
    rough = jnp.where(largest > 2.0**40, 2.0**-60, jnp.where(largest < 2.0**-40, 2.0**60, 1.0)).astype(quats.dtype)
    quats = quats * rough / (largest * rough)
    quats = quats * jax.lax.rsqrt(jnp.sum(quats * quats, -1, keepdims=True))
    w, x, y, z = (quats[..., i] for i in range(4))
    return [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]


def _radii(means2d, xx, yy, opacities, visible, width, height, radius_clip) -> jax.Array:
    """[C, G, 2] int32: half sizes of the box outside which alpha is below 1/255, or 0 when nothing can be seen."""
    means2d, xx, yy, opacities = jax.lax.stop_gradient((means2d, xx, yy, opacities))
    visible = visible & (opacities >= ALPHA_FLOOR)
    extent = jnp.minimum(MAX_EXTENT, jnp.sqrt(2 * jnp.log(jnp.maximum(opacities, ALPHA_FLOOR) / ALPHA_FLOOR)))
    radii = jnp.ceil(extent[..., None] * jnp.sqrt(jnp.stack([xx, yy], -1)))
    size = jnp.asarray([width, height], means2d.dtype)
    visible = visible & jnp.all((means2d + radii > 0) & (means2d - radii < size), -1)
    visible = visible & ~jnp.all(radii <= radius_clip, -1)
    # Cut before the conversion: a Gaussian at the camera may span more pixels than an int32 can count.
    return jnp.where(visible[..., None], jnp.minimum(radii, 1e6), 0.0).astype(jnp.int32)
