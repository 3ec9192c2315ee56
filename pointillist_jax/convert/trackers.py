"""What FLAME trackers leave → FlameParams (facts/encoders_and_metrics.md 5; DESIGN §6).

VHAP, LAM and GaussianAvatars write FLAME's own parameters (`.npz`): they are copied, and belong to the FLAME file the
tracker ran with, 2023 with jaw. Pixel3DMM (`.frame`) runs with other editions, whose coefficients mean other people:
the mesh it leaves is told anew in the coefficients of the head that is used here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pointillist_jax.convert.pixel3dmm import Frame, is_frame, read_flame_mesh, read_frame, rigid_to_flame
from pointillist_jax.convert.refit import refit_expression, refit_shape, require_flame
from pointillist_jax.files import FileFormatError, UserError
from pointillist_jax.flame import FlameModel, FlameParams, flame_vertices
from pointillist_jax.flame.param_files import load_flame_params
from pointillist_jax.flame.teeth import FLAME_VERTICES

# Meshes of one edition agree to float32; two editions differ by millimetres.
_SAME_EDITION = 1e-4
_SAME_SHAPE = 1e-5
_TIMED = ("expr", "rotation", "neck_pose", "jaw_pose", "eyes_pose", "translation")
NPZ, FRAME, MESH = "FLAME parameters (VHAP, LAM, GaussianAvatars)", "Pixel3DMM .frame", "mesh of a tracker"


def flame_params_from_tracker(
    path: str | os.PathLike,
    head: FlameModel,
    *,
    tracker_head: FlameModel | None = None,
    static_offset: bool = False,
) -> FlameParams:
    """FLAME parameters of one person out of a tracker's files, whose kind is told by their content.

    | path | read as |
    |---|---|
    | `tracked_flame_params_30.npz`, `flame_param.npz`, `flame_param/00000.npz` | parameters, copied |
    | a folder of VHAP, or one with a timestamp's folder in it | its `tracked_flame_params_<highest>.npz` |
    | an export (`flame_param/` inside), a folder of `00000.npz` …, a fit (`flame_param.npz` inside) | all timesteps |
    | `checkpoint/00000.frame`, or Pixel3DMM's folder | one picture, or all in order; the mesh beside is refitted |
    | `mesh/canonical.ply` | the identity alone, refitted; neutral pose |

    Pixel3DMM's coefficients are copied only if `head` gives the tracker's own `mesh/canonical.ply` to 0.1 mm, or is
    `tracker_head`. Else shape is a ridge regression of that mesh, expression and jaw one of the picture's mesh.

    Args:
      path: untrusted.
      head: the head the parameters are for.
      tracker_head: the FLAME file Pixel3DMM ran with; makes the meshes where the tracker's are not there.
      static_offset: keep what a refit of the shape leaves of the mesh as an offset of the vertices. Then the identity
        has the tracker's vertices exactly.

    Returns:
      FlameParams with a leading axis [T] everywhere but on shape [S] and static_offset [V, 3] (or None).

    Raises:
      FileNotFoundError: no such file, or a folder without any of these.
      UnsafeFileError: a file asks for code to be run. Nothing of it was executed.
      FileFormatError: names file, key, expected and found; a mesh of another scale.
      UserError: another head than FLAME for Pixel3DMM; a mesh that is needed is not there.
    """
    kind, files = tracker_files(path)
    if kind == NPZ:
        params = _joined(files, [load_flame_params(file, head) for file in files])
        neutral = _neutral(head, params.shape, params.static_offset)
        _check_extent(files[0], np.asarray(flame_vertices(head, neutral)), np.asarray(head.v_template))
        return params
    require_flame(head)
    if kind == MESH:
        return _mesh_identity(files[0], head, static_offset)
    return _from_frames([read_frame(file) for file in files], head, tracker_head, static_offset)


def tracker_files(path: str | os.PathLike) -> tuple[str, list[Path]]:
    """Which kind of output lies there, and its files in the order of time.

    Raises:
      FileNotFoundError: nothing of a tracker there.
      FileFormatError: a file that is none of the kinds.
    """
    path = Path(path)
    if path.is_dir():
        return _in_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a tracker's .npz, .frame, .ply or folder.")
    return _kind(path), [path]


def _kind(path: Path) -> str:
    with open(path, "rb") as file:
        head = file.read(4)
    if head[:3] == b"ply":
        return MESH
    if is_frame(path):
        return FRAME
    if head[:2] == b"PK" or path.suffix == ".npz":
        return NPZ
    raise FileFormatError(
        f"{path} is no tracker output that is read here: expected FLAME parameters (.npz of VHAP, LAM or "
        "GaussianAvatars), a Pixel3DMM .frame or its mesh .ply."
    )


def _in_folder(folder: Path) -> tuple[str, list[Path]]:
    tracked = _numbered(folder, r"tracked_flame_params_(\d{1,9})\.npz")
    if not tracked:
        # VHAP makes a folder for every run, named by its time.
        runs = sorted(folder.glob("*/tracked_flame_params_*.npz"))
        tracked = _numbered(runs[-1].parent, r"tracked_flame_params_(\d{1,9})\.npz") if runs else []
    if tracked:
        return NPZ, tracked[-1:]
    for place in (folder / "flame_param", folder):
        if files := _numbered(place, r"(\d{1,9})\.npz"):
            return NPZ, files
    if (folder / "flame_param.npz").is_file():
        return NPZ, [folder / "flame_param.npz"]
    for place in (folder / "checkpoint", folder):
        if files := _numbered(place, r"(\d{1,9})\.frame"):
            return FRAME, files
    for mesh in (folder / "mesh" / "canonical.ply", folder / "canonical.ply"):
        if mesh.is_file():
            return MESH, [mesh]
    raise FileNotFoundError(
        f"{folder} holds no tracker output; expected tracked_flame_params_<epoch>.npz, flame_param/00000.npz, "
        "flame_param.npz, checkpoint/00000.frame or mesh/canonical.ply: check the path."
    )


def _numbered(folder: Path, pattern: str) -> list[Path]:
    """The folder's files whose name is `pattern`, by the number in it."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), p) for p in folder.iterdir() if (match := re.fullmatch(pattern, p.name)) and p.is_file()]
    return [p for _, p in sorted(found)]


def _joined(files: Sequence[Path], parts: Sequence[FlameParams]) -> FlameParams:
    """One sequence of the parts'. Raises FileFormatError if they are of different people."""
    first = parts[0]
    for file, part in zip(files, parts, strict=True):
        for name in ("shape", "static_offset"):
            a, b = getattr(first, name), getattr(part, name)
            if (a is None) != (b is None) or (a is not None and np.abs(np.asarray(a - b)).max(initial=0) > _SAME_SHAPE):
                raise FileFormatError(
                    f"{file} and {files[0]} have another {name}: these are different people; name one of them."
                )
    return first.replace(**{name: jnp.concatenate([getattr(p, name) for p in parts]) for name in _TIMED})


def _mesh_identity(path: Path, head: FlameModel, static_offset: bool) -> FlameParams:
    shape, offset = _identity(path, head, static_offset)
    return head.neutral_params((1,)).replace(shape=shape, static_offset=offset)


def _identity(path: Path, head: FlameModel, static_offset: bool):
    vertices = read_flame_mesh(path)
    _check_extent(path, vertices, np.asarray(head.v_template)[:FLAME_VERTICES])
    return _refit(head, vertices, static_offset)


def _refit(head: FlameModel, vertices: np.ndarray, static_offset: bool):
    shape, offset = refit_shape(head, vertices)
    return jnp.asarray(shape, jnp.float32), jnp.asarray(offset, jnp.float32) if static_offset else None


def _from_frames(
    frames: Sequence[Frame], head: FlameModel, tracker_head: FlameModel | None, static_offset: bool
) -> FlameParams:
    first = frames[0]
    for frame in frames:
        if len(frame.shape) != len(first.shape) or np.abs(frame.shape - first.shape).max() > _SAME_SHAPE:
            raise FileFormatError(f"{frame.path} and {first.path} have another shape: these are different people.")
    if _same_edition(first, head, tracker_head):
        timed = [frame.params(head) for frame in frames]
    else:
        timed = _refitted(frames, head, tracker_head, static_offset)
    placed = []
    for frame, params in zip(frames, timed, strict=True):
        root = np.asarray(head.joint_regressor[0] @ flame_vertices(head, _unposed(params)), np.float64)
        rotation, translation = rigid_to_flame(frame.rotation, frame.translation, root)
        placed.append(params.replace(rotation=jnp.asarray(rotation, jnp.float32),
                                     translation=jnp.asarray(translation, jnp.float32)))  # fmt: skip
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *placed)
    return stacked.replace(shape=placed[0].shape, static_offset=placed[0].static_offset)


def _same_edition(frame: Frame, head: FlameModel, tracker_head: FlameModel | None) -> bool:
    """Whether the coefficients of a `.frame` are those of `head`: they give the tracker's own mesh."""
    if tracker_head is not None:
        return tracker_head.sha256 == head.sha256
    if not frame.canonical_path.is_file():
        raise UserError(
            f"{frame.path}: FLAME editions differ and {frame.canonical_path} is not there to tell the person by: keep "
            "the tracker's mesh folder beside its checkpoint folder, or name the FLAME file it ran with (the flag "
            "--tracker_flame of reconstruct and generate)."
        )
    size = head.shape_dirs.shape[-1]
    if frame.shape[size:].any():
        return False
    shape = jnp.asarray(np.pad(frame.shape[:size], (0, max(size - len(frame.shape), 0))), jnp.float32)
    own = np.asarray(flame_vertices(head, _neutral(head, shape, None)), np.float64)[:FLAME_VERTICES]
    return bool(np.abs(own - read_flame_mesh(frame.canonical_path)).max() < _SAME_EDITION)


def _refitted(
    frames: Sequence[Frame], head: FlameModel, tracker_head: FlameModel | None, static_offset: bool
) -> list[FlameParams]:
    """Parameters of `head` whose meshes are the tracker's, without the rigid poses."""
    if tracker_head is None:
        shape, offset = _identity(frames[0].canonical_path, head, static_offset)
        meshes = [_posed_mesh(frame) for frame in frames]
    else:
        require_flame(tracker_head)
        own = [frame.params(tracker_head) for frame in frames]
        neutral = flame_vertices(tracker_head, _neutral(tracker_head, own[0].shape, None))
        shape, offset = _refit(head, np.asarray(neutral, np.float64)[:FLAME_VERTICES], static_offset)
        meshes = [np.asarray(flame_vertices(tracker_head, p), np.float64)[:FLAME_VERTICES] for p in own]
    neutral = _neutral(head, shape, offset)
    return [refit_expression(head, frame.posed(neutral), mesh) for frame, mesh in zip(frames, meshes, strict=True)]


def _posed_mesh(frame: Frame) -> Float[np.ndarray, "5023 3"]:
    if not frame.mesh_path.is_file():
        raise UserError(
            f"{frame.mesh_path} is not there, and without it the expression of {frame.path} cannot be told: keep the "
            "tracker's mesh folder, name the FLAME file it ran with (the flag --tracker_flame of reconstruct and "
            "generate), or give mesh/canonical.ply itself for the identity alone."
        )
    return read_flame_mesh(frame.mesh_path)


def _neutral(head: FlameModel, shape, offset) -> FlameParams:
    return head.neutral_params().replace(shape=shape, static_offset=offset)


def _unposed(params: FlameParams) -> FlameParams:
    """Identity and expression alone: what the joints are regressed from."""
    zero = {name: jnp.zeros_like(getattr(params, name)) for name in _TIMED if name != "expr"}
    return params.replace(**zero)


def _check_extent(path: Path, vertices: np.ndarray, template: np.ndarray) -> None:
    """Raises FileFormatError for a mesh that is not of a head's size: millimetres, or the 5 × of some trackers."""
    found, expected = np.ptp(vertices, axis=0), np.ptp(template, axis=0)
    if ((found > 2 * expected) | (found < expected / 2)).any():
        raise FileFormatError(
            f"{path}: its head is {' × '.join(f'{x:.3g}' for x in found)} m, expected about "
            f"{' × '.join(f'{x:.2g}' for x in expected)}: it is in another unit, or not a head in FLAME's axes; scale "
            "it to metres."
        )
