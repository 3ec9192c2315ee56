"""Attention behind one function, with three implementations (DESIGN §6, facts/jax.md).

`cudnn` is the flash attention of NVIDIA GPUs, `chunked` is memory-linear and runs everywhere, `xla` the plain oracle.

Letters: B batch, T queries, S keys, N heads, K kv heads, R = N / K query heads per kv head, H head dim.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pointillist_jax.files import UserError
from pointillist_jax.models.layers import weighted_sum
from pointillist_jax.sharding import constrain, logical_spec, parts_of
from renderer_bridge.varying import axes_of, vary

IMPLEMENTATIONS = ("auto", "cudnn", "chunked", "xla")
# Names that remat policies save: the output of an attention, and its log-sum-exp, spare its recomputation.
OUTPUT_NAME, LSE_NAME = "attention_output", "attention_lse"
# Finite: exp(-inf - (-inf)) would be NaN. The running maximum starts between the two, so that the weight of what is
# masked, exp(_MASKED - maximum), is 0 also in a row that has seen no key yet.
_MASKED, _LOWEST = -1e30, -5e29
# Sequences of up to so many tiles are attended in strips of whole rows instead.
_IN_STRIPS = 4


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool = False,
    window: int | None = None,
    kv_lengths: Int[Array, "B"] | None = None,
    implementation: str = "auto",
    block_size: int = 512,
) -> Float[Array, "B T N H"]:
    """softmax(q·k / √H) v, in the dtype of `q`, with scores and softmax in float32 (float64 for float64 inputs).

    Args:
      q, k, v: grouped queries when K < N: query head n reads kv head n // (N / K).
      causal: query t sees keys 0 … t; T and S must be equal.
      window: with causal, query t sees keys t - window + 1 … t only.
      kv_lengths: keys at or beyond it are padding; a sequence of length 0 gives zeros.
      implementation: "cudnn" (bf16 or f16 on a CUDA device), "chunked", "xla", or "auto": cudnn where it can run,
        else chunked.
      block_size: rows and columns of a tile of `chunked`: large enough to keep several CPU cores busy, small enough
        for their caches (measured in experiments/LOG.md). Short sequences have rows of half of it, and all columns.

    Raises:
      UserError: shapes that do not fit, an unknown implementation.
    """
    _check(q, k, v, causal, window, implementation)
    if window is not None and window >= k.shape[1]:
        window = None
    if implementation == "auto":
        half = q.dtype in (jnp.bfloat16, jnp.float16)
        implementation = "cudnn" if half and jax.default_backend() == "gpu" else "chunked"
    with jax.named_scope(f"attention_{implementation}"):
        if implementation == "cudnn":
            # Lengths, never a mask: cuDNN takes a mask as a dense T×S bias.
            return jax.nn.dot_product_attention(
                q,
                k,
                v,
                is_causal=causal,
                key_value_seq_lengths=None if kv_lengths is None else kv_lengths.astype(jnp.int32),
                local_window_size=None if window is None else (window - 1, 0),
                implementation="cudnn",
            )
        if implementation == "xla":
            return _dense(q, k, v, causal, window, kv_lengths)
        return _chunked(q, k, v, kv_lengths, causal, window, block_size)


def parallel_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], *, causal: bool, **how: Any
) -> Float[Array, "B T N H"]:
    """`attention` of queries whose positions lie on the mesh's context axis (`sharding.RULES`), as does the result.

    A device of the context axis has all keys of a condition (`causal` False), so it needs nothing of the others. Among
    themselves the devices exchange positions for heads, attend over whole windows with few heads each, and exchange
    back: four all-to-alls of the window's share, where gathering keys and values would move `context` times as much.
    Heads that do not divide over tensor × context are attended whole by every device of the context axis.
    """
    whole = functools.partial(attention, causal=causal, **how)
    parts = parts_of(q.shape[1], "length")
    if parts == 1:
        return whole(q, k, v)
    if causal and min(parts_of(x.shape[2], ("heads", "length")) for x in (q, k)) == 1:
        return whole(*(constrain(x, "batch", None, "heads", None) for x in (q, k, v)))
    lengths = how.pop("kv_lengths", None)

    def local(q, k, v, lengths):
        if causal:
            exchange = functools.partial(lax.all_to_all, axis_name="context", tiled=True)
            q, k, v = (exchange(x, split_axis=2, concat_axis=1) for x in (q, k, v))
        else:  # Their gradients are sums over the devices that they are the same on.
            k, v = vary((k, v), axes_of(q))
        out = attention(q, k, v, causal=causal, kv_lengths=lengths, **how)
        return exchange(out, split_axis=1, concat_axis=2) if causal else out

    queries = logical_spec(q.shape, "batch", "length", "heads", None)
    keys = queries if causal else logical_spec(k.shape, "batch", None, "heads", None)
    in_specs = queries, keys, keys, None if lengths is None else logical_spec(lengths.shape, "batch")
    return jax.shard_map(local, in_specs=in_specs, out_specs=queries)(q, k, v, lengths)


def cached_attention(
    q: Float[Array, "B N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], mask: Array | None = None
) -> Float[Array, "B N H"]:
    """One query per sequence against a cache: what a step of generation needs. `mask` [B, S] (or [S]): True is seen."""
    *_, kv_heads, head_dim = k.shape
    grouped = q.reshape(q.shape[0], kv_heads, -1, head_dim)
    dtype = _accumulator(q.dtype)
    scores = jnp.einsum("BKRH,BSKH->BKRS", grouped * head_dim**-0.5, k, preferred_element_type=dtype)
    if mask is not None:
        scores = jnp.where(jnp.broadcast_to(mask, k.shape[:2])[:, None, None], scores, _MASKED)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    out = jnp.einsum("BKRS,BSKH->BKRH", weights.astype(v.dtype), v, preferred_element_type=dtype)
    return (out / weights.sum(-1, keepdims=True)).reshape(q.shape).astype(q.dtype)


def _check(q, k, v, causal, window, implementation):
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"no attention {implementation!r}; there are {', '.join(IMPLEMENTATIONS)}.")
    fits = q.ndim == k.ndim == 4 and k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    if not fits or q.shape[2] % k.shape[2]:
        raise UserError(
            f"queries {q.shape}, keys {k.shape} and values {v.shape} must be [B,T,N,H], [B,S,K,H] and [B,S,K,H] "
            "with N a multiple of K."
        )
    if causal and q.shape[1] != k.shape[1]:
        raise UserError(f"causal attention needs as many keys as queries, got {k.shape[1]} and {q.shape[1]}.")
    if window is not None and (not causal or window < 1):
        raise UserError(f"window={window} must be at least 1 and needs causal=True.")


def _accumulator(dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _dense(q, k, v, causal, window, kv_lengths):
    batch, queries, _, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    dtype = _accumulator(q.dtype)
    grouped = q.reshape(batch, queries, kv_heads, -1, head_dim)
    scores = jnp.einsum("BTKRH,BSKH->BKRTS", grouped, k, preferred_element_type=dtype) * head_dim**-0.5
    t, s = jnp.arange(queries)[:, None], jnp.arange(keys)
    mask = jnp.ones((1, queries, keys), bool)
    if causal:
        mask &= (s <= t) & (s > t - (window or keys))
    if kv_lengths is not None:
        mask = mask & (s < kv_lengths[:, None, None])
    mask = mask[:, None, None]
    weights = jnp.where(mask, jax.nn.softmax(jnp.where(mask, scores, _MASKED)), 0)
    out = jnp.einsum("BKRTS,BSKH->BTKRH", weights.astype(v.dtype), v, preferred_element_type=dtype)
    return out.reshape(q.shape).astype(q.dtype)


def _chunked(q, k, v, kv_lengths, causal: bool, window: int | None, block_size: int):
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
        return jnp.where(_transposed(mask) if transposed else mask, scores, _MASKED)

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
    dtype, scale = _accumulator(q.dtype), head_dim**-0.5
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
    dtype, scale = _accumulator(out.dtype), head_dim**-0.5
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
        d_rows = jnp.matmul(keys_t[..., keys], d_scores, preferred_element_type=dtype)
        dq.append(_unrows(_transposed(d_rows), heads))
    dq, dk, dv = jnp.concatenate(dq, axis=1) * scale, plan.add_keys(dk) * scale, plan.add_keys(dv)
    return dq.astype(out.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_in_strips.defvjp(_strips_forward, _strips_backward)


class _Tiles(NamedTuple):
    """Which tiles of the T×S score matrix are computed, as (query block, key block), row by row; static.

    `whole`: those of which a query sees every key (but for padding). `cut`: those that need a mask.
    """

    queries: int
    keys: int
    block_q: int
    block_k: int
    causal: bool
    window: int | None
    whole: tuple[tuple[int, int], ...]
    cut: tuple[tuple[int, int], ...]

    @classmethod
    @functools.cache
    def make(cls, queries: int, keys: int, causal: bool, window: int | None, block_size: int) -> _Tiles:
        block_q, block_k = _blocks(queries, keys, block_size)
        whole, cut = [], []
        for i in range(-(-queries // block_q)):
            first, last = i * block_q, (i + 1) * block_q - 1
            for j in range(-(-keys // block_k)):
                first_key, last_key = j * block_k, (j + 1) * block_k - 1
                after = causal and first_key > min(last, queries - 1)
                before = window is not None and last_key <= first - window
                if after or before:
                    continue
                seen = last_key < keys and not (causal and last_key > first)
                seen = seen and not (window is not None and first_key <= last - window)
                (whole if seen else cut).append((i, j))
        return cls(queries, keys, block_q, block_k, causal, window, tuple(whole), tuple(cut))

    def scan(self, tile: Callable, carry: tuple[Array, ...], padded: bool) -> tuple[Array, ...]:
        """`tile(carry, (i, j), masked)` over all tiles, masked where they need it; `padded`: all do."""
        for masked, pairs in ((padded, self.whole), (True, self.cut)):
            if pairs:
                step = lambda carry, pair, masked=masked: (tile(carry, pair, masked=masked), None)  # noqa: E731
                carry, _ = lax.scan(step, carry, tuple(np.array(pairs, np.int32).T))
        return carry

    @property
    def blocks_q(self) -> int:
        return -(-self.queries // self.block_q)

    @property
    def blocks_k(self) -> int:
        return -(-self.keys // self.block_k)

    def mask(self, i, j, per_kv_head: int, kv_lengths) -> Array:
        t, s = i * self.block_q + jnp.arange(self.block_q), j * self.block_k + jnp.arange(self.block_k)
        return _mask(t, s, self, per_kv_head, kv_lengths)

    def query_blocks(self, x: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "n B K RT H"]:
        blocks = self._cut(x, self.blocks_q, self.block_q)
        return jax.vmap(lambda x: _rows(x, kv_heads), in_axes=1)(blocks)

    def key_blocks(self, x: Float[Array, "B S K H"]) -> Float[Array, "n B K S H"]:
        return jax.vmap(_by_head, in_axes=1)(self._cut(x, self.blocks_k, self.block_k))

    def queries_of(self, blocks: Float[Array, "n B K RT H"], heads: int) -> Float[Array, "B T N H"]:
        """The inverse of `query_blocks`."""
        return self._joined(jax.vmap(lambda x: _unrows(x, heads), out_axes=1)(blocks), self.queries)

    def keys_of(self, blocks: Float[Array, "n B K S H"]) -> Float[Array, "B S K H"]:
        """The inverse of `key_blocks`."""
        return self._joined(jax.vmap(_by_head, out_axes=1)(blocks), self.keys)

    @staticmethod
    def _cut(x, blocks: int, size: int):
        x = jnp.pad(x, ((0, 0), (0, blocks * size - x.shape[1]), (0, 0), (0, 0)))
        return x.reshape(x.shape[0], blocks, size, *x.shape[2:])

    @staticmethod
    def _joined(x, length: int):
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


# Why a scan over tiles, and its own backward. Every tile lies in a CPU core's cache, tiles right of the diagonal cost
# nothing, one body is compiled however long the sequence is, and nothing of size T×S exists. In the backward the
# scores are made transposed ([keys, queries]), so that all five products are plain row-major ones: XLA's CPU product
# with a transposed left side runs at half the speed.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _in_tiles(q, k, v, kv_lengths, plan: _Tiles):
    return _tiles_forward(q, k, v, kv_lengths, plan)[0]


def _tiles_forward(q, k, v, kv_lengths, plan: _Tiles):
    (batch, _, heads, head_dim), kv_heads = q.shape, k.shape[2]
    per_kv_head, dtype, scale = heads // kv_heads, _accumulator(q.dtype), head_dim**-0.5
    q_blocks, k_blocks, v_blocks = plan.query_blocks(q, kv_heads), plan.key_blocks(k), plan.key_blocks(v)
    keys_t = _transposed(k_blocks)

    def tile(carry, pair, masked):
        out, top, total = carry
        i, j = pair
        scores = jnp.matmul(q_blocks[i], keys_t[j], preferred_element_type=dtype)
        if masked:
            scores = jnp.where(plan.mask(i, j, per_kv_head, kv_lengths), scores, _MASKED)
        old_top = top[i]
        new_top = jnp.maximum(old_top, scores.max(-1, keepdims=True))
        weights = jnp.exp((scores - new_top) * scale)
        shrink = jnp.exp((old_top - new_top) * scale)
        product = jnp.matmul(weights.astype(v.dtype), v_blocks[j], preferred_element_type=dtype)
        total = _put(total, i, total[i] * shrink + weights.sum(-1, keepdims=True))
        return _put(out, i, out[i] * shrink + product), _put(top, i, new_top), total

    rows = plan.blocks_q, batch, kv_heads, per_kv_head * plan.block_q
    start = tuple(_filled(x, (*rows, n), q, dtype) for x, n in ((0, head_dim), (_LOWEST, 1), (0, 1)))
    out, top, total = plan.scan(tile, start, padded=kv_lengths is not None)
    total = jnp.where(total > 0, total, 1)  # No key at all: zeros, and no NaN in the gradient.
    lse = checkpoint_name(top * scale + jnp.log(total), LSE_NAME)
    out = checkpoint_name(plan.queries_of(out / total, heads).astype(q.dtype), OUTPUT_NAME)
    return out, (q_blocks, k_blocks, v_blocks, kv_lengths, out, lse)


def _tiles_backward(plan: _Tiles, residuals, out_bar):
    q_blocks, k_blocks, v_blocks, kv_lengths, out, lse = residuals
    (batch, _, heads, head_dim), kv_heads = out.shape, k_blocks.shape[2]
    per_kv_head, dtype, scale = heads // kv_heads, _accumulator(out.dtype), head_dim**-0.5
    delta = plan.query_blocks(_row_products(out_bar, out, dtype), kv_heads)
    g_blocks = plan.query_blocks(out_bar.astype(out.dtype), kv_heads)
    q_t, g_t, k_t, lse_t, delta_t = map(_transposed, (q_blocks, g_blocks, k_blocks, lse, delta))

    def tile(carry, pair, masked):
        dq_t, dk, dv = carry
        i, j = pair
        scores = jnp.matmul(k_blocks[j], q_t[i], preferred_element_type=dtype)
        if masked:
            scores = jnp.where(_transposed(plan.mask(i, j, per_kv_head, kv_lengths)), scores, _MASKED)
        weights = jnp.exp(scores * scale - lse_t[i])
        d_weights = jnp.matmul(v_blocks[j], g_t[i], preferred_element_type=dtype)
        d_scores = (weights * (d_weights - delta_t[i])).astype(out.dtype)
        dv = _put(dv, j, dv[j] + jnp.matmul(weights.astype(v_blocks.dtype), g_blocks[i], preferred_element_type=dtype))
        dk = _put(dk, j, dk[j] + jnp.matmul(d_scores, q_blocks[i], preferred_element_type=dtype))
        dq_t = _put(dq_t, i, dq_t[i] + jnp.matmul(k_t[j], d_scores, preferred_element_type=dtype))
        return dq_t, dk, dv

    queries = plan.blocks_q, batch, kv_heads, head_dim, per_kv_head * plan.block_q
    keys = plan.blocks_k, batch, kv_heads, plan.block_k, head_dim
    start = tuple(_filled(0, shape, out, dtype) for shape in (queries, keys, keys))
    dq_t, dk, dv = plan.scan(tile, start, padded=kv_lengths is not None)
    dq, dk, dv = plan.queries_of(_transposed(dq_t), heads) * scale, plan.keys_of(dk) * scale, plan.keys_of(dv)
    return dq.astype(out.dtype), dk.astype(k_blocks.dtype), dv.astype(v_blocks.dtype), None


_in_tiles.defvjp(_tiles_forward, _tiles_backward)


def _put(x, i, value):
    """x with x[i] = value: without the check of bounds that `x.at[i].set` compiles to."""
    return lax.dynamic_update_index_in_dim(x, value, i, 0)


def _filled(value: float, shape: tuple[int, ...], like: Array, dtype) -> Array:
    """What a loop begins with, varying over the mesh (inside `parallel_attention`) as `like` does."""
    return vary(jnp.full(shape, value, dtype), axes_of(like))
