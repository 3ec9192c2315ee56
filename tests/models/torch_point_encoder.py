"""Michelangelo's point encoder in plain PyTorch, written from facts/encoders_and_metrics.md 2 alone: the oracle.

Its modules carry the checkpoint's names, and keep the checkpoint's packing of q, k and v.
"""

from __future__ import annotations

import torch
from torch import nn


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.c_proj(nn.functional.gelu(self.c_fc(x)))


def attend(q, k, v):
    """[B, tokens, heads, head dim] each. The scale is split between q and k, the softmax is in float32 or wider."""
    scale = q.shape[-1] ** -0.25
    scores = torch.einsum("bqnh,bsnh->bnqs", q * scale, k * scale)
    out = torch.einsum("bnqs,bsnh->bqnh", torch.softmax(scores, dim=-1), v)
    return out.reshape(*out.shape[:2], -1)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.c_qkv, self.c_proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x):
        # Per head, not per kind: each head's 3 · H outputs hold its q, then its k, then its v.
        packed = self.c_qkv(x).view(*x.shape[:2], self.heads, -1)
        return self.c_proj(attend(*packed.chunk(3, dim=-1)))


class CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.c_q, self.c_kv = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x, data):
        q = self.c_q(x).view(*x.shape[:2], self.heads, -1)
        packed = self.c_kv(data).view(*data.shape[:2], self.heads, -1)
        return self.c_proj(attend(q, *packed.chunk(2, dim=-1)))


class CrossBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn, self.mlp = CrossAttention(width, heads), Mlp(width)
        self.ln_1, self.ln_2, self.ln_3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x, data):
        x = x + self.attn(self.ln_1(x), self.ln_2(data))
        return x + self.mlp(self.ln_3(x))


class SelfBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn, self.mlp = SelfAttention(width, heads), Mlp(width)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Blocks(nn.Module):
    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        self.resblocks = nn.ModuleList(SelfBlock(width, heads) for _ in range(layers))


class Encoder(nn.Module):
    def __init__(self, *, width=768, layers=8, heads=12, queries=257, frequencies=8):
        super().__init__()
        self.frequencies = frequencies
        self.query = nn.Parameter(torch.zeros(queries, width))
        self.input_proj = nn.Linear(3 + 6 * frequencies + 3, width)
        self.cross_attn = CrossBlock(width, heads)
        self.self_attn = Blocks(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)

    def forward(self, points):
        xyz, normals = points[..., :3], points[..., 3:]
        waves = [xyz[..., axis, None] * 2**f for axis in range(3) for f in range(self.frequencies)]
        waves = torch.cat(waves, dim=-1)
        data = self.input_proj(torch.cat([xyz, waves.sin(), waves.cos(), normals], dim=-1))
        x = self.cross_attn(self.query.expand(len(points), -1, -1), data)
        for block in self.self_attn.resblocks:
            x = block(x)
        return self.ln_post(x)


def checkpoint(encoder: Encoder, prefix: str = "model.shape_model.") -> dict:
    """Its weights as a published file holds them: under a prefix, beside a decoder and a KL bottleneck."""
    width = encoder.query.shape[1]
    state = {f"{prefix}encoder.{name}": value for name, value in encoder.state_dict().items()}
    return state | {
        f"{prefix}pre_kl.weight": torch.zeros(128, width),
        f"{prefix}transformer.resblocks.0.ln_1.weight": torch.ones(width),
        "model.shape_projection": torch.zeros(width, width),
    }
