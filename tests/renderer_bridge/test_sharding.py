"""Four fake devices under `jax.shard_map`, each rendering its own views, against the single-device result."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def reports() -> tuple[dict, dict]:
    paths = os.pathsep.join([str(HERE.parents[1]), str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {
        # LLVM's optimisations change nothing here: what is tested is which device does what and where sums are made.
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": paths,
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "shard_map_program.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    agreement, failure = done.stdout.strip().splitlines()[-2:]
    return json.loads(agreement), json.loads(failure)


def test_four_devices_agree_with_one(reports):
    report = reports[0]
    for backend in ("jax", "gsplat"):
        assert report[backend]["value"] < 1e-5
        assert report[backend]["image"] < 1e-5
        assert report[backend]["gradient"] < 1e-4
    # One forward pass and one backward pass, one view on each device every time.
    assert report["views"] == [1] * 8


def test_an_exception_on_every_device_is_a_sentence_and_not_a_hang(reports):
    assert "no more tiles" in reports[1]["error"]
