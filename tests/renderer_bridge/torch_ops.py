"""What gsplat 1.5's compiled extension does, on CPU: stands in for `gsplat.cuda._backend._C` in `DirectKernel`.

Names, order of arguments, types and the reading of tile lists are those of `cuda/include/Ops.h` and of the kernels
(RasterizeToPixels3DGSBwd.cu: the grid of tiles comes from the shape of `tile_offsets`, a masked tile is left before its
range is read, and only the very last tile's list ends with `flatten_ids`). An index outside an array is an error here.
"""

from __future__ import annotations

import torch
from torch_compositor import TILE, blend, tile_lists

MAX_ALPHA = 0.999


def intersect_tile(
    means2d, radii, depths, image_ids, gaussian_ids, I, tile_size, tile_width, tile_height, sort, segmented
):
    assert (image_ids, gaussian_ids, tile_size, sort, segmented) == (None, None, TILE, True, False)
    assert means2d.shape == radii.shape == (I, depths.shape[1], 2)
    _check_input(means2d, depths)
    assert radii.dtype == torch.int32
    assert radii.is_contiguous()
    counts = torch.zeros(depths.shape, dtype=torch.int32)
    keys, ids = [], []
    for i in range(I):
        for rows, y, x in tile_lists(means2d[i], radii[i], depths[i], tile_width * TILE, tile_height * TILE):
            counts[i, rows] += 1
            # Depth is not in these keys: the lists are already in order.
            keys.append(
                torch.full((len(rows),), (i * tile_height + int(y[0]) // TILE) * tile_width + int(x[0]) // TILE)
            )
            ids.append(i * depths.shape[1] + rows)
    empty = torch.zeros(0, dtype=torch.int64)
    return counts, torch.cat([empty, *keys]), torch.cat([empty, *ids]).int()


def intersect_offset(isect_ids, I, tile_width, tile_height):
    tiles = torch.arange(I * tile_height * tile_width)
    return torch.searchsorted(isect_ids, tiles).int().view(I, tile_height, tile_width)


def rasterize_to_pixels_3dgs_fwd(
    means2d,
    conics,
    colors,
    opacities,
    backgrounds,
    masks,
    image_width,
    image_height,
    tile_size,
    tile_offsets,
    flatten_ids,
):
    assert backgrounds is None
    assert masks is None
    assert tile_size == TILE
    _check_input(means2d, conics, colors, opacities)
    I = tile_offsets.shape[0]
    renders = torch.zeros(I, image_height, image_width, colors.shape[-1])
    alphas = torch.zeros(I, image_height, image_width, 1)
    last_ids = torch.zeros(I, image_height, image_width, dtype=torch.int32)
    inputs = [x.flatten(0, 1) for x in (means2d, conics, colors, opacities)]
    for i, start, stop, y, x in _tiles(tile_offsets, flatten_ids, None, image_width, image_height):
        mean, conic, color, opacity = (v[flatten_ids[start:stop].long()] for v in inputs)
        c, a, _ = blend(mean[None].expand(len(y), -1, -1), conic, color, opacity, y, x, MAX_ALPHA)
        renders[i, y, x], alphas[i, y, x, 0] = c, a
        alpha = _alphas(mean, conic, opacity, y, x)[0]
        used = (alpha > 0) & (torch.cumprod(1 - alpha, 1) > 1e-4)
        places = torch.arange(start, stop).expand(len(y), -1)
        last_ids[i, y, x] = torch.where(used, places, 0).amax(1).int()
    return renders, alphas, last_ids


def rasterize_to_pixels_3dgs_bwd(
    means2d,
    conics,
    colors,
    opacities,
    backgrounds,
    masks,
    image_width,
    image_height,
    tile_size,
    tile_offsets,
    flatten_ids,
    render_alphas,
    last_ids,
    v_render_colors,
    v_render_alphas,
    absgrad,
):
    assert backgrounds is None
    assert tile_size == TILE
    _check_input(means2d, conics, colors, opacities, render_alphas, v_render_colors, v_render_alphas)
    assert masks.shape == tile_offsets.shape
    assert masks.dtype == torch.bool
    assert last_ids.dtype == tile_offsets.dtype == flatten_ids.dtype == torch.int32
    inputs = [x.flatten(0, 1) for x in (means2d, conics, colors, opacities)]
    v_means, v_conics, v_colors, v_opacities = gradients = [torch.zeros_like(x) for x in inputs]
    v_abs = torch.zeros_like(v_means)
    for i, start, stop, y, x in _tiles(tile_offsets, flatten_ids, masks, image_width, image_height):
        ids = flatten_ids[start:stop].long()
        mean, conic, color, opacity = (v[ids] for v in inputs)
        alpha, raw, dx, dy = _alphas(mean, conic, opacity, y, x)
        alpha = torch.where(torch.arange(start, stop) <= last_ids[i, y, x, None], alpha, 0)
        # From the light that is left, backwards.
        light = 1 - render_alphas[i, y, x]
        before = light / (1 - alpha).flip(1).cumprod(1).flip(1)
        weight = alpha * before
        seen = v_render_colors[i, y, x] @ color.T  # [P, K]
        behind = (weight * seen).flip(1).cumsum(1).flip(1) - weight * seen
        v_alpha = before * seen + (light * v_render_alphas[i, y, x] - behind) / (1 - alpha)
        v_alpha = torch.where((alpha > 0) & (raw <= MAX_ALPHA), v_alpha, 0)
        v_sigma = -raw * v_alpha
        v_xy = [v_sigma * (conic[:, 0] * dx + conic[:, 1] * dy), v_sigma * (conic[:, 1] * dx + conic[:, 2] * dy)]
        v_conic = [0.5 * v_sigma * dx * dx, v_sigma * dx * dy, 0.5 * v_sigma * dy * dy]
        v_means.index_add_(0, ids, torch.stack(v_xy, -1).sum(0))
        v_abs.index_add_(0, ids, torch.stack(v_xy, -1).abs().sum(0))
        v_conics.index_add_(0, ids, torch.stack(v_conic, -1).sum(0))
        v_colors.index_add_(0, ids, weight.T @ v_render_colors[i, y, x])
        v_opacities.index_add_(0, ids, (raw / opacity * v_alpha).sum(0))
    shapes = (means2d, conics, colors, opacities)
    return v_abs.view_as(means2d) if absgrad else None, *(g.view_as(x) for g, x in zip(gradients, shapes, strict=True))


def _tiles(tile_offsets, flatten_ids, masks, image_width, image_height):
    """Image, range in `flatten_ids`, rows and columns of every tile that the kernel would work on."""
    _, tile_height, tile_width = tile_offsets.shape
    offsets = tile_offsets.flatten().tolist()
    for tile in range(len(offsets)):
        if masks is not None and not masks.flatten()[tile]:
            continue
        start = offsets[tile]
        stop = len(flatten_ids) if tile == len(offsets) - 1 else offsets[tile + 1]
        i, ty, tx = tile // (tile_height * tile_width), tile // tile_width % tile_height, tile % tile_width
        y, x = torch.meshgrid(
            torch.arange(ty * TILE, min(ty * TILE + TILE, image_height)),
            torch.arange(tx * TILE, min(tx * TILE + TILE, image_width)),
            indexing="ij",
        )
        assert 0 <= start <= stop <= len(flatten_ids)
        if start < stop:
            yield i, start, stop, y.reshape(-1), x.reshape(-1)


def _alphas(mean, conic, opacity, y, x):
    """alpha (0 where the kernel skips), opacity · exp(−sigma), dx and dy, each [P, K]."""
    dx, dy = mean[:, 0] - (x[:, None] + 0.5), mean[:, 1] - (y[:, None] + 0.5)
    sigma = 0.5 * (conic[:, 0] * dx * dx + conic[:, 2] * dy * dy) + conic[:, 1] * dx * dy
    raw = opacity * torch.exp(-sigma)
    alpha = raw.clamp(max=MAX_ALPHA)
    return torch.where((sigma >= 0) & (alpha >= 1 / 255), alpha, 0), raw, dx, dy


def _check_input(*tensors):
    for x in tensors:
        assert x.is_contiguous()
        assert x.dtype == torch.float32
        assert x.dim() in (2, 3, 4)
