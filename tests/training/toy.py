"""A small sharded regression that the runtime is tested with."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np

from pointillist_jax.configs import TrainConfig
from pointillist_jax.sharding import make_mesh
from pointillist_jax.training.checkpoints import Checkpoints
from pointillist_jax.training.loop import resume_or_init, train
from pointillist_jax.training.state import make_optimizer, make_schedule, train_step

CONFIG = TrainConfig(
    steps=12, batch_size=8, learning_rate=1e-2, warmup_steps=3, log_every=1, eval_every=5, checkpoint_every=4
)


class Net(nn.Module):
    """y = W₂ tanh(W₁ x), with logical axes."""

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal(0.3)
        w1 = self.param("w1", nn.with_logical_partitioning(init, ("embed", "mlp")), (4, 16))
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), (16,))
        w2 = self.param("w2", nn.with_logical_partitioning(init, ("mlp", "embed")), (16, 4))
        return (jnp.tanh(x @ w1) * scale) @ w2


def init_params(key):
    return Net().init(key, jnp.zeros((1, 4)))["params"]


def loss_fn(params, batch, key):
    del key
    error = jnp.sum((Net().apply({"params": params}, batch["x"]) - batch["y"]) ** 2, axis=-1)
    weight = batch["weight"]
    return jnp.sum(error * weight), jnp.sum(weight), {"worst": (jnp.max(error), jnp.float32(1))}


class Source:
    """40 examples, weighted unevenly, as windows with pads are."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        rng = np.random.default_rng(int(index))
        x = rng.normal(size=4).astype(np.float32)
        return {"x": x, "y": np.sin(x), "weight": np.float32(rng.uniform(0.2, 1))}


def make_stream(batch_size: int, seed: int = 0):
    return iter(grain.MapDataset.source(Source()).seed(seed).shuffle().repeat().batch(batch_size).to_iter_dataset())


@functools.cache
def make_step(config: TrainConfig):
    step = functools.partial(train_step, loss_fn=loss_fn, optimizer=make_optimizer(config), config=config)
    return jax.jit(step, donate_argnums=0)


def run(workdir: Path, config: TrainConfig = CONFIG, mesh: str = "", stream=None, **kwargs):
    """Trains, or goes on, in `workdir`; returns the last state and what stopped it."""
    mesh, key = make_mesh(mesh), jax.random.PRNGKey(0)
    stream = make_stream(config.batch_size) if stream is None else stream
    with Checkpoints(workdir, config.keep) as checkpoints:
        state, _ = resume_or_init(checkpoints, init_params, make_optimizer(config), config, key, mesh, stream)
        return train(
            state,
            make_step(dataclasses.replace(config, steps=CONFIG.steps)),  # One program for runs of any length.
            stream,
            config=config,
            mesh=mesh,
            workdir=workdir,
            checkpoints=checkpoints,
            meta={"config": "toy"},
            schedule=make_schedule(config),
            bar=False,
            **kwargs,
        )
