"""The main job, end to end, with everything that exists so far. It grows with the project.

    python -m experiments.quickstart [--workdir=outputs/quickstart] [--flame=flame2023.pkl] [--smoke]

Synthetic people photographed from sixteen sides → one of them fitted with Gaussians bound to a head's faces → everyone
as a token sequence → minutes of training of the transformer that writes such sequences → from a portrait the cloud of
somebody it never saw → minutes of training of the decoder that paints clouds → the portrait as an avatar that turns and
talks, and the fitted person too, who shows what the rig can do. Each step is a script of its own: the command is
printed, and can be run by itself on your own captures. Needs no GPU, no torch and no files of the user's.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.common import run
from experiments.heads import choose_head
from experiments.media import write_image
from experiments.pictures import BACKGROUND, contact_sheet, head_sheet
from pointillist_jax.cameras import orbit
from pointillist_jax.data.fits import load_fit
from pointillist_jax.files import UserError, read_json
from pointillist_jax.flame import FlameModel, bind_points, open_head
from pointillist_jax.gaussians import Avatar, load_avatar, save_avatar, save_ply
from pointillist_jax.playback import AvatarRenderer
from pointillist_jax.tokens import PointTokenizer

WORKDIR = flags.DEFINE_string("workdir", "outputs/quickstart", "Where to write; files of an earlier run are replaced.")
FLAME = flags.DEFINE_string("flame", None, "Your FLAME .pkl; the embedded open head if not given.")
PEOPLE = flags.DEFINE_integer("people", 8, "Synthetic people.", lower_bound=3, upper_bound=1000)
FRAMES = flags.DEFINE_integer("frames", 96, "Length of the video at 24 frames a second.", lower_bound=2)
SIZE = flags.DEFINE_integer("size", 256, "Side of the video's pictures in pixels.", lower_bound=32, upper_bound=2048)
SEED = flags.DEFINE_integer("seed", 0, "Which people.", lower_bound=0)
SMOKE = flags.DEFINE_boolean("smoke", False, "The smallest setting: few small pictures, few steps, few frames.")

OUTPUTS = {
    "head.png": "what the head can do: identities, expressions, jaw, eyes, neck",
    "people/gallery.png": "the synthetic people; the folders beside it are capture folders with their truth",
    "fits/": "one of them fitted from its pictures; report.png in it shows truth beside fit",
    "tokens/": "everyone as a token sequence, with the portrait and head it is to be generated from",
    "ar/": "the transformer after some minutes: curve.png, card.json, checkpoints",
    "clouds/clouds.png": "the cloud it writes for somebody it never saw, beside the truth",
    "decoder/": "the Gaussian decoder: curve.png, card.json, strips/ (renders above photographs), checkpoints",
    "from_portrait.mp4": "portrait to avatar, turning and talking; avatars/portrait/ is the bundle",
    "splats.png": "the fitted person as an avatar: views and expressions",
    "talking.mp4": "the same, turning and talking",
    "frame.ply": "it with its head turned as a standard splat file: open it in any 3DGS viewer",
    "avatar/": "the fitted person's bundle: canonical splats, rig, card",
}
STEPS = 9


def main() -> None:
    start = time.perf_counter()
    workdir, smoke = Path(WORKDIR.value), SMOKE.value
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file; name a folder.")
    model = choose_head(FLAME.value, None if FLAME.value else "coarse")
    print(f"[1/{STEPS}] head: {model.source}, {model.num_vertices} vertices, {model.num_faces} faces", flush=True)
    full = model if FLAME.value or smoke else open_head("full")
    write_image(workdir / "head.png", head_sheet(full, None if full is model else model, size=96 if smoke else 192))

    people, subject = 3 if smoke else PEOPLE.value, "person_0001"
    make_people(workdir, people, smoke)
    fit_one(workdir, subject, smoke)
    begin(4, "everyone as tokens")
    script("tokenize", f"--fits={workdir}/people", f"--workdir={workdir}/tokens", "--overwrite")
    train_transformer(workdir, smoke)
    unseen = read_json(workdir / "ar" / "card.json", "the card of a training")["held_out"][0]
    # Unlikely tokens are cut off: after minutes of training they lead astray, and a cloud takes thousands of draws.
    drawing = ("--top_p=0.9", "--temperature=0.7", f"--max_points={32 if smoke else 8000}")
    begin(6, f"the cloud of {unseen}, whom it never saw, from the portrait")
    script("generate", f"--ar={workdir}/ar", f"--store={workdir}/tokens", f"--subjects={unseen}",
           f"--workdir={workdir}/clouds", *drawing, "--overwrite")  # fmt: skip
    train_painter(workdir, smoke)

    frames, size = (8, 96) if smoke else (FRAMES.value, SIZE.value)
    begin(8, f"the portrait of {unseen} as an avatar")
    person = workdir / "people" / unseen
    script("reconstruct", f"--ar={workdir}/ar", f"--decoder={workdir}/decoder", f"--portrait={person}/portrait.png",
           f"--tracker={person}/portrait_flame_param.npz", f"--workdir={workdir}/avatars", *drawing,
           "--overwrite")  # fmt: skip
    moving = (f"--frames={frames}", f"--size={size}", "--overwrite")
    script("animate", f"--avatar={workdir}/avatars/portrait", f"--output={workdir}/from_portrait.mp4", *moving)

    begin(9, "the fitted person as an avatar")
    show(workdir, model, make_avatar(workdir, subject, model), size)
    script("animate", f"--avatar={workdir}/avatar", f"--output={workdir}/talking.mp4", *moving)
    print(f"\ndone in {time.perf_counter() - start:.0f} s; everything lies in {workdir}/:")
    for name, what in OUTPUTS.items():
        print(f"  {name:<22} {what}")


def begin(number: int, title: str) -> None:
    print(f"\n[{number}/{STEPS}] {title}", flush=True)


def script(name: str, *arguments: str) -> None:
    """Runs one of the project's scripts, as anyone would; ends with its exit code if it fails."""
    if FLAME.value:
        arguments = (*arguments, f"--flame={FLAME.value}")
    print("  " + " ".join(["python -m", f"experiments.{name}", *arguments]), flush=True)
    done = subprocess.run([sys.executable, "-m", f"experiments.{name}", *arguments], stdout=subprocess.PIPE, text=True)
    # Every script ends by listing its files; here the list at the end says it once.
    print(done.stdout.split("\ndone in")[0].rstrip("\n"), flush=True)
    if done.returncode:
        sys.exit(done.returncode)


def make_people(workdir: Path, people: int, smoke: bool) -> None:
    begin(2, f"{people} synthetic people, and captures of them")
    size, timesteps = (48, 4) if smoke else (128, 12)
    pictures = [f"--timesteps={timesteps}", f"--size={size}", f"--portrait_size={112 if smoke else 512}"]
    script("make_identities", f"--workdir={workdir}/people", f"--num_identities={people}", *pictures,
           f"--seed={SEED.value}", "--overwrite")  # fmt: skip


def fit_one(workdir: Path, subject: str, smoke: bool) -> None:
    begin(3, f"Gaussians fitted to the pictures of {subject}")
    fewer = ["--config.fit.iterations=20", "--config.fit.densify_from=5", "--config.fit.densify_interval=5"]
    script("fit", f"--capture={workdir}/people/{subject}", f"--workdir={workdir}/fits", "--overwrite",
           *(fewer if smoke else []))  # fmt: skip


def train_transformer(workdir: Path, smoke: bool) -> None:
    """Stage one."""
    begin(5, "the autoregressive transformer, for some minutes")
    settings = {"data.held_out": 2, "train.steps": 300, "train.eval_every": 100}
    if smoke:
        settings = {"data.held_out": 1, "data.stride": 64, "model.window": 64, "model.layers": 1, "train.steps": 4}
    script("train_ar", f"--store={workdir}/tokens", f"--workdir={workdir}/ar", "--overwrite", *config_flags(settings))


def train_painter(workdir: Path, smoke: bool) -> None:
    """Stage two."""
    begin(7, "the Gaussian decoder, for some minutes")
    script("extract_features", f"--ar={workdir}/ar", f"--store={workdir}/tokens", f"--workdir={workdir}/features",
           "--overwrite")  # fmt: skip
    settings = {"decoder.layers": 1, "decoder.train.steps": 2} if smoke else {"decoder.train.steps": 200}
    script("train_decoder", f"--features={workdir}/features", f"--captures={workdir}/people",
           f"--workdir={workdir}/decoder", f"--downscale={1 if smoke else 2}", "--overwrite",
           *config_flags(settings))  # fmt: skip


def config_flags(settings: dict[str, Any]) -> list[str]:
    return [f"--config.{name}={value}" for name, value in settings.items()]


def make_avatar(workdir: Path, subject: str, model: FlameModel) -> Avatar:
    """The fit, through tokens and back, rigged and written as a bundle."""
    fit = load_fit(workdir / "fits" / subject, model)
    canonical, world = fit.canonical(model, jaw=0.3)
    tokenizer, binding = PointTokenizer(num_faces=model.num_faces), np.asarray(fit.gaussians.binding)
    tokens = tokenizer.encode(world.means, binding)
    error = round_trip_error(tokenizer, np.asarray(world.means), binding, *tokenizer.decode(tokens))
    print(
        f"  {len(tokens)} tokens of a vocabulary of {tokenizer.vocab_size}; read back within {1e3 * error:.3f} mm "
        f"(half a cell is {1e3 * tokenizer.cell.max() / 2:.3f} mm)"
    )
    avatar = Avatar(world, bind_points(model, canonical, world.means, binding))
    shutil.rmtree(workdir / "avatar", ignore_errors=True)
    save_avatar(workdir / "avatar", avatar, provenance={"made_by": "experiments.quickstart", "subject": subject})
    return load_avatar(workdir / "avatar")


def round_trip_error(tokenizer: PointTokenizer, points, binding, decoded, decoded_binding) -> float:
    """Largest distance along an axis, in metres, between points and what their tokens say; checks the bindings."""
    x, y, z = tokenizer.quantize(points).T
    order = np.lexsort((binding, x, z, y))
    if not np.array_equal(binding[order], decoded_binding):
        raise UserError("the tokens changed a binding: this is a defect, please report it.")
    return float(np.abs(points[order] - decoded).max())


def show(workdir: Path, model: FlameModel, avatar: Avatar, size: int) -> None:
    """A sheet of views and expressions of the avatar; bakes one frame."""
    neutral = model.neutral_params()
    poses = {f"{angle}°": (neutral, math.radians(angle)) for angle in (0, 45, 90, 180)}
    poses["jaw"] = (neutral.replace(jaw_pose=jnp.array([0.3, 0.0, 0.0])), 0.3)
    poses["neck"] = (neutral.replace(neck_pose=jnp.array([0.0, 0.6, 0.0])), 0.0)
    for name in ("eye-left-closure", "mouth-corner-puller"):
        if name in model.expr_names:
            poses[name] = (neutral.replace(expr=neutral.expr.at[model.expr_names.index(name)].set(1.0)), 0.3)
    renderer = AvatarRenderer(avatar, model, size, size, background=BACKGROUND)
    sheet = []
    for params, azimuth in poses.values():
        camera = orbit(1, width=size, height=size, distance=1.2, target=(0.0, -0.03, -0.04), azimuth=(azimuth, azimuth))
        sheet.append(renderer(params, camera.viewmats[0], camera.Ks[0]))
    write_image(workdir / "splats.png", contact_sheet(sheet, list(poses), 4))
    save_ply(workdir / "frame.ply", renderer.pose(poses["neck"][0]))


if __name__ == "__main__":
    run(main)
