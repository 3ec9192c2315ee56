"""The data benchmark at its smallest."""

from __future__ import annotations

import json

import pytest

from tests.experiments.test_scripts import start


def bench(*arguments: str) -> dict:
    small = ("--points=300", "--subjects=2", "--portrait_size=14", "--windows=64,128", "--workers=0", "--tokens=256")
    done = start("-m", "experiments.bench_data", *small, "--rounds=1", "--batch_size=2", *arguments)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    assert figures["bench"] == "data"
    assert set(figures["tokens_per_s"]) == {f"{w}{c}" for w in (64, 128) for c in ("", "+condition", ", no cache")}
    assert min(figures["tokens_per_s"].values()) > 0
    assert figures["tokenise_s"] > 0
    assert figures["peak_mib"] > 0
    assert {"versions", "machine"} <= set(figures)
    return figures


def test_bench_data_ends_in_one_json_line():
    assert bench("--against=none")["train_tokens_per_s"] is None


@pytest.mark.slow
def test_beside_the_training_step():
    figures = bench("--against=tiny")
    assert figures["train_tokens_per_s"] > 0
    for name, rate in figures["tokens_per_s"].items():
        assert figures["data_over_train"][name] == pytest.approx(rate / figures["train_tokens_per_s"], rel=0.1, abs=0.1)
