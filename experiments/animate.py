"""Moves an avatar and films it: built-in motions, tracked motions, a capture's own frames (paper §4.3, §5).

    python -m experiments.animate --avatar=outputs/avatars/me --motion=turn_and_talk --output=outputs/me.mp4
    python -m experiments.animate --avatar=… --motion=flame_param.npz [--camera=orbit] [--size=512] [--fps=24]
    python -m experiments.animate --avatar=… --capture=outputs/people/person_0003 [--split=test] [--capture_camera=8]

`--motion` is turn, talk, expressions, turn_and_talk, or what a tracker left (flame_param.npz, a .frame, a folder of
either): of any person (cross-reenactment: the shape stays the avatar's) or of the avatar's own. `--camera` is front,
orbit, or a path of cameras: a transforms.json with one camera, or one for each frame. `--capture` takes motion, cameras
and size of a capture's view, shows each photograph beside the render and prints PSNR and SSIM; of the same person that
is self-reenactment. With `--camera` only its motion is taken. The suffix of `--output` chooses: .mp4 is a video, .png a
sheet of frames, a name without suffix a folder of PNGs.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from experiments.common import refuse_flags, run
from experiments.frame_folders import check_frame_folder, frame_name, write_card
from experiments.heads import avatar_head
from experiments.media import write_image, write_video
from experiments.motions import MOTIONS, TRACKED, check_motion, load_motion
from experiments.pictures import BACKGROUND, contact_sheet
from pointillist_jax.cameras import Camera, load_transforms, orbit
from pointillist_jax.data.captures import load_capture
from pointillist_jax.files import UserError, atomic_folder, require_writable
from pointillist_jax.flame import FlameModel, FlameParams
from pointillist_jax.gaussians import load_avatar
from pointillist_jax.losses import psnr, ssim
from pointillist_jax.playback import AvatarRenderer

AVATAR = flags.DEFINE_string("avatar", None, "An avatar bundle (experiments.reconstruct, experiments.quickstart).")
MOTION = flags.DEFINE_string("motion", "turn_and_talk", f"{', '.join(MOTIONS)}, or {TRACKED}.")
CAPTURE = flags.DEFINE_string("capture", None, "A capture whose motion, cameras and photographs are used instead.")
SPLIT = flags.DEFINE_enum("split", "test", ("train", "val", "test"), "Of --capture.")
CAPTURE_CAMERA = flags.DEFINE_integer("capture_camera", None, "Its camera index; the split's first if not given.")
CY_FROM_BOTTOM = flags.DEFINE_boolean("cy_from_bottom", None, "As experiments.fit; for --capture and --camera files.")
CAMERA = flags.DEFINE_string(
    "camera", "front", "front, orbit (once around the head), or a transforms.json; with --capture the capture's own."
)
FRAMES = flags.DEFINE_integer("frames", 96, "Length of a built-in motion.", lower_bound=1, upper_bound=100_000)
SIZE = flags.DEFINE_integer("size", 256, "Side of the pictures in pixels.", lower_bound=16, upper_bound=4096)
FPS = flags.DEFINE_integer("fps", 24, "Frames a second.", lower_bound=1, upper_bound=240)
OUTPUT = flags.DEFINE_string("output", "outputs/avatar.mp4", ".mp4, .png or a folder.")
OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Replace --output; of folders, one that this script wrote.")
FLAME = flags.DEFINE_string("flame", None, "Your FLAME .pkl, if the avatar was made with it.")
STRETCH = flags.DEFINE_boolean("follow_stretch", True, "Gaussians grow and shrink with their faces.")

_MADE_BY = "experiments.animate"
_SHEET = 24  # Frames on a .png.
# Shapes of one person that two files hold in different precision.
_SAME_SHAPE = 1e-3


def main() -> None:
    start = time.perf_counter()
    if AVATAR.value is None:
        raise UserError("--avatar is missing: name an avatar bundle (python -m experiments.reconstruct makes them).")
    output = Path(OUTPUT.value)
    check_flags(output)
    check_output(output)
    avatar = load_avatar(AVATAR.value)
    head = avatar_head(AVATAR.value, FLAME.value)
    photographs: list[np.ndarray] = []
    if CAPTURE.value:
        motion, cameras, photographs = capture_motion(CAPTURE.value, head)
    if not photographs:
        path = camera_path(CAMERA.value) if CAMERA.value.endswith(".json") else None
        if not CAPTURE.value:
            # A path of many cameras gives a built-in motion its length.
            many = path is not None and len(path.viewmats) > 1
            refuse_flags(("frames",) if many else (), "with a path of several cameras, which has its own length")
            motion = load_motion(MOTION.value, head, len(path.viewmats) if many else FRAMES.value, FPS.value)
        if path is None:
            # Trackers place heads in their own rooms: the camera stays in front of the mean position.
            motion = motion.replace(translation=motion.translation - motion.translation.mean(axis=0))
        cameras = path or film_cameras(len(motion.expr))
    renderer = AvatarRenderer(
        avatar,
        head,
        cameras.width,
        cameras.height,
        background=(1.0, 1.0, 1.0) if photographs else BACKGROUND,
        follow_stretch=STRETCH.value,
    )
    count = len(motion.expr)
    frames = list(tqdm(renderer.play(motion, cameras), total=count, desc="frames", unit="frame"))
    if photographs:
        own = np.abs(np.asarray(avatar.rig.canonical.shape - motion.shape)).max() < _SAME_SHAPE
        print_scores(frames, photographs, "self-reenactment" if own else "cross-reenactment: a head of another shape")
        frames = [np.concatenate([a, b], axis=1) for a, b in zip(frames, photographs, strict=True)]
    write_frames(output, frames)
    print(f"\ndone in {time.perf_counter() - start:.0f} s: {output}{'' if output.suffix else '/'} ({count} frames)")


def check_flags(output: Path) -> None:
    """Raises UserError for values that do not exist and for flags that would do nothing."""
    if output.suffix not in (".mp4", ".png", ""):
        raise UserError(f"--output={output}: it must end in .mp4 or .png, or name a folder.")
    built_in, path = check_motion(MOTION.value), CAMERA.value.endswith(".json")
    if not path and CAMERA.value not in ("front", "orbit"):
        raise UserError(f"--camera={CAMERA.value} must be front, orbit, or a transforms.json.")
    if CAPTURE.value:
        refuse_flags(("motion", "frames"), "with --capture, whose motion is taken")
        if flags.FLAGS["camera"].present:
            refuse_flags(("capture_camera",), "with --camera, which is taken instead")
        else:
            refuse_flags(("size",), "with --capture, whose photographs have theirs")
    else:
        refuse_flags(("split", "capture_camera"), "without --capture")
        refuse_flags(() if path else ("cy_from_bottom",), "without --capture and without a transforms.json")
    if not built_in:
        refuse_flags(("frames",), "with a flame_param.npz or another tracked motion, which has its own length")
    if path:
        refuse_flags(("size",), "with a transforms.json, which has its own")
    if output.suffix != ".mp4" and (CAPTURE.value or not built_in):
        refuse_flags(("fps",), "to pictures of a motion that is not built in")


def check_output(output: Path) -> None:
    """Raises UserError if --output is there and may not be replaced; a folder only if this script wrote all of it.

    OSError if it cannot be written: before the film is rendered, not after.
    """
    require_writable(output.parent)
    if not output.exists():
        return
    if output.is_dir() and output.suffix:
        raise UserError(f"--output={output} is a folder; name a file, or a folder without a suffix.")
    if not output.is_dir() and not output.suffix:
        raise UserError(f"--output={output} is a file; name a folder, or a file that ends in .mp4 or .png.")
    if output.is_dir():
        check_frame_folder(output, _MADE_BY)
        if not any(output.iterdir()):
            return
    if not OVERWRITE.value:
        raise UserError(f"--output={output} exists; give --overwrite to replace it, or name another.")


def film_cameras(frames: int) -> Camera:
    """A camera in front of the head, or one for each frame of a full turn."""
    how = {"width": SIZE.value, "height": SIZE.value, "distance": 1.2, "target": (0.0, -0.03, -0.04)}
    if CAMERA.value == "front":
        return orbit(1, azimuth=(0.0, 0.0), **how)
    return orbit(frames, azimuth=(0.0, 2 * math.pi), **how)


def camera_path(path: str) -> Camera:
    """The cameras [C] of a transforms.json, in its order."""
    return stacked(path, [f.camera for f in load_transforms(path, cy_from_bottom=CY_FROM_BOTTOM.value)])


def stacked(where: str, cameras: list[Camera]) -> Camera:
    """[C] of C cameras. Raises UserError if their pictures differ in size."""
    if len(sizes := sorted({(c.width, c.height) for c in cameras})) > 1:
        raise UserError(f"the cameras of {where} have pictures of different sizes, {sizes}; a film has one.")
    viewmats, Ks = (np.stack([np.asarray(getattr(c, name)) for c in cameras]) for name in ("viewmats", "Ks"))
    return Camera(viewmats, Ks, *sizes[0])


def capture_motion(path: str, head: FlameModel) -> tuple[FlameParams, Camera | None, list[np.ndarray]]:
    """Motion [T], cameras [T] and photographs of one camera of a capture's split; with --camera the motion alone."""
    capture = load_capture(path, head, identity="first", cy_from_bottom=CY_FROM_BOTTOM.value)
    views = capture.split(SPLIT.value)
    if not len(views):
        raise UserError(f"{path} has no views in its split {SPLIT.value!r}; choose another --split.")
    if flags.FLAGS["camera"].present:
        return capture.params.timestep(np.unique(views.timesteps)), None, []
    known = sorted(set(views.camera_indices.tolist()))
    index = known[0] if CAPTURE_CAMERA.value is None else CAPTURE_CAMERA.value
    if index not in known:
        raise UserError(f"--capture_camera={index}: the split {SPLIT.value!r} of {path} has {known}.")
    rows = np.flatnonzero(views.camera_indices == index)
    rows = rows[np.argsort(views.timesteps[rows], kind="stable")]
    # One for each frame: a hand-held camera has one index and moves.
    cameras = stacked(path, [views.camera(int(n)) for n in rows])
    return capture.params.timestep(views.timesteps[rows]), cameras, [views.image(int(n)) for n in rows]


def print_scores(frames: list[np.ndarray], photographs: list[np.ndarray], what: str) -> None:
    """Mean PSNR and SSIM of renders against photographs."""
    scores = [
        (float(psnr(jnp.asarray(a), jnp.asarray(b))), float(ssim(jnp.asarray(a), jnp.asarray(b))))
        for a, b in zip(frames, photographs, strict=True)
    ]
    decibels, similarity = np.mean(scores, axis=0)
    print(f"{len(frames)} frames, {what}: PSNR {decibels:.2f} dB, SSIM {similarity:.4f} (zero padding), "
          "against the photographs")  # fmt: skip


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
                write_image(folder / frame_name(i, ".png"), frame)
            write_card(folder, _MADE_BY, len(frames), ".png", {"avatar": AVATAR.value})


if __name__ == "__main__":
    run(main)
