"""The training runtime on a toy: resume, divergence, accumulation. Signals and kills: test_ar.py."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.files import UserError
from pointillist_jax.training import metric_log
from pointillist_jax.training.checkpoints import Checkpoints, load_params
from pointillist_jax.training.loop import TrainingDiverged
from pointillist_jax.training.metric_log import MetricLog, read_metrics
from pointillist_jax.training.state import make_optimizer, make_schedule
from tests.training import toy


def losses(workdir) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(workdir) if "loss" in line}


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of 12 steps."""
    workdir = tmp_path_factory.mktemp("whole")
    state, stopped = toy.run(workdir)
    assert stopped is None
    return workdir, state


def test_it_learns_and_logs_every_step(whole):
    workdir, state = whole
    lines = read_metrics(workdir)
    curve = losses(workdir)
    assert list(curve) == list(range(1, 13))
    assert curve[12] < 0.9 * curve[1]
    schedule = make_schedule(toy.CONFIG)
    assert lines[0]["learning_rate"] == pytest.approx(float(schedule(0))) == pytest.approx(1e-2 / 3)
    assert {"grad_norm", "param_norm", "worst", "seconds_per_step", "data_wait"} <= set(lines[0])
    assert int(state.step) == 12
    params, meta = load_params(workdir)
    assert_same(params, state.params)
    assert meta == {"config": "toy"}


def test_resumed_equals_uninterrupted_bitwise(whole, tmp_path):
    toy.run(tmp_path, dataclasses.replace(toy.CONFIG, steps=5))
    state, _ = toy.run(tmp_path)
    assert_same(state, whole[1])
    assert losses(tmp_path) == losses(whole[0])


def test_the_average_is_resumed_too_and_is_what_others_load(tmp_path):
    config = dataclasses.replace(toy.CONFIG, ema_decay=0.9, steps=6)
    whole, _ = toy.run(tmp_path / "whole", config)
    toy.run(tmp_path / "parts", dataclasses.replace(config, steps=3))
    state, _ = toy.run(tmp_path / "parts", config)
    assert_same(state, whole)
    assert np.abs(np.asarray(state.ema["w1"]) - np.asarray(state.params["w1"])).max() > 1e-6
    assert_same(load_params(tmp_path / "parts")[0], state.ema)


def test_a_damaged_newest_checkpoint_is_skipped_and_replaced(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.steps == [4, 8, 12]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12" / "state")
    for file in (tmp_path / "run" / "checkpoints" / "8" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    state, _ = toy.run(tmp_path / "run")
    assert_same(state, whole[1])
    assert losses(tmp_path / "run") == losses(whole[0])
    # The damaged ones are replaced, so that others can load what this run has learnt.
    assert_same(load_params(tmp_path / "run")[0], whole[1].params)
    assert_same(load_params(tmp_path / "run", 8)[0], load_params(whole[0], 8)[0])
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.steps == [4, 8, 12]


def test_steps_between_the_damaged_one_and_the_restored_one_are_saved(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12" / "params")
    state, _ = toy.run(tmp_path / "run", dataclasses.replace(toy.CONFIG, steps=10))
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.steps == [4, 8, 10]
        with pytest.raises(UserError, match="step 10 is not saved"):
            checkpoints.save(state, toy.make_stream(8), {})
    assert_same(load_params(tmp_path / "run")[0], state.params)


def test_a_checkpoint_of_another_model_does_not_fit(whole, tmp_path, monkeypatch):
    shutil.copytree(whole[0], tmp_path / "run")
    init = toy.init_params
    monkeypatch.setattr(toy, "init_params", lambda key: init(key) | {"scale": jnp.ones(17)})
    with pytest.raises(UserError, match="none of the 3 checkpoints"):
        toy.run(tmp_path / "run")


def test_accumulation_equals_the_whole_batch(whole, tmp_path):
    toy.run(tmp_path, dataclasses.replace(toy.CONFIG, accumulate=4))
    np.testing.assert_allclose(list(losses(tmp_path).values()), list(losses(whole[0]).values()), rtol=1e-5)


class Poisoned:
    """The toy's stream with one NaN at a step."""

    def __init__(self, step: int):
        self.inner, self.step, self.count = toy.make_stream(toy.CONFIG.batch_size), step, 0

    def __next__(self):
        batch = next(self.inner)
        self.count += 1
        if self.count == self.step:
            batch["x"] = np.full_like(batch["x"], np.nan)
        return batch

    def get_state(self):
        return self.inner.get_state()

    def set_state(self, state):
        self.inner.set_state(state)


def test_divergence_names_step_batch_and_checkpoint(whole, tmp_path):
    def describe(batch):
        return "subjects a, b" if np.isnan(batch["x"]).any() else "healthy"

    with pytest.raises(TrainingDiverged, match=r"step 7: loss nan.*subjects a, b.*checkpoint is step 4") as told:
        toy.run(tmp_path, stream=Poisoned(7), describe=describe)
    assert "delete" not in str(told.value)
    with pytest.raises(
        TrainingDiverged, match=r"lower --config\.decoder\.train\.learning_rate or a higher --config\.dec"
    ):
        toy.run(tmp_path, stream=Poisoned(3), flags="config.decoder.train")
    with pytest.raises(TrainingDiverged, match=r"newest checkpoint is step 8 .*delete it, and --resume goes .* step 4"):
        toy.run(tmp_path, stream=Poisoned(6))
    # As the sentence says; the run goes on from there once the data are mended.
    shutil.rmtree(tmp_path / "checkpoints" / "8")
    seen = []
    state, _ = toy.run(tmp_path, describe=lambda batch: seen.append(batch) or "")
    assert len(seen) == 8
    assert_same(state, whole[1])


@pytest.mark.parametrize("steps", [1, 3])
def test_parameters_that_are_not_finite_are_never_saved(tmp_path, steps):
    """Loss and gradient of the first step are sound, and the step leaves parameters of 1e30, whose norm overflows."""
    config = dataclasses.replace(toy.CONFIG, learning_rate=1e30, warmup_steps=0, steps=steps, checkpoint_every=1)
    with pytest.raises(
        TrainingDiverged, match=r"step 1: loss \d.*parameter norm inf .*no checkpoint is saved.*overwrite"
    ):
        toy.run(tmp_path, config)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == []


def test_a_state_is_saved_before_it_is_evaluated_and_a_lost_evaluation_is_made_up_for(whole, tmp_path):
    config, calls = dataclasses.replace(toy.CONFIG, eval_every=4), []

    def evaluate(params, stopped):
        calls.append(float(params["w1"][0, 0]))
        if len(calls) == 2:
            raise RuntimeError("killed")
        return {"w": calls[-1]}

    with pytest.raises(RuntimeError, match="killed"):
        toy.run(tmp_path, config, evaluate=evaluate)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [4, 8]
    state, _ = toy.run(tmp_path, config, evaluate=evaluate)
    assert_same(state, whole[1])
    lines = [line for line in read_metrics(tmp_path) if "eval_w" in line]
    assert [(line["step"], line["eval_w"]) for line in lines] == [(4, calls[0]), (8, calls[1]), (12, calls[3])]
    assert calls[1] == calls[2]
    # A finished run is evaluated no more.
    toy.run(tmp_path, config, evaluate=evaluate)
    assert len(calls) == 4


def test_a_signal_during_an_evaluation_ends_it_and_one_before_it_skips_it(whole, tmp_path):
    config, began = dataclasses.replace(toy.CONFIG, eval_every=3, checkpoint_every=100), []

    def evaluate(params, stopped):
        began.append(1)
        if len(began) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return None if stopped() else {"one": 1.0}

    class Stopping(Poisoned):
        """The stream, and a SIGTERM with one of its batches instead of a NaN."""

        def __next__(self):
            self.count += 1
            if self.count == self.step:
                os.kill(os.getpid(), signal.SIGTERM)
            return next(self.inner)

    state, stopped = toy.run(tmp_path, config, evaluate=evaluate)
    assert (int(state.step), stopped, len(began)) == (6, "SIGTERM", 2)
    # The evaluation of step 6 is made up for; that of step 9 is skipped.
    state, stopped = toy.run(tmp_path, config, stream=Stopping(3), evaluate=evaluate)
    assert (int(state.step), stopped, len(began)) == (9, "SIGTERM", 3)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [6, 9]
    state, stopped = toy.run(tmp_path, config, evaluate=evaluate)
    assert stopped is None
    assert_same(state, whole[1])
    assert [line["step"] for line in read_metrics(tmp_path) if "eval_one" in line] == [3, 6, 9, 12]


def test_an_evaluation_that_is_lost_before_anything_was_logged_is_made_up_for(tmp_path):
    config, began = dataclasses.replace(toy.CONFIG, eval_every=3, checkpoint_every=100, log_every=100), []

    def evaluate(params, stopped):
        began.append(1)
        if len(began) in (1, 5):
            os.kill(os.getpid(), signal.SIGTERM)
        # The last one has come to its end when the signal arrives.
        return None if stopped() and len(began) < 5 else {"one": 1.0}

    state, stopped = toy.run(tmp_path, config, evaluate=evaluate)
    assert (int(state.step), stopped) == (3, "SIGTERM")
    state, stopped = toy.run(tmp_path, config, evaluate=evaluate)
    assert (int(state.step), stopped) == (12, "SIGTERM")
    assert [line["step"] for line in read_metrics(tmp_path) if "eval_one" in line] == [3, 6, 9, 12]


def test_other_data_are_refused_in_one_sentence(whole, tmp_path, caplog):
    class Other(Poisoned):
        def set_state(self, state):
            raise UserError("the data stream was saved with subjects=6, now it is 5: resume with the same data.")

    shutil.copytree(whole[0], tmp_path / "run")
    with pytest.raises(UserError, match=r"checkpoints belongs to other data: the data .* resume with the same data\.$"):
        toy.run(tmp_path / "run", stream=Other(0))
    assert "skipped" not in caplog.text


def test_progress_off_a_terminal_is_a_line_now_and_then(tmp_path, capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metric_log.time, "monotonic", lambda: now[0])
    with MetricLog(tmp_path, 2, 12) as log:
        for step in range(3, 13):
            now[0] += 8
            log.advance()
            log.write(step, {"loss": 1 / step})
    said = capsys.readouterr().err
    assert "\r" not in said
    lines = [
        "step 3/12  loss 0.3333",
        "step 7/12  loss 0.1667, 00:40 left",
        "step 11/12  loss 0.1, 00:08 left",
        "step 12/12  loss 0.08333",
    ]
    assert said.splitlines() == lines
    with MetricLog(tmp_path, 2, 12, bar=False) as log:
        log.write(3, {"loss": 1.0})
    assert capsys.readouterr().err == ""


def test_one_trace_for_all_steps(tmp_path, monkeypatch):
    traces, loss_fn = [], toy.loss_fn

    def counted(*args):
        traces.append(1)
        return loss_fn(*args)

    monkeypatch.setattr(toy, "loss_fn", counted)
    toy.run(tmp_path, dataclasses.replace(toy.CONFIG, steps=5, b1=0.8))
    assert len(traces) == 1


def test_weight_decay_spares_norms():
    config = dataclasses.replace(toy.CONFIG, weight_decay=10.0, learning_rate=1e-2, warmup_steps=0)
    optimizer = make_optimizer(config)
    params = {"w1": jnp.ones((2, 2)), "scale": jnp.ones((3, 2)), "scale2": jnp.ones((3, 2))}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["w1"], -0.1, rtol=1e-6)
    assert not np.any(updates["scale"])
    assert not np.any(updates["scale2"])
