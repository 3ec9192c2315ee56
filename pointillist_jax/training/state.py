"""Train state, optimiser, and the one step both stages share (DESIGN §10).

Parameters may carry Linen's axis names (boxes) while they are abstract; a live state holds plain arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from jax.tree_util import Partial
from jaxtyping import Array, Int, UInt32

from pointillist_jax.configs import TrainConfig
from pointillist_jax.sharding import shardings_for
from renderer_bridge.varying import vary

Params = Any
Batch = dict[str, Array]
Key = UInt32[Array, "2"]
# (params, batch, key) → (summed loss, weight it is a sum over, further sums to be divided by their own weights).
# Sums, not means: micro-batches and devices with different numbers of tokens then add up to exactly the whole batch.
# Other arrays that lie on the mesh (frozen networks) are those of a `jax.tree_util.Partial`: inside a `shard_map` they
# could not be read by name.
LossFn = Callable[[Params, Batch, Key], tuple[Array, Array, dict[str, tuple[Array, Array]]]]


@flax.struct.dataclass
class TrainState:
    """Everything a step changes.

    Attributes:
      step: [] int32, steps taken.
      params: trainable parameters, float32.
      opt_state: of the optimiser.
      ema: running average of `params`, or None.
      key: the run's key; step n uses `fold_in(key, n)`.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState
    ema: Params | None
    key: Key

    @property
    def averaged_params(self) -> Params:
        """The parameters to evaluate and to keep: the average where there is one."""
        return self.params if self.ema is None else self.ema


def make_schedule(config: TrainConfig) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then constant or a cosine to a tenth."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        after = optax.cosine_decay_schedule(peak, max(config.steps - warmup, 1), alpha=0.1)
    # The first step already moves: step 0 has rate peak / warmup.
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    joined = optax.join_schedules([rise, after], [warmup])
    # An int32 count divided by an int is float32 even where everything else is float64.
    return lambda count: joined(jnp.asarray(count, jnp.result_type(float)))


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW with clipping; weight decay on matrices and tables only, never on norms, biases and single rows."""

    def decayed(params):
        def one(path, value):
            # The last key by name: a boxed parameter has its box as a further step.
            name = next((str(k.key) for k in reversed(path) if isinstance(k, jax.tree_util.DictKey)), "")
            # Encoders number theirs: scale1, scale2.
            return value.ndim >= 2 and not name.rstrip("0123456789").endswith(("scale", "bias", "norm"))

        return jax.tree_util.tree_map_with_path(one, params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.adamw(make_schedule(config), config.b1, config.b2, weight_decay=config.weight_decay, mask=decayed),
    )


def init_state(
    init_params: Callable[[Key], Params],
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    key: Key,
    mesh: Mesh,
) -> tuple[TrainState, TrainState]:
    """A new state, laid out on the mesh without ever being whole on one device.

    Args:
      init_params: key → parameters, boxed with their logical axes or plain.

    Returns:
      The state and its shardings (a TrainState of NamedShardings).
    """
    _, shardings = abstract_state(init_params, optimizer, config, key, mesh)
    make = lambda key: nn.unbox(_new_state(init_params, optimizer, config, key))  # noqa: E731
    with jax.set_mesh(mesh):
        # It runs once: LLVM's optimisation would cost four times what it compiles in without.
        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        return jax.jit(make, out_shardings=shardings, compiler_options=options)(key), shardings


def abstract_state(init_params, optimizer, config: TrainConfig, key, mesh: Mesh) -> tuple[TrainState, TrainState]:
    """The state as ShapeDtypeStructs that carry their shardings, and the shardings: what a restore needs."""
    boxed = jax.eval_shape(lambda key: _new_state(init_params, optimizer, config, key), key)
    shardings = shardings_for(boxed, mesh)
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.unbox(boxed), shardings)
    return shapes, shardings


def _new_state(init_params, optimizer, config: TrainConfig, key) -> TrainState:
    init_key, run_key = jax.random.split(key)
    params = init_params(init_key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if config.ema_decay else None,
        key=run_key,
    )


def begin_with(fresh: TrainState, params: Params) -> TrainState:
    """A new state with other parameters than those it was initialised with, laid out as those.

    Args:
      params: arrays of the same tree and shapes, also NumPy.
    """
    place = lambda new, old: new if new is old else jax.device_put(np.asarray(new, old.dtype), old.sharding)  # noqa: E731
    params = jax.tree.map(place, params, fresh.params)
    return fresh.replace(params=params, ema=fresh.ema and jax.tree.map(jnp.copy, params))


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimiser step. A step whose loss or gradient is not finite changes nothing but the step counter.

    Parameters that it leaves not finite, or whose norm is beyond float32, are told by `finite` alone: to undo them
    would take a second pass over all of them. Nothing may be saved then.

    Args:
      state: before the step; donate it.
      batch: arrays [B, ...].

    Returns:
      The new state, and scalars: `loss`, `grad_norm`, `param_norm` (after the step), `finite` (all three are), and what
      `loss_fn` adds.
    """
    key = jax.random.fold_in(state.key, state.step)
    loss, grads, extra = _gradients(loss_fn, state.params, batch, key, config.accumulate)
    norm = _norm(grads)
    healthy = jnp.isfinite(loss) & jnp.isfinite(norm)

    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        # A young average would be mostly initialisation: its memory grows with the run.
        decay = jnp.minimum(config.ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)

    new = TrainState(state.step, params, opt_state, ema, state.key)
    new = jax.tree.map(lambda new, old: jnp.where(healthy, new, old), new, state)
    param_norm = _norm(new.params)
    finite = healthy & jnp.isfinite(param_norm)
    metrics = {"loss": loss, "grad_norm": norm, "param_norm": param_norm, "finite": finite}
    return new.replace(step=state.step + 1), metrics | extra


def jit_step(step: Callable[..., tuple[TrainState, Any]], state: TrainState, **options: Any) -> Callable:
    """`step` (state, … → state, …) compiled for the layout of `state`, which is donated; `options`: of `jax.jit`.

    The new state is asked to lie as the old one: XLA would choose a layout of its own, and the second step be compiled
    anew for it.
    """
    layout = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(
        step, donate_argnums=0, out_shardings=(layout, None), compiler_options=_concurrent_scheduler(), **options
    )


@functools.cache
def _concurrent_scheduler() -> dict[str, bool] | None:
    """XLA's CPU option to order a program for parallel execution rather than least memory: 4 % of a step."""
    options = {"xla_cpu_enable_concurrency_optimized_scheduler": True}
    if jax.default_backend() != "cpu":
        return None
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return None  # Another jaxlib, without the option.
    return options


def _norm(tree) -> Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))


def _gradients(loss_fn: LossFn, params, batch: Batch, key, parts: int):
    """Mean loss, its gradient, and the other means, over the whole batch in `parts` passes."""

    def one(loss_fn, params, part, key):
        def summed(params):
            loss, weight, extra = loss_fn(params, part, key)
            return loss, (weight, extra)

        (loss, (weight, extra)), grads = jax.value_and_grad(summed, has_aux=True)(params)
        return (loss, grads), weight, extra

    run = one if parts == 1 else functools.partial(_in_parts, one, parts)
    total, weight, extra = run(loss_fn, params, batch, key)
    # Times the inverse: XLA's CPU compiler writes quotients of whole gradients to memory, products it fuses.
    inverse = 1 / jnp.maximum(weight, 1e-9)
    loss, grads = jax.tree.map(lambda x: x * inverse.astype(x.dtype), total)
    means = {name: value / jnp.maximum(count, 1e-9) for name, (value, count) in extra.items()}
    return loss, grads, means


def _in_parts(one: Callable, parts: int, loss_fn: LossFn, params, batch: Batch, key):
    """Σ of `one(loss_fn, params, part, key)` over parts of the batch, one after another.

    Where devices only share out examples, each adds up what its own give, and the devices' sums are added once:
    gradients would cross the network with every part else. (Slices of parameters have to, for want of room.)
    """
    mesh, examples = jax.sharding.get_abstract_mesh(), jax.tree.leaves(batch)[0].shape[0]
    alike = not mesh.empty and mesh.size == mesh.shape["data"] > 1 and examples % (mesh.size * parts) == 0
    axes = frozenset({"data"} if alike else ())

    def local(loss_fn, params, batch, key):
        # Interleaved, so that every device of a sharded batch has its share of every part.
        split = jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)
        keys = jax.random.split(key, parts)
        params = vary(params, axes)  # Gradients then are a device's own.
        run = functools.partial(one, loss_fn, params)
        shapes = jax.eval_shape(run, jax.tree.map(lambda x: x[0], split), keys[0])
        zeros = vary(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), axes)
        add = lambda total, part: (jax.tree.map(jnp.add, total, run(*part)), None)  # noqa: E731
        total, _ = jax.lax.scan(add, zeros, (split, keys))
        return jax.lax.psum(total, tuple(axes)) if axes else total

    if not axes:
        return local(loss_fn, params, batch, key)
    whole, cut = PartitionSpec(), PartitionSpec("data")
    held = loss_fn if isinstance(loss_fn, Partial) else Partial(loss_fn)
    mapped = jax.shard_map(local, in_specs=(whole, whole, cut, whole), out_specs=whole)
    return mapped(held, params, batch, key)
