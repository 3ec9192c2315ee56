"""The residual branches that both transformers are made of: their parameters, projections, feed-forward network.

Letters: B batch, T tokens, D width, N heads, K kv heads, H head dim, F feed-forward width.
"""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Float

from pointillist_jax.models.layers import Params, ParamSpec, cast, matrix, ones, product, products, rms_norm


def attention_specs(
    width: int,
    heads: int,
    head_dim: int,
    gain: float,
    *,
    kv_heads: int | None = None,
    source_width: int | None = None,
    qk_norm: bool = False,
) -> dict[str, ParamSpec]:
    """Parameters of an attention branch; keys and values are made from `source_width` channels (`width`)."""
    D, N, H, S, K = width, heads, head_dim, source_width or width, kv_heads or heads
    key_heads = "heads" if kv_heads is None else "kv_heads"
    specs = {
        "norm": ones(D),
        "query": matrix((D, N, H), ("embed", "heads", "head_dim"), D),
        "key": matrix((S, K, H), ("embed", key_heads, "head_dim"), S),
        "value": matrix((S, K, H), ("embed", key_heads, "head_dim"), S),
        "out": matrix((N, H, D), ("heads", "head_dim", "embed"), N * H, gain),
    }
    return {**specs, "query_norm": ones(H), "key_norm": ones(H)} if qk_norm else specs


def mlp_specs(width: int, hidden: int, gain: float, *, gated: bool = True) -> dict[str, ParamSpec]:
    """Parameters of a feed-forward branch."""
    specs = {
        "norm": ones(width),
        "up": matrix((width, hidden), ("embed", "mlp"), width),
        "down": matrix((hidden, width), ("mlp", "embed"), hidden, gain),
    }
    return {**specs, "gate": matrix((width, hidden), ("embed", "mlp"), width)} if gated else specs


def cast_layer(layer: Params, dtype: Any) -> Params:
    """One layer's matrices in the dtype of the computation; its norms stay float32, as they are computed."""
    return {name: {k: v if v.ndim == 1 else cast(v, dtype) for k, v in p.items()} for name, p in layer.items()}


def project_heads(p: Params, y: Float[Array, "B T D"], *names: str) -> list[Float[Array, "B T _ H"]]:
    """ "query", "key" or "value" of `y`, as named, normed where the model norms them."""
    heads = products(y, *(p[name] for name in names))
    norms = [p.get(f"{name}_norm") for name in names]
    return [x if norm is None else rms_norm(x, norm) for x, norm in zip(heads, norms, strict=True)]


def project_out(p: Params, out: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
    return product(out.reshape(*out.shape[:-2], -1), p["out"].reshape(-1, p["out"].shape[-1]))


def mlp(p: Params, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
    """The feed-forward branch, its norm included."""
    with jax.named_scope("mlp"):
        y = rms_norm(x, p["norm"])
        if "gate" in p:
            gate, up = products(y, p["gate"], p["up"])
            return product(jax.nn.gelu(gate) * up, p["down"])
        return product(jax.nn.gelu(product(y, p["up"])), p["down"])
