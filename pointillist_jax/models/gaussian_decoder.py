"""The Gaussian decoder: points and AR features → colour, opacity, scale, rotation, offset (DESIGN §7; paper §4.2).

A transformer over points without any order: attention is not causal and knows nothing of places in the sequence, so a
permutation of the points permutes the result. Attention is memory-linear (`models/attention.py`).

Letters: B batch, P points, S context, D width, N heads, H head dim, F feed-forward.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pointillist_jax.configs import PATCH_COLORS, DecoderConfig
from pointillist_jax.flame.binding import PointRig
from pointillist_jax.flame.rotations import exact_einsum
from pointillist_jax.gaussians import Avatar, Gaussians
from pointillist_jax.models.attention import attention
from pointillist_jax.models.blocks import attention_specs, cast_layer, mlp, mlp_specs, project_heads, project_out
from pointillist_jax.models.layers import (
    Params,
    ParamSpec,
    declare,
    linear,
    linear_specs,
    ones,
    rms_norm,
    stack_specs,
    unstack_layers,
    zeros,
)
from pointillist_jax.sharding import constrain

# Outputs of the head, in this order: colour, opacity, scale, rotation, offset.
OUTPUTS = {"colors": 3, "opacities": 1, "scales": 3, "quats": 4, "offsets": 3}
MIN_SCALE = 1e-5
# Of queries and keys of the attention that copies colours.
_COPY_WIDTH = 32


class Decoded(NamedTuple):
    """Attributes of B clouds.

    Attributes:
      gaussians: [B, P], canonical world space, activated; means = points + offsets. Padding has opacity 0.
      offsets: [B, P, 3] metres; 0 for padding.
    """

    gaussians: Gaussians
    offsets: Float[Array, "B P 3"]


class GaussianDecoder(nn.Module):
    """The decoder's parameters, and its forward: see `decode`.

    `init(key, points, hidden)` gives parameters boxed with logical axes (`sharding.shardings_for`).
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        points: Float[Array, "B P 3"],
        hidden: Float[Array, "B P 4 E"] | None = None,
        num_points: Int[Array, "B"] | None = None,
        context: Float[Array, "B S C"] | None = None,
        context_lengths: Int[Array, "B"] | None = None,
    ) -> Decoded:
        return decode(
            declare(self, param_specs(self.config)), self.config, points, hidden, num_points, context, context_lengths
        )


def param_specs(config: DecoderConfig) -> dict[str, Any]:
    """Every parameter of the decoder: shape, logical axes, initial distribution."""
    D = config.width
    specs: dict[str, Any] = {}
    if config.uses_positions:
        size = 3 + 6 * config.octaves
        specs["position_mlp"] = {"up": linear_specs(size, D, (None, "mlp")), "down": linear_specs(D, D, ("mlp", None))}
    if config.uses_features:
        E = config.feature_width
        specs["feature_norm"] = ones(4 * E)
        specs["feature_mlp"] = {
            "up": linear_specs(4 * E, D, ("embed", "mlp")),
            "down": linear_specs(D, D, ("mlp", None)),
        }
    if config.inputs != "none":
        parts = config.uses_positions + config.uses_features
        specs["input"] = linear_specs(parts * D, D, ("mlp", None))
        if config.layers:
            specs["layers"] = stack_specs(_layer_specs(config), config.layers)
        if config.cross_attention:
            specs["context_norm"] = ones(config.context_width)
        if config.context_colors:
            size = config.context_tokens * PATCH_COLORS
            quarters, axes = config.context_tokens * PATCH_COLORS // 3, ("embed", None)
            specs["copy"] = {
                "query": linear_specs(D, _COPY_WIDTH, axes, bias=False),
                "key": linear_specs(config.context_width, _COPY_WIDTH, axes, bias=False),
                "places": ParamSpec((quarters, _COPY_WIDTH), (None, None), nn.initializers.normal(1.0)),
            }
            specs["portrait_mlp"] = {
                "up": linear_specs(size, D, (None, "mlp")),
                "down": linear_specs(D, D, ("mlp", None)),
            }
    # Zeros: at the start all Gaussians are alike, whatever the trunk says.
    size = sum(OUTPUTS.values())
    head = ParamSpec((D, size), ("embed", None), nn.initializers.zeros)
    specs["head"] = {"norm": ones(D), "kernel": head, "bias": zeros(size, axes=(None,))}
    return specs


def _layer_specs(config: DecoderConfig) -> dict[str, Any]:
    gain = ((3 if config.cross_attention else 2) * config.layers) ** -0.5
    branch = functools.partial(attention_specs, config.width, config.heads, config.head_dim, gain)
    specs = {"self_attention": branch(), "mlp": mlp_specs(config.width, config.mlp_width, gain)}
    return specs | ({"cross_attention": branch(source_width=config.context_width)} if config.cross_attention else {})


def decode(
    params: Params,
    config: DecoderConfig,
    points: Float[Array, "B P 3"],
    hidden: Float[Array, "B P 4 E"] | None = None,
    num_points: Int[Array, "B"] | None = None,
    context: Float[Array, "B S C"] | None = None,
    context_lengths: Int[Array, "B"] | None = None,
) -> Decoded:
    """Attributes of every point.

    Args:
      params: of `GaussianDecoder`.
      points: canonical positions, metres.
      hidden: final hidden states of the AR model at each point's x, y, z and b token; not read without AR features.
      num_points: points at or beyond it are padding: they change nothing and get opacity 0.
      context: of the AR model (`training.ar.encode`); read with `config.cross_attention` only.
      context_lengths: for contexts padded to one length.
    """
    points = jnp.asarray(points)
    x = _trunk(params, config, points, hidden, num_points, context, context_lengths)
    with jax.named_scope("attributes"):
        wide = jnp.promote_types(config.dtype, jnp.float32)
        raw = rms_norm(x, params["head"]["norm"]).astype(wide) @ params["head"]["kernel"] + params["head"]["bias"]
        raw = dict(zip(OUTPUTS, jnp.split(raw, np.cumsum(list(OUTPUTS.values()))[:-1], axis=-1), strict=True))
        real = jnp.ones(points.shape[:2], bool)
        if num_points is not None:
            real = jnp.arange(points.shape[1]) < num_points[:, None]
        odds = math.log(config.initial_opacity / (1 - config.initial_opacity))
        offsets = jnp.where(real[..., None], config.max_offset * jnp.tanh(raw["offsets"]), 0)
        turned = raw["quats"] + jnp.asarray([1.0, 0.0, 0.0, 0.0], wide)
        scales = jnp.exp(raw["scales"] + config.initial_log_scale)
        colors = raw["colors"]
        if config.context_colors:
            colors = colors + _copied_colors(params, rms_norm(x, params["head"]["norm"]), context)
        gaussians = Gaussians(
            means=points + offsets,
            quats=turned * jax.lax.rsqrt(jnp.sum(turned * turned, axis=-1, keepdims=True) + 1e-12),
            scales=jnp.clip(scales, MIN_SCALE, config.max_scale),
            opacities=jnp.where(real, jax.nn.sigmoid(raw["opacities"][..., 0] + odds), 0),
            colors=jax.nn.sigmoid(colors),
        )
        return Decoded(gaussians, offsets)


def rigged(decoded: Decoded, rig: PointRig) -> Avatar:
    """One cloud's attributes on the rig of its undisplaced points (`flame.bind_points`).

    The barycentrics stay those of the points: only the offset from the surface moves, so that the decoder's offsets
    have a gradient and the canonical pose gives exactly the displaced points back.
    """
    shift = exact_einsum("pab,pb->pa", rig.rest_linear, decoded.offsets.astype(rig.rest_offset.dtype))
    return Avatar(decoded.gaussians, rig.replace(rest_offset=rig.rest_offset + shift))


def positional_encoding(config: DecoderConfig, points: Float[Array, "*b 3"]) -> Float[Array, "*b X"]:
    """NeRF's: u, sin and cos of π 2^k u, for u in [-1, 1] over the box (X = 3 + 6 octaves)."""
    return encode_octaves(box_coordinates(config, points), config.octaves)


def box_coordinates(config: DecoderConfig, points: Float[Array, "*b 3"]) -> Float[Array, "*b 3"]:
    """Points of the box → [-1, 1], in float32 at least."""
    wide = jnp.promote_types(points.dtype, jnp.float32)
    lower, upper = (jnp.asarray(x, wide) for x in (config.lower, config.upper))
    return (2 * points - lower - upper) / (upper - lower)


def encode_octaves(u: Float[Array, "*b 3"], octaves: int) -> Float[Array, "*b X"]:
    angles = jnp.pi * u[..., None] * 2.0 ** jnp.arange(octaves, dtype=u.dtype)
    angles = angles.reshape(*u.shape[:-1], -1)
    return jnp.concatenate([u, jnp.sin(angles), jnp.cos(angles)], axis=-1)


def _trunk(params, config, points, hidden, num_points, context, context_lengths) -> Float[Array, "B P D"]:
    dtype = jnp.dtype(config.dtype)
    if config.inputs == "none":
        return jnp.zeros((*points.shape[:2], config.width), dtype)
    parts = []
    with jax.named_scope("inputs"):
        if config.uses_positions:
            # In float32: the highest octave turns the bins of one bf16 step into noise.
            parts.append(_mlp(params["position_mlp"], positional_encoding(config, points).astype(dtype)))
        if config.uses_features:
            flat = hidden.reshape(*hidden.shape[:2], -1).astype(dtype)
            parts.append(_mlp(params["feature_mlp"], rms_norm(flat, params["feature_norm"])))
        x = linear(jnp.concatenate(parts, axis=-1), params["input"])
        if config.context_colors:
            colors = context[..., -PATCH_COLORS:].astype(dtype)
            x = x + _mlp(params["portrait_mlp"], colors.reshape(len(colors), 1, -1))
    if config.cross_attention:
        context = rms_norm(context.astype(dtype), params["context_norm"])
    attend = functools.partial(attention, implementation=config.attention, block_size=config.attention_block)

    def run_layer(x, layer):
        layer = cast_layer(layer, dtype)
        if config.cross_attention:
            p = layer["cross_attention"]
            x = x + _attend(p, rms_norm(x, p["norm"]), context, functools.partial(attend, kv_lengths=context_lengths))
        p = layer["self_attention"]
        y = rms_norm(x, p["norm"])
        x = x + _attend(p, y, y, functools.partial(attend, kv_lengths=num_points))
        return constrain(x + mlp(layer["mlp"], x), "batch", "length", None)

    # Not a scan: differentiating one keeps every tile's mask for the backward pass, P² bytes a head.
    run_layer = jax.checkpoint(run_layer) if config.remat == "full" else run_layer
    for layer in unstack_layers(params["layers"]) if config.layers else ():
        x = run_layer(x, layer)
    return x


def _copied_colors(params, x: Float[Array, "B P D"], context: Float[Array, "B S C"]):
    """[B, P, 3] logits of the colour that each point finds in the portrait: a mean over the quarters of its patches."""
    p, wide = params["copy"], jnp.promote_types(x.dtype, jnp.float32)
    with jax.named_scope("copy"):
        colors = context[..., -PATCH_COLORS:].astype(wide).reshape(len(context), -1, 3)
        context = rms_norm(context.astype(x.dtype), params["context_norm"])
        keys = jnp.repeat(linear(context, p["key"]), PATCH_COLORS // 3, axis=1) + p["places"].astype(x.dtype)
        scores = jnp.einsum("BPH,BSH->BPS", linear(x, p["query"]), keys, preferred_element_type=wide)
        weights = jax.nn.softmax(scores * _COPY_WIDTH**-0.5)
        # [-1, 1] to RGB, kept off the ends, where logits are infinite.
        copied = jnp.clip(jnp.einsum("BPS,BSc->BPc", weights, colors) / 2 + 0.5, 0.02, 0.98)
        return jnp.log(copied) - jnp.log1p(-copied)


def _attend(p: Params, y, source, attend):
    with jax.named_scope("attention"):
        if source is y:
            q, k, v = project_heads(p, y, "query", "key", "value")
        else:
            (q,), (k, v) = project_heads(p, y, "query"), project_heads(p, source, "key", "value")
        # Every query needs all keys: heads, not points, lie on the context axis here.
        q, k, v = (constrain(x, "batch", None, ("heads", "length"), None) for x in (q, k, v))
        return project_out(p, attend(q, k, v))


def _mlp(p: Params, x):
    return linear(jax.nn.gelu(linear(x, p["up"])), p["down"])
