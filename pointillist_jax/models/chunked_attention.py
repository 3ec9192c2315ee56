"""Attention in memory linear in the sequence, on any back end: the "chunked" implementation of `models.attention`.

Short sequences are attended in strips of whole rows, long ones in loops over tiles, both with derivatives of their own.
Measured in experiments/LOG.md.

Letters: B batch, T queries, S keys, N heads, K kv heads, R = N / K query heads per kv head, H head dim.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pointillist_jax.models.layers import weighted_sum
from renderer_bridge.varying import axes_of, vary

# Names that remat policies save: the output of an attention, and its log-sum-exp, spare its recomputation.
OUTPUT_NAME, LSE_NAME = "attention_output", "attention_lse"
# Finite: exp(-inf - (-inf)) would be NaN. The running maximum starts between the two, so that the weight of what is
# masked, exp(MASKED - maximum), is 0 also in a row that has seen no key yet.
MASKED, _LOWEST = -1e30, -5e29
# Sequences of up to so many tiles are attended in strips of whole rows instead.
_IN_STRIPS = 4


def accumulator(dtype) -> jnp.dtype:
    """What scores and softmax are computed in."""
    return jnp.promote_types(dtype, jnp.float32)


def chunked_attention(q, k, v, kv_lengths, causal: bool, window: int | None, block_size: int):
    """See `attention`."""
    strips = _Strips.make(q.shape[1], k.shape[1], causal, window, block_size)
    if strips is not None:
        return _in_strips(q, k, v, kv_lengths, strips)
    return _in_tiles(q, k, v, kv_lengths, _Tiles.make(q.shape[1], k.shape[1], causal, window, block_size))


def _even_block(length: int, block_size: int) -> int:
    """About `block_size`, chosen so that padding the length to whole blocks wastes little."""
    number = max(round(length / block_size), 1)
    if number == 1:
        return length
    return -(-length // (8 * number)) * 8


def _blocks(queries: int, keys: int, block_size: int) -> tuple[int, int]:
    """Rows and columns of a tile."""
    block_k = _even_block(keys, block_size)
    # Few keys (a condition): as many more queries.
    return _even_block(queries, block_size * max(block_size // block_k, 1)), block_k


def _mask(t: Array, s: Array, plan: _Strips | _Tiles, per_kv_head: int, kv_lengths) -> Array:
    """[B or 1, 1, R·T, S]: which of the keys `s` the queries `t` (positions) see."""
    t = jnp.tile(t, per_kv_head)[:, None]
    if kv_lengths is None:
        mask = (s < plan.keys)[None, None, None]
    else:
        mask = (s < jnp.minimum(kv_lengths, plan.keys)[:, None])[:, None, None]
    if plan.causal:
        mask = mask & (s <= t)
    if plan.window is not None:
        mask = mask & (s > t - plan.window)
    return mask


def _rows(x: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "B K RT H"]:
    """Queries by the kv head they read."""
    batch, length, heads, dim = x.shape
    x = x.reshape(batch, length, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)
    return x.reshape(batch, kv_heads, -1, dim)


def _unrows(x: Float[Array, "B K RT H"], heads: int) -> Float[Array, "B T N H"]:
    """The inverse of `_rows`."""
    batch, kv_heads, _, dim = x.shape
    x = x.reshape(batch, kv_heads, heads // kv_heads, -1, dim).transpose(0, 3, 1, 2, 4)
    return x.reshape(batch, -1, heads, dim)


def _by_head(x):
    return jnp.swapaxes(x, 1, 2)


def _transposed(x):
    return jnp.swapaxes(x, -1, -2)


def _wide_on_cpu(*factors):
    """What a product whose result is transposed is made of. XLA exchanges its factors, and its CPU back end has no such
    product of half precision."""
    if jax.default_backend() != "cpu":
        return factors
    return tuple(x.astype(accumulator(x.dtype)) for x in factors)


def _row_products(out_bar, out, dtype):
    """[B,T,N,1] Σ_h of the product: what every weight's gradient is reduced by."""
    ones = jnp.ones(out.shape[3], dtype)
    return weighted_sum(out_bar.astype(dtype) * out.astype(dtype), ones, (3,))[..., None]


class _Strips(NamedTuple):
    """Blocks of queries, each with all keys that any of them sees; static.

    `strips`: (first query, end, first key, end).
    """

    keys: int
    causal: bool
    window: int | None
    strips: tuple[tuple[int, int, int, int], ...]

    @classmethod
    @functools.cache
    def make(cls, queries: int, keys: int, causal: bool, window: int | None, block_size: int) -> _Strips | None:
        """None for sequences that are too long for it."""
        rows, columns = _blocks(queries, keys, block_size)
        if -(-queries // rows) * -(-keys // columns) > _IN_STRIPS:
            return None
        if causal:  # Half as many rows: what lies right of the diagonal is half as much.
            rows = _even_block(queries, max(block_size // 2, 1))
        strips = []
        for first in range(0, queries, rows):
            end = min(first + rows, queries)
            first_key = 0 if window is None else max(first - window + 1, 0)
            strips.append((first, end, first_key, end if causal else keys))
        return cls(keys, causal, window, tuple(strips))

    def masked(self, scores, strip: tuple[int, int, int, int], per_kv_head: int, kv_lengths, transposed: bool = False):
        """Scores [B, K, R·T, S] (`transposed`: [B, K, S, R·T]) without those of keys that a query does not see."""
        if not self.causal and kv_lengths is None:
            return scores
        first, end, first_key, end_key = strip
        mask = _mask(jnp.arange(first, end), jnp.arange(first_key, end_key), self, per_kv_head, kv_lengths)
        return jnp.where(_transposed(mask) if transposed else mask, scores, MASKED)

    def add_keys(self, parts: list[Float[Array, "B K S_i H"]]) -> Float[Array, "B S K H"]:
        """Sums each key's shares over the strips that see it. Every key is seen by the query at its position."""
        edges = sorted({edge for *_, first, end in self.strips for edge in (first, end)})
        found = []
        for first, end in itertools.pairwise(edges):
            shares = [
                part[:, :, first - a : end - a]
                for part, (*_, a, b) in zip(parts, self.strips, strict=True)
                if a <= first and end <= b
            ]
            found.append(_by_head(functools.reduce(jnp.add, shares)))
        return jnp.concatenate(found, axis=1)


# Why strips: a short sequence has few of them, so they are written out, each with the softmax of whole rows: nothing
# is rescaled, no key is cut out of an array or put back by an index.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _in_strips(q, k, v, kv_lengths, plan: _Strips):
    return _strips_forward(q, k, v, kv_lengths, plan)[0]


def _strips_forward(q, k, v, kv_lengths, plan: _Strips):
    heads, head_dim, kv_heads = *q.shape[2:], k.shape[2]
    dtype, scale = accumulator(q.dtype), head_dim**-0.5
    k, v = _by_head(k), _by_head(v)
    keys_t, queries, outs, lses = _transposed(k), [], [], []
    for strip in plan.strips:
        first, end, *seen = strip
        keys = slice(*seen)
        queries.append(_rows(q[:, first:end], kv_heads))
        scores = jnp.matmul(queries[-1], keys_t[..., keys], preferred_element_type=dtype)
        scores = plan.masked(scores, strip, heads // kv_heads, kv_lengths)
        top = jnp.maximum(scores.max(-1, keepdims=True), _LOWEST)
        weights = jnp.exp((scores - top) * scale)
        total = weights.sum(-1, keepdims=True)
        total = jnp.where(total > 0, total, 1)  # No key at all: zeros, and no NaN in the gradient.
        out = jnp.matmul(weights.astype(v.dtype), v[:, :, keys], preferred_element_type=dtype)
        outs.append(_unrows(out / total, heads))
        lses.append(checkpoint_name(top * scale + jnp.log(total), LSE_NAME))
    out = checkpoint_name(jnp.concatenate(outs, axis=1).astype(q.dtype), OUTPUT_NAME)
    return out, (queries, k, v, kv_lengths, out, lses)


def _strips_backward(plan: _Strips, residuals, out_bar):
    queries, k, v, kv_lengths, out, lses = residuals
    heads, head_dim, kv_heads = *out.shape[2:], k.shape[1]
    dtype, scale = accumulator(out.dtype), head_dim**-0.5
    out_bar, delta, keys_t = out_bar.astype(out.dtype), _row_products(out_bar, out, dtype), _transposed(k)
    dq, dk, dv = [], [], []
    for strip, rows, lse in zip(plan.strips, queries, lses, strict=True):
        first, end, *seen = strip
        keys, g, d = slice(*seen), *(_rows(x[:, first:end], kv_heads) for x in (out_bar, delta))
        scores = jnp.matmul(k[:, :, keys], _transposed(rows), preferred_element_type=dtype)
        scores = plan.masked(scores, strip, heads // kv_heads, kv_lengths, transposed=True)
        weights = jnp.exp(scores * scale - _transposed(lse))
        d_weights = jnp.matmul(v[:, :, keys], _transposed(g), preferred_element_type=dtype)
        d_scores = (weights * (d_weights - _transposed(d))).astype(out.dtype)
        dv.append(jnp.matmul(weights.astype(v.dtype), g, preferred_element_type=dtype))
        dk.append(jnp.matmul(d_scores, rows, preferred_element_type=dtype))
        d_rows = jnp.matmul(*_wide_on_cpu(keys_t[..., keys], d_scores), preferred_element_type=dtype)
        dq.append(_unrows(_transposed(d_rows), heads))
    dq, dk, dv = jnp.concatenate(dq, axis=1) * scale, plan.add_keys(dk) * scale, plan.add_keys(dv)
    return dq.astype(out.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_in_strips.defvjp(_strips_forward, _strips_backward)


class _Ranges(NamedTuple):
    """Of every line (a row of tiles, or a column) those that are computed; static.

    `edges`: (first, first whole, end of the whole, end). Of whole tiles a query sees every key (but for padding), those
    before and behind them need a mask.
    """

    edges: tuple[tuple[int, int, int, int], ...]

    @classmethod
    def of(cls, seen: np.ndarray, whole: np.ndarray) -> _Ranges:
        edges = []
        for line, its_whole in zip(seen, whole, strict=True):
            (found,), (inner,) = np.nonzero(line), np.nonzero(line & its_whole)
            first, end = (int(found[0]), int(found[-1]) + 1) if found.size else (0, 0)
            edges.append((first, *((int(inner[0]), int(inner[-1]) + 1) if inner.size else (end, end)), end))
        return cls(tuple(edges))

    def loop(self, edges: Int[Array, "4"], tile: Callable, carry: Any, padded: bool) -> Any:
        """`tile(masked, index, carry)` over one line, masked where it needs it; `padded`: everywhere."""
        for n, masked in enumerate((True, padded, True)):
            if any(line[n] < line[n + 1] for line in self.edges):
                carry = lax.fori_loop(edges[n], edges[n + 1], functools.partial(tile, masked), carry)
        return carry

    def lines(self) -> tuple[np.ndarray, np.ndarray]:
        """What a scan over lines needs: their numbers, and their edges."""
        return np.arange(len(self.edges), dtype=np.int32), np.array(self.edges, np.int32)


class _Tiles(NamedTuple):
    """Which tiles of the T×S score matrix are computed; static.

    Those of each row of tiles, and of each column, are `_Ranges`. The diagonal of `causal` attention is not among them:
    it is computed apart, first of all, in two parts that leave out half of what no query sees.
    """

    queries: int
    keys: int
    block_q: int
    block_k: int
    causal: bool
    window: int | None
    rows: _Ranges
    columns: _Ranges

    @classmethod
    @functools.cache
    def make(cls, queries: int, keys: int, causal: bool, window: int | None, block_size: int) -> _Tiles:
        block_q, block_k = _blocks(queries, keys, block_size)
        i, j = np.ogrid[: -(-queries // block_q), : -(-keys // block_k)]
        first, last, first_key, last_key = i * block_q, (i + 1) * block_q - 1, j * block_k, (j + 1) * block_k - 1
        seen, whole = np.ones((len(i), j.size), bool), last_key < keys + 0 * i
        if causal:
            seen, whole = seen & (j < i), whole & (j < i)
        if window is not None:
            seen, whole = seen & (last_key > first - window), whole & (first_key > last - window)
        return cls(
            queries, keys, block_q, block_k, causal, window, _Ranges.of(seen, whole), _Ranges.of(seen.T, whole.T)
        )

    @property
    def halves(self) -> tuple[tuple[int, int], ...]:
        """(first, end) within a tile of the diagonal: queries of these rows see keys up to `end`."""
        middle = -(-self.block_q // 2)
        return (0, middle), (middle, self.block_q)

    def mask(self, i, j, per_kv_head: int, kv_lengths, rows: tuple[int, int] | None = None) -> Array:
        """Of tile (i, j), or of some `rows` of it and the keys up to their end."""
        first, end = rows or (0, self.block_q)
        t, s = i * self.block_q + jnp.arange(first, end), j * self.block_k + jnp.arange(end if rows else self.block_k)
        return _mask(t, s, self, per_kv_head, kv_lengths)

    def query_blocks(self, x: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "n B K RT H"]:
        blocks = self._cut(x, self.block_q)
        return jax.vmap(lambda x: _rows(x, kv_heads), in_axes=1)(blocks)

    def key_blocks(self, x: Float[Array, "B S K H"]) -> Float[Array, "n B K S H"]:
        return jax.vmap(_by_head, in_axes=1)(self._cut(x, self.block_k))

    def queries_of(self, blocks: Float[Array, "n B K RT H"], heads: int) -> Float[Array, "B T N H"]:
        """The inverse of `query_blocks`."""
        return self._joined(jax.vmap(lambda x: _unrows(x, heads), out_axes=1)(blocks), self.queries)

    def keys_of(self, blocks: Float[Array, "n B K S H"]) -> Float[Array, "B S K H"]:
        """The inverse of `key_blocks`."""
        return self._joined(jax.vmap(_by_head, out_axes=1)(blocks), self.keys)

    @staticmethod
    def _cut(x, size: int):
        blocks = -(-x.shape[1] // size)
        x = jnp.pad(x, ((0, 0), (0, blocks * size - x.shape[1]), (0, 0), (0, 0)))
        return x.reshape(x.shape[0], blocks, size, *x.shape[2:])

    @staticmethod
    def _joined(x, length: int):
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _some_rows(x: Array, per_kv_head: int, rows: tuple[int, int], axis: int) -> Array:
    """Those positions along an axis of length R·T."""
    parts = x.reshape(*x.shape[: x.ndim + axis], per_kv_head, -1, *x.shape[x.ndim + axis + 1 :])
    parts = lax.slice_in_dim(parts, *rows, axis=parts.ndim + axis)
    return parts.reshape(*x.shape[: x.ndim + axis], -1, *x.shape[x.ndim + axis + 1 :])


def _rows_joined(parts: Sequence[Array], per_kv_head: int, axis: int) -> Array:
    """The inverse: arrays of some rows each → of all."""
    shape, at = parts[0].shape, parts[0].ndim + axis
    apart = [x.reshape(*shape[:at], per_kv_head, -1, *shape[at + 1 :]) for x in parts]
    return jnp.concatenate(apart, axis=at + 1).reshape(*shape[:at], -1, *shape[at + 1 :])


# Why loops over tiles, and their own backward. A tile lies in a CPU core's cache, tiles right of the diagonal cost
# nothing, one body is compiled however long the sequence is, and nothing of size T×S exists. A row's sums (a column's
# in the backward) are the inner loop's own: nothing is cut out of an array and put back for every tile. In the backward
# the scores are made transposed ([keys, queries]), so that all five products are plain row-major ones: XLA's CPU
# product with a transposed left side runs at half the speed.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _in_tiles(q, k, v, kv_lengths, plan: _Tiles):
    return _tiles_forward(q, k, v, kv_lengths, plan)[0]


def _tiles_forward(q, k, v, kv_lengths, plan: _Tiles):
    (_, _, heads, head_dim), kv_heads = q.shape, k.shape[2]
    per_kv_head, dtype, scale = heads // kv_heads, accumulator(q.dtype), head_dim**-0.5
    q_blocks, k_blocks, v_blocks = plan.query_blocks(q, kv_heads), plan.key_blocks(k), plan.key_blocks(v)
    keys_t = _transposed(k_blocks)

    def scored(q, k_t, mask):
        scores = jnp.matmul(q, k_t, preferred_element_type=dtype)
        return scores if mask is None else jnp.where(mask, scores, MASKED)

    def weighed(weights, v):
        return jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=dtype)

    def diagonal(i, q):
        parts = []
        for rows in plan.halves:
            mask = plan.mask(i, i, per_kv_head, kv_lengths, rows)
            scores = scored(_some_rows(q, per_kv_head, rows, -2), keys_t[i][..., : rows[1]], mask)
            top = jnp.maximum(scores.max(-1, keepdims=True), _LOWEST)
            weights = jnp.exp((scores - top) * scale)
            parts.append((weighed(weights, v_blocks[i][..., : rows[1], :]), top, weights.sum(-1, keepdims=True)))
        return tuple(_rows_joined(x, per_kv_head, -2) for x in zip(*parts, strict=True))

    def tile(i, q, masked, j, carry):
        out, top, total = carry
        scores = scored(q, keys_t[j], plan.mask(i, j, per_kv_head, kv_lengths) if masked else None)
        new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
        weights, shrink = jnp.exp((scores - new_top) * scale), jnp.exp((top - new_top) * scale)
        out, total = out * shrink + weighed(weights, v_blocks[j]), total * shrink + weights.sum(-1, keepdims=True)
        return out, new_top, total

    def row(_, xs):
        i, edges, q_row = xs
        if plan.causal:
            carry = diagonal(i, q_row)
        else:
            carry = tuple(_filled(x, (*q_row.shape[:3], n), q, dtype) for x, n in ((0, head_dim), (_LOWEST, 1), (0, 1)))
        out, top, total = plan.rows.loop(edges, functools.partial(tile, i, q_row), carry, kv_lengths is not None)
        total = jnp.where(total > 0, total, 1)  # No key at all: zeros, and no NaN in the gradient.
        return None, (out / total, top * scale + jnp.log(total))

    _, (out, lse) = lax.scan(row, None, (*plan.rows.lines(), q_blocks))
    lse = checkpoint_name(lse, LSE_NAME)
    out = checkpoint_name(plan.queries_of(out, heads).astype(q.dtype), OUTPUT_NAME)
    return out, (q_blocks, k_blocks, v_blocks, kv_lengths, out, lse)


def _tiles_backward(plan: _Tiles, residuals, out_bar):
    q_blocks, k_blocks, v_blocks, kv_lengths, out, lse = residuals
    (batch, _, heads, head_dim), kv_heads = out.shape, k_blocks.shape[2]
    per_kv_head, dtype, scale = heads // kv_heads, accumulator(out.dtype), head_dim**-0.5
    delta = plan.query_blocks(_row_products(out_bar, out, dtype), kv_heads)
    g_blocks = plan.query_blocks(out_bar.astype(out.dtype), kv_heads)
    q_t, g_t, k_t, lse_t, delta_t = map(_transposed, (q_blocks, g_blocks, k_blocks, lse, delta))
    of_queries, row_axes = (q_blocks, q_t, g_blocks, g_t, lse_t, delta_t), (-2, -1, -2, -1, -1, -1)

    def gradients(q, q_t, g, g_t, lse_t, delta_t, k, k_t, v, mask):
        scores = jnp.matmul(k, q_t, preferred_element_type=dtype)
        if mask is not None:
            scores = jnp.where(_transposed(mask), scores, MASKED)
        weights = jnp.exp(scores * scale - lse_t)
        d_weights = jnp.matmul(v, g_t, preferred_element_type=dtype)
        d_scores = (weights * (d_weights - delta_t)).astype(out.dtype)
        dv = jnp.matmul(weights.astype(v.dtype), g, preferred_element_type=dtype)
        dk = jnp.matmul(d_scores, q, preferred_element_type=dtype)
        return jnp.matmul(k_t, d_scores, preferred_element_type=dtype), dk, dv

    def diagonal(j, k, k_t, v):
        parts, dk, dv = [], 0, 0
        for rows in plan.halves:
            end, mask = rows[1], plan.mask(j, j, per_kv_head, kv_lengths, rows)
            some = [_some_rows(x[j], per_kv_head, rows, axis) for x, axis in zip(of_queries, row_axes, strict=True)]
            part, *shares = gradients(*some, k[..., :end, :], k_t[..., :end], v[..., :end, :], mask)
            parts.append(part)
            unseen = ((0, 0), (0, 0), (0, plan.block_k - end), (0, 0))
            dk, dv = (total + jnp.pad(share, unseen) for total, share in zip((dk, dv), shares, strict=True))
        return _rows_joined(parts, per_kv_head, -1), dk, dv

    def tile(j, of_keys, masked, i, carry):
        dq_t, dk, dv = carry
        mask = plan.mask(i, j, per_kv_head, kv_lengths) if masked else None
        part, *shares = gradients(*(x[i] for x in of_queries), *of_keys, mask)
        return _put(dq_t, i, dq_t[i] + part), dk + shares[0], dv + shares[1]

    def column(dq_t, xs):
        j, edges, *of_keys = xs
        if plan.causal:
            part, dk, dv = diagonal(j, *of_keys)
            dq_t = _put(dq_t, j, dq_t[j] + part)
        else:
            dk = dv = _filled(0, of_keys[0].shape, out, dtype)
        carry = plan.columns.loop(edges, functools.partial(tile, j, of_keys), (dq_t, dk, dv), kv_lengths is not None)
        return carry[0], carry[1:]

    shape = len(q_blocks), batch, kv_heads, head_dim, per_kv_head * plan.block_q
    xs = *plan.columns.lines(), k_blocks, k_t, v_blocks
    dq_t, (dk, dv) = lax.scan(column, _filled(0, shape, out, dtype), xs)
    dq, dk, dv = plan.queries_of(_transposed(dq_t), heads) * scale, plan.keys_of(dk) * scale, plan.keys_of(dv)
    return dq.astype(out.dtype), dk.astype(k_blocks.dtype), dv.astype(v_blocks.dtype), None


_in_tiles.defvjp(_tiles_forward, _tiles_backward)


def _put(x, i, value):
    """x with x[i] = value: without the check of bounds that `x.at[i].set` compiles to."""
    return lax.dynamic_update_index_in_dim(x, value, i, 0)


def _filled(value: float, shape: tuple[int, ...], like: Array, dtype) -> Array:
    """What a loop begins with, varying over the mesh (inside `parallel_attention`) as `like` does."""
    return vary(jnp.full(shape, value, dtype), axes_of(like))
