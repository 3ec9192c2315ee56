"""`experiments.train_ar` with one step per point: learning, bookkeeping, and what scripts load from it."""

from __future__ import annotations

import dataclasses
import json

import pytest

from experiments.trained import load_ar
from pointillist_jax.training.metric_log import read_metrics
from tests.training import ar_runs
from tests.training.ar_runs import CONFIG


@pytest.mark.slow
def test_train_ar_with_point_steps(tmp_path):
    store = ar_runs.write_people(tmp_path / "store")
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, step="point", slot_layers=1),
        train=dataclasses.replace(CONFIG.train, steps=20, learning_rate=1e-2, eval_every=0),
        data=dataclasses.replace(CONFIG.data, held_out=2),
    )
    ar_runs.write_features(store, config, "random")
    said = ar_runs.finish(ar_runs.start(ar_runs.command(store.path, tmp_path / "ar", config), tmp_path / "cache"))
    assert "held-out subjects (2), nats per token after 20 steps" in said
    lines = [line for line in read_metrics(tmp_path / "ar") if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    tokens = CONFIG.train.batch_size * 4 * CONFIG.model.window
    for line in lines:
        assert line["tokens_per_s"] * line["seconds_per_step"] == pytest.approx(tokens)
        assert {f"loss_{slot}" for slot in "xyzb"} <= set(line)
    card = json.loads((tmp_path / "ar/card.json").read_text())
    assert set(card) >= {"unigram", "mean_head", "model", "conditions_exchanged"}
    # Every token of the held-out people but S S S S and the last three E is counted, as with token steps.
    model = card["model"]
    assert model["loss"] == pytest.approx(sum(model[f"loss_{slot}"] for slot in "xyzb") / 4, abs=0.02)
    trained = load_ar(tmp_path / "ar")
    assert (trained.model.step, trained.model.window_tokens) == ("point", 4 * CONFIG.model.window)
    assert trained.checkpoint["step"] == 20
    assert trained.encoders == {"image": "random", "points": "random"}
