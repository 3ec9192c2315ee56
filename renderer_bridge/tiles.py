"""The JAX-native tile rasteriser: blends each tile's depth-sorted list into its 256 pixels, with its own backward pass.

The rules are those of gsplat's CUDA kernels (facts C.4). How it is made fast under XLA:

* Tiles are sorted by list length and blended in groups. A group costs its tiles times its longest list, so the whole
  cost follows the number of intersections where many tiles have lists (a picture with all of them in a few tiles takes
  up to a group's size longer). A group stops when all its pixels have stopped.
* A step blends `CHUNK` Gaussians of every list of the group. Alpha is written with the exponential as its last
  operation: XLA never recomputes an exponential, but it would recompute anything cheap behind it once per output.
* The backward pass walks back from where each pixel stopped, recovering the transmittance by division. Its memory is
  the sorted list itself and one gradient row per Gaussian.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from renderer_bridge import varying
from renderer_bridge.binning import TILE, Bins, tile_grid
from renderer_bridge.projection import ALPHA_FLOOR

PIXELS = TILE * TILE
# A tile's pixels lie quadrant by quadrant in memory, for the sake of `_geometry_sums`.
_SIDE = TILE // 2
_BLOCK = _SIDE * _SIDE
_PIXEL_Y, _PIXEL_X = (
    axis.reshape(2, _SIDE, 2, _SIDE).transpose(0, 2, 1, 3).reshape(-1).astype(np.float32)
    for axis in np.mgrid[:TILE, :TILE]
)
STOP = 1e-4  # a pixel stops before the Gaussian that would bring its transmittance to this
_GROUP = 64
_CHUNK = 4
_BACK_CHUNK = 4
_NEVER = -1e4  # log-alpha of a Gaussian that does not touch the pixel; its exponential is 0
_HEAD = 6  # leading columns of a packed row: mean x, y, conic xx, xy, yy, log opacity; colours follow
# In the table that the loops read, the conic is (xx/2, xy/xx, (yy − xy²/xx)/2), see `_table`.


class _Static(NamedTuple):
    width: int
    height: int
    max_alpha: float
    absgrad: bool


class _Groups(NamedTuple):
    """Tiles sorted by list length and padded to whole groups: N groups of S tiles."""

    starts: jax.Array  # [N, S] int32
    counts: jax.Array  # [N, S] int32
    cameras: jax.Array  # [N, S] int32
    origins: jax.Array  # [N, S, 2] pixel of the upper left corner
    tiles: jax.Array  # [N, S] int32: which tile lies there (padding repeats tile 0 with count 0)


def blend_tiles(
    means2d: jax.Array,  # [C, G, 2]
    conics: jax.Array,  # [C, G, 3]
    opacities: jax.Array,  # [C, G]
    colors: jax.Array,  # [C, G, X]
    bins: Bins,
    width: int,
    height: int,
    *,
    max_alpha: float,
    absgrad_probe: jax.Array | None = None,  # [C, G, 2] zeros
) -> tuple[jax.Array, jax.Array]:
    """Blends front to back over black.

    Returns:
      image [C, H, W, X] and alpha [C, H, W, 1] = 1 − transmittance. The gradient with respect to `absgrad_probe` is
      the sum over pixels of the absolute value of each pixel's contribution to the gradient of `means2d`.
    """
    C, G, X = colors.shape
    visible = opacities > 0
    log_opacity = jnp.where(visible, jnp.log(jnp.where(visible, opacities, 1.0)), _NEVER)
    packed = jnp.concatenate([means2d, conics, log_opacity[..., None], colors], -1).reshape(C * G, _HEAD + X)
    static = _Static(width, height, max_alpha, absgrad_probe is not None)
    if absgrad_probe is None:
        absgrad_probe = jnp.zeros_like(means2d)
    blended = _blend(static, packed, absgrad_probe.reshape(C * G, 2), bins)  # [C, H, W, X + 1]
    return blended[..., :X], 1.0 - blended[..., X:]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blend(static: _Static, packed: jax.Array, absgrad_probe: jax.Array, bins: Bins) -> jax.Array:
    """[C·G, 6 + X] packed rows → [C, H, W, X + 1]: colours and, last, the transmittance."""
    return _blend_fwd(static, packed, absgrad_probe, bins)[0]


def _blend_fwd(static: _Static, packed: jax.Array, absgrad_probe: jax.Array, bins: Bins):
    del absgrad_probe
    C = bins.order.shape[0]
    groups, places = _group_tiles(bins, static)
    table = _table(packed)
    colors, light, blended_to = lax.map(lambda g: _forward_group(static, table, bins, g), groups)
    image = _tiles_to_image(jnp.concatenate([colors, light[:, None]], 1), places, C, static)
    return image, (packed, bins, light, blended_to)


def _blend_bwd(static: _Static, residuals, cotangent: jax.Array):
    packed, bins, light, blended_to = residuals
    groups, _ = _group_tiles(bins, static)
    # Smaller groups than in the forward pass: a step here keeps four times as many arrays in the cache.
    groups, light, blended_to = jax.tree.map(_split_groups, (groups, light, blended_to))
    by_tile = _image_to_tiles(cotangent, static)  # [T, X + 1, P]
    axes = varying.axes_of(packed)
    rows = varying.vary(jnp.zeros((packed.shape[0], packed.shape[1] + 2 * static.absgrad), packed.dtype), axes)
    table = _table(packed)

    def step(rows, xs):
        group, *_ = xs
        cotangents = by_tile.at[group.tiles].get(mode="promise_in_bounds")
        return _backward_group(static, table, bins, rows, *xs, cotangents), None

    rows, _ = lax.scan(step, rows, (groups, light, blended_to))
    width = packed.shape[1]
    absolute = rows[:, width:] if static.absgrad else varying.vary(jnp.zeros_like(rows[:, :2]), axes)
    return rows[:, :width], absolute, None


_blend.defvjp(_blend_fwd, _blend_bwd)


def _table(packed: jax.Array) -> jax.Array:
    """Rows with the conic completed to squares: sigma = A t² + B dy² with t = dx + r dy.

    Far from its centre the three terms of a needle's sigma are a thousand times their sum, which float32 does not
    survive to 1e-5; these two are never larger than the sum. B is a difference of products that nearly cancel, so the
    products' rounding errors are carried along (Dekker's exact product).
    """
    xx, xy, yy = packed[:, 2], packed[:, 3], packed[:, 4]
    safe = jnp.where(xx > 0, xx, 1.0)
    (p, p_error), (q, q_error) = _exact_product(xx, yy), _exact_product(xy, xy)
    rest = ((p - q) + (p_error - q_error)) / safe
    return jnp.concatenate([packed[:, :2], jnp.stack([0.5 * xx, xy / safe, 0.5 * rest], -1), packed[:, 5:]], -1)


def _exact_product(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a · b as rounded product and rounding error."""

    def split(x):
        shifted = x * (2.0**12 + 1 if x.dtype == jnp.float32 else 2.0**27 + 1)
        high = shifted - (shifted - x)
        return high, x - high

    product = a * b
    (a1, a2), (b1, b2) = split(a), split(b)
    return product, ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2


def _forward_group(static: _Static, table: jax.Array, bins: Bins, group: _Groups):
    """One group of S tiles → colours [X, S, P], transmittance [S, P], and how far each pixel was blended [S, P]."""
    S = group.starts.shape[0]
    X = table.shape[1] - _HEAD
    px, py = _pixel_centres(group.origins)

    def unfinished(state):
        k, light, _, _ = state
        return jnp.any((jnp.max(light, axis=1) > 0) & (k < group.counts))

    def blend_chunk(state):
        k, light, blended_to, colors = state
        rows, _ = _rows(table, bins, group, k, _CHUNK)
        inside = k + jnp.arange(_CHUNK, dtype=jnp.int32)[:, None, None] < group.counts[None, :, None]
        alphas = _alphas(static, rows, px, py, inside)
        colors = list(colors)
        for u in range(_CHUNK):
            weight = alphas[u] * light
            passed = light - weight
            going = passed > STOP
            weight = jnp.where(going, weight, 0.0)
            # A stopped pixel keeps its transmittance with a minus sign, which also makes every later test fail.
            light = jnp.where(going, passed, -jnp.abs(light))
            blended_to = blended_to + going
            for c in range(X):
                colors[c] = colors[c] + weight * rows[u, :, _HEAD + c, None]
        return k + _CHUNK, light, blended_to, tuple(colors)

    zeros = jnp.zeros((S, PIXELS), table.dtype)
    state = (jnp.int32(0), zeros + 1, jnp.zeros((S, PIXELS), jnp.int32), (zeros,) * X)
    state = varying.vary(state, varying.axes_of((table, group)))
    _, light, blended_to, colors = lax.while_loop(unfinished, blend_chunk, state)
    blended_to = jnp.minimum(blended_to, group.counts[:, None])  # the group's longest list may have run past this one
    return jnp.stack(colors) if X else jnp.zeros((0, S, PIXELS), table.dtype), jnp.abs(light), blended_to


def _backward_group(static, table, bins, gradient, group, light, blended_to, cotangent):
    """Adds one group's gradients to `gradient` [C·G, 6 + X (+ 2)] and returns it; `cotangent` [S, X + 1, P].

    With g·c a Gaussian's colour dotted with the pixel's cotangent and Z the sum of T alpha g·c over all that lies
    behind it (last, the transmittance): −dL/dsigma = alpha dL/dalpha = T alpha g·c − Z alpha / (1 − alpha).
    """
    X = table.shape[1] - _HEAD
    px, py = _pixel_centres(group.origins)
    color_cotangents, behind = cotangent[:, :X], cotangent[:, X] * light
    # Beyond the clamp the gradient is zero; a hair below it, because exp(log(max_alpha)) is not max_alpha to the bit.
    clamped = static.max_alpha * (1 - 4 * float(jnp.finfo(table.dtype).eps))

    def blend_back(state):
        k, light, behind, gradient = state
        rows, ids = _rows(table, bins, group, k, _BACK_CHUNK)
        inside = k + jnp.arange(_BACK_CHUNK, dtype=jnp.int32)[:, None, None] < blended_to[None]
        alphas = _alphas(static, rows, px, py, inside)

        # The divisions are where XLA cuts: it computes what ends in one once and stores it, while it would repeat a
        # chain of cheaper operations in each of its readers. Matrix products, too, read buffers.
        kept = jnp.ones_like(light)
        weights, parts, falls = ([None] * _BACK_CHUNK for _ in range(3))
        for u in reversed(range(_BACK_CHUNK)):
            kept = kept * (1 - alphas[u])
            seen = sum(rows[u, :, _HEAD + c, None] * color_cotangents[:, c] for c in range(X))
            weights[u] = light * alphas[u] / kept
            parts[u] = seen * (light * alphas[u]) / kept
        for u in reversed(range(_BACK_CHUNK)):
            fall = parts[u] - behind * alphas[u] / (1 - alphas[u])
            falls[u] = jnp.where(alphas[u] < clamped, fall, 0.0)  # −dL/dsigma, [S, P]
            behind = behind + parts[u]
        light = light / kept
        sums = _geometry_sums(static, rows, px, py, falls)
        of_colors = jnp.einsum("sup,sxp->usx", jnp.stack(weights, 1), color_cotangents, precision=lax.Precision.HIGHEST)
        update = jnp.concatenate([jnp.stack(sums[:_HEAD], -1), of_colors, *(x[..., None] for x in sums[_HEAD:])], -1)
        gradient = gradient.at[ids].add(update, mode="promise_in_bounds")
        return k - _BACK_CHUNK, light, behind, gradient

    last = (jnp.max(blended_to) - 1) // _BACK_CHUNK * _BACK_CHUNK
    state = (last, light, behind, gradient)
    return lax.while_loop(lambda state: state[0] >= 0, blend_back, state)[3]


def _geometry_sums(static: _Static, rows, px, py, falls: list[jax.Array]) -> list[jax.Array]:
    """Sums over the pixels of a tile, each [U, S]: d mean x, y, conic xx, xy, yy, log opacity (, |d mean| x, y)."""
    S = falls[0].shape[0]
    mean_x, mean_y, half_xx, slope, half_rest = (rows[..., i] for i in range(5))
    # Moments 1, x, y, xx, xy, yy of each quadrant about its own centre by one matrix product, then moved to the mean.
    # About the tile's centre float32 would lose a small Gaussian's second moments in the difference.
    x, y = (jnp.asarray(v[:_BLOCK] - (_SIDE - 1) / 2, rows.dtype) for v in (_PIXEL_X, _PIXEL_Y))
    basis = jnp.stack([jnp.ones_like(x), x, y, x * x, x * y, y * y], -1)
    basis = jnp.pad(basis, ((0, 0), (0, 2)))  # a product of eight columns is faster on CPU than one of six
    highest = lax.Precision.HIGHEST
    moments = jnp.stack([jnp.dot(f.reshape(-1, _BLOCK), basis, precision=highest).reshape(S, -1, 8) for f in falls])
    centre_x, centre_y = (v[:, ::_BLOCK] + (_SIDE - 1) / 2 for v in (px, py))
    to_x, to_y = mean_x[..., None] - centre_x, mean_y[..., None] - centre_y
    n, nx, ny, nxx, nxy, nyy = (moments[..., i] for i in range(6))
    m = jnp.sum(n, -1)
    mx, my = jnp.sum(to_x * n - nx, -1), jnp.sum(to_y * n - ny, -1)
    mxx = jnp.sum(to_x * (to_x * n - 2 * nx) + nxx, -1)
    mxy = jnp.sum(to_x * (to_y * n - ny) - to_y * nx + nxy, -1)
    myy = jnp.sum(to_y * (to_y * n - 2 * ny) + nyy, -1)
    slope_x = 2 * half_xx * (mx + slope * my)
    sums = [-slope_x, -(slope * slope_x + 2 * half_rest * my), -0.5 * mxx, -mxy, -0.5 * myy, m]
    if static.absgrad:
        falls = jnp.stack(falls)
        half_xx, slope, half_rest = half_xx[..., None], slope[..., None], half_rest[..., None]
        full_dy = mean_y[..., None] - py
        slope_x = 2 * half_xx * (mean_x[..., None] - px + slope * full_dy)
        sums.append(jnp.sum(jnp.abs(falls * slope_x), -1))
        sums.append(jnp.sum(jnp.abs(falls * (slope * slope_x + 2 * half_rest * full_dy)), -1))
    return sums


def _alphas(static: _Static, rows, px, py, inside) -> jax.Array:
    """[U, S, P]: alpha of each pixel, 0 where the kernel skips it."""
    mean_x, mean_y, half_xx, slope, half_rest, log_opacity = (rows[..., i, None] for i in range(_HEAD))
    dy = mean_y - py
    t = mean_x - px + slope * dy
    sigma = half_xx * t * t + half_rest * dy * dy
    log_alpha = log_opacity - sigma
    seen = inside & (sigma >= 0) & (log_alpha >= math.log(ALPHA_FLOOR))
    return jnp.exp(jnp.where(seen, jnp.minimum(log_alpha, math.log(static.max_alpha)), _NEVER))


def _rows(table, bins: Bins, group: _Groups, k, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Table rows [U, S, 6 + X] and Gaussian ids [U, S] of positions k … k + U − 1 of each tile's list."""
    C, G = bins.order.shape
    positions = group.starts + k + jnp.arange(chunk, dtype=jnp.int32)[:, None]
    # Positions past a list read a neighbour's Gaussian, which `inside` hides; past the end they are clamped.
    ranks = bins.ranks.at[positions].get(mode="clip")
    at = jnp.minimum(ranks, G - 1) + group.cameras * G
    ids = bins.order.reshape(C * G).at[at].get(mode="promise_in_bounds") + group.cameras * G
    return table.at[ids].get(mode="promise_in_bounds"), ids


def _pixel_centres(origins: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[S, 2] tile corners → x and y [S, P] of the pixel centres, quadrant by quadrant."""
    return origins[:, :1] + (_PIXEL_X + 0.5), origins[:, 1:] + (_PIXEL_Y + 0.5)


def _group_tiles(bins: Bins, static: _Static) -> tuple[_Groups, jax.Array]:
    """The groups, and [T] int32: where each tile lies in them once flattened."""
    T = bins.counts.shape[0]
    size = min(_GROUP, 2 * -(-T // 4))  # Few tiles in two groups: their lists differ most.
    number = -(-T // size)
    across, down = tile_grid(static.width, static.height)
    order = jnp.argsort(-bins.counts).astype(jnp.int32)
    tiles = jnp.pad(order, (0, number * size - T))
    real = jnp.arange(number * size) < T
    within = tiles % (across * down)
    origins = jnp.stack([within % across, within // across], -1) * TILE
    shape = (number, size)
    groups = _Groups(
        starts=bins.starts[tiles].reshape(shape),
        counts=jnp.where(real, bins.counts[tiles], 0).reshape(shape),
        cameras=(tiles // (across * down)).reshape(shape),
        origins=origins.astype(jnp.float32).reshape(*shape, 2),
        tiles=tiles.reshape(shape),
    )
    return groups, jnp.zeros(T, jnp.int32).at[order].set(jnp.arange(T, dtype=jnp.int32))


def _split_groups(x: jax.Array) -> jax.Array:
    """[N, S, …] → [2 N, S / 2, …]."""
    N, S = x.shape[:2]
    return x.reshape(2 * N, S // 2, *x.shape[2:])


def _tiles_to_image(values: jax.Array, places: jax.Array, C: int, static: _Static) -> jax.Array:
    """[N, X, S, P] → [C, H, W, X]."""
    across, down = tile_grid(static.width, static.height)
    X = values.shape[1]
    by_tile = values.transpose(0, 2, 1, 3).reshape(-1, X, PIXELS)[places]
    image = by_tile.reshape(C, down, across, X, 2, 2, _SIDE, _SIDE).transpose(0, 1, 4, 6, 2, 5, 7, 3)
    return image.reshape(C, down * TILE, across * TILE, X)[:, : static.height, : static.width]


def _image_to_tiles(image: jax.Array, static: _Static) -> jax.Array:
    """[C, H, W, X] → [T, X, P]; pixels outside the image get 0."""
    across, down = tile_grid(static.width, static.height)
    C, H, W, X = image.shape
    image = jnp.pad(image, ((0, 0), (0, down * TILE - H), (0, across * TILE - W), (0, 0)))
    image = image.reshape(C, down, 2, _SIDE, across, 2, _SIDE, X)
    return image.transpose(0, 1, 4, 7, 2, 5, 3, 6).reshape(-1, X, PIXELS)
