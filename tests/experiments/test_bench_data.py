"""The data benchmark at its smallest."""

from __future__ import annotations

import json

import pytest

from tests.experiments.test_scripts import start


def bench(*arguments: str) -> dict:
    small = ("--points=300", "--subjects=2", "--portrait_size=14", "--windows=64,12000", "--workers=0", "--tokens=256")
    done = start("-m", "experiments.bench_data", *small, "--rounds=1", "--batch_size=2", *arguments)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    assert figures["bench"] == "data"
    assert set(figures["tokens_per_s"]) == {f"{w}{c}" for w in (64, 12000) for c in ("", "+condition", ", no cache")}
    assert min(figures["tokens_per_s"].values()) > 0
    assert figures["tokenise_cold_s"] > 0
    assert figures["tokenise_s"] > 0
    slowest = min((rate, name) for name, rate in figures["tokens_per_s"].items() if name.startswith("12000"))
    goal = figures["goals"]["long_window_tokens_per_s"]
    assert (goal["measured"], goal["case"], goal["goal"], goal["met"]) == (*slowest, 2_000_000, slowest[0] >= 2_000_000)
    assert f"goal {'reached' if goal['met'] else 'MISSED'}: at least 2,000,000 tokens/s at window" in done.stdout
    assert figures["peak_mib"] > 0
    assert {"versions", "machine"} <= set(figures)
    return figures


def test_bench_data_ends_in_one_json_line():
    figures = bench("--against=none")
    assert figures["train_tokens_per_s"] is None
    assert "times_training" not in figures["goals"]


@pytest.mark.slow
def test_beside_the_training_step():
    figures = bench("--against=tiny")
    assert figures["train_tokens_per_s"] > 0
    goal = figures["goals"]["times_training"]
    assert goal["measured"] == min(figures["data_over_train"].values())
    assert goal["met"] == (goal["measured"] >= 20)
    for name, rate in figures["tokens_per_s"].items():
        assert figures["data_over_train"][name] == pytest.approx(rate / figures["train_tokens_per_s"], rel=0.1, abs=0.1)
