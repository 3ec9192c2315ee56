"""The transformer with one step per point, in PyTorch (ours, beyond the paper; facts/paper_and_peers.md 4.2).

A position reads the four tokens of a point at once; a chain of small heads predicts those of the next one, each head
told what the one before it chose.

Letters: B batch, T tokens, P points, S context, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.torch_reference.layers import GatedMlp, Linear, RMSNorm
from experiments.torch_reference.point_transformer import PointTransformer

if TYPE_CHECKING:
    from pointillist_jax.configs import ModelConfig


class SlotHead(nn.Module):
    """One link of the chain: residual MLPs and a norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        gated = config.mlp == "gated"
        self.mlps = nn.ModuleList(GatedMlp(config.width, config.mlp_width, gated) for _ in range(config.slot_layers))
        self.norm = RMSNorm(config.width)

    def forward(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """[..., D] → (residual for the next link, state that predicts this slot)."""
        for mlp in self.mlps:
            residual = residual + mlp(residual)
        return residual, self.norm(residual)


class PointStepTransformer(PointTransformer):
    """As `PointTransformer`, for `config.step` "point"; windows are multiples of four tokens."""

    step = "point"

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.point_embedding = Linear(4 * config.width, config.width, bias=False)
        self.slot_heads = nn.ModuleDict({slot: SlotHead(config) for slot in "xyzb"})

    def forward(
        self,
        tokens: Tensor,
        context: Tensor,
        positions: Tensor | None = None,
        context_lengths: Tensor | None = None,
    ) -> Tensor:
        """[B, T, D]: the state at each token, which has read it and nothing after it, and predicts the next one.

        The first three are zeros: no position comes before the first point, so nothing predicts inside of it.
        """
        points = tokens.unflatten(1, (-1, 4))
        following = torch.cat([points[:, 1:], torch.zeros_like(points[:, :1])], dim=1)
        places = None if positions is None else positions[:, ::4] // 4
        states = self.point_states(points, following, context, places, context_lengths)
        # What follows the last point is unknown, so that only its x has a state.
        return F.pad(torch.stack(states, dim=2).flatten(1, 2)[:, : tokens.shape[1] - 3], (0, 0, 3, 0))

    def point_states(
        self,
        points: Tensor,
        following: Tensor,
        context: Tensor,
        places: Tensor | None = None,
        context_lengths: Tensor | None = None,
    ) -> list[Tensor]:
        """States [B, P, D] that predict x, y, z and b of the point after each.

        Args:
          points: [B, P, 4] tokens read at each position.
          following: [B, P, 4] of the point after; its b is not read.
          places: [B, P] index of each point in its sequence, S S S S being 0; 0 … P-1 by default.
        """
        slots = torch.arange(4, device=points.device).expand_as(points)
        read = self.point_embedding(self.embed(points, slots).flatten(-2))
        residual = self.run_layers(read, context, places, context_lengths)
        chosen, states = self.embed(following, slots), []
        for slot, head in enumerate(self.slot_heads.values()):
            if slot:
                residual = residual + chosen[..., slot - 1, :]
            residual, state = head(residual)
            states.append(state)
        return states

    def states_and_targets(
        self, tokens: Tensor, targets: Tensor, context: Tensor, positions: Tensor | None, mask: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Of a window whose first point is only read and whose last one is only predicted; `targets` is not needed."""
        points = tokens.unflatten(1, (-1, 4))
        following = points[:, 1:]
        places = None if positions is None else positions[:, :-4:4] // 4
        states = self.point_states(points[:, :-1], following, context, places)
        if mask is not None:
            # Of the token after each.
            following = torch.where(mask[:, 3:-1].unflatten(1, (-1, 4)), following, self.ids.pad)
        return states, list(following.unbind(-1))
