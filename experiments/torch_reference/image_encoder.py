"""DINOv2 vision transformers in PyTorch (facts/encoders_and_metrics.md 1; DESIGN §6): what a portrait is turned into.

Letters: B batch, T patches, R registers, D width, F feed-forward, N heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.torch_reference.layers import LayerNorm, Linear, multi_head
from experiments.torch_reference.settings import wide

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPS = 1e-6
SIZES = {  # width, layers, heads, swiglu
    "vits14": (384, 12, 6, False),
    "vitb14": (768, 12, 12, False),
    "vitl14": (1024, 24, 16, False),
    "vitg14": (1536, 40, 24, True),
}


class ImageEncoder(nn.Module):
    """A ViT; `named` gives the published sizes."""

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        *,
        swiglu: bool = False,
        patch: int = 14,
        registers: int = 0,
        image_size: int = 518,
        interpolation: str = "antialias",
        dtype: torch.dtype = torch.float32,
    ):
        """Args:
        image_size: pixels, of the square image whose patches the position table has rows for.
        interpolation: how the table is resized: "antialias" (models with registers), "hub" or "transformers" (those
          without, as torch.hub or Hugging Face run them).
        dtype: of products; norms and the residual stream are float32 at least.
        """
        super().__init__()
        self.grid, self.registers = image_size // patch, registers
        self.interpolation, self.dtype = interpolation, dtype
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, width))
        self.position_embedding = nn.Parameter(torch.zeros(1 + self.grid**2, width))
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(registers, width))
        self.layers = nn.ModuleList(Layer(width, heads, swiglu, dtype) for _ in range(layers))
        self.norm = LayerNorm(width, EPS)

    @classmethod
    def named(cls, name: str, image_size: int, dtype: torch.dtype = torch.float32) -> ImageEncoder:
        """ "tiny" or a DINOv2 model: vits14, vitb14, vitl14, vitg14, each also with `_reg`.

        `image_size`: of the tiny one; the position tables of published ones are those of 518 pixels.
        """
        if name == "tiny":
            return cls(64, 2, 2, image_size=image_size, dtype=dtype)
        width, layers, heads, swiglu = SIZES[name.removesuffix("_reg")]
        options = {"registers": 4} if name.endswith("_reg") else {"interpolation": "hub"}
        return cls(width, layers, heads, swiglu=swiglu, dtype=dtype, **options)

    def forward(self, images: Tensor) -> Tensor:
        """[B, H, W, 3] normalised, sides multiples of the patch → [B, 1 + T, D] cls and patches, without registers."""
        kernel, bias = (x.to(self.dtype) for x in (self.patch.weight, self.patch.bias))
        patches = F.conv2d(images.to(self.dtype).movedim(-1, 1), kernel, bias, self.patch.stride)
        rows, columns = patches.shape[-2:]
        positions = self.positions(rows, columns)
        x = patches.flatten(2).transpose(1, 2) + positions[1:]
        first = self.cls_token + positions[:1]
        if self.registers:
            first = torch.cat([first, self.register_tokens])
        x = torch.cat([first.expand(len(x), -1, -1).to(wide(self.dtype)), x.to(wide(self.dtype))], dim=1)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return torch.cat([x[:, :1], x[:, 1 + self.registers :]], dim=1)

    def positions(self, rows: int, columns: int) -> Tensor:
        """[1 + rows · columns, D]: the table, resized if the image has another number of patches."""
        table = self.position_embedding
        if rows == columns == self.grid:
            return table
        grid = table[1:].unflatten(0, (self.grid, self.grid)).movedim(-1, 0)[None]
        options = {"mode": "bicubic", "align_corners": False}
        if self.interpolation == "antialias":
            options |= {"size": (rows, columns), "antialias": True}
        elif self.interpolation == "transformers":
            options["size"] = rows, columns
        else:
            # torch.hub's models give the scale instead of the size, a tenth of a patch more than it should be.
            options["scale_factor"] = tuple((n + 0.1) / self.grid for n in (rows, columns))
        resized = F.interpolate(grid, **options)[0]
        return torch.cat([table[:1], resized.flatten(1).T])


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, swiglu: bool, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.norm1, self.norm2 = LayerNorm(width, EPS), LayerNorm(width, EPS)
        self.attention = SelfAttention(width, heads)
        self.scale1, self.scale2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.mlp = SwiGlu(width) if swiglu else GeluMlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x).to(self.dtype)) * self.scale1
        return x + self.mlp(self.norm2(x).to(self.dtype)) * self.scale2


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.out = heads, Linear(width, 3 * width), Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(multi_head(*self.qkv(x).chunk(3, dim=-1), self.heads))


class GeluMlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up, self.down = Linear(width, hidden), Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class SwiGlu(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        # Two thirds of 4D, rounded up to a multiple of 8.
        hidden = (int(4 * width * 2 / 3) + 7) // 8 * 8
        self.gate, self.up, self.down = Linear(width, hidden), Linear(width, hidden), Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def normalize_images(images: Tensor) -> Tensor:
    """RGB in [0, 1] → what DINOv2 reads."""
    mean, deviation = (torch.tensor(x, dtype=images.dtype, device=images.device) for x in (IMAGE_MEAN, IMAGE_STD))
    return (images - mean) / deviation
