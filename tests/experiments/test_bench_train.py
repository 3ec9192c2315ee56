"""The benchmark of the training step at its smallest."""

from __future__ import annotations

import json

import pytest

from tests.experiments.test_scripts import start

MODEL = ("layers=1", "width=32", "head_dim=16", "mlp_width=48", "bins=32", "num_faces=40")


def bench(*arguments: str):
    small = [f"--config.model.{option}" for option in MODEL]
    return start("-m", "experiments.bench_train", *small, "--rounds=1", *arguments)


@pytest.mark.parametrize(("step", "tokens"), [("token", 32), ("point", 128)])
def test_bench_train_ends_in_one_json_line(step, tokens):
    done = bench("--windows=32", "--batch=2", f"--config.model.step={step}")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    assert (figures["bench"], figures["preset"], figures["model"]["step"]) == ("train", "tiny", step)
    (row,) = figures["rows"]
    assert row["tokens"] == 2 * tokens
    assert row["jax_ms"] > 0
    # The parameters of random tokens' classes: about the logarithm of their number.
    assert 2 < row["loss"] < 6


@pytest.mark.slow
def test_torch_starts_at_the_same_loss():
    """Else the script refuses to compare. Both recipes of the tables, the head and the support of the loss."""
    plain = ("coord_tables=learned", "loss_support=vocab", "tied_head=false", "slot_embedding=false", "mlp=plain")
    plain = [f"--config.model.{x}" if "=false" not in x else f"--noconfig.model.{x.split('=')[0]}" for x in plain]
    for options in ([], [*plain, "--config.model.order=self_first", "--config.model.kv_heads=1"]):
        done = bench("--windows=32", "--against=torch", *options)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.strip().splitlines()[-1])["rows"][0]["torch_over_jax_cpu"] > 0


def test_errors_are_sentences():
    for arguments, said in (
        (("--windows=30",), "--windows=30 must be multiples of 4"),
        (("--against=torch", "--config.model.step=point"), "--against=torch knows token steps only"),
    ):
        done = bench(*arguments)
        assert done.returncode == 2
        assert said in done.stderr
