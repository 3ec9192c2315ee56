"""Michelangelo's point encoder, a perceiver: what a head mesh is turned into.

Written from facts/encoders_and_metrics.md 2 alone (DESIGN §6): the original code is GPL-3.0, and users bring the
weights themselves.

Letters: B batch, P points, Q queries, D width, F feed-forward, N heads, H head dim, L layers, I input features.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pointillist_jax.files import UserError
from pointillist_jax.models.attention import attention
from pointillist_jax.models.layers import (
    ParamSpec,
    cast,
    declare,
    layer_norm,
    layer_norm_specs,
    linear,
    stack_specs,
    zeros,
)

NORM_EPS = 1e-5  # PyTorch's default, not DINOv2's 1e-6.


class PointEncoder(nn.Module):
    """Learned queries read a cloud of oriented points; the defaults are Michelangelo's "shapevae-256" (64 M).

    `init(key, points)` gives parameters boxed with logical axes; `convert.point_encoder_from_torch` reads published
    ones.
    The result does not depend on the order of the points, whose number is free.

    Attributes:
      width, layers, heads: of the self-attention blocks; one cross-attention block of the same width comes first.
      queries: tokens that come out: one for the whole shape and, by default, 256 for its parts.
      frequencies: octaves of the Fourier features of a position, from 1 to 2^(frequencies - 1), without pi.
      features: numbers that follow a point's position: 3, its unit normal.
      attention: implementation, see `models.attention.attention`.
      remat: recompute layers in the backward instead of storing them.
      dtype: of the computation; parameters, norms, softmax and the residual stream are float32 at least.
    """

    width: int = 768
    layers: int = 8
    heads: int = 12
    queries: int = 257
    frequencies: int = 8
    features: int = 3
    attention: str = "auto"
    remat: bool = False
    dtype: Any = "float32"

    @nn.compact
    def __call__(self, points: Float[Array, "B P I"]) -> Float[Array, "B Q D"]:
        """Tokens of the last norm, before any KL bottleneck: what mesh generators are conditioned on (facts 2.4).

        Args:
          points: positions within about [-1, 1], then unit normals: [B, P, 6] (`flame.surface_points.head_points`).

        Returns:
          [B, Q, D], float32 (float64 for float64): token 0 stands for the whole shape.

        Raises:
          UserError: another shape of points, or a width that the heads do not divide.
        """
        if self.width % self.heads:
            raise UserError(f"PointEncoder: width {self.width} must be a multiple of heads {self.heads}.")
        if points.ndim != 3 or points.shape[-1] != 3 + self.features or not points.shape[1]:
            raise UserError(
                f"points have shape {points.shape}, expected [B, P, {3 + self.features}]: position, then "
                f"{self.features} features (the unit normal), with a batch axis."
            )
        params = declare(self, point_encoder_param_specs(self))
        residual = jnp.promote_types(self.dtype, jnp.float32)
        with jax.named_scope("embed"):
            # The highest octave needs float32: bf16 has 8 bits for a phase of up to 128 radians.
            inputs = fourier_features(points.astype(residual), self.frequencies)
            data = linear(inputs.astype(self.dtype), params["input"])
            queries = params["queries"].astype(residual)
            x = jnp.broadcast_to(queries, (points.shape[0], *queries.shape))
        with jax.named_scope("cross_attention"):
            layer = params["cross"]
            narrow = cast(layer, self.dtype)
            y = layer_norm(x, layer["norm1"], NORM_EPS).astype(self.dtype)
            q = jnp.einsum("BQD,DNH->BQNH", y, narrow["query"])
            k, v = jnp.einsum("BPD,DcNH->cBPNH", layer_norm(data, layer["data_norm"], NORM_EPS), narrow["key_value"])
            x = self._mlp(x + self._attend(narrow, q, k, v), layer, narrow)
        run_layer = jax.checkpoint(self._layer) if self.remat else self._layer
        x, _ = jax.lax.scan(run_layer, x, params["layers"])
        return layer_norm(x, params["norm"], NORM_EPS)

    def _layer(self, x, layer):
        narrow = cast(layer, self.dtype)
        with jax.named_scope("self_attention"):
            y = layer_norm(x, layer["norm1"], NORM_EPS).astype(self.dtype)
            q, k, v = jnp.einsum("BQD,DcNH->cBQNH", y, narrow["query_key_value"])
            return self._mlp(x + self._attend(narrow, q, k, v), layer, narrow), None

    def _attend(self, narrow, q, k, v):
        out = attention(q, k, v, implementation=self.attention)
        return linear(out.reshape(*out.shape[:2], -1), narrow["out"])

    def _mlp(self, x, layer, narrow):
        with jax.named_scope("mlp"):
            y = layer_norm(x, layer["norm2"], NORM_EPS).astype(self.dtype)
            return x + linear(jax.nn.gelu(linear(y, narrow["up"]), approximate=False), narrow["down"])


def fourier_features(points: Float[Array, "*b I"], frequencies: int) -> Float[Array, "*b J"]:
    """[..., 3 + features] → [..., 3 + 6 · frequencies + features] (facts 2.2).

    [x y z | sin of x at every frequency, of y, of z | cos, in the same order | features].
    """
    xyz, features = points[..., :3], points[..., 3:]
    angles = xyz[..., None] * 2.0 ** jnp.arange(frequencies, dtype=points.dtype)
    angles = angles.reshape(*xyz.shape[:-1], 3 * frequencies)
    return jnp.concatenate([xyz, jnp.sin(angles), jnp.cos(angles), features], axis=-1)


def point_encoder_param_specs(model: PointEncoder) -> dict[str, Any]:
    """Every parameter of the model: shape, logical axes, initial distribution (the original's)."""
    D, N, H = model.width, model.heads, model.width // model.heads
    I = 3 + 6 * model.frequencies + model.features
    block = nn.initializers.normal(0.25 * D**-0.5)

    def affine(size_in: int, size_out: int, axes: tuple[str | None, str], init=block) -> dict[str, ParamSpec]:
        return {"kernel": ParamSpec((size_in, size_out), axes, init), "bias": zeros(size_out, axes=axes[1:])}

    shared = {
        "norm1": layer_norm_specs(D),
        "out": affine(D, D, ("heads", "embed")),
        "norm2": layer_norm_specs(D),
        "up": affine(D, 4 * D, ("embed", "mlp")),
        "down": affine(4 * D, D, ("mlp", "embed")),
    }
    axes = ("embed", None, "heads", "head_dim")
    own = {**shared, "query_key_value": ParamSpec((D, 3, N, H), axes, block)}
    cross = {
        **shared,
        "data_norm": layer_norm_specs(D),
        "query": ParamSpec((D, N, H), ("embed", "heads", "head_dim"), block),
        "key_value": ParamSpec((D, 2, N, H), axes, block),
    }
    # PyTorch's default for a linear layer: uniform with deviation (3 · inputs)^-1/2.
    uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    return {
        "queries": ParamSpec((model.queries, D), (None, "norm"), nn.initializers.normal(0.02)),
        "input": affine(I, D, (None, "embed"), uniform),
        "cross": cross,
        "layers": stack_specs(own, model.layers),
        "norm": layer_norm_specs(D),
    }
