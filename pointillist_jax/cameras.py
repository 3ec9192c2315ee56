"""Cameras: OpenCV world-to-camera matrices and pixel intrinsics, OpenGL conversions, transforms.json, orbits.

Conventions (DESIGN §1): `viewmats` map world to camera, x right, y down, z forward; `Ks` are in pixels, with pixel
centres at +0.5. NeRF-style files hold camera-to-world matrices in OpenGL axes: x right, y up, z backward.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pointillist_jax.files import FileFormatError, read_json
from pointillist_jax.flame.rotations import exact_einsum

_log = logging.getLogger(__name__)

_GL_TO_CV = np.diag([1.0, -1.0, -1.0, 1.0])
_MAX_SIDE = 1 << 15
# Pixels between the principal point and the middle of the picture that nobody sees.
_CENTERED = 0.5


@flax.struct.dataclass
class Camera:
    """One camera, or a batch of cameras of one image size.

    Attributes:
      viewmats: [..., 4, 4] world to camera, OpenCV axes.
      Ks: [..., 3, 3] pixels.
      width, height: pixels (static).
    """

    viewmats: Float[Array, "*b 4 4"]
    Ks: Float[Array, "*b 3 3"]
    width: int = flax.struct.field(pytree_node=False)
    height: int = flax.struct.field(pytree_node=False)

    @property
    def positions(self) -> Float[Array, "*b 3"]:
        """[..., 3] camera centres in world space."""
        return viewmats_to_opengl(self.viewmats)[..., :3, 3]

    def resized(self, width: int, height: int) -> Camera:
        """The same view in another resolution; pixels may become non-square."""
        factor = jnp.array([[width / self.width], [height / self.height], [1.0]], self.Ks.dtype)
        return self.replace(Ks=self.Ks * factor, width=width, height=height)

    def project(self, points: Float[Array, "P 3"]) -> tuple[Float[Array, "*b P 2"], Float[Array, "*b P"]]:
        """World points → (pixels [..., P, 2], depths [..., P] metres along the optical axis)."""
        seen = exact_einsum("...ab,pb->...pa", self.viewmats[..., :3, :3], points) + self.viewmats[..., None, :3, 3]
        pixels = exact_einsum("...ab,...pb->...pa", self.Ks[..., :2, :], seen / seen[..., 2:])
        return pixels, seen[..., 2]


@dataclasses.dataclass(frozen=True)
class Frame:
    """One entry of a transforms.json (facts/avatars_gsplat.md A.8).

    Attributes:
      index: its place in the file.
      camera: its view, with the frame's own intrinsics; NumPy arrays.
      image_path, mask_path, flame_param_path: absolute or relative to the working directory; None where the file has no
        such key. They are not opened here and may not exist.
      timestep_index: as stored, or None: a path of cameras needs none.
      camera_index: as stored, or 0.
      camera_id, timestep_id: as stored, or "".
    """

    index: int
    camera: Camera
    image_path: Path
    mask_path: Path | None
    flame_param_path: Path | None
    timestep_index: int | None
    camera_index: int
    camera_id: str
    timestep_id: str


def opengl_to_viewmats(camera_to_world: Float[Array, "*b 4 4"]) -> Float[Array, "*b 4 4"]:
    """OpenGL camera-to-world → OpenCV world-to-camera."""
    return _rigid_inverse(_flip_yz(jnp.asarray(camera_to_world)))


def viewmats_to_opengl(viewmats: Float[Array, "*b 4 4"]) -> Float[Array, "*b 4 4"]:
    """OpenCV world-to-camera → OpenGL camera-to-world: the inverse of `opengl_to_viewmats`."""
    return _flip_yz(_rigid_inverse(jnp.asarray(viewmats)))


def look_at(
    position: Float[Array, "*b 3"], target: Float[Array, "*b 3"], up: tuple[float, float, float] = (0.0, 1.0, 0.0)
) -> Float[Array, "*b 4 4"]:
    """OpenCV world-to-camera matrices of cameras at `position` that look at `target`, `up` upwards in the image."""
    position, target = jnp.asarray(position, jnp.float32), jnp.asarray(target, jnp.float32)
    forward = _unit(target - position)
    # Looking straight along `up` leaves the roll open; the top of the image then points to the head's back or front.
    up = jnp.asarray(up, jnp.float32)
    along = jnp.sum(forward * _unit(up), axis=-1, keepdims=True)
    up = jnp.where(jnp.abs(along) > 1 - 1e-6, jnp.array([0.0, 0.0, -1.0]) * -jnp.sign(along), up)
    right = _unit(jnp.cross(forward, up))
    rotation = jnp.stack([right, jnp.cross(forward, right), forward], axis=-2)
    shift = -exact_einsum("...ab,...b->...a", rotation, position)
    return _assemble(rotation, shift)


def intrinsics(fov_x: float, width: int, height: int) -> Float[Array, "3 3"]:
    """K of a centred camera with square pixels and horizontal field of view `fov_x` (radians)."""
    focal = 0.5 * width / math.tan(0.5 * fov_x)
    return jnp.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], jnp.float32)


def orbit(
    num_cameras: int,
    *,
    width: int,
    height: int,
    distance: float = 1.0,
    target: tuple[float, float, float] = (0.0, 0.0, -0.02),
    fov_x: float = math.radians(22.0),
    azimuth: tuple[float, float] = (-math.pi, math.pi),
    elevation: float | tuple[float, float] = 0.0,
    closed: bool = True,
) -> Camera:
    """A batch of cameras on an arc around a head, all looking at `target`.

    Args:
      num_cameras: C.
      width, height: pixels.
      distance: metres from the target.
      target: metres.
      fov_x: radians.
      azimuth: first and last angle in radians; 0 looks the face in the eyes (from +z), positive from its left (+x).
      elevation: radians above the horizon; a pair is swept from first to last.
      closed: leave the last angle out, because it equals the first of a full turn.

    Returns:
      Camera with viewmats [C, 4, 4] and Ks [C, 3, 3].
    """
    steps = jnp.linspace(0.0, 1.0, num_cameras, endpoint=not closed)
    low, high = elevation if isinstance(elevation, tuple) else (elevation, elevation)
    around, above = azimuth[0] + (azimuth[1] - azimuth[0]) * steps, low + (high - low) * steps
    direction = jnp.stack([jnp.sin(around) * jnp.cos(above), jnp.sin(above), jnp.cos(around) * jnp.cos(above)], axis=-1)
    center = jnp.asarray(target, jnp.float32)
    viewmats = look_at(center + distance * direction, center)
    return Camera(viewmats, jnp.tile(intrinsics(fov_x, width, height), (num_cameras, 1, 1)), width, height)


def load_transforms(
    path: str | os.PathLike, *, cy_from_bottom: bool | None = None, problems: list[str] | None = None
) -> list[Frame]:
    """Reads a transforms_*.json in the GaussianAvatars/VHAP (NeRF) schema; see facts/avatars_gsplat.md A.8.

    Intrinsics are taken per frame, then from the file's top level: `fl_x`, `fl_y`, `cx`, `cy`, `w`, `h`. Without a
    focal length it is `camera_angle_x`/`camera_angle_y`; without a principal point, the image's centre.

    Args:
      path: the JSON file; the paths in it are relative to its folder and may lead out of it (`../`, UNION data sets).
      cy_from_bottom: the file counts cy from the lower border (the gsplat branch of GaussianAvatars reads it so). None
        is False, with a warning where it makes a difference.
      problems: when given, a damaged frame adds its sentence here and is left out, instead of raising at the first one.

    Raises:
      FileNotFoundError: no such file.
      FileFormatError: names file, frame and key.
    """
    path = Path(path)
    content = read_json(path, "a transforms.json")
    frames = content.get("frames")
    if not isinstance(frames, list) or not frames:
        raise FileFormatError(f"{path}: frames is missing or empty; is this a transforms.json?")
    read = []
    for i, frame in enumerate(frames):
        try:
            read.append(_frame(path, i, frame, content, bool(cy_from_bottom)))
        except FileFormatError as error:
            if problems is None:
                raise
            problems.append(str(error))
    if cy_from_bottom is None:
        warn_of_cy(path, read)
    return read


def warn_of_cy(where: str | os.PathLike, frames: Sequence[Frame]) -> None:
    """Logs one warning if it matters to these frames which border cy is counted from, for callers who did not say."""
    off = max((abs(float(f.camera.Ks[1, 2]) - f.camera.height / 2) for f in frames), default=0.0)
    if off > _CENTERED:
        _log.warning(
            "%s: cy lies up to %.1f pixels off the middle and is taken as counted from the upper border, though "
            "GaussianAvatars' gsplat branch counts VHAP's from the lower one: say which with --cy_from_bottom or "
            "--nocy_from_bottom (cy_from_bottom=True or False).",
            where,
            off,
        )


def _frame(path: Path, place: int, frame: Any, top: dict[str, Any], cy_from_bottom: bool) -> Frame:
    where = f"{path}: frame {place}"
    if not isinstance(frame, dict):
        raise FileFormatError(f"{where} is not an object; write the file again.")
    values = {**top, **frame}

    def number(key: str, low: float, high: float) -> float | None:
        value = values.get(key)
        if value is None:
            return None
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
        if not good:
            raise FileFormatError(f"{where}: {key} is {reprlib.repr(value)}, expected a number in [{low}, {high}].")
        return value

    def index(key: str) -> int | None:
        value = number(key, 0, (1 << 31) - 1)
        if value is not None and value != int(value):
            raise FileFormatError(f"{where}: {key} is {value!r}, expected a whole number.")
        return None if value is None else int(value)

    def required(key: str, low: float, high: float) -> float:
        value = number(key, low, high)
        if value is None:
            raise FileFormatError(f"{where}: {key} is missing, in the frame and at the top level; add it.")
        return value

    def file(key: str) -> Path | None:
        value = frame.get(key)
        if value is None:
            return None
        if not isinstance(value, str) or not value or "\0" in value:
            raise FileFormatError(f"{where}: {key} is {reprlib.repr(value)}, expected a path.")
        # ".." is meant from where the folder really lies, as the system has it: users link sets together.
        base = path.parent.resolve() if ".." in Path(value).parts else path.parent
        return Path(os.path.normpath(base / value))

    width, height = (required(key, 1, _MAX_SIDE) for key in ("w", "h"))
    if width != int(width) or height != int(height):
        raise FileFormatError(f"{where}: w and h are {width} × {height}, expected whole pixels.")
    focal = []
    for key, angle_key, side in (("fl_x", "camera_angle_x", width), ("fl_y", "camera_angle_y", height)):
        # A frame's own angle goes before a focal length shared by all frames.
        own_angle = frame.get(key) is None and frame.get(angle_key) is not None
        value = None if own_angle else number(key, 1e-3, 1e7)
        if value is None and (angle := number(angle_key, 1e-4, math.pi - 1e-4)) is not None:
            value = 0.5 * side / math.tan(0.5 * angle)
        focal.append(value)
    if focal[0] is None:
        raise FileFormatError(f"{where}: neither fl_x nor camera_angle_x is given; add one of them.")
    fx, fy = focal[0], focal[0] if focal[1] is None else focal[1]
    cx, cy = number("cx", -_MAX_SIDE, 2 * _MAX_SIDE), number("cy", -_MAX_SIDE, 2 * _MAX_SIDE)
    cx, cy = width / 2 if cx is None else cx, height / 2 if cy is None else cy
    if cy_from_bottom:
        cy = height - cy
    image = file("file_path")
    if image is None:
        raise FileFormatError(f"{where}: file_path is missing; add it.")
    matrix = _pose(where, frame.get("transform_matrix"))
    # NumPy: a capture has tens of thousands of frames, and making device arrays takes longer than reading the file.
    camera = Camera(
        viewmats=np.linalg.inv(matrix @ _GL_TO_CV).astype(np.float32),
        Ks=np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], np.float32),
        width=int(width),
        height=int(height),
    )
    return Frame(
        index=place,
        camera=camera,
        image_path=image,
        mask_path=file("fg_mask_path"),
        flame_param_path=file("flame_param_path"),
        timestep_index=index("timestep_index"),
        camera_index=index("camera_index") or 0,
        camera_id=str(frame.get("camera_id", "")),
        timestep_id=str(frame.get("timestep_id", "")),
    )


def _pose(where: str, value: Any) -> np.ndarray:
    try:
        matrix = np.array(value, np.float64)
    except (ValueError, TypeError, OverflowError):
        matrix = np.zeros(0)
    matrix[np.abs(matrix) > np.finfo(np.float32).max] = np.inf  # Cameras are float32.
    if matrix.shape == (3, 4):
        matrix = np.concatenate([matrix, [[0, 0, 0, 1]]])
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or not np.allclose(matrix[3], [0, 0, 0, 1], atol=1e-6):
        raise FileFormatError(f"{where}: transform_matrix must be 4 × 4 finite numbers whose last row is 0 0 0 1.")
    if np.abs(matrix[:3, :3].T @ matrix[:3, :3] - np.eye(3)).max() > 1e-2 or np.linalg.det(matrix[:3, :3]) < 0:
        raise FileFormatError(f"{where}: transform_matrix is not a rotation and a translation; the file is damaged.")
    return matrix


def _flip_yz(matrix):
    return matrix * jnp.array([1, -1, -1, 1], matrix.dtype)


def _rigid_inverse(matrix):
    rotation = jnp.swapaxes(matrix[..., :3, :3], -1, -2)
    return _assemble(rotation, -exact_einsum("...ab,...b->...a", rotation, matrix[..., :3, 3]))


def _assemble(rotation, shift):
    top = jnp.concatenate([rotation, shift[..., None]], axis=-1)
    bottom = jnp.broadcast_to(jnp.array([0, 0, 0, 1], top.dtype), (*top.shape[:-2], 1, 4))
    return jnp.concatenate([top, bottom], axis=-2)


def _unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
