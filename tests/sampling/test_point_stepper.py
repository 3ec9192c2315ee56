"""One step per point behind the sampling loop: cached = uncached, and the grammar."""

import jax
import numpy as np

from pointillist_jax.sampling import generate, score
from tests.models.tiny_ar import changed, random_params

# A window of 4 points: clouds of 13 go three times around the ring.
CONFIG = changed(step="point", window=4)
KEYS = np.asarray(jax.random.split(jax.random.PRNGKey(0), 3))


def sample(params, rng, **options):
    context = rng.normal(size=(3, 7, CONFIG.width)).astype(np.float32)
    options = {"key": KEYS, "max_points": 13, "chunk": 5, "temperature": 2.0} | options
    return generate(params, CONFIG, CONFIG.tokenizer, context, **options), context


def test_cached_equals_windowed_forward(rng):
    """Log-probabilities, masked mass and hidden states at every fill of the ring and beyond it."""
    params = random_params(CONFIG)
    found, context = sample(params, rng)
    assert found.num_points.max() == 13
    whole = score(params, CONFIG, found.tokens, context)
    drawn = found.token_log_probs != 0
    assert drawn.sum() >= 13 * 4
    np.testing.assert_allclose(found.token_log_probs[drawn], whole.token_log_probs[drawn], atol=1e-5)
    np.testing.assert_allclose(found.token_masked_mass[drawn], whole.token_masked_mass[drawn], atol=1e-5)
    assert found.hidden.shape == (3, 13, 4, CONFIG.width)
    np.testing.assert_allclose(found.hidden, whole.hidden, atol=1e-5)


def test_the_window_matters(rng):
    """The same tokens scored with a window of 16 points cost something else once 4 points are exceeded."""
    params = random_params(CONFIG)
    found, context = sample(params, rng)
    wide = score(params, changed(step="point", window=16), found.tokens, context)
    difference = np.abs(found.token_log_probs - wide.token_log_probs).max(axis=0)
    assert difference[4:16].max() < 1e-5  # S S S S and three points: the fourth is drawn with all of them in sight.
    assert difference[24:56].max() > 1e-3


def test_grammar(rng):
    params = random_params(CONFIG)
    found, _ = sample(params, rng, temperature=5.0, max_points=40)
    for tokens, n in zip(found.tokens, found.num_points, strict=True):
        points, binding = CONFIG.tokenizer.decode(tokens[: 4 * n + 8])
        assert len(points) == len(binding) == n
    free, _ = sample(params, rng, temperature=5.0, max_points=40, constrain=False)
    broken = [CONFIG.tokenizer.first_error(t[: 4 * n + 8]) for t, n in zip(free.tokens, free.num_points, strict=True)]
    assert any(broken)


def test_a_prefix_is_kept_and_rows_do_not_meet(rng):
    params = random_params(CONFIG)
    whole, context = sample(params, rng)
    row = int(whole.num_points.argmax())
    again = generate(
        params, CONFIG, CONFIG.tokenizer, context[row : row + 1], key=KEYS[row], max_points=13, chunk=5,
        temperature=2.0, prefix=whole.tokens[row, : 4 + 4 * 6],
    )  # fmt: skip
    np.testing.assert_array_equal(again.tokens[0], whole.tokens[row])
    np.testing.assert_allclose(again.token_log_probs[0], whole.token_log_probs[row], atol=1e-5)
