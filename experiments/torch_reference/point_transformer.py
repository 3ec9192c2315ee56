"""The autoregressive point transformer in PyTorch (DESIGN §6; paper §4.1): pre-norm, SDPA, rotary positions.

Letters as in the design: B batch, T tokens, S context, D width, N heads, K kv heads, H head dim, V classes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.torch_reference.layers import (
    Attention,
    GatedMlp,
    RMSNorm,
    length_mask,
    rotary_angles,
    rotary_frequencies,
)
from experiments.torch_reference.settings import kv_heads, vocabulary, wide, working_dtype

if TYPE_CHECKING:
    from pointillist_jax.configs import ModelConfig

OCTAVES = 10


class Layer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.cross_first = config.order == "cross_first"
        sizes = {"heads": config.heads, "head_dim": config.head_dim, "kv_heads": kv_heads(config)}
        self.cross_attention, self.self_attention = (
            Attention(config.width, qk_norm=config.qk_norm, **sizes) for _ in range(2)
        )
        self.mlp = GatedMlp(config.width, config.mlp_width, config.mlp == "gated")

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        context: Tensor,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        own = {"angles": angles, "mask": mask, "causal": mask is None}
        if self.cross_first:
            x = x + self.cross_attention(x, context, mask=context_mask)
            x = x + self.self_attention(x, **own)
        else:
            x = x + self.self_attention(x, **own)
            x = x + self.cross_attention(x, context, mask=context_mask)
        return x + self.mlp(x)


class SlotClassifier(NamedTuple):
    """The classes of one slot.

    Attributes:
      rows: [V, D] in the dtype of the computation; logits are hidden · rows.
      first_id: class c stands for id first_id + c.
      eos_class: the class that stands for E, if it lies outside of that run; else -1.
    """

    rows: Tensor
    first_id: int
    eos_class: int

    def labels(self, ids: Tensor, eos: int) -> Tensor:
        """Class of each id; -1 where this slot has none."""
        count = len(self.rows) - (self.eos_class >= 0)
        labels = torch.where((ids >= self.first_id) & (ids < self.first_id + count), ids - self.first_id, -1)
        return torch.where(ids == eos, self.eos_class, labels) if self.eos_class >= 0 else labels


class PointTransformer(nn.Module):
    """Hidden states and next-token loss of windows, with one step per token: `step` of the configs it takes."""

    step = "token"

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.step != self.step:
            raise ValueError(f"{type(self).__name__} is for model.step={self.step}, not {config.step}")
        self.config, self.ids = config, vocabulary(config)
        width = config.width
        # Rounded to the dtype of the computation, in which it multiplies.
        self.gain = float(torch.tensor(width**0.5, dtype=working_dtype(config)))
        self.embedding = nn.Parameter(torch.zeros(self.ids.padded_size, width))
        self.context_norm, self.final_norm = RMSNorm(width), RMSNorm(width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        if config.slot_embedding:
            self.slot_embedding = nn.Parameter(torch.zeros(4, width))
        if not config.tied_head:
            self.head = nn.Parameter(torch.zeros(self.ids.padded_size, width))
        if config.coord_tables == "fourier_tied":
            self.coord_rows = nn.Parameter(torch.zeros(3, config.bins, width))
            self.coord_fourier = nn.Parameter(torch.zeros(3, 2 * OCTAVES, width))

    def coordinate_tables(self) -> Tensor:
        """Rows of the x, y and z slots [3, bins, D], in the dtype of the computation."""
        dtype = working_dtype(self.config)
        if self.config.coord_tables == "learned":
            return self._classes()[: self.config.bins].to(dtype).expand(3, -1, -1)
        accumulator = wide(dtype)
        features = fourier_features(self.config.bins, self.coord_rows.device).to(accumulator)
        smooth = torch.einsum("bf,sfD->sbD", features, self.coord_fourier.to(accumulator))
        return (self.coord_rows + smooth).to(dtype)

    def embed(self, tokens: Tensor, slots: Tensor) -> Tensor:
        """Ids and the slots 0–3 where they stand, one shape → [..., D]."""
        config, dtype = self.config, working_dtype(self.config)
        x = F.embedding(tokens, self.embedding.to(dtype))
        if config.coord_tables == "fourier_tied":
            rows = self.coordinate_tables().flatten(0, 1)
            index = slots.clamp(max=2) * config.bins + tokens.clamp(max=config.bins - 1)
            x = torch.where((tokens < config.bins)[..., None], F.embedding(index, rows), x)
        x = x * self.gain
        return x + self.slot_embedding.to(dtype)[slots] if config.slot_embedding else x

    def classifiers(self, support: str | None = None) -> list[SlotClassifier]:
        """Of the x, y, z and b slots, for a `loss_support` ("slot" or "vocab"; the config's by default)."""
        ids, coords = self.ids, self.coordinate_tables()
        classes = self._classes().to(coords.dtype)
        if (support or self.config.loss_support) == "vocab":
            # P is the last id: it is no class.
            others = classes[ids.bins : ids.pad]
            return [SlotClassifier(torch.cat([coords[s], others]), 0, -1) for s in range(3)] + [
                SlotClassifier(classes[: ids.pad], 0, -1)
            ]
        return [
            SlotClassifier(torch.cat([coords[0], classes[ids.eos, None]]), 0, ids.bins),
            SlotClassifier(coords[1], 0, -1),
            SlotClassifier(coords[2], 0, -1),
            SlotClassifier(classes[ids.bins : ids.bos], ids.bins, -1),
        ]

    def forward(
        self,
        tokens: Tensor,
        context: Tensor,
        positions: Tensor | None = None,
        context_lengths: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] after the last norm.

        Args:
          tokens: [B, T]; the first stands at an x slot. Each sees itself and `config.window` - 1 before it.
          context: [B, S, D].
          positions: [B, T] in the whole sequence, for windows from its middle; 0 … T-1 by default.
          context_lengths: [B] real tokens of each context; all by default.
        """
        slots = torch.arange(tokens.shape[1], device=tokens.device) % 4
        return self.run_layers(self.embed(tokens, slots.expand_as(tokens)), context, positions, context_lengths)

    def run_layers(
        self, x: Tensor, context: Tensor, positions: Tensor | None = None, context_lengths: Tensor | None = None
    ) -> Tensor:
        """All layers and the last norm over embedded steps [B, T, D]; arguments as of `forward`."""
        config, length, dtype = self.config, x.shape[1], working_dtype(self.config)
        place = torch.arange(length, device=x.device)
        frequencies = rotary_frequencies(config.head_dim, config.rope_theta, wide(dtype), x.device)
        angles = rotary_angles(place if positions is None else positions, frequencies)
        mask = None
        if length > config.window:
            distance = place[:, None] - place
            mask = (distance >= 0) & (distance < config.window)
        context_mask = length_mask(context_lengths, context.shape[1])
        context = self.context_norm(context.to(dtype))
        for layer in self.layers:
            x = layer(x, angles, context, mask, context_mask)
        return self.final_norm(x)

    def loss(self, tokens: Tensor, targets: Tensor, context: Tensor, *args: Any, **options: Any) -> Tensor:
        """Mean next-token cross-entropy over the supervised tokens; arguments as of `loss_sums`."""
        total, count = self.loss_sums(tokens, targets, context, *args, **options)
        return total / count.clamp(min=1)

    def loss_sums(
        self,
        tokens: Tensor,
        targets: Tensor,
        context: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        z_loss: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Σ of -log p (+ z-loss) over all targets that are a class of their slot, and how many there are.

        Args:
          targets: [B, T] the token after each; P is ignored.
          mask: [B, T], False where a target is padding.
          z_loss: weight of log²(Σ exp logits).
        """
        states, targets = self.states_and_targets(tokens, targets, context, positions, mask)
        total = torch.zeros((), dtype=wide(states[0].dtype), device=tokens.device)
        count = torch.zeros((), dtype=torch.long, device=tokens.device)
        for classifier, hidden, wanted in zip(self.classifiers(), states, targets, strict=True):
            labels = classifier.labels(wanted, self.ids.eos).flatten()
            logits = F.linear(hidden, classifier.rows).to(total.dtype).flatten(0, 1)
            total = total + F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
            if z_loss:
                total = total + z_loss * torch.where(labels >= 0, logits.logsumexp(-1) ** 2, 0).sum()
            count = count + (labels >= 0).sum()
        return total, count

    def states_and_targets(
        self, tokens: Tensor, targets: Tensor, context: Tensor, positions: Tensor | None, mask: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Hidden states [B, P, D] that predict x, y, z and b, and what they should predict [B, P]."""
        hidden = self(tokens, context, positions)
        targets = targets if mask is None else torch.where(mask, targets, self.ids.pad)
        # A token at slot s predicts one at slot s + 1.
        firsts = [(slot - 1) % 4 for slot in range(4)]
        return [hidden[:, first::4] for first in firsts], [targets[:, first::4] for first in firsts]

    def _classes(self) -> Tensor:
        return self.embedding if self.config.tied_head else self.head


def fourier_features(bins: int, device: Any = None) -> Tensor:
    """[bins, 2 · octaves] float64: sines, then cosines of π 2^k u at the bins' centres u in (0, 1)."""
    centres = (torch.arange(bins, dtype=torch.float64, device=device) + 0.5) / bins
    phases = math.pi * centres[:, None] * 2.0 ** torch.arange(OCTAVES, dtype=torch.float64, device=device)
    return torch.cat([phases.sin(), phases.cos()], dim=1)
