"""Pixel3DMM's tracker output: `.frame` files and their meshes (facts/encoders_and_metrics.md 5.1, 5.5).

A `.frame` is a pickle inside PyTorch's archive. It is read by the restricted reader of `flame.unpickle`: nothing in it
runs, and no torch is needed.
"""

from __future__ import annotations

import os
import pickletools
import zipfile
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pointillist_jax.cameras import Camera
from pointillist_jax.convert.torch_files import check_torch_zip
from pointillist_jax.files import ArraySpec, FileFormatError, check_array, require_file
from pointillist_jax.flame import FlameModel, FlameParams
from pointillist_jax.flame.rotations import rotation_to_quat
from pointillist_jax.flame.teeth import FLAME_VERTICES, NUM_TEETH_VERTICES
from pointillist_jax.flame.unpickle import load_pickled_arrays
from pointillist_jax.ply import ply_matrix, read_ply_vertices

_WHAT, _AGAIN = "a .frame of Pixel3DMM", "track the picture again"
# Kilobytes in fact.
_MAX_BYTES = 64 << 20
_BOUND = {"low": -1e3, "high": 1e3}
# Key → length of the flattened array, or a letter.
_KEYS: dict[str, int | str] = {
    "flame/shape": "S",
    "flame/exp": "E",
    "flame/jaw": 6,
    "flame/neck": 6,
    "flame/eyes": 12,
    "flame/R": 6,
    "flame/t": 3,
}
_CAMERA_KEYS = {"camera/R_base_0": 9, "camera/t_base_0": 3, "camera/fl": 1, "camera/pp": 2}
_OPTIONAL = {"flame/R_rotation_matrix": 9, **_CAMERA_KEYS}
# Numbers of the tracker's own pictures, in which its principal point is measured.
_TRACKER_SIZE = 256
# Optimised rotations in float32 are not exact.
_ORTHONORMAL = 1e-3


class Frame(NamedTuple):
    """One tracked picture, in the coefficients of the FLAME file that Pixel3DMM ran with.

    Attributes:
      shape: [S]. expr: [E].
      neck_pose, jaw_pose: [3] axis-angle. eyes_pose: [6].
      rotation: [3, 3] and `translation` [3]: the rigid pose, about the origin: world = rotation @ flame + translation.
      camera: `R_base_0` [3, 3], `t_base_0` [3], `fl` [1] and `pp` [2]; empty if the file has none.
      path: of the file.
    """

    shape: np.ndarray
    expr: np.ndarray
    neck_pose: np.ndarray
    jaw_pose: np.ndarray
    eyes_pose: np.ndarray
    rotation: np.ndarray
    translation: np.ndarray
    camera: dict[str, np.ndarray]
    path: Path

    @property
    def mesh_path(self) -> Path:
        """Where the tracker leaves this picture's posed mesh (R and t not applied)."""
        return self.path.parent.parent / "mesh" / f"{self.path.stem}.ply"

    @property
    def canonical_path(self) -> Path:
        """Where the tracker leaves the mesh of the identity alone."""
        return self.path.parent.parent / "mesh" / "canonical.ply"

    def params(self, head: FlameModel) -> FlameParams:
        """The coefficients as they are, for the head they belong to, without the rigid pose; no leading axes.

        Raises:
          FileFormatError: the head has fewer directions than the file uses.
        """
        values = {}
        for name, size in (("shape", head.shape_dirs.shape[-1]), ("expr", head.expr_dirs.shape[-1])):
            value = getattr(self, name)
            if value[size:].any():
                raise FileFormatError(
                    f"{self.path}: {name} has {len(value)} coefficients, but {head.source or 'the head'} has {size}: "
                    "load the FLAME file with all its directions."
                )
            values[name] = np.pad(value[:size], (0, max(size - len(value), 0)))
        return self.posed(head.neutral_params()).replace(**{k: jnp.asarray(v, jnp.float32) for k, v in values.items()})

    def posed(self, params: FlameParams) -> FlameParams:
        """`params` with this picture's neck, jaw and eyes, which mean the same in every edition."""
        poses = {name: getattr(self, name) for name in ("neck_pose", "jaw_pose", "eyes_pose")}
        return params.replace(**{name: jnp.asarray(value, jnp.float32) for name, value in poses.items()})


def read_frame(path: str | os.PathLike) -> Frame:
    """Reads a `.frame`.

    Raises:
      FileNotFoundError: no such file.
      UnsafeFileError: it asks for code to be run. Nothing of it was executed.
      FileFormatError: names file, key, expected and found; a rotation that is none.
    """
    path = require_file(path, _WHAT)
    arrays = load_pickled_arrays(_pickle_of(path), str(path), _KEYS, optional=_OPTIONAL, what=_WHAT, again=_AGAIN)
    source, letters = str(path), {}
    for key, size in (_KEYS | _OPTIONAL).items():
        if key not in arrays:
            continue
        # The leading 1 is a batch.
        flat = arrays[key].reshape(-1).astype(np.float64) if arrays[key].dtype.kind in "fiu" else arrays[key]
        if not flat.size:
            raise FileFormatError(f"{path}: {key} is empty; is this {_WHAT}?")
        check_array(source, key, flat, ArraySpec((size,), **_BOUND), letters)
        arrays[key] = flat

    def turn(key: str, part: slice = slice(None)) -> np.ndarray:
        return _six_to_rotation(path, key, arrays[key][part])

    rotation = turn("flame/R")
    if (matrix := arrays.get("flame/R_rotation_matrix")) is not None:
        matrix = _rotation(path, "flame/R_rotation_matrix", matrix)
        if np.abs(matrix - rotation).max() > 1e-2:
            raise FileFormatError(f"{path}: flame/R and flame/R_rotation_matrix differ; the file is damaged, {_AGAIN}.")
    camera = {}
    if all(key in arrays for key in _CAMERA_KEYS):
        camera = {key.removeprefix("camera/"): arrays[key] for key in _CAMERA_KEYS}
        camera["R_base_0"] = _rotation(path, "camera/R_base_0", camera["R_base_0"])
    return Frame(
        shape=arrays["flame/shape"],
        expr=arrays["flame/exp"],
        neck_pose=axis_angle(turn("flame/neck")),
        jaw_pose=axis_angle(turn("flame/jaw")),
        eyes_pose=np.concatenate([axis_angle(turn("flame/eyes", slice(6 * i, 6 * i + 6))) for i in range(2)]),
        rotation=rotation,
        translation=arrays["flame/t"],
        camera=camera,
        path=path,
    )


def frame_camera(path: str | os.PathLike, size: int = 512) -> Camera:
    """The camera of a `.frame`, in the world of `flame_params_from_tracker`, for its square crop of `size` pixels.

    The principal point is known to a pixel of the tracker's 256 (facts 5.1). The crop's place in the photograph is not
    in the file.

    Raises:
      FileNotFoundError, UnsafeFileError, FileFormatError: as `read_frame`; a file without a camera.
    """
    frame = read_frame(path)
    if not frame.camera:
        raise FileFormatError(f"{path} holds no camera ({', '.join(_CAMERA_KEYS)}); {_AGAIN}.")
    S, fl, pp = _TRACKER_SIZE, float(frame.camera["fl"][0]), frame.camera["pp"]
    if fl <= 0:
        raise FileFormatError(f"{path}: camera/fl is {fl}, expected a positive focal length; {_AGAIN}.")
    viewmat = np.eye(4)
    viewmat[:3, :3], viewmat[:3, 3] = frame.camera["R_base_0"], frame.camera["t_base_0"]
    viewmat = np.diag([1.0, -1.0, -1.0, 1.0]) @ viewmat  # OpenGL's axes → OpenCV's.
    center = S / 2 + np.array([-0.5, 0.5]) + pp * (S / 2 + 0.5)
    K = np.array([[fl * S, 0, center[0]], [0, fl * S, center[1]], [0, 0, S / size]]) * (size / S)
    return Camera(jnp.asarray(viewmat[None], jnp.float32), jnp.asarray(K[None], jnp.float32), size, size)


def read_flame_mesh(path: str | os.PathLike) -> Float[np.ndarray, "5023 3"]:
    """The vertices of a mesh in FLAME's topology: a binary PLY, with or without the 120 vertices of the teeth.

    Raises:
      FileNotFoundError: no such file.
      FileFormatError: no PLY, damaged, or of another number of vertices.
    """
    path = require_file(path, "a tracker's mesh .ply")
    vertices = ply_matrix(path, read_ply_vertices(path), ["x", "y", "z"], "a mesh").astype(np.float64)
    if len(vertices) not in (FLAME_VERTICES, FLAME_VERTICES + NUM_TEETH_VERTICES):
        raise FileFormatError(
            f"{path} has {len(vertices)} vertices; a FLAME mesh has {FLAME_VERTICES}: name the tracker's "
            "mesh/canonical.ply."
        )
    return vertices[:FLAME_VERTICES]


def rigid_to_flame(
    rotation: Float[np.ndarray, "3 3"], translation: Float[np.ndarray, "3"], root: Float[np.ndarray, "3"]
) -> tuple[np.ndarray, np.ndarray]:
    """FLAME's `rotation` [3] and `translation` [3] of a rigid pose about the origin.

    FLAME turns about its root joint: R (v - J₀) + J₀ + t' = R v + t, so t' = t + (R - I) J₀.

    Args:
      root: the root joint of the shaped mesh, expression included.
    """
    return axis_angle(rotation), translation + rotation @ root - root


def axis_angle(rotation: Float[np.ndarray, "3 3"]) -> Float[np.ndarray, "3"]:
    """Axis times angle, radians; exact near 0 and near π."""
    quat = np.asarray(rotation_to_quat(jnp.asarray(rotation, jnp.float32)), np.float64)
    quat = quat if quat[0] >= 0 else -quat
    length = np.linalg.norm(quat[1:])
    return quat[1:] * (2.0 if length < 1e-8 else 2 * np.arctan2(length, quat[0]) / length)


def is_frame(path: Path) -> bool:
    """Whether a file's content is PyTorch's archive or a bare pickle, whatever its name is."""
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                return any(name == "data.pkl" or name.endswith("/data.pkl") for name in archive.namelist())
        except Exception:  # A damaged directory: `read_npz` will say so.
            return False
    with open(path, "rb") as file:
        head = file.read(2)
    return len(head) == 2 and head[0] == 0x80 and head[1] <= 5


def _pickle_of(path: Path) -> bytes:
    if path.stat().st_size > _MAX_BYTES:
        raise FileFormatError(f"{path} is {path.stat().st_size >> 20} MiB, too much for {_WHAT}; check the path.")
    if not check_torch_zip(path):
        content = path.read_bytes()
        # What PyTorch wrote before 1.6 begins with a pickle of its magic number alone.
        first = next((op.name for op, *_ in _operations(content) if op.name not in ("PROTO", "FRAME")), "")
        if first.startswith("LONG"):
            raise FileFormatError(f"{path} is in the format of PyTorch before 1.6; load it there and save it again.")
        return content
    try:
        with zipfile.ZipFile(path) as archive:
            member = next(n for n in archive.namelist() if n == "data.pkl" or n.endswith("/data.pkl"))
            return archive.read(member)
    except Exception as error:  # Whatever a damaged archive makes zipfile say.
        raise FileFormatError(
            f"{path} is damaged or no {_WHAT[2:]} ({error or type(error).__name__}); {_AGAIN}."
        ) from None


def _operations(content: bytes):
    try:
        yield from pickletools.genops(content)
    except Exception:  # Damage is reported by the reader.
        return


def _six_to_rotation(path: Path, key: str, six: np.ndarray) -> np.ndarray:
    """The first two *rows* of a rotation, not necessarily of length 1 → [3, 3] by Gram-Schmidt."""
    a, b = six[:3], six[3:]
    row0 = a / max(np.linalg.norm(a), 1e-12)
    rest = b - row0 * (row0 @ b)
    if np.linalg.norm(a) < 1e-3 or np.linalg.norm(rest) < 1e-3:
        raise FileFormatError(f"{path}: {key} is no rotation (two rows {np.round(six, 4).tolist()}); {_AGAIN}.")
    row1 = rest / np.linalg.norm(rest)
    return np.stack([row0, row1, np.cross(row0, row1)])


def _rotation(path: Path, key: str, values: np.ndarray) -> np.ndarray:
    matrix = values.reshape(3, 3)
    if np.abs(matrix @ matrix.T - np.eye(3)).max() > _ORTHONORMAL or np.linalg.det(matrix) < 0:
        raise FileFormatError(f"{path}: {key} is no rotation (not orthonormal); {_AGAIN}.")
    return matrix
