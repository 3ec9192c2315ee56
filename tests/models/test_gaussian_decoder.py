"""The Gaussian decoder (its torch twin: tests/parity): equivariance, padding, ablations, what it starts from."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.configs import PATCH_COLORS, DecoderConfig, preset
from pointillist_jax.files import UserError
from pointillist_jax.models import GaussianDecoder
from pointillist_jax.models.gaussian_decoder import decode, param_specs
from pointillist_jax.models.layers import init_params
from pointillist_jax.tokens import PointTokenizer

CONFIG = DecoderConfig(
    feature_width=10, context_width=9, width=24, layers=2, heads=3, head_dim=8, mlp_width=40, attention="xla",
    cross_attention=True,
)  # fmt: skip
FIELDS = ("means", "quats", "scales", "opacities", "colors")
run = jax.jit(decode, static_argnums=1)


def random_params(config: DecoderConfig, seed: int = 0, dtype=jnp.float32):
    """Every parameter random: the head starts at zero and would hide the rest."""
    params = init_params(param_specs(config), jax.random.PRNGKey(seed), dtype)
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return tree.unflatten([x + jnp.asarray(rng.normal(0, 0.05, x.shape), dtype) for x in leaves])


def random_inputs(rng, batch: int = 2, points: int = 50, config: DecoderConfig = CONFIG):
    positions = rng.uniform(config.lower, config.upper, (batch, points, 3)).astype(np.float32)
    hidden = rng.normal(size=(batch, points, 4, config.feature_width)).astype(np.float32)
    return positions, hidden, rng.normal(size=(batch, 7, config.context_width)).astype(np.float32)


def test_a_permutation_of_points_permutes_the_result(rng):
    params = random_params(CONFIG)
    points, hidden, context = random_inputs(rng)
    order = rng.permutation(points.shape[1])
    plain = run(params, CONFIG, points, hidden, None, context)
    moved = run(params, CONFIG, points[:, order], hidden[:, order], None, context)
    for name in FIELDS:
        np.testing.assert_allclose(getattr(moved.gaussians, name), getattr(plain.gaussians, name)[:, order], atol=1e-5)


def test_padding_changes_nothing_and_is_invisible(rng):
    params = random_params(CONFIG)
    points, hidden, context = random_inputs(rng)
    lengths, context_lengths = jnp.array([50, 31]), jnp.array([7, 4])
    plain = run(params, CONFIG, points, hidden, lengths, context, context_lengths)
    padded = [np.pad(x, [(0, 0), (0, 23)] + [(0, 0)] * (x.ndim - 2), constant_values=3.0) for x in (points, hidden)]
    longer = np.pad(context, [(0, 0), (0, 2), (0, 0)], constant_values=5.0)
    longer[1, 4:] = -7.0
    more = run(params, CONFIG, *padded, lengths, longer, context_lengths)
    alone = run(params, CONFIG, points[1:, :31], hidden[1:, :31], None, context[1:, :4])
    for name in FIELDS:
        for row, n in enumerate((50, 31)):
            np.testing.assert_allclose(
                getattr(more.gaussians, name)[row, :n], getattr(plain.gaussians, name)[row, :n], atol=1e-5
            )
        np.testing.assert_allclose(getattr(alone.gaussians, name)[0], getattr(plain.gaussians, name)[1, :31], atol=1e-5)
    assert not np.any(more.gaussians.opacities[0, 50:])
    assert not np.any(more.gaussians.opacities[1, 31:])
    assert not np.any(more.offsets[1, 31:])

    def visible(points, hidden):
        g = run(params, CONFIG, points, hidden, lengths, longer, context_lengths).gaussians
        return sum(jnp.sum(jnp.cos(getattr(g, name)) * g.opacities.reshape(2, 73, *[1] * (getattr(g, name).ndim - 2)))
                   for name in FIELDS)  # fmt: skip

    for gradient in jax.grad(visible, (0, 1))(*map(jnp.asarray, padded)):
        assert np.isfinite(gradient).all()
        assert not np.any(gradient[0, 50:])
        assert not np.any(gradient[1, 31:])
        assert np.any(gradient[1, :31])


@pytest.mark.parametrize(
    ("inputs", "cross"), [("both", True), ("ar_only", False), ("position_only", True), ("none", True)]
)
def test_each_ablation_ignores_what_it_should(rng, inputs, cross):
    config = dataclasses.replace(CONFIG, inputs=inputs, cross_attention=cross, layers=1)
    params, arrays = random_params(config), random_inputs(rng)

    def total(points, hidden, context):
        g = decode(params, config, points, hidden, None, context).gaussians
        # Offsets rather than means: points are added to them.
        return sum(jnp.sum(jnp.sin(3 * x)) for x in (g.means - points, g.quats, g.scales, g.opacities, g.colors))

    gradients = jax.jit(jax.grad(total, (0, 1, 2)))(*arrays)
    used = (config.uses_positions, config.uses_features, cross and inputs != "none")
    for gradient, used_here in zip(gradients, used, strict=True):
        # `g.means - points` leaves rounding errors of a zero behind, no more.
        assert (np.abs(gradient).max() > 1e-4) == used_here, np.abs(gradient).max()
        if not used_here:
            np.testing.assert_array_equal(gradient, 0)


def test_it_starts_from_equal_faint_gaussians_on_the_points(rng):
    points, hidden, context = random_inputs(rng)
    params = init_params(param_specs(CONFIG), jax.random.PRNGKey(0))
    abstract = jax.eval_shape(GaussianDecoder(CONFIG).init, jax.random.PRNGKey(0), points, hidden, None, context)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, nn.unbox(abstract)["params"])
    gaussians, offsets = run(params, CONFIG, points, hidden, None, context)
    np.testing.assert_array_equal(gaussians.means, points)
    assert not np.any(offsets)
    np.testing.assert_allclose(gaussians.opacities, 0.1, rtol=1e-6)
    np.testing.assert_allclose(gaussians.scales, np.exp(-5), rtol=1e-6)
    np.testing.assert_allclose(gaussians.quats, np.broadcast_to([1, 0, 0, 0], gaussians.quats.shape), atol=1e-6)
    np.testing.assert_allclose(gaussians.colors, 0.5, rtol=1e-6)


COLORED = dataclasses.replace(CONFIG, context_colors=True, context_width=9 + PATCH_COLORS, context_tokens=7)


def test_with_the_portraits_colours_points_still_have_no_order(rng):
    params, (points, hidden, context) = random_params(COLORED), random_inputs(rng, config=COLORED)
    order = rng.permutation(points.shape[1])
    plain = run(params, COLORED, points, hidden, None, context)
    moved = run(params, COLORED, points[:, order], hidden[:, order], None, context)
    for name in FIELDS:
        np.testing.assert_allclose(getattr(moved.gaussians, name), getattr(plain.gaussians, name)[:, order], atol=1e-5)


def test_colours_are_copied_from_the_portrait(rng):
    points, hidden, context = random_inputs(rng, config=COLORED)
    params = init_params(param_specs(COLORED), jax.random.PRNGKey(0))
    # The head starts at zero, so before training every point has a mean of the portrait's colours.
    context[..., -PATCH_COLORS:] = np.tile([0.2, -0.4, 0.6], 4)
    colors = run(params, COLORED, points, hidden, None, context).gaussians.colors
    np.testing.assert_allclose(colors, np.broadcast_to([0.6, 0.3, 0.8], colors.shape), atol=1e-5)
    # Which one it takes is learned: the place of a quarter can be made to stand out for one query.
    context[:, 3, -PATCH_COLORS : -PATCH_COLORS + 3] = 0.9
    loud = params["copy"]["places"].at[3 * 4].set(0.0)
    query = jnp.zeros_like(params["copy"]["query"]["kernel"])
    chosen = params | {"copy": params["copy"] | {"places": loud, "query": {"kernel": query}}}
    mean = run(chosen, COLORED, points, hidden, None, context).gaussians.colors
    np.testing.assert_allclose(mean[..., 1], 0.3 + (0.95 - 0.3) / 28, atol=1e-4)
    gradient = jax.grad(lambda p: run(p, COLORED, points, hidden, None, context).gaussians.colors[..., 1].sum())(params)
    assert all(np.any(gradient["copy"][name]["kernel"] if name != "places" else gradient["copy"][name])
               for name in ("query", "key", "places"))  # fmt: skip


def test_outputs_stay_in_bounds(rng):
    params = jax.tree.map(lambda x: 30 * x, random_params(CONFIG))
    points, hidden, context = random_inputs(rng)
    gaussians, offsets = run(params, CONFIG, points, hidden, None, context)
    assert 0.09 < np.abs(offsets).max() <= 0.1 + 1e-6
    assert np.min(gaussians.scales) >= np.float32(1e-5)
    assert np.max(gaussians.scales) <= np.float32(0.02)
    assert 0 <= np.min(gaussians.colors) <= np.max(gaussians.colors) <= 1
    np.testing.assert_allclose(np.linalg.norm(gaussians.quats, axis=-1), 1, rtol=1e-4)


def test_memory_is_linear_in_the_points():
    """10⁵ points: P × P bytes would be 10 GB; what XLA plans for is looked at, nothing is run."""
    config = dataclasses.replace(CONFIG, cross_attention=False, attention="chunked", attention_block=512)
    params = jax.eval_shape(lambda: init_params(param_specs(config), jax.random.PRNGKey(0)))
    points, hidden = (jax.ShapeDtypeStruct((1, 100_000, *rest), jnp.float32) for rest in ((3,), (4, 10)))

    def total(params, points, hidden):
        return jnp.sum(decode(params, config, points, hidden).gaussians.colors)

    compiled = jax.jit(jax.grad(total)).lower(params, points, hidden).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1 << 30


def test_presets_and_refusals():
    for name in ("tiny", "small", "paper"):
        assert preset(name).decoder.lambda_ssim == 0.5
    assert preset("paper").decoder.train.steps == 12_500
    tokenizer = PointTokenizer(50, lower=(-1.0, -1.0, -1.0), upper=(1.0, 1.0, 1.0))
    sized = CONFIG.for_features(tokenizer, 77)
    assert (sized.lower, sized.feature_width) == ((-1.0, -1.0, -1.0), 77)
    for change, message in (
        ({"inputs": "colour"}, "one of both"),
        ({"points": "flame_vertices"}, "no AR features"),
        ({"views": 0}, "at least 1"),
        ({"context_colors": True, "cross_attention": False}, "needs decoder.cross_attention"),
        ({"context_colors": True, "inputs": "none"}, "one Gaussian for all"),
        ({"initial_opacity": 1.0}, "initial_opacity"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(CONFIG, **change)
