"""One step per point: what a token may see, and that training and slot-by-slot sampling are the same model."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pointillist_jax.configs import ModelConfig
from pointillist_jax.data.windows import WindowSource
from pointillist_jax.files import UserError
from pointillist_jax.losses.cross_entropy import slot_cross_entropy, slot_losses
from pointillist_jax.models import PointTransformer
from pointillist_jax.models.ar import embed_tokens, hidden_states, output_tables, run_layers
from pointillist_jax.models.point_step import embed_points, slot_heads, slot_state, window_states
from pointillist_jax.training.ar import training_window
from tests.data.stores import TOKENIZER, MemoryStore
from tests.models.tiny_ar import assert_reaches, changed, loss, random_batch, random_params

CONFIG = changed(step="point", window=8)
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
forward = jax.jit(hidden_states, static_argnums=1)
windows = jax.jit(window_states, static_argnums=1)
OPTIMIZER = optax.adam(3e-3)


@functools.partial(jax.jit, static_argnums=1)
def chain(params, config, points, p, context):
    """States for the point after `p`, from the points up to it: what a sampler that knows no more would compute."""
    known = jnp.where(jnp.arange(points.shape[1])[:, None] <= p, points, config.tokenizer.pad)
    positions = jnp.broadcast_to(jnp.arange(points.shape[1]), points.shape[:2])
    residual = run_layers(params, config, embed_points(params, config, known), context, positions)[:, p]
    states = []
    for slot, head in enumerate(slot_heads(params, config)):
        before = embed_tokens(params, config, points[:, p + 1, slot - 1], slot - 1) if slot else None
        residual, state = slot_state(head, residual, before)
        states.append(state)
    return states


@functools.partial(jax.jit, static_argnums=1)
def learn(params, config, batch):
    value, grads = jax.value_and_grad(loss)(params, config, batch)

    def step(carry, _):
        params, state = carry
        _, grads = jax.value_and_grad(loss)(params, config, batch)
        updates, state = OPTIMIZER.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, OPTIMIZER.init(params)), length=20)
    return value, grads, loss(params, config, batch)


def test_causal(rng):
    """The state at token t reads tokens up to t: all of them, in every slot of the chain, and none after."""
    params, batch = random_params(CONFIG), random_batch(rng, CONFIG)
    tokens = batch["tokens"]
    before = np.asarray(forward(params, CONFIG, tokens, batch["context"]))
    assert (before[:, :3] == 0).all()
    for t in (3, 12, 13, 14, 15, 31):
        other = tokens.copy()
        other[0, t] = (other[0, t] + 1) % CONFIG.bins
        change = np.abs(np.asarray(forward(params, CONFIG, other, batch["context"])) - before).max(axis=-1)
        np.testing.assert_array_equal(change[0, :t], 0)
        np.testing.assert_array_equal(change[1], 0)
        assert (change[0, t:] > 1e-5).all()


def test_window_counts_points(rng):
    """One layer with a window of 3: point 2 reaches what follows points 2, 3 and 4, and no further."""
    assert_reaches(rng, changed(step="point", window=4, layers=1, attention="chunked"), 8, range(8, 27))


def test_slot_by_slot_equals_teacher_forced(rng):
    """The chain as a sampler calls it, point after point, gives the training forward's states and loss."""
    params, batch = random_params(CONFIG), random_batch(rng, CONFIG)
    tokens, context = batch["tokens"], batch["context"]
    teacher = np.asarray(forward(params, CONFIG, tokens, context))
    points = tokens.reshape(2, -1, 4)
    tables, nll = output_tables(params, CONFIG), 0.0
    for p in range(points.shape[1] - 1):
        for slot, state in enumerate(chain(params, CONFIG, points, p, context)):
            np.testing.assert_allclose(state, teacher[:, 4 * p + 3 + slot], atol=1e-5)
            table = tables[slot]
            labels = np.asarray(table.labels(points[:, p + 1, slot], CONFIG.tokenizer.eos))
            logits = np.asarray(state @ table.rows.T, np.float64)[:, : table.num_classes]
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            nll -= sum(log_p[row, label] for row, label in enumerate(labels) if label >= 0)
    targets = np.where(np.arange(32) < 3, CONFIG.tokenizer.pad, batch["targets"])
    targets[:, -1] = CONFIG.tokenizer.pad
    whole = slot_cross_entropy(teacher, targets, tables, CONFIG.tokenizer.eos)
    np.testing.assert_allclose(whole.total, nll, rtol=1e-5)


def test_windows_predict_every_token_once(rng):
    """Over all windows of a store, targets are all tokens but S S S S, each once, read from the point before."""
    store = MemoryStore(rng, [1, 2, 7, 8, 9, 15, 16, 17, 30])
    config = ModelConfig(num_faces=TOKENIZER.num_faces, bins=TOKENIZER.bins, width=8, heads=2, head_dim=4, layers=1,
                         mlp_width=8, window=8, step="point", attention="xla", scan_layers=True)  # fmt: skip
    source = WindowSource(store, **training_window(config))
    found = {i: np.zeros(n, int) for i, n in enumerate(store.lengths)}
    params = random_params(config)
    context = jnp.zeros((1, 1, 8))
    for i in range(len(source)):
        record = source[i]
        batch = {key: value[None] for key, value in record.items() if np.ndim(value) == 1}
        states, targets = windows(params, config, batch, context)
        assert states[0].shape == (1, 8, 8)
        targets = np.stack(targets, axis=-1)[0].ravel()
        first = int(record["positions"][0]) + 4
        used = targets != config.tokenizer.pad
        tokens = store.tokens(int(record["subject"]))
        np.testing.assert_array_equal(tokens[first + np.flatnonzero(used)], targets[used])
        found[int(record["subject"])][first + np.flatnonzero(used)] += 1
    for counts in found.values():
        assert (counts[:4] == 0).all()
        assert (counts[4:] == 1).all()
    with pytest.raises(UserError, match="stride=36 must be at most the window's 32 tokens"):
        training_window(config, 36)


def test_window_loss_equals_the_whole_sequence(rng):
    """A window that holds everything costs what the aligned hidden states of the sequence say."""
    params, batch = random_params(CONFIG), random_batch(rng, CONFIG)
    tokens, ids = batch["tokens"], CONFIG.tokenizer
    positions = np.broadcast_to(np.arange(32), (2, 32))
    window = {"tokens": tokens, "positions": positions, "mask": np.ones((2, 32), bool)}
    states, targets = windows(params, CONFIG, window, batch["context"])
    tables = output_tables(params, CONFIG)
    found = slot_losses(states, targets, tables, ids.eos)
    hidden = forward(params, CONFIG, tokens, batch["context"])
    following = np.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=ids.pad)
    following[:, :3] = ids.pad
    expected = slot_cross_entropy(hidden, following, tables, ids.eos)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)
    assert found.counts.tolist() == [7 + 3 + 1, 7 + 3, 7 + 3, 7 + 3]


@pytest.mark.parametrize("option", [{}, {"mlp": "plain", "coord_tables": "learned", "loss_support": "vocab"}])
def test_learns_with_every_parameter(rng, option):
    config = dataclasses.replace(CONFIG, **option)
    params, batch = random_params(config), random_batch(rng, config)
    value, grads, last = learn(params, config, batch)
    dead = [jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(grads) if not np.any(g)]
    assert dead == []
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert last < value - 0.5


def test_parameters_have_logical_axes(rng):
    model, batch = PointTransformer(CONFIG), random_batch(rng, CONFIG)
    boxed = jax.eval_shape(model.init, jax.random.PRNGKey(0), batch["tokens"], batch["context"])["params"]
    leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert all(isinstance(x, nn.LogicallyPartitioned) and len(x.names) == x.value.ndim for x in leaves)
    assert boxed["slot_heads"]["b"]["mlps"]["up"].names == ("layers", "embed", "mlp")
    assert boxed["point_embedding"].names == (None, "table_embed", "embed")
    found = jax.eval_shape(model.apply, {"params": boxed}, batch["tokens"], batch["context"])
    assert found.shape == (2, 32, CONFIG.width)


def test_unknown_step_is_refused():
    with pytest.raises(UserError, match=r"model\.step='face' must be one of token, point"):
        changed(step="face")
    with pytest.raises(UserError, match=r"model\.slot_layers=0"):
        changed(slot_layers=0)


@pytest.mark.slow
def test_sharded_equals_unsharded():
    """Loss and every gradient, with parameters, heads and positions sharded at once."""
    mesh = "fsdp:2,tensor:2,context:2"
    run = subprocess.run(
        [sys.executable, "-m", "tests.models.mesh_program", "point", mesh],
        env={**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    row = json.loads(run.stdout.splitlines()[-1])[mesh]
    assert row["loss"] < 1e-5
    assert row["grads"] < 1e-5 * max(row["largest"], 1)
