"""L1, SSIM, LPIPS, the offset regulariser and the likelihood of marginals, in PyTorch
(DESIGN §7; facts/encoders_and_metrics.md 3, 4).

Images are [..., H, W, 3] in [0, 1]; every leading axis is a batch, one value per image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# torchvision's `features` of VGG16: convolutions, each followed by a ReLU, and poolings, before which LPIPS reads.
VGG16 = (0, 2, "M", 5, 7, "M", 10, 12, 14, "M", 17, 19, 21, "M", 24, 26, 28)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def l1(image: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference."""
    return (image - target).abs().mean((-3, -2, -1))


def ssim(image: Tensor, target: Tensor) -> Tensor:
    """Of 3DGS: an 11 × 11 Gaussian window of deviation 1.5, zeros around the images, biased moments."""
    offsets = torch.arange(11, dtype=image.dtype, device=image.device) - 5
    line = (-(offsets**2) / (2 * 1.5**2)).exp()
    line = line / line.sum()
    window = line[:, None] * line

    def blur(x: Tensor) -> Tensor:
        channels = x.movedim(-1, -3).reshape(-1, 1, *x.shape[-3:-1])
        return F.conv2d(channels, window[None, None], padding=5)

    mx, my = blur(image), blur(target)
    vx, vy, vxy = blur(image**2) - mx**2, blur(target**2) - my**2, blur(image * target) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    value = ((2 * mx * my + c1) * (2 * vxy + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return value.reshape(*image.shape[:-3], -1).mean(-1)


class Lpips(nn.Module):
    """LPIPS 0.1 with VGG16, from weights of the user's: `lpips.LPIPS(net="vgg")` without its dropout."""

    def __init__(self, vgg: Mapping[str, Any], linear: Sequence[Any]):
        """Args:
        vgg: torchvision's state dict of VGG16 (`features.0.weight` …); other entries are not read.
        linear: five vectors [64], [128], [256], [512], [512].
        """
        super().__init__()
        for layer in VGG16:
            if layer != "M":
                for part in ("weight", "bias"):
                    self.register_buffer(f"{part}{layer}", torch.tensor(vgg[f"features.{layer}.{part}"]))
        for i, vector in enumerate(linear):
            self.register_buffer(f"linear{i}", torch.tensor(vector).flatten())

    def features(self, image: Tensor) -> list[Tensor]:
        """[B, H, W, 3] → activations [B, C, h, w] of the five slices."""
        shift, scale = (torch.tensor(x, dtype=image.dtype, device=image.device) for x in (SHIFT, SCALE))
        x, found = ((2 * image - 1 - shift) / scale).movedim(-1, 1), []
        for layer in VGG16:
            if layer == "M":
                found.append(x)
                x = F.max_pool2d(x, 2)
            else:
                weight, bias = (getattr(self, f"{part}{layer}").to(x.dtype) for part in ("weight", "bias"))
                x = F.relu(F.conv2d(x, weight, bias, padding=1))
        return [*found, x]

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        shape = image.shape[:-3]
        pairs = zip(*(self.features(x.reshape(-1, *x.shape[-3:])) for x in (image, target)), strict=True)
        distance = 0
        for i, (a, b) in enumerate(pairs):
            square = (_unit(a) - _unit(b)) ** 2
            weights = getattr(self, f"linear{i}").to(a.dtype)
            distance = distance + torch.einsum("bchw,c->bhw", square, weights).mean((-2, -1))
        return distance.reshape(shape)


def marginal_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Σ -log p of the classes `labels` [B, P] of each row under its one distribution, logits [B, V]; -1 is no class."""
    chosen = logits.log_softmax(-1).gather(1, labels.clamp(min=0))
    return -torch.where(labels >= 0, chosen, 0).sum()


def regularizer(offsets: Tensor, num_points: Tensor | None = None) -> Tensor:
    """[B, P, 3] → [B] mean squared length of the offsets (DESIGN §7, ours: the norm), padding being zero."""
    count = offsets.shape[1] if num_points is None else num_points
    return offsets.square().sum((1, 2)) / count


def _unit(x: Tensor) -> Tensor:
    """Over channels; where all are zero, zero with gradient zero (the published code's is NaN)."""
    square = x.square().sum(1, keepdim=True)
    zero = square == 0
    return torch.where(zero, 0, x / (torch.where(zero, 1, square).sqrt() + 1e-10))
