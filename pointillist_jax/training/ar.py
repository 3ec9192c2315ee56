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
from pointillist_jax.files import UserError
from pointillist_jax.flame import FlameModel
from pointillist_jax.losses.cross_entropy import SlotLoss, marginal_loss, slot_cross_entropy, slot_losses
from pointillist_jax.models.ar import hidden_states, output_tables, param_specs
from pointillist_jax.models.condition import condition_specs, encode_condition, marginal_states
from pointillist_jax.models.layers import init_params as init_from_specs
from pointillist_jax.models.point_step import window_states
from pointillist_jax.sharding import shard_batch
from pointillist_jax.training.state import Batch, Key, LossFn, Params


def init_params(config: ModelConfig) -> Callable[[Key], Params]:
    """key → parameters with their logical axes, for `training.state.init_state`."""
    specs = {"transformer": param_specs(config), "condition": condition_specs(config)}
    return functools.partial(init_from_specs, specs, boxed=True)


def encode(
    params: Params, config: ModelConfig, head: FlameModel, condition: Mapping[str, Any], frozen: Params | None = None
) -> Float[Array, "B S D"]:
    """The context of a batch from its `condition`: portraits and FLAME parameters or stored features.

    Args:
      condition: as windows carry it (`models.condition.encode_condition`).
      frozen: parameters of frozen encoders (`convert.load_frozen_encoders`), where portraits are to be encoded.
    """
    return encode_condition({**params["condition"], **(frozen or {})}, config, head, condition)


def training_window(config: ModelConfig, stride: int = 0) -> dict[str, int]:
    """`window` and `stride`, in tokens, of the windows `make_loss` wants (`data.windows.window_batches`).

    Args:
      stride: tokens from one window to the next; 0 is the window itself.

    Raises:
      UserError: a stride beyond the window, which would leave tokens out.
    """
    reach = config.window_tokens
    if stride > reach:
        raise UserError(f"stride={stride} must be at most the window's {reach} tokens, or tokens would be left out.")
    # A point step predicts whole points, so a window holds the whole point that it predicts last.
    return {"window": reach + (4 if config.step == "point" else 0), "stride": stride or reach}


def make_loss(config: ModelConfig, head: FlameModel, z_loss: float = 0.0) -> LossFn:
    """The next-token loss over a batch of windows (`data.windows`, of `training_window`), as sums.

    `z_loss`: see `TrainConfig`.
    """

    def loss_fn(params: Params, batch: Batch, key: Key):
        del key  # Nothing here is random: the paper names no dropout.
        context = encode(params, config, head, batch["condition"])
        loss = window_loss(params["transformer"], config, batch, context, z_loss)
        extra = {"nll": (jnp.sum(loss.nll), loss.count), **loss.metrics()}
        total = loss.total
        if config.condition_loss:
            marginal = condition_loss(params, config, batch, context)
            extra["marginal"] = marginal, loss.count
            total += config.condition_loss * marginal
        return total, loss.count, extra

    return loss_fn


def condition_loss(params: Params, config: ModelConfig, batch: Batch, context: Float[Array, "B S D"]) -> Array:
    """Σ -log p of a window's tokens by their slots' distributions, which the context alone gives (`condition_loss`).

    Windows are samples of a person's tokens, so over many of them the context learns to tell the whole cloud's
    marginals: where hair is, how long, whether there is a beard.
    """
    tables = output_tables(jax.lax.stop_gradient(params["transformer"]), config)
    targets = jnp.where(batch["mask"], batch["targets"], config.tokenizer.pad)
    # Target t is the token after token t.
    by_slot = tuple(targets[:, (slot - 1) % 4 :: 4] for slot in range(4))
    return marginal_loss(marginal_states(params["condition"], context), by_slot, tables, config.tokenizer.eos)


def window_loss(
    transformer: Params, config: ModelConfig, batch: Batch, context: Float[Array, "B S D"], z_loss: float = 0.0
) -> SlotLoss:
    """The next-token loss of windows, given their contexts. `batch`: tokens, targets, mask, positions [B, T]."""
    tables, eos = output_tables(transformer, config), config.tokenizer.eos
    if config.step == "point":
        states, targets = window_states(transformer, config, batch, context)
        return slot_losses(states, targets, tables, eos, z_loss=z_loss)
    hidden = hidden_states(transformer, config, batch["tokens"], context, batch["positions"])
    targets = jnp.where(batch["mask"], batch["targets"], config.tokenizer.pad)
    return slot_cross_entropy(hidden, targets, tables, eos, z_loss=z_loss)


def make_evaluation(
    loss_fn: LossFn, mesh: Mesh, batches: Callable[[], Iterable[Mapping[str, Any]]], names: tuple[str, ...] = ("",)
) -> Callable[..., dict[str, float] | None]:
    """A function from parameters to mean losses over finite streams of batches; of `training.loop.Evaluate`.

    Args:
      loss_fn: from `make_loss`, without z-loss.
      batches: makes a stream; called with a name for every evaluation.
      names: which streams; the metrics of "exchanged" are `exchanged_loss` and so on, those of "" have no prefix.
    """

    @jax.jit
    def sums(params, batch):
        _, weight, extra = loss_fn(params, batch, jnp.zeros(2, jnp.uint32))
        return extra | {"tokens": (weight, jnp.ones((), weight.dtype))}

    def evaluate(params: Params, stopped: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        found = {}
        for name in names:
            totals: dict[str, np.ndarray] = {}
            for batch in batches(name):
                if stopped():
                    return None
                with jax.set_mesh(mesh):
                    part = jax.tree.map(np.asarray, sums(params, shard_batch(dict(batch), mesh)))
                for key, (value, count) in part.items():
                    totals[key] = totals.get(key, np.zeros(2)) + np.array([value, count], np.float64)
            means = {key: value / max(count, 1) for key, (value, count) in totals.items() if key != "tokens"}
            means["loss"] = means.pop("nll")
            found |= {f"{name}_{key}" if name else key: float(value) for key, value in means.items()}
        return found

    return evaluate
