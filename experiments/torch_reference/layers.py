"""What the two transformers are made of: norms, products, attention, rotary positions; and their weights by name.

Parameters may be wider than the computation: they are cast where they are used, and norms stay as wide as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
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


class LayerNorm(nn.LayerNorm):
    """In float32 at least, returned in the dtype of x."""

    def __init__(self, size: int, eps: float):
        super().__init__(size, eps)

    def forward(self, x: Tensor) -> Tensor:
        dtype = wide(x.dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention to its own input or to a context, its norm included, the residual not.

    Letters: B batch, T queries, S keys, N heads, K kv heads, H head dim.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        *,
        kv_heads: int = 0,
        qk_norm: bool = False,
        context_width: int = 0,
    ):
        """`kv_heads`: grouped queries if fewer than `heads`. `context_width`: of a context of another width."""
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads or heads, head_dim
        self.norm = RMSNorm(width)
        self.query = Linear(width, heads * head_dim, bias=False)
        self.key, self.value = (Linear(context_width or width, self.kv_heads * head_dim, bias=False) for _ in range(2))
        self.out = Linear(heads * head_dim, width, bias=False)
        self.query_norm, self.key_norm = (RMSNorm(head_dim) if qk_norm else nn.Identity() for _ in range(2))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        angles: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """[B, T, D] → the branch [B, T, D].

        Args:
          context: [B, S, C], normed; keys and values come from it instead of from x.
          angles: of `rotary_angles`, by which queries and keys are turned.
          mask: True is seen; broadcasts to [B, N, T, S].
          causal: each query sees the keys up to its own place.
        """
        y = self.norm(x)
        q, (k, v) = self.queries(y), self.keys_values(y if context is None else context)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        return self.out(self.attend(q, k, v, mask, causal).transpose(1, 2).flatten(2))

    def queries(self, y: Tensor) -> Tensor:
        """[..., D] normed → [..., N, H]."""
        return self.query_norm(self.query(y).unflatten(-1, (self.heads, self.head_dim)))

    def keys_values(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """[..., D] normed → [..., K, H] each."""
        k, v = (part(y).unflatten(-1, (self.kv_heads, self.head_dim)) for part in (self.key, self.value))
        return self.key_norm(k), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Heads before tokens: [B, N, T, H], [B, K, S, H] twice → [B, N, T, H]."""
        grouped = self.heads != self.kv_heads
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)


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


def multi_head(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention of [B, T, N · H] to [B, S, N · H], heads side by side."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


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


def length_mask(lengths: Tensor | None, size: int) -> Tensor | None:
    """[B] real keys out of `size` → [B, 1, 1, size], True where there is one; None for none."""
    if lengths is None:
        return None
    return (torch.arange(size, device=lengths.device) < lengths[:, None])[:, None, None]


def load_arrays(module: nn.Module, arrays: Mapping[str, Any]) -> None:
    """Gives `module` the parameters of its JAX twin, in their dtype: nested dicts of NumPy arrays, layers stacked.

    A matrix is [in…, out…] there and [out, in] here, a convolution HWIO there and OIHW here.
    """
    state, owners = {}, dict(module.named_modules())

    def put(path: tuple[str, ...], value: np.ndarray) -> None:
        *parents, last = path
        name = next(n for n in _names(parents, last) if n in own)
        owner, shape = owners[name.rpartition(".")[0]], tuple(own[name].shape)
        if name.endswith("weight") and isinstance(owner, nn.Conv2d):
            value = value.transpose(3, 2, 0, 1)
        elif name.endswith("weight") and isinstance(owner, nn.Linear):
            value = value.reshape(shape[::-1]).T
        state[name] = torch.tensor(np.ascontiguousarray(value).reshape(shape))

    def walk(path: tuple[str, ...], tree: Any, stacked: bool) -> None:
        for key, value in tree.items():
            if isinstance(value, Mapping):
                walk((*path, key), value, stacked or key in ("layers", "mlps"))
            elif stacked:
                at = next(i for i, part in enumerate(path) if part in ("layers", "mlps")) + 1
                for i, one in enumerate(np.asarray(value)):
                    put((*path[:at], str(i), *path[at:], key), one)
            else:
                put((*path, key), np.asarray(value))

    own = module.state_dict()
    walk((), arrays, False)
    # Assigned, not copied: float64 stays float64.
    module.load_state_dict(state, assign=True)


def _names(parents: list[str], last: str) -> list[str]:
    """What a parameter may be called here: itself, a layer's weight, or (qkv_kernel, patch_bias) a layer's part."""
    if last in ("kernel", "scale"):
        return [".".join([*parents, "weight"])]
    head, _, tail = last.rpartition("_")
    part = {"kernel": "weight", "bias": "bias"}.get(tail, tail)
    return [".".join(names) for names in ([*parents, last], [*parents, last, "weight"], [*parents, head, part])]
