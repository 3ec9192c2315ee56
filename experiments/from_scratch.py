"""The whole pipeline at the smallest useful scale: people → fit → tokens → transformer → clouds → features → decoder →
avatars → evaluation. What `experiments.quickstart --train` runs; every stage is a script of its own.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from experiments.html_report import Section
from experiments.media import write_image
from experiments.pictures import BACKGROUND, contact_sheet, head_sheet
from experiments.stages import Stages, config_flags, run_script
from pointillist_jax.cameras import orbit
from pointillist_jax.data.fits import load_fit
from pointillist_jax.files import UserError, read_json
from pointillist_jax.flame import FlameModel, bind_points, open_head
from pointillist_jax.gaussians import Avatar, load_avatar, save_avatar, save_ply
from pointillist_jax.playback import AvatarRenderer
from pointillist_jax.tokens import PointTokenizer

# Part → what it writes. A run may end after any of them.
OUTPUTS = {
    "fit": {
        "head.png": "what the head can do: identities, expressions, jaw, eyes, neck",
        "people/gallery.png": "the synthetic people; the folders beside it are capture folders with their truth",
        "fits/": "one of them fitted from its pictures; report.png in it shows truth beside fit",
        "splats.png": "the fitted person as an avatar: views and expressions",
        "talking.mp4": "the same, turning and talking",
        "frame.ply": "it with its head turned as a standard splat file: open it in any 3DGS viewer",
        "avatar/": "the fitted person's bundle: canonical splats, rig, card",
    },
    "transformer": {
        "tokens/": "everyone as a token sequence, with the portrait and head it is to be generated from",
        "ar/": "the transformer after some minutes: curve.png, card.json, checkpoints",
        "clouds/clouds.png": "the cloud it writes for somebody it never saw, beside the truth",
    },
    "avatar": {
        "decoder/": "the Gaussian decoder: curve.png, card.json, strips/ (renders above photographs), checkpoints",
        "from_portrait.mp4": "portrait to avatar, turning and talking; avatars/portrait/ is the bundle",
        "evaluation/": "held-out people's avatars against their photographs, beside two guesses",
    },
}
PARTS = tuple(OUTPUTS)
_STAGES = {"fit": 4, "transformer": 3, "avatar": 3}
_SUBJECT = "person_0001"


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large the run is.

    Attributes:
      people: synthetic people. frames, size: of the videos. seed: which people.
      smoke: the smallest setting: few small pictures, few steps.
      flame: the user's FLAME .pkl, or None for the open head.
      until: the last of `PARTS` to run.
    """

    people: int
    frames: int
    size: int
    seed: int
    smoke: bool
    flame: str | None
    until: str = PARTS[-1]

    @property
    def parts(self) -> tuple[str, ...]:
        return PARTS[: PARTS.index(self.until) + 1]

    @property
    def stages(self) -> int:
        return sum(_STAGES[part] for part in self.parts)

    @property
    def outputs(self) -> dict[str, str]:
        return {name: what for part in self.parts for name, what in OUTPUTS[part].items()}


def train_from_scratch(workdir: Path, model: FlameModel, scale: Scale, stages: Stages) -> list[Section]:
    """Runs all parts; returns what the report shows."""
    run = {"fit": _fit, "transformer": _transformer, "avatar": _avatar}
    return [section for part in scale.parts for section in run[part](workdir, model, scale, stages)]


def _fit(workdir: Path, model: FlameModel, scale: Scale, stages: Stages) -> list[Section]:
    smoke = scale.smoke
    with stages.stage(f"head: {model.source}, {model.num_vertices} vertices, {model.num_faces} faces"):
        full = model if scale.flame or smoke else open_head("full")
        write_image(workdir / "head.png", head_sheet(full, None if full is model else model, size=96 if smoke else 192))
    people = 3 if smoke else scale.people
    with stages.stage(f"{people} synthetic people, and captures of them"):
        size, timesteps = (48, 4) if smoke else (128, 8)
        pictures = [f"--timesteps={timesteps}", f"--size={size}", f"--portrait_size={112 if smoke else 512}"]
        _script(scale, "make_identities", f"--workdir={workdir}/people", f"--num_identities={people}", *pictures,
                f"--seed={scale.seed}", "--overwrite")  # fmt: skip
    with stages.stage(f"Gaussians fitted to the pictures of {_SUBJECT}"):
        fewer = ["--config.fit.iterations=20", "--config.fit.densify_from=5", "--config.fit.densify_interval=5"]
        _script(scale, "fit", f"--capture={workdir}/people/{_SUBJECT}", f"--workdir={workdir}/fits", "--overwrite",
                *(fewer if smoke else []))  # fmt: skip
    with stages.stage("the fitted person as an avatar"):
        _show(workdir, model, _fitted_avatar(workdir, model), scale.size)
        _script(scale, "animate", f"--avatar={workdir}/avatar", f"--output={workdir}/talking.mp4", *_moving(scale))
    return [
        _section(workdir, "People", {"people/gallery.png": "Synthetic people and their numbers of Gaussians"}),
        _section(workdir, "A fit", {f"fits/{_SUBJECT}/report.png": "Truth (photographs) beside fit"}),
        _section(workdir, "The fitted person", {"talking.mp4": "Turning and talking",
                                                "splats.png": "Views and expressions"}),
    ]  # fmt: skip


def _transformer(workdir: Path, model: FlameModel, scale: Scale, stages: Stages) -> list[Section]:
    with stages.stage("everyone as tokens"):
        _script(scale, "tokenize", f"--fits={workdir}/people", f"--workdir={workdir}/tokens", "--overwrite")
    with stages.stage("the autoregressive transformer, for some minutes"):
        settings = {"data.held_out": 2, "train.steps": 200, "train.eval_every": 100}
        if scale.smoke:
            settings = {"data.held_out": 1, "data.stride": 64, "model.window": 64, "model.layers": 1, "train.steps": 4}
        _script(scale, "train_ar", f"--store={workdir}/tokens", f"--workdir={workdir}/ar", "--overwrite",
                *config_flags(settings))  # fmt: skip
    unseen = _unseen(workdir)
    with stages.stage(f"the cloud of {unseen}, whom it never saw, from the portrait"):
        _script(scale, "generate", f"--ar={workdir}/ar", f"--store={workdir}/tokens", f"--subjects={unseen}",
                f"--workdir={workdir}/clouds", *_drawing(scale), "--overwrite")  # fmt: skip
    figures = {
        "ar/curve.png": "Loss of the transformer, nats per token",
        "clouds/clouds.png": f"The cloud it wrote for {unseen}, and the truth",
    }
    return [_section(workdir, "Stage one", figures)]


def _avatar(workdir: Path, model: FlameModel, scale: Scale, stages: Stages) -> list[Section]:
    with stages.stage("the Gaussian decoder, for some minutes"):
        _script(scale, "extract_features", f"--ar={workdir}/ar", f"--store={workdir}/tokens",
                f"--workdir={workdir}/features", "--overwrite")  # fmt: skip
        settings = {"decoder.layers": 1, "decoder.train.steps": 2} if scale.smoke else {"decoder.train.steps": 160}
        _script(scale, "train_decoder", f"--features={workdir}/features", f"--captures={workdir}/people",
                f"--workdir={workdir}/decoder", f"--downscale={1 if scale.smoke else 2}", "--overwrite",
                *config_flags(settings))  # fmt: skip
    unseen = _unseen(workdir)
    with stages.stage(f"the portrait of {unseen} as an avatar"):
        person = workdir / "people" / unseen
        _script(scale, "reconstruct", f"--ar={workdir}/ar", f"--decoder={workdir}/decoder",
                f"--portrait={person}/portrait.png", f"--tracker={person}/portrait_flame_param.npz",
                f"--workdir={workdir}/avatars", *_drawing(scale), "--overwrite")  # fmt: skip
        _script(scale, "animate", f"--avatar={workdir}/avatars/portrait", f"--output={workdir}/from_portrait.mp4",
                *_moving(scale))  # fmt: skip
    with stages.stage("held-out people against their photographs"):
        _script(scale, "evaluate", f"--ar={workdir}/ar", f"--decoder={workdir}/decoder", f"--store={workdir}/tokens",
                f"--captures={workdir}/people", f"--fits={workdir}/people", "--protocols=self", *_drawing(scale),
                f"--workdir={workdir}/evaluation", "--overwrite")  # fmt: skip
    note = "Minutes of training on a handful of people show that everything works, not how good the method is."
    return [
        _section(workdir, "Stage two", {"decoder/curve.png": "PSNR of the decoder's renders"}),
        _section(workdir, "Portrait to avatar", {"from_portrait.mp4": unseen}, note),
        Section("Evaluation", links={"evaluation/table.md": "tables of all scores"}),
    ]


def _script(scale: Scale, name: str, *arguments: str) -> None:
    run_script(name, *arguments, *([f"--flame={scale.flame}"] if scale.flame else []))


def _unseen(workdir: Path) -> str:
    """A person whom the transformer never saw."""
    return read_json(workdir / "ar" / "card.json", "the card of a training")["held_out"][0]


def _drawing(scale: Scale) -> tuple[str, ...]:
    # Unlikely tokens are cut off: after minutes of training they lead astray, and a cloud takes thousands of draws.
    return "--top_p=0.9", "--temperature=0.7", f"--max_points={32 if scale.smoke else 8000}"


def _moving(scale: Scale) -> tuple[str, ...]:
    return f"--frames={scale.frames}", f"--size={scale.size}", "--overwrite"


def _section(workdir: Path, title: str, figures: dict[str, str], note: str = "") -> Section:
    return Section(title, note=note, figures=[(workdir / name, caption) for name, caption in figures.items()])


def _fitted_avatar(workdir: Path, model: FlameModel) -> Avatar:
    """The fit, through tokens and back, rigged and written as a bundle."""
    fit = load_fit(workdir / "fits" / _SUBJECT, model)
    canonical, world = fit.canonical(model, jaw=0.3)
    tokenizer, binding = PointTokenizer(num_faces=model.num_faces), np.asarray(fit.gaussians.binding)
    tokens = tokenizer.encode(world.means, binding)
    error = _round_trip_error(tokenizer, np.asarray(world.means), binding, *tokenizer.decode(tokens))
    print(
        f"  {len(tokens)} tokens of a vocabulary of {tokenizer.vocab_size}; read back within {1e3 * error:.3f} mm "
        f"(half a cell is {1e3 * tokenizer.cell.max() / 2:.3f} mm)"
    )
    avatar = Avatar(world, bind_points(model, canonical, world.means, binding))
    shutil.rmtree(workdir / "avatar", ignore_errors=True)
    save_avatar(workdir / "avatar", avatar, provenance={"made_by": "experiments.quickstart", "subject": _SUBJECT})
    return load_avatar(workdir / "avatar")


def _round_trip_error(tokenizer: PointTokenizer, points, binding, decoded, decoded_binding) -> float:
    """Largest distance along an axis, in metres, between points and what their tokens say; checks the bindings."""
    x, y, z = tokenizer.quantize(points).T
    order = np.lexsort((binding, x, z, y))
    if not np.array_equal(binding[order], decoded_binding):
        raise UserError("the tokens changed a binding: this is a defect, please report it.")
    return float(np.abs(points[order] - decoded).max())


def _show(workdir: Path, model: FlameModel, avatar: Avatar, size: int) -> None:
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
