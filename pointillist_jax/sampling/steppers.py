"""What one point costs the backbone: the seam between the sampling loop and a model (DESIGN §6).

The loop (`sampling/loop.py`) knows points, grammar, keys and ends; a stepper knows one kind of model. Its methods are
pure; the stepper itself is a frozen dataclass, so that jitted functions take it as a static argument.

    weights(params)            what a step reads, once per call of `generate`, in the layout of its products
    memory(weights, context)   keys and values of the condition, once per subject; every leaf is [B, …]
    cache(batch)               an empty cache; every leaf is [B, …]
    point(weights, cache, memory, hidden, age, choose) -> (cache, hidden [B,D], states [B,4,D])

`point` makes one point: it calls `choose(slot, logits)` for slots 0, 1, 2, 3 in this order, each time with the logits
of the slot's classes (the coordinates and then E at x; the coordinates; the coordinates; the faces), and gets the class
of every row. `hidden` is what it returned for the point before (zeros at first), `states` what the Gaussian decoder is
given. `age` [B] counts the points each row has behind it, S S S S as one: rows differ, for subjects come and go. At age
0 the stepper feeds S S S S, and what is chosen is ignored. The row's place in the ring follows from its age alone, so
that what it computes does not depend, even in rounding, on when it began.

Nothing in a cache is ever cleared or moved: a row sees only the places that its age says it has written.

Letters: B batch, D width, S context, K kv heads, R query heads per kv head, H head dim, W window, C classes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pointillist_jax.configs import ModelConfig
from pointillist_jax.files import UserError
from pointillist_jax.models.ar import accumulator, embed_tokens, norm_context, output_tables
from pointillist_jax.models.blocks import cast_layer
from pointillist_jax.models.layers import Params, rms_norm, rope_angles, rotate, unstack_layers
from pointillist_jax.sharding import constrain

CACHE_DTYPES = ("float32", "bfloat16", "float64", "int8")
_MASKED = -1e30  # Finite: a row of a batch that stands idle must not become NaN.

Choose = Callable[[int, Float[Array, "B C"]], Int[Array, "B"]]


class Stepper(Protocol):
    """See the module's docstring."""

    config: ModelConfig

    def weights(self, params: Params) -> Any: ...

    def memory(self, weights: Any, context: Array, lengths: Array) -> Any: ...

    def cache(self, batch: int) -> Any: ...

    def point(
        self, weights: Any, cache: Any, memory: Any, hidden: Array, age: Array, choose: Choose
    ) -> tuple[Any, Array, Array]: ...


def make_stepper(config: ModelConfig, cache_dtype: str = "") -> Stepper:
    """The stepper of a model. `cache_dtype`: that of the computation by default.

    Raises:
      UserError: an unknown dtype.
    """
    cache_dtype = cache_dtype or config.dtype
    if cache_dtype not in CACHE_DTYPES:
        raise UserError(f"cache_dtype={cache_dtype!r} must be one of {', '.join(CACHE_DTYPES)}.")
    if config.step == "point":
        from pointillist_jax.sampling.point_stepper import PointStepper  # It is made of this file's parts.

        return PointStepper(config, cache_dtype)
    return TokenStepper(config, cache_dtype)


class Weights(NamedTuple):
    """Attributes:
    layers: one dict per layer, products that share an input fused.
    inputs: embeddings of the classes of each slot, [C, D].
    start: [4, D] embeddings of S S S S.
    outputs: classifier of each slot, [D, C or a little more].
    final_norm, context_norm: [D].
    """

    layers: tuple[Params, ...]
    inputs: tuple[Array, ...]
    start: Array
    outputs: tuple[Array, ...]
    final_norm: Array
    context_norm: Array


class Memory(NamedTuple):
    """Keys and values [B,K,S,H] of the condition, one pair per layer, and which of its tokens are real."""

    layers: tuple[tuple[Array, Array], ...]
    valid: Bool[Array, "B S"]


@dataclasses.dataclass(frozen=True)
class TokenStepper:
    """The paper's model: four steps of the backbone per point, one per token.

    Attributes:
      config: of the model; a token sees itself and `config.window` - 1 tokens before it.
      cache_dtype: of the cached keys and values; int8 has one scale per token and head.
    """

    config: ModelConfig
    cache_dtype: str

    def weights(self, params: Params) -> Weights:
        config, ids = self.config, self.config.tokenizer
        tables = output_tables(params, dataclasses.replace(config, loss_support="slot"))
        values = (
            jnp.append(jnp.arange(ids.bins), ids.eos),
            jnp.arange(ids.bins),
            jnp.arange(ids.bins),
            ids.bins + jnp.arange(ids.num_faces),
        )
        layers = params["layers"]
        if not isinstance(layers, (tuple, list)):
            layers = unstack_layers(layers)
        return Weights(
            layers=tuple(fuse_layer(cast_layer(layer, config.dtype), config) for layer in layers),
            inputs=tuple(embed_tokens(params, config, v, jnp.full(v.shape, s)) for s, v in enumerate(values)),
            start=embed_tokens(params, config, jnp.full(4, ids.bos), jnp.arange(4)),
            outputs=tuple(table.rows.T for table in tables),
            final_norm=params["final_norm"],
            context_norm=params["context_norm"],
        )

    def memory(self, weights: Weights, context: Float[Array, "B S D"], lengths: Int[Array, "B"]) -> Memory:
        y = norm_context({"context_norm": weights.context_norm}, self.config, context)
        layers = []
        for layer in weights.layers:
            p = layer["cross_attention"]
            kv = jnp.einsum("BSD,DKPH->PBKSH", y, p["kv"])
            k = rms_norm(kv[0], p["key_norm"]) if "key_norm" in p else kv[0]
            layers.append((_by_heads(k), _by_heads(kv[1])))
        return Memory(tuple(layers), jnp.arange(context.shape[1]) < lengths[:, None])

    def cache(self, batch: int) -> tuple[Params, ...]:
        config, names = self.config, ("key", "value")
        shape = batch, config.num_kv_heads, config.window
        layer = {name: jnp.zeros((*shape, config.head_dim), self.cache_dtype) for name in names}
        if self.cache_dtype == "int8":
            layer |= {f"{name}_scale": jnp.zeros(shape, accumulator(config)) for name in names}
        return tuple({k: _without_ones(_by_heads(v)) for k, v in layer.items()} for _ in range(config.layers))

    def point(
        self, weights: Weights, cache: Any, memory: Memory, hidden: Array, age: Array, choose: Choose
    ) -> tuple[Any, Array, Array]:
        states, starting = [], (age == 0)[:, None]
        for slot in range(4):
            with jax.named_scope(f"token_{'xyzb'[slot]}"):
                # Slots are unrolled, so every product has the size of its slot and nothing is padded.
                classes = weights.inputs[slot].shape[0]
                logits = jnp.matmul(hidden, weights.outputs[slot], preferred_element_type=accumulator(self.config))
                value = choose(slot, logits[:, :classes])
                x = jnp.where(starting, weights.start[slot], weights.inputs[slot][value])
                cache, hidden = self.backbone(weights, cache, memory, x, 4 * age + slot)
                states.append(hidden)
        return cache, hidden, jnp.stack(states, axis=1)

    def backbone(
        self, weights: Weights, cache: Any, memory: Memory, x: Float[Array, "B D"], position: Int[Array, "B"]
    ) -> tuple[Any, Float[Array, "B D"]]:
        """All layers for one input per row, which stands at `position` of its sequence: (cache, normed output)."""
        config = self.config
        place = position % config.window
        seen = jnp.arange(config.window) <= position[:, None]
        angles = rope_angles(position, config.head_dim, config.rope_theta, accumulator(config))
        new = []
        for layer, layer_cache, context_kv in zip(weights.layers, cache, memory.layers, strict=True):
            x, layer_cache = cached_layer(layer, config, x, angles, context_kv, memory.valid, layer_cache, place, seen)
            new.append(layer_cache)
        return tuple(new), rms_norm(x, weights.final_norm)


def fuse_layer(layer: Params, config: ModelConfig) -> Params:
    """Parameters of one layer with queries, keys and values (and gate and up) as one matrix each.

    On a GPU a step at batch 1 is bounded by the number of kernels. Heads stay an axis, so that a mesh can slice them.
    """
    K, R = config.num_kv_heads, config.heads // config.num_kv_heads
    H, D = config.head_dim, config.width

    def attention(p: Params, parts: dict[str, tuple[str, ...]]) -> Params:
        whole = {"query": p["query"].reshape(D, K, R, H), "key": p["key"][:, :, None], "value": p["value"][:, :, None]}
        fused = {name: jnp.concatenate([whole[x] for x in names], axis=2) for name, names in parts.items()}
        fused = {name: constrain(w, None, "kv_heads", None, None) for name, w in fused.items()}
        fused["out"] = constrain(p["out"].reshape(K, R, H, D), "kv_heads", None, None, None)
        return fused | {name: w for name, w in p.items() if w.ndim == 1}

    cross = attention(layer["cross_attention"], {"query": ("query",), "kv": ("key", "value")})
    own = attention(layer["self_attention"], {"qkv": ("query", "key", "value")})
    if config.qk_norm:
        own["qk_norm"] = jnp.stack([own.pop("query_norm")] * R + [own.pop("key_norm")])
    mlp = dict(layer["mlp"])
    up = [mlp.pop(name) for name in ("gate", "up") if name in mlp]
    mlp["up"] = constrain(jnp.stack(up, axis=1), None, None, "mlp")
    mlp["down"] = constrain(mlp["down"], "mlp", None)
    return {"cross_attention": cross, "self_attention": own, "mlp": mlp}


def cached_layer(
    layer: Params,
    config: ModelConfig,
    x: Float[Array, "B D"],
    angles: tuple[Array, Array],
    context_kv: tuple[Array, Array],
    context_valid: Bool[Array, "B S"],
    cache: Params,
    place: Int[Array, "B"],
    seen: Bool[Array, "B W"],
) -> tuple[Float[Array, "B D"], Params]:
    """`models.ar.decoder_layer` for one token per row, on `fuse_layer`'s parameters.

    Args:
      cache: of this layer; the token's key and value are written at `place` of the ring.
      seen: which places a row attends to, its own among them.
    """

    def cross(x):
        with jax.named_scope("cross_attention"):
            p = layer["cross_attention"]
            q = jnp.einsum("BD,DKRH->BKRH", rms_norm(x, p["norm"]), p["query"])
            q = rms_norm(q, p["query_norm"]) if "query_norm" in p else q
            keys, values = context_kv
            out = _attend(q, keys, values, context_valid)
            return x + jnp.einsum("BKRH,KRHD->BD", out, p["out"])

    def own(x):
        with jax.named_scope("self_attention"):
            p = layer["self_attention"]
            qkv = jnp.einsum("BD,DKPH->BKPH", rms_norm(x, p["norm"]), p["qkv"])
            qk, v = qkv[:, :, :-1], qkv[:, :, -1]
            # qk_norm's scale is [R+1, H]: one row per query head of a group, one for the key.
            qk = rms_norm(qk, p["qk_norm"]) if "qk_norm" in p else qk
            qk = rotate(qk.reshape(len(qk), -1, config.head_dim), angles).reshape(qk.shape)
            written = write(cache, qk[:, :, -1], v, place)
            out = _attend(qk[:, :, :-1], written["key"], written["value"], seen,
                          written.get("key_scale"), written.get("value_scale"))  # fmt: skip
            return x + jnp.einsum("BKRH,KRHD->BD", out, p["out"]), written

    if config.order == "cross_first":
        x, cache = own(cross(x))
    else:
        x, cache = own(x)
        x = cross(x)
    with jax.named_scope("mlp"):
        p = layer["mlp"]
        y = jnp.einsum("BD,DPF->BPF", rms_norm(x, p["norm"]), p["up"])
        y = jax.nn.gelu(y[:, 0]) * y[:, 1] if config.mlp == "gated" else jax.nn.gelu(y[:, 0])
        return x + y @ p["down"], cache


def write(cache: Params, key: Float[Array, "B K H"], value: Float[Array, "B K H"], place: Int[Array, "B"]) -> Params:
    """One layer's cache with a token's key and value at each row's `place`."""
    new = {"key": key, "value": value}
    if "key_scale" in cache:
        for name in ("key", "value"):
            wide = new[name].astype(cache["key_scale"].dtype)
            scale = jnp.maximum(jnp.abs(wide).max(-1), 1e-12) / 127
            new[name], new[f"{name}_scale"] = jnp.round(wide / scale[..., None]), scale
    new = {name: _without_ones(x.astype(cache[name].dtype)[:, :, None]) for name, x in new.items()}
    axis = int(key.shape[1] > 1)
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis)
    if len(key) == 1:
        return {name: put(cache[name], new[name], place[0]) for name in cache}
    return {name: jax.vmap(put)(cache[name], new[name], place) for name in cache}


def _attend(q, keys, values, valid, key_scale=None, value_scale=None):
    """q [B,K,R,H] against keys and values [B,K,S,H]; scores and softmax in float32 at least."""
    shape, dtype = q.shape, jnp.promote_types(q.dtype, jnp.float32)
    product = {"preferred_element_type": dtype}
    q, keys, values = (_without_ones(x) for x in (q * shape[-1] ** -0.5, keys, values))
    scores = jnp.einsum("...RH,...SH->...RS", q, keys.astype(q.dtype), **product)
    if key_scale is not None:
        scores = scores * key_scale[..., None, :]
    seen = jnp.broadcast_to(valid[:, None, None], (*shape[:3], valid.shape[-1]))
    scores = jnp.where(_without_ones(seen), scores, _MASKED)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    if value_scale is not None:
        weights = weights * value_scale[..., None, :]
    out = jnp.einsum("...RS,...SH->...RH", weights.astype(q.dtype), values.astype(q.dtype), **product)
    return (out / total).astype(q.dtype).reshape(shape)


def _without_ones(x: Float[Array, "B K *s"]) -> Array:
    """Drops B and K where they are one.

    XLA strips them before a product. Of a cache that is also written it would make two copies at every write, one
    in each shape.
    """
    return x.reshape(tuple(n for n in x.shape[:2] if n > 1) + x.shape[2:]) if x.ndim > 2 else x


def _by_heads(x):
    return constrain(x, "batch", "kv_heads", *(None,) * (x.ndim - 2))
