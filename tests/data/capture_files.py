"""Small capture folders in the GaussianAvatars/VHAP schema, written by hand for the tests (facts A.8)."""

from __future__ import annotations

import json
from pathlib import Path

import imageio.v3 as iio
import numpy as np

from pointillist_jax.cameras import orbit, viewmats_to_opengl
from pointillist_jax.files import write_npz
from pointillist_jax.flame import FlameModel

CAMERAS, SIZES = 3, ((20, 16), (24, 18), (20, 16))  # (w, h): the middle camera has another sensor.


def flame_arrays(rng: np.random.Generator, model: FlameModel, identity: dict[str, np.ndarray]) -> dict:
    sizes = {"rotation": 3, "neck_pose": 3, "jaw_pose": 3, "eyes_pose": 6, "translation": 3}
    timed = {name: rng.normal(0, 0.1, (1, n)).astype(np.float32) for name, n in sizes.items()}
    return {**identity, **timed, "expr": rng.normal(size=(1, model.expr_dirs.shape[-1])).astype(np.float32)}


def write_capture(
    root: Path,
    model: FlameModel,
    rng: np.random.Generator,
    *,
    timesteps: int = 4,
    offset_vertices: int | None = None,
    masks: str | None = "L",
    image_mode: str = "RGB",
    identity: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Writes a capture: the last timestep is test, camera 1 of the others val, the rest train.

    Returns:
      Pictures as written: "<timestep>_<camera>" → image, and "mask_…".
    """
    v = model.num_vertices if offset_vertices is None else offset_vertices
    if identity is None:
        identity = {
            "shape": rng.normal(size=model.shape_dirs.shape[-1]).astype(np.float32),
            "static_offset": rng.normal(0, 1e-3, (1, v, 3)).astype(np.float32),
        }
    viewmats = np.asarray(orbit(CAMERAS, width=20, height=16, azimuth=(-0.8, 0.8), closed=False).viewmats)
    c2w = np.asarray(viewmats_to_opengl(viewmats))
    written, frames = {}, {"train": [], "val": [], "test": []}
    for folder in ("images", "fg_masks", "flame_param"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for t in range(timesteps):
        write_npz(root / "flame_param" / f"{t:05d}.npz", flame_arrays(rng, model, identity))
        for c, (w, h) in enumerate(SIZES):
            name = f"{t:05d}_{c:02d}"
            channels = {"L": (), "RGB": (3,), "RGBA": (4,)}
            image = rng.integers(0, 256, (h, w, *channels[image_mode]), dtype=np.uint8)
            iio.imwrite(root / "images" / f"{name}.png", image)
            written[name] = image
            frame = {
                "timestep_index": t, "camera_index": c, "camera_id": f"cam{c}", "timestep_id": f"frame_{t:05d}",
                "w": w, "h": h, "fl_x": 30.0 + c, "fl_y": 31.0 + c, "cx": w / 2 + 0.25, "cy": h / 2 - 0.5,
                "transform_matrix": c2w[c].tolist(), "file_path": f"images/{name}.png",
                "flame_param_path": f"flame_param/{t:05d}.npz",
            }  # fmt: skip
            if masks:
                mask = rng.integers(0, 256, (h, w, *channels[masks]), dtype=np.uint8)
                if masks == "RGB":
                    mask = np.repeat(mask[..., :1], 3, axis=-1)
                iio.imwrite(root / "fg_masks" / f"{name}.png", mask)
                written[f"mask_{name}"] = mask if masks == "L" else mask[..., 0]
                frame["fg_mask_path"] = f"./fg_masks/{name}.png"
            frames["test" if t == timesteps - 1 else "val" if c == 1 else "train"].append(frame)
    canonical = {**flame_arrays(rng, model, identity), "expr": np.zeros((1, model.expr_dirs.shape[-1]), np.float32)}
    canonical |= {key: np.zeros((1, n), np.float32) for key, n in (("rotation", 3), ("translation", 3))}
    canonical["jaw_pose"] = np.array([[0.3, 0, 0]], np.float32)
    write_npz(root / "canonical_flame_param.npz", canonical)
    for split, entries in frames.items():
        write_transforms(root, split, entries)
    return written


def write_transforms(root: Path, split: str, frames: list[dict]) -> None:
    (root / f"transforms_{split}.json").write_text(json.dumps({"frames": frames}))


def read_frames(root: Path, split: str) -> list[dict]:
    return json.loads((root / f"transforms_{split}.json").read_text())["frames"]
