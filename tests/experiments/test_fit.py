"""`experiments.fit` as a user starts it: outputs, refusals, and the same bytes after SIGKILL."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

import experiments
from pointillist_jax.data.fits import find_fits, load_fit
from pointillist_jax.flame import load_flame
from pointillist_jax.flame.model import save_flame
from tests.experiments.small_ar import environment
from tests.fitting.scenes import write_person

ROOT = Path(experiments.__file__).parent.parent
FAST = {
    "iterations": 30, "densify_from": 4, "densify_interval": 5, "densify_grad": 1e-5, "max_points": 50,
    "save_interval": 3, "log_interval": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Two captures of a ball, its head as a file, and a cache of compiled programs for all processes."""
    root = tmp_path_factory.mktemp("people")
    for seed in range(2):
        model = write_person(root / "captures" / f"ball_{seed}", seed)
    save_flame(root / "ball.npz", model)
    return root


def command(people: Path, workdir: Path, *arguments: str) -> list[str]:
    config = [f"--config.fit.{key}={value}" for key, value in FAST.items()]
    return [
        sys.executable, "-m", "experiments.fit", f"--capture={people / 'captures'}", f"--workdir={workdir}",
        f"--flame={people / 'ball.npz'}", *config, *arguments,
    ]  # fmt: skip


def start(people: Path, workdir: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(people, workdir, *arguments),
        cwd=ROOT, env=environment(people), capture_output=True, text=True, timeout=900,
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the clock's."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name != "timing.json"}


@pytest.fixture(scope="module")
def straight(people):
    """Both subjects, fitted without interruption."""
    workdir = people / "straight"
    done = start(people, workdir)
    assert done.returncode == 0, done.stderr
    return workdir, done


def test_outputs(people, straight):
    workdir, done = straight
    assert str(workdir) in done.stdout
    model = load_flame(people / "ball.npz")
    for name in ("ball_0", "ball_1"):
        folder = workdir / name
        assert name in done.stdout
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


def kill_and_resume(people: Path, workdir: Path, moments: list[float]) -> int:
    """Starts, kills after each moment (seconds since that start wrote a checkpoint), finishes; returns the hits."""

    def checkpoints() -> set[tuple[Path, int]]:
        found = set()
        for path in workdir.glob("*/checkpoint.npz"):
            with contextlib.suppress(FileNotFoundError):  # Deleted since it was listed: its subject is done.
                found.add((path, path.stat().st_mtime_ns))
        return found

    hits = 0
    for i, moment in enumerate(moments):
        before = checkpoints()
        process = subprocess.Popen(
            command(people, workdir, *(["--resume"] if i else [])),
            cwd=ROOT, env=environment(people), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        end = time.time() + 600
        while process.poll() is None and time.time() < end and not checkpoints() - before:
            time.sleep(0.005)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            hits += 1
        process.wait()
    done = start(people, workdir, "--resume")
    assert done.returncode == 0, done.stderr
    return hits


def test_killed_and_resumed_gives_the_same_bytes(people, straight, tmp_path):
    """Once, at a random moment of the first subject's fit."""
    moment = float(np.random.default_rng().uniform(0.0, 0.2))
    hits = kill_and_resume(people, tmp_path / "fits", [moment])
    assert hits == 1
    assert contents(tmp_path / "fits") == contents(straight[0]), moment


@pytest.mark.slow
def test_killed_many_times_gives_the_same_bytes(people, straight, tmp_path):
    """Each start gets one of the twenty checkpoints further, and a random piece beyond it, during saves too."""
    moments = np.random.default_rng().uniform(0.0, 0.1, 6).tolist()
    hits = kill_and_resume(people, tmp_path / "fits", moments)
    assert hits >= 3
    assert contents(tmp_path / "fits") == contents(straight[0]), moments


@pytest.mark.slow
def test_processes_and_shards_give_the_same_bytes(people, straight, tmp_path):
    done = start(people, tmp_path / "processes", "--processes=2")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "processes") == contents(straight[0])
    for shard in range(2):
        done = start(people, tmp_path / "shards", "--num_shards=2", f"--shard={shard}")
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "shards") == contents(straight[0])


@pytest.mark.slow
def test_comparison_of_density_control(people, tmp_path):
    done = start(people, tmp_path / "both", "--compare_density", "--subjects=ball_1")
    assert done.returncode == 0, done.stderr
    folders = (tmp_path / "both" / "ball_1", tmp_path / "both" / "without_density" / "ball_1")
    dense, fixed = (json.loads((folder / "report.json").read_text()) for folder in folders)
    assert fixed["gaussians"] == 32 < dense["gaussians"]
    gain = dense["scores"]["test"]["psnr"] - fixed["scores"]["test"]["psnr"]
    assert f"test {gain:+.2f}" in done.stdout
    # What is made tokens of is one fit of every person.
    assert find_fits(tmp_path / "both") == {"ball_1": folders[0]}


def test_several_captures_are_checked_before_the_first_is_fitted(people, straight, tmp_path):
    shutil.copytree(people / "captures", tmp_path / "captures")
    (tmp_path / "captures" / "ball_1" / "images" / "00001_03.png").unlink()
    done = start(people, tmp_path / "fits", f"--capture={tmp_path / 'captures'}")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    said, fitted, again = (
        done.stderr.find("00001_03.png does not exist"),
        done.stderr.find("ball_0: "),
        done.stderr.rfind("00001_03.png does not exist"),
    )
    assert 0 < said < fitted < again
    assert contents(tmp_path / "fits") == {
        name: data for name, data in contents(straight[0]).items() if name.startswith("ball_0/")
    }


def test_a_kill_after_the_report_leaves_nothing_behind(people, straight, tmp_path):
    """The checkpoint goes after the report is there; a kill between them leaves it to the next start."""
    shutil.copytree(straight[0], tmp_path / "fits")
    (tmp_path / "fits" / "ball_0" / "checkpoint.npz").write_bytes(b"left by a kill")
    done = start(people, tmp_path / "fits", "--resume")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "fits") == contents(straight[0])


def test_user_errors_are_sentences(people, straight, tmp_path):
    def said(workdir: Path, *arguments: str) -> str:
        done = start(people, workdir, *arguments)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "--resume to continue it or --overwrite" in said(straight[0])
    assert "no subject 'nobody'" in said(tmp_path / "new", "--subjects=nobody")
    assert "max_points=20 is less than one Gaussian" in said(tmp_path / "new", "--config.fit.max_points=20")
