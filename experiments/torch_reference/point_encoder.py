"""Michelangelo's point encoder in PyTorch, a perceiver, from facts/encoders_and_metrics.md 2 alone.

Letters: B batch, P points, Q queries, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.torch_reference.layers import LayerNorm, Linear, multi_head
from experiments.torch_reference.settings import wide

EPS = 1e-5


class PointEncoder(nn.Module):
    """Learned queries read a cloud of oriented points; the defaults are the published sizes."""

    def __init__(
        self,
        width: int = 768,
        layers: int = 8,
        heads: int = 12,
        queries: int = 257,
        frequencies: int = 8,
        dtype: torch.dtype = torch.float32,
    ):
        """`dtype`: of products; norms, Fourier features and the residual stream are float32 at least."""
        super().__init__()
        self.frequencies, self.dtype = frequencies, dtype
        self.queries = nn.Parameter(torch.zeros(queries, width))
        self.input = Linear(3 + 6 * frequencies + 3, width)
        self.cross = Cross(width, heads, dtype)
        self.layers = nn.ModuleList(Own(width, heads, dtype) for _ in range(layers))
        self.norm = LayerNorm(width, EPS)

    @classmethod
    def named(cls, name: str, dtype: torch.dtype = torch.float32) -> PointEncoder:
        """ "tiny" or "michelangelo"."""
        if name == "tiny":
            return cls(width=64, layers=2, heads=2, queries=17, frequencies=6, dtype=dtype)
        return cls(dtype=dtype)

    def forward(self, points: Tensor) -> Tensor:
        """[B, P, 6] positions and unit normals → [B, Q, D]; token 0 stands for the whole shape."""
        points = points.to(wide(self.dtype))
        xyz, normals = points[..., :3], points[..., 3:]
        octaves = 2.0 ** torch.arange(self.frequencies, dtype=xyz.dtype, device=xyz.device)
        phases = (xyz[..., None] * octaves).flatten(-2)
        data = self.input(torch.cat([xyz, phases.sin(), phases.cos(), normals], dim=-1).to(self.dtype))
        x = self.cross(self.queries.to(points.dtype).expand(len(points), -1, -1), data)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Block(nn.Module):
    """What both kinds share: output projection, and the feed-forward network."""

    def __init__(self, width: int, heads: int, dtype: torch.dtype):
        super().__init__()
        self.heads, self.dtype = heads, dtype
        self.norm1, self.norm2 = LayerNorm(width, EPS), LayerNorm(width, EPS)
        self.out, self.up, self.down = Linear(width, width), Linear(width, 4 * width), Linear(4 * width, width)

    def finish(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = x + self.out(multi_head(q, k, v, self.heads))
        return x + self.down(F.gelu(self.up(self.norm2(x).to(self.dtype))))


class Cross(Block):
    def __init__(self, width: int, heads: int, dtype: torch.dtype):
        super().__init__(width, heads, dtype)
        self.data_norm = LayerNorm(width, EPS)
        self.query, self.key_value = Linear(width, width, bias=False), Linear(width, 2 * width, bias=False)

    def forward(self, x: Tensor, data: Tensor) -> Tensor:
        q = self.query(self.norm1(x).to(self.dtype))
        return self.finish(x, q, *self.key_value(self.data_norm(data)).chunk(2, dim=-1))


class Own(Block):
    def __init__(self, width: int, heads: int, dtype: torch.dtype):
        super().__init__(width, heads, dtype)
        self.query_key_value = Linear(width, 3 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(x, *self.query_key_value(self.norm1(x).to(self.dtype)).chunk(3, dim=-1))
