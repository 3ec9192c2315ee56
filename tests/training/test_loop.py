"""The training runtime on a toy: resume, divergence, accumulation. Signals and kills: test_ar.py."""

from __future__ import annotations

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.files import UserError
from pointillist_jax.training.checkpoints import Checkpoints, load_params
from pointillist_jax.training.loop import TrainingDiverged
from pointillist_jax.training.metric_log import read_metrics
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

    with pytest.raises(TrainingDiverged, match=r"step 7: loss nan.*subjects a, b.*checkpoint is step 4"):
        toy.run(tmp_path, stream=Poisoned(7), describe=describe)
    with pytest.raises(TrainingDiverged, match=r"lower --config\.decoder\.train\.learning_rate or raise --config\.dec"):
        toy.run(tmp_path, stream=Poisoned(3), flags="config.decoder.train")
    # What is saved is healthy: the run goes on from there once the data are mended.
    state, _ = toy.run(tmp_path)
    assert_same(state, whole[1])


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
