"""What `doctor` says about files of the user's own: FLAME, captures, fits, encoders' weights, tracker output.

Every file is really loaded, by the code that will use it. Imports nothing at the top that a broken installation lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

OK, OPTIONAL, BROKEN = "ok", "optional", "BROKEN"
_GUIDE = "see docs/bring_your_own.md"


class Finding(NamedTuple):
    """One line of the report: `status` is ok, optional (missing, not needed) or BROKEN; `fix` is empty when ok."""

    status: str
    name: str
    found: str
    fix: str = ""


# What each flag takes, and what to do if it cannot be used.
FLAGS = {
    "flame": ("your FLAME .pkl", "download FLAME 2023 (with jaw) or 2023 Open from flame.is.tue.mpg.de"),
    "captures": ("a capture in VHAP's schema, or a folder of them", "export it again with VHAP"),
    "fits": ("a fit of GaussianAvatars or experiments.fit, or a folder of them", "name the model folder of the fit"),
    "dinov2": ("DINOv2's .pth or .safetensors", "download dinov2_vitl14_reg4_pretrain.pth again"),
    "michelangelo": ("Michelangelo's shapevae-256.ckpt", "download shapevae-256.ckpt again"),
    "vgg": ("torchvision's vgg16-397923af.pth, for LPIPS", "download vgg16-397923af.pth again"),
    "tracker": ("what a FLAME tracker left of a portrait or a video", "run the tracker again"),
    "tracker_flame": ("the FLAME .pkl that Pixel3DMM ran with, for --tracker", "name Pixel3DMM's own FLAME file"),
    "weights": ("a workdir of a training, or a .safetensors of experiments.export", "name the workdir of a training"),
}


def examine_files(paths: Mapping[str, str | None]) -> Iterator[Finding]:
    """Yields a finding for every flag that is given.

    Args:
      paths: flag → path, or None.
    """
    from pointillist_jax.files import UserError

    checks: dict[str, Callable[[str, Mapping[str, str | None]], str]] = {
        "flame": _flame,
        "tracker_flame": _flame,
        "captures": _captures,
        "fits": _fits,
        "dinov2": _dinov2,
        "michelangelo": _michelangelo,
        "vgg": _vgg,
        "tracker": _tracker,
        "weights": _weights,
    }
    for name, check in checks.items():
        path = paths.get(name)
        if path is None:
            continue
        try:
            yield Finding(OK, name, f"{path}: {check(path, paths)}")
        except (UserError, OSError) as error:
            yield Finding(BROKEN, name, _sentence(error), f"{FLAGS[name][1]}; {_GUIDE}")


def _sentence(error: Exception) -> str:
    """In one line: of an error that lists several problems, the first."""
    lines = [line.strip().removeprefix("- ") for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__


def _flame(path: str, paths: Mapping[str, str | None]) -> str:
    import jax.numpy as jnp
    import numpy as np

    from pointillist_jax.files import UserError
    from pointillist_jax.flame import flame_vertices, load_flame
    from pointillist_jax.flame.teeth import FLAME_VERTICES

    head = load_flame(path)
    size = np.ptp(np.asarray(head.v_template), axis=0)
    if not (size.min() > 0.05 and size.max() < 2):
        raise UserError(f"{path}: its head is {_meters(size)}, not a head's size; is it in metres?")
    neutral = head.neutral_params()
    opened = flame_vertices(head, neutral.replace(jaw_pose=jnp.array([0.3, 0.0, 0.0])))
    skin = slice(FLAME_VERTICES)  # Without the teeth, which are ours.
    jaw = float(np.abs(np.asarray(opened - flame_vertices(head, neutral))[skin]).max())
    warning = "" if jaw > 1e-3 else "; its jaw does not move: captures and fits need the edition with jaw"
    return (
        f"a head of {head.num_vertices} vertices, {head.num_faces} faces, {head.shape_dirs.shape[-1]} shape and "
        f"{head.expr_dirs.shape[-1]} expression directions, {_meters(size)}, sha256 {head.sha256[:12]}{warning}"
    )


def _captures(path: str, paths: Mapping[str, str | None]) -> str:
    from pointillist_jax.data.captures import find_captures, load_capture

    found = find_captures(path)
    head, captures = _by_head(paths, lambda head: [load_capture(p, head) for p in found.values()])
    views = sum(len(split) for capture in captures for split in capture.splits.values())
    first = captures[0].split("train")
    first.rgba(0)
    timesteps, cameras = sum(c.num_timesteps for c in captures), len(set(first.camera_indices.tolist()))
    return (
        f"{_count(len(captures), 'capture')} of {head.source}: {_count(timesteps, 'timestep')}, "
        f"{_count(cameras, 'training camera')}, {_count(views, 'picture')} of {' × '.join(map(str, first.sizes[0]))}"
    )


def _fits(path: str, paths: Mapping[str, str | None]) -> str:
    from pointillist_jax.data.fits import find_fits, load_fit

    found = find_fits(path)
    head, fits = _by_head(paths, lambda head: [load_fit(p, head) for p in found.values()])
    sizes = sorted(fit.gaussians.num_gaussians for fit in fits)
    return f"{_count(len(fits), 'fit')} of {sizes[0]} to {sizes[-1]} Gaussians, bound to {head.source}"


def _dinov2(path: str, paths: Mapping[str, str | None]) -> str:
    import jax
    import jax.numpy as jnp

    from pointillist_jax.convert import dinov2_from_torch, load_torch_file
    from pointillist_jax.models import DinoV2
    from pointillist_jax.models.image_encoder import NAMES

    params = dinov2_from_torch(load_torch_file(path))
    width, layers = params["cls_token"].shape[-1], len(jax.tree.leaves(params["layers"])[0])
    registers = len(params["register_tokens"]) if "register_tokens" in params else 0
    for name in NAMES:
        model = DinoV2.from_name(name)
        if (model.width, model.layers, model.registers) == (width, layers, registers):
            side = 2 * model.patch
            _require_finite(path, model.apply({"params": params}, jnp.zeros((1, side, side, 3)))["cls"])
            return f"DINOv2 {name}; train with --config.model.encoder.image={name}"
    return f"a DINOv2 of no published size: width {width}, {layers} layers, {registers} registers"


def _michelangelo(path: str, paths: Mapping[str, str | None]) -> str:
    import jax
    import jax.numpy as jnp

    from pointillist_jax.convert import load_torch_file, point_encoder_from_torch
    from pointillist_jax.models import PointEncoder

    params = point_encoder_from_torch(load_torch_file(path))
    (queries, width), layers = params["queries"].shape, len(jax.tree.leaves(params["layers"])[0])
    inputs = params["input"]["kernel"].shape[0]
    model = PointEncoder(width=width, layers=layers, heads=width // 64, queries=queries, frequencies=inputs // 6 - 1)
    points = jnp.linspace(-1, 1, 6 * 16).reshape(1, 16, 6)
    _require_finite(path, model.apply({"params": params}, points))
    return f"a point encoder of {queries} queries, width {width}, {layers} layers"


def _vgg(path: str, paths: Mapping[str, str | None]) -> str:
    import jax.numpy as jnp

    from pointillist_jax.convert import load_torch_file, lpips_from_torch
    from pointillist_jax.files import UserError
    from pointillist_jax.losses import lpips

    params = lpips_from_torch(load_torch_file(path))
    ramp = jnp.broadcast_to(jnp.linspace(0, 1, 32)[:, None], (32, 32, 3))
    same, other = float(lpips(ramp, ramp, params)), float(lpips(ramp, 1 - ramp, params))
    if not (same == 0 and 0 < other < 10):
        raise UserError(f"{path}: LPIPS of two different pictures is {other}, of two equal ones {same}; not VGG16's.")
    return f"VGG16 for LPIPS: a picture and its negative are {other:.3f} apart, equal ones 0"


def _tracker(path: str, paths: Mapping[str, str | None]) -> str:
    import numpy as np

    from pointillist_jax.convert import flame_params_from_tracker
    from pointillist_jax.convert.trackers import tracker_files
    from pointillist_jax.flame import load_flame

    kind, files = tracker_files(path)
    ran_with = load_flame(paths["tracker_flame"]) if paths.get("tracker_flame") else None
    head, params = _by_head(paths, lambda head: flame_params_from_tracker(path, head, tracker_head=ran_with))
    sizes = [float(np.abs(np.asarray(x)).max()) for x in (params.shape, params.expr)]
    turn = float(np.degrees(np.linalg.norm(np.asarray(params.rotation), axis=-1).max()))
    return (
        f"{kind}, {_count(len(files), 'file')}, {_count(len(params.expr), 'timestep')} for {head.source}: shape up to "
        f"{sizes[0]:.2f}, expression up to {sizes[1]:.2f} standard deviations, turned by up to {turn:.0f}°"
    )


def _weights(path: str, paths: Mapping[str, str | None]) -> str:
    import jax
    import numpy as np

    from pointillist_jax.convert import load_torch_file
    from pointillist_jax.convert.reference import load_metadata
    from pointillist_jax.files import UserError
    from pointillist_jax.training.checkpoints import load_params, model_kind, newest_step

    if Path(path).is_dir():
        (params, meta), step = load_params(path), newest_step(path)
        kind = model_kind(meta if isinstance(meta, dict) else {}, path)
    else:
        content, params = load_metadata(path), load_torch_file(path)
        kind, step = content.get("kind"), content.get("step")
    arrays = [np.asarray(x) for x in jax.tree.leaves(params)]
    if bad := sum(int((~np.isfinite(x)).sum()) for x in arrays if x.dtype.kind == "f"):
        raise UserError(f"{path} holds {bad} NaN or infinite weights: take an earlier checkpoint.")
    flag = {"ar": "--ar", "decoder": "--decoder"}.get(kind)
    if flag is None:
        raise UserError(f"{path} holds a model of kind {kind!r}, which this version does not know; export it again.")
    use = f"{flag}={path}" if Path(path).is_dir() else "python -m experiments.export --format=torch --import=…"
    numbers = sum(x.size for x in arrays)
    return f"a trained {kind} of step {step}, {numbers / 1e6:.2f} M parameters; use it by {use}"


def _by_head(paths: Mapping[str, str | None], load: Callable[[Any], Any]) -> tuple[Any, Any]:
    """The head that data belong to, and what `load(head)` gives: --flame, else the open head that fits.

    Raises:
      UserError: as `load`; without --flame of the open head that has the least to object to, and it says that --flame
        may be what is missing.
    """
    from pointillist_jax.files import UserError
    from pointillist_jax.flame import load_flame, open_head

    if paths.get("flame"):
        head = load_flame(paths["flame"])
        return head, load(head)
    errors = []
    for detail in ("full", "coarse"):
        head = open_head(detail)
        try:
            return head, load(head)
        except UserError as error:
            errors.append(error)
    error = min(errors, key=lambda e: len(getattr(e, "problems", ())))
    raise UserError(f"{_sentence(error)} (tried with the open head; if it is FLAME's, give --flame too)") from None


def _require_finite(path: str, array: Any) -> None:
    import jax.numpy as jnp

    from pointillist_jax.files import UserError

    if not bool(jnp.isfinite(array).all()):
        raise UserError(f"{path}: its network gives NaN for a plain input; the file is damaged.")


def _meters(size: Any) -> str:
    return " × ".join(f"{x:.2f}" for x in size) + " m"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
