"""Cached generation in PyTorch: the loop that `pointillist_jax.sampling` is measured against.

What a careful author writes without a compiler: queries, keys and values (and gate and up) as one product each, tables
and cross-attention keys computed once, a preallocated ring of one window per layer, SDPA on its filled part, logits of
the slot's classes only, the grammar as a mask, no copy to the host inside the loop (`generate` looks once per chunk).

Letters: B batch, D width, Q points, K kv heads, H head dim, S context, W window, C classes of a slot.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.torch_reference.layers import gelu, length_mask, rotary_angles, rotary_frequencies, rotate
from experiments.torch_reference.point_step import PointStepTransformer
from experiments.torch_reference.point_transformer import Layer, PointTransformer
from experiments.torch_reference.settings import wide, working_dtype


@dataclasses.dataclass(frozen=True)
class Filters:
    """What is left of a distribution before a class is drawn (DESIGN §6).

    Attributes:
      temperature: 0 takes the likeliest class.
      top_k: classes at least as likely as the k-th likeliest; 0 is off.
      top_p: the likeliest classes that have this much probability together, and those as likely as the last; 1 is off.
      constrain: whether the grammar masks.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    constrain: bool = True


class Decoder:
    """One batch of rows, all of the same age."""

    def __init__(self, model: PointTransformer, context: Tensor, context_lengths: Tensor | None = None):
        """`context` [B, S, D], of which `context_lengths` [B] are real (all by default)."""
        config, self.ids = model.config, model.ids
        self.config, self.batch, self.dtype = config, len(context), working_dtype(config)
        device, ids = context.device, self.ids
        self.norm = model.final_norm
        self.outputs = [classifier.rows for classifier in model.classifiers("slot")]
        coordinates = torch.arange(ids.bins, device=device)
        eos, faces = torch.tensor([ids.eos], device=device), torch.arange(ids.bins, ids.bos, device=device)
        values = [torch.cat([coordinates, eos]), coordinates, coordinates, faces]
        self.inputs = [model.embed(ids_, torch.full_like(ids_, slot)) for slot, ids_ in enumerate(values)]
        self.frequencies = rotary_frequencies(config.head_dim, config.rope_theta, wide(self.dtype), device)
        slots = torch.arange(4, device=device)
        self.starts = model.embed(torch.full_like(slots, ids.bos), slots)
        valid = length_mask(context_lengths, context.shape[1])
        context = model.context_norm(context.to(self.dtype))
        self.layers = [_Layer(layer, config, context, valid) for layer in model.layers]
        self.classes = [torch.arange(count, device=device) for count in ids.class_counts]

    def token(self, x: Tensor, position: int) -> Tensor:
        """Embedding [B, D] of the token at `position` → its final hidden state [B, D]."""
        angles = rotary_angles(position, self.frequencies)
        place, filled = position % self.config.window, min(position + 1, self.config.window)
        for layer in self.layers:
            x = layer(x, angles, place, filled)
        return self.norm(x)

    def start(self) -> Tensor:
        """Feeds S S S S."""
        for slot in range(4):
            hidden = self.token(self.starts[slot].expand(self.batch, -1), slot)
        return hidden

    def after(self, slot: int, point: list[Tensor], place: int) -> Tensor:
        """The state [B, D] once the class at `slot`, the last of `point`, is chosen; `place` of the point, S's is 0."""
        return self.token(self.inputs[slot][point[-1]], 4 * place + slot)

    def points(
        self,
        hidden: Tensor,
        first: int,
        forced: Tensor,
        *,
        previous: Tensor | None = None,
        uniforms: Tensor | None = None,
        filters: Filters = Filters(),
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Points `first` … of the rows.

        Args:
          hidden: [B, D] at the token before.
          forced: [B, Q, 4] classes to take instead of the drawn ones (which are drawn all the same), -1 for none.
          previous: [B, 4] classes of the point before; none by default, which forbids nothing.
          uniforms: [B, Q, Σ C] in (0, 1), one for every class of the x, y, z and b slots in turn: the class with the
            least -log(uniform) / probability is drawn. torch's own draws by default.

        Returns:
          classes [B, Q, 4], their log-probabilities under the grammar, hidden states [B, Q, 4, D], the last one [B, D].
        """
        batch, count = forced.shape[:2]
        device, counts = hidden.device, self.ids.class_counts
        classes = torch.zeros_like(forced)
        log_probs = torch.zeros(forced.shape, dtype=wide(self.dtype), device=device)
        states = torch.zeros(*forced.shape, hidden.shape[-1], dtype=hidden.dtype, device=device)
        if previous is None:
            previous = torch.zeros(batch, 4, dtype=torch.long, device=device)
        for q in range(count):
            point: list[Tensor] = []
            for slot in range(4):
                logits = F.linear(hidden, self.outputs[slot]).to(wide(self.dtype))
                if filters.constrain:
                    logits = logits.masked_fill(~self.legal(slot, previous, point), -torch.inf)
                if uniforms is None:
                    waits = torch.empty_like(logits).exponential_()
                else:
                    waits = -uniforms[:, q, sum(counts[:slot]) :][:, : counts[slot]].log()
                drawn = (_kept(logits, filters) / waits).argmax(-1)
                value = torch.where(forced[:, q, slot] >= 0, forced[:, q, slot], drawn)
                classes[:, q, slot] = value
                log_probs[:, q, slot] = logits.log_softmax(-1).gather(-1, value[:, None])[:, 0]
                point.append(value)
                hidden = self.after(slot, point, first + q + 1)
                states[:, q, slot] = hidden
            previous = torch.stack(point, dim=1)
        return classes, log_probs, states, hidden

    def generate(
        self,
        max_points: int,
        *,
        uniforms: Tensor | None = None,
        filters: Filters = Filters(),
        chunk: int = 64,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Whole clouds, until every row has drawn E or has `max_points`.

        Args:
          uniforms: [B, max_points, Σ C], as of `points`.

        Returns:
          tokens [B, 4 · max_points + 8] (S S S S, points, E E E E, then P), the number of points [B], log-probabilities
          [B, max_points, 4] (of E at its x slot; then 0) and hidden states [B, max_points, 4, D] (0 beyond the points).
        """
        ids, device = self.ids, self.starts.device
        hidden, previous, parts = self.start(), None, []
        ended = torch.zeros(self.batch, dtype=torch.bool, device=device)
        for first in range(0, max_points, chunk):
            size = min(chunk, max_points - first)
            forced = torch.full((self.batch, size, 4), -1, device=device)
            noise = None if uniforms is None else uniforms[:, first : first + size]
            *made, hidden = self.points(hidden, first, forced, previous=previous, uniforms=noise, filters=filters)
            parts.append(made)
            previous = made[0][:, -1]
            ended |= (made[0][..., 0] == ids.bins).any(1)
            if ended.all():
                break
        classes, log_probs, states = (torch.cat(x, dim=1) for x in zip(*parts, strict=True))
        alive = (classes[..., 0] != ids.bins).cumprod(1).bool()
        number = alive.sum(1)
        tokens = torch.full((self.batch, 4 * max_points + 8), ids.pad, device=device)
        tokens[:, :4] = ids.bos
        body = classes + torch.tensor([0, 0, 0, ids.bins], device=device)
        tokens[:, 4 : 4 + body[0].numel()] = torch.where(alive[..., None], body, ids.pad).flatten(1)
        tokens.scatter_(1, 4 + 4 * number[:, None] + torch.arange(4, device=device), ids.eos)
        # E's own probability is that of an x slot.
        counted = alive[..., None].repeat(1, 1, 4)
        counted[..., 0] |= torch.arange(classes.shape[1], device=device) == number[:, None]
        missing = max_points - classes.shape[1]
        log_probs = F.pad(torch.where(counted, log_probs, 0), (0, 0, 0, missing))
        states = F.pad(torch.where(alive[..., None, None], states, 0), (0, 0, 0, 0, 0, missing))
        return tokens, number, log_probs, states

    def legal(self, slot: int, previous: Tensor, point: list[Tensor]) -> Tensor:
        """[B, C] the order of points (DESIGN §5) after `previous` [B, 4] and the point's own classes so far."""
        xp, yp, zp, bp = previous.T
        last, classes = self.ids.bins - 1, self.classes[slot]
        if slot == 0:
            # The last class is E, above every bound.
            return classes >= (((yp == last) & (zp == last)) * xp)[:, None]
        x = point[0]
        if slot == 1:
            return classes >= (yp + ((zp == last) & (x < xp)))[:, None]
        if slot == 2:
            return classes >= ((point[1] == yp) * (zp + (x < xp)))[:, None]
        same = (x == xp) & (point[1] == yp) & (point[2] == zp)
        return classes >= (same * bp)[:, None]


class PointDecoder(Decoder):
    """As `Decoder`, for a model with one step per point: the layers read whole points, and a chain of heads follows."""

    def __init__(self, model: PointStepTransformer, context: Tensor, context_lengths: Tensor | None = None):
        super().__init__(model, context, context_lengths)
        self.embedding, self.heads = model.point_embedding, list(model.slot_heads.values())
        self.residual = self.starts  # Of the chain's last link.

    def start(self) -> Tensor:
        """Reads S S S S."""
        return self.link(0, self.token(self.embedding(self.starts.flatten().expand(self.batch, -1)), 0))

    def after(self, slot: int, point: list[Tensor], place: int) -> Tensor:
        if slot < 3:
            return self.link(slot + 1, self.residual + self.inputs[slot][point[-1]])
        four = torch.cat([rows[value] for rows, value in zip(self.inputs, point, strict=True)], dim=-1)
        return self.link(0, self.token(self.embedding(four), place))

    def link(self, slot: int, residual: Tensor) -> Tensor:
        """The state [B, D] that predicts `slot`."""
        self.residual, state = self.heads[slot](residual)
        return state


def decoder_of(model: PointTransformer, context: Tensor, context_lengths: Tensor | None = None) -> Decoder:
    return (PointDecoder if model.step == "point" else Decoder)(model, context, context_lengths)


def _kept(logits: Tensor, filters: Filters) -> Tensor:
    """Rates [B, C] in proportion to the filtered probabilities; the likeliest class has 1."""
    rates = ((logits - logits.amax(-1, keepdim=True)) / max(filters.temperature, 1e-6)).exp()
    # Rates that are one float32 are ties, whatever the dtype.
    if filters.top_k:
        threshold = rates.float().topk(min(filters.top_k, rates.shape[-1]), dim=-1).values[:, -1:]
        rates = torch.where(rates.float() >= threshold, rates, 0)
    if filters.top_p < 1:
        falling, order = rates.float().sort(dim=-1, descending=True)
        mass = rates.gather(-1, order).cumsum(-1)
        enough = mass >= filters.top_p * mass[:, -1:]
        threshold = falling.gather(-1, enough.int().argmax(-1, keepdim=True))
        rates = torch.where(rates.float() >= threshold, rates, 0)
    return rates


class _Layer:
    """A layer's products fused for one token per row, with its cache."""

    def __init__(self, layer: Layer, config, context: Tensor, valid: Tensor | None):
        self.cross_first = layer.cross_first
        self.cross, self.own, self.mlp, self.valid = layer.cross_attention, layer.self_attention, layer.mlp, valid
        own, mlp, dtype = self.own, self.mlp, context.dtype
        self.context_keys, self.context_values = (
            x.transpose(1, 2).contiguous() for x in self.cross.keys_values(context)
        )
        shape = len(context), own.kv_heads, config.window, own.head_dim
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=context.device) for _ in range(2))
        self.qkv = torch.cat([own.query.weight, own.key.weight, own.value.weight]).to(dtype)
        self.up = (torch.cat([mlp.gate.weight, mlp.up.weight]) if mlp.gate is not None else mlp.up.weight).to(dtype)

    def __call__(self, x: Tensor, angles: tuple[Tensor, Tensor], place: int, filled: int) -> Tensor:
        if self.cross_first:
            x = self._self_attention(self._cross_attention(x), angles, place, filled)
        else:
            x = self._cross_attention(self._self_attention(x, angles, place, filled))
        y = F.linear(self.mlp.norm(x), self.up)
        if self.mlp.gate is None:
            return x + self.mlp.down(gelu(y))
        gate, up = y.chunk(2, dim=-1)
        return x + self.mlp.down(gelu(gate) * up)

    def _cross_attention(self, x: Tensor) -> Tensor:
        q = self.cross.queries(self.cross.norm(x))[:, :, None]
        out = self.cross.attend(q, self.context_keys, self.context_values, self.valid)
        return x + self.cross.out(out.flatten(1))

    def _self_attention(self, x: Tensor, angles: tuple[Tensor, Tensor], place: int, filled: int) -> Tensor:
        own = self.own
        qkv = F.linear(own.norm(x), self.qkv).unflatten(-1, (-1, own.head_dim))
        q, k, v = qkv.split((own.heads, own.kv_heads, own.kv_heads), dim=1)
        q, k = rotate(own.query_norm(q), angles), rotate(own.key_norm(k), angles)
        self.keys[:, :, place], self.values[:, :, place] = k, v
        out = own.attend(q[:, :, None], self.keys[:, :, :filled], self.values[:, :, :filled])
        return x + own.out(out.flatten(1))
