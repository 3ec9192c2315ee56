"""Rigged fits → a token store: what the autoregressive model trains on.

    python -m experiments.tokenize --fits=outputs/people --workdir=outputs/tokens [--captures=outputs/captures]

`--fits` is one fit or a folder of subjects in GaussianAvatars' layout (`<subject>/point_cloud/iteration_<N>/` with
point_cloud.ply and flame_param.npz): ours, or yours as they are. Each subject's Gaussians are placed around its
canonical mesh and written as one token sequence, together with the portrait it is to be generated from: `portrait.png`
with `portrait_flame_param.npz` in the fit's or the capture's folder, else the calmest view of the capture's held-out
frontal camera (`--captures`, one folder per subject), else none.

All subjects are checked first, and those that cannot be used are listed at once. A kill at any moment costs the shard
being written: `--resume` goes on and gives the same bytes. `--append` adds the subjects that the store does not have
yet; shards written before stay as they are. `--overwrite` keeps the old store until the new one is complete, and needs
room for both. Ends with the histogram of lengths.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments.charts import bar_chart
from experiments.common import run, sentence_of
from experiments.config_flags import define_config
from experiments.heads import DETAILS, choose_head
from experiments.media import write_image
from pointillist_jax.configs import DataConfig
from pointillist_jax.data.fits import find_fits, fit_folder
from pointillist_jax.data.subjects import check_subject, find_portrait, subject_record
from pointillist_jax.data.token_store import META, StoreSpec, StoreWriter, TokenStore, open_store
from pointillist_jax.files import UserError, atomic_path, file_sha256, read_json
from pointillist_jax.flame import FlameModel
from pointillist_jax.tokens import PointTokenizer

FITS = flags.DEFINE_string("fits", None, "A fit, or a folder of them (<subject>/…).")
WORKDIR = flags.DEFINE_string("workdir", "outputs/tokens", "The token store.")
CAPTURES = flags.DEFINE_string("captures", None, "Folder of captures (<subject>/…) to take portraits from.")
FLAME = flags.DEFINE_string("flame", None, "Your FLAME .pkl, which the fits are bound to.")
DETAIL = flags.DEFINE_enum("detail", None, DETAILS, "Or the open head; default: what --fits names, or full.")
SUBJECTS = flags.DEFINE_list("subjects", None, "Only these, with commas.")
BOUNDS = flags.DEFINE_list("bounds", None, "Corners of the cube in metres: x,y,z of the lower one, then of the upper.")
OUT_OF_BOUNDS = flags.DEFINE_enum("out_of_bounds", None, ["error", "clip"], "What to do with points outside the cube.")
SEED = flags.DEFINE_integer("seed", 0, "Unused: nothing here is random.", lower_bound=0)
RESUME = flags.DEFINE_boolean("resume", False, "Go on with the store in --workdir, or begin it.")
APPEND = flags.DEFINE_boolean("append", False, "Add subjects to the store in --workdir.")
OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Replace the store in --workdir by a new one.")
config = define_config("data")

NEW = ".tokens.new"  # In --workdir: what is to take its store's place.
_WRITTEN = r"meta\.json|tokens-\d+\.array_record|lengths\.(json|png)|\.(meta|tokens-\d+|lengths)\.tmp-.*"


def main() -> None:
    start = time.perf_counter()
    if FITS.value is None:
        raise UserError("--fits is missing: name a folder of rigged fits.")
    data, fits = with_bounds(config().data), chosen_fits()
    check_captures(list(fits))
    model = choose_head(FLAME.value, DETAIL.value, *cards(fits))
    tokenizer = PointTokenizer(num_faces=model.num_faces, bins=data.bins, lower=data.lower, upper=data.upper)
    kept = {name: getattr(data, name) for name in ("canonical_jaw", "portrait_size", "out_of_bounds", "keep", "space")}
    spec = StoreSpec(tokenizer, model.sha256, model.source, **kept)
    workdir = Path(WORKDIR.value)
    folder = prepare(workdir)
    count, seconds = build(folder, fits, model, spec, data.subjects_per_shard)
    if folder != workdir:
        replace_store(workdir)
    report(open_store(workdir))
    each = f", {seconds / count:.2f} s each" if count else ""
    print(f"  {count} subjects tokenised{each}")
    print(f"done in {time.perf_counter() - start:.0f} s; everything lies in {workdir}/:")
    for name, what in OUTPUTS.items():
        print(f"  {name:<22} {what}")


def with_bounds(data: DataConfig) -> DataConfig:
    """The config with --bounds and --out_of_bounds, the short names of its fields."""
    if OUT_OF_BOUNDS.value:
        data = dataclasses.replace(data, out_of_bounds=OUT_OF_BOUNDS.value)
    if BOUNDS.value is None:
        return data
    try:
        numbers = [float(value) for value in BOUNDS.value]
    except ValueError:
        numbers = []
    if len(numbers) != 6:
        raise UserError(f"--bounds={','.join(BOUNDS.value)} must be six numbers: -0.3,-0.3,-0.34,0.3,0.3,0.26.")
    return dataclasses.replace(data, lower=tuple(numbers[:3]), upper=tuple(numbers[3:]))


def chosen_fits() -> dict[str, Path]:
    fits = find_fits(FITS.value)
    if SUBJECTS.value is None:
        return fits
    if not SUBJECTS.value:
        raise UserError(f"--subjects= chooses nobody: name some of {', '.join(fits)}, or leave it out for all.")
    if missing := [name for name in SUBJECTS.value if name not in fits]:
        raise UserError(f"--subjects: {FITS.value} holds no fit of {missing[0]!r}; it has: {', '.join(fits)}.")
    return {name: fits[name] for name in sorted(set(SUBJECTS.value))}


def cards(fits: dict[str, Path]) -> list[Path]:
    """Files that may name the head of synthetic people and of our own fits. Others' fits have none."""
    captures = [Path(CAPTURES.value)] if CAPTURES.value else []
    folders = [Path(FITS.value), *captures, *fits.values(), *(c / name for c in captures for name in fits)]
    return [folder / name for folder in folders for name in ("identities.json", "report.json", "identity.json")]


def prepare(workdir: Path) -> Path:
    """Checks that the store may be written there, and claims the folder; raises UserError otherwise.

    Returns:
      The folder to build in: `workdir`, or NEW in it while the store there is to be replaced.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file; name a folder.")
    if RESUME.value + APPEND.value + OVERWRITE.value > 1:
        raise UserError("--resume, --append and --overwrite exclude each other; give one.")
    new, there = workdir / NEW, (workdir / META).is_file()
    if APPEND.value and not there:
        raise UserError(f"--append: there is no token store in {workdir}; leave the flag out to make one.")
    if APPEND.value and (new / META).is_file():
        raise UserError(f"{new} holds what an --overwrite was making: finish it with --resume, or delete it.")
    if not (RESUME.value or APPEND.value or OVERWRITE.value) and workdir.exists() and any(workdir.iterdir()):
        raise UserError(
            f"--workdir={workdir} is not empty; give --resume to go on, --append to add subjects or --overwrite to "
            "start anew."
        )
    claim(workdir)
    if APPEND.value or OVERWRITE.value:
        shutil.rmtree(new, ignore_errors=True)
    if OVERWRITE.value and there:
        new.mkdir()
    elif OVERWRITE.value:  # What a killed build left.
        remove_written(workdir)
    if (new / META).is_file() and read_json(new / META, "a token store's meta.json").get("complete") is True:
        replace_store(workdir)  # A kill came in between.
    return new if new.exists() else workdir


def claim(workdir: Path) -> None:
    """Makes the folder, and sees to it that no other process writes there until this one ends, however it ends."""
    workdir.mkdir(parents=True, exist_ok=True)
    lock = os.open(workdir, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"another process is writing to {workdir}; wait for it, or its subjects would be lost."
        ) from None


def replace_store(workdir: Path) -> None:
    """The complete store in NEW takes the place of the one in `workdir`. After a kill, doing it again ends it."""
    new = workdir / NEW
    kept = {shard["file"] for shard in read_json(new / META, "a token store's meta.json")["shards"]} | {META}
    for shard in new.glob("tokens-*.array_record"):
        os.replace(shard, workdir / shard.name)
    remove_written(workdir, kept)
    os.replace(new / META, workdir / META)
    shutil.rmtree(new)


def remove_written(workdir: Path, kept: Collection[str] = ()) -> None:
    """Removes what this script and `encode_conditions` write to a store, but for the files `kept`."""
    for path in workdir.iterdir():
        if re.fullmatch(_WRITTEN, path.name) and path.name not in kept:
            path.unlink()
    shutil.rmtree(workdir / "features", ignore_errors=True)


def build(folder: Path, fits: dict[str, Path], model: FlameModel, spec: StoreSpec, per_shard: int) -> tuple[int, float]:
    """Adds the fits that the store does not have yet, a shard at a time. Returns how many, and the seconds it took.

    Raises:
      UserError: names all subjects that cannot be used. Checks before anything is written; what only whole files tell
        (points outside the cube) ends the writing, but the rest is read, so that the list is complete.
    """
    writer, problems = StoreWriter(folder, spec), {}
    stored = writer.subjects
    places = {name: portrait_folders(name, fit, len(fits) == 1) for name, fit in fits.items()}
    for name, fit in fits.items():
        with noted(problems, name):
            if name not in stored:
                check_subject(fit, model, places[name])
            elif stored[name] != file_sha256(fit_folder(fit) / "point_cloud.ply"):
                raise UserError(
                    f"{folder} holds {name!r} from another fit than {fit}: rename the subject, or make the store anew "
                    "with --overwrite."
                )
    refuse(problems, len(fits))
    todo, start = [name for name in fits if name not in stored], time.perf_counter()
    with tqdm(total=len(fits), initial=len(fits) - len(todo), desc="tokenise", unit="person", disable=not todo) as bar:
        for i in range(0, len(todo), per_shard):
            records = []
            for name in todo[i : i + per_shard]:
                with noted(problems, name), warnings.catch_warnings():
                    # Clipped points are counted for all subjects at the end.
                    warnings.filterwarnings("ignore", message=".*were clipped onto its border")
                    portrait = find_portrait(places[name], model, spec.portrait_size)
                    records.append(subject_record(name, fits[name], model, spec, portrait))
                bar.update()
            if not problems:
                writer.write_shard(records)
    refuse(problems, len(fits))
    writer.finish()
    return len(todo), time.perf_counter() - start


@contextlib.contextmanager
def noted(problems: dict[str, str], name: str) -> Iterator[None]:
    """What is wrong with a subject goes into `problems`."""
    try:
        yield
    except (UserError, OSError) as error:
        problems[name] = sentence_of(error).removeprefix(f"{name}: ")


def refuse(problems: dict[str, str], total: int) -> None:
    """Raises UserError if there are any problems, and lists all."""
    if problems:
        said = [f"  {name}: {problem}".replace("\n", "\n  ") for name, problem in problems.items()]
        first = f"{len(problems)} of {total} subjects cannot be tokenised; mend them, or leave them out (--subjects):"
        raise UserError("\n".join([first, *said]))


def check_captures(names: list[str]) -> None:
    """Raises UserError if --captures cannot hold a portrait of anyone: else it would be left out in silence."""
    if CAPTURES.value is None:
        return
    captures = Path(CAPTURES.value)
    if not captures.is_dir():
        raise UserError(f"--captures={captures} is not a folder.")
    alone = len(names) == 1 and (captures / "transforms_val.json").is_file()
    if not alone and not any((captures / name).is_dir() for name in names):
        raise UserError(
            f"--captures={captures} holds no folder named as a fit ({', '.join(names[:3])}{' …' * (len(names) > 3)}): "
            "name the captures' folders as the fits', or link them."
        )


def portrait_folders(name: str, fit: Path, alone: bool) -> list[Path]:
    """Where a subject's portrait may lie, the fit's own folder first."""
    if CAPTURES.value is None:
        return [fit]
    captures = Path(CAPTURES.value)
    # With a single fit, --captures may be its capture itself.
    return [fit, captures / name, *([captures] if alone else [])]


def report(store: TokenStore) -> None:
    """Writes lengths.json and lengths.png, and says what the store holds."""
    for rest in store.path.glob(".lengths.tmp-*"):  # What a killed run was writing.
        rest.unlink(missing_ok=True)
    lengths, clipped = store.lengths, store.num_clipped
    spread = {
        "min": int(lengths.min()),
        "median": float(np.median(lengths)),
        "mean": round(float(lengths.mean()), 1),
        "max": int(lengths.max()),
        "total": int(lengths.sum()),
    }
    content = {
        "subjects": len(store),
        "tokens": spread,
        "lengths": dict(zip(store.subjects, lengths.tolist(), strict=True)),
    }
    counts, edges = np.histogram(lengths, bins=min(40, max(8, len(store) // 2)))
    content["histogram"] = {"counts": counts.tolist(), "edges": np.round(edges, 1).tolist()}
    with atomic_path(store.path / "lengths.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    title = f"lengths of {len(store)} subjects"
    write_image(store.path / "lengths.png", bar_chart(counts, edges, title, "tokens", "subjects"))

    t = store.tokenizer
    print(f"\n{len(store)} subjects, {spread['total']:,} tokens; vocabulary {t.vocab_size}, {t.bins} bins")
    print(f"  points of a subject: {(spread['min'] - 8) // 4:,} to {(spread['max'] - 8) // 4:,}")
    if clipped.any():
        print(f"  {clipped.sum():,} points of {(clipped > 0).sum()} subjects were clipped onto the cube's border")
    if not store.has_portrait.all():
        without = int((~store.has_portrait).sum())
        print(f"  {without} subjects have no portrait: no model that sees one can use them (--captures --overwrite)")


OUTPUTS = {
    META: "what the store was made with, its shards and subjects",
    "tokens-*.array_record": "tokens, identity and condition, one record per subject",
    "lengths.json": "tokens of every subject, and their histogram",
    "lengths.png": "the histogram",
}


if __name__ == "__main__":
    run(main)
