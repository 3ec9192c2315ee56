"""Generation under the same draws: JAX's compiled loop against torch's cached one, token by token.

Letters: B rows, P points, S context, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from experiments.torch_parity.rows import Row, compare, worst_first
from experiments.torch_parity.taps import tensors
from experiments.torch_reference.decode import Filters, decoder_of
from experiments.torch_reference.point_transformer import PointTransformer
from pointillist_jax.configs import ModelConfig
from pointillist_jax.models.ar import accumulator
from pointillist_jax.sampling import choose, generate


def sampling_rows(
    params: Any,
    twin: PointTransformer,
    config: ModelConfig,
    rng: np.random.Generator,
    context: int,
    tokens: int,
    seed: int,
    bounds: Mapping[str, float],
) -> tuple[list[Row], int]:
    """Clouds of random contexts until `tokens` tokens were compared with the grammar, and as many without it.

    Under the grammar y only rises, so the clouds of a model that has learned nothing end soon; without it they grow
    beyond the window.

    Args:
      context: S.

    Returns:
      The worst rows of each kind, and the number of tokens that were compared.
    """
    dtype = np.asarray(params["embedding"]).dtype
    rows, total = [], 0
    for constrain, batch, points in ((True, 8, min(tokens // 4 + 1, 64)), (False, 2, tokens // 4 + 1)):
        label, found, done = "" if constrain else ", no grammar", [], 0
        for turn in range(50):
            given = rng.normal(size=(batch, context, config.width)).astype(dtype)
            more, number = _clouds(params, twin, config, given, points, 100 * seed + turn, constrain, bounds)
            found.append([dataclasses.replace(row, name=f"{row.name}{label}") for row in more])
            done += number
            if done >= tokens:
                break
        rows += [worst_first(kind)[0] for kind in zip(*found, strict=True)]
        total += done
    return rows, total


def _clouds(
    params: Any,
    twin: PointTransformer,
    config: ModelConfig,
    context: np.ndarray,
    points: int,
    seed: int,
    constrain: bool,
    bounds: Mapping[str, float],
) -> tuple[list[Row], int]:
    """Clouds of B contexts [B,S,D] of at most `points` points, and the number of tokens that were compared.

    One row counts the tokens that differ: none may in float64. In narrower dtypes one draw that falls between two
    roundings changes everything after it, so there the two are compared on the same (JAX's) tokens only.
    """
    keys = jax.random.split(jax.random.PRNGKey(seed), len(context))
    made = generate(params, config, config.tokenizer, context, key=keys, max_points=points, constrain=constrain)
    counts = choose.class_counts(config.tokenizer)
    # A row's first step feeds S S S S.
    ages = jnp.arange(1, points + 1)
    draws = [
        choose.uniforms(jnp.broadcast_to(key, (points, 2)), ages, sum(counts), accumulator(config)) for key in keys
    ]
    tokens, number = np.asarray(made.tokens), np.asarray(made.num_points)
    with torch.inference_mode():
        decoder = decoder_of(twin, tensors(context))
        filters = Filters(constrain=constrain)
        found, _, log_probs, states = decoder.generate(points, uniforms=tensors(jnp.stack(draws)), filters=filters)
        longest = int(number.max())
        log_probs, states = log_probs[:, :longest], states[:, :longest]
        differ = int((found.numpy() != tokens).sum())
        if differ:
            forced = tokens[:, 4 : 4 + 4 * longest].reshape(len(tokens), longest, 4) - [0, 0, 0, config.bins]
            forced = np.where(np.arange(longest)[:, None] < number[:, None, None], forced, -1)
            decoder = decoder_of(twin, tensors(context))
            _, log_probs, states, _ = decoder.points(decoder.start(), 0, tensors(forced), filters=filters)
    total = int((4 * number + 4).sum())
    exact = 0.0 if config.dtype == "float64" else np.inf
    rows = [Row("sampling", "tokens drawn", differ, differ / total, 1.0 - differ / total, exact)]
    expected = np.asarray(made.token_log_probs, np.float64)[:, 4 : 4 + 4 * longest].reshape(log_probs.shape)
    real = np.arange(longest) < number[:, None]
    for name, one, other in (
        ("log-probabilities", expected, log_probs),
        ("hidden states", np.asarray(made.hidden, np.float64)[:, :longest], states),
    ):
        rows.append(compare("sampling", name, one[real], other.double().numpy()[real], bounds["models"]))
    return rows, total
