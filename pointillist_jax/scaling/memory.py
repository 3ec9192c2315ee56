"""Bytes of one device in a step of stage one, from shapes alone: no compiler is asked.

state      exact: parameters, moments, average, as they lie on the mesh;
kept       what the backward pass needs of the device's windows, by the shapes of the residuals of the model that a
           device runs: its share of heads, feed-forward width, classes and positions;
the rest   gradients, gathered weights, logits, buffers: `FACTORS` times known sizes. The factors are fitted to what
           XLA's CPU compiler reports on a few meshes; `experiments.scaling_study --mode=predict` prints the error on
           the others.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh
from scipy.optimize import nnls

from pointillist_jax.configs import ModelConfig, TrainConfig
from pointillist_jax.models.ar import param_specs
from pointillist_jax.models.condition import context_length
from pointillist_jax.models.layers import count_parameters, init_params
from pointillist_jax.sharding import abstract_mesh
from pointillist_jax.training.ar import training_window, window_loss
from pointillist_jax.training.state import abstract_state, make_optimizer


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device, and the sizes that they are predicted from.

    Attributes:
      state: of the train state, which lives between steps. batch: of its part of the batch.
      kept: residuals of the device's windows (of one micro-batch).
      gradients: of its part of the parameters. whole: of the parameters that its products need, gathered.
      table: the classifiers' gradients before they are summed.
    """

    state: int
    batch: int
    kept: int
    gradients: int
    whole: int
    table: int

    def temporary(self, factors: Mapping[str, float]) -> float:
        """Predicted: what a step needs beside its arguments."""
        return sum(factor * getattr(self, name) for name, factor in factors.items())


SIZES = ("kept", "gradients", "whole", "table")  # Of `Memory`, that `temporary` is made of.


def fit_factors(memories: Sequence[Memory], temporaries: Sequence[float]) -> dict[str, float]:
    """The factors, none negative, whose predictions have the least relative errors for these compiled programs."""
    sizes = np.array([[getattr(memory, name) for name in SIZES] for memory in memories], float)
    found, _ = nnls(sizes / np.asarray(temporaries, float)[:, None], np.ones(len(sizes)))
    return dict(zip(SIZES, map(float, found), strict=True))


def stage_one_memory(model: ModelConfig, train: TrainConfig, mesh: Mapping[str, int], batch: int) -> Memory:
    """Of the transformer's step on a mesh, contexts given.

    Args:
      mesh: sizes of data, fsdp, tensor, context. batch: windows of all devices.
    """
    abstract = abstract_mesh(mesh)
    init = functools.partial(init_params, param_specs(model), boxed=True)
    state, _ = abstract_state(init, make_optimizer(train), train, jax.random.PRNGKey(0), abstract)
    windows = batch // (abstract.shape["data"] * abstract.shape["fsdp"])
    local = device_model(model, abstract)
    length, context = training_window(model)["window"], context_length(model)
    micro = max(windows // train.accumulate, 1)
    each = residual_bytes(local, 2) - residual_bytes(local, 1)
    params = jax.tree.leaves(state.params)
    rows = model.tokenizer.padded_vocab_size * model.width / abstract.shape["tensor"]
    slots = 4 if model.loss_support == "vocab" else 4 / 3
    return Memory(
        state=sum(map(_local_bytes, jax.tree.leaves(state))),
        batch=windows * (13 * length + 4 * context * model.width),
        kept=micro * each,
        gradients=sum(map(_local_bytes, params)),
        whole=4 * count_parameters(param_specs(model)) // abstract.shape["tensor"],
        table=int(4 * slots * rows),
    )


def device_model(model: ModelConfig, mesh: AbstractMesh) -> ModelConfig:
    """The model whose residuals are those that one device keeps: its share of what the mesh cuts."""
    tensor, context = mesh.shape["tensor"], mesh.shape["context"]

    def share(size: int, parts: int) -> int:
        return size // parts if size % parts == 0 else size

    kv_heads = share(model.num_kv_heads, tensor)
    return dataclasses.replace(
        model,
        heads=share(model.heads, tensor),
        kv_heads=kv_heads,
        mlp_width=share(model.mlp_width, tensor),
        window=share(model.window, context),
    )


def residual_bytes(model: ModelConfig, windows: int) -> int:
    """Bytes between forward and backward of the loss of so many windows, the parameters it needs again included."""
    length = training_window(model)["window"]
    params = jax.eval_shape(lambda key: init_params(param_specs(model), key), jax.random.PRNGKey(0))
    batch: dict[str, Any] = {
        name: jax.ShapeDtypeStruct((windows, length), jnp.int32) for name in ("tokens", "targets", "positions")
    }
    batch["mask"] = jax.ShapeDtypeStruct((windows, length), bool)
    contexts = jax.ShapeDtypeStruct((windows, context_length(model), model.width), jnp.float32)

    def pullback(params, batch, context):
        return jax.vjp(lambda p, c: window_loss(p, model, batch, c).total, params, context)[1]

    kept = jax.tree.leaves(jax.eval_shape(pullback, params, batch, contexts))
    return sum(x.size * x.dtype.itemsize for x in kept)


def _local_bytes(x: jax.ShapeDtypeStruct) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
