"""Next-token cross-entropy that never holds the logits (DESIGN §6; facts/jax.md, cross-entropy).

Letters: B batch, T tokens, D width, V classes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pointillist_jax.sharding import constrain, parts_of
from renderer_bridge.varying import axes_of, vary

SLOTS = "xyzb"
# Logits held at once by a device: 32 MiB in float32.
_CHUNK_LOGITS = 1 << 23


class TokenLoss(NamedTuple):
    """Sums and per-token values of a cross-entropy.

    Attributes:
      total: [] Σ over supervised tokens of -log p (+ z-loss); the only differentiable field.
      count: [] number of supervised tokens.
      nll: [B, T] -log p in nats, without the z-loss; 0 where ignored.
      correct: [B, T] whether the label was the most likely class; False where ignored.
    """

    total: Float[Array, ""]
    count: Float[Array, ""]
    nll: Float[Array, "B T"]
    correct: Bool[Array, "B T"]

    @property
    def mean(self) -> Float[Array, ""]:
        """Differentiable mean loss per supervised token."""
        return self.total / jnp.maximum(self.count, 1)


def token_cross_entropy(
    hidden: Float[Array, "B T D"],
    labels: Int[Array, "B T"],
    table: Float[Array, "V D"],
    *,
    num_classes: int | None = None,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
) -> TokenLoss:
    """Cross-entropy of softmax(hidden · tableᵀ) against `labels`, over chunks of tokens.

    Products run in the dtype of `hidden`, everything else in float32 (float64 for float64). Under differentiation the
    gradients are made in the same pass as the loss, so the logits are computed once and never kept.

    Args:
      labels: class of each token; negative is ignored (padding).
      table: one row per class.
      num_classes: rows from there on are padding and get no probability.
      z_loss: weight of the mean of log²(Σ exp logits), which keeps logits from drifting.
      chunk_size: tokens per chunk and sequence; by default chosen so that a chunk's logits take 32 MiB of a device.
    """
    batch, length, _ = hidden.shape
    stretches = parts_of(length, "length")
    if chunk_size is None:
        logits = table.shape[0] // parts_of(table.shape[0], "vocab") * (batch // parts_of(batch, "batch"))
        chunk_size = max(_CHUNK_LOGITS // logits, 1) * stretches
    chunks = max(-(-length // chunk_size), 1)
    if stretches > 1:
        # Padding would shift tokens from device to device.
        chunks = next(n for n in range(chunks, length + 1) if length // stretches % n == 0)
    padding = -length % chunks
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    padded = jnp.pad(labels, ((0, 0), (0, padding)), constant_values=-1)
    with jax.named_scope("cross_entropy"):
        total, nll, correct = _cross_entropy(hidden, padded, table, num_classes or table.shape[0], z_loss, chunks)
    nll, correct = lax.stop_gradient((nll[:, :length], correct[:, :length]))
    return TokenLoss(total, jnp.sum(labels >= 0).astype(total.dtype), nll, correct)


class SlotLoss(NamedTuple):
    """Sums of a next-token loss over the four slots x, y, z, b of the *predicted* token.

    Attributes:
      total: [] differentiable Σ of -log p (+ z-loss) over all supervised tokens.
      count: [] their number.
      nll, correct, counts: [4] per slot: Σ -log p, number right, number supervised. No gradients.
    """

    total: Float[Array, ""]
    count: Float[Array, ""]
    nll: Float[Array, "4"]
    correct: Float[Array, "4"]
    counts: Float[Array, "4"]

    @property
    def mean(self) -> Float[Array, ""]:
        return self.total / jnp.maximum(self.count, 1)

    def metrics(self) -> dict[str, tuple[Array, Array]]:
        """{"loss_x": (Σ, weight), "accuracy_x": (Σ, weight), …}: what `training.state.LossFn` adds up."""
        return {
            f"{name}_{slot}": (sums[i], self.counts[i])
            for name, sums in (("loss", self.nll), ("accuracy", self.correct))
            for i, slot in enumerate(SLOTS)
        }


def slot_cross_entropy(
    hidden: Float[Array, "B T D"], targets: Int[Array, "B T"], tables: Sequence, eos: int, *, z_loss: float = 0.0
) -> SlotLoss:
    """Next-token loss of a window with one classifier per slot.

    Args:
      hidden: final states; token t stands at slot t % 4, so its target stands at slot (t + 1) % 4.
      targets: the token after each; an id that is no class of its slot (P everywhere, S and later E with a slot's
        support) is ignored.
      tables: x, y, z, b classifiers, `models.ar.output_tables`.
      eos: id of E.
    """
    firsts = [(slot - 1) % 4 for slot in range(4)]
    states, targets = ([x[:, first::4] for first in firsts] for x in (hidden, targets))
    return slot_losses(states, targets, tables, eos, z_loss=z_loss)


def slot_losses(
    states: Sequence[Float[Array, "B P D"]],
    targets: Sequence[Int[Array, "B P"]],
    tables: Sequence,
    eos: int,
    *,
    z_loss: float = 0.0,
) -> SlotLoss:
    """`slot_cross_entropy` of states and targets that lie apart by slot: x, y, z, b."""
    parts = [
        token_cross_entropy(state, table.labels(ids, eos), table.rows, num_classes=table.num_classes, z_loss=z_loss)
        for state, ids, table in zip(states, targets, tables, strict=True)
    ]
    return SlotLoss(
        total=sum(part.total for part in parts),
        count=sum(part.count for part in parts),
        nll=jnp.stack([part.nll.sum() for part in parts]),
        correct=jnp.stack([part.correct.sum().astype(part.nll.dtype) for part in parts]),
        counts=jnp.stack([part.count for part in parts]),
    )


def marginal_loss(
    states: Sequence[Float[Array, "B D"]], targets: Sequence[Int[Array, "B P"]], tables: Sequence, eos: int
) -> Float[Array, ""]:
    """Σ -log p of targets under one distribution for each row and slot, whatever their order.

    Args:
      states: x, y, z, b: of each row, not of each token.
      targets, tables, eos: as `slot_losses`.
    """
    total = jnp.zeros((), jnp.promote_types(states[0].dtype, jnp.float32))
    for state, ids, table in zip(states, targets, tables, strict=True):
        logits = jnp.einsum("BD,VD->BV", state, table.rows.astype(state.dtype), preferred_element_type=total.dtype)
        logits = jnp.where(jnp.arange(logits.shape[1]) < table.num_classes, logits, -1e30)
        labels = table.labels(ids, eos)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0), axis=1)
        total -= jnp.sum(jnp.where(labels >= 0, chosen, 0))
    return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _cross_entropy(hidden, labels, table, num_classes, z_loss, chunks):
    """(Σ loss, nll [B,T], correct [B,T])."""

    def chunk(_, xs):
        return None, _chunk_loss(*xs, table, num_classes, z_loss)[:3]

    _, (loss, nll, correct) = lax.scan(chunk, None, (_split(hidden, chunks), _split(labels, chunks)))
    return loss.sum(), _join(nll), _join(correct)


def _forward(hidden, labels, table, num_classes, z_loss, chunks):
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)

    # Every device adds up its own tokens' share; one sum over devices follows. (Added up for all devices at once, the
    # table's gradient would cross the network with every chunk.)
    rows, stretches = parts_of(hidden.shape[0], "batch"), parts_of(hidden.shape[1] // chunks, "length")
    apart = rows * stretches > 1

    def by_device(x):
        x = x.reshape(rows, x.shape[0] // rows, stretches, x.shape[1] // stretches, x.shape[2])
        return constrain(x, "batch", None, "length", None, "vocab" if x.shape[-1] == table.shape[0] else None)

    def chunk(d_table_t, xs):
        *losses, d_logits = _chunk_loss(*xs, table, num_classes, z_loss)
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jnp.einsum("BTV,VD->BTD", d_logits, table.astype(hidden.dtype))
        # Transposed: XLA's CPU back end would otherwise transpose the logits, not the narrow hidden states.
        if apart:
            share = jnp.einsum("RBSTD,RBSTV->RSDV", by_device(xs[0]), by_device(d_logits), preferred_element_type=dtype)
            d_table_t = constrain(d_table_t + share, "batch", "length", None, "vocab")
        else:
            d_table_t += jnp.einsum("BTD,BTV->DV", xs[0], d_logits, preferred_element_type=dtype)
        return d_table_t, (*losses, d_hidden)

    shape = table.shape[::-1]
    start = vary(jnp.zeros((rows, stretches, *shape) if apart else shape, dtype), axes_of((hidden, labels, table)))
    xs = _split(hidden, chunks), _split(labels, chunks)
    d_table_t, (loss, nll, correct, d_hidden) = lax.scan(chunk, start, xs)
    if apart:
        d_table_t = d_table_t.sum((0, 1))
    value = loss.sum(), _join(nll), _join(correct)
    return value, (_join(d_hidden), d_table_t.T, jnp.zeros((), table.dtype))


def _backward(num_classes, z_loss, chunks, residuals, cotangents):
    d_hidden, d_table, like = residuals
    scale = cotangents[0]
    return (d_hidden * scale).astype(d_hidden.dtype), None, (d_table * scale).astype(like.dtype)


_cross_entropy.defvjp(_forward, _backward)


def _chunk_loss(hidden, labels, table, num_classes, z_loss):
    """(loss, nll, correct, gradient of the loss by the logits) of a few tokens."""
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.einsum("BTD,VD->BTV", hidden, table.astype(hidden.dtype), preferred_element_type=dtype)
    classes = jnp.arange(table.shape[0])
    if num_classes < table.shape[0]:
        logits = jnp.where(classes < num_classes, logits, -1e30)
    used = labels >= 0
    top = logits.max(-1, keepdims=True)
    exp = jnp.exp(logits - top)
    total = exp.sum(-1, keepdims=True)
    label = jnp.maximum(labels, 0)[..., None]
    label_logit = jnp.take_along_axis(logits, label, axis=-1)
    log_sum = top + jnp.log(total)
    nll = jnp.where(used, (log_sum - label_logit)[..., 0], 0)
    loss = nll + jnp.where(used, z_loss * log_sum[..., 0] ** 2, 0)
    correct = used & (label_logit >= top)[..., 0]
    d_logits = exp * ((1 + 2 * z_loss * log_sum) / total) - (classes == label)
    return loss, nll, correct, jnp.where(used[..., None], d_logits, 0)


def _split(x, chunks):
    """[B,T,…] → [chunks, B, T/chunks, …], chunk c holding tokens c, c + chunks, …: a sharded T stays sharded."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunks, *x.shape[2:]), 2, 0)


def _join(x):
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
