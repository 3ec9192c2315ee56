"""The teacher-forced twin of `generate`: the same log-probabilities and hidden states in one windowed forward."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pointillist_jax.configs import ModelConfig
from pointillist_jax.files import UserError
from pointillist_jax.models.ar import accumulator, hidden_states, output_tables
from pointillist_jax.models.layers import Params
from pointillist_jax.sampling import choose
from pointillist_jax.tokens import PointTokenizer

_CHUNK_LOGITS = 1 << 22  # Logits held at once.


@dataclasses.dataclass(frozen=True)
class Score:
    """NumPy arrays; the fields are those of `sampling.Generation` for the same tokens."""

    num_points: Int[np.ndarray, "B"]
    log_prob: Float[np.ndarray, "B"]
    token_log_probs: Float[np.ndarray, "B T"]
    masked_mass: Float[np.ndarray, "B"]
    token_masked_mass: Float[np.ndarray, "B T"]
    hidden: np.ndarray


def score(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    context: Float[Array, "B S D"],
    *,
    tokenizer: PointTokenizer | None = None,
    constrain: bool = True,
    context_lengths: Int[Array, "B"] | None = None,
) -> Score:
    """Log-probabilities and hidden states of whole sequences, of any length: each token sees its window.

    Args:
      params: of `PointTransformer`.
      tokens: S S S S, points, E E E E, then P; or without the E, as a prefix.
      context: the condition.
      tokenizer: the model's own by default (its box does not matter).
      constrain: renormalise over the classes the grammar allows, as `generate` does.
      context_lengths: for contexts padded to one length.

    Returns:
      `Score`; the first E has its log-probability, also where `generate` forced it at max_points.

    Raises:
      UserError: tokens that are not points between S S S S and E E E E, or out of order with constrain=True.
    """
    tokenizer = tokenizer or config.tokenizer
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.shape[0] != np.shape(context)[0]:
        raise UserError(f"tokens {tokens.shape} and context {np.shape(context)} must be [B, T] and [B, S, D].")
    num_points = np.array([_count(row, tokenizer, i, constrain) for i, row in enumerate(tokens)], np.int32)
    B, P, length = len(tokens), int(num_points.max()), tokens.shape[1]
    # Few compiled lengths: four to every doubling. From 14 points on less than a fifth of the size is padding.
    unit = 1 << max((P + 2).bit_length() - 3, 2)
    size = 4 * (-(-(P + 2) // unit) * unit)
    padded = np.full((B, size), tokenizer.pad, np.int32)
    padded[:, : min(size, length)] = tokens[:, :size]
    hidden, logs, masked = jax.device_get(
        _forward(params, config, tokenizer, padded, jnp.asarray(context), context_lengths, constrain)
    )
    real = np.arange(size - 4) < 4 * num_points[:, None]
    ends = (np.arange(size - 4) == 4 * num_points[:, None]) & (padded[:, 4:] == tokenizer.eos)
    out = np.zeros((2, B, max(length, size)))
    for row, values in zip(out, (logs, masked), strict=True):
        row[:, 4:size] = np.where(real | ends, values, 0)
    out = out[:, :, :length]
    total = np.maximum((real | ends).sum(axis=1), 1)
    states = hidden[:, 4 : 4 + 4 * P].reshape(B, P, 4, hidden.shape[-1])
    states = np.where((np.arange(P) < num_points[:, None])[..., None, None], states, np.zeros((), states.dtype))
    return Score(num_points, out[0].sum(axis=1), out[0], out[1].sum(axis=1) / total, out[1], states)


def _count(row: np.ndarray, tokenizer: PointTokenizer, index: int, constrain: bool) -> int:
    """Points of a sequence, which is checked."""
    kept = row[row != tokenizer.pad]
    body = kept[kept != tokenizer.eos]
    if constrain and (error := tokenizer.first_error(np.append(body, [tokenizer.eos] * 4))):
        raise UserError(f"sequence {index}: {error}")
    points = body[4:].reshape(-1, 4) if len(body) % 4 == 0 else None
    ends = len(kept) - len(body)
    fits = (
        points is not None and ends in (0, 4) and (row[: len(body)] == body).all() and (body[:4] == tokenizer.bos).all()
    )
    if fits:
        coords, faces = points[:, :3], points[:, 3] - tokenizer.bins
        fits = ((coords >= 0) & (coords < tokenizer.bins)).all() and (
            (faces >= 0) & (faces < tokenizer.num_faces)
        ).all()
    if not fits or len(body) < 4:
        raise UserError(f"sequence {index} is not S S S S, points x y z b, E E E E, P ….")
    return len(points)


@functools.partial(jax.jit, static_argnums=(1, 2, 6))
def _forward(params, config: ModelConfig, tokenizer: PointTokenizer, tokens, context, context_lengths, constrain):
    """(hidden [B,T,D], log-probs and masked mass [B,T-4] of tokens 4 …)."""
    hidden = hidden_states(params, config, tokens, context, context_lengths=context_lengths)
    tables = output_tables(params, dataclasses.replace(config, loss_support="slot"))
    points = tokens[:, 4:].reshape(tokens.shape[0], -1, 4) - jnp.array([0, 0, 0, tokenizer.bins])
    previous = jnp.pad(points[:, :-1], ((0, 0), (1, 0), (0, 0)))
    logs, masks = [], []
    for slot, table in enumerate(tables):
        classes = points[:, :, slot]
        if slot == 0:
            classes = jnp.where(classes == tokenizer.eos, tokenizer.bins, classes)
        count = choose.class_counts(tokenizer)[slot]
        args = hidden[:, 3 + slot : -1 : 4], jnp.clip(classes, 0, count - 1), previous, points[:, :, :3]
        log, mass = _slot(config, tokenizer, slot, table.rows, args, constrain)
        logs.append(log)
        masks.append(mass)
    B = tokens.shape[0]
    return hidden, jnp.stack(logs, -1).reshape(B, -1), jnp.stack(masks, -1).reshape(B, -1)


def _slot(config: ModelConfig, tokenizer: PointTokenizer, slot: int, rows, args, constrain: bool):
    """Log-probabilities and masked mass [B, P] of one slot, over chunks of points."""
    B, P = args[0].shape[:2]
    count = choose.class_counts(tokenizer)[slot]
    size = max(min(_CHUNK_LOGITS // (count * B), P), 1)
    chunks = -(-P // size)

    def one(xs):
        hidden, classes, previous, current = xs
        logits = jnp.einsum("BPD,CD->BPC", hidden, rows, preferred_element_type=accumulator(config))[..., :count]
        legal = choose.legal_classes(tokenizer, slot, previous, current)
        legal_sum, masked = choose.log_sums(logits, legal)
        total = legal_sum if constrain else jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, classes[..., None], axis=-1)[..., 0]
        return chosen - total, masked

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, chunks * size - P), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(B, chunks, size, *x.shape[2:]), 1, 0)

    out = jax.lax.map(one, jax.tree.map(split, args))
    return tuple(jnp.moveaxis(x, 0, 1).reshape(B, -1)[:, :P] for x in out)
