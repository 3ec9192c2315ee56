"""Clouds on meshes of 4 simulated devices against one device; prints {mesh: differences, a cache's shard} as JSON."""

from __future__ import annotations

import json
import sys

import jax
import numpy as np

from pointillist_jax.sampling import generate
from pointillist_jax.sampling.steppers import make_stepper
from pointillist_jax.sharding import make_mesh
from tests.models.tiny_ar import changed, random_params
from tests.sampling.small import contexts


def main() -> None:
    config = changed(window=8, layers=1)
    params, context = random_params(config), contexts(np.random.default_rng(0), config, 4)
    keys = np.array(jax.random.split(jax.random.PRNGKey(0), 4))
    options = {"key": keys, "max_points": 9, "chunk": 10, "temperature": 2.0}
    alone = generate(params, config, config.tokenizer, context, **options)
    found = {}
    for text in sys.argv[1:]:
        mesh = make_mesh(text)
        on_mesh = generate(params, config, config.tokenizer, context, mesh=mesh, **options)
        with jax.set_mesh(mesh):
            key = jax.jit(make_stepper(config).cache, static_argnums=0)(4)[0]["key"]
        found[text] = {
            "tokens": int((on_mesh.tokens != alone.tokens).sum()),
            "points": int(alone.num_points.sum()),
            "log_probs": float(np.abs(on_mesh.token_log_probs - alone.token_log_probs).max()),
            "hidden": float(np.abs(on_mesh.hidden - alone.hidden).max()),
            "shard": key.sharding.shard_shape(key.shape),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
