"""Fits rigged Gaussians to captures: people of `experiments.make_identities`, or your NeRSemble/VHAP exports.

    python -m experiments.fit --capture=outputs/people --workdir=outputs/fits [--subjects=person_0000,person_0001]
        [--config=tiny|small|paper] [--config.fit.<field>=<value>] [--processes=2] [--num_shards=4 --shard=0]
        [--downscale=2] [--seed=0] [--compare_density] [--resume|--overwrite]

`--capture` is one capture folder or a folder of many. Of each subject, `<workdir>/<subject>/` gets GaussianAvatars'
`point_cloud/iteration_<N>/{point_cloud.ply,flame_param.npz}`, report.json (PSNR and SSIM of every training, held-out
camera and held-out expression view, counts over time and by part of the head), report.png (truth beside fit) and
timing.json. After a kill, `--resume` continues with the last checkpoint and ends with the same bytes.
Several captures are all checked before the first is fitted. `--compare_density` fits every subject twice, without
density control into `<workdir>/without_density/`, where `experiments.tokenize` does not look; `<workdir>/<subject>/`
gets comparison.json (both runs' scores, the gain, Gaussians by part of the head) and comparison.png besides.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments.common import manager, run, submit, worker_pool
from experiments.config_flags import define_config
from experiments.fit_report import comparison, comparison_sheet, print_comparisons, print_table, sheet
from experiments.heads import DETAILS, choose_head
from experiments.media import write_image
from pointillist_jax.configs import FitConfig
from pointillist_jax.files import ArraySpec, UserError, atomic_path, file_sha256, read_json, read_npz
from pointillist_jax.flame import FlameModel

CAPTURE = flags.DEFINE_string("capture", None, "A capture folder, or a folder of capture folders.")
WORKDIR = flags.DEFINE_string("workdir", "outputs/fits", "Where the fits go.")
SUBJECTS = flags.DEFINE_list("subjects", None, "Only these subjects of --capture.")
FLAME = flags.DEFINE_string("flame", None, "Your FLAME .pkl, for captures tracked with FLAME.")
DETAIL = flags.DEFINE_enum("detail", None, DETAILS, "Open head of the captures; if not given, as their card says.")
DOWNSCALE = flags.DEFINE_integer("downscale", 1, "Divides the size of the images.", lower_bound=1)
IDENTITY = flags.DEFINE_enum(
    "identity", "check", ["check", "first"], "Shape and offset of all timesteps: one, or the first's (UNION sets)."
)
CY_FROM_BOTTOM = flags.DEFINE_boolean("cy_from_bottom", None, "cy counts from the lower border, as VHAP exports it.")
SEED = flags.DEFINE_integer("seed", 0, "Of the order of views and the places of split Gaussians.", lower_bound=0)
COMPARE = flags.DEFINE_boolean("compare_density", False, "Fit with and without density control and compare.")
PROCESSES = flags.DEFINE_integer("processes", 1, "Subjects fitted side by side.", lower_bound=1)
NUM_SHARDS = flags.DEFINE_integer("num_shards", 1, "Machines that share the subjects.", lower_bound=1)
SHARD = flags.DEFINE_integer("shard", 0, "Which of them this is.", lower_bound=0)
RESUME = flags.DEFINE_boolean("resume", False, "Continue the fits in --workdir.")
OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Delete the fits of these subjects in --workdir first.")
CONFIG = define_config("fit")

_LOST = (EOFError, ConnectionError)  # What a queue raises whose process was killed.
_LABELS = "truth/labels.npz"  # Of a synthetic person.
_FIXED = "without_density"  # The folder of fits without density control.

# The same file for every subject.
_head = functools.lru_cache(maxsize=2)(choose_head)


@dataclasses.dataclass(frozen=True)
class Job:
    """One subject. Picklable, for worker processes."""

    capture: str
    folder: str
    name: str
    config: FitConfig
    flame: str | None
    detail: str | None
    downscale: int
    identity: str
    cy_from_bottom: bool | None


def main() -> None:
    start = time.perf_counter()
    jobs = list_jobs()
    if not jobs:
        print(f"nothing to do: there are fewer subjects than shards, and --shard={SHARD.value} has none.")
        return
    prepare(jobs)
    waiting = [job for job in jobs if OVERWRITE.value or not is_done(job)]
    if len(waiting) < len(jobs):
        print(f"{len(jobs) - len(waiting)} of {len(jobs)} fits are done already")
    unusable = check_captures(waiting)
    failed = [(job.name, unusable[job.capture]) for job in waiting if job.capture in unusable]
    waiting = [job for job in waiting if job.capture not in unusable]
    if OVERWRITE.value:  # Last: a fit that another cannot take the place of stays.
        for folder in (Path(job.folder) for job in waiting):
            if folder.exists():
                shutil.rmtree(folder)
    failed += fit_all(waiting)

    done = [job for job in jobs if is_done(job) and not (OVERWRITE.value and job.capture in unusable)]
    for job in done:  # What a kill after the report left.
        remove_rests(Path(job.folder))
        (Path(job.folder) / "checkpoint.npz").unlink(missing_ok=True)
    comparisons, unusable = compare_all(done)
    failed += unusable
    if done:
        print_table({job.name: read_report(job) for job in done})
        if comparisons:
            print_comparisons(comparisons)
        print(f"\ndone in {time.perf_counter() - start:.0f} s; everything lies in {Path(WORKDIR.value)}/:")
        print("  <subject>/point_cloud/iteration_<N>/  the fit: for GaussianAvatars' viewer and experiments.tokenize")
        print("  <subject>/report.json, report.png     scores, counts by part of the head, truth beside fit")
        if comparisons:
            print("  <subject>/comparison.json, .png       both runs' scores and counts, held-out views of both")
    if failed:
        raise UserError("\n".join(["some subjects could not be fitted:", *(f"  {n}: {e}" for n, e in failed)]))


def list_jobs() -> list[Job]:
    """The fits of this shard. Raises UserError for flags that do not go together."""
    from pointillist_jax.data.captures import find_captures

    if CAPTURE.value is None:
        raise UserError("--capture is missing; name a capture folder, such as one made by experiments.make_identities.")
    if SHARD.value >= NUM_SHARDS.value:
        raise UserError(f"--shard={SHARD.value} must be less than --num_shards={NUM_SHARDS.value}.")
    if RESUME.value and OVERWRITE.value:
        raise UserError("--resume and --overwrite exclude each other; give one.")
    captures = find_captures(CAPTURE.value)
    if SUBJECTS.value:
        if missing := [name for name in SUBJECTS.value if name not in captures]:
            raise UserError(f"{CAPTURE.value} has no subject {missing[0]!r}; it has: {', '.join(list(captures)[:20])}.")
        captures = {name: captures[name] for name in SUBJECTS.value}
    config = dataclasses.replace(CONFIG().fit, seed=SEED.value)
    variants = {"": config}
    if COMPARE.value:
        variants = {"": dataclasses.replace(config, densify=True), _FIXED: dataclasses.replace(config, densify=False)}
    jobs = [
        Job(
            capture=str(folder),
            folder=str(Path(WORKDIR.value) / variant / name),
            name=f"{name} {variant}".rstrip(),
            config=settings,
            flame=FLAME.value,
            detail=DETAIL.value,
            downscale=DOWNSCALE.value,
            identity=IDENTITY.value,
            cy_from_bottom=CY_FROM_BOTTOM.value,
        )
        for name, folder in list(captures.items())[SHARD.value :: NUM_SHARDS.value]
        for variant, settings in variants.items()
    ]
    return jobs


def prepare(jobs: list[Job]) -> None:
    """Raises UserError for a workdir with fits of these subjects, unless told what to do with them."""
    workdir = Path(WORKDIR.value)
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file; name a folder.")
    for job in jobs:
        folder = Path(job.folder)
        if not folder.exists():
            continue
        if not folder.is_dir() or not all(_is_ours(path.name) for path in folder.iterdir()):
            raise UserError(f"{folder} holds something that is no fit; choose another --workdir.")
        if OVERWRITE.value:
            continue
        if any(folder.iterdir()) and not RESUME.value:
            raise UserError(f"{folder} is not empty; give --resume to continue it or --overwrite to start anew.")
        if is_done(job):
            done = read_report(job)
            if not _same_head(done, job):
                raise UserError(
                    f"{folder} was fitted with another head than {head_of(job).source}; name that one by --flame or "
                    "--detail, another --workdir, or --overwrite."
                )
            if any(done.get(key) != value for key, value in settings_of(job).items()):
                raise UserError(
                    f"{folder} was fitted with other settings; give the same, another --workdir, or --overwrite."
                )
            if done.get("capture_sha256") != capture_sha256(Path(job.capture)):
                raise UserError(
                    f"{folder} was fitted to another capture than {job.capture}; name that one, another --workdir, or "
                    "--overwrite."
                )


def settings_of(job: Job) -> dict[str, Any]:
    """What decides a fit besides its capture and its head."""
    settings = {"downscale": job.downscale, "identity": job.identity, "cy_from_bottom": bool(job.cy_from_bottom)}
    return {**settings, "config": dataclasses.asdict(job.config)}


def _same_head(done: dict[str, Any], job: Job) -> bool:
    named, model = done.get("head"), head_of(job)
    # Both open heads lie in one file; a user's file may have been renamed.
    keys = ("sha256",) if job.flame else ("sha256", "source")
    return isinstance(named, dict) and all(named.get(key) == getattr(model, key) for key in keys)


def capture_sha256(capture: Path) -> str:
    """Of the files that say who was photographed, from where and how tracked, and of the pictures' names and sizes.

    The sizes stand for the contents: what is done already should not cost reading every picture again.
    """
    from pointillist_jax.cameras import load_transforms

    read = [capture / "canonical_flame_param.npz", capture / _LABELS]
    tracked, pictures = set(), set()
    for split in ("train", "val", "test"):
        read.append(capture / f"transforms_{split}.json")
        with contextlib.suppress(UserError, FileNotFoundError):  # No such split, or no views in it.
            for frame in load_transforms(read[-1], cy_from_bottom=False, problems=[]):  # Only paths are read.
                tracked.add(frame.flame_param_path)
                pictures |= {frame.image_path, frame.mask_path}
    digest = hashlib.sha256()
    for path in (*read, *sorted(tracked - {None})):
        if path.is_file():
            digest.update(f"{path.name}:{file_sha256(path)};".encode())
    for path in sorted(pictures - {None}):
        digest.update(f"{path.name}:{path.stat().st_size if path.is_file() else None};".encode())
    return digest.hexdigest()


def _is_ours(name: str) -> bool:
    return name.startswith(".") or name in (
        "point_cloud", "report.json", "report.png", "timing.json", "checkpoint.npz", "comparison.json",
        "comparison.png",
    )  # fmt: skip


def is_done(job: Job) -> bool:
    return (Path(job.folder) / "report.json").is_file()


def remove_rests(folder: Path) -> None:
    """Deletes what a killed run was writing."""
    for rest in sorted(folder.rglob(".*.tmp-*")):
        shutil.rmtree(rest, ignore_errors=True) if rest.is_dir() else rest.unlink(missing_ok=True)


def check_captures(jobs: list[Job]) -> dict[str, str]:
    """Of several captures those that cannot be fitted, and why, said before hours go into the first.

    They are read again when their turn comes, which is little beside a fit; a lone one is checked only then, unless
    --overwrite is about to delete its fit.
    """
    from pointillist_jax.fitting.fit import require_fittable

    captures = {job.capture: job for job in jobs}
    if len(captures) < 2 and not (OVERWRITE.value and any(Path(job.folder).exists() for job in jobs)):
        return {}
    unusable = {}
    with tqdm(captures.items(), desc="checking captures", unit="capture", leave=False) as bar:
        for capture, job in bar:
            try:
                require_fittable(*load_data(job), job.config)
            except (UserError, FileNotFoundError) as error:
                unusable[capture] = str(error)
    if unusable:
        print("\n".join(["not fitted:", *unusable.values()]), file=sys.stderr)
    return unusable


def fit_all(jobs: list[Job]) -> list[tuple[str, str]]:
    """Fits every job; returns (name, what was wrong) of those that could not be."""
    if PROCESSES.value == 1 or len(jobs) < 2:
        said = {}
        for job in jobs:
            bar = tqdm(total=job.config.iterations, desc=job.name, unit="it")
            said[job.name] = fit_job(job, _Progress(bar))
            bar.close()
        return [(name, sentence) for name, sentence in said.items() if sentence]
    # Workers send their progress to the one bar that all share.
    bar = tqdm(total=sum(job.config.iterations for job in jobs), desc=f"{len(jobs)} fits", unit="it")
    try:
        with manager() as shared, worker_pool(PROCESSES.value) as pool:
            news = shared.Queue()
            futures = {submit(pool, fit_job, job, _Messages(job.name, news)): job for job in jobs}
            at = dict.fromkeys((job.name for job in jobs), 0)
            waiting = set(futures)
            while waiting:
                _, waiting = wait(waiting, timeout=0.5)
                while not news.empty():
                    name, iteration, figures = news.get()
                    at[name] = iteration
                    bar.set_postfix_str(f"{name} {_said(figures)}", refresh=False)
                bar.update(sum(at.values()) - bar.n)
            bar.close()
            return [(job.name, said) for future, job in futures.items() if (said := future.result())]
    except (BrokenProcessPool, *_LOST):
        raise UserError(
            "a worker process was killed, probably for lack of memory; go on with --resume and fewer --processes."
        ) from None


class _Progress:
    """Shows a fit on a bar."""

    def __init__(self, bar: tqdm):
        self._bar = bar

    def __call__(self, iteration: int, figures: dict[str, Any]) -> None:
        if self._bar.n == 0:  # What was done before a resume took no time now.
            self._bar.initial = self._bar.n = iteration - 1
        self._bar.set_postfix_str(_said(figures), refresh=False)
        self._bar.update(iteration - self._bar.n)


class _Messages:
    """Sends every tenth iteration of a fit to the process that holds the bar."""

    def __init__(self, name: str, queue: Any):
        self._name, self._queue = name, queue

    def __call__(self, iteration: int, figures: dict[str, Any]) -> None:
        if iteration % 10 == 0:
            with contextlib.suppress(*_LOST):  # The process that holds the bar tells of it.
                self._queue.put((self._name, iteration, figures))


def _said(figures: dict[str, Any]) -> str:
    return f"{figures['train_psnr']:.1f} dB, {figures['gaussians']} Gaussians"


def fit_job(job: Job, progress: Callable[[int, dict[str, Any]], None]) -> str | None:
    """Fits one subject and writes its folder; returns a sentence if the user has to mend something."""
    try:
        _fit_job(job, progress)
    except (UserError, FileNotFoundError) as error:
        return str(error)
    return None


def head_of(job: Job) -> FlameModel:
    cards = () if job.flame else (Path(job.capture) / "identity.json",)
    return _head(job.flame, job.detail, *cards)


def load_data(job: Job) -> tuple:
    """The checked capture as FitData, and the head it was tracked with."""
    from pointillist_jax.data.captures import load_capture
    from pointillist_jax.fitting import FitData

    model = head_of(job)
    how = {"downscale": job.downscale, "identity": job.identity, "cy_from_bottom": job.cy_from_bottom}
    capture = load_capture(job.capture, model, **how)
    return FitData.from_capture(capture, face_groups(Path(job.capture), model.num_faces)), model


def _fit_job(job: Job, progress: Callable[[int, dict[str, Any]], None]) -> None:
    from pointillist_jax.data.fits import save_fit
    from pointillist_jax.fitting import evaluate, fit
    from pointillist_jax.fitting.evaluate import count_by_part

    data, model = load_data(job)
    folder, config = Path(job.folder), job.config
    folder.mkdir(parents=True, exist_ok=True)
    remove_rests(folder)
    checkpoint = folder / "checkpoint.npz"

    start = time.perf_counter()
    result = fit(data, model, config, checkpoint=checkpoint, progress=progress)
    fitted = time.perf_counter() - start
    save_fit(folder / f"point_cloud/iteration_{config.iterations}", result.gaussians, result.params, model)

    look = {"sh_degree": config.sh_degree, "background": config.background, "capacity": result.capacity}
    views = sum(len(split) for split in data.splits.values())
    with tqdm(total=views, desc=f"{job.name}: scoring", unit="view", leave=False, disable=views < 1000) as bar:
        scores = evaluate(result.state, result.scene, data, **look, progress=bar.update)
    write_image(folder / "report.png", sheet(result, data, scores, look))
    write_json(folder / "timing.json", {"fit_s": round(fitted, 1), "total_s": round(time.perf_counter() - start, 1)})
    report = {
        "subject": data.subject,
        "iterations": config.iterations,
        **settings_of(job),
        "capture_sha256": capture_sha256(Path(job.capture)),
        "gaussians": result.gaussians.num_gaussians,
        "scores": {name: {k: v for k, v in split.items() if k != "per_view"} for name, split in scores.items()},
        "parts": count_by_part(result.state, data, model),
        "history": result.history,
        "views": {name: split["per_view"] for name, split in scores.items()},
        "head": {"source": model.source, "sha256": model.sha256},
    }
    # Last, because a folder with a report is a finished one.
    write_json(folder / "report.json", report)
    checkpoint.unlink(missing_ok=True)


def face_groups(capture: Path, num_faces: int) -> dict[str, np.ndarray]:
    """Of a synthetic person: the faces that grow hair and beard, and bare cheeks. Others have none."""
    labels = capture / _LABELS
    if not labels.is_file():
        return {}
    specs = {f"face_{n}": ArraySpec((num_faces,), "bool", optional=True) for n in ("hair", "beard", "cheek")}
    flags_of = read_npz(labels, specs, "the labels of a synthetic person")
    return {name.removeprefix("face_"): np.flatnonzero(value) for name, value in flags_of.items()}


def write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(as_json(content))


def as_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def read_report(job: Job) -> dict[str, Any]:
    return read_json(Path(job.folder) / "report.json", "a fit's report")


def compare_all(jobs: list[Job]) -> tuple[dict[str, dict[str, Any]], list[tuple[str, str]]]:
    """Writes the comparisons of finished fits with those without density control, unless they are there already.

    Returns:
      subject → comparison.json, and (name, what was wrong) of those that could not be compared.
    """
    from pointillist_jax.data.fits import load_fit

    by_name = {job.name: job for job in jobs}
    pairs = [(job, by_name[other]) for job in jobs if (other := f"{job.name} {_FIXED}") in by_name]
    contents, failed = {}, []
    for dense, fixed in tqdm(pairs, desc="comparing", unit="subject", leave=False, disable=len(pairs) < 2):
        folder, reports = Path(dense.folder), [read_report(dense), read_report(fixed)]
        content = comparison(*reports)
        # Pictures may differ where scores do not.
        content["reports_sha256"] = [file_sha256(Path(job.folder) / "report.json") for job in (dense, fixed)]
        card, picture = folder / "comparison.json", folder / "comparison.png"
        if not (picture.is_file() and card.is_file() and card.read_bytes() == as_json(content)):
            try:
                data, model = load_data(dense)
                fits = [load_fit(job.folder, model) for job in (dense, fixed)]
            except (UserError, FileNotFoundError) as error:
                failed.append((dense.name, str(error)))
                continue
            write_image(picture, comparison_sheet(data, model, fits, reports))
            write_json(card, content)  # Last: then both are there.
        contents[dense.name] = content
    return contents, failed


if __name__ == "__main__":
    run(main)
