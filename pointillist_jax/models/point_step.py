"""One step of the transformer per point (ours, beyond the paper; facts/paper_and_peers.md 4.2): `ModelConfig.step`.

The backbone is `models/ar.py`'s, with one position per point in place of one per token. Position p reads the four
tokens of point p at once (S S S S at p = 0) and its hidden state predicts the four of point p + 1, one after the other,
through a chain of small heads: x; y given x; z given x and y; b given x, y and z, or E at x. Same tokens, same grammar,
same classifiers and losses as with one step per token; a quarter of the backbone's steps, and a window that reaches
four times as many tokens.

    h_p          = backbone(points ≤ p)                       [D]
    r_x          = h_p               + MLPs_x(·)              states: norm_x(r_x) · x classifier
    r_y          = r_x + embed(x)    + MLPs_y(·)                      norm_y(r_y) · y classifier, and so on

A sampler calls `embed_points`, its own cached layers and then `slot_state` slot by slot; training runs all points at
once through the same functions (`point_states`).

Hidden states keep the alignment of token steps: the state *at* a token is the one that has read this token and nothing
after it, and that predicts the next. So at x, y and z of point p it is the chain's state for y, z and b of point p, and
at b it is the chain's state for the next point's x. `point_hidden_states` returns them in that order, and the decoder's
`hidden [P, 4, D]` is read from it as from `models.ar.hidden_states`.

Letters: B batch, P points (backbone positions), D width; tokens of a point in the order x, y, z, b.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pointillist_jax.configs import ModelConfig
from pointillist_jax.models.ar import embed_tokens, run_layers
from pointillist_jax.models.blocks import cast_layer, mlp
from pointillist_jax.models.layers import Params, cast, rms_norm, unstack_layers
from pointillist_jax.sharding import constrain
from pointillist_jax.tokens import SLOTS


class SlotHead(NamedTuple):
    """One link of the chain, in the dtype of the computation.

    Attributes:
      mlps: parameters of its residual MLPs.
      norm: [D] scale of the last norm.
    """

    mlps: tuple[Params, ...]
    norm: Float[Array, "D"]


def slot_heads(params: Params, config: ModelConfig) -> tuple[SlotHead, SlotHead, SlotHead, SlotHead]:
    """The heads of the x, y, z and b slots, ready for `slot_state`."""
    heads = []
    for slot in SLOTS:
        layers = unstack_layers(params["slot_heads"][slot]["mlps"])
        mlps = tuple(cast_layer({"mlp": layer}, config.dtype)["mlp"] for layer in layers)
        heads.append(SlotHead(mlps, params["slot_heads"][slot]["norm"]))
    return tuple(heads)


def embed_points(params: Params, config: ModelConfig, points: Int[Array, "*b 4"]) -> Float[Array, "*b D"]:
    """What the backbone reads for whole points: their four tokens' embeddings, each through a matrix of its slot."""
    with jax.named_scope("embed_points"):
        x = embed_tokens(params, config, points, jnp.arange(4))
        return jnp.einsum("...sE,sED->...D", x, cast(params["point_embedding"], config.dtype))


def slot_state(
    head: SlotHead, residual: Float[Array, "*b D"], embedded: Float[Array, "*b D"] | None = None
) -> tuple[Float[Array, "*b D"], Float[Array, "*b D"]]:
    """One link of the chain.

    Args:
      head: of the slot that is predicted, from `slot_heads`.
      residual: for x the backbone's hidden state of the point before, else what the link before returned.
      embedded: `embed_tokens` of the choice at the slot before; None for x.

    Returns:
      (residual for the next link, state): logits of this slot are state · `output_tables(…)[slot].rows`.
    """
    residual = residual if embedded is None else residual + embedded
    for layer in head.mlps:
        residual = residual + mlp(layer, residual)
    return residual, rms_norm(residual, head.norm)


def point_states(
    params: Params,
    config: ModelConfig,
    points: Int[Array, "B P 4"],
    following: Int[Array, "B P 4"],
    context: Float[Array, "B S D"],
    positions: Int[Array, "B P"],
    context_lengths: Int[Array, "B"] | None = None,
) -> tuple[Float[Array, "B P D"], ...]:
    """Teacher-forced: the states that predict x, y, z and b of the point after each position.

    Args:
      points: tokens read at each position.
      following: tokens of the point after; its b is not read.
      positions: index of each point in its sequence, S S S S being 0.
    """
    x = run_layers(params, config, embed_points(params, config, points), context, positions, context_lengths)
    embedded = embed_tokens(params, config, following, jnp.arange(4))
    states = []
    for slot, head in enumerate(slot_heads(params, config)):
        with jax.named_scope(f"slot_{SLOTS[slot]}"):
            x, state = slot_state(head, x, embedded[..., slot - 1, :] if slot else None)
            states.append(constrain(state, "batch", "length", None))
    return tuple(states)


def point_hidden_states(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    context: Float[Array, "B S D"],
    positions: Int[Array, "B T"],
    context_lengths: Int[Array, "B"] | None = None,
) -> Float[Array, "B T D"]:
    """`models.ar.hidden_states` of a model with one step per point: T is a multiple of four.

    The first three states, inside the first point of a window, are zeros: no position comes before it, and nothing is
    predicted there (S S S S at the beginning of a sequence).
    """
    batch, length = tokens.shape
    points = tokens.reshape(batch, length // 4, 4)
    following = jnp.concatenate([points[:, 1:], jnp.zeros_like(points[:, :1])], axis=1)
    states = point_states(params, config, points, following, context, positions[:, ::4] // 4, context_lengths)
    flat = jnp.stack(states, axis=2).reshape(batch, length, -1)
    # Of the point after the last one only the state for x is known.
    return jnp.pad(flat[:, : length - 3], ((0, 0), (3, 0), (0, 0)))


def window_states(
    params: Params,
    config: ModelConfig,
    batch: dict[str, Any],
    context: Float[Array, "B S D"],
) -> tuple[tuple[Float[Array, "B P D"], ...], tuple[Int[Array, "B P"], ...]]:
    """States and targets of a training window (`training_window`), one pair per slot, for `slot_losses`.

    A window holds one point more than the backbone reads: the last one is only predicted, the first only read. At
    stride `config.window_tokens` every token but S S S S is then a target exactly once, as with token steps.
    """
    tokens, positions = batch["tokens"], batch["positions"]
    points = tokens.reshape(tokens.shape[0], -1, 4)
    read, following = points[:, :-1], points[:, 1:]
    states = point_states(params, config, read, following, context, positions[:, :-4:4] // 4)
    # mask[t] speaks of targets[t], the token after tokens[t].
    targets = jnp.where(batch["mask"][:, 3:-1].reshape(following.shape), following, config.tokenizer.pad)
    return states, tuple(targets[..., slot] for slot in range(4))
