"""Scores avatars made from one portrait by the paper's protocols, beside guesses (paper §5; DESIGN §11).

    python -m experiments.evaluate --ar=outputs/ar --decoder=outputs/decoder --store=outputs/tokens
       --captures=outputs/people --fits=outputs/fits --workdir=outputs/evaluation [--subjects=person_0003,…]
       [--protocols=self,cross] [--baselines=all|none|mean,nearest,…] [--avatars=<folder of bundles>]
       [--ablations=all|full,ar_only,…]
       [--views=48] [--vgg=… --inception=… --face_landmarker=… --sixdrepnet=… --clip=…] [--resume|--overwrite]

People are those of the store that the AR model was not trained on and that have a capture. Each one's avatar is made
from the portrait and the tracked shape of the store, then driven: by the person's own capture (`self`: compared with
its photographs, all but the portrait) and by the next person's (`cross`: no photograph shows that, so no pixels are
compared). Baselines are made of the training people's fits (`--fits`, what the store was tokenised from). `--avatars`
takes bundles that are there already (`<folder>/<subject>/`, experiments.reconstruct). `--ablations` scores what
`experiments.train_decoder --compare` left in --decoder, variant beside variant: the paper's ablation table.

Writes table.md, results.json, pictures/, and per person scores/ and avatars/, from which --resume goes on.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.common import open_workdir, refuse_flags, run
from experiments.drawing import Drawing, Person, define_drawing, draw_clouds
from experiments.evaluation_report import print_tables, write_report
from experiments.guesses import Guesses
from experiments.scoring import Scorer, Subject
from experiments.trained import Contexts, TrainedAR, load_ar
from experiments.trained_decoder import VARIANTS, TrainedDecoder, load_decoder
from pointillist_jax.convert import load_torch_file, lpips_from_torch
from pointillist_jax.data.captures import Capture, find_captures, load_capture
from pointillist_jax.data.subject_views import TemplateClouds
from pointillist_jax.data.token_store import TokenStore, open_store
from pointillist_jax.evaluation.baselines import BASELINES
from pointillist_jax.evaluation.networks import ClipImages, FaceLandmarks, HeadPose, Inception
from pointillist_jax.evaluation.protocols import PROTOCOLS, all_views, chosen_views, cross_pairs, held_out_views
from pointillist_jax.evaluation.scores import Networks
from pointillist_jax.files import UserError, atomic_path, read_json
from pointillist_jax.flame import FlameParams
from pointillist_jax.gaussians import save_avatar
from pointillist_jax.training.checkpoints import newest_step

AR = flags.DEFINE_string("ar", None, "Workdir of experiments.train_ar.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint of --ar; the newest if not given.", lower_bound=0)
DECODER = flags.DEFINE_string("decoder", None, "Workdir of experiments.train_decoder.")
STORE = flags.DEFINE_string("store", None, "The token store both were trained on.")
CAPTURES = flags.DEFINE_string("captures", None, "Folder of captures of the held-out people.")
FITS = flags.DEFINE_string("fits", None, "Folder of the training people's rigged fits, for baselines.")
ABLATIONS = flags.DEFINE_list("ablations", [], f"With --decoder of train_decoder --compare: all, or some of "
                              f"{', '.join(VARIANTS)}.")  # fmt: skip
AVATARS = flags.DEFINE_string("avatars", None, "Avatar bundles that are there already, <subject>/ each.")
WORKDIR = flags.DEFINE_string("workdir", "outputs/evaluation", "Where tables and pictures go.")
SUBJECTS = flags.DEFINE_list("subjects", None, "Which held-out people; all with a capture if not given.")
PROTOCOL_NAMES = flags.DEFINE_list("protocols", ["self"], f"Of {', '.join(PROTOCOLS)}.")
BASELINE_NAMES = flags.DEFINE_list("baselines", ["all"], f"all, none, or some of {', '.join(BASELINES)}.")
MEAN_OF = flags.DEFINE_integer("mean_of", 24, "Training people in mean_image, by chance; 0 for all.", lower_bound=0)
VIEWS = flags.DEFINE_integer("views", 48, "Views of each person, spread over the capture; 0 for all.", lower_bound=0)
DOWNSCALE = flags.DEFINE_integer("downscale", 1, "Divide the pictures' sides by this.", lower_bound=1)
CY_FROM_BOTTOM = flags.DEFINE_boolean("cy_from_bottom", None, "As experiments.fit.")
FLAME = flags.DEFINE_string("flame", None, "Your FLAME .pkl, if the models were trained with it.")
IMAGE_WEIGHTS = flags.DEFINE_string("image_weights", None, "DINOv2's weights, for models with frozen encoders.")
POINT_WEIGHTS = flags.DEFINE_string("point_weights", None, "Michelangelo's weights, for models with frozen encoders.")
VGG = flags.DEFINE_string("vgg", None, "torchvision's vgg16-397923af.pth, for LPIPS.")
INCEPTION = flags.DEFINE_string("inception", None, "weights-inception-2015-12-05-6726825d.pth, for FID.")
LANDMARKER = flags.DEFINE_string("face_landmarker", None, "MediaPipe's face_landmarker.task, for AKD and APD-MP.")
SIXDREPNET = flags.DEFINE_string("sixdrepnet", None, "6DRepNet_300W_LP_AFLW2000.pth, for APD.")
CLIP = flags.DEFINE_string("clip", None, "Folder of a CLIP model (openai/clip-vit-base-patch32), for the CLIP score.")
SLOTS = flags.DEFINE_integer("batch_size", 8, "Clouds that are drawn side by side.", lower_bound=1)
RESUME = flags.DEFINE_boolean("resume", False, "Go on with what lies in --workdir.")
OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Delete what this script wrote to --workdir first.")
drawing_flags = define_drawing()

OURS = "ours"
OUTPUTS = ("settings.json", "table.md", "results.json", "pictures", "scores", "avatars")


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything that is evaluated, and against what.

    Attributes:
      trained: the AR model.
      decoders: name in tables → decoder; none with --avatars.
      store: people's portraits and shapes.
      captures: of the held-out people that are evaluated.
      training: people that baselines are made of.
      baselines: their names.
    """

    trained: TrainedAR
    decoders: dict[str, TrainedDecoder]
    store: TokenStore
    captures: dict[str, Capture]
    training: tuple[str, ...]
    baselines: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the people that are evaluated."""
        return tuple(self.captures)

    def identity(self, name: str) -> FlameParams:
        """The tracked shape of somebody of the store, in a neutral pose."""
        fields = self.store.identity(self.store.index(name))
        return self.trained.head.neutral_params().replace(**{k: jnp.asarray(v) for k, v in fields.items()})


def main() -> None:
    start = time.perf_counter()
    protocols = chosen(PROTOCOL_NAMES, PROTOCOLS)
    setup = load_setup(protocols)
    networks = load_networks()
    drawing = drawing_flags(setup.store)
    head, jaw = setup.trained.head, setup.trained.spec.canonical_jaw
    guesses = Guesses(
        head,
        setup.store,
        FITS.value,
        setup.training,
        setup.baselines,
        mean_of=MEAN_OF.value,
        seed=drawing.seed,
        jaw=jaw,
    )
    workdir = open_workdir(WORKDIR.value, OUTPUTS, resume=RESUME.value, overwrite=OVERWRITE.value)
    check_settings(workdir / "settings.json", settings(setup, drawing, networks))
    bundles = make_avatars(setup, drawing, workdir)
    subjects = [make_subject(setup, name, bundles, drawing.seed) for name in setup.names]
    drivers = {"self": {name: name for name in setup.names}}
    if "cross" in protocols:
        drivers["cross"] = cross_pairs(setup.names)
    Scorer(head, guesses, networks, workdir).run(subjects, {protocol: drivers[protocol] for protocol in protocols})
    results = write_report(workdir, setup.names, protocols, networks, SUPPLY, guesses.notes)
    print_tables(results)
    print(f"\ndone in {time.perf_counter() - start:.0f} s; everything lies in {workdir}/:")
    print("  table.md       tables of every protocol, with definitions; results.json holds the same numbers")
    print("  pictures/      portrait, photographs, avatar and baselines of every person; overview_self.png of all")
    print("  scores/        every picture's scores; avatars/ the bundles (experiments.animate)")


def chosen(flag: flags.FlagHolder, known: Sequence[str]) -> tuple[str, ...]:
    """Values of a list flag, each known. Raises UserError."""
    if not flag.value or any(value not in known for value in flag.value):
        raise UserError(f"--{flag.name}={','.join(flag.value)}: it must be some of {', '.join(known)}, with commas.")
    return tuple(name for name in known if name in flag.value)


def chosen_baselines() -> tuple[str, ...]:
    """Those of --baselines. Raises UserError."""
    if BASELINE_NAMES.value in (["all"], ["none"]):
        return tuple(BASELINES) if BASELINE_NAMES.value == ["all"] else ()
    return chosen(BASELINE_NAMES, tuple(BASELINES))


def load_setup(protocols: Sequence[str]) -> Setup:
    """Opens everything and says who is evaluated. Raises UserError where things do not belong together."""
    check_flags()
    baselines = chosen_baselines()
    if baselines and FITS.value is None:
        raise UserError("--fits is missing: baselines are made of the training people's fits (or --baselines=none).")
    if not any(BASELINES[name].content == "mean_image" for name in baselines):
        refuse_flags(("mean_of",), "without the baseline mean_image")
    trained, store = load_ar(AR.value, STEP.value, FLAME.value), open_store(STORE.value)
    trained.check_store(store)
    decoders = load_decoders() if DECODER.value is not None else {}
    for decoder in decoders.values():
        decoder.check_ar(trained)
    held_out = trained.held_out(store)
    captures = load_captures(trained, store, held_out)
    if "cross" in protocols:
        cross_pairs(list(captures))
    for name in captures if AVATARS.value is not None else ():
        if not (Path(AVATARS.value) / name / "avatar.json").is_file():
            raise UserError(f"--avatars={AVATARS.value} holds no bundle of {name}: experiments.reconstruct makes them.")
    training = tuple(name for name in store.subjects if name not in held_out)
    return Setup(trained, decoders, store, captures, training, baselines)


def check_flags() -> None:
    """Raises UserError for flags that are missing or would do nothing."""
    for flag, what in ((AR, "the workdir of experiments.train_ar"), (STORE, "the token store it was trained on"),
                       (CAPTURES, "captures of the people it was not trained on")):  # fmt: skip
        if flag.value is None:
            raise UserError(f"--{flag.name} is missing: name {what}.")
    if (AVATARS.value is None) == (DECODER.value is None):
        raise UserError("give either --decoder=<workdir of experiments.train_decoder> or --avatars=<bundles>.")
    if AVATARS.value is not None:
        drawn = [field.name for field in dataclasses.fields(Drawing) if field.name != "seed"]
        unread = [*drawn, "batch_size", "image_weights", "point_weights", "ablations"]
        refuse_flags(unread, "with --avatars, which are made already")


def load_decoders() -> dict[str, TrainedDecoder]:
    """Those of --decoder: the one there, or with --ablations those of its folders."""
    if not ABLATIONS.value:
        return {OURS: load_decoder(DECODER.value, FLAME.value)}
    there = [name for name in VARIANTS if (Path(DECODER.value) / name / "checkpoints").is_dir()]
    if not there:
        raise UserError(
            f"--decoder={DECODER.value} holds none of {', '.join(VARIANTS)}: name the workdir of "
            "experiments.train_decoder --compare=all."
        )
    names = there if ABLATIONS.value == ["all"] else chosen(ABLATIONS, there)
    return {name: load_decoder(str(Path(DECODER.value) / name), FLAME.value, template=True) for name in names}


def load_captures(trained: TrainedAR, store: TokenStore, held_out: Sequence[str]) -> dict[str, Capture]:
    """The captures of who is evaluated: held-out people with a portrait and a capture, or those of --subjects."""
    folders = find_captures(CAPTURES.value)
    wanted = tuple(dict.fromkeys(SUBJECTS.value or [name for name in held_out if name in folders]))
    if not wanted:
        raise UserError(
            f"none of the {len(held_out)} people that {trained.workdir} was not trained on has a capture in "
            f"{CAPTURES.value}: name their captures ({', '.join(held_out[:3])} …)."
        )
    for name in wanted:
        if not store.has_portrait[store.index(name)]:
            raise UserError(f"{name} of {store.path} has no portrait: add it, or choose others with --subjects.")
        if name not in held_out:
            raise UserError(f"--subjects: {trained.workdir} was trained on {name}: evaluate people it has not seen.")
        if name not in folders:
            raise UserError(f"{CAPTURES.value} holds no capture of {name}: add it, or choose others with --subjects.")
    how = {"downscale": DOWNSCALE.value, "identity": "first", "cy_from_bottom": CY_FROM_BOTTOM.value}
    # A share each, so that all people's decoded pictures together stay bounded.
    how["cache_bytes"] = (1 << 30) // len(wanted)
    captures = {name: load_capture(folders[name], trained.head, **how) for name in wanted}
    return {name: dataclasses.replace(capture, subject=name) for name, capture in captures.items()}


# What makes a metric available: field of `Networks` → what to supply.
SUPPLY = {
    "lpips": "torchvision's vgg16-397923af.pth with --vgg",
    "inception": "weights-inception-2015-12-05-6726825d.pth with --inception",
    "landmarks": "face_landmarker.task with --face_landmarker",
    "pose": "6DRepNet_300W_LP_AFLW2000.pth with --sixdrepnet",
    "clip": "a folder of openai/clip-vit-base-patch32 with --clip",
}


def load_networks() -> Networks:
    """The networks whose weights are given."""
    found = {}
    if VGG.value is not None:
        found["lpips"] = lpips_from_torch(load_torch_file(VGG.value))
    for field, flag, kind in (("inception", INCEPTION, Inception), ("landmarks", LANDMARKER, FaceLandmarks),
                              ("pose", SIXDREPNET, HeadPose), ("clip", CLIP, ClipImages)):  # fmt: skip
        if flag.value is not None:
            found[field] = kind(flag.value)
    return Networks(**found)


def settings(setup: Setup, drawing: Drawing, networks: Networks) -> dict[str, Any]:
    """What decides the numbers: a resumed run must have the same."""
    made = {"avatars": str(Path(AVATARS.value).resolve())} if AVATARS.value else dataclasses.asdict(drawing)
    decoders = {name: [str(Path(d.workdir).resolve()), newest_step(d.workdir)] for name, d in setup.decoders.items()}
    return {
        "ar": setup.trained.checkpoint,
        "decoder": decoders,
        "store": str(setup.store.path.resolve()),
        "captures": str(Path(CAPTURES.value).resolve()),
        "made": made,
        "seed": drawing.seed,
        "views": VIEWS.value,
        "downscale": DOWNSCALE.value,
        "baselines": list(setup.baselines),
        "mean_of": MEAN_OF.value,
        "networks": [f.name for f in dataclasses.fields(networks) if getattr(networks, f.name) is not None],
    }


def check_settings(path: Path, mine: dict[str, Any]) -> None:
    """Writes them, or raises UserError if what lies there was made with others."""
    if path.is_file():
        theirs = read_json(path, "the settings of an evaluation")
        if changed := [key for key in mine if json.loads(json.dumps(mine[key])) != theirs.get(key)]:
            raise UserError(f"{path.parent} was made with another {changed[0]}: start anew with --overwrite.")
        return
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(mine, indent=1) + "\n")


def make_avatars(setup: Setup, drawing: Drawing, workdir: Path) -> dict[str, Path]:
    """Name in tables → folder of bundles. Those that are not there yet are made, and written as they end."""
    if AVATARS.value is not None:
        return {OURS: Path(AVATARS.value)}
    trained, store = setup.trained, setup.store
    folders = {method: workdir / "avatars" / method for method in setup.decoders}
    todo = {
        method: [name for name in setup.names if not (folder / name / "avatar.json").is_file()]
        for method, folder in folders.items()
    }
    templates = [method for method, decoder in setup.decoders.items() if decoder.config.points == "flame_vertices"]
    contexts = Contexts(trained, store, IMAGE_WEIGHTS.value, POINT_WEIGHTS.value)

    def decode(method: str, person: Person, points, binding, hidden, **made: Any) -> None:
        decoder = setup.decoders[method]
        canonical = setup.identity(person.name).canonical(trained.spec.canonical_jaw)
        context = contexts.for_decoder(decoder.config, person.condition)
        avatar = decoder.avatar(canonical, points, binding, hidden, context)
        provenance = {"made_by": "experiments.evaluate", "ar": trained.checkpoint, **made}
        save_avatar(folders[method] / person.name, avatar, provenance=provenance)

    for method in templates:
        clouds = TemplateClouds(trained.head, list(setup.captures.values()), trained.spec.canonical_jaw)
        for name in todo.pop(method):
            cloud = clouds.load(name)
            person = Person(name, contexts.condition(name), store.index(name))
            decode(method, person, cloud.points, cloud.binding, None)
    people = [
        Person(name, contexts.condition(name), store.index(name))
        for name in setup.names
        if any(name in names for names in todo.values())
    ]
    if not people:
        return folders
    for person, cloud, seconds in draw_clouds(trained, people, contexts, drawing, SLOTS.value, return_hidden=True):
        num = int(cloud.num_points[0])
        if num == 0:
            raise UserError(f"the model generated no points for {person.name}: train it longer, or try another --seed.")
        points, binding, hidden = (np.asarray(x)[0][:num] for x in (cloud.points, cloud.binding, cloud.hidden))
        for method, names in todo.items():
            if person.name in names:
                decode(method, person, points, binding, hidden, seconds=round(seconds, 2))
    return folders


def make_subject(setup: Setup, name: str, bundles: dict[str, Path], seed: int) -> Subject:
    """Somebody to score, with the views that are shown."""
    condition = setup.store.condition(setup.store.index(name))
    views = held_out_views(all_views(setup.captures[name]), condition)
    if not len(views):
        raise UserError(f"the capture of {name} has no view but the portrait: choose others with --subjects.")
    avatars = {method: folder / name for method, folder in bundles.items()}
    return Subject(name, avatars, setup.identity(name), condition["portrait"], chosen_views(views, VIEWS.value, seed))


if __name__ == "__main__":
    run(main)
