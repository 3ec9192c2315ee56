"""The condition in PyTorch (paper §4.1; DESIGN §6): a portrait and its tracked head → context tokens.

Letters: B batch, D width of the transformer, S context tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.torch_reference.flame import Head, head_points, surface_points, vertices
from experiments.torch_reference.image_encoder import ImageEncoder, normalize_images
from experiments.torch_reference.layers import Linear, RMSNorm
from experiments.torch_reference.point_encoder import PointEncoder
from experiments.torch_reference.settings import wide, working_dtype

if TYPE_CHECKING:
    from pointillist_jax.configs import ModelConfig


class Encoders(nn.Module):
    """Both encoders; frozen ones compute in float32 whatever the transformer does."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        encoder = config.encoder
        dtype = torch.float32 if encoder.frozen else working_dtype(config)
        self.size, self.num_points = encoder.image_size, encoder.num_points
        self.image_encoder = ImageEncoder.named(encoder.image, encoder.image_size, dtype)
        self.point_encoder = PointEncoder.named(encoder.points, dtype)

    def encode(self, head: Head, portrait: Tensor, flame: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Features {"image" [B, 1 + T, Di], "points" [B, Q, Dp]}.

        Args:
          portrait: [B, h, w, 3] uint8.
          flame: name → [B, n]; global rotation and translation are the camera's business and are left out.
        """
        images = portrait.to(wide(self.image_encoder.dtype)) / 255
        if images.shape[1:3] != (self.size, self.size):
            planes = images.movedim(-1, 1)
            planes = F.interpolate(planes, (self.size, self.size), mode="bicubic", antialias=True)
            images = planes.movedim(1, -1)
        still = {**flame, **{name: torch.zeros_like(flame[name]) for name in ("rotation", "translation")}}
        cloud = head_points(head, vertices(head, still), surface_points(head, self.num_points))
        return {"image": self.image_encoder(normalize_images(images)), "points": self.point_encoder(cloud)}


class Marginals(nn.Module):
    """States for the x, y, z and b slots from the context's mean alone: no point is read (ours)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = RMSNorm(width)
        self.x, self.y, self.z, self.b = (Linear(width, width) for _ in range(4))

    def forward(self, context: Tensor) -> list[Tensor]:
        """[B, S, D] → four times [B, D]."""
        pooled = self.norm(context.mean(1))
        return [part(pooled) for part in (self.x, self.y, self.z, self.b)]


class Condition(Encoders):
    """Three projections to the transformer's width, the encoders unless they are frozen, and `Marginals` where there
    is a loss of them (`config.condition_loss`)."""

    def __init__(self, config: ModelConfig, head: Head | None = None):
        """`head`: whose parameters conditions hold; features need none."""
        if config.encoder.frozen:
            nn.Module.__init__(self)
        else:
            super().__init__(config)
        # Not a submodule, nor buffers: it belongs in no state dict.
        self.dtype, self._head = working_dtype(config), (head,)
        # On the meta device nothing is allocated for what only has its sizes read.
        with torch.device("meta"):
            sizes = Encoders(config)
        image, points = sizes.image_encoder.norm.weight.numel(), sizes.point_encoder.norm.weight.numel()
        self.image_projection = Linear(image, config.width)
        self.shape_projection, self.parts_projection = Linear(points, config.width), Linear(points, config.width)
        self.marginals = Marginals(config.width) if config.condition_loss else None

    def forward(self, condition: Mapping[str, Any]) -> Tensor:
        """Context [B, S, D] in the dtype of the computation.

        Args:
          condition: {"features": of `Encoders.encode`} or {"portrait", "flame"} as it takes them.
        """
        features = condition.get("features")
        if features is None:
            features = self.encode(self._head[0], condition["portrait"], condition["flame"])
        image, points = (features[name].to(self.dtype) for name in ("image", "points"))
        parts = self.image_projection(image), self.shape_projection(points[:, :1]), self.parts_projection(points[:, 1:])
        return torch.cat(parts, dim=1)
