"""The three attentions against one another, and against a softmax written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.files import UserError
from pointillist_jax.models.attention import attention, cached_attention

# (T, S, N, K, causal, window, kv_lengths, block): whole and broken tiles, grouped queries, windows, empty rows.
CASES = {
    "causal": (50, 50, 4, 4, True, None, None, 16),
    "grouped": (50, 50, 4, 2, True, None, None, 16),
    "window": (70, 70, 2, 1, True, 23, None, 16),
    "window of one": (40, 40, 2, 2, True, 1, None, 16),
    "cross": (30, 45, 4, 2, False, None, None, 16),
    "lengths": (30, 45, 2, 2, False, None, (45, 7), 16),
    "no key at all": (30, 45, 2, 2, False, None, (0, 20), 16),
    "causal lengths": (33, 33, 2, 2, True, None, (33, 9), 8),
    "odd heads": (50, 50, 3, 3, True, None, None, 16),
    "one tile": (24, 24, 2, 2, True, None, None, 256),
    "strips": (50, 50, 4, 2, True, None, None, 32),
    "strips, window": (50, 50, 4, 2, True, 13, None, 32),
    "strips, lengths": (50, 50, 2, 2, True, None, (50, 9), 32),
    "strips, cross": (50, 40, 4, 2, False, None, (40, 0), 32),
}


def inputs(rng, T, S, N, K, H=8, dtype=np.float32):
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in ((2, T, N, H), (2, S, K, H), (2, S, K, H))]


def in_numpy(q, k, v, causal, window, lengths):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(q.shape[:3]):
        first = max(0, t - window + 1) if window else 0
        last = min(t + 1 if causal else k.shape[1], lengths[b] if lengths else k.shape[1])
        if last > first:
            scores = k[b, first:last, n] @ q[b, t, n] / np.sqrt(q.shape[3])
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ v[b, first:last, n] / weights.sum()
    return out


@pytest.mark.parametrize("name", CASES)
def test_chunked_equals_xla_equals_numpy(rng, name):
    T, S, N, K, causal, window, lengths, block = CASES[name]
    q, k, v = inputs(rng, T, S, N, K)
    cotangent = jnp.asarray(rng.normal(size=q.shape), jnp.float32)
    kv_lengths = None if lengths is None else jnp.array(lengths)

    def run(implementation):
        def call(q, k, v):
            options = {"causal": causal, "window": window, "kv_lengths": kv_lengths, "block_size": block}
            return attention(q, k, v, implementation=implementation, **options)

        def both(q, k, v):
            out, pullback = jax.vjp(call, q, k, v)
            return out, *pullback(cotangent)

        return jax.jit(both)(q, k, v)

    chunked, oracle = run("chunked"), run("xla")
    np.testing.assert_allclose(chunked[0], in_numpy(q, k, v, causal, window, lengths), atol=1e-5)
    for found, expected in zip(chunked, oracle, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_chunked_in_float64(rng, x64):
    q, k, v = inputs(rng, 40, 40, 2, 1, dtype=np.float64)
    out = attention(q, k, v, causal=True, implementation="chunked", block_size=16)
    assert out.dtype == jnp.float64
    np.testing.assert_allclose(out, in_numpy(q, k, v, True, None, None), atol=1e-13)


def test_chunked_in_bf16_keeps_softmax_in_float32(rng):
    q, k, v = inputs(rng, 64, 64, 2, 2, dtype=jnp.bfloat16)
    out = attention(q, k, v, causal=True, implementation="chunked", block_size=16)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), in_numpy(q, k, v, True, None, None), atol=2e-2)


@pytest.mark.parametrize(("length", "block_size"), [(32, 16), (64, 32), (100, 16)], ids=["strips", "two", "tiles"])
def test_gradients_in_bf16_are_near_those_in_float32(rng, length, block_size):
    """Several sequences: XLA's CPU back end has products of one that it lacks of many."""
    q, k, v = inputs(rng, length, length, 4, 2, dtype=jnp.bfloat16)
    q, k, v = (jnp.concatenate([x, x[::-1]]) for x in (q, k, v))
    assert len(q) > 1

    def gradients(implementation, *x):
        def loss(*x):
            out = attention(*x, causal=True, implementation=implementation, block_size=block_size)
            return jnp.sum(out.astype(jnp.float32) ** 2)

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*x)

    exact = gradients("xla", *(x.astype(jnp.float32) for x in (q, k, v)))
    for found, expected in zip(gradients("chunked", q, k, v), exact, strict=True):
        assert found.dtype == jnp.bfloat16
        error = jnp.abs(found.astype(jnp.float32) - expected).max() / jnp.abs(expected).max()
        assert error < 2e-2


def test_huge_scores_stay_finite(rng):
    q, k, v = inputs(rng, 40, 40, 2, 2)
    value, grads = jax.value_and_grad(
        lambda *x: attention(*x, causal=True, implementation="chunked", block_size=16).sum(), (0, 1, 2)
    )(q * 1e3, k * 1e3, v)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in grads)


def test_memory_is_linear_in_length():
    """The compiled gradient at T = 4,096 holds no buffer near T × T."""
    T = 4096
    q = jax.ShapeDtypeStruct((1, T, 1, 8), jnp.float32)
    loss = lambda q, k, v: attention(q, k, v, causal=True, implementation="chunked").sum()  # noqa: E731
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, q, q).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < T * T  # A quarter of one float32 score matrix.


def test_cached_step_equals_the_last_row(rng):
    q, k, v = inputs(rng, 20, 20, 4, 2)
    whole = attention(q, k, v, causal=True, implementation="xla")
    np.testing.assert_allclose(cached_attention(q[:, -1], k, v), whole[:, -1], atol=1e-6)
    padded = [jnp.pad(x, ((0, 0), (0, 5), (0, 0), (0, 0)), constant_values=7.0) for x in (k, v)]
    found = cached_attention(q[:, 11], *padded, mask=jnp.arange(25) < 12)
    np.testing.assert_allclose(found, whole[:, 11], atol=1e-6)


def test_bad_shapes_are_refused_in_words(rng):
    q, k, v = inputs(rng, 10, 12, 4, 2)
    with pytest.raises(UserError, match="as many keys"):
        attention(q, k, v, causal=True)
    with pytest.raises(UserError, match="multiple of K"):
        attention(q[:, :, :3], k, v)
    with pytest.raises(UserError, match="needs causal"):
        attention(q, k, v, window=3)
    with pytest.raises(UserError, match=r"attention 'cudnn' needs a GPU and bfloat16, here are .* and float32"):
        attention(q, k, v, implementation="cudnn")
    with pytest.raises(UserError, match="no attention 'flash'"):
        attention(q, k, v, implementation="flash")


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs a CUDA device")
@pytest.mark.parametrize("window", [None, 200])
def test_cudnn_equals_chunked(rng, window):
    q, k, v = inputs(rng, 512, 512, 4, 2, H=64, dtype=jnp.bfloat16)

    def run(implementation):
        def loss(q, k, v):
            out = attention(q, k, v, causal=True, window=window, implementation=implementation)
            return out.astype(jnp.float32).sum() * 1e-2, out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
        return [np.asarray(x, np.float32) for x in (out, *grads)]

    for found, expected in zip(run("cudnn"), run("chunked"), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-2, rtol=2e-2)
