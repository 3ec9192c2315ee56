"""Ctrl-C in every long stage: a line that says how to go on, exit code 130, nothing half-written, no traceback."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.experiments.bad_inputs import SCRIPTS, filled
from tests.experiments.small_ar import ROOT, environment

GO_ON = "stopped by Ctrl-C; go on with --resume."
PEOPLE = ("--num_identities=3",)
BOTH = ("--subjects=ball_0,ball_1", "--config.fit.iterations=1000")
# Stage → script, flags beside its good ones, and what has to be in its output (or, a Path, on disk below its output's
# folder) when Ctrl-C comes. Stages that compile a training, and worker processes, take longer.
SLOW = pytest.mark.slow
STAGES = {
    "people": ("make_identities", PEOPLE, "people:   0%"),
    "people in workers that start": ("make_identities", (*PEOPLE, "--processes=2"), "people:   0%"),
    "people in workers at work": ("make_identities", (*PEOPLE, "--processes=2"), "people:  33%"),
    "fit": ("fit", BOTH, r"ball_0:.* [1-9]\d*/1000 "),
    "fits in workers": ("fit", (*BOTH, "--processes=2"), r"2 fits:.* [1-9]\d*/2000 "),
    "tokenize": ("tokenize", (), "tokenise:  50%"),
    "encode": ("encode_conditions", (), r"  0%"),
    "features": ("extract_features", (), "read:   0%"),
    "drawing": ("generate", ("--max_points=100000",), "draw:   0%"),
    "avatars": ("reconstruct", ("--subjects=p0,p1,p2,p3",), Path("avatars/p0.png")),
    "frames": ("animate", ("--frames=1000",), r"frames:.* [1-9]\d*/1000 "),
    "compare": ("compare_torch", ("--seeds=0,1,2",), r"seed 0"),
    "transformer": ("train_ar", ("--config.train.steps=100000", "--config.train.log_every=1"), r" [1-9]\d*/100000 "),
    "decoder": ("train_decoder", ("--config.decoder.train.steps=100000",), r" [1-9]\d*/100000 "),
}
LONG = ("people in workers that start", "people in workers at work", "fit", "fits in workers", "compare",
        "transformer", "decoder")  # fmt: skip


@pytest.mark.parametrize("stage", [pytest.param(name, marks=SLOW) if name in LONG else name for name in STAGES])
def test_ctrl_c_says_how_to_go_on(stage, forks, good_root, tmp_path):
    script, more, seen = STAGES[stage]
    given, out = SCRIPTS[script], tmp_path / "out"
    output = [f"--{given.output[0]}={out / given.output[1]}"] if given.output else []
    moment = {"exists": [str(out), str(seen)]} if isinstance(seen, Path) else {"seen": seen}
    ended = forks.run(
        script,
        *filled(given.good, good_root),
        *more,
        *output,
        where=out,
        interrupt=moment | {"signal": "SIGINT"},
        timeout=600,
    )
    assert not ended.timed_out, ended.err[-2000:]
    assert ended.seconds_after_signal is not None, ended.err[-2000:]
    assert ended.code == 130, ended.err[-3000:]
    assert "Traceback" not in ended.out + ended.err, ended.err[-3000:]
    assert "error:" not in ended.err
    assert not ended.broken
    if script in ("train_ar", "train_decoder"):
        step = re.search(r"stopped by Ctrl-C at step (\d+); everything is saved: go on with --resume\.", ended.out)
        assert any(f"/checkpoints/{step[1]}/" in path for path in ended.files)
    else:
        last = ended.err.replace("\r", "\n").splitlines()[-1]
        assert last == (GO_ON if script not in ("reconstruct", "animate", "compare_torch") else "stopped by Ctrl-C.")
        assert not [path for path in ended.files if ".tmp-" in path]


def started(tmp_path: Path, script: str, *arguments: str) -> subprocess.Popen:
    """As a user starts it, in a process group of its own, as a shell gives it."""
    return subprocess.Popen(
        [sys.executable, "-m", f"experiments.{script}", *arguments],
        cwd=ROOT, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def test_ctrl_c_while_modules_are_imported(tmp_path):
    process = started(tmp_path, "animate")
    maps = Path(f"/proc/{process.pid}/maps")
    limit = time.monotonic() + 120
    # NumPy is there, so the script's own imports are under way; they take seconds more.
    while "numpy" not in maps.read_text() and time.monotonic() < limit:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=120)
    assert said == ("", "stopped by Ctrl-C.\n")
    assert process.returncode == 130


@pytest.mark.slow
def test_ctrl_c_reaches_no_worker_and_the_rest_is_made_by_resume(tmp_path):
    arguments = (*SCRIPTS["make_identities"].good, *PEOPLE, f"--workdir={tmp_path}/people", "--processes=2")
    process = started(tmp_path, "make_identities", *arguments)
    limit = time.monotonic() + 300
    while not list(tmp_path.glob("people/person_*")) and time.monotonic() < limit:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert err.splitlines()[-1] == GO_ON
    assert not list(tmp_path.glob("people/.*"))
    process = started(tmp_path, "make_identities", *arguments, "--resume")
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert len(list(tmp_path.glob("people/person_*"))) == 3
