"""`experiments.fit` as a user starts it: outputs, refusals, and the same bytes after SIGKILL."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from pointillist_jax.data.fits import find_fits, load_fit
from pointillist_jax.flame import load_flame
from pointillist_jax.flame.model import save_flame
from tests.experiments.forked import Ended, Forks
from tests.experiments.killed_fit import STAGES
from tests.fitting.scenes import write_person

KILLED = "tests.experiments.killed_fit"
SEED: int | None = None  # Of the moments of kills; the number that a failure prints repeats it.
FAST = {
    "iterations": 30, "densify_from": 4, "densify_interval": 5, "densify_grad": 1e-5, "max_points": 50,
    "save_interval": 3, "log_interval": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Two captures of a ball, and its head as a file."""
    root = tmp_path_factory.mktemp("people")
    for seed in range(2):
        model = write_person(root / "captures" / f"ball_{seed}", seed)
    save_flame(root / "ball.npz", model)
    return root


def start(forks: Forks, people: Path, workdir: Path, *arguments: str, script: str = "fit") -> Ended:
    config = [f"--config.fit.{key}={value}" for key, value in FAST.items()]
    given = (f"--capture={people / 'captures'}", f"--workdir={workdir}", f"--flame={people / 'ball.npz'}", *config)
    return forks.run(script, *given, *arguments)


def finished(*arguments, **how) -> Ended:
    ended = start(*arguments, **how)
    assert ended.code == 0, ended.err[-3000:]
    return ended


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the clock's."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name != "timing.json"}


@pytest.fixture(scope="module")
def straight(forks, people):
    """Both subjects, fitted without interruption."""
    return people / "straight", finished(forks, people, people / "straight")


COMPARED = ("--compare_density", "--subjects=ball_1")


@pytest.fixture(scope="module")
def compared(forks, people):
    """One subject with and without density control, and how many file events every stage of that has."""
    workdir, events = people / "compared", people / "events.json"
    ended = finished(forks, people, workdir, *COMPARED, f"--events={events}", script=KILLED)
    return workdir, ended, json.loads(events.read_text())


def test_outputs(people, straight):
    workdir, done = straight
    assert str(workdir) in done.out
    model = load_flame(people / "ball.npz")
    for name in ("ball_0", "ball_1"):
        folder = workdir / name
        assert name in done.out
        fit = load_fit(folder, model)
        report = json.loads((folder / "report.json").read_text())
        assert fit.folder.name == "iteration_30"
        assert (
            fit.gaussians.num_gaussians == report["gaussians"] == sum(p["gaussians"] for p in report["parts"].values())
        )
        assert report["gaussians"] <= FAST["max_points"]
        assert set(np.asarray(fit.gaussians.binding)) == set(range(model.num_faces))
        assert {s: v["views"] for s, v in report["scores"].items()} == {"train": 8, "val": 2, "test": 5}
        for split, rows in report["views"].items():
            assert np.mean([row["psnr"] for row in rows]) == pytest.approx(report["scores"][split]["psnr"], abs=1e-3)
        assert [row["iteration"] for row in report["history"]][-1] == 30
        assert report["config"]["iterations"] == 30
        assert json.loads((folder / "timing.json").read_text())["fit_s"] > 0
        picture = iio.imread(folder / "report.png")
        assert picture.ndim == 3
        assert picture.shape[1] >= 4 * 200  # Room for the labels of four pairs, however small the pictures.
        assert picture.std() > 10
        assert not (folder / "checkpoint.npz").exists()


def seeded() -> tuple[int, np.random.Generator]:
    """Other moments in every run of the tests; pytest prints the seed of a test that fails."""
    seed = random.SystemRandom().getrandbits(32) if SEED is None else SEED
    print(f"SEED = {seed}")
    return seed, np.random.default_rng(seed)


def kill_until_done(run: Callable[..., Ended], moments: list[tuple[str, ...]]) -> int:
    """Starts again and again, killed at the next of the moments (flags of `killed_fit`), until a run comes to its end.

    Returns:
      the number of kills.
    """
    kills = 0
    while True:
        ended = run("--resume", *(moments[kills] if kills < len(moments) else ()))
        if ended.code == 0:
            return kills
        assert not ended.timed_out  # A child that outlives a killed parent holds its output open.
        # Another process's death is told by the first one.
        assert ended.code == -9 or "a worker process was killed" in ended.err, ended.err[-3000:]
        kills += 1


def moment(rng: np.random.Generator, counts: dict[str, int], stage: str | None = None) -> tuple[str, ...]:
    """A stage of the run, one of its file events, and half the time up to a tenth of a second more: all drawn."""
    stage = stage or str(rng.choice(STAGES))
    after = rng.choice([0.0, rng.uniform(0, 0.1)])
    return f"--kill_stage={stage}", f"--kill_number={rng.integers(counts[stage]) + 1}", f"--kill_after={after}"


def test_killed_at_random_gives_the_same_bytes(forks, people, compared, tmp_path):
    seed, rng = seeded()
    expected, _, counts = compared
    assert set(counts) == set(STAGES)
    moments = [moment(rng, counts) for _ in range(3)]
    kills = kill_until_done(
        lambda *more: start(forks, people, tmp_path / "fits", *COMPARED, *more, script=KILLED), moments
    )
    assert kills >= 1
    assert contents(tmp_path / "fits") == contents(expected), (seed, moments)


@pytest.mark.slow
@pytest.mark.parametrize("first", STAGES)
def test_killed_many_times_gives_the_same_bytes(forks, people, compared, tmp_path, first):
    """First in a given stage, then anywhere."""
    seed, rng = seeded()
    expected, _, counts = compared
    moments = [moment(rng, counts, first), *(moment(rng, counts) for _ in range(3))]
    kills = kill_until_done(
        lambda *more: start(forks, people, tmp_path / "fits", *COMPARED, *more, script=KILLED), moments
    )
    assert kills >= 1
    assert contents(tmp_path / "fits") == contents(expected), (seed, moments)


@pytest.mark.slow
def test_killed_with_workers_gives_the_same_bytes(forks, people, straight, tmp_path):
    """All processes, the first one or another, at any time of the whole run."""
    seed, rng = seeded()
    began = time.monotonic()
    finished(forks, people, tmp_path / "whole", "--processes=2")
    seconds = time.monotonic() - began
    assert contents(tmp_path / "whole") == contents(straight[0])
    moments = [
        ("--kill_stage=begin", f"--kill_after={rng.uniform(0, seconds)}", f"--kill_whom={whom}")
        for whom in rng.permutation(["group", "main", "child"] * 4)
    ]
    kills = kill_until_done(
        lambda *more: start(forks, people, tmp_path / "fits", "--processes=2", *more, script=KILLED), moments
    )
    assert kills >= 1
    assert contents(tmp_path / "fits") == contents(straight[0]), (seed, moments)


@pytest.mark.slow
def test_shards_give_the_same_bytes(forks, people, straight, tmp_path):
    for shard in range(2):
        finished(forks, people, tmp_path / "shards", "--num_shards=2", f"--shard={shard}")
    assert contents(tmp_path / "shards") == contents(straight[0])


def test_a_shard_without_subjects_says_so(forks, people, tmp_path):
    ended = finished(forks, people, tmp_path / "shards", "--num_shards=3", "--shard=2")
    assert ended.out == "nothing to do: there are fewer subjects than shards, and --shard=2 has none.\n"
    assert not (tmp_path / "shards").exists()


def test_comparison_of_density_control(forks, people, compared, tmp_path):
    workdir, ended, _ = compared
    folders = (workdir / "ball_1", workdir / "without_density" / "ball_1")
    dense, fixed = (json.loads((folder / "report.json").read_text()) for folder in folders)
    content = json.loads((folders[0] / "comparison.json").read_text())
    assert fixed["gaussians"] == 32 < dense["gaussians"]
    assert content["gaussians"] == {"with_density_control": dense["gaussians"], "without": 32}
    for split, scores in content["scores"].items():
        both = [report["scores"][split]["psnr"] for report in (dense, fixed)]
        assert [scores[run]["psnr"] for run in ("with_density_control", "without")] == both
        assert scores["gain_db"] == pytest.approx(both[0] - both[1], abs=1e-4)
        assert f"{split} {scores['gain_db']:+.2f}" in ended.out
    # The ball has sixteen faces above and sixteen below.
    for name, part in content["parts"].items():
        found = dense["parts"][name]
        assert (part["gaussians"], part["without"], part["faces"]) == (found["gaussians"], 16, 16)
        assert part["added"] == found["added"] == found["gaussians"] - 16
        assert part["per_face"] == pytest.approx(found["gaussians"] / 16, abs=1e-3)
        assert part["per_cm2"] == pytest.approx(found["gaussians"] / part["area_cm2"], abs=2e-3)
        assert part["added_per_cm2"] == pytest.approx(part["added"] / part["area_cm2"], abs=2e-3)
        row = next(line.split() for line in ended.out.splitlines() if line.split()[:1] == [name])
        assert row[1:] == [
            str(part["gaussians"]), f"{part['per_face']:.2f}", str(part["added"]), f"{part['added_per_cm2']:.2f}",
        ]  # fmt: skip
    assert sum(part["added"] for part in content["parts"].values()) == dense["gaussians"] - 32
    # Two views a row: truth, with, without; each wide enough for its label. Two views of val and four of test.
    assert iio.imread(folders[0] / "comparison.png").shape == (3 * (224 + 18), 6 * 224, 3)
    # What is made tokens of is one fit of every person.
    assert find_fits(workdir) == {"ball_1": folders[0]}


def test_pictures_of_the_comparison_are_of_the_saved_fits(compared, people):
    """Their difference from the truth gives the PSNR that stands below them."""
    from pointillist_jax.data.captures import load_capture

    workdir, _, _ = compared
    rows = json.loads((workdir / "ball_1" / "report.json").read_text())["views"]["val"]
    without = json.loads((workdir / "without_density" / "ball_1" / "report.json").read_text())["views"]["val"]
    gains = [a["psnr"] - b["psnr"] for a, b in zip(rows, without, strict=True)]
    first = int(np.argmin(gains))
    sheet = iio.imread(workdir / "ball_1" / "comparison.png") / 255
    truth, dense, fixed = (sheet[:224, 224 * i : 224 * (i + 1)][3::7, 3::7] for i in range(3))
    view = load_capture(people / "captures" / "ball_1", load_flame(people / "ball.npz")).split("val").image(first)
    np.testing.assert_allclose(truth, view, atol=0.003)
    for picture, of in ((dense, rows), (fixed, without)):
        assert -10 * np.log10(np.mean((picture - truth) ** 2)) == pytest.approx(of[first]["psnr"], abs=0.1)


def test_a_comparison_is_made_once(forks, people, compared, tmp_path):
    shutil.copytree(compared[0], tmp_path / "fits")
    paths = [tmp_path / "fits/ball_1" / name for name in ("comparison.json", "comparison.png")]
    before = [path.stat().st_mtime_ns for path in paths]
    finished(forks, people, tmp_path / "fits", *COMPARED, "--resume")
    assert [path.stat().st_mtime_ns for path in paths] == before
    # A kill left a half of it, or the fits are others than those it was made of.
    paths[1].unlink()
    (tmp_path / "fits/ball_1" / ".comparison.tmp-0123.png").write_bytes(b"half")
    finished(forks, people, tmp_path / "fits", *COMPARED, "--resume")
    assert contents(tmp_path / "fits") == contents(compared[0])
    finished(forks, people, tmp_path / "fits", "--subjects=ball_1", "--overwrite", "--seed=1")
    assert not any(path.exists() for path in paths)


def test_several_captures_are_checked_before_the_first_is_fitted(forks, people, straight, tmp_path):
    shutil.copytree(people / "captures", tmp_path / "captures")
    (tmp_path / "captures" / "ball_1" / "images" / "00001_03.png").unlink()
    ended = start(forks, people, tmp_path / "fits", f"--capture={tmp_path / 'captures'}")
    assert ended.code == 2
    assert "Traceback" not in ended.err
    said, fitted, again = (
        ended.err.find("00001_03.png does not exist"),
        ended.err.find("ball_0: "),
        ended.err.rfind("00001_03.png does not exist"),
    )
    assert 0 < said < fitted < again
    assert contents(tmp_path / "fits") == {
        name: data for name, data in contents(straight[0]).items() if name.startswith("ball_0/")
    }


def test_a_typo_beside_overwrite_costs_no_fit(forks, people, straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "fits")
    for more in (("--config.fit.max_points=20",), ("--subjects=ball_0", "--downscale=99")):
        ended = start(forks, people, tmp_path / "fits", "--overwrite", *more)
        assert ended.code == 2, ended.err[-3000:]
        assert "Traceback" not in ended.err
        assert contents(tmp_path / "fits") == contents(straight[0])


def test_a_kill_after_the_report_leaves_nothing_behind(forks, people, straight, tmp_path):
    """The checkpoint goes after the report is there; a kill between them leaves it to the next start."""
    shutil.copytree(straight[0], tmp_path / "fits")
    (tmp_path / "fits" / "ball_0" / "checkpoint.npz").write_bytes(b"left by a kill")
    finished(forks, people, tmp_path / "fits", "--resume")
    assert contents(tmp_path / "fits") == contents(straight[0])


def test_user_errors_are_sentences(forks, people, straight, tmp_path):
    shutil.copytree(people / "captures", tmp_path / "pictures")
    picture = tmp_path / "pictures/ball_0/images/00001_03.png"
    picture.write_bytes(picture.read_bytes() + b"!")
    shutil.copytree(people / "captures", tmp_path / "tracked")
    shutil.copy(tmp_path / "tracked/ball_1/flame_param/00001.npz", tmp_path / "tracked/ball_1/flame_param/00000.npz")
    model = load_flame(people / "ball.npz")
    save_flame(tmp_path / "larger.npz", model.replace(v_template=1.1 * model.v_template))
    refused = {
        "--resume to continue it or --overwrite": (straight[0],),
        "no subject 'nobody'": (tmp_path / "new", "--subjects=nobody"),
        "max_points=20 is less than one Gaussian": (tmp_path / "new", "--config.fit.max_points=20"),
        "ball_0 was fitted with other settings": (straight[0], "--resume", "--seed=1"),
        "ball_0 was fitted with another head than larger.npz": (
            straight[0], "--resume", f"--flame={tmp_path / 'larger.npz'}",
        ),
        "ball_0 was fitted to another capture": (straight[0], "--resume", f"--capture={tmp_path / 'pictures'}"),
        "ball_1 was fitted to another capture": (straight[0], "--resume", f"--capture={tmp_path / 'tracked'}"),
    }  # fmt: skip
    for message, arguments in refused.items():
        ended = start(forks, people, *arguments)
        assert ended.code == 2, (message, ended)
        assert message in ended.err
        assert "Traceback" not in ended.err
