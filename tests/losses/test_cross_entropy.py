"""Chunked cross-entropy against log-softmax written out, and what it promises about memory."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pointillist_jax.losses.cross_entropy import marginal_loss, slot_cross_entropy, token_cross_entropy
from pointillist_jax.models.ar import OutputTable


def inputs(rng, B=2, T=37, D=8, V=24, dtype=jnp.float32):
    hidden, table = (jnp.asarray(rng.normal(size=s), dtype) for s in ((B, T, D), (V, D)))
    labels = jnp.asarray(np.where(rng.random((B, T)) < 0.2, -1, rng.integers(0, V - 4, (B, T))), jnp.int32)
    return hidden, labels, table


def plain(hidden, labels, table, num_classes, z_loss):
    logits = (hidden @ table.T)[..., :num_classes]
    lse = jax.nn.logsumexp(logits, axis=-1)
    label = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
    return jnp.where(labels >= 0, lse - label + z_loss * lse**2, 0).sum()


@pytest.mark.parametrize(("chunk_size", "z_loss"), [(None, 0.0), (5, 0.0), (1, 0.1), (37, 0.1)])
def test_values_and_gradients(rng, chunk_size, z_loss):
    hidden, labels, table = inputs(rng)
    weight = 0.3  # A cotangent other than one.

    def ours(hidden, table):
        options = {"num_classes": 20, "z_loss": z_loss, "chunk_size": chunk_size}
        return weight * token_cross_entropy(hidden, labels, table, **options).total

    found = jax.jit(jax.value_and_grad(ours, (0, 1)))(hidden, table)
    expected = jax.value_and_grad(lambda h, t: weight * plain(h, labels, t, 20, z_loss), (0, 1))(hidden, table)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5), found, expected)
    np.testing.assert_array_equal(found[1][1][20:], 0)  # Padding classes learn nothing.
    np.testing.assert_allclose(found[0], ours(hidden, table), rtol=1e-6)  # Without differentiation too.


def test_gradient_by_finite_differences(rng, x64):
    hidden, labels, table = inputs(rng, T=6, dtype=jnp.float64)
    loss = lambda h, t: token_cross_entropy(h, labels, t, chunk_size=4, z_loss=0.01).total  # noqa: E731
    check_grads(loss, (hidden, table), order=1, modes=["rev"])


def test_per_token_values(rng):
    hidden, labels, table = inputs(rng)
    loss = token_cross_entropy(hidden, labels, table, chunk_size=9)
    logits = np.asarray(hidden @ table.T, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    used = np.asarray(labels) >= 0
    expected = -np.take_along_axis(log_p, np.maximum(labels, 0)[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss.nll, np.where(used, expected, 0), atol=1e-5)
    np.testing.assert_array_equal(loss.correct, used & (logits.argmax(-1) == labels))
    assert loss.count == used.sum()
    np.testing.assert_allclose(loss.mean, expected[used].mean(), rtol=1e-5)


def test_nothing_to_learn_is_zero(rng):
    hidden, labels, table = inputs(rng)
    loss = lambda h: token_cross_entropy(h, jnp.full_like(labels, -1), table).mean  # noqa: E731
    value, grad = jax.value_and_grad(loss)(hidden)
    assert value == 0
    np.testing.assert_array_equal(grad, 0)


def test_logits_are_never_whole():
    """Neither the lowered nor the compiled gradient has a buffer of T × V elements, let alone B × T × V."""
    B, T, D, V = 2, 512, 16, 2048
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((B, T, D), "float32"), ((B, T), "int32"), ((V, D), "float32"))]
    loss = lambda h, l, t: token_cross_entropy(h, l, t, chunk_size=64).total  # noqa: E731
    lowered = jax.jit(jax.grad(loss, (0, 2))).lower(*shapes)
    assert _largest(lowered.as_text()) <= B * 64 * V
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 4 * T * V
    whole = lambda h, l, t: plain(h, l, t, V, 0.0)  # noqa: E731
    assert _largest(jax.jit(jax.grad(whole, (0, 2))).lower(*shapes).as_text()) >= B * T * V


def _largest(text: str) -> int:
    """Most elements of any tensor in a StableHLO program."""
    shapes = re.findall(r"tensor<((?:\d+x)+)[a-z]", text)
    return max(int(np.prod([int(n) for n in shape.rstrip("x").split("x")])) for shape in shapes)


def test_slots(rng):
    """Every target is judged by the classifier of its own slot; the sums per slot add up to the whole."""
    B, T, D, C, F, eos = 2, 14, 8, 6, 10, 20
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    rows = [jnp.asarray(rng.normal(size=(n, D)), jnp.float32) for n in (C + 2, C, C, F)]
    tables = (
        OutputTable(rows[0], C + 1, 0, C, C),
        OutputTable(rows[1], C, 0, C, -1),
        OutputTable(rows[2], C, 0, C, -1),
        OutputTable(rows[3], F, C, F, -1),
    )
    targets = np.zeros((B, T), np.int32)
    for t in range(T):
        targets[:, t] = rng.integers(0, C, B) if (t + 1) % 4 != 3 else rng.integers(C, C + F, B)
    targets[1, 11:] = eos  # At an x slot, then at y and z slots, where it is certain and costs nothing.
    found = slot_cross_entropy(hidden, jnp.asarray(targets), tables, eos)

    nll, counts = np.zeros(4), np.zeros(4)
    for b, t in np.ndindex(B, T):
        slot = (t + 1) % 4
        table, target = tables[slot], targets[b, t]
        if target == eos and slot != 0:
            continue
        label = C if target == eos else target - table.first_id
        logits = np.asarray(table.rows[: table.num_classes] @ hidden[b, t], np.float64)
        nll[slot] += np.log(np.exp(logits).sum()) - logits[label]
        counts[slot] += 1
    np.testing.assert_allclose(found.nll, nll, rtol=1e-5)
    np.testing.assert_array_equal(found.counts, counts)
    np.testing.assert_allclose(found.total, nll.sum(), rtol=1e-5)
    assert found.metrics()["loss_x"][1] == counts[0]


def test_marginals_are_one_distribution_for_each_row(rng, x64):
    """As if every token of a row had the row's state; order does not matter, and ids of no class do not count."""
    eos, V = 100, 12
    tables = [
        OutputTable(jnp.asarray(rng.normal(size=(V, 5))), 9, first, 8, 8 if slot == 0 else -1)
        for slot, first in enumerate((0, 0, 0, 8))
    ]
    states = tuple(jnp.asarray(rng.normal(size=(2, 5))) for _ in range(4))
    targets = tuple(jnp.asarray(rng.choice([*range(16), eos, -1], (2, 7)), jnp.int32) for _ in range(4))
    found = marginal_loss(states, targets, tables, eos)
    expected = sum(
        plain(jnp.tile(s[:, None], (1, 7, 1)), table.labels(t, eos), table.rows, 9, 0.0)
        for s, t, table in zip(states, targets, tables, strict=True)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(marginal_loss(states, tuple(t[:, ::-1] for t in targets), tables, eos), found)
    check_grads(lambda s: marginal_loss(s, targets, tables, eos), (states,), order=1, modes=["rev"])
