"""Generates bound point clouds from portraits with a trained autoregressive model (paper §4.1; DESIGN §6).

    python -m experiments.generate --ar=outputs/ar --portrait=me.jpg [--tracker=flame_param.npz]
    python -m experiments.generate --ar=outputs/ar --store=outputs/tokens [--subjects=person_0003,person_0007]

A portrait is any photograph of a head (PNG, JPEG, WebP; with an alpha channel it is set on white); `--tracker` is what
a FLAME tracker found in it. `--store` generates people of a token store from their own conditions, by default those
that the training held out, and shows them beside the truth. `--prefix=500` keeps the first 500 points of the truth and
continues them; `--prefix=tokens.npz` those of a file that this script wrote.

For each cloud <workdir>/<name>/ gets cloud.ply (splats in canonical space, coloured by the part of the head that each
point is bound to; opens in any splat viewer), tokens.npz, card.json and cloud.png.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments.clouds import cloud_gaussians, cloud_sheet, shaded
from experiments.common import open_workdir, run
from experiments.drawing import Person, define_drawing, draw_clouds
from experiments.media import write_image
from experiments.portraits import PortraitFlags
from experiments.trained import Contexts, TrainedAR, load_ar
from pointillist_jax.data.token_store import TokenStore, open_store
from pointillist_jax.files import ArraySpec, UserError, atomic_folder, read_json, read_npz, write_npz
from pointillist_jax.gaussians import save_ply
from pointillist_jax.sampling import Generation

AR = flags.DEFINE_string("ar", None, "Workdir of experiments.train_ar.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint; the newest if not given.", lower_bound=0)
WORKDIR = flags.DEFINE_string("workdir", "outputs/clouds", "Where the clouds go.")
portrait_flags = PortraitFlags()
STORE = flags.DEFINE_string("store", None, "Instead of a portrait: people of this token store.")
SUBJECTS = flags.DEFINE_list("subjects", None, "Which of them; those the training held out if not given.")
FLAME = flags.DEFINE_string("flame", None, "Your FLAME .pkl, if the model was trained with it.")
IMAGE_WEIGHTS = flags.DEFINE_string("image_weights", None, "DINOv2's weights, for models with frozen encoders.")
POINT_WEIGHTS = flags.DEFINE_string("point_weights", None, "Michelangelo's weights, for models with frozen encoders.")
BATCH = flags.DEFINE_integer("batch", 4, "Clouds that grow side by side.", lower_bound=1)
PREFIX = flags.DEFINE_string("prefix", "", "Points to begin with: a number of the truth's, or a tokens.npz.")
RESUME = flags.DEFINE_boolean("resume", False, "Keep the clouds that are in --workdir, make the others.")
OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Delete clouds of these people in --workdir first.")
drawing_flags = define_drawing()

SHEET = "clouds.png"
_SHEET_ROWS = 12


@dataclasses.dataclass(frozen=True)
class Subject:
    """Somebody to generate.

    Attributes:
      person: what is drawn.
      source: of the condition, for the card.
      portrait: [h, w, 3] uint8 to show.
      shape: of the head of the condition.
      truth: tokens of the store, or None.
    """

    person: Person
    source: str
    portrait: np.ndarray
    shape: np.ndarray
    truth: np.ndarray | None = None

    @property
    def name(self) -> str:
        return self.person.name


def main() -> None:
    start = time.perf_counter()
    trained = load_ar(AR.value, STEP.value, FLAME.value)
    store = open_store(STORE.value) if STORE.value else None
    if (portrait_flags.path is None) == (store is None):
        raise UserError("give either --portrait=<a photograph> or --store=<a token store>.")
    portrait_flags.check()
    contexts = Contexts(trained, store, IMAGE_WEIGHTS.value, POINT_WEIGHTS.value)
    subjects = [portrait_subject(trained)] if store is None else store_subjects(trained, store, contexts)
    drawing = drawing_flags(store)
    settings = {**dataclasses.asdict(drawing), "prefix": PREFIX.value}
    workdir = open_workdir(
        WORKDIR.value, [*(s.name for s in subjects), SHEET], resume=RESUME.value, overwrite=OVERWRITE.value
    )
    for rest in workdir.glob(".*.tmp-*"):  # What a killed run was writing.
        shutil.rmtree(rest, ignore_errors=True) if rest.is_dir() else rest.unlink(missing_ok=True)
    todo = [s for s in subjects if not is_done(workdir / s.name, trained, settings)]
    if len(todo) < len(subjects):
        print(f"{len(subjects) - len(todo)} of {len(subjects)} clouds are there already")
    if todo:
        by_name = {s.name: s for s in todo}
        for person, cloud, seconds in draw_clouds(trained, [s.person for s in todo], contexts, drawing, BATCH.value):
            write_cloud(workdir / person.name, by_name[person.name], cloud, trained, settings, seconds)
    finish(trained, subjects, workdir)
    print(f"\ndone in {time.perf_counter() - start:.0f} s; everything lies in {workdir}/:")
    for name, what in OUTPUTS.items():
        print(f"  {name:<22} {what}")


OUTPUTS = {
    "<name>/cloud.ply": "the points as splats, coloured by the part of the head they are bound to",
    "<name>/tokens.npz": "tokens, points, binding",
    "<name>/card.json": "points, points/s, why it stopped, log-probability, settings, checkpoint",
    "<name>/cloud.png": "front, three-quarter and side view, beside the truth where there is one",
    SHEET: "the clouds on one sheet",
}


def portrait_subject(trained: TrainedAR) -> Subject:
    """Who is on --portrait."""
    if SUBJECTS.value:
        raise UserError("--subjects are people of a --store; a --portrait shows one person.")
    portrait = portrait_flags.read(trained.spec, trained.head)
    person = Person(portrait.path.stem, portrait.condition, 0, _prefix(None, trained))
    return Subject(person, str(portrait.path), portrait.image, portrait.condition["flame"]["shape"])


def store_subjects(trained: TrainedAR, store: TokenStore, contexts: Contexts) -> list[Subject]:
    """People of --store: those of --subjects, else those that the training held out."""
    trained.check_store(store)
    subjects = []
    for name in dict.fromkeys(SUBJECTS.value or trained.held_out(store) or store.subjects):
        i = store.index(name)
        condition, truth = contexts.condition(name), np.asarray(store.tokens(i))
        person = Person(name, condition, i, _prefix(truth, trained))
        shown = store.condition(i)
        subjects.append(Subject(person, str(store.path), shown["portrait"], shown["flame"]["shape"], truth))
    return subjects


def _prefix(truth: np.ndarray | None, trained: TrainedAR) -> np.ndarray | None:
    """Tokens S S S S, points of --prefix, if there is one."""
    if not PREFIX.value:
        return None
    if PREFIX.value.isdigit():
        if truth is None:
            raise UserError(f"--prefix={PREFIX.value} counts points of the truth, which only people of a --store have.")
        return truth[: min(4 + 4 * int(PREFIX.value), len(truth) - 4)]
    high = trained.spec.tokenizer.pad
    tokens = read_npz(PREFIX.value, {"tokens": ArraySpec(("T",), "int", low=0, high=high)}, "tokens of this script")
    tokens = tokens["tokens"].astype(np.int32)
    ends = np.flatnonzero(tokens < trained.spec.tokenizer.eos)
    return tokens[: ends[-1] + 1 if len(ends) else 0]


def is_done(folder: Path, trained: TrainedAR, settings: dict[str, Any]) -> bool:
    """Whether a cloud is there; UserError if it was made otherwise."""
    if not (folder / "card.json").is_file():
        return False
    card = read_json(folder / "card.json", "the card of a cloud")
    if card.get("settings") != settings or card.get("checkpoint") != trained.checkpoint:
        raise UserError(f"{folder} was generated with other settings or another checkpoint; give --overwrite.")
    return True


def write_cloud(
    folder: Path, subject: Subject, cloud: Generation, trained: TrainedAR, settings: dict, seconds: float
) -> None:
    """One subject's folder, complete or not at all."""
    num, head = int(cloud.num_points[0]), trained.head
    tokens, points, binding = cloud.tokens[0, : 4 * num + 8], cloud.points[0, :num], cloud.binding[0, :num]
    given = 0 if subject.person.prefix is None else len(subject.person.prefix) // 4 - 1
    card = {
        "name": subject.name,
        "condition": subject.source,
        "points": num,
        "stop_reason": cloud.stop_reason[0],
        "log_prob": round(float(cloud.log_prob[0]), 3),
        "nats_per_point": round(-float(cloud.log_prob[0]) / max(num, 1), 4),
        "masked_mass": float(f"{cloud.masked_mass[0]:.4g}"),
        "seconds": round(seconds, 3),
        "points_per_s": round(num / max(seconds, 1e-9), 2),
        "at_once": BATCH.value,
    }
    if not settings["constrain"]:
        error = trained.spec.tokenizer.first_error(tokens)
        card["grammar"] = "kept" if error is None else f"broken at token {error.position}: {error.rule}"
    if given:
        card["prefix_points"] = given
    rows = [(subject.name, subject.portrait, points, binding)]
    if subject.truth is not None:
        true_points, true_binding = trained.spec.tokenizer.decode(subject.truth)
        card |= {"truth_points": len(true_points), **distances(points, true_points)}
        rows.append(("truth", None, true_points, true_binding))
    card |= {
        "settings": settings,
        "checkpoint": trained.checkpoint,
        "ar": str(trained.workdir),
        "step": trained.model.step,
        "head": {"source": head.source, "sha256": head.sha256},
        "device": jax.devices()[0].device_kind,
    }
    with atomic_folder(folder) as temporary:
        save_ply(temporary / "cloud.ply", cloud_gaussians(points, binding, head))
        write_npz(temporary / "tokens.npz", {"tokens": tokens, "points": points, "binding": binding})
        write_image(temporary / "cloud.png", picture(rows, subject, trained))
        (temporary / "card.json").write_text(json.dumps(card, indent=1) + "\n")


def picture(rows: list[tuple], subject: Subject, trained: TrainedAR, size: int = 256) -> np.ndarray:
    """One row of views per cloud, lit as the head of the condition is."""
    head, jaw = trained.head, trained.spec.canonical_jaw
    lit = [
        (label, portrait, shaded(cloud_gaussians(p, b, head), b, head, subject.shape, jaw))
        for label, portrait, p, b in rows
    ]
    return cloud_sheet(lit, size)


def distances(points: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Mean distance in mm from each point to the nearest one of the other cloud, both ways."""
    from scipy.spatial import cKDTree

    if not len(points) or not len(truth):
        return {}
    there, back = (cKDTree(b).query(a)[0].mean() * 1e3 for a, b in ((points, truth), (truth, points)))
    return {"to_truth_mm": round(float(there), 3), "from_truth_mm": round(float(back), 3)}


def finish(trained: TrainedAR, subjects: list[Subject], workdir: Path) -> None:
    """Prints the table and puts the first clouds on one sheet."""
    import imageio.v3 as iio

    cards = [read_json(workdir / s.name / "card.json", "the card of a cloud") for s in subjects]
    titles = ("points", "truth", "mm to/from truth", "nats/point", "masked", "points/s")
    widths = (8, 8, 20, 12, 10, 10)
    print("\n" + " " * 20 + "".join(f"{t:>{w}}" for t, w in zip(titles, widths, strict=True)) + "  end")
    for card in cards:
        there, back = card.get("to_truth_mm"), card.get("from_truth_mm")
        apart = "-" if there is None else f"{there:.2f} / {back:.2f}"
        print(f"{card['name'][:19]:<20}{card['points']:>8}{card.get('truth_points', '-'):>8}{apart:>20}"
              f"{card['nats_per_point']:>12.2f}{card['masked_mass']:>10.4f}{card['points_per_s']:>10.1f}"
              f"  {card['stop_reason']}")  # fmt: skip
    pictures = [iio.imread(workdir / s.name / "cloud.png") for s in subjects[:_SHEET_ROWS]]
    columns = [pictures[i::2] for i in range(min(2, len(pictures)))]
    heights = max(sum(len(p) for p in column) for column in columns)
    stacked = [np.concatenate(column) for column in columns]
    stacked = [np.pad(c, ((0, heights - len(c)), (0, 0), (0, 0)), constant_values=255) for c in stacked]
    write_image(workdir / SHEET, np.concatenate(stacked, axis=1).astype(np.float32) / 255)


if __name__ == "__main__":
    run(main)
