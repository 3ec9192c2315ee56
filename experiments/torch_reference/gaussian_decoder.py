"""The Gaussian decoder in PyTorch (DESIGN §7; paper §4.2): points and AR features → the attributes of a Gaussian each.

Letters as in the design: B batch, P points, S context, D width, E width of the AR features, C of the context.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from experiments.torch_reference.layers import Attention, GatedMlp, Linear, RMSNorm, gelu, length_mask
from experiments.torch_reference.settings import wide, working_dtype

if TYPE_CHECKING:
    from pointillist_jax.configs import DecoderConfig

MIN_SCALE = 1e-5
# Of queries and keys of the attention that copies colours; numbers of a patch's colours: RGB of 2 × 2 quarters.
COPY_WIDTH, PATCH_COLORS = 32, 12
# Colour, opacity, scale, rotation, offset.
OUTPUTS = (3, 1, 3, 4, 3)


class Decoded(NamedTuple):
    """Activated attributes in canonical world space; padding has opacity 0 and offset 0."""

    means: Tensor  # [B, P, 3] metres, points + offsets
    quats: Tensor  # [B, P, 4] wxyz
    scales: Tensor  # [B, P, 3] metres
    opacities: Tensor  # [B, P]
    colors: Tensor  # [B, P, 3]
    offsets: Tensor  # [B, P, 3] metres


class Mlp(nn.Module):
    def __init__(self, size_in: int, width: int):
        super().__init__()
        self.up, self.down = Linear(size_in, width), Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gelu(self.up(x)))


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        width, sizes = config.width, (config.heads, config.head_dim)
        self.cross_attention = (
            Attention(width, *sizes, context_width=config.context_width) if config.cross_attention else None
        )
        self.self_attention = Attention(width, *sizes)
        self.mlp = GatedMlp(width, config.mlp_width)

    def forward(self, x: Tensor, mask: Tensor | None, context: Tensor | None, context_mask: Tensor | None) -> Tensor:
        if self.cross_attention is not None:
            x = x + self.cross_attention(x, context, mask=context_mask)
        x = x + self.self_attention(x, mask=mask)
        return x + self.mlp(x)


class Head(Linear):
    """A norm in the dtype of its input and an affine map in float32 at least."""

    def __init__(self, width: int, size: int):
        super().__init__(width, size)
        self.norm = RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x).to(wide(x.dtype)))


class Copy(nn.Module):
    """Attention of every point to the quarters of the portrait's patches, whose colours it averages (ours)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.query = Linear(config.width, COPY_WIDTH, bias=False)
        self.key = Linear(config.context_width, COPY_WIDTH, bias=False)
        # Four quarters of a token have one key, and a row each that tells them apart.
        self.places = nn.Parameter(torch.zeros(config.context_tokens * PATCH_COLORS // 3, COPY_WIDTH))

    def forward(self, x: Tensor, context: Tensor, colors: Tensor) -> Tensor:
        """Logits of the colours [B, P, 3], in float32 at least.

        Args:
          x: [B, P, D] and context: [B, S, C], both normed.
          colors: [B, S, 12] in [-1, 1].
        """
        dtype = wide(x.dtype)
        keys = self.key(context).repeat_interleave(PATCH_COLORS // 3, dim=1) + self.places.to(x.dtype)
        scores = self.query(x).to(dtype) @ keys.to(dtype).mT * COPY_WIDTH**-0.5
        copied = scores.softmax(-1) @ colors.to(dtype).unflatten(-1, (-1, 3)).flatten(1, 2)
        # To [0, 1], but not to its ends, whose logits are infinite.
        return ((copied + 1) / 2).clamp(0.02, 0.98).logit()


class GaussianDecoder(nn.Module):
    """A transformer over points without any order; fresh weights paint equal Gaussians (the head starts at zero)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config, width = config, config.width
        self.uses_positions = config.inputs in ("both", "position_only")
        self.uses_features = config.inputs in ("both", "ar_only")
        if self.uses_positions:
            self.position_mlp = Mlp(3 + 6 * config.octaves, width)
        if self.uses_features:
            self.feature_norm = RMSNorm(4 * config.feature_width)
            self.feature_mlp = Mlp(4 * config.feature_width, width)
        if config.inputs != "none":
            self.input = Linear((self.uses_positions + self.uses_features) * width, width)
            self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
            if config.cross_attention:
                self.context_norm = RMSNorm(config.context_width)
            if config.context_colors:
                self.copy, self.portrait_mlp = Copy(config), Mlp(config.context_tokens * PATCH_COLORS, width)
        self.head = Head(width, sum(OUTPUTS))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self,
        points: Tensor,
        hidden: Tensor | None = None,
        num_points: Tensor | None = None,
        context: Tensor | None = None,
        context_lengths: Tensor | None = None,
    ) -> Decoded:
        """Attributes of every point.

        Args:
          points: [B, P, 3] canonical positions, metres.
          hidden: [B, P, 4, E] final hidden states of the AR model at each point's four tokens.
          num_points: [B]; points at or beyond it are padding.
          context: [B, S, C] of the AR model, of which `context_lengths` [B] tokens are real; for cross-attention. With
            `config.context_colors` the last 12 of C are a patch's colours.
        """
        config = self.config
        x = self.trunk(points, hidden, num_points, context, context_lengths)
        colors, opacities, scales, quats, offsets = self.head(x).split(OUTPUTS, dim=-1)
        if config.context_colors:
            normed = self.context_norm(context.to(x.dtype))
            colors = colors + self.copy(self.head.norm(x), normed, context[..., -PATCH_COLORS:])
        real = torch.ones(points.shape[:2], dtype=torch.bool, device=points.device)
        if num_points is not None:
            real = length_mask(num_points, points.shape[1])[:, 0, 0]
        offsets = torch.where(real[..., None], config.max_offset * offsets.tanh(), 0)
        odds = math.log(config.initial_opacity / (1 - config.initial_opacity))
        turned = quats + torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=quats.dtype, device=quats.device)
        return Decoded(
            means=points + offsets,
            quats=turned / (turned.square().sum(-1, keepdim=True) + 1e-12).sqrt(),
            scales=(scales + config.initial_log_scale).exp().clamp(MIN_SCALE, config.max_scale),
            opacities=torch.where(real, (opacities[..., 0] + odds).sigmoid(), 0),
            colors=colors.sigmoid(),
            offsets=offsets,
        )

    def trunk(self, points, hidden, num_points, context, context_lengths) -> Tensor:
        """[B, P, D] in the dtype of the computation, before the head."""
        config, dtype = self.config, working_dtype(self.config)
        if config.inputs == "none":
            return torch.zeros(*points.shape[:2], config.width, dtype=dtype, device=points.device)
        parts = []
        if self.uses_positions:
            parts.append(self.position_mlp(positional_encoding(config, points).to(dtype)))
        if self.uses_features:
            parts.append(self.feature_mlp(self.feature_norm(hidden.flatten(2).to(dtype))))
        x = self.input(torch.cat(parts, dim=-1))
        if config.context_colors:
            # One row for all points: the whole portrait's colours.
            x = x + self.portrait_mlp(context[..., -PATCH_COLORS:].to(dtype).flatten(1)[:, None])
        if config.cross_attention:
            context = self.context_norm(context.to(dtype))
        mask, context_mask = length_mask(num_points, points.shape[1]), None
        if config.cross_attention:
            context_mask = length_mask(context_lengths, context.shape[1])
        for layer in self.layers:
            x = layer(x, mask, context, context_mask)
        return x


def positional_encoding(config: DecoderConfig, points: Tensor) -> Tensor:
    """NeRF's, [..., 3 + 6 octaves]: u, sin and cos of π 2^k u, axis by axis, for u in [-1, 1] over the box."""
    return encode_octaves(box_coordinates(config, points), config.octaves)


def box_coordinates(config: DecoderConfig, points: Tensor) -> Tensor:
    points = points.to(wide(points.dtype))
    lower, upper = (torch.tensor(x, dtype=points.dtype, device=points.device) for x in (config.lower, config.upper))
    return (2 * points - lower - upper) / (upper - lower)


def encode_octaves(u: Tensor, octaves: int) -> Tensor:
    powers = 2.0 ** torch.arange(octaves, dtype=u.dtype, device=u.device)
    phases = (math.pi * u[..., None] * powers).flatten(-2)
    return torch.cat([u, phases.sin(), phases.cos()], dim=-1)
