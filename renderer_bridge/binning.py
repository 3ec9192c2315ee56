"""Which Gaussians touch which 16×16 tile, front to back: static shapes, a dynamic count bounded by `capacity`.

The list of all (tile, Gaussian) intersections is built by one depth sort of the Gaussians, an expansion to
intersections in that order, and one sort of single uint32 keys `tile << bits | depth rank`. On a CPU XLA sorts single
keys about six times faster than key–value pairs, which is why the rank rides in the key. Where tile and rank need more
than 32 bits, a stable sort of pairs by tile does the same.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

TILE = 16
_INT32_MAX = 2**31 - 1


class Bins(NamedTuple):
    """M = capacity intersections, T = C · tiles over all cameras. All integers: no gradient flows here."""

    ranks: jax.Array  # [M] int32 depth rank within its camera, grouped by tile, front to back
    starts: jax.Array  # [T] int32 first position of each tile's list in `ranks`
    counts: jax.Array  # [T] int32 length of each tile's list
    order: jax.Array  # [C, G] int32: order[c, rank] = index of the Gaussian
    total: jax.Array  # [] int32 intersections of the scene (saturates at 2³¹ − 1)
    overflow: jax.Array  # [] int32 intersections beyond the capacity, 0 = exact


def tile_grid(width: int, height: int) -> tuple[int, int]:
    """Number of tiles (across, down) of an image."""
    return -(-width // TILE), -(-height // TILE)


def tile_rects(means2d: jax.Array, radii: jax.Array, width: int, height: int) -> tuple[jax.Array, jax.Array]:
    """Tiles [x0, x1) × [y0, y1) that each Gaussian's box touches.

    Args:
      means2d: [..., 2] pixels.
      radii: [..., 2] int32 pixels, 0 = culled.

    Returns:
      Two int32 arrays [..., 2]: first tile and size in tiles (0 for a culled Gaussian). Source: facts C.4.
    """
    grid = jnp.asarray(tile_grid(width, height), jnp.int32)
    extent = radii.astype(means2d.dtype)
    low = jnp.floor((means2d - extent) / TILE)
    high = jnp.ceil((means2d + extent) / TILE)
    first = jnp.clip(low, 0, grid.astype(low.dtype)).astype(jnp.int32)
    last = jnp.clip(high, 0, grid.astype(low.dtype)).astype(jnp.int32)
    seen = jnp.all(radii > 0, axis=-1, keepdims=True)
    return first, jnp.where(seen, jnp.maximum(last - first, 0), 0)


def saturating_total(counts: jax.Array) -> jax.Array:
    """Sum of non-negative int32 counts as int32, 2³¹ − 1 where the true sum does not fit."""
    # The float sum is inexact but cannot wrap: it only decides whether the integer sum can be believed.
    believable = jnp.sum(counts.astype(jnp.float32)) < 2.0**31 * 0.999
    return jnp.where(believable, jnp.sum(counts, dtype=jnp.int32), _INT32_MAX)


def bin_gaussians(
    means2d: jax.Array,  # [C, G, 2]
    radii: jax.Array,  # [C, G, 2] int32
    depths: jax.Array,  # [C, G]
    width: int,
    height: int,
    capacity: int,
) -> Bins:
    """Builds the tile lists. Ties in depth keep the order of the input. Source: facts C.4."""
    means2d, depths = lax.stop_gradient((means2d, depths))
    C, G = depths.shape
    across, down = tile_grid(width, height)
    tiles = across * down
    rank_bits = max(1, (G - 1).bit_length())
    first, size = tile_rects(means2d, radii, width, height)
    order = _depth_order(jnp.where(size[..., 0] > 0, depths, jnp.inf))  # [C, G]
    rects = jnp.concatenate([first, size], -1)  # [C, G, 4]
    rects = jnp.take_along_axis(rects, order[..., None], axis=1).reshape(C * G, 4)
    counts = rects[:, 2] * rects[:, 3]
    total = saturating_total(counts)
    ends = jnp.cumsum(counts)
    starts = ends - counts

    # owner[e] = row whose list of tiles holds intersection e: every row but the first marks its start; the running sum
    # of the marks counts the rows begun so far. Rows without tiles mark the same place as their successor.
    marks = jnp.zeros(capacity, jnp.int32).at[starts[1:]].add(1, mode="drop", indices_are_sorted=True)
    owner = jnp.cumsum(marks)
    index = jnp.arange(capacity, dtype=jnp.int32)
    row = jnp.concatenate([rects[:, :3], starts[:, None]], -1).at[owner].get(mode="clip")  # [M, 4]
    x0, y0, across_rect, start = row[:, 0], row[:, 1], row[:, 2], row[:, 3]
    local = index - start
    # A float division is exact enough (local < 2²², the half keeps it off the integers) and vectorises; int32 does not.
    line = ((local.astype(jnp.float32) + 0.5) / jnp.maximum(across_rect, 1).astype(jnp.float32)).astype(jnp.int32)
    camera = owner // G if C > 1 else 0
    tile = (y0 + line) * across + x0 + (local - line * across_rect) + camera * tiles
    rank = owner - camera * G
    real, beyond = index < total, jnp.uint32(2**32 - 1)
    edges = jnp.arange(C * tiles + 1, dtype=jnp.uint32)
    if (C * tiles) << rank_bits < 2**32:
        key = jnp.where(real, (tile.astype(jnp.uint32) << rank_bits) | rank.astype(jnp.uint32), beyond)
        # Keys are unique, so stability changes nothing; XLA's stable sort of single keys happens to be the faster one.
        key = lax.sort(key, is_stable=True)
        edges, ranks = edges << rank_bits, (key & jnp.uint32(2**rank_bits - 1)).astype(jnp.int32)
    else:
        # The intersections of a tile already follow each other by depth.
        key, ranks = lax.sort((jnp.where(real, tile.astype(jnp.uint32), beyond), rank), num_keys=1, is_stable=True)
    bounds = jnp.searchsorted(key, edges).astype(jnp.int32)
    return Bins(
        ranks=ranks,
        starts=bounds[:-1],
        counts=bounds[1:] - bounds[:-1],
        order=order,
        total=total,
        overflow=jnp.maximum(total - capacity, 0),
    )


def _depth_order(depths: jax.Array) -> jax.Array:
    """Stable argsort of each row of [C, G], int32."""
    C, G = depths.shape
    index_bits = max(1, (G - 1).bit_length())
    if depths.dtype != jnp.float32 or index_bits > 20:
        return jnp.argsort(depths, axis=-1, stable=True).astype(jnp.int32)
    # Radix sort, least significant digit first: each pass sorts single keys `digit << index_bits | position`, several
    # times faster on CPU than XLA's key–value sort.
    bits = lax.bitcast_convert_type(depths, jnp.uint32)
    negative = bits >> 31 == 1
    bits = jnp.where(negative, ~bits, bits | jnp.uint32(2**31))  # unsigned order = float order
    position = jnp.arange(G, dtype=jnp.uint32)
    digit_bits = 32 - index_bits
    mask = jnp.uint32(2**index_bits - 1)
    order = jnp.broadcast_to(position, (C, G))
    for shift in range(0, 32, digit_bits):
        digits = (bits >> shift) & jnp.uint32(2**digit_bits - 1)
        digits = jnp.take_along_axis(digits, order.astype(jnp.int32), axis=1)
        key = lax.sort((digits << index_bits) | position, dimension=1, is_stable=True)
        order = jnp.take_along_axis(order, (key & mask).astype(jnp.int32), axis=1)
    return order.astype(jnp.int32)
