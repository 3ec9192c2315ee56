"""One toy step on many meshes of 8 simulated devices; prints {mesh: {"loss": …, "state": {path: values}}} as JSON."""

from __future__ import annotations

import json
import sys

import jax
import numpy as np

from pointillist_jax.sharding import make_mesh, shard_batch
from pointillist_jax.training.state import init_state, make_optimizer
from tests.training import toy


def main() -> None:
    found = {}
    for text in sys.argv[1:]:
        mesh = make_mesh(text)
        state, _ = init_state(toy.init_params, make_optimizer(toy.CONFIG), toy.CONFIG, jax.random.PRNGKey(0), mesh)
        batch = shard_batch(next(toy.make_stream(8)), mesh)
        with jax.set_mesh(mesh):
            state, metrics = toy.make_step(toy.CONFIG)(state, batch)
        leaves = jax.tree_util.tree_leaves_with_path(state)
        found[text] = {
            "loss": float(metrics["loss"]),
            "grad_norm": float(metrics["grad_norm"]),
            "shard": state.params["w1"].sharding.shard_shape(state.params["w1"].shape),
            "state": {jax.tree_util.keystr(path): np.asarray(x).tolist() for path, x in leaves},
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
