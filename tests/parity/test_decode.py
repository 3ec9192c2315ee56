"""Cached sampling: the same draws give the same tokens, JAX's loop against PyTorch's."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.sampling import choose, generate
from tests.sampling.small import CONFIG, OPTIONS, contexts, params_without_end, random_cloud

torch = pytest.importorskip("torch")
from experiments.torch_reference.decode import Decoder, Filters, decoder_of  # noqa: E402
from experiments.torch_reference.layers import load_arrays  # noqa: E402
from experiments.torch_reference.point_step import PointStepTransformer  # noqa: E402
from experiments.torch_reference.point_transformer import PointTransformer  # noqa: E402
from tests.models.tiny_ar import changed  # noqa: E402
from tests.parity.compare import assert_close  # noqa: E402

pytestmark = pytest.mark.usefixtures("x64")
DOUBLE = changed(**{**vars(CONFIG), "dtype": "float64"})


def uniforms_of(keys, points: int) -> torch.Tensor:
    """[B, points, Σ C] what `choose.waiting_times` is the logarithm of; a row's first step feeds S S S S."""
    count = sum(choose.class_counts(DOUBLE.tokenizer))
    ages = jnp.arange(1, points + 1)
    waits = jax.vmap(lambda key: choose.waiting_times(jnp.broadcast_to(key, (points, 2)), ages, count, jnp.float64))
    return torch.tensor(np.exp(-np.asarray(waits(keys))))


def decoder(config, params, context, lengths=None) -> Decoder:
    model = (PointStepTransformer if config.step == "point" else PointTransformer)(config)
    load_arrays(model, jax.tree.map(np.asarray, params))
    with torch.no_grad():
        return decoder_of(model, torch.tensor(context), lengths)


@pytest.mark.parametrize("step", ["token", "point"])
@pytest.mark.parametrize("filters", [
    {}, {"temperature": 1.7, "top_k": 9, "top_p": 0.8}, {"temperature": 0.0}, {"constrain": False, "top_p": 0.5},
], ids=["plain", "filtered", "greedy", "unconstrained"])  # fmt: skip
def test_the_same_draws_give_the_same_tokens(rng, filters, step):
    """A window of four points (or steps), so rings turn over six times; contexts of different lengths."""
    config = dataclasses.replace(DOUBLE, step=step, window=16 if step == "token" else 4)
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params_without_end(config))
    # E comes now and then.
    params["embedding"] = params["embedding"].at[config.tokenizer.eos].set(params["embedding"][0])
    context, lengths = contexts(rng, config, 3).astype(np.float64), np.array([11, 6, 9])
    keys = jax.random.split(jax.random.PRNGKey(int(rng.integers(1 << 30))), 3)
    expected = generate(
        params, config, config.tokenizer, context, key=keys, context_lengths=lengths, **OPTIONS, **filters
    )
    with torch.inference_mode():
        tokens, number, log_probs, states = decoder(config, params, context, torch.tensor(lengths)).generate(
            24, uniforms=uniforms_of(keys, 24), filters=Filters(**filters), chunk=7
        )
    np.testing.assert_array_equal(tokens, expected.tokens)
    np.testing.assert_array_equal(number, expected.num_points)
    P = int(number.max())
    assert P > 0
    assert_close(log_probs.reshape(3, -1), expected.token_log_probs[:, 4:-4])
    assert_close(states[:, :P], expected.hidden)


def test_forced_points_have_the_same_log_probabilities(rng):
    config = changed(dtype="float64", order="self_first", mlp="plain", qk_norm=False, slot_embedding=False, kv_heads=0,
                     tied_head=False, coord_tables="learned", loss_support="vocab", window=8)  # fmt: skip
    params = params_without_end(config)
    context = contexts(rng, config, 2).astype(np.float64)
    clouds = [random_cloud(rng, config, 9) for _ in range(2)]
    expected = generate(
        params, config, config.tokenizer, context, key=jax.random.PRNGKey(0), prefix=clouds, max_points=9, chunk=4
    )
    forced = torch.tensor(np.stack(clouds)[:, 4:-4].reshape(2, 9, 4) - np.array([0, 0, 0, config.bins])).long()
    with torch.inference_mode():
        twin = decoder(config, params, context)
        classes, log_probs, states, _ = twin.points(twin.start(), 0, forced)
    np.testing.assert_array_equal(classes, forced)
    assert_close(log_probs.reshape(2, -1), expected.token_log_probs[:, 4:-4])
    assert_close(states, expected.hidden)
