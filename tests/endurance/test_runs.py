"""Runs that are killed, on full and read-only disks, under a clock that jumps, for thousands of steps.

Every test counts what it did; the numbers stand in one JSON line at the end of the tests (tests/conftest.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from pointillist_jax.training.metric_log import read_metrics
from tests.experiments.forked import Ended, Forks
from tests.training import toy
from tests.training.ar_runs import losses

pytestmark = pytest.mark.slow
SCRIPT = "tests.endurance.toy_script"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def forks(cache):
    with Forks(cache) as forks:
        yield forks


@pytest.fixture(scope="module")
def whole(forks, tmp_path_factory):
    """An uninterrupted run of 40 steps: its losses and its final state."""
    workdir = tmp_path_factory.mktemp("whole")
    return final_state(train(forks, workdir)), losses(workdir)


def train(forks: Forks, workdir: Path, *more: str, **how) -> Ended:
    return forks.run(SCRIPT, f"--workdir={workdir}", "--resume", *more, timeout=240, **how)


def final_state(ended: Ended) -> str:
    assert ended.code == 0, ended.err[-3000:]
    return json.loads(ended.out.splitlines()[-1])["state"]


def saved(workdir: Path) -> list[int]:
    """Steps of the checkpoints, and nothing half-written beside them."""
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    assert all(name.isdigit() for name in names), names
    return sorted(map(int, names))


def test_fifty_kills_in_a_row_change_nothing(forks, rng, tmp_path, record_property):
    steps = 600
    expected = final_state(train(forks, tmp_path / "whole", f"--steps={steps}"))
    killed, kills, saving, lost = tmp_path / "killed", 0, 0, []
    checkpoints = killed / "checkpoints"
    for life in range(50):
        newest = max((int(p.name) for p in checkpoints.glob("*") if p.name.isdigit()), default=0)
        match life % 5:
            case 0:  # While Python, JAX and the checkpoint are loaded.
                moment = {"seen": "", "after": rng.uniform(0.1, 1)}
            case 1 | 2:  # While a checkpoint is written.
                moment = {"exists": [str(checkpoints), "*tmp*"], "after": rng.uniform(0, 0.02)}
            case _:
                moment = {"exists": [str(checkpoints), str(newest + 5)], "after": rng.uniform(0, 0.1)}
        ended = train(forks, killed, f"--steps={steps}", interrupt=moment | {"signal": "SIGKILL"})
        assert ended.code == -9, ended.err[-3000:]
        kills += 1
        saving += any(checkpoints.glob("*tmp*"))
        left = max((int(p.name) for p in checkpoints.glob("*") if p.name.isdigit()), default=0)
        assert left >= newest
        lost.append(newest > left)
    assert saving >= 5
    assert 0 < left < steps
    assert final_state(train(forks, killed, f"--steps={steps}")) == expected
    assert losses(killed) == losses(tmp_path / "whole")
    missing = set(losses(tmp_path / "whole")) - set(losses(killed))
    for name, number in (("kills", kills), ("kills_while_saving", saving), ("restarts", kills),
                         ("steps_lost", len(missing) + sum(lost))):  # fmt: skip
        record_property(f"endurance.{name}", number)


def test_a_full_disk_costs_nothing_but_time(cache, whole, tmp_path, record_property):
    """With nothing left, and with less than a checkpoint needs."""
    disk, full = tmp_path / "disk", 0
    disk.mkdir()
    with Forks(cache, disk=(disk, 6 << 20)) as forks:
        if not forks.view(disk).is_mount():
            pytest.skip("this process may not mount a small disk")
        for room in (0, 8 << 10, 60 << 10):
            workdir = disk / str(room)
            seen, filler = forks.view(workdir), forks.view(disk / "filler")
            final_state(train(forks, workdir, "--steps=10"))
            before = saved(seen)
            fill(filler)
            os.truncate(filler, filler.stat().st_size - room)
            assert_refused(train(forks, workdir), "no space left on device")
            assert saved(seen) == before
            filler.unlink()
            assert final_state(train(forks, workdir)) == whole[0]
            assert losses(seen) == whole[1]
            shutil.rmtree(seen)
            full += 1
    record_property("endurance.full_disks", full)
    record_property("endurance.restarts", full)


def fill(path: Path) -> None:
    """Writes until the disk is full."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)


def test_files_that_may_grow_no_further(forks, whole, tmp_path, record_property):
    """A quota ends the writing of a file in the middle."""
    final_state(train(forks, tmp_path, "--steps=10"))
    before = saved(tmp_path)
    assert_refused(train(forks, tmp_path, limit=700), "file too large")
    assert saved(tmp_path) == before
    assert final_state(train(forks, tmp_path)) == whole[0]
    record_property("endurance.full_disks", 1)
    record_property("endurance.restarts", 1)


@pytest.mark.parametrize("folder", ["", "checkpoints"])
def test_a_folder_that_becomes_read_only(folder, forks, whole, tmp_path, record_property):
    final_state(train(forks, tmp_path, "--steps=10"))
    before = saved(tmp_path)
    (tmp_path / folder).chmod(0o500)
    try:
        ended = train(forks, tmp_path, obey_permissions=True)
        assert_refused(ended, "permission denied")
        assert saved(tmp_path) == before
    finally:
        (tmp_path / folder).chmod(0o700)
    assert final_state(train(forks, tmp_path)) == whole[0]
    assert losses(tmp_path) == whole[1]
    record_property("endurance.read_only_folders", 1)
    record_property("endurance.restarts", 1)


def assert_refused(ended: Ended, why: str) -> None:
    """One sentence with the fix, and exit code 2."""
    assert ended.code == 2, ended.err[-3000:]
    assert "Traceback" not in ended.out + ended.err, ended.err[-3000:]
    last = ended.err.splitlines()[-1]
    assert last.startswith("error: "), last
    assert why in last.lower(), last


def test_a_clock_that_jumps_back_changes_nothing(whole, tmp_path, monkeypatch, record_property):
    """The files of the first run are of the future; ten years back in the middle of the second."""
    config = dataclasses.replace(toy.CONFIG, steps=10, checkpoint_every=5)
    toy.run(tmp_path, config)
    real, asked = time.time, itertools.count()
    for path in [tmp_path, *tmp_path.rglob("*")]:
        os.utime(path, (real() + 3e8, real() + 3e8))
    monkeypatch.setattr(time, "time", lambda: real() - (3e8 if next(asked) > 200 else 0))
    toy.run(tmp_path, dataclasses.replace(config, steps=40))
    assert next(asked) > 400
    assert losses(tmp_path) == pytest.approx(whole[1], rel=1e-6)
    assert saved(tmp_path) == [30, 35, 40]
    record_property("endurance.clock_jumps", 2)
    record_property("endurance.restarts", 1)


def test_memory_stays_flat(forks, tmp_path, record_property):
    """2,000 steps with 20 checkpoints: between step 500 and the last, less than 8 MiB more."""
    final_state(train(forks, tmp_path, "--steps=2000", "--save_every=100", "--evaluate_every=100"))
    lines = [line for line in read_metrics(tmp_path) if "eval_resident_mib" in line]
    by_step = {line["step"]: line["eval_resident_mib"] for line in lines}
    assert max(by_step) == 2000
    growth = max(by_step[step] for step in by_step if step > 500) - by_step[500]
    assert growth < 8, by_step
    record_property("endurance.steps_watched_for_memory", 2000)
    record_property("endurance.memory_growth_mib", round(growth, 2))
