"""A transformer small enough for a test, with every option in reach, and a random batch for it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pointillist_jax.configs import ModelConfig
from pointillist_jax.losses.cross_entropy import slot_cross_entropy
from pointillist_jax.models.ar import hidden_states, output_tables, param_specs
from pointillist_jax.models.layers import init_params

CONFIG = ModelConfig(
    num_faces=40, bins=32, width=32, layers=2, heads=4, head_dim=8, kv_heads=2, mlp_width=48, window=32,
    attention="xla", attention_block=16,
    scan_layers=True,
)  # fmt: skip


def changed(**options) -> ModelConfig:
    return dataclasses.replace(CONFIG, **options)


def random_params(config: ModelConfig, seed: int = 0):
    """Every parameter random: ones and zeros at the start would hide a norm or a table that is left out."""
    dtype = jnp.promote_types(config.dtype, jnp.float32)
    params = init_params(param_specs(config), jax.random.PRNGKey(seed), dtype)
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return tree.unflatten([x + jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype) for x in leaves])


def random_batch(rng: np.random.Generator, config: ModelConfig, batch: int = 2, length: int = 32, context: int = 11):
    """{"tokens", "targets" [B,T], "context" [B,S,D]}: legal at every slot, the last row ends early with E and P."""
    ids = config.tokenizer
    points = rng.integers(0, ids.bins, (batch, length // 4 + 1, 4))
    points[..., 3] = ids.bins + rng.integers(0, ids.num_faces, points.shape[:2])
    tokens = points.reshape(batch, -1)
    tokens[0, :4] = ids.bos
    tokens[-1, length // 2 : length // 2 + 4] = ids.eos
    tokens[-1, length // 2 + 4 :] = ids.pad
    return {
        "tokens": tokens[:, :length].astype(np.int32),
        "targets": tokens[:, 1 : length + 1].astype(np.int32),
        "context": rng.normal(size=(batch, context, config.width)).astype(np.float32),
    }


def loss(params, config: ModelConfig, batch):
    """Mean next-token loss."""
    hidden = hidden_states(params, config, batch["tokens"], batch["context"])
    return slot_cross_entropy(hidden, batch["targets"], output_tables(params, config), config.tokenizer.eos).mean


def assert_reaches(rng: np.random.Generator, config: ModelConfig, token: int, reached: range) -> None:
    """Another token at place `token` changes the states at `reached` and no other."""
    params, batch = random_params(config), random_batch(rng, config)
    tokens = batch["tokens"].copy()
    tokens[0, token] = (tokens[0, token] + 1) % config.bins
    forward = jax.jit(lambda tokens: hidden_states(params, config, tokens, batch["context"]))
    change = np.abs(np.asarray(forward(tokens) - forward(batch["tokens"])))[0].max(axis=-1)
    assert (change[reached.start : reached.stop] > 1e-6).all()
    np.testing.assert_array_equal(np.delete(change, reached), 0)
