"""The condition: what reaches the context, and what must not."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.configs import PATCH_COLORS, EncoderConfig, ModelConfig
from pointillist_jax.files import UserError
from pointillist_jax.flame import open_head
from pointillist_jax.models.condition import (
    condition_specs,
    context_length,
    encode_condition,
    encode_features,
    feature_shapes,
    marginal_states,
    with_patch_colors,
)
from pointillist_jax.models.layers import init_params

CONFIG = ModelConfig(width=24, encoder=EncoderConfig(image_size=28, num_points=40))


@pytest.fixture(scope="module")
def setup():
    head = open_head("coarse")
    params = init_params(condition_specs(CONFIG), jax.random.PRNGKey(0))
    encode = jax.jit(lambda p, image, flame: encode_condition(p, CONFIG, head, {"portrait": image, "flame": flame}))
    return head, params, encode


def inputs(rng, head, batch: int = 2):
    neutral = head.neutral_params((batch,))
    flame = {
        k: jnp.asarray(rng.normal(0, 0.5, v.shape), jnp.float32) for k, v in vars(neutral).items() if v is not None
    }
    return jnp.asarray(rng.integers(0, 256, (batch, 28, 28, 3)), jnp.uint8), flame


def test_length_and_use_of_portrait_and_identity(setup, rng):
    head, params, encode = setup
    image, flame = inputs(rng, head)
    context = encode(params, image, flame)
    patches, queries = 4, 17
    assert context.shape == (2, context_length(CONFIG), 24) == (2, 1 + patches + queries, 24)
    other_face = encode(params, image, flame | {"shape": flame["shape"] + 1})
    other_picture = encode(params, 255 - image, flame)
    moved = lambda new: np.abs(np.asarray(new - context)).max(axis=(0, 2)) > 1e-4  # noqa: E731
    assert moved(other_picture)[: 1 + patches].all()
    assert not moved(other_picture)[1 + patches :].any()
    assert moved(other_face)[1 + patches :].all()
    assert not moved(other_face)[: 1 + patches].any()


def test_where_the_head_stands_is_the_cameras_business(setup, rng):
    head, params, encode = setup
    image, flame = inputs(rng, head)
    moved = flame | {"rotation": flame["rotation"] + 1, "translation": flame["translation"] + 1}
    np.testing.assert_array_equal(encode(params, image, flame), encode(params, image, moved))


def test_the_whole_shape_and_its_parts_have_a_projection_each(setup, rng):
    head, params, encode = setup
    image, flame = inputs(rng, head)
    zeroed = params | {"shape_projection": jax.tree.map(jnp.zeros_like, params["shape_projection"])}
    changed = np.abs(np.asarray(encode(zeroed, image, flame) - encode(params, image, flame))).max(axis=(0, 2)) > 0
    assert np.flatnonzero(changed).tolist() == [5]


def test_frozen_encoders_get_no_gradients_and_stored_features_stand_for_them(setup, rng):
    head, params, encode = setup
    image, flame = inputs(rng, head)
    seen = {"portrait": image, "flame": flame}
    frozen = dataclasses.replace(CONFIG, encoder=dataclasses.replace(CONFIG.encoder, frozen=True))
    assert set(condition_specs(frozen)) == {"image_projection", "shape_projection", "parts_projection"}
    encoders = {k: v for k, v in params.items() if k.endswith("_encoder")}
    projections = {k: v for k, v in params.items() if k.endswith("_projection")}
    with pytest.raises(UserError, match="neither features nor weights"):
        encode_condition(projections, frozen, head, seen)

    @jax.jit
    def gradient(encoders, projections):
        loss = lambda e, p: jnp.sum(encode_condition({**p, **e}, frozen, head, seen) ** 2)  # noqa: E731
        return jax.value_and_grad(loss, argnums=(0, 1))(encoders, projections)

    loss, (none, some) = gradient(encoders, projections)
    assert loss == pytest.approx(float(jnp.sum(encode(params, image, flame) ** 2)), rel=1e-4)
    assert all(not np.any(x) for x in jax.tree.leaves(none))
    assert all(np.any(x) for x in jax.tree.leaves(some))
    features = jax.jit(lambda e: encode_features(e, frozen, head, image, flame))(encoders)
    assert {name: x.shape[1:] for name, x in features.items()} == feature_shapes(frozen)
    stored = encode_condition(projections, frozen, head, {"features": features})
    np.testing.assert_allclose(stored, encode(params, image, flame), atol=1e-5)


def test_colours_of_patches_stand_beside_their_tokens(setup, rng):
    head, params, encode = setup
    image, flame = inputs(rng, head)
    context = encode(params, image, flame)
    colored = with_patch_colors(context, image, CONFIG)
    assert colored.shape == (*context.shape[:2], 24 + PATCH_COLORS)
    np.testing.assert_array_equal(colored[..., :24], context)
    colors = np.asarray(colored[..., 24:])
    assert not colors[:, 0].any()
    assert not colors[:, 5:].any()
    # Patch 1 is the upper right one; its third quarter the lower left one: rows 7 to 13, columns 14 to 20.
    quarter = np.asarray(image, np.float64)[:, 7:14, 14:21] / 127.5 - 1
    white = np.full((1, 28, 28, 3), 255, np.uint8)
    np.testing.assert_allclose(with_patch_colors(context[:1], white, CONFIG)[:, 1:5, 24:], 1, atol=1e-6)
    # Random pixels: a resize that also looks beyond the quarter is near its mean, not equal to it.
    np.testing.assert_allclose(colors[:, 2, 6:9], quarter.mean(axis=(1, 2)), atol=0.15)


def test_marginals_come_from_the_context_alone(setup, rng):
    head, params, encode = setup
    config = dataclasses.replace(CONFIG, condition_loss=1.0)
    heads = init_params(condition_specs(config), jax.random.PRNGKey(1))
    assert set(condition_specs(config)) - set(condition_specs(CONFIG)) == {"marginals"}
    context = encode(params, *inputs(rng, head))
    states = marginal_states(heads, context)
    assert [s.shape for s in states] == [(2, 24)] * 4
    shuffled = marginal_states(heads, context[:, ::-1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), states, shuffled)
