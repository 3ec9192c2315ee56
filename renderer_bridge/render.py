"""`rasterize`: cameras and 3D Gaussians to images, under gsplat's names and conventions."""

from __future__ import annotations

import functools
import logging
import math
import operator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from renderer_bridge import binning, gsplat_dlpack, projection, sh, tiles, varying
from renderer_bridge.errors import RasterizeError

_log = logging.getLogger(__name__)

RenderMode = Literal["RGB", "D", "ED", "RGB+D", "RGB+ED"]
_MODES = ("RGB", "D", "ED", "RGB+D", "RGB+ED")
_DEPTH_ALONE = ("D", "ED")
_REQUIRED = ("means", "quats", "scales", "opacities", "colors", "viewmats", "Ks")
_DEFAULT_MAX_ALPHA = 0.999


class _Options(NamedTuple):
    """Everything static about a render; hashable, so that one compiled program serves all calls that share it."""

    width: int
    height: int
    near_plane: float
    far_plane: float
    eps2d: float
    radius_clip: float
    sh_degree: int | None
    render_mode: str
    rasterize_mode: str
    max_alpha: float
    backend: str
    dlpack: str
    kernel: Any
    capacity: int


@jax.tree_util.register_static
class _Word(str):
    """A word among arrays, which leaves a jitted function as it is."""


class _Arrays(NamedTuple):
    means: jax.Array
    quats: jax.Array
    scales: jax.Array
    opacities: jax.Array
    colors: jax.Array
    viewmats: jax.Array
    Ks: jax.Array
    backgrounds: jax.Array | None
    means2d_probe: jax.Array | None
    absgrad_probe: jax.Array | None


def rasterize(
    means: jax.Array,  # [G, 3]
    quats: jax.Array,  # [G, 4] wxyz
    scales: jax.Array,  # [G, 3]
    opacities: jax.Array,  # [G]
    colors: jax.Array | None,  # [(C,) G, D] or, with sh_degree, [(C,) G, K, 3]
    viewmats: jax.Array,  # [C, 4, 4]
    Ks: jax.Array,  # [C, 3, 3]
    width: int,
    height: int,
    *,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    eps2d: float = 0.3,
    sh_degree: int | None = None,
    backgrounds: jax.Array | None = None,  # [C, D] or [D]
    render_mode: RenderMode = "RGB",
    rasterize_mode: Literal["classic", "antialiased"] = "classic",
    backend: Literal["auto", "jax", "gsplat"] = "auto",
    capacity: int | None = None,
    max_alpha: float | None = None,
    means2d_probe: jax.Array | None = None,  # [C, G, 2] zeros
    absgrad_probe: jax.Array | None = None,  # [C, G, 2] zeros
    dlpack: Literal["callback", "eager"] = "callback",
    _kernel: gsplat_dlpack.Kernel | None = None,
) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    """Renders G Gaussians into C cameras, differentiable in every array argument.

    Works under jit, vmap, grad, remat, scan and (with its default `check_vma=True`) `jax.shard_map`. Where no tracing
    is going on, the work is jitted here. A Gaussian is masked out by opacity 0.

    Args:
      means: world positions, metres.
      quats: wxyz, any non-zero length.
      scales: standard deviations along the Gaussian's axes, metres, ≥ 0.
      opacities: in [0, 1].
      colors: D channels as they are, shared or per camera; with `sh_degree` spherical-harmonic coefficients, whose
        value + 0.5 is clamped at 0 from below. Not looked at for depth alone, where None will do.
      viewmats: world-to-camera, OpenCV axes. Ks: intrinsics in pixels (no skew); pixel centres lie at + 0.5.
      width, height: image size in pixels, static.
      near_plane, far_plane: Gaussians whose camera z lies outside are culled.
      radius_clip: Gaussians not larger than this many pixels are culled.
      eps2d: added to the diagonal of the 2D covariance, pixels².
      sh_degree: 0 to 3: `colors` are coefficients [.., K, 3] with K ≥ (sh_degree + 1)².
      backgrounds: colour behind everything; depth channels have background 0.
      render_mode: `D` accumulated depth, `ED` expected depth (divided by alpha), `RGB+…` colour, then depth.
      rasterize_mode: `antialiased` dims Gaussians by what `eps2d` blurred them.
      backend: `jax` runs everywhere; `gsplat` needs CUDA, torch and gsplat, and float32; `auto` takes gsplat if its
        kernels load and logs the choice once.
      capacity: upper bound of the number of tile intersections. None: measured where values are known, a generous
        figure from the shapes where they are not (inside jit, vmap, remat, scan, shard_map). `estimate_capacity` gives
        a tight one. See `info["overflow"]`. With
        `gsplat` every picture is exact: this is, if larger than that generous figure, how many intersections (of four
        bytes) are kept for the backward pass, which takes longer where they are more.
      max_alpha: alpha clamp. None: the installed gsplat's with `gsplat`, .999 (gsplat 1.5) with `jax`.
      means2d_probe: zeros; differentiate with respect to it for the gradient of the projected means, in pixels, that
        density control needs.
      absgrad_probe: zeros; its "gradient" is the sum over pixels of the absolute values of their contributions to the
        gradient of the projected means (gsplat's `absgrad`). Costs extra only when given.
      dlpack: how the gsplat back end reaches torch: `callback` inside the program, `eager` between two programs (for a
        JAX without `buffer_callback`; cannot be jitted).

    Returns:
      image [C, H, W, X], alpha [C, H, W, 1], and info: `radii` [C, G, 2] int32 pixels (0 = culled), `means2d`
      [C, G, 2], `depths` [C, G], `conics` [C, G, 3], `opacities` [C, G], `tiles_per_gauss` [C, G], `intersections`
      (count over all cameras), `overflow` (intersections beyond the capacity that are **missing** from the image; 0 =
      exact), `invalid` (Gaussians left out for NaN or Inf, negative scales, zero quaternions, or because they are too
      large for float32 on the image plane; all but the last are an error where values are known), and the static
      `width`, `height`, `tile_size`, `tile_width`, `tile_height`, `n_cameras`, `capacity`, `backend`. The picture of a
      camera that is NaN is NaN.

    Raises:
      RasterizeError: wrong shapes, types or (where values are known) values, or a back end that is not there.

    Source: facts C.2, C.4; DESIGN §8.
    """
    _one_of("render_mode", render_mode, _MODES)
    if render_mode in _DEPTH_ALONE and means is not None:
        points = _array("means", means)
        colors, backgrounds, sh_degree = jnp.zeros((*points.shape[:1], 0), points.dtype), None, None
    arrays = _Arrays(means, quats, scales, opacities, colors, viewmats, Ks, backgrounds, means2d_probe, absgrad_probe)
    arrays, sh_degree = _checked(arrays, sh_degree)
    options = _Options(
        width=_size("width", width),
        height=_size("height", height),
        near_plane=_number("near_plane", near_plane),
        far_plane=_number("far_plane", far_plane),
        eps2d=_non_negative("eps2d", eps2d),
        radius_clip=_non_negative("radius_clip", radius_clip),
        sh_degree=sh_degree,
        render_mode=render_mode,
        rasterize_mode=_one_of("rasterize_mode", rasterize_mode, ("classic", "antialiased")),
        max_alpha=0.0,
        backend=_choose_backend(backend, _kernel, arrays.means.dtype),
        dlpack=_one_of("dlpack", dlpack, ("callback", "eager")),
        kernel=_kernel,
        capacity=0,
    )
    if options.far_plane <= options.near_plane:
        raise RasterizeError(f"far_plane is {far_plane}, not beyond near_plane, {near_plane}.")
    options = options._replace(max_alpha=_max_alpha(max_alpha, options))
    concrete = _concrete(arrays)
    if concrete is not None:
        _check_values(concrete, sh_degree)
    options = options._replace(capacity=_capacity(capacity, arrays, concrete, options))
    render = _render if options.dlpack == "eager" and options.backend == "gsplat" else _render_jitted
    image, alpha, info = render(arrays, options)
    across, down = binning.tile_grid(options.width, options.height)
    info |= {
        "width": options.width,
        "height": options.height,
        "tile_size": binning.TILE,
        "tile_width": across,
        "tile_height": down,
        "n_cameras": arrays.viewmats.shape[0],
        "capacity": options.capacity,
        "backend": _Word(options.backend),
    }
    return image, alpha, info


def estimate_capacity(
    means: jax.Array,  # [G, 3]
    quats: jax.Array,  # [G, 4]
    scales: jax.Array,  # [G, 3]
    opacities: jax.Array,  # [G]
    viewmats: jax.Array,  # [C, 4, 4]
    Ks: jax.Array,  # [C, 3, 3]
    width: int,
    height: int,
    *,
    margin: float = 1.25,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    eps2d: float = 0.3,
    rasterize_mode: Literal["classic", "antialiased"] = "classic",
) -> int:
    """A `capacity` for scenes like this one: its number of intersections times `margin`, rounded up.

    Arguments as for `rasterize`; call it outside jit.

    Raises:
      RasterizeError: bad input, or called where the values are not known (inside jit).
    """
    colors = jnp.zeros((*jnp.shape(means)[:-1], 0), jnp.asarray(means).dtype)
    arrays, _ = _checked(_Arrays(means, quats, scales, opacities, colors, viewmats, Ks, None, None, None), None)
    concrete = _concrete(arrays)
    if concrete is None:
        raise RasterizeError(
            "estimate_capacity needs values but was called inside jit or vmap; call it before, and pass the number on "
            "as capacity=."
        )
    _check_values(concrete, None)
    if margin < 1:
        raise RasterizeError(f"margin is {margin}; expected at least 1.")
    options = _Options(
        _size("width", width),
        _size("height", height),
        _number("near_plane", near_plane),
        _number("far_plane", far_plane),
        _non_negative("eps2d", eps2d),
        _non_negative("radius_clip", radius_clip),
        None,
        "RGB",
        _one_of("rasterize_mode", rasterize_mode, ("classic", "antialiased")),
        _DEFAULT_MAX_ALPHA,
        "jax",
        "callback",
        None,
        0,
    )
    return _round_up(_measure(concrete, options) * margin)


def _render(arrays: _Arrays, options: _Options) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    """The differentiable program behind `rasterize`; everything is static but the arrays."""
    # Inside shard_map everything varies from here on; the transpose of this mark sums replicated gradients.
    arrays = varying.vary(arrays, varying.axes_of(arrays))
    arrays, unusable = _without_unusable(arrays, options)
    projected = _project(arrays, options)
    means2d = projected.means2d if arrays.means2d_probe is None else projected.means2d + arrays.means2d_probe
    colors, backgrounds = _channels(arrays, projected, options)
    C, G, X = colors.shape
    width, height = options.width, options.height

    _, size = binning.tile_rects(means2d, projected.radii, width, height)
    tiles_per_gauss = size[..., 0] * size[..., 1]
    intersections = binning.saturating_total(tiles_per_gauss)
    overflow = jnp.zeros_like(intersections)
    if G == 0 or width == 0 or height == 0:
        image = varying.vary(jnp.zeros((C, height, width, X), colors.dtype), varying.axes_of(arrays))
        alpha = varying.vary(jnp.zeros((C, height, width, 1), colors.dtype), varying.axes_of(arrays))
    elif options.backend == "gsplat":
        image, alpha = gsplat_dlpack.rasterize_tiles(
            means2d,
            projected.conics,
            colors,
            projected.opacities,
            projected.radii,
            projected.depths,
            width,
            height,
            capacity=options.capacity,
            absgrad_probe=arrays.absgrad_probe,
            eager=options.dlpack == "eager",
            kernel=options.kernel,
        )
    else:
        bins = binning.bin_gaussians(means2d, projected.radii, projected.depths, width, height, options.capacity)
        overflow = bins.overflow
        image, alpha = tiles.blend_tiles(
            means2d,
            projected.conics,
            projected.opacities,
            colors,
            bins,
            width,
            height,
            max_alpha=options.max_alpha,
            absgrad_probe=arrays.absgrad_probe,
        )
    if backgrounds is not None:
        image = image + (1 - alpha) * backgrounds[:, None, None, :]
    if options.render_mode.endswith("ED"):
        image = jnp.concatenate([image[..., :-1], image[..., -1:] / jnp.maximum(alpha, 1e-10)], -1)
    finite = _finite_cameras(arrays)
    # An empty picture must not pass for that of a camera that is not there.
    image = image + jnp.where(finite, 0.0, jnp.nan).astype(image.dtype)[:, None, None, None]
    info = {
        "radii": projected.radii,
        "means2d": means2d,
        "depths": projected.depths,
        "conics": projected.conics,
        "opacities": projected.opacities,
        "tiles_per_gauss": tiles_per_gauss,
        "intersections": intersections,
        "overflow": overflow,
        "invalid": jnp.sum(unusable | jnp.any(projected.too_large & finite[:, None], 0), dtype=jnp.int32),
    }
    return image, alpha, info


_render_jitted = functools.partial(jax.jit, static_argnames=("options",))(_render)


def _axes_of_colors(colors: jax.Array, sh_degree: int | None) -> tuple[int, ...]:
    """All but that of the Gaussians."""
    gaussians = colors.ndim - (2 if sh_degree is None else 3)
    return tuple(axis for axis in range(colors.ndim) if axis != gaussians)


def _without_unusable(arrays: _Arrays, options: _Options) -> tuple[_Arrays, jax.Array]:
    """Makes Gaussians with values that cannot be meant invisible; the second result [G] says which.

    They are replaced before any arithmetic: a NaN behind a later `where` would still reach the gradient as 0 · NaN.
    The colour of a Gaussian that is masked out may be anything.
    """
    colors = arrays.colors
    others = _axes_of_colors(colors, options.sh_degree)
    colored = jnp.all(jnp.isfinite(colors), others)
    usable = projection.usable(arrays.means, arrays.quats, arrays.scales, arrays.opacities)
    usable &= colored | (arrays.opacities <= 0)
    upright = jnp.asarray([1.0, 0.0, 0.0, 0.0], arrays.quats.dtype)
    cleaned = arrays._replace(
        means=jnp.where(usable[:, None], arrays.means, 0.0),
        quats=jnp.where(usable[:, None], arrays.quats, upright),
        scales=jnp.where(usable[:, None], arrays.scales, 1.0),
        opacities=jnp.where(usable, arrays.opacities, 0.0),
        colors=jnp.where(jnp.expand_dims(usable & colored, others), colors, 0.0),
    )
    return cleaned, ~usable


def _finite_cameras(arrays: _Arrays) -> jax.Array:
    """[C] bool."""
    return jnp.all(jnp.isfinite(arrays.viewmats), (1, 2)) & jnp.all(jnp.isfinite(arrays.Ks), (1, 2))


def _project(arrays: _Arrays, options: _Options) -> projection.Projected:
    return projection.project(
        arrays.means,
        arrays.quats,
        arrays.scales,
        arrays.opacities,
        arrays.viewmats,
        arrays.Ks,
        options.width,
        options.height,
        near_plane=options.near_plane,
        far_plane=options.far_plane,
        eps2d=options.eps2d,
        radius_clip=options.radius_clip,
        antialiased=options.rasterize_mode == "antialiased",
    )


def _channels(arrays: _Arrays, projected: projection.Projected, options: _Options):
    """Channels to blend [C, G, X] and their background [C, X] or None."""
    C, G = projected.depths.shape
    colors, backgrounds, depth = arrays.colors, arrays.backgrounds, projected.depths[..., None]
    if options.sh_degree is not None:
        directions = arrays.means - projection.camera_positions(arrays.viewmats)[:, None]
        coefficients = colors if colors.ndim == 4 else colors[None]
        colors = jnp.maximum(sh.spherical_harmonics(options.sh_degree, directions, coefficients) + 0.5, 0.0)
    if options.render_mode in _DEPTH_ALONE:
        colors, backgrounds = depth, None
    else:
        colors = jnp.broadcast_to(colors, (C, G, colors.shape[-1]))
        if backgrounds is not None:
            backgrounds = jnp.broadcast_to(backgrounds, (C, colors.shape[-1]))
        if options.render_mode != "RGB":
            colors = jnp.concatenate([colors, depth], -1)
            if backgrounds is not None:
                backgrounds = jnp.concatenate([backgrounds, jnp.zeros((C, 1), backgrounds.dtype)], -1)
    # What is culled may still be read, with weight 0, and 0 · Inf would not be 0.
    return jnp.where(jnp.all(projected.radii > 0, -1, keepdims=True), colors, 0.0), backgrounds


@functools.partial(jax.jit, static_argnames=("options",))
def _count(arrays: _Arrays, options: _Options) -> jax.Array:
    projected = _project(arrays, options)
    _, size = binning.tile_rects(projected.means2d, projected.radii, options.width, options.height)
    return binning.saturating_total(size[..., 0] * size[..., 1])


def _measure(arrays: _Arrays, options: _Options) -> int:
    neutral = options._replace(sh_degree=None, render_mode="RGB", max_alpha=0.0, backend="jax", kernel=None, capacity=0)
    # Only what the projection reads, so that one compiled count serves every kind of colour.
    arrays = arrays._replace(
        colors=jnp.zeros((len(arrays.means), 0)), backgrounds=None, means2d_probe=None, absgrad_probe=None
    )
    count = int(_count(arrays, neutral))
    if count >= 2**31 - 1:
        raise RasterizeError(
            "the Gaussians touch more than 2·10⁹ tiles together; check the units of scales and the camera distance."
        )
    return count


def _capacity(capacity: int | None, arrays: _Arrays, concrete: _Arrays | None, options: _Options) -> int:
    whole = isinstance(capacity, int | np.integer) and not isinstance(capacity, bool)
    if capacity is not None and not (whole and 0 < capacity < 2**31):
        raise RasterizeError(f"capacity is {capacity!r}; expected a whole number from 1 to 2³¹ − 1.")
    if capacity is None and concrete is not None and options.backend == "jax":
        return _round_up(_measure(concrete, options))
    # Inside jit nothing can be measured: eight tiles per Gaussian (photometric scenes have three to five), and room
    # for lists of 128 where few Gaussians fill the image; never more than every Gaussian in every tile.
    C, G = arrays.viewmats.shape[0], arrays.means.shape[0]
    tiles_all = C * math.prod(binning.tile_grid(options.width, options.height))
    generous = max(1, min(max(8 * C * G, 128 * tiles_all), G * tiles_all, 2**31 - 1))
    if options.backend == "gsplat":
        return max(int(capacity or 0), generous)  # here room is cheap, and lack of it no more than slow
    return generous if capacity is None else int(capacity)


def _round_up(count: float) -> int:
    """The next figure with three leading bits, at least 1024: few distinct sizes, hence few compilations."""
    count = max(1024, math.ceil(count))
    step = 1 << (count.bit_length() - 3)
    return min(-(-count // step) * step, 2**31 - 1)


def _choose_backend(backend: str, kernel: Any, dtype: Any) -> str:
    _one_of("backend", backend, ("auto", "jax", "gsplat"))
    if backend == "auto":
        return _auto_backend() if dtype == jnp.float32 else "jax"  # gsplat knows no other type
    if backend == "gsplat" and kernel is None:
        reason = gsplat_dlpack.unavailable()
        if reason is not None:
            raise RasterizeError(f"backend='gsplat' cannot run: {reason}; or use backend='jax' or 'auto'.")
    return backend


@functools.lru_cache(maxsize=1)
def _auto_backend() -> str:
    reason = gsplat_dlpack.unavailable()
    backend = "gsplat" if reason is None else "jax"
    _log.info("renderer_bridge: backend %r%s", backend, f" ({reason})" if reason else "")
    return backend


def _max_alpha(max_alpha: float | None, options: _Options) -> float:
    compiled = None
    if options.backend == "gsplat" and options.kernel is None:
        compiled = gsplat_dlpack.max_alpha()
    if max_alpha is None:
        return compiled or _DEFAULT_MAX_ALPHA
    if not 0 < _number("max_alpha", max_alpha) < 1:
        raise RasterizeError(f"max_alpha is {max_alpha}; expected a number between 0 and 1, such as .999 or .99.")
    if compiled is not None and max_alpha != compiled:
        raise RasterizeError(
            f"max_alpha is {max_alpha} but the installed gsplat was compiled with {compiled}; leave it out or use "
            "backend='jax'."
        )
    return float(max_alpha)


def _concrete(arrays: _Arrays) -> _Arrays | None:
    """The arrays' values where they are known (also under an eager grad), else None."""
    arrays = jax.lax.stop_gradient(arrays)
    return None if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arrays)) else arrays


def _checked(arrays: _Arrays, sh_degree: int | None) -> tuple[_Arrays, int | None]:
    """Arrays of the right shapes in one float type, and the degree as a plain number."""
    for name in _REQUIRED:
        if getattr(arrays, name) is None:
            raise RasterizeError(f"{name} is None; expected an array.")
    given = {name: _array(name, value) for name, value in arrays._asdict().items() if value is not None}
    dtype = jnp.result_type(*given.values())
    given = {name: value.astype(dtype) for name, value in given.items()}
    G = given["means"].shape[0] if given["means"].ndim else 0
    C = given["viewmats"].shape[0] if given["viewmats"].ndim else 0
    expected = {
        "means": (G, 3),
        "quats": (G, 4),
        "scales": (G, 3),
        "opacities": (G,),
        "viewmats": (C, 4, 4),
        "Ks": (C, 3, 3),
        "means2d_probe": (C, G, 2),
        "absgrad_probe": (C, G, 2),
    }
    for name, shape in expected.items():
        if name in given and given[name].shape != shape:
            raise RasterizeError(
                f"{name} has shape {given[name].shape}; expected {shape} for G = {G} Gaussians (rows of means) and "
                f"C = {C} cameras (rows of viewmats)."
            )
    if C == 0:
        raise RasterizeError("viewmats has no cameras; expected [C, 4, 4] with C ≥ 1.")
    shape = given["colors"].shape
    if sh_degree is None:
        if shape[-2:-1] != (G,) or shape[:-2] not in ((), (C,)):
            raise RasterizeError(f"colors has shape {shape}; expected ({G}, D) or ({C}, {G}, D).")
        D = shape[-1]
    else:
        try:
            degree = -1 if isinstance(sh_degree, bool) else operator.index(sh_degree)
        except TypeError:  # not whole, or not known when tracing
            degree = -1
        if degree not in range(sh.MAX_DEGREE + 1):
            raise RasterizeError(f"sh_degree is {sh_degree!r}; expected None or 0, 1, 2, 3, known when tracing.")
        sh_degree = degree
        needed = (sh_degree + 1) ** 2
        if len(shape) < 3 or shape[-3] != G or shape[-1] != 3 or shape[:-3] not in ((), (C,)) or shape[-2] < needed:
            raise RasterizeError(
                f"colors has shape {shape}; with sh_degree={sh_degree} expected ({G}, K, 3) or ({C}, {G}, K, 3) with "
                f"K ≥ {needed}."
            )
        D = 3
    if "backgrounds" in given and given["backgrounds"].shape not in ((D,), (C, D)):
        raise RasterizeError(f"backgrounds has shape {given['backgrounds'].shape}; expected ({C}, {D}) or ({D},).")
    return _Arrays(**{name: given.get(name) for name in _Arrays._fields}), sh_degree


def _array(name: str, value: Any) -> jax.Array:
    try:
        value = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise RasterizeError(f"{name} is not an array: {error}") from error
    if value.dtype not in (jnp.float32, jnp.float64):
        raise RasterizeError(f"{name} has dtype {value.dtype}; expected float32 (convert with .astype('float32')).")
    return value


def _check_values(arrays: _Arrays, sh_degree: int | None) -> None:
    """Refuses values that cannot be meant, by name and first row."""

    def refuse(name: str, bad: np.ndarray, what: str) -> None:
        if bad.any():
            raise RasterizeError(f"{name} has {what} in {int(bad.sum())} row(s), first in row {int(np.argmax(bad))}.")

    def of_rows(finite: np.ndarray, axes: tuple[int, ...] | None = None) -> np.ndarray:
        return ~finite.all(tuple(range(1, finite.ndim)) if axes is None else axes)

    for name in ("means", "quats", "scales", "opacities", "viewmats", "Ks", "backgrounds"):
        if getattr(arrays, name) is not None:
            refuse(name, of_rows(np.isfinite(getattr(arrays, name))), "NaN or Inf")
    uncolored = of_rows(np.isfinite(arrays.colors), _axes_of_colors(arrays.colors, sh_degree))
    refuse("colors", uncolored & (np.asarray(arrays.opacities) > 0), "NaN or Inf")
    scales = np.asarray(arrays.scales)
    refuse("scales", (scales < 0).any(1), "negative values (give activated scales, not logarithms)")
    for name, value in (("scales", scales), ("means", np.asarray(arrays.means))):
        refuse(name, (np.abs(value) > projection.LARGEST_LENGTH).any(1), "values that no scene has")
    quats = np.asarray(arrays.quats)
    refuse("quats", (np.abs(quats) < np.finfo(quats.dtype).tiny).all(1), "a zero quaternion")
    opacities = np.asarray(arrays.opacities)
    refuse(
        "opacities", (opacities < 0) | (opacities > 1), "values outside [0, 1] (give activated opacities, not logits)"
    )
    focal = np.asarray(arrays.Ks)[:, [0, 1], [0, 1]]
    refuse("Ks", (focal <= 0).any(1), "a focal length that is not positive")


def _size(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise RasterizeError(
            f"{name} is {value!r}; expected a whole number of pixels ≥ 0, known when tracing (static)."
        )
    return int(value)


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise RasterizeError(f"{name} is {value!r}; expected a number, known when tracing (static).")
    return number


def _non_negative(name: str, value: Any) -> float:
    number = _number(name, value)
    if not 0 <= number < math.inf:
        raise RasterizeError(f"{name} is {value!r}; expected a number ≥ 0.")
    return number


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise RasterizeError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}.")
    return value
