"""Generation on a mesh: rows over data, heads over tensor."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_meshes_change_nothing():
    """The same tokens on data, on tensor and on both; every device holds its part of the caches only."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    meshes = {"data:2,tensor:2": [2, 1, 8, 8], "data:4": [1, 2, 8, 8]}
    command = [sys.executable, "-m", "tests.sampling.mesh_program", *meshes]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    for mesh, shard in meshes.items():
        one = found[mesh]
        assert one["tokens"] == 0
        assert one["points"] > 8
        assert max(one["log_probs"], one["hidden"]) < 1e-5
        assert one["shard"] == shard
