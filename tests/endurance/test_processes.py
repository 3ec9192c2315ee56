"""Jobs of two processes that are killed and stopped, and that go on as one process and as two again."""

from __future__ import annotations

import functools
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.endurance.test_runs import SCRIPT, final_state, saved
from tests.experiments.forked import Ended, Forks
from tests.training.ar_runs import losses

pytestmark = pytest.mark.slow
MESH = "data:2,fsdp:2"
LOST_AFTER = 10


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two machines, so to say, of two devices each."""
    with (
        Forks(tmp_path_factory.mktemp("one"), devices=2) as one,
        Forks(tmp_path_factory.mktemp("two"), devices=2) as two,
    ):
        yield one, two


@pytest.fixture(scope="module")
def whole(pair, tmp_path_factory):
    """An uninterrupted job of 40 steps: its final state and its losses."""
    workdir = tmp_path_factory.mktemp("whole")
    return same_state(train(pair, workdir)), losses(workdir)


def train(pair, workdir: Path, *more: str, interrupt: dict[int, dict] | None = None) -> list[Ended]:
    """A job of two processes; `interrupt`: by process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        job = [f"--coordinator=localhost:{free.getsockname()[1]}", "--num_processes=2", f"--lost_after={LOST_AFTER}"]
    flags = [f"--workdir={workdir}", "--resume", f"--mesh={MESH}", *job, *more]
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(functools.partial(forks.run, SCRIPT, *flags, f"--process_id={i}", timeout=200,
                                          interrupt=(interrupt or {}).get(i)))
            for i, forks in enumerate(pair)
        ]  # fmt: skip
        return [run.result() for run in runs]


def same_state(ended: list[Ended]) -> str:
    first, second = map(final_state, ended)
    assert first == second
    return first


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other(victim, pair, whole, tmp_path, record_property):
    moment = {"signal": "SIGKILL", "exists": [str(tmp_path / "checkpoints"), "10"]}
    # The other gets no signal: that moment only starts its clock.
    ended = train(
        pair, tmp_path, "--steps=100000", interrupt={victim: moment, 1 - victim: moment | {"signal": "SIGCONT"}}
    )
    assert ended[victim].code == -9
    other = ended[1 - victim]
    assert not other.timed_out
    assert other.code == 75, other.err[-3000:]
    assert other.seconds_after_signal < 2 * LOST_AFTER + 10
    last = other.err.splitlines()[-1]
    assert last.startswith(f"error: process {victim} of this job has ended"), other.err[-3000:]
    assert "start all processes again with --resume" in last
    assert not any(word in other.err for word in ("Traceback", "Check failure", "Fatal")), other.err[-3000:]
    steps = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    again = max(40, steps + 10)
    expected = whole[0] if again == 40 else same_state(train(pair, tmp_path / "whole", f"--steps={again}"))
    assert same_state(train(pair, tmp_path, f"--steps={again}")) == expected
    assert len(losses(tmp_path)) == again
    for name, number in (("process_kills", 1), ("restarts", 1), ("steps_lost", again - len(losses(tmp_path)))):
        record_property(f"endurance.{name}", number)


def test_one_that_cannot_write_stops_both(pair, tmp_path, record_property):
    """Process 0 alone opens the folder; the other is told, and neither waits for the other at its end."""
    (tmp_path / "file").write_text("")
    ended = train(pair, tmp_path / "file")
    assert [each.code for each in ended] == [2, 2], [each.err[-2000:] for each in ended]
    assert "is a file; name a folder" in ended[0].err
    assert "process 0 says why" in ended[1].err
    record_property("endurance.refusals", 1)


def test_sigterm_to_all_saves_one_step(pair, whole, tmp_path, record_property):
    moment = {"signal": "SIGTERM", "exists": [str(tmp_path / "checkpoints"), "5"]}
    ended = train(pair, tmp_path, "--steps=100000", interrupt={0: moment, 1: moment | {"after": 0.3}})
    assert [each.code for each in ended] == [0, 0], [each.err[-2000:] for each in ended]
    newest = saved(tmp_path)[-1]
    assert f"stopped by preemption at step {newest};" in ended[0].out
    assert newest == max(losses(tmp_path))
    steps = max(40, newest + 5)
    expected = whole[0] if steps == 40 else same_state(train(pair, tmp_path / "whole", f"--steps={steps}"))
    assert same_state(train(pair, tmp_path, f"--steps={steps}")) == expected
    record_property("endurance.sigterms", 2)
    record_property("endurance.restarts", 1)


def test_two_processes_one_and_two_again(pair, whole, tmp_path, record_property):
    """The same mesh of four devices each time; only collectives between processes add in another order."""
    same_state(train(pair, tmp_path, "--steps=10"))
    with Forks(tmp_path / "cache", devices=4) as alone:
        ended = alone.run(SCRIPT, f"--workdir={tmp_path}", "--resume", f"--mesh={MESH}", "--steps=25")
        final_state(ended)
    same_state(train(pair, tmp_path))
    assert list(losses(tmp_path)) == list(whole[1])
    np.testing.assert_allclose(list(losses(tmp_path).values()), list(whole[1].values()), rtol=1e-5)
    record_property("endurance.process_counts_changed", 2)
    record_property("endurance.restarts", 2)
