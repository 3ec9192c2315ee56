"""The autoregressive point transformer in PyTorch (DESIGN §6; paper §4.1): pre-norm, SDPA, rotary positions.

Letters as in the design: B batch, T tokens, S context, D width, N heads, K kv heads, H head dim, V classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pointillist_jax.configs import ModelConfig

EPS = 1e-6
OCTAVES = 10


class RMSNorm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, EPS).to(x.dtype)


class Attention(nn.Module):
    """Self-attention (causal, rotary) or, given a context, cross-attention (neither)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        width, heads, kv_heads, dim = config.width, config.heads, config.num_kv_heads, config.head_dim
        self.norm = RMSNorm(width)
        self.query = nn.Linear(width, heads * dim, bias=False)
        self.key = nn.Linear(width, kv_heads * dim, bias=False)
        self.value = nn.Linear(width, kv_heads * dim, bias=False)
        self.out = nn.Linear(heads * dim, width, bias=False)
        if config.qk_norm:
            self.query_norm, self.key_norm = RMSNorm(dim), RMSNorm(dim)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], context: Tensor | None = None) -> Tensor:
        config, y = self.config, self.norm(x)
        source = y if context is None else context
        q = self.query(y).unflatten(-1, (config.heads, config.head_dim))
        k = self.key(source).unflatten(-1, (config.num_kv_heads, config.head_dim))
        v = self.value(source).unflatten(-1, (config.num_kv_heads, config.head_dim))
        if config.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        if context is None:
            q, k = rotate(q, angles), rotate(k, angles)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        grouped = config.heads != config.num_kv_heads
        out = F.scaled_dot_product_attention(q, k, v, is_causal=context is None, enable_gqa=grouped)
        return self.out(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = RMSNorm(config.width)
        self.up = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)
        self.gate = nn.Linear(config.width, config.mlp_width, bias=False) if config.mlp == "gated" else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.gate is None:
            return self.down(F.gelu(self.up(y), approximate="tanh"))
        return self.down(F.gelu(self.gate(y), approximate="tanh") * self.up(y))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.cross_first = config.order == "cross_first"
        self.cross_attention, self.self_attention = Attention(config), Attention(config)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], context: Tensor) -> Tensor:
        if self.cross_first:
            x = x + self.cross_attention(x, angles, context)
            x = x + self.self_attention(x, angles)
        else:
            x = x + self.self_attention(x, angles)
            x = x + self.cross_attention(x, angles, context)
        return x + self.mlp(x)


class PointTransformer(nn.Module):
    """Hidden states and next-token loss of whole windows (T ≤ `config.window`: full causal attention)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        ids, width = config.tokenizer, config.width
        self.embedding = nn.Parameter(torch.zeros(ids.padded_vocab_size, width))
        self.context_norm, self.final_norm = RMSNorm(width), RMSNorm(width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        if config.slot_embedding:
            self.slot_embedding = nn.Parameter(torch.zeros(4, width))
        if not config.tied_head:
            self.head = nn.Parameter(torch.zeros(ids.padded_vocab_size, width))
        if config.coord_tables == "fourier_tied":
            self.coord_rows = nn.Parameter(torch.zeros(3, config.bins, width))
            self.coord_fourier = nn.Parameter(torch.zeros(3, 2 * OCTAVES, width))
            centres = (np.arange(config.bins) + 0.5) / config.bins
            phases = math.pi * centres[:, None] * 2.0 ** np.arange(OCTAVES)
            features = np.concatenate([np.sin(phases), np.cos(phases)], axis=1)
            self.register_buffer("features", torch.tensor(features, dtype=torch.float32), persistent=False)

    def coordinate_tables(self) -> list[Tensor]:
        """Rows of the x, y and z slots, [bins, D] each."""
        if self.config.coord_tables == "learned":
            return [self._classes()[: self.config.bins]] * 3
        return list(self.coord_rows + torch.einsum("bf,sfD->sbD", self.features, self.coord_fourier))

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """tokens [B, T] from position 0, context [B, S, D] → hidden states [B, T, D] after the last norm."""
        config, length = self.config, tokens.shape[1]
        slots = torch.arange(length, device=tokens.device) % 4
        x = F.embedding(tokens, self.embedding)
        if config.coord_tables == "fourier_tied":
            rows = torch.cat(self.coordinate_tables())
            index = slots.clamp(max=2) * config.bins + tokens.clamp(max=config.bins - 1)
            x = torch.where((tokens < config.bins)[..., None], F.embedding(index, rows), x)
        x = x * config.width**0.5
        if config.slot_embedding:
            x = x + self.slot_embedding[slots]
        positions = torch.arange(length, device=tokens.device, dtype=torch.float32)
        frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, device=x.device) / config.head_dim)
        phases = positions[:, None] * frequencies.float()
        angles = phases.cos(), phases.sin()
        context = self.context_norm(context)
        for layer in self.layers:
            x = layer(x, angles, context)
        return self.final_norm(x)

    def loss(self, tokens: Tensor, targets: Tensor, context: Tensor) -> Tensor:
        """Mean next-token cross-entropy over all targets that are a class of their slot."""
        hidden, ids, config = self(tokens, context), self.config.tokenizer, self.config
        coords, classes = self.coordinate_tables(), self._classes()
        total, count = hidden.new_zeros((), dtype=torch.float32), 0
        for slot in range(4):
            first = (slot - 1) % 4
            states, wanted = hidden[:, first::4], targets[:, first::4]
            if config.loss_support == "vocab":
                # P is the last id: it is no class.
                rows = torch.cat([coords[slot], classes[ids.bins :]])[: ids.pad] if slot < 3 else classes[: ids.pad]
                labels = torch.where(wanted == ids.pad, -1, wanted)
            elif slot == 3:
                rows = classes[ids.bins : ids.bos]
                labels = torch.where((wanted >= ids.bins) & (wanted < ids.bos), wanted - ids.bins, -1)
            else:
                rows, labels = coords[slot], torch.where(wanted < ids.bins, wanted, -1)
                if slot == 0:
                    rows = torch.cat([rows, classes[ids.eos, None]])
                    labels = torch.where(wanted == ids.eos, ids.bins, labels)
            logits = F.linear(states, rows).float().flatten(0, 1)
            total = total + F.cross_entropy(logits, labels.flatten(), ignore_index=-1, reduction="sum")
            count = count + (labels >= 0).sum()
        return total / count

    def _classes(self) -> Tensor:
        return self.embedding if self.config.tied_head else self.head


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the pairs (x_i, x_{i+H/2}) of [B, T, N, H] by [T, H/2] angles, given as cosines and sines."""
    cos, sin = (a[:, None] for a in angles)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def load_arrays(module: PointTransformer, arrays: Mapping[str, Any]) -> None:
    """Copies the JAX model's parameters (nested dicts of NumPy arrays, layers stacked) into `module`."""
    state, own = {}, module.state_dict()

    def put(name: str, value: np.ndarray) -> None:
        shape = tuple(own[name].shape)
        if name.startswith("layers") and value.ndim > 1:
            # [in…, out…] there, [out, in] here.
            value = value.reshape(shape[::-1]).T
        state[name] = torch.tensor(np.ascontiguousarray(value).reshape(shape))

    for name, value in arrays.items():
        if name == "layers":
            for part, content in value.items():
                for key, stacked in content.items():
                    for i, one in enumerate(np.asarray(stacked)):
                        put(f"layers.{i}.{part}.{key}.weight", one)
        else:
            put(f"{name}.weight" if name.endswith("norm") else name, np.asarray(value))
    module.load_state_dict(state)
