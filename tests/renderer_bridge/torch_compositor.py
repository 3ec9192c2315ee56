"""A plain torch tile compositor with the rules of the CUDA kernel (facts C.4): the oracle, and a base of its stand-ins.

It shares no code with the package: tiles are walked in Python, every list is blended densely with `cumprod`, gradients
are torch's own autograd.
"""

from __future__ import annotations

import math

import torch

TILE = 16


def kernel(means2d, conics, colors, opacities, radii, depths, width, height, absgrad, max_alpha=0.999):
    """[I, G, …] → image [I, H, W, X], alpha [I, H, W, 1], differentiable; `absgrad` as gsplat's, an attribute."""
    lists = (
        (i, *one) for i in range(len(means2d)) for one in tile_lists(means2d[i], radii[i], depths[i], width, height)
    )
    return blend_lists(means2d, conics, colors, opacities, lists, width, height, absgrad, max_alpha)


def blend_lists(means2d, conics, colors, opacities, lists, width, height, absgrad, max_alpha=0.999):
    """As `kernel`, for lists (image, ids, rows, columns)."""
    image = means2d.new_zeros(len(means2d), height, width, colors.shape[-1])
    alpha = means2d.new_zeros(len(means2d), height, width, 1)
    if absgrad:
        means2d.absgrad = torch.zeros_like(means2d)
    for i, ids, rows, columns in lists:
        mean = means2d[i][ids][None].expand(len(rows), -1, -1)
        if absgrad and mean.requires_grad:

            def accumulate(gradient, i=i, ids=ids):
                means2d.absgrad[i].index_add_(0, ids, gradient.abs().sum(0))

            mean.register_hook(accumulate)
        c, a, _ = blend(mean, conics[i][ids], colors[i][ids], opacities[i][ids], rows, columns, max_alpha)
        at = (torch.tensor(i), rows, columns)
        image = image.index_put(at, c)
        alpha = alpha.index_put(at, a[:, None])
    return image, alpha


def tile_lists(means2d, radii, depths, width, height):
    """Yields per tile that anything touches: Gaussian ids front to back, and its pixels' rows and columns."""
    across, down = math.ceil(width / TILE), math.ceil(height / TILE)
    order = torch.argsort(depths.detach(), stable=True)
    mean, radius = means2d.detach()[order], radii[order].to(means2d.dtype)
    low = torch.floor((mean - radius) / TILE).long()
    high = torch.ceil((mean + radius) / TILE).long()
    seen = (radii[order] > 0).all(-1)
    for ty in range(down):
        for tx in range(across):
            inside = seen & (low[:, 0] <= tx) & (tx < high[:, 0]) & (low[:, 1] <= ty) & (ty < high[:, 1])
            if not inside.any():
                continue
            rows, columns = torch.meshgrid(
                torch.arange(ty * TILE, min(ty * TILE + TILE, height)),
                torch.arange(tx * TILE, min(tx * TILE + TILE, width)),
                indexing="ij",
            )
            yield order[inside], rows.reshape(-1), columns.reshape(-1)


def blend(mean, conic, color, opacity, rows, columns, max_alpha):
    """One list into its P pixels → colour [P, X], alpha [P], and [P] whether a decision hung on rounding."""
    dx = mean[..., 0] - (columns[:, None] + 0.5)
    dy = mean[..., 1] - (rows[:, None] + 0.5)
    sigma = 0.5 * (conic[:, 0] * dx * dx + conic[:, 2] * dy * dy) + conic[:, 1] * dx * dy
    raw = opacity * torch.exp(-sigma)
    alpha = torch.clamp(raw, max=max_alpha)
    alpha = torch.where((sigma >= 0) & (alpha >= 1 / 255), alpha, torch.zeros_like(alpha))
    after = torch.cumprod(1 - alpha, dim=1)
    going = after > 1e-4
    weight = torch.where(going, alpha, torch.zeros_like(alpha)) * torch.cat(
        [torch.ones_like(after[:, :1]), after[:, :-1]], 1
    )
    left = torch.where(going, 1 - alpha, torch.ones_like(alpha)).prod(1)
    with torch.no_grad():
        close = (raw * 255 - 1).abs() < 2e-4
        close |= (raw / max_alpha - 1).abs() < 1e-5
        close |= (after * 1e4 - 1).abs() < 1e-3
        close |= (sigma.abs() < 1e-6) & (raw > 0)
    return weight @ color, 1 - left, close.any(1)


def oracle(means2d, conics, colors, opacities, radii, depths, width, height, cotangents=None, max_alpha=0.999):
    """float64 image, alpha and doubtful pixels [I, H, W]; with `cotangents(doubtful) -> (image's, alpha's)` also the
    gradients of the first four, tile by tile so that memory stays small."""
    image, alpha = (means2d.new_zeros(len(means2d), height, width, n) for n in (colors.shape[-1], 1))
    doubtful = torch.zeros(len(means2d), height, width, dtype=torch.bool)
    inputs = (means2d, conics, colors, opacities)
    lists = []
    for i in range(len(means2d)):
        for ids, rows, columns in tile_lists(means2d[i], radii[i], depths[i], width, height):
            lists.append((i, ids, rows, columns))
            with torch.no_grad():
                mean, *rest = (x[i][ids] for x in inputs)
                c, a, doubt = blend(mean[None], *rest, rows, columns, max_alpha)
            image[i, rows, columns], alpha[i, rows, columns, 0], doubtful[i, rows, columns] = c, a, doubt
    if cotangents is None:
        return image, alpha, doubtful, None
    image_bar, alpha_bar = cotangents(doubtful)
    gradients = [torch.zeros_like(x) for x in inputs]
    for i, ids, rows, columns in lists:
        leaves = [x[i][ids].detach().requires_grad_(True) for x in inputs]
        c, a, _ = blend(leaves[0][None], *leaves[1:], rows, columns, max_alpha)
        loss = (c * image_bar[i, rows, columns]).sum() + (a * alpha_bar[i, rows, columns, 0]).sum()
        for total, part in zip(gradients, torch.autograd.grad(loss, leaves), strict=True):
            total[i].index_add_(0, ids, part)
    return image, alpha, doubtful, gradients
