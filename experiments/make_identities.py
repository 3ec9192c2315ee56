"""Makes synthetic people: rigged ground truth, a capture of each from sixteen cameras, portraits and a gallery.

    python -m experiments.make_identities --workdir=outputs/people [--num_identities=24] [--timesteps=20] [--size=128]
        [--detail=coarse|full] [--processes=2] [--num_shards=4 --shard=0] [--resume|--overwrite]

Each `<workdir>/person_0000/` is a capture folder in the GaussianAvatars/VHAP schema (facts/avatars_gsplat.md A.8) with
the truth it was rendered from. A person's folder appears when it is complete; after a kill, `--resume` makes the
missing ones, with the same bytes. `--timesteps=0` makes no captures, only people and their gallery.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments.common import run, submit, worker_pool
from experiments.config_flags import define_config
from experiments.heads import DETAILS, choose_head
from experiments.media import write_image
from pointillist_jax.configs import IdentityConfig
from pointillist_jax.files import UserError, atomic_folder, atomic_path, read_json, write_npz

WORKDIR = flags.DEFINE_string("workdir", "outputs/people", "Where the people go.")
NUM = flags.DEFINE_integer("num_identities", 24, "People.", lower_bound=1, upper_bound=1_000_000)
SEED = flags.DEFINE_integer("seed", 0, "Another seed, other people.", lower_bound=0)
TIMESTEPS = flags.DEFINE_integer("timesteps", 20, "Timesteps of a capture; 0 for none.", lower_bound=0)
SIZE = flags.DEFINE_integer("size", 128, "Side of the capture's images, pixels.", lower_bound=16, upper_bound=4096)
PORTRAIT = flags.DEFINE_integer("portrait_size", 512, "Side of portraits, pixels.", lower_bound=16, upper_bound=4096)
DETAIL = flags.DEFINE_enum("detail", "coarse", DETAILS, "Which open head they have.")
FLAME = flags.DEFINE_string("flame", None, "Your FLAME .pkl instead of the open head.")
PROCESSES = flags.DEFINE_integer("processes", 1, "People made side by side.", lower_bound=1)
NUM_SHARDS = flags.DEFINE_integer("num_shards", 1, "Machines that share the work.", lower_bound=1)
SHARD = flags.DEFINE_integer("shard", 0, "Which of them this is.", lower_bound=0)
RESUME = flags.DEFINE_boolean("resume", False, "Make the people that are missing in --workdir.")
OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Delete the people in --workdir first.")
CONFIG = define_config("identities")

GALLERY = 24
# Degrees towards the subject's left: front, three-quarter, side, back.
VIEWS, VIEW_SIZE = (0.0, 40.0, 90.0, 180.0), 256


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that decides the bytes of a person's folder."""

    seed: int
    timesteps: int
    size: int
    portrait_size: int
    detail: str
    flame: str | None
    config: IdentityConfig


def main() -> None:
    start = time.perf_counter()
    workdir = Path(WORKDIR.value)
    if SHARD.value >= NUM_SHARDS.value:
        raise UserError(f"--shard={SHARD.value} must be less than --num_shards={NUM_SHARDS.value}.")
    if TIMESTEPS.value == 1:
        raise UserError("--timesteps=1 leaves nothing to test on; give 0 for no captures, or at least 2.")
    if OVERWRITE.value and NUM_SHARDS.value > 1:
        raise UserError("--overwrite in one shard would delete the people of the others; empty --workdir first.")
    job = Job(SEED.value, TIMESTEPS.value, SIZE.value, PORTRAIT.value, DETAIL.value, FLAME.value, CONFIG().identities)
    head = describe_head(job)
    prepare(workdir, {**dataclasses.asdict(job), "head": head})
    subjects = [f"person_{i:04d}" for i in range(NUM.value)]
    mine = subjects[SHARD.value :: NUM_SHARDS.value]
    missing = [s for s in mine if not (workdir / s / "identity.json").is_file()]
    for subject in missing:  # What a killed run left half done.
        for rest in workdir.glob(f".{subject}.tmp-*"):
            shutil.rmtree(rest, ignore_errors=True)
    make_all(workdir, missing, job)

    done = [s for s in subjects if (workdir / s / "identity.json").is_file()]
    if len(done) < len(subjects):
        print(f"{len(done)} of {len(subjects)} people are made; identities.json follows with the last shard.")
        return
    finish(workdir, subjects, head)
    print(f"\ndone in {time.perf_counter() - start:.0f} s; everything lies in {workdir}/:")
    print(
        "  person_0000/ …     capture folder (images, masks, FLAME parameters, transforms), portrait.png, identity.json"
    )
    print("  person_0000/truth  the Gaussians it was rendered from, as a GaussianAvatars fit")
    print("  identities.json    the head, the subjects and their numbers of Gaussians")
    print("  gallery.png        what they look like")


def prepare(workdir: Path, settings: dict[str, Any]) -> None:
    """Creates the folder or checks that it may be continued; raises UserError otherwise.

    Shards of one job share the folder, so the later ones find it in use.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file; name a folder.")
    if RESUME.value and OVERWRITE.value:
        raise UserError("--resume and --overwrite exclude each other; give one.")
    card = workdir / "settings.json"
    # A card that another shard is just writing still has its temporary name.
    if workdir.exists() and any(not path.name.startswith(".settings.tmp-") for path in workdir.iterdir()):
        if OVERWRITE.value:
            _remove_people(workdir)
        elif not RESUME.value and not (NUM_SHARDS.value > 1 and card.is_file()):
            raise UserError(
                f"--workdir={workdir} is not empty; give --resume to go on in it or --overwrite to start anew."
            )
    workdir.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(settings))
    if card.is_file():
        old = read_json(card, "the settings of make_identities")
        for key in settings:
            if old.get(key) != settings[key]:
                raise UserError(
                    f"{card}: {key} was {old.get(key)!r}, now it is {settings[key]!r}; give the same flags as before, "
                    "another --workdir, or --overwrite."
                )
    else:
        with atomic_path(card) as temporary:
            temporary.write_text(json.dumps(settings, indent=1) + "\n")


def _remove_people(workdir: Path) -> None:
    """Only what this script makes: a mistyped --workdir must not cost anything else."""
    for path in workdir.iterdir():
        if re.fullmatch(r"\.?person_\d{4,}(\.tmp-.*)?", path.name):
            shutil.rmtree(path)
        elif path.name in ("settings.json", "identities.json", "gallery.png"):
            path.unlink()


def describe_head(job: Job) -> dict[str, Any]:
    model = _model(job)
    return {"source": model.source, "sha256": model.sha256, "faces": model.num_faces, "vertices": model.num_vertices}


def make_all(workdir: Path, subjects: list[str], job: Job) -> None:
    """Makes the people, one at a time or in processes of their own."""
    bar = tqdm(total=len(subjects), desc="people", unit="person", disable=not subjects)
    if PROCESSES.value == 1 or len(subjects) < 2:
        for subject in subjects:
            make_person(str(workdir), subject, job)
            bar.update()
    else:
        with worker_pool(min(PROCESSES.value, len(subjects))) as pool:
            try:
                for made in [submit(pool, make_person, str(workdir), subject, job) for subject in subjects]:
                    made.result()
                    bar.update()
            except BrokenProcessPool:
                raise UserError(
                    "a worker process was killed, probably for lack of memory; go on with --resume and fewer "
                    "--processes."
                ) from None
    bar.close()


@functools.lru_cache(maxsize=1)
def _studio(job: Job) -> tuple:
    """What a process keeps between people: the head, its anatomy, and the renderer with its compiled programs."""
    from pointillist_jax.data.capture_writer import FrameRenderer
    from pointillist_jax.data.identities import study

    model = _model(job)
    return model, study(model), FrameRenderer(model)


def make_person(workdir: str, subject: str, job: Job) -> None:
    """Writes one person's folder, complete or not at all."""
    from pointillist_jax.cameras import orbit
    from pointillist_jax.data.capture_writer import capture_rig, write_capture
    from pointillist_jax.data.fits import save_fit
    from pointillist_jax.data.identities import HAIR_STYLES, portrait_params, random_motion, sample_identity
    from pointillist_jax.flame.param_files import save_flame_params

    model, anatomy, render = _studio(job)
    number = int(subject.split("_")[1])
    seed = int(np.random.SeedSequence([job.seed, number]).generate_state(1)[0])
    # Every six people wear all six hair styles, so that small populations are varied too.
    block, place = divmod(number, len(HAIR_STYLES))
    style = np.random.default_rng([job.seed, block, 6]).permutation(HAIR_STYLES)[place]
    person = sample_identity(model, seed, job.config, anatomy=anatomy, hair_style=str(style))
    rng = np.random.default_rng([seed, 100])
    portrait = portrait_params(model, person.params.shape, rng)
    motion = random_motion(model, person.params.shape, max(job.timesteps, 1), rng)

    with atomic_folder(Path(workdir) / subject) as folder:
        if job.timesteps:
            cameras = capture_rig(job.size, anatomy.unit)
            write_capture(folder, model, person.gaussians, motion, person.canonical, cameras, render)
        save_fit(folder / "truth", person.gaussians, motion, model)
        flagged = {f"face_{name}": faces for name, faces in person.face_flags.items()}
        write_npz(folder / "truth/labels.npz", {"parts": person.parts, **flagged})
        around = {
            "distance": 1.1,
            "target": (0.0, -0.02, -0.03),
            "fov_x": anatomy.unit * np.radians(20.5),
            "elevation": 0.04,
        }
        four = [orbit(1, width=VIEW_SIZE, height=VIEW_SIZE, azimuth=(a, a), **around) for a in np.radians(VIEWS)]
        camera = four[0].replace(
            viewmats=np.concatenate([c.viewmats for c in four]), Ks=np.concatenate([c.Ks for c in four])
        )
        write_image(folder / "views.png", np.concatenate(render(person.gaussians, portrait, camera)[0], axis=1))
        camera = orbit(1, width=job.portrait_size, height=job.portrait_size, azimuth=(0.0, 0.0), **around)
        write_image(folder / "portrait.png", render(person.gaussians, portrait, camera)[0][0])
        save_flame_params(folder / "portrait_flame_param.npz", portrait, model)
        card = {
            "subject": subject,
            "seed": seed,
            "num_gaussians": person.gaussians.num_gaussians,
            "counts": person.counts(),
            "part_names": list(person.part_names),
            "traits": dataclasses.asdict(person.traits),
            "head": {"source": model.source, "sha256": model.sha256},
            "portrait_camera": {
                "viewmat": np.asarray(camera.viewmats[0], np.float64).tolist(),
                "K": np.asarray(camera.Ks[0], np.float64).tolist(),
            },
        }
        (folder / "identity.json").write_text(json.dumps(card, indent=1) + "\n")


def finish(workdir: Path, subjects: list[str], head: dict[str, Any]) -> None:
    """identities.json and gallery.png from the people's own files; removes what killed runs were writing."""
    import imageio.v3 as iio

    from experiments.pictures import contact_sheet

    for rest in (p for name in ("settings", "identities", "gallery") for p in workdir.glob(f".{name}.tmp-*")):
        rest.unlink(missing_ok=True)
    cards = [read_json(workdir / s / "identity.json", "an identity") for s in subjects]
    people = {
        c["subject"]: {
            "num_gaussians": c["num_gaussians"],
            "hair_style": c["traits"]["hair_style"],
            "beard": c["traits"]["beard"],
        }
        for c in cards
    }
    with atomic_path(workdir / "identities.json") as temporary:
        temporary.write_text(json.dumps({"head": head, "subjects": people}, indent=1) + "\n")
    images, labels = [], []
    for card in cards[:GALLERY]:
        views = np.asarray(iio.imread(workdir / card["subject"] / "views.png"), np.float32) / 255
        side = views.shape[0]
        images += [views[:, i * side : (i + 1) * side] for i in range(3)]  # From the front, three quarters, the side.
        traits = card["traits"]
        number = f"{card['num_gaussians']:,} Gaussians"
        labels += [f"{card['subject'][7:]} {traits['hair_style']}", f"beard: {traits['beard']}", number]
    write_image(workdir / "gallery.png", contact_sheet(images, labels, min(9, len(images))))


def _model(job: Job):
    return choose_head(job.flame, None if job.flame else job.detail)


if __name__ == "__main__":
    run(main)
