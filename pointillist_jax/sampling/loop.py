"""The compiled loop: points of a batch of rows, in chunks, on any stepper (DESIGN §6).

A chunk is one `while_loop` whose body makes one point of every row; its state is donated, so the caches are written in
place from the first chunk to the last. Rows begin at different times (`admit` puts a new subject into a row) and share
nothing: what a row draws depends on its key, its subject and its own points only.

Letters: B rows, D width, S context, Q points of a chunk.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from pointillist_jax.models.ar import accumulator
from pointillist_jax.models.layers import Params
from pointillist_jax.sampling import choose
from pointillist_jax.sampling.steppers import Stepper
from pointillist_jax.sharding import constrain
from pointillist_jax.tokens import PointTokenizer


@dataclasses.dataclass(frozen=True)
class Program:
    """What a compiled chunk depends on.

    Attributes:
      stepper: of the model.
      tokenizer: its grammar.
      points: Q, most points of a chunk.
      constrain: whether the grammar masks.
      keep_hidden: whether chunks carry the hidden states.
      fixed_trips: a scan of exactly Q steps instead of a loop that ends with its rows (GPU command buffers may want a
        known trip count; `experiments/bench_decode.py` compares them).
    """

    stepper: Stepper
    tokenizer: PointTokenizer
    points: int
    constrain: bool = True
    keep_hidden: bool = True
    fixed_trips: bool = False


class SamplingState(NamedTuple):
    """Everything that lives from point to point.

    Attributes:
      age: [B] points behind each row, S S S S as one.
      hidden: [B, D] of the stepper.
      previous: [B, 4] last point (x, y, z, face).
      num_points: [B] points made.
      max_points: [B] after which a row ends.
      done: [B] whether the row has ended: by E, or by max_points. An idle row is done.
      keys: [B, 2] of each row.
      cache, memory: of the stepper.
    """

    age: Int[Array, "B"]
    hidden: Float[Array, "B D"]
    previous: Int[Array, "B 4"]
    num_points: Int[Array, "B"]
    max_points: Int[Array, "B"]
    done: Bool[Array, "B"]
    keys: UInt32[Array, "B 2"]
    cache: Any
    memory: Any


class Chunk(NamedTuple):
    """What a chunk made; entries of steps it did not run are zero. Class C of an x slot is E (`choose.class_counts`).

    Attributes:
      steps: [] steps run, at most Q.
      classes, log_probs, masked_mass: [B, Q, 4], as `choose.Draw`.
      hidden: [B, Q, 4, D], or None.
    """

    steps: Int[Array, ""]
    classes: Int[Array, "B Q 4"]
    log_probs: Float[Array, "B Q 4"]
    masked_mass: Float[Array, "B Q 4"]
    hidden: Float[Array, "B Q 4 D"] | None


@functools.partial(jax.jit, static_argnums=0)
def make_weights(stepper: Stepper, params: Params) -> Any:
    return stepper.weights(params)


@functools.partial(jax.jit, static_argnums=0)
def start(
    stepper: Stepper,
    weights: Any,
    context: Float[Array, "B S D"],
    context_lengths: Int[Array, "B"],
    keys: UInt32[Array, "B 2"],
    max_points: Int[Array, "B"],
) -> SamplingState:
    """Rows before S S S S. A row with max_points < 0 stands idle until a subject is admitted."""
    batch = context.shape[0]
    zeros = jnp.zeros(batch, jnp.int32)
    return SamplingState(
        age=zeros,
        hidden=constrain(jnp.zeros((batch, stepper.config.width), stepper.config.dtype), "batch", None),
        previous=jnp.zeros((batch, 4), jnp.int32),
        num_points=zeros,
        max_points=max_points.astype(jnp.int32),
        done=max_points < 0,
        keys=keys,
        cache=stepper.cache(batch),
        memory=stepper.memory(weights, context, context_lengths),
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def admit(
    stepper: Stepper,
    weights: Any,
    state: SamplingState,
    row: Int[Array, ""],
    context: Float[Array, "S D"],
    context_length: Int[Array, ""],
    key: UInt32[Array, "2"],
    max_points: Int[Array, ""],
) -> SamplingState:
    """Gives a row to a new subject. Its old cache stays where it is: the new row is too young to see it."""
    memory = stepper.memory(weights, context[None], context_length[None])
    return state._replace(
        age=state.age.at[row].set(0),
        hidden=state.hidden.at[row].set(0),
        previous=state.previous.at[row].set(0),
        num_points=state.num_points.at[row].set(0),
        max_points=state.max_points.at[row].set(max_points),
        done=state.done.at[row].set(False),
        keys=state.keys.at[row].set(key),
        memory=jax.tree.map(lambda all_, one: all_.at[row].set(one[0]), state.memory, memory),
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def run_chunk(
    program: Program,
    weights: Any,
    state: SamplingState,
    filters: choose.Filters,
    forced: Int[Array, "B Q 4"],
    stop_at: Int[Array, ""],
) -> tuple[SamplingState, Chunk]:
    """Up to Q points of every row; ends early when `stop_at` rows are done.

    Args:
      forced: classes to take instead of drawing, -1 for none, by step of the chunk.
    """
    batch, Q = forced.shape[:2]
    wide = accumulator(program.stepper.config)
    D = program.stepper.config.width
    empty = Chunk(
        steps=jnp.zeros((), jnp.int32),
        classes=jnp.zeros((batch, Q, 4), jnp.int32),
        log_probs=jnp.zeros((batch, Q, 4), wide),
        masked_mass=jnp.zeros((batch, Q, 4), wide),
        hidden=jnp.zeros((batch, Q, 4, D), state.hidden.dtype) if program.keep_hidden else None,
    )

    def body(carry):
        state, chunk = carry
        state, made = make_point(program, weights, state, filters, forced[:, chunk.steps])
        at = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=chunk.steps, axis=1)
        record = [None if old is None else at(old, new[:, None]) for old, new in zip(chunk[1:], made, strict=True)]
        return state, Chunk(chunk.steps + 1, *record)

    def unfinished(carry):
        state, chunk = carry
        return (chunk.steps < Q) & (jnp.sum(state.done) < stop_at)

    if program.fixed_trips:
        return jax.lax.fori_loop(0, Q, lambda _, carry: body(carry), (state, empty))
    return jax.lax.while_loop(unfinished, body, (state, empty))


def make_point(
    program: Program, weights: Any, state: SamplingState, filters: choose.Filters, forced: Int[Array, "B 4"]
) -> tuple[SamplingState, tuple[Array, Array, Array, Array | None]]:
    """One step of every row: S S S S in its first, then a point, or E."""
    tokenizer = program.tokenizer
    counts = choose.class_counts(tokenizer)
    with jax.named_scope("noise"):
        waits = choose.waiting_times(state.keys, state.age, sum(counts), accumulator(program.stepper.config))
    draws: list[choose.Draw] = []

    def choose_class(slot: int, logits: Array) -> Array:
        with jax.named_scope("choose"):
            current = [d.value for d in draws[:3]] + [jnp.zeros_like(state.age)] * (3 - len(draws))
            legal = choose.legal_classes(tokenizer, slot, state.previous, jnp.stack(current, axis=-1))
            first = sum(counts[:slot])
            noise = waits[:, first : first + counts[slot]]
            draws.append(choose.draw(logits, legal, noise, filters, forced[:, slot], program.constrain))
            return draws[-1].value

    cache, hidden, states = program.stepper.point(
        weights, state.cache, state.memory, state.hidden, state.age, choose_class
    )
    value, log_prob, masked = (jnp.stack(x, axis=-1) for x in zip(*draws, strict=True))
    # A row that feeds S S S S makes no point; one that draws E ends without one.
    ends = (value[:, 0] == tokenizer.bins) & (state.age > 0)
    makes = (state.age > 0) & ~ends & ~state.done
    num_points = state.num_points + makes
    return state._replace(
        age=state.age + 1,
        hidden=hidden,
        previous=jnp.where(makes[:, None], value, state.previous),
        num_points=num_points,
        done=state.done | ends | (num_points >= state.max_points),
        cache=cache,
    ), (value, log_prob, masked, states if program.keep_hidden else None)
