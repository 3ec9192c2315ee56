"""Meshes and rules: what is refused, and that a step does not depend on the mesh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import pytest

from pointillist_jax.files import UserError
from pointillist_jax.sharding import batch_share, make_mesh, shard_batch, shardings_for, start_processes

ROOT = Path(__file__).resolve().parents[2]
# Mesh → the part of the toy's first matrix [4 embed, 16 mlp] that one device holds after a step.
SHARDS = {
    "data:8": [4, 16], "fsdp:4": [1, 16], "tensor:8": [4, 2], "data:2,fsdp:2,tensor:2": [2, 8],
    "fsdp:4,context:2": [1, 16], "data:2,tensor:4": [4, 4],
}  # fmt: skip


def test_a_step_is_the_same_on_every_mesh():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.training.mesh_program", *SHARDS]
    done = subprocess.run(
        command, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    reference = found.pop("data:8")
    for mesh, each in found.items():
        assert each["shard"] == SHARDS[mesh], mesh
        for name in ("loss", "grad_norm"):
            assert each[name] == pytest.approx(reference[name], rel=1e-5), mesh
        for path, values in each["state"].items():
            np.testing.assert_allclose(values, reference["state"][path], rtol=2e-5, atol=1e-6, err_msg=f"{mesh} {path}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data:3", "asks for 3 devices, but there are 1"),
        ("rows:1", "no <axis>:<size>"),
        ("data:1,data:1", "each once"),
        ("data", "no <axis>:<size>"),
        ("data:0", "no <axis>:<size>"),
        ("tensor:2", "asks for 2 devices, but there are 1"),
    ],
)
def test_meshes_that_cannot_be(text, message):
    with pytest.raises(UserError, match=message):
        make_mesh(text, jax.devices()[:1])


def test_an_axis_that_does_not_divide_is_named():
    mesh = jax.sharding.AbstractMesh((1, 1, 3, 1), ("data", "fsdp", "tensor", "context"))
    boxed = {"q": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((4, 2), np.float32), names=("embed", "heads"))}
    with pytest.raises(UserError, match=r"\['q'\]: its axis 'heads' of size 2 does not divide into 3"):
        shardings_for(boxed, mesh)


def test_a_batch_that_does_not_divide_is_refused():
    mesh = make_mesh("", jax.devices()[:1])
    assert shard_batch({"x": np.zeros((3, 2))}, mesh)["x"].shape == (3, 2)


@pytest.mark.parametrize(
    ("sizes", "devices_per_process", "shares"),
    [
        ((4, 1, 1, 1), 2, [(0, 2), (1, 2)]),
        ((2, 2, 1, 1), 1, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ((2, 1, 2, 1), 2, [(0, 2), (1, 2)]),
        # Processes that differ on tensor or context alone read the same examples.
        ((1, 1, 4, 1), 2, [(0, 1), (0, 1)]),
        ((2, 1, 1, 2), 1, [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ],
)
def test_processes_that_hold_the_same_examples_read_the_same(sizes, devices_per_process, shares):
    found = [batch_share(FakeMesh(sizes, devices_per_process), p) for p in range(len(shares))]
    assert found == shares


def test_processes_that_share_some_examples_are_refused():
    with pytest.raises(UserError, match="overlapping parts"):
        batch_share(FakeMesh((2, 1, 3, 1), 2), 0)


class FakeMesh:
    """Devices in order, so many to a process."""

    def __init__(self, sizes, devices_per_process):
        self.shape = dict(zip(("data", "fsdp", "tensor", "context"), sizes, strict=True))
        ids = np.arange(np.prod(sizes)) // devices_per_process
        self.devices = np.array([SimpleNamespace(process_index=int(i)) for i in ids]).reshape(sizes)


def test_flags_of_several_processes_go_together():
    start_processes("")
    with pytest.raises(UserError, match="--num_processes and --process_id"):
        start_processes("localhost:1", None, None)
    with pytest.raises(UserError, match="need --coordinator"):
        start_processes("", 2, 0)
