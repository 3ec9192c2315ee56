"""Attention behind one function, with three implementations (DESIGN §6, facts/jax.md).

`cudnn` is the flash attention of NVIDIA GPUs, `chunked` is memory-linear and runs everywhere, `xla` the plain oracle.

Letters: B batch, T queries, S keys, N heads, K kv heads, R = N / K query heads per kv head, H head dim.
"""

from __future__ import annotations

import functools
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
# As many tiles are written out rather than looped over, which spares slices, copies and writes into larger arrays.
_WRITTEN_OUT = 4


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
        for their caches (measured in experiments/LOG.md).

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
        return _chunked(q, k, v, kv_lengths, _Plan.make(q.shape[1], k.shape[1], causal, window, block_size))


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


# Blocks of a sequence: stacked on a first axis, or, where tiles are few, a list of them.
Tiles = Array | list[Array]


class _Plan(NamedTuple):
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
    def make(cls, queries: int, keys: int, causal: bool, window: int | None, block_size: int) -> _Plan:
        block_k = _even_block(keys, block_size)
        # Few keys (a condition): as many more queries.
        block_q = _even_block(queries, block_size * max(block_size // block_k, 1))
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
        """`tile(carry, (i, j), masked)` over all tiles, masked where they need it; `padded`: all do.

        `carry`: of arrays stacked along blocks, or of lists of blocks when the tiles are written out.
        """
        for masked, pairs in ((padded, self.whole), (True, self.cut)):
            if self.written_out:
                for pair in pairs:
                    carry = tile(carry, pair, masked=masked)
            elif pairs:
                step = lambda carry, pair, masked=masked: (tile(carry, pair, masked=masked), None)  # noqa: E731
                carry, _ = lax.scan(step, carry, tuple(np.array(pairs, np.int32).T))
        return carry

    def filled(self, value: float, blocks: int, shape: tuple[int, ...], like: Array, dtype) -> Tiles:
        """Blocks of `shape` to begin with, varying over the mesh (inside `parallel_attention`) as `like` does."""
        block = vary(jnp.full(shape if self.written_out else (blocks, *shape), value, dtype), axes_of(like))
        return [block] * blocks if self.written_out else block

    @property
    def blocks_q(self) -> int:
        return -(-self.queries // self.block_q)

    @property
    def blocks_k(self) -> int:
        return -(-self.keys // self.block_k)

    @property
    def written_out(self) -> bool:
        return len(self.whole) + len(self.cut) <= _WRITTEN_OUT

    def mask(self, i, j, per_kv_head: int, kv_lengths) -> Array:
        """[B or 1, 1, R·block_q, block_k] of block (i, j): which keys a query sees."""
        t = jnp.tile(i * self.block_q + jnp.arange(self.block_q), per_kv_head)[:, None]
        s = j * self.block_k + jnp.arange(self.block_k)
        if kv_lengths is None:
            mask = (s < self.keys)[None, None, None]
        else:
            mask = (s < jnp.minimum(kv_lengths, self.keys)[:, None])[:, None, None]
        if self.causal:
            mask = mask & (s <= t)
        if self.window is not None:
            mask = mask & (s > t - self.window)
        return mask


def _even_block(length: int, block_size: int) -> int:
    """About `block_size`, chosen so that padding the length to whole blocks wastes little."""
    number = max(round(length / block_size), 1)
    if number == 1:
        return length
    return -(-length // (8 * number)) * 8


# Why a scan over tiles, and its own backward. Every tile lies in a CPU core's cache, tiles right of the diagonal cost
# nothing, one body is compiled however long the sequence is, and nothing of size T×S exists. In the backward the
# scores are made transposed ([keys, queries]), so that all five products are plain row-major ones: XLA's CPU product
# with a transposed left side runs at half the speed.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(q, k, v, kv_lengths, plan: _Plan):
    return _chunked_forward(q, k, v, kv_lengths, plan)[0]


def _chunked_forward(q, k, v, kv_lengths, plan: _Plan):
    (batch, _, heads, head_dim), kv_heads = q.shape, k.shape[2]
    per_kv_head, dtype, scale = heads // kv_heads, _accumulator(q.dtype), head_dim**-0.5
    q_tiles, k_tiles, v_tiles = _query_tiles(q, plan, kv_heads), _key_tiles(k, plan), _key_tiles(v, plan)
    keys_t = _transposed(k_tiles)

    def tile(carry, pair, masked):
        out, top, total = carry
        i, j = pair
        scores = jnp.matmul(q_tiles[i], keys_t[j], preferred_element_type=dtype)
        if masked:
            scores = jnp.where(plan.mask(i, j, per_kv_head, kv_lengths), scores, _MASKED)
        old_top = top[i]
        new_top = jnp.maximum(old_top, scores.max(-1, keepdims=True))
        weights = jnp.exp((scores - new_top) * scale)
        shrink = jnp.exp((old_top - new_top) * scale)
        product = jnp.matmul(weights.astype(v.dtype), v_tiles[j], preferred_element_type=dtype)
        total = _put(total, i, total[i] * shrink + weights.sum(-1, keepdims=True))
        return _put(out, i, out[i] * shrink + product), _put(top, i, new_top), total

    rows = batch, kv_heads, per_kv_head * plan.block_q
    start = [plan.filled(x, plan.blocks_q, (*rows, n), q, dtype) for x, n in ((0, head_dim), (_LOWEST, 1), (0, 1))]
    out, top, total = plan.scan(tile, tuple(start), padded=kv_lengths is not None)
    total = jax.tree.map(lambda x: jnp.where(x > 0, x, 1), total)  # No key at all: zeros, and no NaN in the gradient.
    lse = jax.tree.map(lambda top, total: checkpoint_name(top * scale + jnp.log(total), LSE_NAME), top, total)
    out = _merge(jax.tree.map(jnp.divide, out, total), q.shape, plan)
    out = checkpoint_name(out.astype(q.dtype), OUTPUT_NAME)
    return out, (q_tiles, k_tiles, v_tiles, kv_lengths, out, lse)


def _chunked_backward(plan: _Plan, residuals, out_bar):
    q_tiles, k_tiles, v_tiles, kv_lengths, out, lse = residuals
    (batch, _, heads, head_dim), kv_heads = out.shape, k_tiles[0].shape[1]
    key_shape = batch, plan.keys, kv_heads, head_dim
    per_kv_head, dtype, scale = heads // kv_heads, _accumulator(out.dtype), head_dim**-0.5
    g_tiles = _query_tiles(out_bar.astype(out.dtype), plan, kv_heads)
    delta = weighted_sum(out_bar.astype(dtype) * out.astype(dtype), jnp.ones(head_dim, dtype), (3,))[..., None]
    q_t, g_t, k_t, lse_t, delta_t = map(
        _transposed, (q_tiles, g_tiles, k_tiles, lse, _query_tiles(delta, plan, kv_heads))
    )

    def tile(carry, pair, masked):
        dq_t, dk, dv = carry
        i, j = pair
        scores = jnp.matmul(k_tiles[j], q_t[i], preferred_element_type=dtype)
        if masked:
            mask = jnp.swapaxes(plan.mask(i, j, per_kv_head, kv_lengths), -1, -2)
            scores = jnp.where(mask, scores, _MASKED)
        weights = jnp.exp(scores * scale - lse_t[i])
        d_weights = jnp.matmul(v_tiles[j], g_t[i], preferred_element_type=dtype)
        d_scores = (weights * (d_weights - delta_t[i])).astype(out.dtype)
        dv = _put(dv, j, dv[j] + jnp.matmul(weights.astype(v_tiles[j].dtype), g_tiles[i], preferred_element_type=dtype))
        dk = _put(dk, j, dk[j] + jnp.matmul(d_scores, q_tiles[i], preferred_element_type=dtype))
        dq_t = _put(dq_t, i, dq_t[i] + jnp.matmul(k_t[j], d_scores, preferred_element_type=dtype))
        return dq_t, dk, dv

    queries = batch, kv_heads, head_dim, per_kv_head * plan.block_q
    keys = batch, kv_heads, plan.block_k, head_dim
    shapes = (plan.blocks_q, queries), (plan.blocks_k, keys), (plan.blocks_k, keys)
    start = [plan.filled(0, blocks, shape, out, dtype) for blocks, shape in shapes]
    dq_t, dk, dv = plan.scan(tile, tuple(start), padded=kv_lengths is not None)
    dq = _merge(_transposed(dq_t), out.shape, plan) * scale
    dk, dv = _merge_keys(dk, key_shape) * scale, _merge_keys(dv, key_shape)
    return dq.astype(out.dtype), dk.astype(k_tiles[0].dtype), dv.astype(v_tiles[0].dtype), None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _put(x, i, value):
    """x, an array or a list, with x[i] = value: without the check of bounds that `x.at[i].set` compiles to."""
    if isinstance(x, list):
        return [*x[:i], value, *x[i + 1 :]]
    return lax.dynamic_update_index_in_dim(x, value, i, 0)


def _query_tiles(x, plan: _Plan, kv_heads: int) -> Tiles:
    """[B,T,N,H] → blocks of [B, K, R·block, H]."""
    batch, queries, heads, dim = x.shape
    x = jnp.pad(x, ((0, 0), (0, plan.blocks_q * plan.block_q - queries), (0, 0), (0, 0)))
    return _cut(x.reshape(batch, -1, plan.block_q, kv_heads, heads // kv_heads, dim), (0, 2, 3, 1, 4), plan)


def _key_tiles(x, plan: _Plan) -> Tiles:
    """[B,S,K,H] → blocks of [B, K, block, H]."""
    batch, keys, kv_heads, dim = x.shape
    x = jnp.pad(x, ((0, 0), (0, plan.blocks_k * plan.block_k - keys), (0, 0), (0, 0)))
    return _cut(x.reshape(batch, -1, plan.block_k, kv_heads, dim), (0, 2, 1, 3), plan)


def _cut(x, order: tuple[int, ...], plan: _Plan) -> Tiles:
    """Blocks along axis 1, each transposed to `order`; what then lies between first two axes and last is one."""

    def tile(block):
        block = block.transpose(order)
        return block.reshape(*block.shape[:2], -1, block.shape[-1])

    if plan.written_out:  # Cut first: each block is then copied once, not with all and by itself.
        return [tile(x[:, i]) for i in range(x.shape[1])]
    return jax.vmap(tile, in_axes=1)(x)


def _merge(tiles: Tiles, shape, plan: _Plan):
    """The inverse of `_query_tiles`."""
    batch, queries, heads, dim = shape

    def block(x):
        x = x.reshape(batch, x.shape[1], -1, plan.block_q, dim).transpose(0, 3, 1, 2, 4)
        return x.reshape(batch, plan.block_q, heads, dim)

    return _joined(tiles, block)[:, :queries]


def _merge_keys(tiles: Tiles, shape):
    """The inverse of `_key_tiles`."""
    return _joined(tiles, lambda x: x.transpose(0, 2, 1, 3))[:, : shape[1]]


def _joined(tiles: Tiles, block: Callable[[Array], Array]) -> Array:
    """`block` of every tile, [B, n, …], side by side along n."""
    if isinstance(tiles, list):
        return jnp.concatenate([block(x) for x in tiles], axis=1)
    blocks = jax.vmap(block, out_axes=1)(tiles)
    return blocks.reshape(blocks.shape[0], -1, *blocks.shape[3:])


def _transposed(tiles: Tiles) -> Tiles:
    return jax.tree.map(lambda x: jnp.swapaxes(x, -1, -2), tiles)
