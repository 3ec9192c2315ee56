"""Cached generation in PyTorch: the loop that `pointillist_jax.sampling` is measured against.

What a careful author writes without a compiler: queries, keys and values (and gate and up) as one product each, tables
and cross-attention keys computed once, a preallocated ring of one window per layer, SDPA on its filled part, logits of
the slot's classes only, the grammar as a mask, no copy to the host inside the loop.

Letters: B batch, D width, K kv heads, H head dim, S context, W window, C classes of a slot.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.torch_reference.point_transformer import EPS, PointTransformer


class Decoder:
    """One batch of rows, all of the same age."""

    def __init__(self, model: PointTransformer, context: Tensor):
        config, ids = model.config, model.config.tokenizer
        self.config, self.batch = config, len(context)
        self.norm = model.final_norm.weight
        coords, classes = model.coordinate_tables(), model._classes()
        self.outputs = [torch.cat([coords[0], classes[ids.eos, None]]), *coords[1:], classes[ids.bins : ids.bos]]
        inputs = coords if config.coord_tables == "fourier_tied" else [model.embedding[: ids.bins]] * 3
        inputs = [
            torch.cat([inputs[0], model.embedding[ids.eos, None]]),
            *inputs[1:],
            model.embedding[ids.bins : ids.bos],
        ]
        starts = [model.embedding[ids.bos]] * 4
        slots = model.slot_embedding if config.slot_embedding else [0] * 4
        self.inputs = [(x * config.width**0.5 + slot).to(context.dtype) for x, slot in zip(inputs, slots, strict=True)]
        self.starts = [(x * config.width**0.5 + slot).to(context.dtype) for x, slot in zip(starts, slots, strict=True)]
        frequencies = torch.arange(0, config.head_dim, 2, device=context.device) / config.head_dim
        self.frequencies = (config.rope_theta**-frequencies).float()
        self.layers = [_Layer(layer, config, model.context_norm(context)) for layer in model.layers]
        self.bins = torch.arange(ids.bins, device=context.device)
        self.faces = torch.arange(ids.num_faces, device=context.device)
        self.x_classes = torch.arange(ids.bins + 1, device=context.device)

    def token(self, x: Tensor, position: int) -> Tensor:
        """Embedding [B, D] of the token at `position` → its final hidden state [B, D]."""
        phases = position * self.frequencies
        cos, sin = phases.cos(), phases.sin()
        place, filled = position % self.config.window, min(position + 1, self.config.window)
        for layer in self.layers:
            x = layer(x, cos, sin, place, filled)
        return F.rms_norm(x, self.norm.shape, self.norm, EPS)

    def start(self) -> Tensor:
        """Feeds S S S S."""
        for slot in range(4):
            hidden = self.token(self.starts[slot].expand(self.batch, -1), slot)
        return hidden

    def points(self, hidden: Tensor, first: int, forced: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Points `first` … of the rows.

        Args:
          hidden: [B, D] at the token before.
          forced: [B, Q, 4] classes to take instead of the drawn ones (which are drawn all the same), -1 for none.

        Returns:
          classes [B, Q, 4], their log-probabilities under the grammar, hidden states [B, Q, 4, D], the last one [B, D].
        """
        batch, count = forced.shape[:2]
        classes = torch.zeros_like(forced)
        log_probs = torch.zeros(forced.shape, device=hidden.device)
        states = torch.zeros(*forced.shape, hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
        previous = torch.zeros(4, batch, dtype=torch.long, device=hidden.device)
        for q in range(count):
            point: list[Tensor] = []
            for slot in range(4):
                logits = F.linear(hidden, self.outputs[slot]).float()
                logits = logits.masked_fill(~self._legal(slot, previous, point), -torch.inf)
                probs = logits.softmax(-1)
                drawn = (probs / torch.empty_like(probs).exponential_()).argmax(-1)
                value = torch.where(forced[:, q, slot] >= 0, forced[:, q, slot], drawn)
                classes[:, q, slot] = value
                log_probs[:, q, slot] = probs.gather(-1, value[:, None])[:, 0].log()
                hidden = self.token(self.inputs[slot][value], 4 * (first + q + 1) + slot)
                states[:, q, slot] = hidden
                point.append(value)
            previous = torch.stack(point)
        return classes, log_probs, states, hidden

    def _legal(self, slot: int, previous: Tensor, point: list[Tensor]) -> Tensor:
        """[B, C] the order of points (DESIGN §5)."""
        xp, yp, zp, bp = previous
        last = self.config.bins - 1
        if slot == 0:
            # The last class is E, above every bound.
            return self.x_classes >= (((yp == last) & (zp == last)) * xp)[:, None]
        x = point[0]
        if slot == 1:
            return self.bins >= (yp + ((zp == last) & (x < xp)))[:, None]
        if slot == 2:
            return self.bins >= ((point[1] == yp) * (zp + (x < xp)))[:, None]
        same = (x == xp) & (point[1] == yp) & (point[2] == zp)
        return self.faces >= (same * bp)[:, None]


class _Layer:
    def __init__(self, layer, config, context: Tensor):
        self.config, self.cross_first = config, layer.cross_first
        cross, own, mlp = layer.cross_attention, layer.self_attention, layer.mlp
        heads = config.num_kv_heads, config.head_dim
        k, v = cross.key(context).unflatten(-1, heads), cross.value(context).unflatten(-1, heads)
        k = cross.key_norm(k) if config.qk_norm else k
        self.context_keys, self.context_values = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
        shape = len(context), config.num_kv_heads, config.window, config.head_dim
        self.keys, self.values = (torch.zeros(shape, dtype=context.dtype, device=context.device) for _ in range(2))
        self.cross, self.own, self.mlp = cross, own, mlp
        self.qkv = torch.cat([own.query.weight, own.key.weight, own.value.weight])
        self.up = torch.cat([mlp.gate.weight, mlp.up.weight]) if mlp.gate is not None else mlp.up.weight
        self.grouped = config.heads != config.num_kv_heads

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, place: int, filled: int) -> Tensor:
        if self.cross_first:
            x = self._self_attention(self._cross_attention(x), cos, sin, place, filled)
        else:
            x = self._cross_attention(self._self_attention(x, cos, sin, place, filled))
        y = F.linear(_norm(x, self.mlp.norm), self.up)
        if self.mlp.gate is None:
            return x + self.mlp.down(F.gelu(y, approximate="tanh"))
        gate, up = y.chunk(2, dim=-1)
        return x + self.mlp.down(F.gelu(gate, approximate="tanh") * up)

    def _cross_attention(self, x: Tensor) -> Tensor:
        q = self.cross.query(_norm(x, self.cross.norm)).unflatten(-1, (self.config.heads, self.config.head_dim))
        q = _norm(q, self.cross.query_norm) if self.config.qk_norm else q
        return x + self.cross.out(self._attend(q, self.context_keys, self.context_values))

    def _self_attention(self, x: Tensor, cos: Tensor, sin: Tensor, place: int, filled: int) -> Tensor:
        N, K, H = self.config.heads, self.config.num_kv_heads, self.config.head_dim
        qkv = F.linear(_norm(x, self.own.norm), self.qkv).unflatten(-1, (N + 2 * K, H))
        q, k, v = qkv.split((N, K, K), dim=1)
        if self.config.qk_norm:
            q, k = _norm(q, self.own.query_norm), _norm(k, self.own.key_norm)
        self.keys[:, :, place], self.values[:, :, place] = _rotate(k, cos, sin), v
        out = self._attend(_rotate(q, cos, sin), self.keys[:, :, :filled], self.values[:, :, :filled])
        return x + self.own.out(out)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=self.grouped)
        return out.flatten(1)


def _norm(x: Tensor, norm) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, EPS)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
