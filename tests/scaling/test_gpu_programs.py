"""What XLA's GPU compiler makes of a training step for devices that are not there, counted by hand."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest

from experiments.scaling_worker import Row, run_row
from pointillist_jax.configs import Config, DecoderConfig
from pointillist_jax.files import UserError
from pointillist_jax.scaling import gpu_programs
from tests.scaling.counts import by_hand, compile_steps
from tests.scaling.hand_count import MODEL

MESHES = ("data:8", "fsdp:8", "tensor:8", "context:8", "data:2,fsdp:4")
needs_compiler = pytest.mark.skipif(
    not gpu_programs.has_gpu_compiler(), reason=f"XLA's GPU compiler is not installed: {gpu_programs.INSTALL}"
)


@pytest.fixture(scope="module")
def compiled():
    return compile_steps("gpu", {}, *MESHES)


@needs_compiler
@pytest.mark.parametrize("mesh", MESHES)
def test_a_step_on_gpus_has_the_collectives_that_are_counted_by_hand_and_no_others(compiled, mesh):
    assert {name: row["bytes"] / 4 for name, row in compiled[mesh].items()} == by_hand(mesh, gpu=True)


@needs_compiler
def test_gradients_go_into_one_all_reduce(compiled):
    # The other sum is that of the tokens' numbers, which the loss is divided by.
    assert compiled["data:8"]["all-reduce over data"]["count"] == 2


@needs_compiler
@pytest.mark.parametrize("stage", ["one", "two"])
def test_rows_of_two_machines(stage):
    config = Config(model=MODEL, decoder=DecoderConfig(width=16, layers=1, heads=2, head_dim=8, mlp_width=24))
    content = json.loads(json.dumps(dataclasses.asdict(config)))
    found = run_row(Row(stage, "data:16", 16, 16, 0, "gpu", content), timeout=600)
    assert found["device"] == "NVIDIA H100 80GB HBM3"
    assert found["temporary_bytes"] > 0
    assert {(one["kind"], tuple(one["axes"]), one["group"]) for one in found["collectives"]} == {
        ("all-reduce", ("data",), 16)
    }


@pytest.mark.skipif(gpu_programs.has_gpu_compiler(), reason="XLA's GPU compiler is installed")
def test_without_the_compiler_the_sentence_says_how_to_get_it():
    with pytest.raises(UserError, match="pip install --upgrade --no-deps --target"):
        gpu_programs.gpu_devices(8)


def test_a_process_that_compiles_for_gpus_waits_for_none(monkeypatch):
    monkeypatch.setitem(os.environ, "XLA_FLAGS", "--xla_dump_to=somewhere")
    assert gpu_programs.environment()["JAX_PLATFORMS"] == "cpu"
    assert gpu_programs.environment()["XLA_FLAGS"] == "--xla_dump_to=somewhere --xla_gpu_autotune_level=0"
