"""The loop around a train step: data, logging, evaluation, checkpoints, signals, divergence (DESIGN §10).

Resume order, which `resume_or_init` and `train` keep:
  1. abstract state with this run's shardings, and a fresh data iterator;
  2. the newest checkpoint that can be read goes into both, unless its meta is refused (`same_model`); without any, a
     new state is initialised on the mesh;
  3. metric lines after that step are dropped; an evaluation that was due there and that a signal or a kill has cut
     short is made; the loop goes on with the next batch.
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
# (parameters, stopped) → metrics, or None where `stopped()`, which it asks between batches, became true.
Evaluate = Callable[[Any, Callable[[], bool]], Mapping[str, float] | None]


class TrainingDiverged(UserError):
    """The loss, a gradient or a parameter became NaN or infinite."""


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
    evaluate: Evaluate | None = None,
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
      evaluate: of the parameters, every `config.eval_every` steps and at the end; a signal cuts it short, except in a
        job of several processes, which agree between steps only.
      describe: a batch in words, for the message of a divergence ("subjects 3, 17").
      tokens_per_step, flops_per_step, peak_flops: for rates in the log; peak of one device, None if unknown.
      profile: first and last step of a trace, written to `<workdir>/profile`.
      flags: what the flags that set `config` begin with, for messages.

    Returns:
      The last state, and None or the name of the signal that stopped the run early (everything is saved then).

    Raises:
      TrainingDiverged: names the step, the batch and the newest checkpoint.
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

        def evaluated(step: int) -> bool:
            """Whether the evaluation that is due came to its end."""
            with clock.paused():
                found = evaluate(state.averaged_params, lambda: stop.signal is not None)
            if found is not None:
                log.write(step, {f"eval_{k}": v for k, v in found.items()})
            return found is not None

        def due(step: int, every: int) -> bool:
            return step == config.steps or bool(every and step % every == 0)

        if evaluate and first and due(first, config.eval_every) and log.lacks_evaluation and not evaluated(first):
            return state, stop.signal
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

            stopped = stop.signal or ("preemption" if checkpoints.reached_preemption(step) else None)
            if due(step, config.log_every):
                values = {name: float(value) for name, value in metrics.items() if name != "finite"}
                check()
                values |= clock.rates(tokens_per_step, flops_per_step, peak_flops)
                if schedule is not None:
                    values["learning_rate"] = float(schedule(step - 1))
                log.write(step, values)
            # Saved first: whoever sends the signal may not wait for an evaluation.
            save = due(step, config.checkpoint_every)
            if save or stopped:
                check()
                with clock.paused():
                    checkpoints.save(state, stream, meta)
            if evaluate and not stopped and due(step, config.eval_every):
                check()
                if not evaluated(step):
                    stopped = stop.signal
                    if not save:
                        checkpoints.save(state, stream, meta)
            if stopped:
                checkpoints.wait()
                return state, stopped
    checkpoints.wait()
    return state, stop.signal


def _diverged(pending: tuple[int, dict[str, jax.Array], str], checkpoints: Checkpoints, flags: str) -> TrainingDiverged:
    step, metrics, said = pending
    checkpoints.wait()
    saved, folder = checkpoints.steps, checkpoints.folder
    names = {"loss": "loss", "grad_norm": "gradient norm", "param_norm": "parameter norm"}
    values = ", ".join(f"{name} {float(metrics[key]):.4g}" for key, name in names.items())
    gentler = f"a lower --{flags}.learning_rate or a higher --{flags}.warmup_steps"
    if not saved:
        go_on = f"no checkpoint is saved: start again with --overwrite and {gentler}"
    else:
        go_on = f"the newest checkpoint is step {saved[-1]} in {folder}: go on from it with --resume and {gentler}"
    # Its numbers are finite; whether the training was sound by then nobody has looked at.
    if len(saved) > 1:
        go_on += f"; if it was on its way there already, delete it, and --resume goes on from step {saved[-2]}"
    return TrainingDiverged(
        f"step {step}: {values} must all be finite{f' ({said})' if said else ''}; {go_on}; or look at that data."
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
