"""Training steps of both stages on made-up data, to be compiled, counted and timed: `bench_train`, `scaling_study`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from pointillist_jax.configs import ModelConfig, TrainConfig
from pointillist_jax.models.ar import param_specs
from pointillist_jax.models.layers import init_params
from pointillist_jax.sharding import batch_sharding, shard_batch
from pointillist_jax.training.ar import training_window, window_loss
from pointillist_jax.training.state import TrainState, abstract_state, init_state, jit_step, make_optimizer, train_step


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """A jitted train step with what it is to be called on.

    Attributes:
      mesh: that it is laid out on.
      step: (state, batch) → (state, metrics).
      state, batch: abstract, with their shardings.
      make_state, make_batch: the same with values.
      tokens: of a step, or pictures in stage two.
    """

    mesh: Mesh
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
    state: TrainState
    batch: Any
    make_state: Callable[[], TrainState]
    make_batch: Callable[[], Any]
    tokens: int

    def compile(self) -> jax.stages.Compiled:
        with jax.set_mesh(self.mesh):
            return self.step.lower(self.state, self.batch).compile()


def stage_one(
    model: ModelConfig, train: TrainConfig, mesh: Mesh, batch: int, context: int, seed: int = 0
) -> StepProgram:
    """The point transformer's step with given contexts: encoders are left out.

    Args:
      batch: windows of all devices. context: tokens of a condition.
    """

    def loss_fn(params, batch, key):
        del key
        loss = window_loss(params, model, batch, batch["context"])
        return loss.total, loss.count, {}

    optimizer, key = make_optimizer(train), jax.random.PRNGKey(seed)
    init = functools.partial(init_params, param_specs(model), boxed=True)
    abstract, _ = abstract_state(init, optimizer, train, key, mesh)
    shapes = abstract_windows(model, batch, context)
    rows = batch_sharding(mesh)
    step = functools.partial(train_step, loss_fn=loss_fn, optimizer=optimizer, config=train)
    return StepProgram(
        mesh,
        jit_step(step, abstract),
        abstract,
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), shapes),
        lambda: init_state(init, optimizer, train, key, mesh)[0],
        lambda: shard_batch(random_windows(np.random.default_rng(seed), model, batch, context), mesh),
        batch * model.window_tokens,
    )


def random_windows(rng: np.random.Generator, model: ModelConfig, batch: int, context: int) -> dict[str, np.ndarray]:
    """True beginnings of random clouds, as `data.windows` gives them, with a context [B,S,D] float32."""
    length, sequences = training_window(model)["window"], []
    for _ in range(batch):
        points = rng.uniform(-0.25, 0.25, (length // 4 + 1, 3))
        sequences.append(model.tokenizer.encode(points, rng.integers(0, model.num_faces, len(points)))[: length + 1])
    tokens = np.stack(sequences)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "mask": np.ones((batch, length), bool),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length)),
        "context": rng.normal(size=(batch, context, model.width)).astype(np.float32),
    }


def abstract_windows(model: ModelConfig, batch: int, context: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of `random_windows`."""
    length = training_window(model)["window"]
    kinds = {"tokens": np.int32, "targets": np.int32, "mask": bool, "positions": np.int32}
    shapes = {name: jax.ShapeDtypeStruct((batch, length), kind) for name, kind in kinds.items()}
    return shapes | {"context": jax.ShapeDtypeStruct((batch, context, model.width), np.float32)}
