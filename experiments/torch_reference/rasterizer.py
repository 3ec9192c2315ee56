"""A dense differentiable splatter in PyTorch: every Gaussian at every pixel, by the CUDA kernel's rules
(facts/avatars_gsplat.md C.4; DESIGN §8). Memory is pixels × Gaussians: for small pictures and for comparisons.

Letters: G Gaussians, C cameras, H × W pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Below it a Gaussian is not seen at a pixel.
ALPHA_FLOOR = 1 / 255
# A pixel is finished before its transmittance would fall to this.
LEAST_TRANSMITTANCE = 1e-4


class Projected(NamedTuple):
    """Of one camera."""

    means2d: Tensor  # [G, 2] pixels
    depths: Tensor  # [G] camera z
    conics: Tensor  # [G, 3] inverse 2D covariance: xx, xy, yy
    opacities: Tensor  # [G] after compensation
    visible: Tensor  # [G] between the planes and not degenerate


def rasterize(
    means: Tensor,  # [G, 3]
    quats: Tensor,  # [G, 4] wxyz
    scales: Tensor,  # [G, 3]
    opacities: Tensor,  # [G]
    colors: Tensor,  # [G, X]
    viewmats: Tensor,  # [C, 4, 4] world to camera
    Ks: Tensor,  # [C, 3, 3]
    width: int,
    height: int,
    *,
    backgrounds: Tensor | None = None,  # [C, X] or [X]
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    eps2d: float = 0.3,
    antialiased: bool = False,
    max_alpha: float = 0.999,
) -> tuple[Tensor, Tensor]:
    """Images [C, H, W, X] and alphas [C, H, W, 1], differentiable in every tensor."""
    images, alphas = [], []
    for viewmat, K in zip(viewmats, Ks, strict=True):
        projected = project(
            means, quats, scales, opacities, viewmat, K, width, height,
            near_plane=near_plane, far_plane=far_plane, eps2d=eps2d, antialiased=antialiased,
        )  # fmt: skip
        image, alpha = composite(projected, colors, width, height, max_alpha)
        images.append(image)
        alphas.append(alpha)
    image, alpha = torch.stack(images), torch.stack(alphas)
    if backgrounds is not None:
        image = image + (1 - alpha) * backgrounds.expand(len(viewmats), -1)[:, None, None]
    return image, alpha


def project(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    viewmat: Tensor,
    K: Tensor,
    width: int,
    height: int,
    *,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    eps2d: float = 0.3,
    antialiased: bool = False,
) -> Projected:
    """EWA: the covariance through the Jacobian of the projection at the mean, held within 0.3 of a half field of view
    outside of the image."""
    rotation, translation = viewmat[:3, :3], viewmat[:3, 3]
    p = means @ rotation.T + translation
    depths = p[:, 2]
    visible = (depths >= near_plane) & (depths <= far_plane)
    # Culled ones are put in front of the camera, so that nothing they compute overflows.
    z = torch.where(visible, depths, 1.0)
    x, y = (torch.where(visible, p[:, i], 0.0) for i in range(2))
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    means2d = torch.stack([fx * x / z + cx, fy * y / z + cy], dim=-1)

    margin_x, margin_y = 0.3 * 0.5 * width / fx, 0.3 * 0.5 * height / fy
    tx = z * torch.clamp(x / z, -cx / fx - margin_x, (width - cx) / fx + margin_x)
    ty = z * torch.clamp(y / z, -cy / fy - margin_y, (height - cy) / fy + margin_y)
    zero = torch.zeros_like(z)
    jacobian = torch.stack(
        [torch.stack([fx / z, zero, -fx * tx / z**2], -1), torch.stack([zero, fy / z, -fy * ty / z**2], -1)], -2
    )
    axes = rotation_matrix(quats) * scales[:, None]
    world = axes @ axes.transpose(1, 2)
    to_image = jacobian @ rotation
    covariance = to_image @ world @ to_image.transpose(1, 2)
    sharp = torch.linalg.det(covariance)
    covariance = covariance + eps2d * torch.eye(2, dtype=means.dtype, device=means.device)
    determinant = torch.linalg.det(covariance)
    visible = visible & (determinant > 0)
    a, b, d = covariance[:, 0, 0], covariance[:, 0, 1], covariance[:, 1, 1]
    conics = torch.stack([d, -b, a], -1) / torch.where(visible, determinant, 1.0)[:, None]
    if antialiased:
        ratio = sharp / torch.where(visible, determinant, 1.0)
        lit = visible & (ratio > 0)
        opacities = opacities * torch.where(lit, torch.where(lit, ratio, 1.0).sqrt(), 0.0)
    return Projected(means2d, depths, conics, opacities, visible)


def composite(
    projected: Projected, colors: Tensor, width: int, height: int, max_alpha: float = 0.999
) -> tuple[Tensor, Tensor]:
    """Front to back; image [H, W, X] and alpha [H, W, 1]."""
    order = torch.argsort(projected.depths.detach(), stable=True)
    # What lies behind the camera or beyond the far plane is left out before anything is computed of it.
    order = order[projected.visible[order]]
    mean, conic, opacity, color = (x[order] for x in (projected.means2d, projected.conics, projected.opacities, colors))
    rows = torch.arange(height, dtype=mean.dtype, device=mean.device) + 0.5
    columns = torch.arange(width, dtype=mean.dtype, device=mean.device) + 0.5
    images, alphas = [], []
    for row in rows:  # A row of pixels at a time: temporaries of one dense array would be many.
        dx, dy = mean[:, 0] - columns[:, None], mean[:, 1] - row
        sigma = 0.5 * (conic[:, 0] * dx**2 + conic[:, 2] * dy**2) + conic[:, 1] * dx * dy
        alpha = (opacity * (-sigma).exp()).clamp(max=max_alpha)
        alpha = torch.where((sigma >= 0) & (alpha >= ALPHA_FLOOR), alpha, 0)
        after = (1 - alpha).cumprod(-1)
        before = torch.cat([torch.ones_like(after[:, :1]), after[:, :-1]], -1)
        # The Gaussian that would finish the pixel is itself left out, and so is all behind it.
        going = after > LEAST_TRANSMITTANCE
        weight = torch.where(going, alpha * before, 0)
        images.append(weight @ color)
        alphas.append(weight.sum(-1, keepdim=True))
    return torch.stack(images), torch.stack(alphas)


def rotation_matrix(quats: Tensor) -> Tensor:
    """[..., 4] wxyz of any length but zero → [..., 3, 3]."""
    w, x, y, z = (quats / quats.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)
