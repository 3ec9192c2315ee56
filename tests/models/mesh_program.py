"""Loss and gradients of the small transformer on meshes of 8 simulated devices; prints {mesh: difference} as JSON.

Arguments: meshes, and `point` for a model with one step per point.
"""

from __future__ import annotations

import functools
import json
import sys

import jax
import numpy as np

from pointillist_jax.models.ar import param_specs
from pointillist_jax.models.layers import init_params
from pointillist_jax.sharding import make_mesh, shard_batch, shardings_for
from tests.models import tiny_ar


def main() -> None:
    meshes = [text for text in sys.argv[1:] if text != "point"]
    step = {"step": "point", "window": 8} if "point" in sys.argv else {}
    config = tiny_ar.changed(kv_heads=4, heads=8, remat="none", **step)
    params = tiny_ar.random_params(config)
    batch = tiny_ar.random_batch(np.random.default_rng(1), config, batch=8)
    boxed = jax.eval_shape(functools.partial(init_params, param_specs(config), boxed=True), jax.random.PRNGKey(0))
    step = jax.value_and_grad(lambda p, b: tiny_ar.loss(p, config, b))
    expected_loss, expected = jax.jit(step)(params, batch)
    found = {}
    for text in meshes:
        mesh = make_mesh(text)
        shardings = shardings_for(boxed, mesh)
        placed = jax.device_put(params, shardings)
        with jax.set_mesh(mesh):
            loss, grads = jax.jit(step, out_shardings=(None, shardings))(placed, shard_batch(batch, mesh))
        worst = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), grads, expected)
        query = grads["layers"]["self_attention"]["query"]
        found[text] = {
            "loss": abs(float(loss) - float(expected_loss)),
            "grads": max(jax.tree.leaves(worst)),
            "largest": max(float(np.abs(x).max()) for x in jax.tree.leaves(expected)),
            "shard": query.sharding.shard_shape(query.shape),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
