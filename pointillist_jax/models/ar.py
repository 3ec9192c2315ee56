"""The autoregressive point transformer (DESIGN §6; paper §4.1).

Decoder-only: every layer has cross-attention to the condition, causal self-attention and a feed-forward network, all
pre-norm. `PointTransformer` holds the parameters; the functions below it are pure and shared with generation, which
passes its own `attend` to `decoder_layer` and works on `unstack_layers(params["layers"])`.

Letters: B batch, T tokens, S context, D width, N heads, K kv heads, H head dim, F feed-forward, V vocabulary.
Token t of a window stands at slot t % 4 (x, y, z, b): windows start at a multiple of four (DESIGN §6).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pointillist_jax.configs import ModelConfig
from pointillist_jax.models.attention import attention, parallel_attention
from pointillist_jax.models.blocks import attention_specs, cast_layer, mlp, mlp_specs, project_heads, project_out
from pointillist_jax.models.chunked_attention import LSE_NAME, OUTPUT_NAME
from pointillist_jax.models.layers import (
    Params,
    ParamSpec,
    computed_once,
    declare,
    matrix,
    ones,
    rms_norm,
    rope_angles,
    rotate,
    stack_specs,
    unstack_layers,
    zeros,
)
from pointillist_jax.sharding import constrain
from pointillist_jax.tokens import SLOTS

FOURIER_OCTAVES = 10  # Up to the Nyquist frequency of 1024 bins.
# (queries [B,T,N,H], keys [B,T,K,H], values [B,T,K,H]) → (output [B,T,N,H], anything the caller wants back)
SelfAttend = Callable[[Array, Array, Array], tuple[Array, Any]]
CrossAttend = Callable[[Array, Array, Array], Array]


class PointTransformer(nn.Module):
    """The point transformer's parameters, and its training forward.

    `init(key, tokens, context)` gives parameters boxed with logical axes (`sharding.shardings_for`); `nn.unbox` makes
    them plain. Layers are always stored stacked, so `scan_layers` may be changed at any time.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        context: Float[Array, "B S D"],
        positions: Int[Array, "B T"] | None = None,
        context_lengths: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Final hidden states after the last norm; `output_tables` turns them into logits. See `hidden_states`."""
        return hidden_states(declare(self, param_specs(self.config)), self.config, tokens, context, positions,
                             context_lengths)  # fmt: skip


def param_specs(config: ModelConfig) -> dict[str, Any]:
    """Every parameter of the model: shape, logical axes, initial distribution."""
    D, V = config.width, config.tokenizer.padded_vocab_size
    table = functools.partial(ParamSpec, axes=("vocab", "table_embed"), init=nn.initializers.normal(D**-0.5))
    specs: dict[str, Any] = {
        "embedding": table((V, D)),
        "context_norm": ones(D),
        "layers": stack_specs(_layer_specs(config), config.layers),
        "final_norm": ones(D),
    }
    if config.slot_embedding:
        specs["slot_embedding"] = zeros(4, D, axes=(None, "table_embed"))
    if not config.tied_head:
        specs["head"] = table((V, D))
    if config.coord_tables == "fourier_tied":
        # Rows start at zero, so neighbouring bins start out alike; 10 of the 20 features' variances add up to one.
        specs["coord_rows"] = ParamSpec((3, config.bins, D), (None, "vocab", "table_embed"), nn.initializers.zeros)
        deviation = (D * FOURIER_OCTAVES) ** -0.5
        fourier = nn.initializers.normal(deviation)
        specs["coord_fourier"] = ParamSpec((3, 2 * FOURIER_OCTAVES, D), (None, None, "table_embed"), fourier)
    if config.step == "point":
        specs["point_embedding"] = matrix((4, D, D), (None, "table_embed", "embed"), 4 * D)
        gain = (4 * config.slot_layers) ** -0.5
        branch = mlp_specs(D, config.mlp_width, gain, gated=config.mlp == "gated")
        mlps = stack_specs(branch, config.slot_layers)
        specs["slot_heads"] = {slot: {"mlps": mlps, "norm": ones(D)} for slot in SLOTS}
    return specs


def _layer_specs(config: ModelConfig) -> dict[str, Any]:
    D, N, H = config.width, config.heads, config.head_dim
    # Three residual branches per layer: their sum keeps the size of one.
    gain = (3 * config.layers) ** -0.5

    attention_branch = functools.partial(
        attention_specs, D, N, H, gain, kv_heads=config.num_kv_heads, qk_norm=config.qk_norm
    )
    return {
        "cross_attention": attention_branch(),
        "self_attention": attention_branch(),
        "mlp": mlp_specs(D, config.mlp_width, gain, gated=config.mlp == "gated"),
    }


def hidden_states(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    context: Float[Array, "B S D"],
    positions: Int[Array, "B T"] | None = None,
    context_lengths: Int[Array, "B"] | None = None,
) -> Float[Array, "B T D"]:
    """Teacher-forced forward: the final hidden state at every token, after the last norm.

    Args:
      params: of `PointTransformer`; `layers` stacked, or a tuple of one dict per layer.
      tokens: the first stands at an x slot. A token sees itself and `config.window` - 1 tokens before it, so padding
        at the end changes nothing before it.
      context: the condition (`models/condition.py`).
      positions: absolute position of each token in its sequence; 0 … T-1 by default.
      context_lengths: for contexts padded to one length.

    With `config.step` "point" the result means the same, token by token (`models/point_step.py`): the state at a
    token is what predicts the next one.
    """
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if config.step == "point":
        from pointillist_jax.models.point_step import point_hidden_states  # It is made of this file's parts.

        return point_hidden_states(params, config, tokens, context, positions, context_lengths)
    x = embed_tokens(params, config, tokens, None if tokens.shape[1] % 4 == 0 else jnp.arange(tokens.shape[1]) % 4)
    return run_layers(params, config, x, context, positions, context_lengths)


def run_layers(
    params: Params,
    config: ModelConfig,
    x: Float[Array, "B T D"],
    context: Float[Array, "B S D"],
    positions: Int[Array, "B T"],
    context_lengths: Int[Array, "B"] | None = None,
) -> Float[Array, "B T D"]:
    """All layers and the last norm over embedded steps; a step sees itself and `config.window` - 1 before it."""
    make_angles = functools.partial(
        rope_angles, head_dim=config.head_dim, theta=config.rope_theta, dtype=accumulator(config)
    )
    angles = computed_once(make_angles, positions)
    context = norm_context(params, config, context)

    how = {"implementation": config.attention, "block_size": config.attention_block}

    def attend_self(q, k, v):
        return parallel_attention(q, k, v, causal=True, window=config.window, **how), None

    attend_cross = functools.partial(parallel_attention, causal=False, kv_lengths=context_lengths, **how)

    def run_layer(x, layer):
        layer = cast_layer(layer, config.dtype)
        x, _ = decoder_layer(
            layer, config, x, angles, cross_keys_values(layer, config, context), attend_self, attend_cross
        )
        return constrain(x, "batch", "length", None), None

    run_layer = _remat(run_layer, config.remat)
    layers, x = params["layers"], constrain(x, "batch", "length", None)
    if config.scan_layers and not isinstance(layers, (tuple, list)):
        x, _ = jax.lax.scan(run_layer, x, layers)
    else:
        for layer in layers if isinstance(layers, (tuple, list)) else unstack_layers(layers):
            x, _ = run_layer(x, layer)
    return rms_norm(x, params["final_norm"])


def decoder_layer(
    layer: Params,
    config: ModelConfig,
    x: Float[Array, "B T D"],
    angles: tuple[Array, Array],
    context_kv: tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]],
    attend_self: SelfAttend,
    attend_cross: CrossAttend = attention,
) -> tuple[Float[Array, "B T D"], Any]:
    """One layer. Returns its output and whatever `attend_self` returned beside the attention (a cache, say).

    Args:
      layer: parameters of one layer in the dtype of the computation (`cast_layer`).
      angles: `rope_angles` of the tokens' absolute positions, [B, T, H/2] each.
      context_kv: `cross_keys_values`, computed once per sequence.
      attend_self: gets queries and keys already normed and rotated.
    """

    def cross(x):
        with jax.named_scope("cross_attention"):
            p = layer["cross_attention"]
            (q,) = project_heads(p, rms_norm(x, p["norm"]), "query")
            return x + project_out(p, attend_cross(q, *context_kv))

    def own(x):
        with jax.named_scope("self_attention"):
            p = layer["self_attention"]
            y = rms_norm(x, p["norm"])
            q, k, v = project_heads(p, y, "query", "key", "value")
            out, extra = attend_self(rotate(q, angles), rotate(k, angles), v)
            return x + project_out(p, out), extra

    if config.order == "cross_first":
        x, extra = own(cross(x))
    else:
        x, extra = own(x)
        x = cross(x)
    return x + mlp(layer["mlp"], x), extra


def cross_keys_values(layer: Params, config: ModelConfig, context: Float[Array, "B S D"]) -> tuple[Array, Array]:
    """Keys and values [B,S,K,H] of one layer's cross-attention; `context` has passed `norm_context`."""
    del config
    with jax.named_scope("context_kv"):
        return tuple(project_heads(layer["cross_attention"], context, "key", "value"))


def norm_context(params: Params, config: ModelConfig, context: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    return rms_norm(context.astype(config.dtype), params["context_norm"])


def embed_tokens(
    params: Params, config: ModelConfig, tokens: Int[Array, "*b"], slots: Int[Array, "*b"] | None
) -> Float[Array, "*b D"]:
    """Input embeddings in the dtype of the computation.

    Args:
      slots: 0–3, where each token stands; None: whole points lie along the last axis.
    """
    whole_points = slots is None
    if whole_points:
        slots = jnp.arange(tokens.shape[-1]) % 4
    with jax.named_scope("embed"):
        table = params["embedding"].astype(config.dtype)
        x = table[tokens]
        if config.coord_tables == "fourier_tied":
            coords = coordinate_tables(params, config)
            bins = config.bins
            row = jnp.minimum(slots, 2) * bins + jnp.minimum(tokens, bins - 1)
            x = jnp.where((tokens < bins)[..., None], coords.reshape(3 * bins, -1)[row], x)
        # Tables have rows of norm one, as a classifier wants them; the residual stream wants entries of size one.
        x = x * jnp.asarray(config.width**0.5, config.dtype)
        if config.slot_embedding:
            rows = params["slot_embedding"].astype(config.dtype)
            # By points: the gradient is then one sum over all of them, of four rows. The look-up's is one over the
            # batch first, and on several devices a row for every position would cross the network.
            x = (x.reshape(*x.shape[:-2], -1, *rows.shape) + rows).reshape(x.shape) if whole_points else x + rows[slots]
        return x


def coordinate_tables(params: Params, config: ModelConfig) -> Float[Array, "3 bins D"]:
    """Embedding and classifier rows of the x, y and z slots, in the dtype of the computation."""
    if config.coord_tables == "learned":
        table = params["embedding" if config.tied_head else "head"][: config.bins]
        return jnp.broadcast_to(table.astype(config.dtype), (3, *table.shape))
    features = jnp.asarray(_fourier_features(config.bins), accumulator(config))
    rows = params["coord_rows"] + jnp.einsum("bf,sfD->sbD", features, params["coord_fourier"])
    return rows.astype(config.dtype)


class OutputTable(NamedTuple):
    """The classifier of one slot.

    Attributes:
      rows: [C, D] in the dtype of the computation; logits are hidden · rows.
      num_classes: rows beyond it are padding.
      first_id: class c < `num_ids` stands for token first_id + c.
      num_ids: see above.
      eos_class: class that stands for E, or -1 if E is not among the classes or is one of `num_ids`.
    """

    rows: Float[Array, "C D"]
    num_classes: int
    first_id: int
    num_ids: int
    eos_class: int

    def labels(self, tokens: Int[Array, "*b"], eos: int) -> Int[Array, "*b"]:
        """Class of each token; -1 where this slot has none, which the loss leaves out."""
        inside = (tokens >= self.first_id) & (tokens < self.first_id + self.num_ids)
        labels = jnp.where(inside, tokens - self.first_id, -1)
        return jnp.where(tokens == eos, self.eos_class, labels) if self.eos_class >= 0 else labels


def output_tables(params: Params, config: ModelConfig) -> tuple[OutputTable, OutputTable, OutputTable, OutputTable]:
    """The classifiers of the x, y, z and b slots for `config.loss_support`.

    "slot": 1024 coordinates (and E at the x slot), or the faces. S, and the E after the first one, are certain and cost
    nothing. "vocab": all ids but P, at every slot.
    """
    ids, dtype = config.tokenizer, config.dtype
    classes = params["embedding" if config.tied_head else "head"].astype(dtype)
    coords = coordinate_tables(params, config)
    if config.loss_support == "vocab":
        # P is the last id, so it is left out by counting it as padding.
        rows = [classes] * 4
        if config.coord_tables != "learned":
            rows[:3] = [jnp.concatenate([coords[s], classes[ids.bins :]]) for s in range(3)]
        return tuple(OutputTable(r, ids.pad, 0, ids.pad, -1) for r in rows)
    # Matrix units want a multiple of eight.
    x_rows = jnp.concatenate([coords[0], classes[ids.eos][None], jnp.zeros((7, config.width), dtype)])
    x = OutputTable(x_rows, ids.bins + 1, 0, ids.bins, ids.bins)
    y, z = (OutputTable(coords[s], ids.bins, 0, ids.bins, -1) for s in (1, 2))
    b = OutputTable(classes[ids.bins : ids.bos], ids.num_faces, ids.bins, ids.num_faces, -1)
    return x, y, z, b


def accumulator(config: ModelConfig) -> Any:
    """The dtype of norms, softmax, angles and losses."""
    return jnp.promote_types(config.dtype, jnp.float32)


def _fourier_features(bins: int) -> np.ndarray:
    """[bins, 2 · octaves] float64: sin and cos of π 2^k u at the bins' centres u in (0, 1)."""
    centres = (np.arange(bins) + 0.5) / bins
    angles = np.pi * centres[:, None] * 2.0 ** np.arange(FOURIER_OCTAVES)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def _remat(function, policy: str):
    policies = jax.checkpoint_policies
    attention_only = policies.save_only_these_names(OUTPUT_NAME, LSE_NAME)
    match policy:
        case "none":
            return function
        case "full":
            return jax.checkpoint(function)
        case "attention":
            return jax.checkpoint(function, policy=attention_only)
        case "dots":
            both = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, attention_only)
            return jax.checkpoint(function, policy=both)
    raise ValueError(policy)
