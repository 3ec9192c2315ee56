"""From a cloud, or from a context alone, to an avatar."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.configs import DecoderConfig
from pointillist_jax.files import UserError
from pointillist_jax.flame import animate
from pointillist_jax.gaussians import load_avatar, save_avatar
from pointillist_jax.models.gaussian_decoder import decode, param_specs
from pointillist_jax.models.layers import init_params
from pointillist_jax.reconstruct import decode_avatar, reconstruct
from pointillist_jax.tokens import PointTokenizer
from tests.fitting.scenes import ball_head
from tests.models import tiny_ar

HEAD = ball_head()
CONFIG = DecoderConfig(feature_width=6, width=16, layers=1, heads=2, head_dim=8, mlp_width=24, attention="xla")


def random_decoder(config: DecoderConfig):
    params = init_params(param_specs(config), jax.random.PRNGKey(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32), params)


def test_a_decoded_cloud_is_an_avatar_that_moves(rng, tmp_path):
    params = random_decoder(CONFIG)
    points = 0.1 * rng.normal(size=(30, 3)).astype(np.float32)
    binding, hidden = rng.integers(0, HEAD.num_faces, 30), rng.normal(size=(30, 4, 6)).astype(np.float32)
    canonical = HEAD.neutral_params().replace(shape=jnp.array([0.5, -1.0])).canonical()
    avatar = decode_avatar(params, CONFIG, HEAD, canonical, points, binding, hidden)
    # Padding to a bucket changed nothing.
    expected = jax.jit(decode, static_argnums=1)(params, CONFIG, points[None], hidden[None]).gaussians
    for name in ("means", "quats", "scales", "opacities", "colors"):
        np.testing.assert_allclose(getattr(avatar.gaussians, name), getattr(expected, name)[0], atol=1e-5)
    np.testing.assert_array_equal(avatar.rig.binding, binding)
    np.testing.assert_allclose(animate(avatar, HEAD, canonical).means, avatar.gaussians.means, atol=1e-6)
    save_avatar(tmp_path / "me", avatar)
    assert load_avatar(tmp_path / "me").gaussians.num_gaussians == 30
    with pytest.raises(UserError, match="reads AR features"):
        decode_avatar(params, CONFIG, HEAD, canonical, points, binding)
    with pytest.raises(UserError, match="AR model's context"):
        decode_avatar(
            params, dataclasses.replace(CONFIG, cross_attention=True), HEAD, canonical, points, binding, hidden
        )


@pytest.mark.slow
def test_reconstruct_generates_decodes_and_rigs(rng):
    tokenizer = PointTokenizer(HEAD.num_faces, 32)
    ar_config = tiny_ar.CONFIG.for_tokenizer(tokenizer)
    ar_params = {"transformer": tiny_ar.random_params(ar_config)}
    config = CONFIG.for_features(tokenizer, ar_config.width)
    params = random_decoder(config)
    context = rng.normal(size=(5, ar_config.width)).astype(np.float32)
    canonical = HEAD.neutral_params().canonical()
    made = reconstruct(
        ar_params,
        ar_config,
        params,
        config,
        tokenizer,
        HEAD,
        context,
        canonical,
        key=jax.random.PRNGKey(2),
        max_points=6,
    )
    num = int(made.cloud.num_points[0])
    assert 0 < num <= 6
    avatar = made.avatar
    assert avatar.gaussians.num_gaussians == num
    np.testing.assert_array_equal(avatar.rig.binding, made.cloud.binding[0][:num])
    offsets = np.asarray(avatar.gaussians.means) - np.asarray(made.cloud.points)[0][:num]
    assert 0 < np.abs(offsets).max() <= config.max_offset + 1e-6
    # The hidden states are used: others give other colours.
    other = decode_avatar(
        params, config, HEAD, canonical, made.cloud.points[0][:num], made.cloud.binding[0][:num],
        -np.asarray(made.cloud.hidden[0][:num]),
    )  # fmt: skip
    assert np.abs(other.gaussians.colors - avatar.gaussians.colors).max() > 1e-3
    with pytest.raises(UserError, match="hidden states of width 6, the AR model has 32"):
        reconstruct(
            ar_params, ar_config, params, CONFIG, tokenizer, HEAD, context, canonical, key=jax.random.PRNGKey(2),
            max_points=6,
        )  # fmt: skip
