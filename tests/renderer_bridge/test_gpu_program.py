"""The gsplat back end inside the program that XLA's GPU compiler makes of it: no GPU is needed to read that."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from pointillist_jax.scaling import gpu_programs

HERE = pathlib.Path(__file__).parent
pytestmark = pytest.mark.skipif(
    not gpu_programs.has_gpu_compiler(), reason=f"XLA's GPU compiler is not installed: {gpu_programs.INSTALL}"
)


@pytest.fixture(scope="module")
def program() -> dict:
    environment = gpu_programs.environment()
    paths = os.pathsep.join([str(HERE.parents[1]), str(HERE), environment["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, str(HERE / "gpu_program.py")],
        env=os.environ | environment | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_one_callback_forward_and_one_backward_and_no_other_library(program):
    assert program["callbacks"] == 2
    assert program["custom_calls"] == 2


def test_buffers_go_to_the_kernels_as_they_are(program):
    assert not program["host_memory"]
    assert not [kind for kind in program["kinds"] if kind.startswith(("copy", "send", "recv", "infeed", "outfeed"))]


def test_jax_neither_sorts_nor_renders_beside_gsplat(program):
    assert not {"sort", "while", "gather", "scatter", "dot"} & set(program["kinds"])
    assert program["kernels"] <= 40  # 31 when written: projection there and back, the loss, two callbacks


def test_devices_exchange_the_gradient_s_sum_only(program):
    collectives = {kind.removesuffix("-start").removesuffix("-done") for kind in program["kinds"]} & {
        "all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute"
    }  # fmt: skip
    assert collectives == {"all-reduce"}
