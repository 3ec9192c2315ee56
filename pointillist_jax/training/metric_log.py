"""Metrics of a run: one JSON line per logged step, TensorBoard, and progress: a bar on a terminal, else a line now and
then (DESIGN §10)."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar
from tqdm import tqdm

from pointillist_jax.files import atomic_path, naming


class MetricLog:
    """Writes `<workdir>/metrics.jsonl` and `<workdir>/tensorboard/` from the first process; other processes write none.

    Lines of steps at and after `start` are dropped first: a killed run has logged steps that its checkpoint has not.

    Args:
      workdir: of the run.
      start: the step the run starts or resumes from.
      steps: its last.
      bar: show progress.

    Attributes:
      lacks_evaluation: the run is not finished, or has logged steps, and no evaluation of `start` is among them. The
        same in all processes.
    """

    def __init__(self, workdir: str | os.PathLike, start: int, steps: int, *, bar: bool = True):
        self._file = self._board = None
        lacks_evaluation = False
        if jax.process_index() == 0:
            self._workdir = workdir = Path(workdir)
            workdir.mkdir(parents=True, exist_ok=True)
            path = workdir / "metrics.jsonl"
            kept = [line for line in _lines(path) if line["step"] <= start]
            with atomic_path(path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            # Without a line a run had nothing to log yet, or, if it is finished, somebody took the file away.
            evaluated = any(_evaluates(line) for line in kept if line["step"] == start)
            lacks_evaluation = not evaluated and (bool(kept) or start < steps)
            self._file = path.open("a")
            self._board = _Board(workdir / "tensorboard", purge_step=start + 1)
        self.lacks_evaluation = lacks_evaluation
        if jax.process_count() > 1:
            self.lacks_evaluation = bool(multihost_utils.broadcast_one_to_all(np.array(lacks_evaluation)))
        shown = bar and self._file is not None
        kind = tqdm if sys.stderr is not None and sys.stderr.isatty() else _Lines
        self._bar = kind(total=steps, initial=start, unit="step", disable=not shown)

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()
        if self._file:
            # A disk that was full from the start leaves files without a line.
            with naming(self._file.name), contextlib.ExitStack() as last:
                last.callback(_remove_empty, self._workdir)
                last.callback(self._board.close)
                self._file.close()

    def advance(self) -> None:
        """One step further."""
        self._bar.update()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Logs scalars under their names; the bar shows the loss and the rate."""
        values = {name: float(value) for name, value in metrics.items()}
        self._bar.set_postfix({k: f"{values[k]:.4g}" for k in ("loss", "eval_loss", "tokens_per_s") if k in values})
        if self._file is None:
            return
        # NaN and infinity are no JSON numbers.
        line = json.dumps({"step": step} | {k: v if math.isfinite(v) else None for k, v in values.items()})
        with naming(self._file.name):
            self._file.write(line + "\n")
            self._file.flush()
        self._board.write(step, values)


class _Lines:
    """In the place of a bar where no terminal can redraw it, as in a job's log: a line at the first loss, then at most
    one every `seconds`, and one at the end. Keywords as tqdm's."""

    def __init__(self, *, total: int, initial: int, unit: str, disable: bool, seconds: float = 30):
        self._total, self._n, self._unit, self._disable, self._seconds = total, initial, unit, disable, seconds
        # Of the first step of this run, whose end only tells how long compiling took.
        self._first = self._said = None
        self._values = ""

    def update(self) -> None:
        self._n += 1
        self._first = self._first or (self._n, time.monotonic())
        if self._said is not None and time.monotonic() - self._said >= self._seconds:
            self._say()

    def set_postfix(self, values: Mapping[str, str]) -> None:
        # An evaluation's values come by themselves.
        if "loss" in values:
            self._values = ", ".join(f"{name} {value}" for name, value in values.items())
            if self._said is None or self._n == self._total:
                self._say()

    def close(self) -> None:
        pass

    def _say(self) -> None:
        if self._disable:
            return
        now = self._said = time.monotonic()
        line = f"{self._unit} {self._n}/{self._total}  {self._values}"
        if self._first is not None and self._first[0] < self._n < self._total:
            left = (now - self._first[1]) / (self._n - self._first[0]) * (self._total - self._n)
            line += f", {tqdm.format_interval(left)} left"
        print(line, file=sys.stderr, flush=True)


class _Board:
    """Scalars for TensorBoard. SummaryWriter writes from a thread, which tells nobody when the disk is full."""

    def __init__(self, folder: Path, purge_step: int):
        self._folder = folder
        with naming(folder):
            folder.mkdir(exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"))
            # TensorBoard then forgets what a killed run wrote from this step on.
            begin = Event(step=purge_step, session_log=SessionLog(status=SessionLog.START))
            self._write(begin)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with naming(self._folder):
            for name, value in values.items():
                self._write(Event(step=step, summary=scalar(name, value)))
            self._writer.flush()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)

    def close(self) -> None:
        with naming(self._folder):
            self._writer.close()


def _evaluates(line: Mapping[str, Any]) -> bool:
    return any(name.startswith("eval_") for name in line)


def _remove_empty(workdir: Path) -> None:
    for path in (workdir / "metrics.jsonl", *(workdir / "tensorboard").glob("events*")):
        if path.exists() and path.stat().st_size == 0:
            path.unlink()


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The logged lines of a run, in order; a half-written last line is left out."""
    return _lines(Path(workdir) / "metrics.jsonl")


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:  # A kill while writing leaves part of a line.
            continue
    return lines
