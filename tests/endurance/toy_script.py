"""The toy of tests/training/toy.py as a script: what the endurance tests start, end and start again.

    python -m tests.endurance.toy_script --workdir=… --resume [--steps=40] [--save_every=5] [--mesh=…] [--coordinator=…]

Says {"state": sha256 of the final state} at its end, and logs its resident memory at every evaluation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from experiments.common import end_stopped, run
from experiments.job import MESH, open_job, start_job
from pointillist_jax.sharding import batch_share, make_mesh
from tests.training import toy

WORKDIR = flags.DEFINE_string("workdir", None, "Where the run goes.")
STEPS = flags.DEFINE_integer("steps", 40, "Of the run.")
SAVE_EVERY = flags.DEFINE_integer("save_every", 5, "Steps between checkpoints.")
EVALUATE_EVERY = flags.DEFINE_integer("evaluate_every", 0, "Steps between measurements of memory.")


def main() -> None:
    start_job()
    config = dataclasses.replace(
        toy.CONFIG, steps=STEPS.value, checkpoint_every=SAVE_EVERY.value, eval_every=EVALUATE_EVERY.value
    )
    share = batch_share(make_mesh(MESH.value))
    workdir = open_job(WORKDIR.value, ("checkpoints", "metrics.jsonl", "tensorboard"))
    state, stopped = toy.run(
        workdir,
        config,
        MESH.value,
        stream=Share(*share),
        evaluate=lambda params, stopped: {"resident_mib": resident_mib()},
    )
    if stopped:
        end_stopped(stopped, int(state.step))
        return
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(multihost_utils.process_allgather(state, tiled=True)):
        digest.update(np.asarray(leaf))
    print(json.dumps({"state": digest.hexdigest()}))


class Share:
    """This process's rows of the toy's batches."""

    def __init__(self, index: int, count: int):
        self._inner = toy.make_stream(toy.CONFIG.batch_size)
        size = toy.CONFIG.batch_size // count
        self._rows = slice(index * size, (index + 1) * size)

    def __next__(self):
        return {name: array[self._rows] for name, array in next(self._inner).items()}

    def get_state(self):
        return self._inner.get_state()

    def set_state(self, state):
        self._inner.set_state(state)


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


if __name__ == "__main__":
    run(main)
