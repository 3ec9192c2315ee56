"""gsplat's tile kernels on torch tensors, behind one small interface, and what a backward pass keeps of their lists.

Sources: gsplat 1.5.3, `cuda/csrc/{Intersect.cpp, IntersectTile.cu, RasterizeToPixels3DGS{Fwd,Bwd}.cu}`; facts C.2, C.3.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from typing import Any, NamedTuple, Protocol

from renderer_bridge.binning import TILE, tile_grid

CHANNELS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 512)  # compiled into gsplat 1.5


class Splats(NamedTuple):
    """Projected Gaussians of I images, G each, float32: what gradients are for."""

    means2d: Any  # [I, G, 2]
    conics: Any  # [I, G, 3]
    colors: Any  # [I, G, X]
    opacities: Any  # [I, G]


class Kernel(Protocol):
    """Tile rasterisation over black. Everything is float32 but what is marked.

    Tile lists: `ids` [n] int32 are rows of the flattened [I · G], grouped by image and tile, front to back; `offsets`
    [I, tiles down, tiles across] int32 says where each tile's list begins, and the next one's beginning is its end.

    Attributes:
      resumes: whether `backward` goes on from what a forward pass left behind. If not, it is given no `alpha` and no
        `last`, and nothing is kept for it.
    """

    resumes: bool

    def intersect(self, splats: Splats, radii, depths, width: int, height: int) -> tuple[Any, Any]:
        """With radii [I, G, 2] int32 and depths [I, G] → ids, offsets. Waits for the device."""

    def forward(self, splats: Splats, ids, offsets, width: int, height: int) -> tuple[Any, Any, Any]:
        """→ image [I, H, W, X], alpha [I, H, W, 1] and `last` [I, H, W] int32: where in `ids` each pixel's last
        Gaussian stands."""

    def backward(self, splats: Splats, ids, offsets, alpha, last, bars, width: int, height: int, absgrad: bool) -> list:
        """Gradients of the splats and, with `absgrad`, the absolute gradient of `means2d`. `bars`: of image and alpha.

        Here `offsets` has one more row of tiles, [I, down + 1, across], in which each image's last list ends: `ids` may
        be longer than the lists are, with anything behind them.
        """


class DirectKernel:
    """The extension's own functions. `ops`: gsplat 1.5's `gsplat.cuda._backend._C`, or what has its signatures."""

    resumes = True

    def __init__(self, ops: Any):
        self._ops = ops

    def intersect(self, splats, radii, depths, width, height):
        across, down = tile_grid(width, height)
        images = len(radii)
        sort, segmented = True, False
        _, keys, ids = self._ops.intersect_tile(
            splats.means2d, radii, depths, None, None, images, TILE, across, down, sort, segmented
        )
        return ids, self._ops.intersect_offset(keys, images, across, down)

    def forward(self, splats, ids, offsets, width, height):
        image, alpha, last = self._ops.rasterize_to_pixels_3dgs_fwd(
            *_padded_splats(splats), None, None, width, height, TILE, offsets, ids
        )
        return image[..., : splats.colors.shape[-1]], alpha, last

    def backward(self, splats, ids, offsets, alpha, last, bars, width, height, absgrad):
        # The kernel takes the grid of tiles from the shape of `offsets` and leaves a masked tile before it reads that
        # tile's range. So the extra row is only ever read as the end of the lists above it, and the end of `ids`, which
        # it takes for the end of the very last list, not at all.
        mask = _all_but_last_row(offsets.shape, offsets.device, _stream(offsets))
        inputs, (image_bar, alpha_bar) = _padded_splats(splats), bars
        absolute, *gradients = self._ops.rasterize_to_pixels_3dgs_bwd(
            *inputs, None, mask, width, height, TILE, offsets, ids, alpha, last, _padded(image_bar), alpha_bar, absgrad
        )
        gradients[2] = gradients[2][..., : splats.colors.shape[-1]]
        return [*gradients, absolute] if absgrad else gradients


class AutogradKernel:
    """The documented functions of `gsplat.cuda._wrapper` (`ops`), for versions whose own functions are not known here.

    The backward pass renders again, under torch's autograd.
    """

    resumes = False

    def __init__(self, ops: Any):
        self._ops = ops

    def intersect(self, splats, radii, depths, width, height):
        across, down = tile_grid(width, height)
        # Of the ellipse instead of its box, since 1.6.
        tight = {"conics": splats.conics, "opacities": splats.opacities}
        known = inspect.signature(self._ops.isect_tiles).parameters
        options = {name: x for name, x in tight.items() if name in known}
        _, keys, ids = self._ops.isect_tiles(
            splats.means2d, radii, depths, TILE, across, down, packed=False, n_images=len(radii), **options
        )
        return ids, self._ops.isect_offset_encode(keys, len(radii), across, down)

    def forward(self, splats, ids, offsets, width, height, absgrad=False):
        inputs, options = _padded_splats(splats), {"packed": False, "absgrad": absgrad}
        image, alpha = self._ops.rasterize_to_pixels(*inputs, width, height, TILE, offsets, ids, **options)
        return image[..., : splats.colors.shape[-1]], alpha, None

    def backward(self, splats, ids, offsets, alpha, last, bars, width, height, absgrad):
        import torch

        # Detached: the buffers belong to XLA and are immutable; autograd must not write `.grad` or versions into them.
        leaves = Splats(*(x.detach().requires_grad_(True) for x in splats))
        if len(ids) == 0:
            return [torch.zeros_like(x) for x in (*leaves, *leaves[:absgrad])]
        offsets = offsets[:, :-1].contiguous()
        with torch.enable_grad():
            image, alpha, _ = self.forward(leaves, ids, offsets, width, height, absgrad)
            gradients = list(torch.autograd.grad((image, alpha), leaves, bars))
        if absgrad:
            gradients.append(leaves.means2d.absgrad)
        return gradients


@functools.cache
def gsplat_kernel() -> Kernel:
    """What fits the installed gsplat."""
    import gsplat
    from gsplat.cuda import _backend, _wrapper

    names = ("intersect_tile", "intersect_offset", "rasterize_to_pixels_3dgs_fwd", "rasterize_to_pixels_3dgs_bwd")
    ops = getattr(_backend, "_C", None)
    known = gsplat.__version__.startswith("1.5.") and all(hasattr(ops, name) for name in names)
    return DirectKernel(ops) if known else AutogradKernel(_wrapper)


def with_ends(ids, offsets):
    """`offsets` [I, down, across] with the row in which each image's last list ends."""
    import torch

    ends = offsets.new_full((len(offsets), 1, offsets.shape[2]), len(ids))
    ends[:-1] = offsets[1:, :1, :1]
    return torch.cat([offsets, ends], 1)


def list_bounds(ids, offsets, elements: int) -> list[int]:
    """Where the lists of each of E elements (of I / E images) begin, and the last one's end."""
    # One element, the usual case, needs no further wait for the device.
    starts = [0] if elements == 1 else offsets.view(elements, -1)[:, 0].tolist()
    return [*starts, len(ids)]


def keep_lists(ids, offsets, last, bounds: list[int], rows: int, kept_last, kept_offsets, kept_ids) -> None:
    """Writes each element's lists as if it were alone: vmap may split or repeat what is kept.

    Args:
      ids, offsets, last: of all I = E · C images.
      bounds: of `list_bounds`. rows: Gaussians of one element, C · G.
      kept_last: [E, C, H, W]. kept_offsets: [E, C, down + 1, across]. kept_ids: [E, M], room for every element's list.
    """
    import torch

    starts = offsets.view(len(kept_ids), -1)[:, 0].view(-1, 1, 1, 1)
    torch.sub(last.view(kept_last.shape), starts, out=kept_last)
    kept_offsets.copy_(with_ends(ids, offsets).view(kept_offsets.shape)).sub_(starts)
    for element, (start, stop) in enumerate(itertools.pairwise(bounds)):
        torch.sub(ids[start:stop], element * rows, out=kept_ids[element, : stop - start])


def kept_lists(kept_last, kept_offsets, kept_ids, rows: int) -> tuple[Any, Any, Any]:
    """`ids` [E · M], `offsets` [I, down + 1, across] and `last` [I, H, W] of all elements from what each one kept."""
    import torch

    elements, room = kept_ids.shape
    if elements > 1:
        index = torch.arange(elements, dtype=torch.int32, device=kept_ids.device)
        places = (index * room).view(-1, 1, 1, 1)
        kept_ids = kept_ids + (index * rows)[:, None]
        kept_offsets, kept_last = kept_offsets + places, kept_last + places
    return kept_ids.flatten(), kept_offsets.flatten(0, 1), kept_last.flatten(0, 1)


def _padded(x):
    """Zero channels up to the next number that gsplat has compiled."""
    import torch

    channels = x.shape[-1]
    if channels in CHANNELS:
        return x.contiguous()
    return torch.nn.functional.pad(x, (0, min(n for n in CHANNELS if n > channels) - channels))


def _padded_splats(splats: Splats) -> Splats:
    return splats._replace(colors=_padded(splats.colors))


def _stream(x) -> int:
    import torch

    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


@functools.lru_cache(maxsize=64)
def _all_but_last_row(shape, device, stream: int):
    """[I, down + 1, across] bool. By stream, because only there it is certain to be written before it is read."""
    import torch

    del stream
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    mask[:, -1] = False
    return mask
