"""Static Gaussians in the small formats of web viewers: `.splat` and `.spz` (facts/encoders_and_metrics.md 8.3).

Both hold less than a PLY does. `.splat`: 32 bytes a Gaussian, colours, opacities and rotations in eight bits.
`.spz` (Niantic): compressed, positions of 24 bits, everything else of eight; written and read by the gsply package.
Spherical harmonics beyond degree 0 go into neither: the colour seen from everywhere is kept.
"""

from __future__ import annotations

import os
from typing import Any

import jax.numpy as jnp
import numpy as np

from pointillist_jax.files import FileFormatError, UserError, atomic_path, require_file
from pointillist_jax.gaussians import SH_C0, Gaussians

# 2⁻¹⁶ m = 15 µm a step. The format's usual 12 bits are made for rooms: 0.24 mm a step is half a token's cell.
SPZ_FRACTIONAL_BITS = 16
# 24 bits with sign, 16 of them behind the point.
_SPZ_REACH = 2.0 ** (23 - SPZ_FRACTIONAL_BITS)
_SPLAT = np.dtype([("mean", "<f4", 3), ("scale", "<f4", 3), ("rgba", "u1", 4), ("quat", "u1", 4)])
_MAX_BYTES = 4 << 30
GSPLY_MISSING = ".spz files need the gsply package: pip install gsply (or the extra `export`)."


def save_splat(path: str | os.PathLike, gaussians: Gaussians) -> None:
    """Writes a `.splat`: world space, the most visible Gaussians first, as viewers load it. Atomic.

    A value moves by at most half a step: colour and opacity 1/510, a quaternion's component 1/256 (1/128 near 1).

    Raises:
      UserError: triangle-local or batched Gaussians, values that are not finite or no scales or opacities.
    """
    values = _checked(gaussians)
    visible = values["opacities"] * np.prod(values["scales"], axis=1)
    rows = np.zeros(len(visible), _SPLAT)
    rows["mean"], rows["scale"] = values["means"], values["scales"]
    rows["rgba"] = _bytes(255 * np.concatenate([values["colors"], values["opacities"][:, None]], axis=1))
    rows["quat"] = _bytes(values["quats"] * 128 + 128)
    with atomic_path(path) as temporary:
        temporary.write_bytes(rows[np.argsort(-visible, kind="stable")].tobytes())


def load_splat(path: str | os.PathLike) -> Gaussians:
    """Reads an untrusted `.splat` (it has no header: any file of the right length is one).

    Raises:
      FileNotFoundError: no such file.
      FileFormatError: a length that is no multiple of 32, or too large; NaN; scales below 0; rotations of length 0.
    """
    path = require_file(path, "a .splat file")
    size = path.stat().st_size
    if size % _SPLAT.itemsize or size > _MAX_BYTES:
        raise FileFormatError(f"{path} has {size} bytes; a .splat has 32 for every Gaussian: copy or export it again.")
    rows = np.frombuffer(path.read_bytes(), _SPLAT)
    quats = (rows["quat"].astype(np.float32) - 128) / 128
    norms = np.linalg.norm(quats, axis=1, keepdims=True)
    finite = np.isfinite(rows["mean"]).all() and np.isfinite(rows["scale"]).all()
    if not finite or (rows["scale"] < 0).any() or (norms == 0).any():
        raise FileFormatError(f"{path} holds NaN, scales below 0 or rotations of length 0; is this a .splat file?")
    rgba = rows["rgba"].astype(np.float32) / 255
    return Gaussians(
        means=jnp.asarray(rows["mean"]),
        quats=jnp.asarray(quats / np.maximum(norms, 1e-9)),
        scales=jnp.asarray(rows["scale"]),
        opacities=jnp.asarray(rgba[:, 3]),
        colors=jnp.asarray(rgba[:, :3]),
    )


def save_spz(path: str | os.PathLike, gaussians: Gaussians) -> None:
    """Writes an `.spz` of version 3, which every reader of the format knows. World space, axes right, up, back. Atomic.

    Positions move by at most 8 µm, scales by a factor of at most e^(1/32) and are not below e⁻¹⁰ m = 0.045 mm, opacity
    by 1/510, colour by 1/270.

    Raises:
      UserError: as `save_splat`; centres more than 128 m away, which the format cannot hold; gsply is not installed.
    """
    gsply = _gsply()
    values = _checked(gaussians)
    if np.abs(values["means"]).max(initial=0) >= _SPZ_REACH:
        raise UserError(
            f"a centre lies {np.abs(values['means']).max():.0f} m away; .spz with positions fine enough for a head "
            f"reaches {_SPZ_REACH:.0f} m: export another format."
        )
    opacities = np.clip(values["opacities"].astype(np.float64), 1e-7, 1 - 1e-7)
    content = gsply.GSData(
        means=values["means"],
        scales=np.log(np.maximum(values["scales"], 1e-12)),
        quats=values["quats"],
        opacities=np.log(opacities / (1 - opacities)).astype(np.float32),
        sh0=((values["colors"] - 0.5) / SH_C0).astype(np.float32),
        shN=np.zeros((len(values["means"]), 0, 3), np.float32),
    )
    with atomic_path(path) as temporary:
        gsply.write_spz(temporary, content, version=3, fractional_bits=SPZ_FRACTIONAL_BITS)


def _gsply() -> Any:
    try:
        import gsply
    except ImportError:
        raise UserError(GSPLY_MISSING) from None
    return gsply


def _checked(gaussians: Gaussians) -> dict[str, np.ndarray]:
    """The fields as float32 arrays, `colors` always, `quats` of length 1; UserError if they are no world-space set."""
    if gaussians.binding is not None:
        raise UserError("these Gaussians are local to triangles; put them into world space first (local_to_global).")
    colors = gaussians.colors
    if colors is None:
        colors = 0.5 + SH_C0 * np.asarray(gaussians.sh, np.float32)[..., 0, :]
    fields = {name: getattr(gaussians, name) for name in ("means", "quats", "scales", "opacities")}
    values = {name: np.asarray(x, np.float32) for name, x in {**fields, "colors": colors}.items()}
    num = len(values["means"])
    widths = {"means": (3,), "quats": (4,), "scales": (3,), "opacities": (), "colors": (3,)}
    for name, width in widths.items():
        if values[name].shape != (num, *width):
            raise UserError(f"{name} has shape {values[name].shape}, expected {(num, *width)}; pick one frame first.")
        if not np.isfinite(values[name]).all():
            raise UserError(f"{name} holds NaN or infinite values; nothing was written.")
    norms = np.linalg.norm(values["quats"], axis=1, keepdims=True)
    opacities = values["opacities"]
    if (norms < 1e-12).any() or (values["scales"] < 0).any() or (opacities < 0).any() or (opacities > 1).any():
        raise UserError("scales must be positive, opacities in [0, 1] and rotations not of length 0.")
    return {**values, "quats": values["quats"] / norms, "colors": np.clip(values["colors"], 0, 1)}


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(np.round(values), 0, 255).astype(np.uint8)
