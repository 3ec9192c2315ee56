"""Stage one: the autoregressive model's parameters, loss and evaluation (paper §4.4.1; DESIGN §6, §10).

Parameters are {"transformer": …, "condition": …}. The functions here are pure; `training.loop` runs them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from pointillist_jax.configs import ModelConfig
from pointillist_jax.data.token_store import TokenStore
from pointillist_jax.flame import FlameModel
from pointillist_jax.losses.cross_entropy import slot_cross_entropy
from pointillist_jax.models.ar import hidden_states, output_tables, param_specs
from pointillist_jax.models.condition import condition_specs, encode_condition
from pointillist_jax.models.layers import init_params as init_from_specs
from pointillist_jax.sharding import shard_batch
from pointillist_jax.training.state import Batch, Key, LossFn, Params


def init_params(config: ModelConfig) -> Callable[[Key], Params]:
    """key → parameters with their logical axes, for `training.state.init_state`."""
    specs = {"transformer": param_specs(config), "condition": condition_specs(config)}
    return functools.partial(init_from_specs, specs, boxed=True)


def encode(
    params: Params, config: ModelConfig, head: FlameModel, condition: Mapping[str, Any]
) -> Float[Array, "B S D"]:
    """The context of a batch from its `condition`: portraits and FLAME parameters, as windows carry them."""
    return encode_condition(params["condition"], config, head, condition["portrait"], condition["flame"])


def make_loss(config: ModelConfig, head: FlameModel, z_loss: float = 0.0) -> LossFn:
    """The next-token loss over a batch of windows (`data.windows`), as sums."""

    def loss_fn(params: Params, batch: Batch, key: Key):
        del key  # Nothing here is random: the paper names no dropout.
        transformer = params["transformer"]
        context = encode(params, config, head, batch["condition"])
        hidden = hidden_states(transformer, config, batch["tokens"], context, batch["positions"])
        targets = jnp.where(batch["mask"], batch["targets"], config.tokenizer.pad)
        loss = slot_cross_entropy(
            hidden, targets, output_tables(transformer, config), config.tokenizer.eos, z_loss=z_loss
        )
        nll = jnp.sum(loss.nll)
        return loss.total, loss.count, {"nll": (nll, loss.count), **loss.metrics()}

    return loss_fn


def make_evaluation(
    loss_fn: LossFn, mesh: Mesh, batches: Callable[[], Iterable[Mapping[str, Any]]], names: tuple[str, ...] = ("",)
) -> Callable[[Params], dict[str, float]]:
    """A function from parameters to mean losses over finite streams of batches.

    Args:
      loss_fn: from `make_loss`, without z-loss.
      batches: makes a stream; called with a name for every evaluation.
      names: which streams; the metrics of "shuffled" are `shuffled_loss` and so on, those of "" have no prefix.
    """

    @jax.jit
    def sums(params, batch):
        _, weight, extra = loss_fn(params, batch, jnp.zeros(2, jnp.uint32))
        return extra | {"tokens": (weight, jnp.ones((), weight.dtype))}

    def evaluate(params: Params) -> dict[str, float]:
        found = {}
        for name in names:
            totals: dict[str, np.ndarray] = {}
            for batch in batches(name):
                with jax.set_mesh(mesh):
                    part = jax.tree.map(np.asarray, sums(params, shard_batch(dict(batch), mesh)))
                for key, (value, count) in part.items():
                    totals[key] = totals.get(key, np.zeros(2)) + np.array([value, count], np.float64)
            means = {key: value / max(count, 1) for key, (value, count) in totals.items() if key != "tokens"}
            means["loss"] = means.pop("nll")
            found |= {f"{name}_{key}" if name else key: float(value) for key, value in means.items()}
        return found

    return evaluate


def shuffled_conditions(store: TokenStore, subjects: tuple[str, ...]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A function that gives every row of a batch the condition of the next of `subjects`: a test of its use."""
    indices = [store.index(name) for name in subjects]
    following = dict(zip(indices, indices[1:] + indices[:1], strict=True))

    def change(batch: Mapping[str, Any]) -> dict[str, Any]:
        rows = [following.get(int(i)) for i in batch["subject"]]
        conditions = [store.condition(indices[0] if row is None else row) for row in rows]
        kept = batch["condition"]
        condition = {}
        if "portrait" in kept:
            condition["portrait"] = np.stack([c["portrait"] for c in conditions])
        if "flame" in kept:
            condition["flame"] = {name: np.stack([c["flame"][name] for c in conditions]) for name in kept["flame"]}
        return {**batch, "condition": condition}

    return change
