"""The loop around a train step: data, logging, evaluation, checkpoints, signals, divergence (DESIGN §10).

Resume order, which `resume_or_init` and `train` keep:
  1. abstract state with this run's shardings, and a fresh data iterator;
  2. the newest checkpoint that can be read goes into both, unless its meta is refused (`same_model`); without any, a
     new state is initialised on the mesh;
  3. metric lines after that step are dropped; the loop goes on with the next batch.
On the same mesh the continued run equals the uninterrupted one bit for bit.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from pointillist_jax.configs import TrainConfig
from pointillist_jax.files import UserError
from pointillist_jax.sharding import shard_batch
from pointillist_jax.training.checkpoints import Checkpoints
from pointillist_jax.training.metric_log import MetricLog
from pointillist_jax.training.state import Key, TrainState, abstract_state, init_state

StepFn = Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]


class TrainingDiverged(UserError):
    """The loss or a gradient became NaN or infinite."""


def resume_or_init(
    checkpoints: Checkpoints,
    init_params: Callable[[Key], Any],
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    key: Key,
    mesh: Mesh,
    stream: Iterator,
    check: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[TrainState, dict[str, Any] | None]:
    """The state to go on from, and the meta it was saved with: of the newest readable checkpoint, or new and None.

    Moves `stream` to the state's position. `check`: as of `Checkpoints.restore`; it refuses a checkpoint by its meta.
    """
    abstract, _ = abstract_state(init_params, optimizer, config, key, mesh)
    restored = checkpoints.restore(abstract, stream, check)
    return (init_state(init_params, optimizer, config, key, mesh)[0], None) if restored is None else restored


def train(
    state: TrainState,
    step_fn: StepFn,
    stream: Iterator[Mapping[str, np.ndarray]],
    *,
    config: TrainConfig,
    mesh: Mesh,
    workdir: Path,
    checkpoints: Checkpoints,
    meta: dict[str, Any],
    schedule: optax.Schedule | None = None,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    describe: Callable[[Mapping[str, np.ndarray]], str] = lambda batch: "",
    tokens_per_step: int = 0,
    flops_per_step: float = 0.0,
    peak_flops: float | None = None,
    profile: tuple[int, int] | None = None,
    bar: bool = True,
    flags: str = "config.train",
) -> tuple[TrainState, str | None]:
    """Runs steps until `config.steps`, a signal or a divergence.

    Args:
      state: where to start; its buffers are donated to the steps.
      step_fn: from `training.state.jit_step`.
      stream: this process's part of each batch, as NumPy; a Grain iterator, so that checkpoints hold its position.
      meta: JSON content to save with every checkpoint.
      schedule: for the learning rate in the log.
      evaluate: parameters → metrics, every `config.eval_every` steps and at the end.
      describe: a batch in words, for the message of a divergence ("subjects 3, 17").
      tokens_per_step, flops_per_step, peak_flops: for rates in the log; peak of one device, None if unknown.
      profile: first and last step of a trace, written to `<workdir>/profile`.
      flags: what the flags that set `config` begin with, for messages.

    Returns:
      The last state, and None or the name of the signal that stopped the run early (everything is saved then).

    Raises:
      TrainingDiverged: names the step, the batch and the last good checkpoint.
    """
    first = int(state.step)
    pending: tuple[int, dict[str, jax.Array], str] | None = None

    def check() -> None:
        # The one step not yet looked at: asking for it at once would leave the device idle until the next is queued.
        nonlocal pending
        if pending is not None and not bool(pending[1]["finite"]):
            raise _diverged(pending, checkpoints, flags)
        pending = None

    with _Stop() as stop, MetricLog(workdir, first, config.steps, bar=bar) as log, _Profile(profile, workdir) as trace:
        clock = _Clock()
        for step in range(first + 1, config.steps + 1):
            trace.before(step)
            with clock.waiting():
                batch = next(stream)
            said = describe(batch)
            arrays = shard_batch(batch, mesh)
            with jax.set_mesh(mesh), jax.transfer_guard("disallow"):
                state, metrics = step_fn(state, arrays)
            trace.after(step, metrics)
            check()
            pending = (step, metrics, said)
            log.advance()
            clock.steps += 1

            last = step == config.steps
            stopped = stop.signal or ("preemption" if checkpoints.reached_preemption(step) else None)
            if step % config.log_every == 0 or last:
                values = {name: float(value) for name, value in metrics.items() if name != "finite"}
                check()
                values |= clock.rates(tokens_per_step, flops_per_step, peak_flops)
                if schedule is not None:
                    values["learning_rate"] = float(schedule(step - 1))
                log.write(step, values)
            if evaluate and ((config.eval_every and step % config.eval_every == 0) or last):
                check()
                with clock.paused():
                    log.write(step, {f"eval_{k}": v for k, v in evaluate(state.averaged_params).items()})
            if step % config.checkpoint_every == 0 or last or stopped:
                check()
                with clock.paused():
                    checkpoints.save(state, stream, meta)
            if stopped and not last:
                checkpoints.wait()
                return state, stopped
        check()
    checkpoints.wait()
    return state, None


def _diverged(pending: tuple[int, dict[str, jax.Array], str], checkpoints: Checkpoints, flags: str) -> TrainingDiverged:
    step, metrics, said = pending
    checkpoints.wait()
    good = checkpoints.steps
    where = f"the last good checkpoint is step {good[-1]} in {checkpoints.folder}" if good else "no checkpoint is saved"
    return TrainingDiverged(
        f"step {step}: loss {float(metrics['loss']):.4g} and gradient norm {float(metrics['grad_norm']):.4g} are not "
        f"both finite{f' ({said})' if said else ''}; {where}: lower --{flags}.learning_rate or raise "
        f"--{flags}.warmup_steps, or look at that data."
    )


class _Stop:
    """Turns SIGTERM and the first Ctrl-C into a request to save and stop. Several processes agree through Orbax."""

    signal: str | None = None

    def __enter__(self) -> _Stop:
        self._old = {}
        # Signals reach only the main thread; in a job of several processes JAX's preemption service takes SIGTERM.
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._take)
        return self

    def _take(self, number: int, _frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name

    def __exit__(self, *_) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)


class _Clock:
    """Time of the steps since the last log line, without evaluation and saving, and the share spent on data."""

    def __init__(self):
        self.steps, self._start, self._wait = 0, time.perf_counter(), 0.0

    @contextlib.contextmanager
    def waiting(self):
        start = time.perf_counter()
        yield
        self._wait += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self):
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def rates(self, tokens: int, flops: float, peak: float | None) -> dict[str, float]:
        seconds = (time.perf_counter() - self._start) / max(self.steps, 1)
        rates = {"seconds_per_step": seconds, "data_wait": self._wait / max(self.steps, 1)}
        if tokens:
            rates["tokens_per_s"] = tokens / seconds
        if flops and peak:
            rates["mfu"] = flops / seconds / (peak * jax.device_count())
        self.steps, self._start, self._wait = 0, time.perf_counter(), 0.0
        return rates


class _Profile:
    """Traces the steps from `first` to `last`, or those of them that this run makes."""

    def __init__(self, steps: tuple[int, int] | None, workdir: Path):
        self._first, self._last = steps or (1, 0)
        self._folder, self._running = str(workdir / "profile"), False

    def __enter__(self) -> _Profile:
        return self

    def before(self, step: int) -> None:
        if self._first <= step <= self._last and not self._running:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, metrics: dict[str, jax.Array]) -> None:
        if self._running and step >= self._last:
            jax.block_until_ready(metrics)
            self.__exit__()

    def __exit__(self, *_) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
