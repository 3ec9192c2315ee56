"""The script that trains stage one: what it takes from the store, whatever the preset says."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.experiments.small_ar import ROOT, write_people

PROGRAM = """
import dataclasses, json, sys
from absl import flags
from experiments import train_ar
from pointillist_jax.data.token_store import open_store

flags.FLAGS(sys.argv)
config = train_ar.with_store(train_ar.CONFIG(), open_store(train_ar.STORE.value))
print(json.dumps(dataclasses.asdict(config)))
"""


@pytest.mark.parametrize("given", [(), ("--config.data.space=identity", "--config.data.bins=1024")])
def test_what_the_store_decided_stands_in_the_config(tmp_path, given):
    """Preset `laptop` is for stores of another space, share of points and portrait size; no flag says so."""
    store = write_people(tmp_path, 2)
    command = [sys.executable, "-c", PROGRAM, "--config=laptop", f"--store={tmp_path}", *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    config = json.loads(done.stdout)
    names = ("space", "keep", "portrait_size", "bins", "lower", "stride")
    # The stride is no matter of the store: the preset's.
    assert [config["data"][name] for name in names] == ["identity", 1.0, 14, 1024, list(store.tokenizer.lower), 512]
    assert config["model"]["num_faces"] == store.tokenizer.num_faces
