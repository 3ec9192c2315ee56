"""The condition: encoders, projections and marginals on equal inputs, then whole; and stage one's gradients through it.

Frozen encoders are left out: they are compared in tests/parity (and `tests/models`, against their originals).

Letters: B rows, S context, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from experiments.torch_parity.rows import Row, compare
from experiments.torch_parity.taps import tensors
from experiments.torch_reference import flame as torch_flame
from experiments.torch_reference.image_encoder import normalize_images as torch_normalize
from experiments.torch_reference.training import StageOne
from pointillist_jax.configs import ModelConfig
from pointillist_jax.convert.reference import ar_to_torch
from pointillist_jax.flame import FlameModel, FlameParams, flame_vertices
from pointillist_jax.flame.surface_points import head_points
from pointillist_jax.models import condition
from pointillist_jax.models.image_encoder import normalize_images
from pointillist_jax.models.layers import linear
from pointillist_jax.training import ar

POSES = ("rotation", "neck_pose", "jaw_pose", "eyes_pose", "translation")


def random_condition(rng: np.random.Generator, config: ModelConfig, head: FlameModel, rows: int) -> dict[str, Any]:
    """As windows carry it: portraits of noise and random identities, or features where encoders are frozen."""
    dtype = np.asarray(head.v_template).dtype
    if config.encoder.frozen:
        shapes = condition.feature_shapes(config)
        return {"features": {name: rng.normal(size=(rows, *shape)).astype(dtype) for name, shape in shapes.items()}}
    size, neutral = config.encoder.image_size, head.neutral_params((rows,))
    flame = {name: np.asarray(getattr(neutral, name)) for name in ("shape", "expr", *POSES)}
    flame = {name: x + rng.normal(0, 0.2 if name in POSES else 0.5, x.shape) for name, x in flame.items()}
    return {
        "portrait": rng.integers(0, 256, (rows, size, size, 3)).astype(np.uint8),
        "flame": {name: x.astype(dtype) for name, x in flame.items()},
    }


def block_rows(
    params: Mapping[str, Any],
    model: StageOne,
    config: ModelConfig,
    head: FlameModel,
    batch: Mapping[str, Any],
    bounds: Mapping[str, float],
) -> list[Row]:
    """Every part on JAX's input ("blocks"), then the context and stage one's loss of the running models ("models").

    Args:
      params: {"transformer", "condition"}. model: with the same parameters.
      batch: a window with its `condition`.
    """
    twin, given = model.condition, batch["condition"]
    rows: list[Row] = []

    def row(name: str, expected, found) -> None:
        rows.append(compare("blocks", name, expected, found, bounds["blocks"]))

    with torch.no_grad():
        if config.encoder.frozen:
            features = given["features"]
        else:
            features = condition_features(params["condition"], config, head, given, twin, row)
        context = jax.jit(condition.project_features, static_argnums=1)(params["condition"], config, features)
        sizes = [(features["image"], slice(None)), (features["points"], slice(1)), (features["points"], slice(1, None))]
        for part, (source, where) in zip(("image", "shape", "parts"), sizes, strict=True):
            source = jnp.asarray(source[:, where], config.dtype)
            name = f"{part}_projection"
            found = twin.get_submodule(name)(tensors(source))
            row(f"condition.{name}", linear(source, params["condition"][name]), found)
        if config.condition_loss:
            states = jax.jit(condition.marginal_states)(params["condition"], context)
            row("condition.marginals", list(states), twin.marginals(tensors(context)))
            expected = jax.jit(ar.condition_loss, static_argnums=1)(params, config, batch, context)
            window = tensors({name: batch[name] for name in ("targets", "mask")})
            row("condition.loss", expected, model.marginal_loss(tensors(context), **window))
        found = twin(tensors(given))
    rows.append(compare("models", "context", context, found, bounds["models"]))
    return rows


def condition_features(params, config: ModelConfig, head: FlameModel, given, twin: nn.Module, row) -> dict[str, Any]:
    """JAX's features of portraits and heads, and a row for each step to them."""
    encoder, dtype = config.encoder, config.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    images = jax.jit(normalize_images)(given["portrait"].astype(wide) / 255)
    row("condition.images", images, torch_normalize(tensors(given["portrait"]).to(tensors(images).dtype) / 255))
    seen = jax.jit(condition.image_encoder(encoder, dtype).apply)({"params": params["image_encoder"]}, images)
    image = jnp.concatenate([seen["cls"][:, None], seen["patch_tokens"]], axis=1)
    row("condition.image_encoder", image, twin.image_encoder(tensors(images)))

    @jax.jit
    def cloud_of(flame):
        still = FlameParams(**flame).replace(
            rotation=jnp.zeros_like(flame["rotation"]), translation=jnp.zeros_like(flame["translation"])
        )
        vertices = flame_vertices(head, still)
        return vertices, head_points(head, vertices, encoder.num_points)

    (vertices, cloud), other = cloud_of(given["flame"]), torch_flame.make_head(vars(head))
    # On the same mesh: edges are small differences of its vertices, and normals hundreds of their roundings.
    found = torch_flame.head_points(other, tensors(vertices), torch_flame.surface_points(other, encoder.num_points))
    row("condition.head_points", cloud, found)
    points = jax.jit(condition.point_encoder(encoder, dtype).apply)({"params": params["point_encoder"]}, cloud)
    row("condition.point_encoder", points, twin.point_encoder(tensors(cloud)))
    return {"image": image, "points": points}


def gradient_rows(
    params: Mapping[str, Any],
    model: StageOne,
    config: ModelConfig,
    head: FlameModel,
    batch: Mapping[str, Any],
    bounds: Mapping[str, float],
) -> list[Row]:
    """Stage one's loss from the portrait on, and its gradient by every parameter of the condition.

    Those of the transformer, given a context, are `training.gradient_rows`'s.
    """
    loss_fn = ar.make_loss(config, head)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def mean(params):
        total, count, _ = loss_fn(params, batch, None)
        return total / count, None

    (loss, _), gradients = mean(dict(params))
    model.zero_grad(set_to_none=True)
    total, count = model(tensors(dict(batch)))
    (total / count).backward()
    rows = [compare("models", "stage one's loss", loss, total / count, bounds["models"])]
    own = {name: p.grad for name, p in model.named_parameters()}
    for name, value in ar_to_torch(gradients, config).items():
        if name.startswith("condition."):
            rows.append(compare("gradients", name, value, own[name], bounds["gradients"]))
    return rows
