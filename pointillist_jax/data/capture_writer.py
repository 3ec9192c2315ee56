"""Renders a rigged person into a capture folder in the GaussianAvatars/VHAP schema (facts/avatars_gsplat.md A.8)."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pointillist_jax.cameras import Camera, intrinsics, look_at, viewmats_to_opengl
from pointillist_jax.flame import FlameModel, FlameParams, face_frames, flame_vertices, local_to_global
from pointillist_jax.flame.param_files import save_flame_params
from pointillist_jax.gaussians import Gaussians
from renderer_bridge import rasterize

# Degrees: azimuth (towards the subject's left), elevation. Like NeRSemble's rig in front and to the sides; the first
# and last look from behind the ears, so that hair is seen all round. Number 8 is frontal and held out for validation.
CAMERAS = (
    (-125, 12), (-75, 4), (-58, 20), (-52, -12), (-40, 8), (-28, 26), (-22, -14), (-10, 10),
    (0, 2), (10, -18), (18, 8), (26, 24), (34, -10), (50, 12), (72, 6), (125, 16),
)  # fmt: skip
VALIDATION_CAMERA = 8
TARGET = (0.0, -0.015, -0.03)
_DISTANCE, _FOV = 1.1, math.radians(22.0)
# Views rendered by one call: what keeps its buffers at about the size of sixteen of 256².
_PIXELS_PER_CALL = 16 * 256 * 256
_BUCKET = 8192


def capture_rig(size: int, scale: float = 1.0) -> Camera:
    """The sixteen cameras of a synthetic capture, [16], `size` pixels square; `scale` enlarges the field of view."""
    azimuth, elevation = np.radians(np.array(CAMERAS, np.float64)).T
    direction = np.stack(
        [np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)], axis=1
    )
    target = np.array(TARGET)
    viewmats = look_at(target + _DISTANCE * direction, np.broadcast_to(target, direction.shape))
    return Camera(viewmats, jnp.tile(intrinsics(scale * _FOV, size, size), (len(CAMERAS), 1, 1)), size, size)


class FrameRenderer:
    """Renders posed people with few compilations: Gaussians are padded to buckets, the capacity is kept and grown."""

    def __init__(self, model: FlameModel, first_capacity: int | None = None):
        """`first_capacity`: tile intersections to begin with; None guesses from the number of Gaussians."""
        self._model, self._first = model, first_capacity
        self._capacity: dict[tuple[int, int, int, int], int] = {}

    def __call__(self, local: Gaussians, params: FlameParams, cameras: Camera) -> tuple[np.ndarray, np.ndarray]:
        """One timestep from C cameras on white.

        Args:
          local: triangle-local Gaussians with `binding`.
          params: of one timestep, without leading axes.
          cameras: [C].

        Returns:
          image [C, H, W, 3] float32 in [0, 1] and alpha [C, H, W].
        """
        count = local.num_gaussians
        local = pad_gaussians(local, -(-max(count, 1) // _BUCKET) * _BUCKET)
        world = _pose(self._model, local, params)
        total = cameras.viewmats.shape[0]
        step = max(1, min(total, _PIXELS_PER_CALL // (cameras.width * cameras.height)))
        while total % step:
            step -= 1
        images, alphas = [], []
        for start in range(0, total, step):
            key = (local.num_gaussians, step, cameras.width, cameras.height)
            while True:
                guess = _capacity_bucket(self._first or 4 * step * local.num_gaussians)
                capacity = self._capacity.setdefault(key, guess)
                image, alpha, info = _render(
                    world,
                    cameras.viewmats[start : start + step],
                    cameras.Ks[start : start + step],
                    width=cameras.width,
                    height=cameras.height,
                    capacity=capacity,
                )
                if int(info["overflow"]) == 0:
                    break
                self._capacity[key] = _capacity_bucket(1.25 * int(info["intersections"]))
            images.append(np.asarray(image))
            alphas.append(np.asarray(alpha)[..., 0])
        return np.clip(np.concatenate(images), 0, 1), np.concatenate(alphas)


def pad_gaussians(gaussians: Gaussians, num: int) -> Gaussians:
    """Adds invisible Gaussians (opacity 0, face 0) up to `num`."""
    more = num - gaussians.num_gaussians

    def pad(value, fill=0.0):
        return jnp.pad(value, [(0, more)] + [(0, 0)] * (value.ndim - 1), constant_values=fill)

    return gaussians.replace(
        means=pad(gaussians.means),
        quats=pad(gaussians.quats, 1.0),
        scales=pad(gaussians.scales, 1.0),
        opacities=pad(gaussians.opacities),
        colors=pad(gaussians.colors),
        binding=pad(gaussians.binding, 0),
    )


def write_capture(
    folder: Path,
    model: FlameModel,
    local: Gaussians,
    motion: FlameParams,
    canonical: FlameParams,
    cameras: Camera,
    render: FrameRenderer,
    *,
    validation_camera: int = VALIDATION_CAMERA,
    train_share: float = 0.7,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Writes images, masks, parameters per timestep and the transforms of the splits into `folder`.

    The first `train_share` of the timesteps train, but for one camera held out for validation; the last timesteps with
    all cameras are the test of self-reenactment. Images lie on white already; a mask is 255 wherever the person touches
    a pixel at all, so that cutting out by it once more changes nothing on white.

    Args:
      folder: exists; other files in it are left alone. Make it appear at once with `files.atomic_folder`.
      local: triangle-local Gaussians.
      motion: [T, ...] with the person's shape.
      canonical: without leading axes.
      cameras: [C] of one size.
      progress: called after every timestep.
    """
    folder = Path(folder)
    for name in ("images", "fg_masks", "flame_param"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    num, count = motion.expr.shape[0], cameras.viewmats.shape[0]
    frames = []
    for t in range(num):
        params = motion.timestep(t)
        save_flame_params(folder / f"flame_param/{t:05d}.npz", params, model)
        images, alphas = render(local, params, cameras)
        for c in range(count):
            _write_png(folder / f"images/{t:05d}_{c:02d}.png", np.round(images[c] * 255).astype(np.uint8))
            _write_png(folder / f"fg_masks/{t:05d}_{c:02d}.png", ((alphas[c] > 1e-3) * 255).astype(np.uint8))
            frames.append(_frame(t, c, cameras))
        progress()
    save_flame_params(folder / "canonical_flame_param.npz", canonical, model)
    write_obj(folder / "canonical.obj", np.asarray(flame_vertices(model, canonical)), np.asarray(model.faces))

    last_train = max(1, min(math.ceil(train_share * num - 1e-9), num - 1))  # VHAP rounds up.
    splits = {
        "": frames,
        "_train": [f for f in frames if f["timestep_index"] < last_train and f["camera_index"] != validation_camera],
        "_val": [f for f in frames if f["timestep_index"] < last_train and f["camera_index"] == validation_camera],
        "_test": [f for f in frames if f["timestep_index"] >= last_train],
    }
    for suffix, chosen in splits.items():
        content = {
            **_intrinsics(cameras, 0),
            "timestep_indices": sorted({f["timestep_index"] for f in chosen}),
            "camera_indices": sorted({f["camera_index"] for f in chosen}),
            "frames": chosen,
        }
        (folder / f"transforms{suffix}.json").write_text(json.dumps(content, indent=1) + "\n")


def write_obj(path: Path, vertices: np.ndarray, faces: np.ndarray) -> None:
    """A triangle mesh as Wavefront OBJ, metres."""
    lines = [f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in vertices] + [f"f {a} {b} {c}" for a, b, c in faces + 1]
    Path(path).write_text("\n".join(lines) + "\n")


@jax.jit
def _pose(model: FlameModel, local: Gaussians, params: FlameParams) -> Gaussians:
    return local_to_global(local, face_frames(flame_vertices(model, params), model.faces))


@functools.partial(jax.jit, static_argnames=("width", "height", "capacity"))
def _render(world: Gaussians, viewmats, Ks, *, width: int, height: int, capacity: int):
    image, alpha, info = rasterize(
        world.means,
        world.quats,
        world.scales,
        world.opacities,
        world.colors,
        viewmats,
        Ks,
        width,
        height,
        backgrounds=jnp.ones((viewmats.shape[0], 3)),
        capacity=capacity,
    )
    return image, alpha, {"overflow": info["overflow"], "intersections": info["intersections"]}


def _capacity_bucket(count: float) -> int:
    """The next power of two or one and a half of one: few sizes, hence few compilations."""
    bits = max(12, math.ceil(math.log2(max(count, 1))))
    return 3 << (bits - 2) if count <= 3 << (bits - 2) else 1 << bits


def _intrinsics(cameras: Camera, c: int) -> dict[str, float]:
    K = np.asarray(cameras.Ks[c], np.float64)
    return {
        "cx": float(K[0, 2]),
        "cy": float(K[1, 2]),
        "fl_x": float(K[0, 0]),
        "fl_y": float(K[1, 1]),
        "h": cameras.height,
        "w": cameras.width,
        "camera_angle_x": 2 * math.atan(0.5 * cameras.width / float(K[0, 0])),
        "camera_angle_y": 2 * math.atan(0.5 * cameras.height / float(K[1, 1])),
    }


def _frame(t: int, c: int, cameras: Camera) -> dict:
    pose = np.asarray(viewmats_to_opengl(cameras.viewmats[c]), np.float64)
    return {
        "timestep_index": t,
        "timestep_index_original": t,
        "timestep_id": f"{t:05d}",
        "camera_index": c,
        "camera_id": f"{c:02d}",
        **_intrinsics(cameras, c),
        "transform_matrix": pose.tolist(),
        "file_path": f"images/{t:05d}_{c:02d}.png",
        "fg_mask_path": f"fg_masks/{t:05d}_{c:02d}.png",
        "flame_param_path": f"flame_param/{t:05d}.npz",
    }


def _write_png(path: Path, image: np.ndarray) -> None:
    import imageio.v3 as iio

    iio.imwrite(path, image)
