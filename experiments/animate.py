"""Moves an avatar and films it: built-in motions, tracked motions, a capture's own frames (paper §4.3, §5).

    python -m experiments.animate --avatar=outputs/avatars/me --motion=turn_and_talk --output=outputs/me.mp4
    python -m experiments.animate --avatar=… --motion=flame_param.npz [--camera=orbit] [--size=512] [--fps=24]
    python -m experiments.animate --avatar=… --capture=outputs/people/person_0003 [--split=test] [--capture_camera=8]

`--motion` is turn, talk, expressions, turn_and_talk, or a flame_param.npz: of any person (cross-reenactment: the shape
stays the avatar's) or of the avatar's own. `--capture` takes motion, camera and size of a capture's view and shows each
photograph beside the render; of the same person that is self-reenactment, and PSNR and SSIM are printed. The suffix of
`--output` chooses: .mp4 is a video, .png a sheet of frames, a name without suffix a folder of PNGs.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from experiments.common import run
from experiments.heads import named_head
from experiments.media import write_image, write_video
from experiments.motions import MOTIONS
from experiments.pictures import BACKGROUND, contact_sheet
from pointillist_jax.cameras import Camera, orbit
from pointillist_jax.data.captures import load_capture
from pointillist_jax.files import UserError, atomic_folder, read_json
from pointillist_jax.flame import FlameModel, FlameParams, load_flame, open_head
from pointillist_jax.flame.param_files import load_flame_params
from pointillist_jax.gaussians import load_avatar
from pointillist_jax.losses import psnr, ssim
from pointillist_jax.playback import AvatarRenderer

AVATAR = flags.DEFINE_string("avatar", None, "An avatar bundle (experiments.reconstruct, experiments.quickstart).")
MOTION = flags.DEFINE_string("motion", "turn_and_talk", f"{', '.join(MOTIONS)}, or a flame_param.npz.")
CAPTURE = flags.DEFINE_string("capture", None, "A capture whose motion, camera and photographs are used instead.")
SPLIT = flags.DEFINE_enum("split", "test", ("train", "val", "test"), "Of --capture.")
CAPTURE_CAMERA = flags.DEFINE_integer("capture_camera", None, "Its camera index; the split's first if not given.")
CAMERA = flags.DEFINE_enum("camera", "front", ("front", "orbit"), "Stands in front, or goes once around the head.")
FRAMES = flags.DEFINE_integer("frames", 96, "Length of a built-in motion.", lower_bound=1, upper_bound=100_000)
SIZE = flags.DEFINE_integer("size", 256, "Side of the pictures in pixels.", lower_bound=16, upper_bound=4096)
FPS = flags.DEFINE_integer("fps", 24, "Frames a second.", lower_bound=1, upper_bound=240)
OUTPUT = flags.DEFINE_string("output", "outputs/avatar.mp4", ".mp4, .png or a folder; replaced if it was made before.")
FLAME = flags.DEFINE_string("flame", None, "Your FLAME .pkl, if the avatar was made with it.")
STRETCH = flags.DEFINE_boolean("follow_stretch", True, "Gaussians grow and shrink with their faces.")

_SHEET = 24  # Frames on a .png.


def main() -> None:
    start = time.perf_counter()
    if AVATAR.value is None:
        raise UserError("--avatar is missing: name an avatar bundle (python -m experiments.reconstruct makes them).")
    output = Path(OUTPUT.value)
    if output.suffix not in (".mp4", ".png", ""):
        raise UserError(f"--output={output}: it must end in .mp4 or .png, or name a folder.")
    if output.suffix == "" and output.exists() and not (output.is_dir() and all(_ours(p) for p in output.iterdir())):
        raise UserError(f"--output={output} holds something that this script did not write; name another folder.")
    avatar = load_avatar(AVATAR.value)
    head = head_of(Path(AVATAR.value), FLAME.value)
    photographs: list[np.ndarray] = []
    if CAPTURE.value:
        motion, cameras, photographs = capture_motion(CAPTURE.value, head)
        background = (1.0, 1.0, 1.0)
    else:
        motion = load_motion(MOTION.value, head)
        cameras, background = film_cameras(motion.expr.shape[0]), BACKGROUND
    renderer = AvatarRenderer(
        avatar, head, cameras.width, cameras.height, background=background, follow_stretch=STRETCH.value
    )
    count = motion.expr.shape[0]
    frames = list(tqdm(renderer.play(motion, cameras), total=count, desc="frames", unit="frame"))
    if photographs:
        scores = [
            (float(psnr(jnp.asarray(a), jnp.asarray(b))), float(ssim(jnp.asarray(a), jnp.asarray(b))))
            for a, b in zip(frames, photographs, strict=True)
        ]
        mean = np.mean(scores, axis=0)
        print(f"{count} frames: PSNR {mean[0]:.2f} dB, SSIM {mean[1]:.4f} (zero padding), against the photographs")
        frames = [np.concatenate([a, b], axis=1) for a, b in zip(frames, photographs, strict=True)]
    write_frames(output, frames)
    print(f"\ndone in {time.perf_counter() - start:.0f} s: {output}{'' if output.suffix else '/'} ({count} frames)")


def head_of(bundle: Path, flame: str | None) -> FlameModel:
    """The head an avatar bundle was made for. Raises UserError if it is neither --flame nor an open head."""
    if flame:
        return load_flame(flame)
    card = read_json(bundle / "avatar.json", "an avatar bundle's card").get("flame")
    card = card if isinstance(card, dict) else {}
    for detail in ("coarse", "full"):
        head = open_head(detail)
        if (head.sha256, head.num_faces) == (card.get("sha256"), card.get("num_faces")):
            return head
    return named_head(f"a head of {card.get('num_faces')} faces", card.get("sha256"), str(bundle))


def load_motion(text: str, head: FlameModel) -> FlameParams:
    """A built-in motion, or a file's."""
    if text in MOTIONS:
        return MOTIONS[text](head, FRAMES.value, FPS.value)
    if not text.endswith(".npz"):
        raise UserError(f"--motion={text} must be one of {', '.join(MOTIONS)}, or a flame_param.npz.")
    motion = load_flame_params(text, head)
    # Trackers place heads in their own rooms: the camera stays in front of the mean position.
    return motion.replace(translation=motion.translation - motion.translation.mean(axis=0))


def film_cameras(frames: int) -> Camera:
    """A camera in front of the head, or one for each frame of a full turn."""
    how = {"width": SIZE.value, "height": SIZE.value, "distance": 1.2, "target": (0.0, -0.03, -0.04)}
    if CAMERA.value == "front":
        return orbit(1, azimuth=(0.0, 0.0), **how)
    return orbit(frames, azimuth=(0.0, 2 * math.pi), **how)


def capture_motion(path: str, head: FlameModel) -> tuple[FlameParams, Camera, list[np.ndarray]]:
    """Motion [T], camera and photographs of one camera of a capture's split."""
    capture = load_capture(path, head, identity="first")
    views = capture.split(SPLIT.value)
    if not len(views):
        raise UserError(f"{path} has no views in its split {SPLIT.value!r}; choose another --split.")
    known = sorted(set(views.camera_indices.tolist()))
    index = known[0] if CAPTURE_CAMERA.value is None else CAPTURE_CAMERA.value
    if index not in known:
        raise UserError(f"--capture_camera={index}: the split {SPLIT.value!r} of {path} has {known}.")
    rows = np.flatnonzero(views.camera_indices == index)
    rows = rows[np.argsort(views.timesteps[rows], kind="stable")]
    motion = capture.params.timestep(views.timesteps[rows])
    return motion, views.camera(int(rows[0])), [views.image(int(n)) for n in rows]


def write_frames(output: Path, frames: list[np.ndarray]) -> None:
    """A video, a sheet, or a folder of numbered pictures."""
    if output.suffix == ".mp4":
        write_video(output, frames, FPS.value)
    elif output.suffix == ".png":
        chosen = np.unique(np.linspace(0, len(frames) - 1, min(_SHEET, len(frames))).astype(int))
        write_image(output, contact_sheet([frames[i] for i in chosen], [str(i) for i in chosen], min(6, len(chosen))))
    else:
        with atomic_folder(output) as folder:
            for i, frame in enumerate(frames):
                write_image(folder / f"{i:05d}.png", frame)


def _ours(path: Path) -> bool:
    return path.suffix == ".png" and path.stem.isdigit()


if __name__ == "__main__":
    run(main)
