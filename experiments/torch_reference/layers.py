"""Norms, products and rotary positions of the two transformers.

Parameters may be wider than the computation: they are cast where they are used, and norms stay as wide as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.torch_reference.settings import wide

EPS = 1e-6


class RMSNorm(nn.Module):
    """x / rms(x) · weight in float32 at least, returned in the dtype of x."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        dtype = wide(x.dtype)
        return F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), EPS).to(x.dtype)


class Linear(nn.Linear):
    """A product in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class GatedMlp(nn.Module):
    """down(gelu(gate x) · up x), or without a gate down(gelu(up x)); its norm included, the residual not."""

    def __init__(self, width: int, hidden: int, gated: bool = True):
        super().__init__()
        self.norm = RMSNorm(width)
        self.up = Linear(width, hidden, bias=False)
        self.down = Linear(hidden, width, bias=False)
        self.gate = Linear(width, hidden, bias=False) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.gate is None:
            return self.down(gelu(self.up(y)))
        return self.down(gelu(self.gate(y)) * self.up(y))


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def rotary_frequencies(head_dim: int, theta: float, dtype: torch.dtype, device: Any = None) -> Tensor:
    """[H/2] theta^(-2i/H)."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim
    return (theta**-exponents).to(dtype)


def rotary_angles(positions: Tensor | int, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., H/2] at positions [...]."""
    positions = torch.as_tensor(positions, device=frequencies.device)
    phases = positions[..., None].to(frequencies.dtype) * frequencies
    return phases.cos(), phases.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the pairs (x_i, x_{i+H/2}) of [..., N, H] by angles [..., H/2], in float32 at least."""
    cos, sin = (a[..., None, :] for a in angles)
    first, second = x.to(wide(x.dtype)).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
