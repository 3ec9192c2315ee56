"""3D Gaussians and animatable avatars as pytrees, and their files: PLY and the avatar bundle (DESIGN §1, §2).

Two PLY layouts are read and written (facts/avatars_gsplat.md A.6): the standard 3DGS file, and GaussianAvatars' with a
`binding_0` column, whose values are local to their triangles. Memory holds activated values, files logits and logs.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import pointillist_jax
from pointillist_jax.files import (
    ArraySpec,
    FileFormatError,
    UserError,
    atomic_folder,
    atomic_path,
    read_json,
    read_npz,
    require_file,
    write_npz,
)
from pointillist_jax.flame.binding import PointRig
from pointillist_jax.flame.model import FlameParams
from pointillist_jax.ply import ply_matrix, read_ply_vertices

# Y_00 of the real spherical harmonics: colour = 0.5 + SH_C0 · f_dc.
SH_C0 = 0.28209479177387814
# How many f_rest_* properties SH degrees 0 to 4 have. GaussianAvatars' viewer demands those of degree 3, whatever was
# fitted, so that its layout pads lower degrees with zeros.
_SH_REST = (0, 9, 24, 45, 72)
_PADDED_REST = 45
_WHAT = "a Gaussian splatting file, or a mesh or plain point cloud"
_BUNDLE_FORMAT, _BUNDLE_VERSION = "pointillist-avatar", 1


@flax.struct.dataclass
class Gaussians:
    """A set of 3D Gaussians with activated values. Letters: G Gaussians, K spherical harmonics.

    Attributes:
      means: [..., G, 3] metres (local units when `binding` is set).
      quats: [..., G, 4] unit, wxyz.
      scales: [..., G, 3] standard deviations, > 0, same unit as means.
      opacities: [..., G] in (0, 1).
      colors: [..., G, 3] RGB, or None when `sh` is given. Fitted files may go a little beyond [0, 1]; renderers clamp.
      sh: [..., G, K, 3] spherical-harmonics coefficients, or None when `colors` is given.
      binding: [G] int face of each Gaussian. Set exactly when the values are local to those triangles.
    """

    means: Float[Array, "*b G 3"]
    quats: Float[Array, "*b G 4"]
    scales: Float[Array, "*b G 3"]
    opacities: Float[Array, "*b G"]
    colors: Float[Array, "*b G 3"] | None = None
    sh: Float[Array, "*b G K 3"] | None = None
    binding: Int[Array, "G"] | None = None

    @property
    def num_gaussians(self) -> int:
        return self.means.shape[-2]


@flax.struct.dataclass
class Avatar:
    """Canonical Gaussians and what moves them: `flame.animate(avatar, model, params)` poses it.

    Attributes:
      gaussians: in canonical world space, `binding=None`.
      rig: from `flame.bind_points`.
    """

    gaussians: Gaussians
    rig: PointRig


def load_ply(path: str | os.PathLike, *, num_faces: int | None = None) -> Gaussians:
    """Reads a 3DGS PLY of any SH degree, or a GaussianAvatars one (then values are triangle-local, `binding` is set).

    Args:
      path: an untrusted file.
      num_faces: of the head that bindings refer to, to check them against.

    Returns:
      Activated float32 values: `colors` for SH degree 0, else `sh` [G, K, 3]. With a binding, degrees that are zero
      throughout are padding and left out.

    Raises:
      FileNotFoundError: no such file.
      FileFormatError: names file and field: not a Gaussian PLY, truncated, oversized, NaN, values out of range.
    """
    path = require_file(path, "a Gaussian .ply")
    columns = read_ply_vertices(path)
    means = ply_matrix(path, columns, ["x", "y", "z"], _WHAT)
    raw_scales = ply_matrix(path, columns, [f"scale_{i}" for i in range(3)], _WHAT)
    quats = ply_matrix(path, columns, [f"rot_{i}" for i in range(4)], _WHAT)
    raw_opacities = ply_matrix(path, columns, ["opacity"], _WHAT)[:, 0]
    dc = ply_matrix(path, columns, [f"f_dc_{i}" for i in range(3)], _WHAT)
    rest_names = [name for name in columns if re.fullmatch(r"f_rest_\d+", name)]
    if len(rest_names) not in _SH_REST:
        raise FileFormatError(
            f"{path}: {len(rest_names)} f_rest_* properties, expected 0, 9, 24, 45 or 72 (SH degree 0 to 4)."
        )
    rest = ply_matrix(path, columns, [f"f_rest_{i}" for i in range(len(rest_names))], _WHAT)

    norms = np.linalg.norm(quats.astype(np.float64), axis=1, keepdims=True)
    if bad := int((norms < 1e-12).sum()):
        raise FileFormatError(f"{path}: rot_0..3 are all zero for {bad} Gaussians; remove them or give a rotation.")
    if raw_scales.size and raw_scales.max() > 80:
        raise FileFormatError(
            f"{path}: scale_0..2 reach {raw_scales.max():.3g}, but are logarithms (e^80 overflows): the file holds "
            "linear scales or is damaged; write log(scale)."
        )
    binding = _load_binding(path, columns, num_faces) if "binding_0" in columns else None
    rest = rest.reshape(len(rest), 3, len(rest_names) // 3)
    if binding is not None:
        rest = rest[..., : next(n // 3 for n in _SH_REST if not rest[..., n // 3 :].any())]
    colors = sh = None
    if rest.shape[2]:
        sh = jnp.asarray(np.concatenate([dc[:, None], rest.transpose(0, 2, 1)], axis=1))
    else:
        colors = jnp.asarray(0.5 + SH_C0 * dc)
    return Gaussians(
        means=jnp.asarray(means),
        quats=jnp.asarray((quats / norms).astype(np.float32)),
        # Below e^-80 float32 would round to zero, but scales are positive.
        scales=jnp.asarray(np.exp(np.maximum(raw_scales, -80))),
        opacities=jnp.asarray(_sigmoid(raw_opacities)),
        colors=colors,
        sh=sh,
        binding=binding,
    )


def save_ply(path: str | os.PathLike, gaussians: Gaussians) -> None:
    """Writes a binary 3DGS PLY; with `binding` set, GaussianAvatars' layout (SH degree 3, `binding_0` last). Atomic.

    To bake one animated frame for any splat viewer: `save_ply(path, animate(avatar, model, params))`.

    Raises:
      UserError: leading axes, NaN or negative values, neither or both of colors and sh, more than 2²⁴ faces.
    """
    means = np.asarray(gaussians.means, np.float32)
    if means.ndim != 2:
        raise UserError(
            f"save_ply writes one set of Gaussians, but means has shape {means.shape}; pick one frame first."
        )
    if (gaussians.colors is None) == (gaussians.sh is None):
        raise UserError("Gaussians need exactly one of colors and sh.")
    g = len(means)
    expected = {
        "means": (g, 3),
        "quats": (g, 4),
        "scales": (g, 3),
        "opacities": (g,),
        "colors": (g, 3),
        "binding": (g,),
    }
    for name, shape in expected.items():
        value = getattr(gaussians, name)
        if value is not None and np.shape(value) != shape:
            raise UserError(f"{name} has shape {np.shape(value)}, expected {shape}; nothing was written.")
    if g and np.linalg.norm(np.asarray(gaussians.quats, np.float64), axis=1).min() < 1e-12:
        raise UserError("quats holds rotations of length zero; nothing was written.")
    if gaussians.sh is None:
        dc, rest = (np.asarray(gaussians.colors, np.float64) - 0.5) / SH_C0, np.zeros((g, 3, 0))
    else:
        sh = np.asarray(gaussians.sh, np.float32)
        if sh.ndim != 3 or sh.shape[::2] != (g, 3):
            raise UserError(f"sh has shape {sh.shape}, expected ({g}, K, 3); nothing was written.")
        dc, rest = sh[:, 0], sh[:, 1:].transpose(0, 2, 1)
        if 3 * rest.shape[2] not in _SH_REST:
            raise UserError(f"sh has {sh.shape[1]} coefficients; expected 1, 4, 9, 16 or 25.")
    if gaussians.binding is not None:
        rest = np.pad(rest, ((0, 0), (0, 0), (0, max(_PADDED_REST // 3 - rest.shape[2], 0))))
    scales = np.asarray(gaussians.scales, np.float64)
    opacities = np.asarray(gaussians.opacities, np.float64)
    if g and (scales.min() < 0 or opacities.min() < 0 or opacities.max() > 1):
        raise UserError("scales must be positive and opacities in [0, 1]: save_ply takes activated values, not logits.")
    # Exact 0 and 1 (padding, saturated fits) have no logit: the nearest representable value stands for them.
    opacities = np.clip(opacities, 1e-7, 1 - 1e-7)
    columns = {
        "x y z": means,
        "nx ny nz": np.zeros((g, 3)),
        "f_dc_": dc,
        "f_rest_": rest.reshape(g, 3 * rest.shape[2]),
        "opacity": np.log(opacities / (1 - opacities)),
        "scale_": np.log(np.maximum(scales, 1e-12)),
        "rot_": gaussians.quats,
    }
    if gaussians.binding is not None:
        binding = np.asarray(gaussians.binding)
        if binding.size and not 0 <= binding.min() <= binding.max() < 1 << 24:
            raise UserError(
                f"binding lies in {binding.min()}..{binding.max()}; a PLY's float32 holds 0..{(1 << 24) - 1}."
            )
        columns["binding_"] = binding[:, None]
    names, values = [], []
    for name, value in columns.items():
        value = np.asarray(value, np.float32)
        value = value[:, None] if value.ndim == 1 else value
        if not np.isfinite(value).all():
            raise UserError(f"{name.strip('_')} holds NaN or infinite values; nothing was written.")
        values.append(value)
        names += [f"{name}{i}" for i in range(value.shape[1])] if name.endswith("_") else name.split()
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {g}"]
    header += [f"property float {name}" for name in names] + ["end_header", ""]
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write("\n".join(header).encode())
        file.write(np.concatenate(values, axis=1).astype("<f4").tobytes())


def save_avatar(
    path: str | os.PathLike,
    avatar: Avatar,
    *,
    expr_dirs: Float[Array, "V 3 E"] | None = None,
    faces: Int[Array, "F 3"] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Writes an avatar bundle: a folder with gaussians.ply, rig.npz and avatar.json (DESIGN §2). Atomic.

    Args:
      path: the folder; an existing bundle there is replaced.
      avatar: what to write.
      expr_dirs, faces: of the head model. When given, rig.npz also holds the interpolated expression directions
        ([P, 3, E] float16) for players that have no head model; they are parts of that model and share its licence.
      provenance: anything JSON can hold, kept in avatar.json.

    Raises:
      UserError: the path exists and is no bundle; Gaussians and rig of different sizes; provenance that JSON cannot
        hold; values `save_ply` refuses.
    """
    path, rig = Path(path), avatar.rig
    if avatar.gaussians.num_gaussians != len(rig.binding):
        raise UserError(
            f"the avatar has {avatar.gaussians.num_gaussians} Gaussians, but its rig {len(rig.binding)} points."
        )
    if path.exists() and not (path / "avatar.json").is_file():
        raise UserError(f"{path} exists and is not an avatar bundle; choose another name or remove it.")
    arrays = {name: np.asarray(getattr(rig, name)) for name in _RIG}
    arrays |= {f"canonical_{k}": np.asarray(v) for k, v in vars(rig.canonical).items() if v is not None}
    if (expr_dirs is None) != (faces is None):
        raise UserError("save_avatar needs both expr_dirs and faces, or neither.")
    if expr_dirs is not None:
        corners = np.asarray(faces)[arrays["binding"]]
        at_corners = np.asarray(expr_dirs, np.float32)[corners]
        arrays["expr_dirs"] = np.einsum("pc,pcae->pae", arrays["barycentrics"], at_corners).astype(np.float16)
    card = {
        "format": _BUNDLE_FORMAT,
        "version": _BUNDLE_VERSION,
        "num_points": int(avatar.gaussians.num_gaussians),
        "flame": {"num_faces": rig.num_faces, "sha256": rig.model_sha256},
        "software": {"pointillist-jax": pointillist_jax.__version__},
        "provenance": dict(provenance or {}),
    }
    try:
        text = json.dumps(card, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"provenance cannot be written as JSON ({error}); use plain numbers and strings.") from None
    with atomic_folder(path) as folder:
        save_ply(folder / "gaussians.ply", avatar.gaussians.replace(binding=None))
        write_npz(folder / "rig.npz", arrays)
        (folder / "avatar.json").write_text(text + "\n")


def load_avatar(path: str | os.PathLike) -> Avatar:
    """Reads an avatar bundle written by `save_avatar`.

    Raises:
      FileNotFoundError: no bundle there.
      FileFormatError: names the file and what does not fit.
    """
    path = Path(path)
    card = read_json(path / "avatar.json", "an avatar bundle's card")
    found = (card.get("format"), card.get("version"))
    if found != (_BUNDLE_FORMAT, _BUNDLE_VERSION):
        raise FileFormatError(f"{path}/avatar.json: format {found}, expected {(_BUNDLE_FORMAT, _BUNDLE_VERSION)}.")
    flame = card.get("flame")
    num_faces = flame.get("num_faces") if isinstance(flame, dict) else None
    if not isinstance(num_faces, int) or num_faces < 1:
        raise FileFormatError(f"{path}/avatar.json: flame.num_faces is {num_faces!r}, expected a positive integer.")
    gaussians = load_ply(path / "gaussians.ply")
    specs = {**_RIG, **{f"canonical_{name}": spec for name, spec in _CANONICAL.items()}}
    specs["binding"] = ArraySpec((gaussians.num_gaussians,), "int", low=0, high=num_faces - 1)
    arrays = {key: jnp.asarray(value) for key, value in read_npz(path / "rig.npz", specs, "an avatar's rig").items()}
    canonical = {key.removeprefix("canonical_"): arrays.pop(key) for key in list(arrays) if key in _CANONICAL_KEYS}
    sha256 = flame.get("sha256", "")
    rig = PointRig(
        **arrays,
        canonical=FlameParams(**canonical),
        num_faces=num_faces,
        model_sha256=sha256 if isinstance(sha256, str) else "",
    )
    return Avatar(gaussians, rig)


_RIG = {
    "binding": ArraySpec(("P",), "int", low=0),
    "barycentrics": ArraySpec(("P", 3)),
    "skin_weights": ArraySpec(("P", 5)),
    "rest_offset": ArraySpec(("P", 3)),
    "rest_linear": ArraySpec(("P", 3, 3)),
    "canonical_scale": ArraySpec(("P",), low=1e-12),
}
_CANONICAL = {
    "shape": ArraySpec((None,)),
    "expr": ArraySpec((None,)),
    "rotation": ArraySpec((3,)),
    "neck_pose": ArraySpec((3,)),
    "jaw_pose": ArraySpec((3,)),
    "eyes_pose": ArraySpec((6,)),
    "translation": ArraySpec((3,)),
    "static_offset": ArraySpec((None, 3), optional=True),
}
_CANONICAL_KEYS = {f"canonical_{name}" for name in _CANONICAL}


def _load_binding(path: Path, columns: dict[str, np.ndarray], num_faces: int | None) -> Array:
    values = ply_matrix(path, columns, ["binding_0"], _WHAT)[:, 0].astype(np.float64)
    if values.size and ((values < 0).any() or (values != np.round(values)).any() or values.max() >= 1 << 24):
        raise FileFormatError(f"{path}: binding_0 holds values that are no face index; the file is damaged.")
    if num_faces is not None and (outside := int((values >= num_faces).sum())):
        raise FileFormatError(
            f"{path}: binding_0 names faces up to {int(values.max())} for {outside} Gaussians, but the head has "
            f"{num_faces} faces: load the head it was fitted with (FLAME with teeth has 10144)."
        )
    return jnp.asarray(values, jnp.int32)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return (0.5 * (1 + np.tanh(0.5 * x.astype(np.float64)))).astype(np.float32)
