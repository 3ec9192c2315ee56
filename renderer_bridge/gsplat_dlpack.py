"""gsplat's CUDA tile rasteriser inside jitted JAX programs: device buffers pass by DLPack, nothing touches the host.

XLA calls back into Python (`buffer_callback`) while it enqueues work; torch wraps the very same device buffers and runs
gsplat's kernels on XLA's own stream, so that the stream alone orders the two frameworks. The backward pass recomputes:
the number of intersections is dynamic, hence nothing of it can be a JAX residual. Source: facts D.2 to D.4.

torch and gsplat are imported when the first kernel runs or `unavailable()` is asked, never before.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from renderer_bridge import varying
from renderer_bridge.binning import TILE, tile_grid
from renderer_bridge.errors import RasterizeError

# kernel(means2d [I,G,2], conics [I,G,3], colors [I,G,X], opacities [I,G], radii [I,G,2] int32, depths [I,G], width,
# height, absgrad) -> (image [I,H,W,X], alpha [I,H,W,1]); torch tensors, differentiable in the first four, I = images.
# With `absgrad` its backward sets the attribute `means2d.absgrad` [I,G,2], as gsplat's does.
Kernel = Callable[..., tuple[Any, Any]]


class _Config(NamedTuple):
    """Everything static. Callbacks are cached by it: a fresh callback object would recompile the program."""

    width: int
    height: int
    absgrad: bool
    eager: bool
    synchronize: bool
    kernel: Kernel


class _Inputs(NamedTuple):
    means2d: jax.Array  # [C, G, 2]
    conics: jax.Array  # [C, G, 3]
    colors: jax.Array  # [C, G, X]
    opacities: jax.Array  # [C, G]
    radii: jax.Array  # [C, G, 2] int32
    depths: jax.Array  # [C, G]


def rasterize_tiles(
    means2d: jax.Array,  # [C, G, 2]
    conics: jax.Array,  # [C, G, 3]
    colors: jax.Array,  # [C, G, X]
    opacities: jax.Array,  # [C, G]
    radii: jax.Array,  # [C, G, 2] int32
    depths: jax.Array,  # [C, G]
    width: int,
    height: int,
    *,
    absgrad_probe: jax.Array | None = None,  # [C, G, 2] zeros
    eager: bool = False,
    kernel: Kernel | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Blends with a torch kernel over black; the counterpart of `tiles.blend_tiles`.

    Args:
      eager: without `buffer_callback`: the kernel runs between two JAX programs, so this cannot be jitted.
      kernel: takes gsplat's place (tests do this with a CPU kernel); None = gsplat on CUDA.

    Returns:
      image [C, H, W, X], alpha [C, H, W, 1].

    Raises:
      RasterizeError: not float32, or `eager` inside a jitted program.
    """
    if means2d.dtype != jnp.float32:
        raise RasterizeError(f"the gsplat back end computes in float32 but got {means2d.dtype}; use backend='jax'.")
    config = _Config(
        width, height, absgrad_probe is not None, eager, jax.local_device_count() > 1, kernel or gsplat_kernel
    )
    if absgrad_probe is None:
        absgrad_probe = jnp.zeros_like(means2d)
    inputs = _Inputs(means2d, conics, colors, opacities, radii, jax.lax.stop_gradient(depths))
    # All inputs get one type before the custom rule: its cotangents must have the types of its inputs.
    inputs, absgrad_probe = varying.vary((inputs, absgrad_probe), varying.axes_of((inputs, absgrad_probe)))
    return _rasterize(config, inputs, absgrad_probe)


def unavailable() -> str | None:
    """Why gsplat cannot be used here, as a phrase with the remedy; None when it can."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed (pip install torch)"
    if importlib.util.find_spec("gsplat") is None:
        return "gsplat is not installed (pip install gsplat)"
    if not any(device.platform == "gpu" for device in jax.local_devices()):
        return "JAX sees no CUDA device (pip install 'jax[cuda13]')"
    import torch

    if not torch.cuda.is_available():
        return "torch sees no CUDA device (install a CUDA build of torch)"
    return None


def max_alpha() -> float:
    """The alpha clamp compiled into the installed gsplat: .999 up to 1.5, .99 since 1.6 (facts C.3)."""
    import gsplat

    major, minor = (int(part) for part in gsplat.__version__.split(".")[:2])
    return 0.99 if (major, minor) >= (1, 6) else 0.999


def gsplat_kernel(means2d, conics, colors, opacities, radii, depths, width, height, absgrad):
    """gsplat's three tile operations, which are call-compatible in 1.5.x and 1.6 (facts C.3)."""
    from gsplat.cuda._wrapper import isect_offset_encode, isect_tiles, rasterize_to_pixels

    across, down = tile_grid(width, height)
    _, isect_ids, flatten_ids = isect_tiles(means2d.detach(), radii, depths, TILE, across, down, packed=False)
    offsets = isect_offset_encode(isect_ids, means2d.shape[0], across, down)
    return rasterize_to_pixels(
        means2d, conics, colors, opacities, width, height, TILE, offsets, flatten_ids, packed=False, absgrad=absgrad
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rasterize(config: _Config, inputs: _Inputs, absgrad_probe: jax.Array):
    del absgrad_probe
    C, _, X = inputs.colors.shape
    shapes = ((C, config.height, config.width, X), (C, config.height, config.width, 1))
    return _call(config, _forward, shapes, tuple(inputs))


def _rasterize_fwd(config: _Config, inputs: _Inputs, absgrad_probe: jax.Array):
    return _rasterize(config, inputs, absgrad_probe), inputs


def _rasterize_bwd(config: _Config, inputs: _Inputs, cotangents):
    shapes = tuple(x.shape for x in inputs[:4]) + ((inputs.means2d.shape,) if config.absgrad else ())
    gradients = _call(config, _backward, shapes, (*inputs, *cotangents))
    axes = varying.axes_of(inputs)
    absgrad = gradients[4] if config.absgrad else varying.vary(jnp.zeros_like(inputs.means2d), axes)
    return _Inputs(*gradients[:4], None, varying.vary(jnp.zeros_like(inputs.depths), axes)), absgrad


_rasterize.defvjp(_rasterize_fwd, _rasterize_bwd)


def _forward(config: _Config, tensors):
    """[I, …] tensors → (image, alpha)."""
    import torch

    with torch.no_grad():
        return config.kernel(*tensors, config.width, config.height, False)


def _backward(config: _Config, tensors):
    """[I, …] tensors of the inputs and the two cotangents → gradients of the first four (, absolute gradient)."""
    import torch

    # Detached: the buffers belong to XLA and are immutable; autograd must not write `.grad` or versions into them.
    leaves = [tensor.detach().requires_grad_(True) for tensor in tensors[:4]]
    with torch.enable_grad():
        image, alpha = config.kernel(*leaves, *tensors[4:6], config.width, config.height, config.absgrad)
        touched = image.requires_grad  # not where the kernel found nothing to blend
        gradients = (
            torch.autograd.grad((image, alpha), leaves, tensors[6:], allow_unused=True) if touched else [None] * 4
        )
    gradients = [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True)]
    if config.absgrad:
        gradients.append(leaves[0].absgrad if hasattr(leaves[0], "absgrad") else torch.zeros_like(leaves[0]))
    return gradients


def _call(config: _Config, function, shapes, arguments) -> tuple[jax.Array, ...]:
    """Runs `function(config, tensors)` on the arrays; float32 results of the given shapes."""
    if config.eager:
        return _call_eagerly(config, function, arguments)
    try:
        from jax.experimental.buffer_callback import buffer_callback
    except ImportError as error:
        raise RasterizeError("this JAX has no buffer_callback (it came with 0.6.1); use dlpack='eager'.") from error
    results = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    call = buffer_callback(_callback(config, function), results, vmap_method="broadcast_all")
    return varying.vary(tuple(call(*arguments)), varying.axes_of(arguments))


@functools.cache
def _callback(config: _Config, function):
    """One callback object per configuration and direction."""

    def callback(context, outputs, *buffers) -> None:
        try:
            import torch

            with _on_stream(torch, context, buffers[0], config.synchronize):
                tensors = [torch.from_dlpack(buffer) for buffer in buffers]
                results = function(config, _fold(tensors))
                for output, result in zip(outputs, results, strict=True):
                    target = torch.from_dlpack(output)
                    target.copy_(result.reshape(target.shape))
        except Exception as error:
            # XLA turns this into a JaxRuntimeError that carries the sentence.
            raise RasterizeError(
                f"the tile rasterisation kernel failed inside the JAX program: {type(error).__name__}: {error} "
                "(python -m experiments.bench_render --against=gsplat tries the kernels on their own)."
            ) from error

    return callback


def _call_eagerly(config: _Config, function, arguments) -> tuple[jax.Array, ...]:
    if any(isinstance(x, jax.core.Tracer) for x in arguments):
        raise RasterizeError("dlpack='eager' cannot run inside jit, scan, remat or vmap; use dlpack='callback'.")
    import torch

    # The arrays' own __dlpack__ makes torch's current stream wait for JAX.
    tensors = [torch.from_dlpack(x) for x in arguments]
    results = [x.contiguous() for x in function(config, _fold(tensors))]
    if tensors[0].is_cuda:
        torch.cuda.current_stream(tensors[0].device).synchronize()
    return tuple(jnp.from_dlpack(x.detach()) for x in results)


def _fold(tensors):
    """Folds vmapped axes and cameras into gsplat's image axis. Trailing axes kept, by the order of `_Inputs`."""
    trailing = (2, 2, 2, 1, 2, 1, 3, 3)
    return [t.reshape(-1, *t.shape[t.ndim - keep :]) for t, keep in zip(tensors, trailing, strict=False)]


@contextlib.contextmanager
def _on_stream(torch, context, buffer, synchronize: bool):
    """torch on the device of `buffer` and on XLA's stream; does nothing on CPU."""
    kind, index = buffer.__dlpack_device__()
    if int(kind) == 1:  # kDLCPU
        yield
        return
    device = torch.device("cuda", index)
    stream = torch.cuda.ExternalStream(context.stream, device=device)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        if synchronize:
            # gsplat 1.5 reads the number of intersections with `.item()` while it holds the GIL. If a collective that
            # waits for another GPU of this process were still queued here, that GPU's callback could never take the
            # GIL. This wait releases it, so only local work is pending afterwards (facts D.4).
            stream.synchronize()
        yield
