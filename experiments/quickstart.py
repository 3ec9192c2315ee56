"""The main job, end to end: one portrait → a head of Gaussians that turns and talks.

    python -m experiments.quickstart [--workdir=outputs/quickstart]
    python -m experiments.quickstart --portrait=photo.jpg [--flame=flame_param.npz] [--crop=300,60,520]
    python -m experiments.quickstart --train [--until=fit|transformer] [--flame=flame2023.pkl] [--smoke]

With the weights that the package ships: the portrait of a synthetic person whom they never saw, or a photograph of
yours, becomes points with the faces they are bound to, then Gaussians, then an avatar, a video, a sheet, a splat file,
an avatar bundle and report.html, which shows it all with timings and scores. `--flame` is what a FLAME tracker found in
the photograph.

`--train` trains everything from nothing instead, at the smallest useful scale, each step by a script of its own whose
command is printed: people → fit → tokens → transformer → features → decoder → avatar → evaluation. `--until=fit` ends
with people and one of them fitted, truth beside fit; `--until=transformer` with the cloud it writes. There `--flame`
may be your FLAME .pkl. Needs no GPU, no torch and no files of yours.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments.clouds import cloud_gaussians, render_views, shaded
from experiments.common import refuse_flags, run
from experiments.drawing import Drawing, Person, draw_clouds
from experiments.from_scratch import PARTS, Scale, train_from_scratch
from experiments.heads import choose_head
from experiments.html_report import Section, Table, write_report
from experiments.media import write_image, write_video
from experiments.motions import turn_and_talk
from experiments.pictures import BACKGROUND, contact_sheet
from experiments.portraits import Portrait, read_portrait
from experiments.stages import Stages
from experiments.trained import PRETRAINED, Contexts, load_ar
from experiments.trained_decoder import load_decoder
from pointillist_jax.cameras import orbit
from pointillist_jax.data.captures import load_capture
from pointillist_jax.files import UserError, atomic_path, require_writable
from pointillist_jax.flame import FlameModel
from pointillist_jax.gaussians import Avatar, save_avatar, save_ply
from pointillist_jax.losses import psnr, ssim
from pointillist_jax.playback import AvatarRenderer
from pointillist_jax.pretrained import EXAMPLE

WORKDIR = flags.DEFINE_string("workdir", "outputs/quickstart", "Where to write; files of an earlier run are replaced.")
PORTRAIT = flags.DEFINE_string("portrait", None, "A photograph of a head; a synthetic person if not given.")
CROP = flags.DEFINE_list("crop", None, "Square of --portrait to use: left,top,side in pixels; head and shoulders.")
FLAME = flags.DEFINE_string("flame", None, "What a FLAME tracker found in --portrait; with --train your FLAME .pkl.")
TRAIN = flags.DEFINE_boolean("train", False, "Train everything from nothing, at the smallest useful scale.")
UNTIL = flags.DEFINE_enum("until", PARTS[-1], PARTS, "With --train: the last part to run.")
PEOPLE = flags.DEFINE_integer("people", 8, "With --train: synthetic people.", lower_bound=3, upper_bound=1000)
FRAMES = flags.DEFINE_integer("frames", 96, "Length of the video at 24 frames a second.", lower_bound=2)
SIZE = flags.DEFINE_integer("size", 256, "Side of the video's pictures in pixels.", lower_bound=32, upper_bound=2048)
SEED = flags.DEFINE_integer("seed", 0, "Of the draws; with --train, which people.", lower_bound=0)
SMOKE = flags.DEFINE_boolean("smoke", False, "The smallest setting: few frames, with --train few pictures and steps.")

OUTPUTS = {
    "report.html": "everything on one page: open it in a browser",
    "talking.mp4": "the avatar, turning and talking",
    "sheet.png": "frames of it",
    "cloud.png": "the points that the transformer wrote, coloured by the part of the head they are bound to",
    "avatar/": "the avatar bundle: canonical splats, rig, card; for experiments.animate, export and view",
    "frame.ply": "a frame with the head turned, as a standard splat file: open it in any 3DGS viewer",
}
SCORED = {"views.png": "the avatar beside photographs of the person that the models never saw"}
PLAYER = {"player.html": "the avatar in 3D, in motion: open it in a browser and turn it"}
# How clouds are drawn: unlikely tokens lead astray, and a cloud takes thousands of draws.
# Of a few, the cloud that suits the portrait best is kept.
_DRAWING = {"temperature": 0.9, "top_p": 0.95, "top_k": 0, "constrain": True, "max_points": 5000, "candidates": 3}
# Frames on the sheet, photographs shown, and those of each split of the example that are scored.
_SHEET, _SHOWN, _SCORED = 12, 6, 12


def main() -> None:
    start = time.perf_counter()
    workdir = Path(WORKDIR.value)
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file; name a folder.")
    require_writable(workdir)
    if TRAIN.value:
        refuse_flags(("portrait", "crop"), "with --train, which photographs people of its own")
        model = choose_head(FLAME.value, None if FLAME.value else "coarse")
        scale = Scale(PEOPLE.value, *video_size(), SEED.value, SMOKE.value, FLAME.value, UNTIL.value)
        stages, outputs = Stages(scale.stages), {"report.html": OUTPUTS["report.html"], **scale.outputs}
        sections = train_from_scratch(workdir, model, scale, stages)
        lead = "Everything from nothing, at the smallest useful scale."
    else:
        refuse_flags(("people", "until"), "without --train")
        stages, outputs = Stages(6), dict(OUTPUTS)
        sections = show_pretrained(workdir, stages, outputs)
        lead = "One portrait → points with their faces → Gaussians → an avatar in motion."
    seconds = time.perf_counter() - start
    sections.append(timings(stages, seconds))
    write_report(workdir / "report.html", "Pointillist-JAX quickstart", lead, sections)
    print(f"\ndone in {seconds:.0f} s; everything lies in {workdir}/:")
    for name, what in outputs.items():
        print(f"  {name:<22} {what}")


def video_size() -> tuple[int, int]:
    """(frames, side)."""
    return (8, 96) if SMOKE.value else (FRAMES.value, SIZE.value)


def show_pretrained(workdir: Path, stages: Stages, outputs: dict[str, str]) -> list[Section]:
    """Portrait to avatar with the shipped weights. Adds to `outputs` what it wrote beyond them."""
    example = PORTRAIT.value is None
    with stages.stage("the pretrained models and the portrait"):
        if example:
            refuse_flags(("flame", "crop"), "without --portrait, which it belongs to")
        trained, decoder = load_ar(PRETRAINED), load_decoder(PRETRAINED)
        decoder.check_ar(trained)
        portrait = choose_portrait(trained.spec, trained.head)
        write_image(workdir / "portrait.png", _at_least(np.asarray(portrait.image, np.float32) / 255, 224))
        print(f"  {portrait.path.name}, {len(portrait.image)}² pixels; a head of {trained.head.num_faces} faces")
    with stages.stage("the points, and the face each is bound to"):
        smaller = {"max_points": 256, "candidates": 2} if SMOKE.value else {}
        drawing = Drawing(seed=SEED.value, **_DRAWING | smaller)
        contexts = Contexts(trained)
        people = [Person(portrait.path.stem, portrait.condition, 0)]
        ((_, cloud, _),) = draw_clouds(trained, people, contexts, drawing, drawing.candidates, return_hidden=True)
        num = int(cloud.num_points[0])
        if not num:
            raise UserError("the model wrote no points for this portrait; try another --seed.")
        points, binding = np.asarray(cloud.points[0][:num]), np.asarray(cloud.binding[0][:num])
        canonical = portrait.tracked.canonical(trained.spec.canonical_jaw)
        splats = cloud_gaussians(points, binding, trained.head)
        splats = shaded(splats, binding, trained.head, np.asarray(canonical.shape), trained.spec.canonical_jaw)
        write_image(workdir / "cloud.png", np.concatenate(render_views(splats), axis=1))
    with stages.stage("colours, opacities, scales, rotations, offsets; the rig"):
        context = contexts.for_decoder(decoder.config, portrait.condition)
        avatar = decoder.avatar(canonical, points, binding, cloud.hidden[0][:num], context)
        provenance = {"made_by": "experiments.quickstart", "portrait": portrait.path.name, "ar": trained.checkpoint}
        save_avatar(workdir / "avatar", avatar, provenance=provenance)
        print(f"  {num} Gaussians on {len(np.unique(binding))} faces")
    with stages.stage("the avatar in motion"):
        sheet_and_video(workdir, avatar, trained.head)
    sections = [
        Section("The portrait", figures=[(workdir / "portrait.png", portrait.path.name)], note=likeness(example)),
        Section("Points", [f"{num} points, one after another from the shoulders up, each with the face of the head it "
                           "is bound to."], figures=[(workdir / "cloud.png", "Coloured by the part of the head")]),
        Section("The avatar", figures=[(workdir / "talking.mp4", "Turning and talking"),
                                       (workdir / "sheet.png", "Frames of it")]),
    ]  # fmt: skip
    with stages.stage("scores against photographs"):
        if example:
            sections.append(scores(workdir, avatar, trained.head))
            outputs |= SCORED
        else:
            print("  nothing to compare with: a photograph shows one view (experiments.evaluate scores captures)")
    with stages.stage("the player for browsers"):
        if write_player(workdir / "player.html", avatar, trained.head):
            outputs |= PLAYER
            sections.append(Section("In 3D", links=PLAYER))
    return sections


def choose_portrait(spec, head: FlameModel) -> Portrait:
    """Of --portrait with --flame and --crop, or the example's."""
    if PORTRAIT.value is None:
        return read_portrait(EXAMPLE / "portrait.png", spec, head, EXAMPLE / "portrait_flame_param.npz")
    if FLAME.value and FLAME.value.endswith(".pkl"):
        raise UserError(f"--flame={FLAME.value}: the pretrained weights have a head of their own; give what a tracker "
                        "found in --portrait (a flame_param.npz), or train with your FLAME (--train).")  # fmt: skip
    return read_portrait(Path(PORTRAIT.value), spec, head, FLAME.value, crop=CROP.value, flag="--flame")


def likeness(example: bool) -> str:
    """What may be expected, said before it is seen."""
    if example:
        return ("A synthetic person whom the models never saw. They were trained on a laptop, on a few hundred "
                "synthetic people and few points each: see pointillist_jax/pretrained/README.md.")  # fmt: skip
    return ("These weights have only ever seen synthetic people, so a photograph gets a synthetic likeness: rough "
            "shape and colours at best. For real likenesses train on captures (docs/bring_your_own.md).")  # fmt: skip


def sheet_and_video(workdir: Path, avatar: Avatar, head: FlameModel) -> None:
    """talking.mp4, sheet.png and frame.ply."""
    frames, size = video_size()
    motion = turn_and_talk(head, frames)
    camera = orbit(1, width=size, height=size, distance=0.95, target=(0.0, -0.03, -0.04), azimuth=(0.0, 0.0))
    renderer = AvatarRenderer(avatar, head, size, size, background=BACKGROUND)
    film = list(tqdm(renderer.play(motion, camera), total=frames, desc="frames", unit="frame"))
    write_video(workdir / "talking.mp4", film)
    chosen = np.unique(np.linspace(0, frames - 1, min(_SHEET, frames)).astype(int))
    write_image(workdir / "sheet.png", contact_sheet([film[i] for i in chosen], [f"{i / 24:.1f} s" for i in chosen],
                                                     min(6, len(chosen))))  # fmt: skip
    turned = int(np.argmax(np.abs(np.asarray(motion.neck_pose)[:, 1])))
    save_ply(workdir / "frame.ply", renderer.pose(motion.timestep(turned)))


def scores(workdir: Path, avatar: Avatar, head: FlameModel) -> Section:
    """The avatar against photographs of the example, some of each split: self-reenactment."""
    capture = load_capture(EXAMPLE, head)
    found, pairs = [], []
    for split in ("train", "val", "test"):
        views = capture.split(split)
        if not len(views):
            continue
        width, height = (int(x) for x in views.sizes[0])
        renderer = AvatarRenderer(avatar, head, width, height)
        some = np.unique(np.linspace(0, len(views) - 1, min(_SCORED, len(views))).astype(int))
        for n in tqdm(some.tolist(), desc=f"{split} views", unit="view", leave=False):
            photograph = views.image(n)
            rendered = renderer(capture.params.timestep(int(views.timesteps[n])), views.viewmats[n], views.Ks[n])
            found.append((float(psnr(rendered, photograph)), float(ssim(rendered, photograph))))
            pairs.append((photograph, rendered))
    decibels, similarity = np.mean(found, axis=0)
    print(f"  {len(found)} photographs: PSNR {decibels:.2f} dB, SSIM {similarity:.4f}")
    chosen = np.linspace(0, len(pairs) - 1, min(_SHOWN, len(pairs))).astype(int)
    shown = [_at_least(pairs[i][row], 128) for row in (0, 1) for i in chosen]
    labels = ["photograph"] * len(chosen) + ["avatar"] * len(chosen)
    write_image(workdir / "views.png", contact_sheet(shown, labels, len(chosen)))
    with atomic_path(workdir / "scores.json") as path:
        path.write_text(
            json.dumps({"views": len(found), "psnr": round(decibels, 3), "ssim": round(similarity, 4)}) + "\n"
        )
    table = Table(["photographs", "PSNR, dB", "SSIM"], [[str(len(found)), f"{decibels:.2f}", f"{similarity:.4f}"]])
    text = "The avatar made from the portrait alone, driven by the person's own motion, against photographs."
    return Section("Scores", [text], figures=[(workdir / "views.png", "Photographs above, the avatar below")],
                   tables=[table])  # fmt: skip


def _at_least(image: np.ndarray, side: int) -> np.ndarray:
    """A picture enlarged by a whole number, so that it is that wide."""
    factor = math.ceil(side / image.shape[1])
    return image.repeat(factor, 0).repeat(factor, 1)


def write_player(path: Path, avatar: Avatar, head: FlameModel) -> bool:
    """Whether it was written: viser is optional."""
    from experiments.player import describe
    from experiments.player import write_player as write

    try:
        chosen = write(path, avatar, head, turn_and_talk(head, video_size()[0]))
    except UserError as error:
        print(f"  left out: {error}")
        return False
    print(f"  {describe(chosen)}")
    return True


def timings(stages: Stages, seconds: float) -> Section:
    """What took how long, and where."""
    rows = [[title, f"{spent:.1f}"] for title, spent in stages.seconds.items()] + [["in all", f"{seconds:.1f}"]]
    where = f"Python {platform.python_version()}, {os.cpu_count()} cores, {platform.machine()}."
    return Section("Timings", [where], tables=[Table(["stage", "seconds"], rows)])


if __name__ == "__main__":
    run(main)
