"""Scores avatars made from one portrait by the paper's protocols, beside guesses (paper §5; DESIGN §11).

    python -m experiments.evaluate --ar=outputs/ar --decoder=outputs/decoder --store=outputs/tokens
       --captures=outputs/people --fits=outputs/fits --workdir=outputs/evaluation [--subjects=person_0003,…]
       [--protocols=self,cross] [--baselines=all|none|mean,nearest,…] [--avatars=<folder of bundles>]
       [--views=48] [--vgg=… --inception=… --face_landmarker=… --sixdrepnet=… --clip=…] [--resume|--overwrite]

People are those of the store that the AR model was not trained on and that have a capture. Each one's avatar is made
from the portrait and the tracked shape of the store, then driven: by the person's own capture (`self`: compared with
its photographs, all but the portrait) and by the next person's (`cross`: no photograph shows that, so no pixels are
compared). Baselines are made of the training people's fits (`--fits`, what the store was tokenised from). `--avatars`
takes bundles that are there already (`<folder>/<subject>/`, experiments.reconstruct).

Writes table.md, results.json, pictures/, and per person scores/ and avatars/, from which --resume goes on.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from experiments.common import open_workdir, refuse_flags, run
from experiments.drawing import Drawing, Person, define_drawing, draw_clouds
from experiments.evaluation_report import azimuths, print_tables, write_pictures, write_report
from experiments.guesses import Guesses
from experiments.trained import Contexts, TrainedAR, load_ar
from experiments.trained_decoder import TrainedDecoder, load_decoder
from pointillist_jax.convert import load_torch_file, lpips_from_torch
from pointillist_jax.data.captures import Capture, find_captures, load_capture
from pointillist_jax.data.token_store import TokenStore, open_store
from pointillist_jax.evaluation.baselines import BASELINES
from pointillist_jax.evaluation.networks import ClipImages, FaceLandmarks, HeadPose, Inception
from pointillist_jax.evaluation.protocols import (
    PROTOCOLS,
    Views,
    all_views,
    chosen_views,
    cross_pairs,
    held_out_views,
)
from pointillist_jax.evaluation.scores import Networks, Seen, compare, look
from pointillist_jax.files import UserError, atomic_path, read_json, write_npz
from pointillist_jax.flame import FlameParams
from pointillist_jax.gaussians import Avatar, load_avatar, save_avatar
from pointillist_jax.playback import AvatarRenderer

AR = flags.DEFINE_string("ar", None, "Workdir of experiments.train_ar.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint of --ar; the newest if not given.", lower_bound=0)
DECODER = flags.DEFINE_string("decoder", None, "Workdir of experiments.train_decoder.")
STORE = flags.DEFINE_string("store", None, "The token store both were trained on.")
CAPTURES = flags.DEFINE_string("captures", None, "Folder of captures of the held-out people.")
FITS = flags.DEFINE_string("fits", None, "Folder of the training people's rigged fits, for baselines.")
AVATARS = flags.DEFINE_string("avatars", None, "Avatar bundles that are there already, <subject>/ each.")
WORKDIR = flags.DEFINE_string("workdir", "outputs/evaluation", "Where tables and pictures go.")
SUBJECTS = flags.DEFINE_list("subjects", None, "Which held-out people; all with a capture if not given.")
PROTOCOL_NAMES = flags.DEFINE_list("protocols", ["self"], f"Of {', '.join(PROTOCOLS)}.")
BASELINE_NAMES = flags.DEFINE_list("baselines", ["all"], f"all, none, or some of {', '.join(BASELINES)}.")
MEAN_OF = flags.DEFINE_integer("mean_of", 24, "Training people in mean_image, by chance; 0 for all.", lower_bound=0)
VIEWS = flags.DEFINE_integer("views", 48, "Views of each person, spread over the capture; 0 for all.", lower_bound=0)
DOWNSCALE = flags.DEFINE_integer("downscale", 1, "Divide the pictures' sides by this.", lower_bound=1)
CY_FROM_BOTTOM = flags.DEFINE_boolean("cy_from_bottom", False, "As experiments.fit.")
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
# Pictures that are rendered and scored at once: what bounds memory.
_AT_ONCE = 16


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything that is evaluated, and against what.

    Attributes:
      trained: the AR model. decoder: None with --avatars.
      store: people's portraits and shapes.
      captures: of the held-out people that are evaluated.
      training: people that baselines are made of.
      baselines: their names.
    """

    trained: TrainedAR
    decoder: TrainedDecoder | None
    store: TokenStore
    captures: dict[str, Capture]
    training: tuple[str, ...]
    baselines: tuple[str, ...]

    @property
    def subjects(self) -> tuple[str, ...]:
        return tuple(self.captures)

    def identity(self, name: str) -> FlameParams:
        """The tracked shape of somebody of the store, in a neutral pose."""
        fields = self.store.identity(self.store.index(name))
        return self.trained.head.neutral_params().replace(**{k: jnp.asarray(v) for k, v in fields.items()})

    def portrait(self, name: str) -> np.ndarray:
        """uint8 [side, side, 3]."""
        return self.store.condition(self.store.index(name))["portrait"]


def main() -> None:
    start = time.perf_counter()
    protocols = chosen(PROTOCOL_NAMES, PROTOCOLS)
    setup = load_setup(protocols)
    networks = load_networks()
    drawing = drawing_flags(setup.store)
    workdir = open_workdir(WORKDIR.value, OUTPUTS, resume=RESUME.value, overwrite=OVERWRITE.value)
    check_settings(workdir / "settings.json", settings(setup, drawing, networks))
    avatars = make_avatars(setup, drawing, workdir)
    guesses = Guesses(
        setup.trained.head, setup.store, FITS.value, setup.training, setup.baselines,
        mean_of=MEAN_OF.value, seed=drawing.seed, jaw=setup.trained.spec.canonical_jaw,
    )  # fmt: skip
    score_everyone(setup, avatars, guesses, networks, protocols, workdir, drawing.seed)
    results = write_report(workdir, setup.subjects, protocols, networks, SUPPLY, guesses.notes)
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
    for flag, what in ((AR, "the workdir of experiments.train_ar"), (STORE, "the token store it was trained on"),
                       (CAPTURES, "captures of the people it was not trained on")):  # fmt: skip
        if flag.value is None:
            raise UserError(f"--{flag.name} is missing: name {what}.")
    if (AVATARS.value is None) == (DECODER.value is None):
        raise UserError("give either --decoder=<workdir of experiments.train_decoder> or --avatars=<bundles>.")
    if AVATARS.value is not None:
        drawn = [field.name for field in dataclasses.fields(Drawing) if field.name != "seed"]
        refuse_flags(
            [*drawn, "batch_size", "image_weights", "point_weights"], "with --avatars, which are there already"
        )
    baselines = chosen_baselines()
    if baselines and FITS.value is None:
        raise UserError("--fits is missing: baselines are made of the training people's fits (or --baselines=none).")
    if not any(BASELINES[name].content == "mean_image" for name in baselines):
        refuse_flags(("mean_of",), "without the baseline mean_image")
    trained, store = load_ar(AR.value, STEP.value, FLAME.value), open_store(STORE.value)
    trained.check_store(store)
    decoder = None
    if DECODER.value is not None:
        decoder = load_decoder(DECODER.value, FLAME.value)
        decoder.check_ar(trained)
    held_out = trained.held_out(store)
    captures = load_captures(trained, store, held_out)
    if "cross" in protocols:
        cross_pairs(list(captures))
    training = tuple(name for name in store.subjects if name not in held_out)
    return Setup(trained, decoder, store, captures, training, baselines)


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
    return {
        name: dataclasses.replace(load_capture(folders[name], trained.head, **how), subject=name) for name in wanted
    }


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
    return {
        "ar": setup.trained.checkpoint,
        "decoder": None if setup.decoder is None else str(Path(setup.decoder.workdir).resolve()),
        "store": str(setup.store.path.resolve()),
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
    """Subject → bundle. Those that are not there yet are made, and written as they end."""
    folder = Path(AVATARS.value or workdir / "avatars" / OURS)
    bundles = {name: folder / name for name in setup.subjects}
    todo = [name for name, bundle in bundles.items() if not (bundle / "avatar.json").is_file()]
    if AVATARS.value is not None:
        if todo:
            raise UserError(f"--avatars={folder} holds no bundle of {todo[0]}: make it with experiments.reconstruct.")
        return bundles
    if not todo:
        return bundles
    trained, decoder, store = setup.trained, setup.decoder, setup.store
    contexts = Contexts(trained, store, IMAGE_WEIGHTS.value, POINT_WEIGHTS.value)
    people = [Person(name, contexts.condition(name), store.index(name)) for name in todo]
    for person, cloud, seconds in draw_clouds(trained, people, contexts, drawing, SLOTS.value, return_hidden=True):
        num = int(cloud.num_points[0])
        if num == 0:
            raise UserError(f"the model generated no points for {person.name}: train it longer, or try another --seed.")
        avatar = decoder.avatar(
            setup.identity(person.name).canonical(trained.spec.canonical_jaw),
            np.asarray(cloud.points)[0][:num],
            np.asarray(cloud.binding)[0][:num],
            np.asarray(cloud.hidden)[0][:num],
            contexts.for_decoder(decoder.config, person.condition),
        )
        provenance = {"made_by": "experiments.evaluate", "ar": trained.checkpoint, "seconds": round(seconds, 2)}
        save_avatar(bundles[person.name], avatar, provenance=provenance)
    return bundles


def score_everyone(
    setup: Setup,
    avatars: dict[str, Path],
    guesses: Guesses,
    networks: Networks,
    protocols: Sequence[str],
    workdir: Path,
    seed: int,
) -> None:
    """Renders and scores who is not scored yet, a person at a time."""
    portraits = {name: setup.store.condition(setup.store.index(name)) for name in setup.subjects}
    views = {
        name: chosen_views(held_out_views(all_views(capture), portraits[name]), VIEWS.value, seed)
        for name, capture in setup.captures.items()
    }
    drivers = {"self": {name: name for name in setup.subjects}}
    if "cross" in protocols:
        drivers["cross"] = cross_pairs(setup.subjects)
    todo = [(p, n) for p in protocols for n in setup.subjects if not (workdir / "scores" / p / f"{n}.json").is_file()]
    methods = 1 + len(setup.baselines)
    total = sum(len(views[drivers[p][name]]) for p, name in todo) * methods
    renderers: dict[tuple[int, int], AvatarRenderer] = {}
    with tqdm(total=total, desc="score", unit="picture") as bar:
        for protocol, name in todo:
            driver = drivers[protocol][name]
            avatar = load_avatar(avatars[name])
            size = views[driver].size
            if size not in renderers:
                renderers[size] = AvatarRenderer(avatar, setup.trained.head, *size)
            bar.set_postfix_str(f"{name}, {protocol}", refresh=False)
            found = score_person(setup, name, avatar, views[driver], renderers[size], guesses, networks, protocol, bar)
            write_scores(workdir, protocol, name, driver, views[driver], found, setup.portrait(name))


class Found(NamedTuple):
    """Of one person. scores: method → metric → a value for each view, None where there is no face; features: method or
    "truth" → Inception's [N, D], if there is Inception; shown: method or "truth" → a few pictures [V, H, W, 3]."""

    scores: dict[str, dict[str, list]]
    features: dict[str, np.ndarray]
    shown: dict[str, np.ndarray]


def score_person(
    setup: Setup,
    name: str,
    avatar: Avatar,
    views: Views,
    renderer: AvatarRenderer,
    guesses: Guesses,
    networks: Networks,
    protocol: str,
    bar: tqdm,
) -> Found:
    """Scores of every method on one person's views."""
    portrait = setup.portrait(name)
    embedding = None if networks.clip is None else np.asarray(networks.clip(portrait[None]))[0]
    methods = {OURS: renderer.with_person(avatar).frames}
    methods |= guesses.of(setup.identity(name), portrait, renderer)
    scores: dict[str, dict[str, list]] = {method: {} for method in methods}
    features: dict[str, list[np.ndarray]] = {}
    shown: dict[str, list[np.ndarray]] = {}
    show = set(shown_views(views))
    for first in range(0, len(views), _AT_ONCE):
        group = views.subset(range(first, min(first + _AT_ONCE, len(views))))
        keep = [i for i in range(len(group)) if first + i in show]
        # The last group is filled up, so that one program scores all.
        filled = group.subset(np.minimum(np.arange(_AT_ONCE), len(group) - 1)) if first else group
        truth = look(filled.photographs(), networks)
        seen = {"truth": truth}
        params, viewmats, Ks = filled.params, filled.viewmats, filled.Ks
        for method, render in methods.items():
            seen[method] = look(render(params, viewmats, Ks), networks)
            found = compare(seen[method], truth, networks, portrait=embedding, pixels=protocol == "self")
            for metric, values in found.items():
                rounded = [None if np.isnan(v) else round(float(v), 6) for v in values[: len(group)]]
                scores[method].setdefault(metric, []).extend(rounded)
            bar.update(len(group))
        for method, one in seen.items():
            collect(one, len(group), keep, method, features, shown)
    return Found(
        scores,
        {method: np.concatenate(rows) for method, rows in features.items()},
        {method: np.stack(rows) for method, rows in shown.items()},
    )


def collect(seen: Seen, num: int, keep: Sequence[int], method: str, features: dict, shown: dict) -> None:
    """Adds what is kept of a group's pictures: features of all, pictures of a few."""
    if seen.features is not None:
        features.setdefault(method, []).append(seen.features[:num])
    shown.setdefault(method, []).extend(seen.pictures[i] for i in keep)


def shown_views(views: Views, columns: int = 6) -> list[int]:
    """A few of the views for a sheet: cameras from one side to the other."""
    order = np.argsort(azimuths(views), kind="stable")
    return sorted(set(order[np.linspace(0, len(order) - 1, min(columns, len(order))).astype(int)].tolist()))


def write_scores(workdir: Path, protocol: str, name: str, driver: str, views: Views, found: Found, portrait) -> None:
    """A person's arrays, sheet and scores. The scores come last: they say that the rest is there."""
    rows = shown_views(views)
    few = views.subset(rows)
    arrays = {f"features_{method}": np.float32(values) for method, values in found.features.items()}
    arrays |= {f"shown_{m}": np.uint8(np.round(255 * np.clip(x, 0, 1))) for m, x in found.shown.items()}
    arrays |= {"shown_portrait": portrait, "frontal": np.array(np.argmin(np.abs(azimuths(few))))}
    write_npz(workdir / "scores" / protocol / f"{name}.npz", arrays)
    labels = {
        method: [f"{row['psnr'][i]:.1f} dB" if "psnr" in row else "" for i in rows]
        for method, row in found.scores.items()
    }
    write_pictures(workdir, protocol, name, driver, few, {**found.shown, "portrait": portrait}, labels)
    card = {"subject": name, "driver": driver, "size": list(views.size), "views": views.describe()}
    with atomic_path(workdir / "scores" / protocol / f"{name}.json") as temporary:
        temporary.write_text(json.dumps({**card, "scores": found.scores}) + "\n")


if __name__ == "__main__":
    run(main)
