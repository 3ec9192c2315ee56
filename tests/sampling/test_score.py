"""The teacher-forced twin on its own: padding, prefixes, lengths, errors."""

import dataclasses

import numpy as np
import pytest

from pointillist_jax.files import UserError
from pointillist_jax.sampling import score
from tests.sampling.small import CONFIG, contexts, params_without_end, random_cloud, uncached_log_probs

# Two clouds of at most 23 points wherever it does not matter: all tests share two compiled programs.
CHUNKED = dataclasses.replace(CONFIG, attention="chunked")
PARAMS, IDS = params_without_end(CONFIG), CONFIG.tokenizer


def padded(clouds):
    length = max(map(len, clouds)) + 4
    return np.stack([np.pad(c, (0, length - len(c)), constant_values=IDS.pad) for c in clouds])


@pytest.mark.parametrize("constrain", [True, False])
def test_equals_a_dense_float64_softmax(rng, constrain):
    """Sequences of unequal length, one of a chunked attention many windows long; both definitions."""
    tokens, context = padded([random_cloud(rng, CONFIG, n) for n in (23, 9)]), contexts(rng, CONFIG, 2)
    found = score(PARAMS, CHUNKED, tokens, context, constrain=constrain)
    expected, hidden = uncached_log_probs(PARAMS, CONFIG, tokens, context, legal=constrain)
    np.testing.assert_allclose(found.token_log_probs[:, 4:], expected, atol=1e-5)
    np.testing.assert_allclose(found.log_prob, expected.sum(axis=1), atol=1e-4)
    assert found.num_points.tolist() == [23, 9]
    np.testing.assert_allclose(found.hidden[0].reshape(92, -1), hidden[0, 4:96], atol=1e-5)
    np.testing.assert_allclose(found.hidden[1, :9].reshape(36, -1), hidden[1, 4:40], atol=1e-5)
    assert not found.hidden[1, 9:].any()


def test_masked_mass_is_what_renormalising_gains(rng):
    """log p (renormalised) = log p (raw) - log(1 - masked), token by token."""
    tokens, context = padded([random_cloud(rng, CONFIG, n) for n in (23, 15)]), contexts(rng, CONFIG, 2)
    legal, raw = (score(PARAMS, CHUNKED, tokens, context, constrain=c) for c in (True, False))
    gained = legal.token_log_probs - raw.token_log_probs
    np.testing.assert_allclose(gained, -np.log1p(-legal.token_masked_mass), atol=1e-5)
    np.testing.assert_array_equal(legal.token_masked_mass, raw.token_masked_mass)
    assert gained.max() > 0.1


def test_a_prefix_and_the_empty_cloud(rng):
    cloud, context = random_cloud(rng, CONFIG, 23), contexts(rng, CONFIG, 2)
    empty = IDS.encode(np.zeros((0, 3)), np.zeros(0, int))
    whole = score(PARAMS, CHUNKED, padded([cloud, empty]), context)
    part = score(PARAMS, CHUNKED, padded([cloud[:-8], empty]), context)
    np.testing.assert_allclose(part.token_log_probs[0, :92], whole.token_log_probs[0, :92], atol=1e-5)
    np.testing.assert_allclose(part.hidden[0], whole.hidden[0, :22], atol=1e-5)
    assert whole.num_points.tolist() == [23, 0]
    np.testing.assert_allclose(whole.log_prob[1], whole.token_log_probs[1, 4], atol=1e-6)
    assert whole.log_prob[1] < 0
    alone = score(PARAMS, CHUNKED, empty[None], context[1:])
    assert alone.hidden.shape == (1, 0, 4, CONFIG.width)
    np.testing.assert_allclose(alone.log_prob, whole.log_prob[1:], atol=1e-5)


@pytest.mark.parametrize("change", [
    {4: IDS.pad}, {5: IDS.eos}, {0: 3}, {7: 3}, {5: IDS.bins + 1}, {-1: IDS.pad}, {4: -1}, {12: 0, 13: 0, 14: 0},
])  # fmt: skip
def test_malformed_sequences_are_refused(rng, change):
    tokens = random_cloud(rng, CONFIG, 6)
    for position, token in change.items():
        tokens[position] = token
    with pytest.raises(UserError, match="sequence 0"):
        score(PARAMS, CONFIG, tokens[None], contexts(rng, CONFIG, 1))


def test_shapes_are_checked(rng):
    with pytest.raises(UserError, match=r"\[B, T\]"):
        score(PARAMS, CONFIG, random_cloud(rng, CONFIG, 6), contexts(rng, CONFIG, 1))
