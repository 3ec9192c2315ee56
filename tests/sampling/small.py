"""Models and clouds for the tests of generation: few shapes, so that few loops are compiled."""

from __future__ import annotations

import jax
import numpy as np

from pointillist_jax.configs import ModelConfig
from pointillist_jax.models.ar import hidden_states, output_tables
from tests.models.tiny_ar import changed, random_params

# A window of four points, so that a test's clouds are many windows long.
CONFIG = changed(window=16, layers=2)
OPTIONS = {"max_points": 24, "chunk": 16, "slots": 8}
CONTEXT = 11

forward = jax.jit(hidden_states, static_argnums=1)


def contexts(rng: np.random.Generator, config: ModelConfig, batch: int) -> np.ndarray:
    return rng.normal(size=(batch, CONTEXT, config.width)).astype(np.float32)


def random_cloud(rng: np.random.Generator, config: ModelConfig, points: int) -> np.ndarray:
    """Tokens of a random cloud with some points twice."""
    ids = config.tokenizer
    cells, binding = rng.integers(0, ids.bins, (points, 3)), rng.integers(0, ids.num_faces, points)
    cells[1::5] = cells[: len(cells[1::5])]
    return ids.encode(ids.dequantize(cells), binding)


def params_without_end(config: ModelConfig, seed: int = 0):
    """Random parameters of a model that hardly ever says E, so that clouds grow long."""
    params = random_params(config, seed)
    table = "embedding" if config.tied_head else "head"
    params[table] = params[table].at[config.tokenizer.eos].set(0)
    return params


def uncached_log_probs(params, config: ModelConfig, tokens, context, legal: bool) -> tuple[np.ndarray, np.ndarray]:
    """(log-probability of every token from the fifth on [B, T-4], hidden states) of one dense windowed forward.

    Written without `sampling`: the grammar comes from trying every class with the tokenizer's own check.
    """
    hidden = np.asarray(forward(params, config, tokens, context), np.float64)
    tables = output_tables(params, changed(**{**vars(config), "loss_support": "slot"}))
    ids, out = config.tokenizer, np.zeros((len(tokens), tokens.shape[1] - 4))
    for row, sequence in enumerate(np.asarray(tokens)):
        for t in range(4, len(sequence)):
            if sequence[t] == ids.pad or (sequence[t] == ids.eos and sequence[t - 1] == ids.eos):
                continue
            table, slot = tables[t % 4], t % 4
            logits = hidden[row, t - 1] @ np.asarray(table.rows, np.float64)[: table.num_classes].T
            classes = table.first_id + np.arange(table.num_classes)
            classes[ids.bins :] = np.where(slot == 0, ids.eos, classes[ids.bins :])
            allowed = np.array([not legal or is_legal(ids, sequence[:t], c) for c in classes])
            logits = np.where(allowed, logits, -np.inf)
            top = logits.max()
            chosen = logits[np.flatnonzero(classes == sequence[t])[0]]
            out[row, t - 4] = chosen - top - np.log(np.exp(logits - top).sum())
    return out, hidden


def is_legal(ids, before: np.ndarray, token: int) -> bool:
    """Whether `token` may follow a legal beginning: no rule is broken at its position."""
    error = ids.first_error(np.append(before, token))
    return error is None or error.position > len(before)
