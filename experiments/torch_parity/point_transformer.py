"""The point transformer, block by block: every part on the same input on both sides, then all of them in a chain.

The JAX side runs the model's own functions. `decoder_layer` has no seams between its three branches, so one branch is
seen by giving the other two output matrices of zeros.

Letters: B batch, T tokens, S context, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch
from torch import Tensor

from experiments.torch_parity.rows import Row, compare
from experiments.torch_parity.taps import run_with, tensors
from experiments.torch_reference.point_transformer import PointTransformer
from pointillist_jax.configs import ModelConfig
from pointillist_jax.losses.cross_entropy import slot_cross_entropy, slot_losses
from pointillist_jax.models import ar, point_step
from pointillist_jax.models.attention import attention
from pointillist_jax.models.blocks import cast_layer
from pointillist_jax.models.layers import rms_norm, rope_angles, unstack_layers
from pointillist_jax.tokens import SLOTS

BRANCHES = {"cross_attention": "out", "self_attention": "out", "mlp": "down"}


class Trace(NamedTuple):
    """What flows through the JAX model, in its order.

    Attributes:
      inputs: name of a torch part → its first argument. outputs: the same → what JAX has behind it.
      residual: parts whose torch twin gives the branch alone, while `outputs` hold input + branch.
      places: [B, T] of the backbone's steps.
    """

    inputs: dict[str, Any]
    outputs: dict[str, Any]
    residual: frozenset[str]
    places: Any


def trace(params: Any, config: ModelConfig, batch: Mapping[str, Any]) -> Trace:
    """Runs the JAX model part by part. `batch`: tokens, positions [B,T] and context [B,S,D]."""
    inputs, outputs, residual = {}, {}, set()
    tokens, positions = (jnp.asarray(batch[name]) for name in ("tokens", "positions"))
    by_points = config.step == "point"
    if by_points:
        points, positions = tokens.reshape(len(tokens), -1, 4), positions[:, ::4] // 4
        inputs["point_embedding"] = _embed(params, config, tokens).reshape(*points.shape[:2], -1)
        x = outputs["point_embedding"] = _embed_points(params, config, points)
    else:
        x = _embed(params, config, tokens)
    inputs["context_norm"] = jnp.asarray(batch["context"], config.dtype)
    context = outputs["context_norm"] = ar.norm_context(params, config, batch["context"])
    branches = ["cross_attention", "self_attention"]
    if config.order == "self_first":
        branches.reverse()
    for i, layer in enumerate(unstack_layers(params["layers"])):
        before = x
        for branch in (*branches, "mlp"):
            name = f"layers.{i}.{branch}"
            inputs[f"{name}.norm"] = inputs[name] = x
            outputs[f"{name}.norm"] = rms_norm(x, layer[branch]["norm"])
            x = outputs[name] = _layer(_only(layer, branch), config, x, positions, context)
            residual.add(name)
        inputs[f"layers.{i}"] = before
        x = outputs[f"layers.{i}"] = _layer(layer, config, before, positions, context)
    inputs["final_norm"] = x
    outputs["final_norm"] = rms_norm(x, params["final_norm"])
    if by_points:
        # What follows the last point is unknown: zeros stand for it, as in the model.
        following = jnp.pad(points[:, 1:], ((0, 0), (0, 1), (0, 0)))
        for slot, (given, *made) in zip(SLOTS, _chain(params, config, outputs["final_norm"], following), strict=True):
            inputs[f"slot_heads.{slot}"], outputs[f"slot_heads.{slot}"] = given, made
    return Trace(inputs, outputs, frozenset(residual), positions)


def block_rows(
    params: Any, twin: PointTransformer, config: ModelConfig, batch: Mapping[str, Any], bounds: Mapping[str, float]
) -> list[Row]:
    """Every block on equal inputs (section "blocks"), then the same places in the running models ("models").

    Args:
      twin: with the same parameters.
      batch: of `data.windows` with a context: tokens, targets, mask, positions [B,T], context [B,S,D].
      bounds: of `rows.TOLERANCES`.
    """
    same, chain = functools.partial(compare, "blocks"), functools.partial(compare, "models")
    bound, whole = bounds["blocks"], bounds["models"]
    flow, given = trace(params, config, batch), tensors(dict(batch))
    tokens, positions = given["tokens"], given["positions"]
    slots = torch.arange(tokens.shape[1]).expand_as(tokens) % 4

    def forward() -> Tensor:
        return twin(tokens, given["context"], positions)

    # Parts within parts need runs of their own: what a layer is given must not be undone inside it.
    depth = lambda name: name.count(".")  # noqa: E731
    replaced = {name: tensors(x) for name, x in flow.inputs.items()}
    found: dict[str, Tensor] = {}
    for level in sorted({depth(name) for name in replaced}):
        found |= run_with(twin, forward, {name: x for name, x in replaced.items() if depth(name) == level})
    rotations: list[tuple[Tensor, Tensor]] = []
    watch = twin.layers[0].register_forward_pre_hook(lambda _, args: rotations.append(args[1]))
    chained = run_with(twin, forward, watched=tuple(replaced))
    watch.remove()

    rows = []
    with torch.no_grad():
        x = _embed(params, config, jnp.asarray(batch["tokens"]))
        rows.append(same("embedding", x, twin.embed(tokens, slots), bound))
        angles = rope_angles(jnp.asarray(flow.places), config.head_dim, config.rope_theta, ar.accumulator(config))
        rows.append(same("rope", list(angles), list(rotations[0]), bound))
        for name, expected in flow.outputs.items():
            result, run = found[name], chained[name]
            if name in flow.residual:
                result = replaced[name] + result
            else:
                rows.append(chain(f"chained {name}", expected, run, whole))
            rows.append(same(name, expected, result, bound))
        tables = ar.output_tables(params, config)
        for slot, table, classifier in zip(SLOTS, tables, twin.classifiers(), strict=True):
            rows.append(same(f"head.{slot}", table.rows[: table.num_classes], classifier.rows, bound))
        rows.append(same("loss", _loss(params, config, flow.outputs["final_norm"], batch),
                         _loss_after(twin, tensors(flow.outputs["final_norm"]), given), bound))  # fmt: skip
    return rows


def _loss_after(twin: PointTransformer, hidden: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    """The twin's mean loss of given hidden states."""
    # With one step per point the last one is only predicted.
    hidden = hidden[:, :-1] if twin.step == "point" else hidden
    handle = twin.final_norm.register_forward_hook(lambda *_: hidden)
    try:
        return twin.loss(*(given[name] for name in ("tokens", "targets", "context", "positions", "mask")))
    finally:
        handle.remove()


@functools.partial(jax.jit, static_argnums=1)
def _embed(params, config: ModelConfig, tokens):
    return ar.embed_tokens(params, config, tokens, jnp.arange(tokens.shape[1]) % 4)


@functools.partial(jax.jit, static_argnums=1)
def _embed_points(params, config: ModelConfig, points):
    return point_step.embed_points(params, config, points)


@functools.partial(jax.jit, static_argnums=1)
def _chain(params, config: ModelConfig, hidden, following):
    """(input, residual, state) of the x, y, z and b heads, after the backbone's states."""
    embedded = ar.embed_tokens(params, config, following, jnp.arange(4))
    residual, links = hidden, []
    for slot, head in enumerate(point_step.slot_heads(params, config)):
        given = residual + embedded[..., slot - 1, :] if slot else residual
        residual, state = point_step.slot_state(head, given)
        links.append((given, residual, state))
    return links


@functools.partial(jax.jit, static_argnums=1)
def _layer(layer, config: ModelConfig, x, positions, context):
    layer = cast_layer(layer, config.dtype)
    angles = rope_angles(positions, config.head_dim, config.rope_theta, ar.accumulator(config))
    options = {"implementation": config.attention, "block_size": config.attention_block}
    own = lambda q, k, v: (attention(q, k, v, causal=True, window=config.window, **options), None)  # noqa: E731
    cross = functools.partial(attention, **options)
    return ar.decoder_layer(
        layer, config, x, angles, ar.cross_keys_values(layer, config, context), own, cross
    )[0]  # fmt: skip


@functools.partial(jax.jit, static_argnums=1)
def _loss(params, config: ModelConfig, hidden, batch):
    if config.step == "point":
        following = batch["tokens"].reshape(len(hidden), -1, 4)[:, 1:]
        states = [state for *_, state in _chain(params, config, hidden[:, :-1], following)]
        wanted = jnp.where(batch["mask"][:, 3:-1].reshape(following.shape), following, config.tokenizer.pad)
        targets = tuple(wanted[..., slot] for slot in range(4))
        return slot_losses(states, targets, ar.output_tables(params, config), config.tokenizer.eos).mean
    targets = jnp.where(batch["mask"], batch["targets"], config.tokenizer.pad)
    return slot_cross_entropy(hidden, targets, ar.output_tables(params, config), config.tokenizer.eos).mean


def _only(layer: Mapping[str, Any], branch: str) -> dict[str, Any]:
    """A layer whose other branches add nothing."""
    return {
        name: part if name == branch else {**part, BRANCHES[name]: jnp.zeros_like(part[BRANCHES[name]])}
        for name, part in layer.items()
    }
