"""What scripts share: work folders, and pools whose workers end with them."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

import experiments
from experiments.common import open_shared_workdir, open_workdir, sentence_of
from pointillist_jax.files import UserError

MADE = ("x", "folder", "missing")
ROOT = Path(experiments.__file__).parent.parent


def test_workers_and_manager_die_with_a_killed_parent():
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.experiments.pool_program"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    children = [int(word) for word in process.stdout.readline().split()]
    for child in children:
        os.kill(child, 0)  # It lives.
    process.kill()
    try:
        process.communicate(timeout=30)  # They hold the other end of its pipe for as long as they live.
    except subprocess.TimeoutExpired:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        raise AssertionError("a child went on after its parent was killed") from None


def test_workers_clean_up_undisturbed_by_each_others_end(tmp_path):
    """The pool sends SIGTERM to all of them when the first has ended: here the second is not done then."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.experiments.pool_program", str(tmp_path), "2"],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=120,
    )  # fmt: skip
    assert ended.stderr.splitlines()[-1] == "KeyboardInterrupt"
    assert not list(tmp_path.iterdir())


def test_a_reader_that_goes_is_no_error():
    """As `… | head -1` does."""
    program = "from experiments.common import run\nrun(lambda: [print('line', i) for i in range(10**6)])"
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "line 0\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 128 + signal.SIGPIPE


def test_ctrl_c_is_not_lost_in_a_destructor():
    """There Python only prints it and goes on."""
    program = """
import time
from experiments.common import run
class Loses:
    def __del__(self):
        raise KeyboardInterrupt
def main():
    Loses()
    time.sleep(60)
run(main)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (130, "stopped by Ctrl-C.\n")


@pytest.mark.parametrize("lost", [False, True])
def test_sigterm_before_a_training_has_steps_to_save_is_a_sentence(lost):
    """`lost`: in a destructor, where Python only prints what is raised."""
    program = f"""
import os, signal, time
from experiments.common import run
from experiments.job import start_job
class Loses:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
def main():
    start_job()
    {"Loses()" if lost else "os.kill(os.getpid(), signal.SIGTERM)"}
    time.sleep(60)
run(main)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (0, "stopped by SIGTERM; go on with --resume.\n")


def test_ctrl_c_while_a_progress_bar_is_made_ends_its_line():
    program = """
import tqdm
from experiments.common import run
class Interrupted(tqdm.tqdm):
    def refresh(self, **lock):
        super().refresh(**lock)
        raise KeyboardInterrupt
run(lambda: Interrupted(total=4))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 130
    bar, said = done.stderr.splitlines()[-2:]
    assert "0/4" in bar
    assert said == "stopped by Ctrl-C."


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (UserError("that is wrong."), "that is wrong."),
        (FileNotFoundError("x does not exist; check the path."), "x does not exist; check the path."),
        (OSError(errno.ENOSPC, "No space left on device", "x"), "x: no space left on device; make space, or write to"),
        (OSError(errno.EROFS, "Read-only file system", "x"), "x: read-only file system; choose another path."),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "x: permission denied; choose another path."),
        (FileExistsError(errno.EEXIST, "File exists", "x"), "x: is a file, and a folder is needed there"),
        (
            MemoryError("Unable to allocate 9 TiB"),
            "there is not enough memory (Unable to allocate 9 TiB); make",
        ),
        (MemoryError(), "there is not enough memory; make batches"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating"), "there is not enough memory (RES"),
        (jax.errors.JaxRuntimeError("INTERNAL: a defect"), None),
        (ValueError("a defect"), None),
    ],
)
def test_errors_as_sentences(error, sentence):
    found = sentence_of(error)
    assert found is None if sentence is None else found.startswith(sentence)


def test_a_folder_that_holds_something_needs_a_word(tmp_path):
    new = open_workdir(tmp_path / "a" / "b", MADE, resume=False, overwrite=False)
    assert new.is_dir()
    (new / "x").write_text("1")
    (new / "folder").mkdir()
    (new / "theirs").write_text("1")
    with pytest.raises(UserError, match=r"not empty.*--resume.*--overwrite"):
        open_workdir(new, MADE, resume=False, overwrite=False)
    assert (open_workdir(new, MADE, resume=True, overwrite=False) / "x").is_file()
    open_workdir(new, MADE, resume=False, overwrite=True)
    assert [entry.name for entry in new.iterdir()] == ["theirs"]
    with pytest.raises(UserError, match="exclude each other"):
        open_workdir(new, MADE, resume=True, overwrite=True)
    (tmp_path / "file").write_text("1")
    with pytest.raises(UserError, match="is a file"):
        open_workdir(tmp_path / "file", MADE, resume=False, overwrite=True)


@pytest.mark.parametrize("problem", [PermissionError(13, "Permission denied", "there"), UserError("not empty")])
@pytest.mark.parametrize("process", [0, 1])
def test_a_folder_that_cannot_be_used_ends_all_processes(tmp_path, monkeypatch, problem, process):
    told = []

    def refuse(*_, **__):
        raise problem

    def broadcast(value):
        told.append(bool(value))
        return np.array(False)  # What process 0 says.

    monkeypatch.setattr(experiments.common, "open_workdir", refuse)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", broadcast)
    expected, message = (type(problem), str(problem.args[-1])) if process == 0 else (UserError, "process 0 says why")
    with pytest.raises(expected, match=message):
        open_shared_workdir(tmp_path, MADE, resume=False, overwrite=False)
    assert len(told) == 1  # Before it ends: the other waits for it.
    assert told[0] == (process != 0)
