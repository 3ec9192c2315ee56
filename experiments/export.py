"""Avatars and trained weights in the formats of other programs; and weights back from them.

    python -m experiments.export --format=ply --avatar=outputs/avatars/me --motion=talk --frame=12 --output=me.ply
    python -m experiments.export --format=splat|spz --avatar=… [--motion=… --frame=…] --output=me.splat|me.spz
    python -m experiments.export --format=gaussian_avatars --avatar=… [--motion=…] --output=me_gaussian_avatars
    python -m experiments.export --format=ply_sequence|html --avatar=… [--motion=…] --output=me_frames|me.html
    python -m experiments.export --format=torch --checkpoint=outputs/ar --output=ar.safetensors [--step=1000]
    python -m experiments.export --format=torch --checkpoint=pretrained/ar|pretrained/decoder --output=….safetensors
    python -m experiments.export --format=torch --import=ar.safetensors --output=outputs/ar_from_torch

ply, splat, spz: one frame in world space, as any splat viewer shows it: that of `--motion` at `--frame`, else the
neutral head. A .ply holds the values as they are, a .splat eight bits of most, an .spz the least (it needs gsply, the
extra `export`). gaussian_avatars: point_cloud.ply, local to the triangles, beside flame_param.npz with the whole motion
(or `--frame` of it): what `tokenize --fits` and GaussianAvatars' viewer read. There Gaussians move rigidly with their
triangles, which differs from skinning away from the canonical pose. ply_sequence: numbered .ply files of a motion.
html: a page that plays a motion without a server.

torch: a training's parameters (of `train_ar` or `train_decoder`; their average where the run keeps one), or the ones
that this package ships (pretrained/ar, pretrained/decoder) or that a .npz of weights holds, as one .safetensors file.
The PyTorch models of experiments/torch_reference load it as it is, in a process that needs neither JAX nor this package
(`torch_reference/exported.py`). Config, tokenizer and provenance lie in its metadata. The way back gives a workdir that
`generate`, `extract_features` and `reconstruct` read: the same parameters to the bit if nothing changed them. It holds
no optimiser state, so no training goes on from it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from experiments.common import refuse_flags, run
from experiments.frame_folders import check_frame_folder, frame_name, write_card
from experiments.heads import avatar_head
from experiments.motions import MOTIONS, TRACKED, check_motion, load_motion
from pointillist_jax.configs import DecoderConfig, ModelConfig, config_from_json
from pointillist_jax.convert import load_torch_file
from pointillist_jax.convert.reference import (
    ar_from_torch,
    ar_to_torch,
    decoder_from_torch,
    decoder_to_torch,
    load_metadata,
    save_reference,
)
from pointillist_jax.data.fits import save_fit
from pointillist_jax.files import FileFormatError, UserError, atomic_folder
from pointillist_jax.flame import FlameModel, FlameParams, animate, face_frames, flame_vertices, global_to_local
from pointillist_jax.gaussians import Avatar, Gaussians, load_avatar, save_ply
from pointillist_jax.pretrained import weights_file
from pointillist_jax.splat_files import save_splat, save_spz
from pointillist_jax.training.checkpoints import load_params, meta_path, model_kind, newest_step, save_params

# Format → suffix of --output; "" is a folder.
SUFFIXES = {"ply": ".ply", "gaussian_avatars": "", "splat": ".splat", "spz": ".spz", "ply_sequence": "",
            "html": ".html", "torch": ".safetensors"}  # fmt: skip
STILL: dict[str, Callable[[Path, Gaussians], None]] = {"ply": save_ply, "splat": save_splat, "spz": save_spz}

FORMAT = flags.DEFINE_enum("format", "torch", list(SUFFIXES), "Of what is written, or read with --import.")
AVATAR = flags.DEFINE_string("avatar", None, "An avatar bundle (experiments.reconstruct, experiments.quickstart).")
MOTION = flags.DEFINE_string("motion", None, f"{', '.join(MOTIONS)}, or {TRACKED}.")
FRAME = flags.DEFINE_integer("frame", 0, "Which frame of --motion, for formats that hold one.", lower_bound=0)
FRAMES = flags.DEFINE_integer("frames", 96, "Length of a built-in motion.", lower_bound=1, upper_bound=100_000)
FPS = flags.DEFINE_integer("fps", 24, "Frames a second.", lower_bound=1, upper_bound=240)
FLAME = flags.DEFINE_string("flame", None, "Your FLAME .pkl, if the avatar was made with it.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a training, or weights: they are exported.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint of it; the newest if not given.", lower_bound=0)
IMPORT = flags.DEFINE_string("import", None, "Instead of --checkpoint: a file to make a workdir from.")
OUTPUT = flags.DEFINE_string("output", None, "File or folder to write, or with --import the workdir.")
OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Replace --output; of folders, one that this script wrote.")

_MADE_BY = "experiments.export"
_FIT_FILES = {"point_cloud.ply", "flame_param.npz"}
_OF_AVATARS = ("avatar", "motion", "frame", "frames", "fps", "flame")
_OF_WEIGHTS = ("checkpoint", "step", "import")

# Kind → the part of the config that makes the model, what that is, and the weights' ways there and back.
KINDS = {
    "ar": ("model", ModelConfig, ar_to_torch, ar_from_torch),
    "decoder": ("decoder", DecoderConfig, decoder_to_torch, decoder_from_torch),
}

# What --checkpoint may say for the weights of this package.
PRETRAINED = {"pretrained/ar": "ar", "pretrained/decoder": "decoder"}


def main() -> None:
    if FORMAT.value != "torch":
        export_avatar()
        return
    refuse_flags(_OF_AVATARS, "with --format=torch, which is for weights")
    if (CHECKPOINT.value is None) == (IMPORT.value is None):
        raise UserError("give either --checkpoint=<workdir of a training> or --import=<a file of weights>.")
    if OUTPUT.value is None:
        raise UserError("--output is missing: name the file to write, or with --import the workdir.")
    if IMPORT.value is None:
        export_torch(CHECKPOINT.value, STEP.value, OUTPUT.value)
    else:
        refuse_flags(("step",), "with --import, whose file holds one")
        import_torch(IMPORT.value, OUTPUT.value)


class Posed(NamedTuple):
    """What is exported: an avatar, its head, and a motion [T] of it (None: the neutral head)."""

    avatar: Avatar
    head: FlameModel
    motion: FlameParams | None

    def frame(self, t: int) -> Gaussians:
        """The Gaussians of frame t, in world space."""
        params = self.head.neutral_params() if self.motion is None else self.motion.timestep(t)
        return animate(self.avatar, self.head, params)


def export_avatar() -> None:
    check_avatar_flags()
    output = Path(OUTPUT.value)
    check_output(output)
    avatar, head = load_avatar(AVATAR.value), avatar_head(AVATAR.value, FLAME.value)
    motion = None if MOTION.value is None else load_motion(MOTION.value, head, FRAMES.value, FPS.value)
    if motion is None and FORMAT.value in ("ply_sequence", "html"):
        motion = load_motion("turn_and_talk", head, FRAMES.value, FPS.value)
    if motion is not None and FRAME.value >= len(motion.expr):
        raise UserError(f"--frame={FRAME.value}: the motion has frames 0 to {len(motion.expr) - 1}.")
    posed = Posed(avatar, head, motion)
    num = avatar.gaussians.num_gaussians
    if FORMAT.value in STILL:
        STILL[FORMAT.value](output, posed.frame(FRAME.value))
        print(f"\n{output}: {num} Gaussians, {size_of(output)}; any viewer of .{FORMAT.value} files shows it")
    elif FORMAT.value == "gaussian_avatars":
        export_fit(output, posed)
    elif FORMAT.value == "ply_sequence":
        export_sequence(output, posed)
        print(f"\n{output}/: {len(motion.expr)} files 00000.ply … of {num} Gaussians at {FPS.value} frames a second")
    else:
        export_html(output, posed)


def check_avatar_flags() -> None:
    """Raises UserError for what is missing, does not exist, or would do nothing."""
    name = FORMAT.value
    refuse_flags(_OF_WEIGHTS, f"with --format={name}, which is for avatars")
    if AVATAR.value is None:
        raise UserError("--avatar is missing: name an avatar bundle (python -m experiments.reconstruct makes them).")
    if OUTPUT.value is None:
        raise UserError("--output is missing: name the file or folder to write.")
    suffix = Path(OUTPUT.value).suffix
    if SUFFIXES[name] and suffix != SUFFIXES[name]:
        raise UserError(f"--output={OUTPUT.value} must end in {SUFFIXES[name]}.")
    if not SUFFIXES[name] and suffix in SUFFIXES.values() and suffix:
        raise UserError(f"--output={OUTPUT.value}: --format={name} writes a folder; name one without {suffix}.")
    moving = name in ("ply_sequence", "html")
    if moving:
        refuse_flags(("frame",), f"with --format={name}, which holds the whole motion")
    if MOTION.value is None and not moving:
        refuse_flags(("frame", "frames", "fps"), "without --motion")
    elif MOTION.value is not None and not check_motion(MOTION.value):
        refuse_flags(("frames",), "with a tracked motion, which has its own length")
        refuse_flags(() if moving else ("fps",), f"to --format={name} of a motion that is not built in")


def check_output(output: Path) -> None:
    """Raises UserError if --output is there and may not be replaced; a folder only if this script wrote all of it."""
    folder = not SUFFIXES[FORMAT.value]
    if not output.exists():
        return
    if output.is_dir() != folder:
        kind, wanted = ("a folder", "a file") if output.is_dir() else ("a file", "a folder")
        raise UserError(f"--output={output} is {kind}; name {wanted}.")
    if folder and not any(output.iterdir()):
        return
    if FORMAT.value == "ply_sequence":
        check_frame_folder(output, _MADE_BY)
    elif folder and {path.name for path in output.iterdir()} != _FIT_FILES:
        raise UserError(f"--output={output} holds something that this script did not write; name another folder.")
    if not OVERWRITE.value:
        raise UserError(f"--output={output} exists; replace it with --overwrite, or name another.")


def export_fit(output: Path, posed: Posed) -> None:
    """GaussianAvatars' folder: the canonical Gaussians in their triangles, and the identity in motion."""
    avatar, head, motion = posed
    canonical = avatar.rig.canonical
    frames = face_frames(flame_vertices(head, canonical), head.faces)
    local = global_to_local(avatar.gaussians, avatar.rig.binding, frames)
    params = head.neutral_params((1,)) if motion is None else motion
    if flags.FLAGS["frame"].present:
        params = params.timestep(jnp.array([FRAME.value]))
    params = params.replace(shape=canonical.shape, static_offset=canonical.static_offset)
    save_fit(output, local, params, head)
    print(f"\n{output}/: point_cloud.ply ({local.num_gaussians} Gaussians in their triangles), flame_param.npz "
          f"({len(params.expr)} timesteps)")  # fmt: skip
    if not FLAME.value:
        print(f"it is bound to {head.source}: GaussianAvatars' viewer shows only what is bound to FLAME")


def export_sequence(output: Path, posed: Posed) -> None:
    """A folder of numbered .ply files, which appears when all of them are written."""
    num = len(posed.motion.expr)
    with atomic_folder(output) as folder:
        for t in tqdm(range(num), desc="frames", unit="frame"):
            save_ply(folder / frame_name(t, ".ply"), posed.frame(t))
        write_card(folder, _MADE_BY, num, ".ply", {"avatar": AVATAR.value, "fps": FPS.value})


def export_html(output: Path, posed: Posed) -> None:
    """A page that plays the motion."""
    from experiments.player import write_player

    made = write_player(output, posed.avatar, posed.head, posed.motion, fps=FPS.value, max_bytes=15_000_000)
    print(f"\n{output}: {size_of(output)}; open it in a browser")
    print("".join(f"  {name}: {value}\n" for name, value in made.items()), end="")


def size_of(path: Path) -> str:
    size = os.path.getsize(path)
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"


def export_torch(workdir: str, step: int | None, output: str) -> None:
    path = Path(output)
    if path.suffix != ".safetensors":
        raise UserError(f"--output={path} must end in .safetensors.")
    if path.exists() and not OVERWRITE.value:
        raise UserError(f"--output={path} exists; replace it with --overwrite, or name another file.")
    kind = PRETRAINED.get(workdir)
    workdir = workdir if kind is None or Path(workdir).exists() else str(weights_file(kind))
    params, meta = load_params(workdir, step)
    meta = dict(meta) if isinstance(meta, dict) else {}
    step = newest_step(workdir) if step is None else step
    where = str(meta_path(workdir, step))
    kind = model_kind(meta, where)
    config = meta.pop("config", None)
    part, model_config, to_torch, _ = KINDS[kind]
    model = config_from_json(model_config, config.get(part) if isinstance(config, dict) else None, where)
    state = to_torch(params, model)
    save_reference(path, state, {"kind": kind, "step": step, "config": config, "meta": meta})
    numbers = sum(np.size(x) for x in state.values())
    print(f"{path}: {len(state)} tensors, {numbers / 1e6:.2f} M numbers, {size_of(path)}, step {step}")
    print("load it with experiments.torch_reference.exported.load_exported, or with safetensors.torch.load_file")


def import_torch(path: str, output: str) -> None:
    content = load_metadata(path)
    kind, step = content.get("kind"), content.get("step")
    config, meta = content.get("config"), content.get("meta")
    if kind not in KINDS or type(step) is not int or step < 0 or not all(isinstance(x, dict) for x in (config, meta)):
        raise FileFormatError(f"{path}: its metadata are damaged (kind {kind!r}, step {step!r}); export it again.")
    part, model_config, _, from_torch = KINDS[kind]
    params = from_torch(load_torch_file(path), config_from_json(model_config, config.get(part), path))
    save_params(output, step, params, {**meta, "config": config}, overwrite=OVERWRITE.value)
    reader = "--ar" if kind == "ar" else "--decoder"
    print(f"{output}/checkpoints/{step}: read it with {reader}={output} (generate, extract_features, reconstruct)")


if __name__ == "__main__":
    run(main)
