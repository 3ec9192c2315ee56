"""Runs of `experiments.train_ar.train_ar` in one process of 8 simulated devices.

    python -m tests.training.ar_program <store> '[["workdir", "mesh", {"steps": 4}], …]'

The dict changes fields of `train`. The last line is JSON: sha256 of each run's final state, and the part of one matrix
that a device holds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import jax
import numpy as np

from experiments.train_ar import train_ar
from pointillist_jax.data.token_store import open_store
from pointillist_jax.flame import open_head
from tests.training.ar_runs import CONFIG, changed


def main() -> None:
    store, head, found = open_store(sys.argv[1]), open_head("coarse"), []
    for workdir, mesh, changes in json.loads(sys.argv[2]):
        config = dataclasses.replace(changed(**changes), model=CONFIG.model.for_tokenizer(store.tokenizer))
        state, stopped, _ = train_ar(store, head, config, Path(workdir), mesh=mesh, bar=False)
        assert stopped is None
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(state):
            digest.update(np.asarray(leaf))
        query = state.params["transformer"]["layers"]["self_attention"]["query"]
        found.append({"state": digest.hexdigest(), "shard": query.sharding.shard_shape(query.shape)})
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
