"""Stage one's gradients and optimiser steps: the same weights, the same batches, AdamW on both sides.

The JAX side is the training's own step (`training.state.train_step`), the torch side `torch_reference.training`'s.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from torch import Tensor, nn

from experiments.torch_parity.rows import Row, compare
from experiments.torch_parity.taps import tensors
from experiments.torch_reference.point_transformer import PointTransformer
from experiments.torch_reference.training import Optimizer, StageOne, stage_one_step
from pointillist_jax.configs import ModelConfig, TrainConfig
from pointillist_jax.convert.reference import ar_to_torch, transformer_to_torch
from pointillist_jax.flame import FlameModel
from pointillist_jax.training.ar import make_loss, window_loss
from pointillist_jax.training.state import TrainState, make_optimizer, train_step

ToTorch = Callable[[Any], dict[str, np.ndarray]]


class Steps(NamedTuple):
    """What N steps left on one side.

    Attributes:
      losses: [N] before each step.
      params, mu, nu: state dicts by torch's names.
    """

    losses: list[float]
    params: Mapping[str, Any]
    mu: Mapping[str, Any]
    nu: Mapping[str, Any]


def gradient_rows(
    params: Any, twin: PointTransformer, config: ModelConfig, batch: Mapping[str, Any], bounds: Mapping[str, float]
) -> list[Row]:
    """The loss of the whole forward, and its gradient by every parameter and by the context."""

    @jax.jit
    def gradients(params, context):
        return jax.value_and_grad(lambda p, c: window_loss(p, config, batch, c).mean, argnums=(0, 1))(params, context)

    loss, (expected, d_context) = gradients(params, jnp.asarray(batch["context"]))
    given = tensors(dict(batch))
    context = given["context"].requires_grad_()
    twin.zero_grad(set_to_none=True)
    found = transformer_loss(twin, given)
    found.backward()
    rows = [compare("models", "loss", loss, found, bounds["models"])]
    by_name = transformer_to_torch(expected, config)
    own = {name: p.grad for name, p in twin.named_parameters()}
    for name, value in by_name.items():
        rows.append(compare("gradients", name, value, own[name], bounds["gradients"]))
    rows.append(compare("gradients", "context", d_context, context.grad, bounds["gradients"]))
    return rows


def stage_one_rows(
    params: Any,
    model: StageOne,
    config: ModelConfig,
    head: FlameModel,
    train: TrainConfig,
    batches: Sequence[Mapping[str, Any]],
    bounds: Mapping[str, float],
) -> tuple[list[Row], list[float]]:
    """N steps, one per batch: the losses, and parameters and moments after the last one.

    Args:
      params: {"transformer", "condition"}; `model` has the same, and is trained.
      batches: windows with their `condition`.

    Returns:
      The rows, and the relative difference of the loss at every step.
    """
    to_torch = functools.partial(ar_to_torch, config=config)
    ours = jax_steps(params, make_loss(config, head, train.z_loss), train, batches, to_torch)
    optimizer = Optimizer(model, train)
    losses = [float(stage_one_step(model, optimizer, tensors(dict(batch))).loss) for batch in batches]
    theirs = Steps(losses, dict(model.named_parameters()), *moments(model, optimizer))
    return step_rows("stage one", ours, theirs, bounds)


def step_rows(stage: str, ours: Steps, theirs: Steps, bounds: Mapping[str, float]) -> tuple[list[Row], list[float]]:
    """Two runs of the same steps: the rows, and the relative difference of the loss at every step."""
    drift = [abs(a - b) / abs(a) for a, b in zip(ours.losses, theirs.losses, strict=True)]
    rows = [compare("steps", f"{stage}: losses of {len(drift)} steps", ours.losses, theirs.losses, bounds["losses"])]
    for kind in ("params", "mu", "nu"):
        one, other = getattr(ours, kind), getattr(theirs, kind)
        each = [compare("steps", f"{stage}: {kind} {name}", one[name], other[name], bounds["state"]) for name in one]
        rows.append(max(each, key=lambda row: row.max_rel if row.max_rel == row.max_rel else np.inf))
    return rows, drift


def jax_steps(params: Any, loss_fn, train: TrainConfig, batches: Sequence[Mapping[str, Any]], to_torch: ToTorch):
    """`Steps` of the project's own train step."""
    optimizer = make_optimizer(train)
    # The step donates nothing here: the caller's parameters stay its own.
    step = jax.jit(functools.partial(train_step, loss_fn=loss_fn, optimizer=optimizer, config=train))
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), None, jax.random.PRNGKey(0))
    losses = []
    for batch in batches:
        state, metrics = step(state, dict(batch))
        losses.append(float(metrics["loss"]))
    mu, nu = (optax.tree_utils.tree_get(state.opt_state, name) for name in ("mu", "nu"))
    return Steps(losses, to_torch(state.params), to_torch(mu), to_torch(nu))


def moments(module: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """First and second moments by the names of the parameters."""
    state = {name: optimizer.adamw.state[p] for name, p in module.named_parameters()}
    return tuple({name: s[key] for name, s in state.items()} for key in ("exp_avg", "exp_avg_sq"))


def transformer_loss(twin: PointTransformer, batch: Mapping[str, Tensor]) -> Tensor:
    """The twin's mean next-token loss of a window."""
    return twin.loss(*(batch[name] for name in ("tokens", "targets", "context", "positions", "mask")))
