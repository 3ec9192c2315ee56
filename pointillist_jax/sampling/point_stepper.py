"""One step of the backbone per point, behind the seam of `sampling/steppers.py`: see `models/point_step.py`."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pointillist_jax.models.ar import accumulator
from pointillist_jax.models.layers import Params, cast, rms_norm
from pointillist_jax.models.point_step import SlotHead, slot_heads, slot_state
from pointillist_jax.sampling.steppers import Choose, Memory, TokenStepper
from pointillist_jax.tokens import SLOTS


class PointWeights(NamedTuple):
    """`steppers.Weights` and the chain of heads.

    Attributes:
      layers, inputs, start, outputs, final_norm, context_norm: as `steppers.Weights`.
      points: of each slot, [C, D]: what the class adds to the embedding of its point, its matrix applied in advance.
      point_start: [D] embedding of S S S S.
      heads: of the slots.
    """

    layers: tuple[Params, ...]
    inputs: tuple[Array, ...]
    start: Array
    outputs: tuple[Array, ...]
    final_norm: Array
    context_norm: Array
    points: tuple[Array, ...]
    point_start: Array
    heads: tuple[SlotHead, ...]


@dataclasses.dataclass(frozen=True)
class PointStepper(TokenStepper):
    """A model with `config.step` "point": the ring holds `config.window` points.

    What the loop carries as `hidden` is the chain's residual for x: the states that the decoder is given are those at
    the tokens, and at b that is the one which predicts the next x.
    """

    def weights(self, params: Params) -> PointWeights:
        base = super().weights(params)
        matrices = cast(params["point_embedding"], self.config.dtype)
        return PointWeights(
            *base,
            points=tuple(x @ matrix for x, matrix in zip(base.inputs, matrices, strict=True)),
            point_start=jnp.einsum("sE,sED->D", base.start, matrices),
            heads=slot_heads(params, self.config),
        )

    def point(
        self, weights: PointWeights, cache: Any, memory: Memory, hidden: Array, age: Array, choose: Choose
    ) -> tuple[Any, Array, Array]:
        residual, state = hidden, rms_norm(hidden, weights.heads[0].norm)
        states, point = [], 0
        for slot in range(4):
            with jax.named_scope(f"slot_{SLOTS[slot]}"):
                classes = weights.inputs[slot].shape[0]
                logits = jnp.matmul(state, weights.outputs[slot], preferred_element_type=accumulator(self.config))
                value = choose(slot, logits[:, :classes])
                point = point + weights.points[slot][value]
                if slot < 3:
                    residual, state = slot_state(weights.heads[slot + 1], residual, weights.inputs[slot][value])
                    states.append(state)
        x = jnp.where((age == 0)[:, None], weights.point_start, point)
        cache, hidden = self.backbone(weights, cache, memory, x, age)
        residual, state = slot_state(weights.heads[0], hidden)
        return cache, residual, jnp.stack([*states, state], axis=1)
