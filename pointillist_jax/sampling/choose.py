"""How a token is drawn from a slot's logits: grammar, temperature, top-k, top-p (DESIGN §5, §6).

Letters: B batch, C classes of a slot.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from pointillist_jax.tokens import GrammarState, PointTokenizer


class Draw(NamedTuple):
    """One token of every row.

    Attributes:
      value: [B] class.
      log_prob: [B] nats, of the model renormalised over the legal classes (over all of them if unconstrained); it does
        not depend on temperature, top-k and top-p.
      masked_mass: [B] probability that the model gave to classes the grammar forbids.
    """

    value: Int[Array, "B"]
    log_prob: Float[Array, "B"]
    masked_mass: Float[Array, "B"]


class Filters(NamedTuple):
    """Traced numbers; `None` leaves a filter out of the program. `temperature` 0 takes the likeliest class."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""] | None
    top_p: Float[Array, ""] | None


def class_counts(tokenizer: PointTokenizer) -> tuple[int, int, int, int]:
    """Classes of the x (coordinates, then E), y, z and b slots."""
    return tokenizer.bins + 1, tokenizer.bins, tokenizer.bins, tokenizer.num_faces


def legal_classes(
    tokenizer: PointTokenizer, slot: int, previous: Int[Array, "*b 4"], current: Int[Array, "*b 3"]
) -> Bool[Array, "*b C"]:
    """The grammar of one slot over its own classes, before the first E."""
    slots = jnp.full(previous.shape[:-1], slot, jnp.int32)
    low, _, eos_legal = tokenizer.legal_range(GrammarState(slots, previous, current, jnp.zeros_like(slots)))
    classes = jnp.arange(class_counts(tokenizer)[slot])
    legal = classes >= (low - (tokenizer.bins if slot == 3 else 0))[..., None]
    return jnp.where(classes == tokenizer.bins, eos_legal[..., None], legal) if slot == 0 else legal


def log_sums(logits: Float[Array, "*b C"], legal: Bool[Array, "*b C"]) -> tuple[Array, Array]:
    """log Σ exp over the legal classes, and the probability [..., ] of the others."""
    legal_sum = jax.nn.logsumexp(jnp.where(legal, logits, -jnp.inf), axis=-1)
    masked = -jnp.expm1(legal_sum - jax.nn.logsumexp(logits, axis=-1))
    return legal_sum, jnp.clip(masked, 0, 1)


def draw(
    logits: Float[Array, "B C"],
    legal: Bool[Array, "B C"],
    waits: Float[Array, "B C"],
    filters: Filters,
    forced: Int[Array, "B"],
    constrain: bool,
) -> Draw:
    """One class of every row.

    Args:
      waits: independent exponential variables: the class with the least waiting time at rate p is drawn, which is a
        sample of p without a cumulative sum, whose rounding could land on a class of no probability.
      forced: class to take instead, or -1.
    """
    legal_sum, masked = log_sums(logits, legal)
    allowed = legal if constrain else jnp.ones_like(legal)
    kept = jnp.where(allowed, logits, -jnp.inf)
    rates = jnp.exp((kept - kept.max(-1, keepdims=True)) / jnp.maximum(filters.temperature, 1e-6))
    if filters.top_k is not None:
        rates = _at_least(rates, _kth(rates, filters.top_k))
    if filters.top_p is not None:
        rates = _at_least(rates, _nucleus(rates, filters.top_p))
    drawn = jnp.argmax(rates / waits, axis=-1)
    value = jnp.where(forced >= 0, forced, drawn)
    chosen = jnp.take_along_axis(logits, value[:, None], axis=-1)[:, 0]
    total = legal_sum if constrain else jax.nn.logsumexp(logits, axis=-1)
    return Draw(value.astype(jnp.int32), chosen - total, masked)


def waiting_times(keys: UInt32[Array, "B 2"], index: Int[Array, "B"], count: int, dtype) -> Float[Array, "B count"]:
    """[B, count] exponential variables of each row's `index`-th point: they depend on nothing else in the batch."""
    return -jnp.log(uniforms(keys, index, count, dtype))


def uniforms(keys: UInt32[Array, "B 2"], index: Int[Array, "B"], count: int, dtype) -> Float[Array, "B count"]:
    """The uniform variables behind `waiting_times`: another program that is given them draws the same classes."""
    bits = jax.vmap(lambda key, i: jax.random.bits(jax.random.fold_in(key, i), (count,), jnp.uint32))(keys, index)
    # 23 bits and a half: never 0, never 1, so a wait is never infinite and never zero.
    return ((bits >> 9).astype(dtype) + 0.5) * 2.0**-23


def _at_least(rates: Float[Array, "B C"], threshold: Float[Array, "B 1"]) -> Float[Array, "B C"]:
    """Rates below a threshold of `_largest` become 0; compared as they were searched, so that its own class stays."""
    return jnp.where(rates.astype(threshold.dtype) >= threshold, rates, 0)


def _kth(rates: Float[Array, "B C"], k: Int[Array, ""]) -> Float[Array, "B 1"]:
    """The k-th largest rate: with ties a few more than k are kept."""
    return _largest(rates, lambda above: above.sum(1) >= k)


def _nucleus(rates: Float[Array, "B C"], top_p: Float[Array, ""]) -> Float[Array, "B 1"]:
    """The largest rate t with Σ of rates ≥ t at least top_p of all: the smallest such set (with its ties)."""
    needed = top_p * rates.sum(-1, keepdims=True)
    return _largest(rates, lambda above: jnp.where(above, rates[..., None], 0).sum(1) >= needed)


def _largest(rates, holds):
    """The largest float32 t in [0, 1] for which `holds` of (rates ≥ t), which holds at 0 and less and less above it.

    The search goes over the bits of t, five at a time: six passes, where sorting is slow on every device.
    """
    low = jnp.zeros((rates.shape[0], 1), jnp.int32)
    rates = rates.astype(jnp.float32)
    for shift in range(25, -1, -5):
        bits = low + (jnp.arange(32, dtype=jnp.int32) << shift)
        above = rates[..., None] >= jax.lax.bitcast_convert_type(bits, jnp.float32)[:, None]
        low = jnp.where(holds(above), bits, low).max(-1, keepdims=True)
    return jax.lax.bitcast_convert_type(low, jnp.float32)
