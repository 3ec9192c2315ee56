"""Hand-written derivatives and forms of products against what JAX derives from the definitions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.models.layers import products, rms_norm, weighted_sum
from pointillist_jax.sharding import abstract_mesh


@pytest.fixture(params=["cpu", "gpu"])
def backend(request, monkeypatch):
    """The form that a back end takes; both run anywhere."""
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)


@pytest.mark.usefixtures("backend", "x64")
@pytest.mark.parametrize("shape", [(7, 6), (2, 5, 3, 8)])
def test_the_norms_gradients(shape, rng):
    x, y_bar, scale = rng.normal(size=shape), rng.normal(size=shape), rng.normal(size=shape[-1])

    def definition(x, scale):
        return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale

    y, pullback = jax.vjp(rms_norm, x, scale)
    expected, expected_pullback = jax.vjp(definition, x, scale)
    np.testing.assert_allclose(y, expected, rtol=1e-13)
    for found, wanted in zip(pullback(y_bar), expected_pullback(y_bar), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("backend", "x64")
@pytest.mark.parametrize("axes", [(2,), (0, 1), (1,), (0, 1, 2)])
def test_weighted_sums(axes, rng):
    terms = rng.normal(size=(3, 4, 5))
    weights = rng.normal(size=[terms.shape[axis] for axis in axes])
    letters = "abc"
    spec = f"abc,{''.join(letters[a] for a in axes)}->{''.join(c for i, c in enumerate(letters) if i not in axes)}"
    np.testing.assert_allclose(weighted_sum(terms, weights, axes), np.einsum(spec, terms, weights), rtol=1e-12)


@pytest.fixture
def heads(rng):
    """A function tokens → (x [2,T,8], three weights [8,4,4], loss of three outputs)."""

    def make(tokens: int):
        bars = rng.normal(size=(3, 2, tokens, 4, 4))
        return rng.normal(size=(2, tokens, 8)), list(rng.normal(size=(3, 8, 4, 4))), lambda ys: jnp.vdot(bars, ys)

    return make


# Few tokens, whose products stay apart, and many.
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("tokens", [3, 16])
def test_products_are_those_of_each_weight(tokens, heads):
    x, weights, loss = heads(tokens)
    together = lambda x, weights: jnp.stack(products(x, *weights))  # noqa: E731
    alone = lambda x, weights: jnp.stack([jnp.einsum("BTI,INH->BTNH", x, w) for w in weights])  # noqa: E731
    np.testing.assert_allclose(together(x, weights), alone(x, weights), rtol=1e-12, atol=1e-12)
    found, expected = (jax.grad(lambda *given, f=f: loss(f(*given)), (0, 1))(x, weights) for f in (together, alone))
    for one, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, wanted, rtol=1e-12, atol=1e-12)


# Values on meshes: tests/training/test_sharding.py.
@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 4, "tensor": 2}])
def test_products_have_gradients_on_every_mesh(mesh, heads):
    x, weights, loss = heads(16)
    with jax.sharding.use_abstract_mesh(abstract_mesh(mesh)):
        bars = jax.eval_shape(jax.grad(lambda x, w: loss(jnp.stack(products(x, *w))), (0, 1)), x, weights)
    assert jax.tree.map(jnp.shape, bars) == jax.tree.map(jnp.shape, (x, weights))
