"""gsplat's CUDA tile rasteriser inside jitted JAX programs: device buffers pass by DLPack, nothing touches the host.

XLA calls back into Python (`buffer_callback`) while it enqueues work; torch wraps the very same device buffers and runs
gsplat's kernels on XLA's own stream, so that the stream alone orders the two frameworks. Source: facts D.2 to D.4.

The number of tile intersections is dynamic, JAX's shapes are not: a forward pass that will be differentiated keeps its
sorted lists in arrays of a static `capacity`, whose unused end is never read. Where they do not fit, the backward pass
makes them again. A forward pass alone keeps nothing.

torch and gsplat are imported when the first kernel runs or `unavailable()` is asked, never before.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import itertools
import logging
import math
import threading
from typing import NamedTuple

import jax
import jax.numpy as jnp

from renderer_bridge import varying
from renderer_bridge.binning import tile_grid
from renderer_bridge.errors import RasterizeError
from renderer_bridge.torch_kernels import (
    CHANNELS,
    Kernel,
    Splats,
    gsplat_kernel,
    keep_lists,
    kept_lists,
    list_bounds,
    with_ends,
)

_log = logging.getLogger(__name__)


class _Config(NamedTuple):
    """Everything static. Callbacks are cached by it: a fresh callback object would recompile the program."""

    width: int
    height: int
    absgrad: bool
    eager: bool
    synchronize: bool
    capacity: int  # 0: nothing is kept for the backward pass
    kernel: Kernel


_overflow_flags: dict[_Config, threading.Event] = {}


class _Inputs(NamedTuple):
    means2d: jax.Array  # [C, G, 2]
    conics: jax.Array  # [C, G, 3]
    colors: jax.Array  # [C, G, X]
    opacities: jax.Array  # [C, G]
    radii: jax.Array  # [C, G, 2] int32
    depths: jax.Array  # [C, G]


class _Kept(NamedTuple):
    """What the backward pass goes on from: gsplat's own residuals, the lists padded to the capacity."""

    alpha: jax.Array  # [C, H, W, 1]
    last: jax.Array  # [C, H, W] int32
    offsets: jax.Array  # [C, tiles down + 1, tiles across] int32
    ids: jax.Array  # [capacity] int32


# How many axes the arrays of a callback have; those of vmap come before them.
_INPUT_AXES = _Inputs(3, 3, 3, 2, 3, 2)
_BAR_AXES = (4, 4)
_KEPT_AXES = _Kept(4, 3, 3, 1)


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
    capacity: int,
    absgrad_probe: jax.Array | None = None,  # [C, G, 2] zeros
    eager: bool = False,
    kernel: Kernel | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Blends with a torch kernel over black; the counterpart of `tiles.blend_tiles`.

    Args:
      capacity: tile intersections that are kept for the backward pass; with more of them it is as exact, but sorts and
        blends again.
      eager: without `buffer_callback`: the kernel runs between two JAX programs, so this cannot be jitted.
      kernel: takes gsplat's place (tests do this with a CPU kernel); None = gsplat on CUDA.

    Returns:
      image [C, H, W, X], alpha [C, H, W, 1].

    Raises:
      RasterizeError: not float32, more channels than gsplat has, or `eager` inside a jitted program.
    """
    if means2d.dtype != jnp.float32:
        raise RasterizeError(f"the gsplat back end computes in float32 but got {means2d.dtype}; use backend='jax'.")
    if colors.shape[-1] > CHANNELS[-1]:
        raise RasterizeError(
            f"the gsplat back end blends at most {CHANNELS[-1]} channels but got {colors.shape[-1]}; use backend='jax'."
        )
    kernel = gsplat_kernel() if kernel is None else kernel
    config = _Config(
        width=width,
        height=height,
        absgrad=absgrad_probe is not None,
        eager=eager,
        synchronize=jax.local_device_count() > 1,
        capacity=capacity if kernel.resumes else 0,
        kernel=kernel,
    )
    if absgrad_probe is None:
        absgrad_probe = jnp.zeros_like(means2d)
    inputs = _Inputs(means2d, conics, colors, opacities, radii, jax.lax.stop_gradient(depths))
    # All inputs get one type before the custom rule: its cotangents must have the types of its inputs.
    inputs, absgrad_probe = varying.vary((inputs, absgrad_probe), varying.axes_of((inputs, absgrad_probe)))
    return _rasterize(config, inputs, absgrad_probe)


@functools.cache
def unavailable() -> str | None:
    """Why gsplat cannot be used here, as a phrase with the remedy; None when it can. The first time it loads gsplat's
    CUDA kernels, which a wheel without them compiles then (minutes)."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed (pip install torch)"
    if importlib.util.find_spec("gsplat") is None:
        return "gsplat is not installed (pip install gsplat)"
    if not any(device.platform == "gpu" for device in jax.local_devices()):
        return "JAX sees no CUDA device (pip install 'jax[cuda13]')"
    import torch

    if not torch.cuda.is_available():
        return "torch sees no CUDA device (install a CUDA build of torch)"
    return _unloadable()


def _unloadable() -> str | None:
    remedy = "(install a CUDA toolkit with nvcc that fits torch's, or one of gsplat's prebuilt wheels)"
    try:
        backend = importlib.import_module("gsplat.cuda._backend")
    except Exception as error:  # whatever a compiler or a linker may say
        said = (str(error).strip() or "no message").splitlines()[0]
        return f"gsplat's CUDA kernels do not load: {type(error).__name__}: {said} {remedy}"
    # Without nvcc gsplat 1.5 only prints a notice and leaves None.
    return f"gsplat's CUDA kernels are not built {remedy}" if getattr(backend, "_C", ...) is None else None


def max_alpha() -> float:
    """The alpha clamp compiled into the installed gsplat: .999, or since 1.6 what its constants say (facts C.3)."""
    try:
        return float(importlib.import_module("gsplat.cuda._constants").MAX_ALPHA)
    except (ImportError, AttributeError):
        return 0.999


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rasterize(config: _Config, inputs: _Inputs, absgrad_probe: jax.Array):
    del absgrad_probe
    return _call(config, _forward, _image_types(config, inputs), inputs)


def _rasterize_fwd(config: _Config, inputs: _Inputs, absgrad_probe: jax.Array):
    if not config.capacity:
        return _rasterize(config, inputs, absgrad_probe), (inputs, None)
    C = inputs.depths.shape[0]
    across, down = tile_grid(config.width, config.height)
    shapes = ((C, config.height, config.width), (C, down + 1, across), (config.capacity,))
    types = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]
    image, alpha, *lists = _call(config, _forward, [*_image_types(config, inputs), *types], inputs)
    return (image, alpha), (inputs, _Kept(alpha, *lists))


def _rasterize_bwd(config: _Config, residuals, cotangents):
    inputs, kept = residuals
    like = (*inputs[:4], inputs.means2d)[: 4 + config.absgrad]
    types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like]
    gradients = _call(config, _backward, types, (*inputs, *cotangents, *(kept or ())))
    axes = varying.axes_of(inputs)
    absgrad = gradients[4] if config.absgrad else varying.vary(jnp.zeros_like(inputs.means2d), axes)
    return _Inputs(*gradients[:4], None, varying.vary(jnp.zeros_like(inputs.depths), axes)), absgrad


_rasterize.defvjp(_rasterize_fwd, _rasterize_bwd)


def _image_types(config: _Config, inputs: _Inputs) -> list[jax.ShapeDtypeStruct]:
    C, _, X = inputs.colors.shape
    return [jax.ShapeDtypeStruct((C, config.height, config.width, n), jnp.float32) for n in (X, 1)]


def _forward(config: _Config, tensors, outputs) -> None:
    """Tensors of `_Inputs` → image, alpha and, if there are outputs for them, what `_Kept` has besides alpha."""
    tensors = _fold(tensors, _INPUT_AXES)
    *splats, radii, depths = _flat(tensors)
    splats, size = Splats(*splats), (config.width, config.height)
    ids, offsets = config.kernel.intersect(splats, radii, depths, *size)
    kept = _fold(outputs[2:], _KEPT_AXES[1:])
    # Read before the kernel is launched: reading waits for everything launched before it.
    bounds = list_bounds(ids, offsets, len(tensors[0])) if kept else None
    image, alpha, last = config.kernel.forward(splats, ids, offsets, *size)
    _write(outputs[:2], (image, alpha))
    if kept and _fits(config, bounds):
        keep_lists(ids, offsets, last, bounds, tensors[5][0].numel(), *kept)


def _backward(config: _Config, tensors, outputs) -> None:
    """Tensors of `_Inputs`, the two cotangents and, if anything was kept, `_Kept` → gradients of the first four inputs
    (and the absolute gradient)."""
    tensors = _fold(tensors, (*_INPUT_AXES, *_BAR_AXES, *_KEPT_AXES))
    *splats, radii, depths, image_bar, alpha_bar = _flat(tensors[:8])
    splats, size = Splats(*splats), (config.width, config.height)
    kept = tensors[8:]
    if kept and not _overflowed(config).is_set() and kept[3].numel() < 2**31:
        alpha, last, offsets, ids = kept
        ids, offsets, last = kept_lists(last, offsets, ids, tensors[5][0].numel())
        alpha = alpha.flatten(0, 1)
    else:
        ids, offsets = config.kernel.intersect(splats, radii, depths, *size)
        alpha = last = None
        if config.kernel.resumes:
            _, alpha, last = config.kernel.forward(splats, ids, offsets, *size)
        offsets = with_ends(ids, offsets)
    bars = image_bar, alpha_bar
    gradients = config.kernel.backward(splats, ids, offsets, alpha, last, bars, *size, config.absgrad)
    _write(outputs, gradients)


def _overflowed(config: _Config) -> threading.Event:
    """Set for good once a forward pass of this configuration had more intersections than its capacity.

    The host decides what the backward pass launches, and asking the device would make it wait. A forward pass's
    callback runs before that of its backward pass, so the flag is never set too late. Callbacks of several devices run
    in threads of their own: `setdefault` gives all of them the same flag, which a cached function does not.
    """
    return _overflow_flags.setdefault(config, threading.Event())


def _fits(config: _Config, bounds: list[int]) -> bool:
    longest = max(stop - start for start, stop in itertools.pairwise(bounds))
    overflowed = _overflowed(config)
    if longest > config.capacity and not overflowed.is_set():
        overflowed.set()
        _log.warning(
            "renderer_bridge: %d tile intersections are more than capacity=%d keeps for the backward pass, which is as "
            "exact but renders again from now on; a larger capacity= avoids that",
            longest,
            config.capacity,
        )
    return longest <= config.capacity


def _call(config: _Config, function, types, arguments) -> tuple[jax.Array, ...]:
    """Runs `function(config, tensors, outputs)` on the arrays; results of the given types."""
    if config.eager:
        return _call_eagerly(config, function, types, arguments)
    try:
        from jax.experimental.buffer_callback import buffer_callback
    except ImportError as error:
        raise RasterizeError("this JAX has no buffer_callback (it came with 0.6.1); use dlpack='eager'.") from error
    call = buffer_callback(_callback(config, function), tuple(types), vmap_method="broadcast_all")
    return varying.vary(tuple(call(*arguments)), varying.axes_of(arguments))


@functools.cache
def _callback(config: _Config, function):
    """One callback object per configuration and direction."""

    def callback(context, outputs, *buffers) -> None:
        try:
            import torch

            # Whatever mode the thread that XLA calls from is in.
            with torch.inference_mode(False), _on_stream(torch, context, buffers[0], config.synchronize):
                # Capsules, not buffers: torch would ask a buffer for what XLA does not tell, several times.
                tensors, results = ([torch.from_dlpack(x.__dlpack__()) for x in group] for group in (buffers, outputs))
                function(config, tensors, results)
        except Exception as error:
            # XLA turns this into a JaxRuntimeError that carries the sentence.
            raise RasterizeError(
                f"the tile rasterisation kernel failed inside the JAX program: {type(error).__name__}: {error} "
                "(python -m experiments.bench_render --against=gsplat tries the kernels on their own)."
            ) from error

    return callback


def _call_eagerly(config: _Config, function, types, arguments) -> tuple[jax.Array, ...]:
    if any(isinstance(x, jax.core.Tracer) for x in arguments):
        raise RasterizeError("dlpack='eager' cannot run inside jit, scan, remat or vmap; use dlpack='callback'.")
    import torch

    # The arrays' own __dlpack__ makes torch's current stream wait for JAX.
    tensors = [torch.from_dlpack(x) for x in arguments]
    dtypes = {jnp.dtype("float32"): torch.float32, jnp.dtype("int32"): torch.int32}
    outputs = [torch.empty(x.shape, dtype=dtypes[x.dtype], device=tensors[0].device) for x in types]
    function(config, tensors, outputs)
    if tensors[0].is_cuda:
        torch.cuda.current_stream(tensors[0].device).synchronize()
    return tuple(jnp.from_dlpack(x) for x in outputs)


def _fold(tensors, axes):
    """Makes one leading axis of all those of vmap. `axes`: how many each tensor has without them."""
    return [
        x.view(math.prod(x.shape[: x.ndim - n]), *x.shape[x.ndim - n :]) for x, n in zip(tensors, axes, strict=False)
    ]


def _flat(tensors):
    """[E, C, …] → [E · C, …]: gsplat's images."""
    return [x.flatten(0, 1) for x in tensors]


def _write(outputs, results) -> None:
    for output, result in zip(outputs, results, strict=True):
        output.copy_(result.view(output.shape))


@contextlib.contextmanager
def _on_stream(torch, context, buffer, synchronize: bool):
    """torch on the device of `buffer` and on XLA's stream; does nothing on CPU."""
    kind, index = buffer.__dlpack_device__()
    if int(kind) == 1:  # kDLCPU
        yield
        return
    stream = _external_stream(index, context.stream)
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        if synchronize:
            # gsplat 1.5 reads the number of intersections with `.item()` while it holds the GIL. If a collective that
            # waits for another GPU of this process were still queued here, that GPU's callback could never take the
            # GIL. This wait releases it, so only local work is pending afterwards (facts D.4).
            stream.synchronize()
        yield


@functools.lru_cache(maxsize=64)
def _external_stream(index: int, pointer: int):
    import torch

    return torch.cuda.ExternalStream(pointer, device=torch.device("cuda", index))
