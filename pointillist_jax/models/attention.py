"""Attention behind one function, with three implementations (DESIGN §6, facts/jax.md).

`cudnn` is the flash attention of NVIDIA GPUs, `chunked` is memory-linear and runs everywhere, `xla` the plain oracle.

Letters: B batch, T queries, S keys, N heads, K kv heads, R = N / K query heads per kv head, H head dim.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pointillist_jax.configs import ATTENTIONS
from pointillist_jax.files import UserError
from pointillist_jax.models.chunked_attention import MASKED, accumulator, chunked_attention
from pointillist_jax.sharding import constrain, logical_spec, parts_of
from renderer_bridge.varying import axes_of, vary


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool = False,
    window: int | None = None,
    kv_lengths: Int[Array, "B"] | None = None,
    implementation: str = "auto",
    block_size: int = 576,
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
      UserError: shapes that do not fit, an implementation that is unknown or cannot run here.
    """
    _check(q, k, v, causal, window, implementation)
    if window is not None and window >= k.shape[1]:
        window = None
    if implementation == "auto":
        implementation = "cudnn" if _runs_cudnn(q.dtype) else "chunked"
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
        return chunked_attention(q, k, v, kv_lengths, causal, window, block_size)


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
    dtype = accumulator(q.dtype)
    scores = jnp.einsum("BKRH,BSKH->BKRS", grouped * head_dim**-0.5, k, preferred_element_type=dtype)
    if mask is not None:
        scores = jnp.where(jnp.broadcast_to(mask, k.shape[:2])[:, None, None], scores, MASKED)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    out = jnp.einsum("BKRS,BSKH->BKRH", weights.astype(v.dtype), v, preferred_element_type=dtype)
    return (out / weights.sum(-1, keepdims=True)).reshape(q.shape).astype(q.dtype)


def require_attention(implementation: str, dtype: Any) -> None:
    """Raises UserError for an implementation that is unknown, or that cannot run here in this dtype."""
    if implementation not in ATTENTIONS:
        raise UserError(f"no attention {implementation!r}; there are {', '.join(ATTENTIONS)}.")
    if implementation == "cudnn" and not _runs_cudnn(dtype):
        raise UserError(
            f"attention 'cudnn' needs a GPU and bfloat16, here are {jax.default_backend()} and {jnp.dtype(dtype)}: "
            "take 'auto'."
        )


def _runs_cudnn(dtype: Any) -> bool:
    return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and jax.default_backend() == "gpu"


def _check(q, k, v, causal, window, implementation):
    require_attention(implementation, q.dtype)
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


def _dense(q, k, v, causal, window, kv_lengths):
    batch, queries, _, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    dtype = accumulator(q.dtype)
    grouped = q.reshape(batch, queries, kv_heads, -1, head_dim)
    scores = jnp.einsum("BTKRH,BSKH->BKRTS", grouped, k, preferred_element_type=dtype) * head_dim**-0.5
    t, s = jnp.arange(queries)[:, None], jnp.arange(keys)
    mask = jnp.ones((1, queries, keys), bool)
    if causal:
        mask &= (s <= t) & (s > t - (window or keys))
    if kv_lengths is not None:
        mask = mask & (s < kv_lengths[:, None, None])
    mask = mask[:, None, None]
    weights = jnp.where(mask, jax.nn.softmax(jnp.where(mask, scores, MASKED)), 0)
    out = jnp.einsum("BKRTS,BSKH->BTKRH", weights.astype(v.dtype), v, preferred_element_type=dtype)
    return out.reshape(q.shape).astype(q.dtype)
