"""The benchmark of generation at its smallest."""

from __future__ import annotations

import json

from tests.experiments.test_scripts import start

MODEL = ("layers=1", "width=32", "head_dim=16", "mlp_width=48", "bins=32", "num_faces=40", "window=16")


def bench(*arguments: str):
    small = [f"--config.model.{option}" for option in MODEL] + ["--points=5", "--rounds=1", "--batches=2"]
    return start("-m", "experiments.bench_decode", *small, *arguments)


def test_bench_decode_beside_torch_ends_in_one_json_line():
    """Torch's loop is checked to be the same model before it is timed; a window of 16 is passed on the way."""
    done = bench("--positions=0,400", "--against=torch")
    assert done.returncode == 0, done.stderr
    assert "slowest position / fastest" in done.stdout
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    assert figures["bench"] == "decode"
    assert [row["position"] for row in figures["rows"]] == [0, 400]
    for row in figures["rows"]:
        assert row["batch"] == 2
        assert row["jax_tokens_per_s"] > 0
        assert row["torch_over_jax_cpu"] > 0
        assert row["torch_threads"] >= 1
    assert {"versions", "machine", "xla_flags"} <= set(figures)


def test_errors_are_sentences():
    for arguments, said in (
        (("--batches=0",), "--batches=0 must be whole numbers"),
        (("--against=torch", "--config.model.step=point"), "--against=torch compares token steps"),
        (("--against=torch", "--cache_dtype=int8"), "leave --cache_dtype=int8 out"),
    ):
        done = bench(*arguments)
        assert done.returncode == 2
        assert said in done.stderr
