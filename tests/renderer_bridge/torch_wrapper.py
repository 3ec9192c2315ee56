"""The documented functions of `gsplat.cuda._wrapper` on CPU: stand in for them in `AutogradKernel`."""

from __future__ import annotations

import torch_compositor
import torch_ops


def isect_tiles(
    means2d, radii, depths, tile_size, tile_width, tile_height, *, packed, n_images, conics=None, opacities=None
):
    """As since 1.6, where the ellipse can be given too."""
    assert not packed
    assert n_images == len(means2d)
    assert conics.shape[:2] == opacities.shape == depths.shape
    return torch_ops.intersect_tile(
        means2d, radii, depths, None, None, n_images, tile_size, tile_width, tile_height, True, False
    )


def isect_offset_encode(isect_ids, n_images, tile_width, tile_height):
    return torch_ops.intersect_offset(isect_ids, n_images, tile_width, tile_height)


def rasterize_to_pixels(
    means2d, conics, colors, opacities, width, height, tile_size, isect_offsets, flatten_ids, *, packed, absgrad
):
    assert not packed
    image, alpha = torch_compositor.blend_lists(
        means2d,
        conics,
        colors,
        opacities,
        (
            (i, flatten_ids[start:stop].long() - i * means2d.shape[1], y, x)
            for i, start, stop, y, x in torch_ops._tiles(isect_offsets, flatten_ids, None, width, height)
        ),
        width,
        height,
        absgrad,
    )
    return image, alpha
