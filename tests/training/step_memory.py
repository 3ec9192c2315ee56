"""One real training step in a process of its own, and the memory it took; prints JSON.

    python -m tests.training.step_memory <window> [<batch>]

The tiny preset at another window, on stored features. `largest` counts the elements of the compiled program's
largest array, `before_gib` is what the process had taken when everything was compiled.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import resource
import sys

import jax
import jax.numpy as jnp
import numpy as np

from pointillist_jax.configs import ModelConfig, TrainConfig, preset
from pointillist_jax.flame import open_head
from pointillist_jax.models.condition import feature_shapes
from pointillist_jax.sharding import make_mesh, shard_batch
from pointillist_jax.training import ar
from pointillist_jax.training.state import abstract_state, init_state, jit_step, make_optimizer, train_step

TRAIN = TrainConfig()


def make_batch(config: ModelConfig, rng: np.random.Generator, batch: int = 1) -> dict:
    """A window of random points, full to the end."""
    tokenizer, T = config.tokenizer, config.window
    points = rng.integers(0, config.bins, (batch, T // 4 + 1, 3))
    bindings = rng.integers(config.bins, tokenizer.bos, (batch, T // 4 + 1, 1))
    tokens = np.concatenate([points, bindings], -1).reshape(batch, -1).astype(np.int32)
    features = {k: rng.normal(size=(batch, *s)).astype(np.float16) for k, s in feature_shapes(config).items()}
    return {
        "tokens": tokens[:, :T],
        "targets": tokens[:, 1 : T + 1],
        "positions": np.tile(np.arange(T, dtype=np.int32), (batch, 1)),
        "mask": np.ones((batch, T), bool),
        "condition": {"features": features},
    }


def config_at(window: int, **changes) -> ModelConfig:
    """The tiny preset at another window, with stored features and the coarse head's vocabulary."""
    model = preset("tiny").model
    encoder = dataclasses.replace(model.encoder, frozen=True)
    faces = open_head("coarse").num_faces
    return dataclasses.replace(model, window=window, encoder=encoder, num_faces=faces, **changes)


def lower(config: ModelConfig, state, batch, mesh):
    """The train step of arrays or of their shapes, lowered."""
    loss_fn, optimizer = ar.make_loss(config, open_head("coarse")), make_optimizer(TRAIN)
    step = functools.partial(train_step, loss_fn=loss_fn, optimizer=optimizer, config=TRAIN)
    with jax.set_mesh(mesh):
        return jit_step(step, state).lower(state, batch)


def lower_abstract(config: ModelConfig):
    """From shapes alone: nothing of the state's or the batch's size is made."""
    mesh = make_mesh("", jax.devices()[:1])
    state, _ = abstract_state(ar.init_params(config), make_optimizer(TRAIN), TRAIN, jax.random.PRNGKey(0), mesh)
    batch = make_batch(config, np.random.default_rng(0))
    return lower(config, state, jax.eval_shape(lambda: jax.tree.map(jnp.asarray, batch)), mesh)


def largest(text: str) -> int:
    """Elements of the largest array in a program's text, StableHLO (tensor<2x3xf32>) or HLO (f32[2,3])."""
    shapes = re.findall(r"tensor<((?:\d+x)+)[a-z]", text) + re.findall(r"\b[a-z]\w*\[([\d,]+)\]", text)
    return max(int(np.prod([int(n) for n in re.findall(r"\d+", shape)], dtype=np.float64)) for shape in shapes)


def main() -> None:
    config, mesh = config_at(int(sys.argv[1]), attention="chunked"), make_mesh("")
    size = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    state, _ = init_state(ar.init_params(config), make_optimizer(TRAIN), TRAIN, jax.random.PRNGKey(0), mesh)
    batch = shard_batch(make_batch(config, np.random.default_rng(0), size), mesh)
    compiled = lower(config, state, batch, mesh).compile()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with jax.set_mesh(mesh):
        _, metrics = compiled(state, batch)
    found = {
        "window": config.window,
        "batch": size,
        "loss": float(metrics["loss"]),
        "largest": largest(compiled.as_text()),
        "temporaries_gib": compiled.memory_analysis().temp_size_in_bytes / 2**30,
        "before_gib": before / 2**20,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
