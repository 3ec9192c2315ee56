"""The data benchmark at its smallest."""

from __future__ import annotations

import json

import pytest

from tests.experiments.test_scripts import start


def test_bench_data_ends_in_one_json_line():
    small = ("--points=300", "--subjects=2", "--portrait_size=14", "--windows=64,128", "--workers=0", "--tokens=256")
    done = start("-m", "experiments.bench_data", *small, "--rounds=1", "--batch_size=2")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    assert figures["bench"] == "data"
    assert set(figures["tokens_per_s"]) == {f"{w}{c}" for w in (64, 128) for c in ("", "+condition", ", no cache")}
    assert figures["train_tokens_per_s"] > 0
    for name, rate in figures["tokens_per_s"].items():
        assert rate > 0
        assert figures["data_over_train"][name] == pytest.approx(rate / figures["train_tokens_per_s"], rel=0.1, abs=0.1)
    assert figures["tokenise_s"] > 0
    assert figures["peak_mib"] > 0
    assert {"versions", "machine"} <= set(figures)
