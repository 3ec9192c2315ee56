"""The grammar at work: no random model leaves it, and what is drawn has the probabilities it should have."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from pointillist_jax.sampling import choose, generate, score
from pointillist_jax.tokens import MalformedTokens
from tests.models.tiny_ar import changed, random_params
from tests.sampling.small import contexts

# So few cells that equal points, full rows and full planes are common.
CONFIG = changed(bins=4, num_faces=3, window=8, layers=1)
IDS = CONFIG.tokenizer
ROWS = 500
run = functools.partial(
    generate, random_params(CONFIG), CONFIG, IDS, max_points=12, return_hidden=False, chunk=13, slots=ROWS
)


def keys(seed: int) -> np.ndarray:
    return np.array(jax.random.split(jax.random.PRNGKey(seed), ROWS))


def test_ten_thousand_clouds_of_a_random_model_are_legal(rng):
    """At temperature 3: every sequence decodes strictly, is sorted and ends. Without the grammar, hardly any does."""
    lengths, ends = [], set()
    for seed in range(20):
        context = contexts(rng, CONFIG, ROWS)
        found = run(context, key=keys(seed), temperature=3.0)
        assert (found.num_points <= 12).all()
        for row, n in zip(found.tokens, found.num_points, strict=True):
            IDS.decode(row[: 8 + 4 * n])  # Raises for any broken rule.
            body = row[4 : 4 + 4 * n].reshape(-1, 4)[:, [1, 2, 0, 3]].tolist()
            assert body == sorted(body)
        lengths += found.num_points.tolist()
        ends |= set(found.stop_reason)
    assert len(lengths) == 10_000
    assert set(lengths) == set(range(13))
    assert ends == {"eos", "max_points"}
    free = run(context, key=keys(19), temperature=3.0, constrain=False)
    broken = 0
    for row, n in zip(free.tokens, free.num_points, strict=True):
        try:
            IDS.decode(row[: 8 + 4 * n])
        except MalformedTokens:
            broken += 1
    assert broken > 0.5 * (free.num_points > 1).sum() > 100
    # Nothing was removed, but what would have been is still counted.
    assert free.masked_mass.mean() > 0.02


def test_drawn_frequencies_are_the_renormalised_probabilities(rng):
    """One point after a prefix that forbids much, 10⁴ times: chi-square against the exact probabilities of `score`.

    `score` is checked against a dense float64 softmax in test_generate; here its probabilities also sum to one over
    all legal continuations, tried one by one.
    """
    context = contexts(rng, CONFIG, 1)
    previous = np.array([2, 3, 2, 1])  # x, y, z, face: all following points have y = 3 and z ≥ 2.
    start = [IDS.bos] * 4 + [*previous[:3], IDS.bins + previous[3]]
    end = [IDS.eos] * 4
    points = [[x, y, z, IDS.bins + b] for x in range(4) for y in range(4) for z in range(4) for b in range(3)]
    legal = [p for p in points if IDS.first_error(np.array(start + p + end)) is None]
    assert 10 < len(legal) < 30
    sequences = np.array([start + end + [IDS.pad] * 4] + [start + p + end for p in legal])
    scored = score(random_params(CONFIG), CONFIG, sequences, np.repeat(context, len(sequences), 0))
    log_probs = np.append(scored.token_log_probs[0, 8], scored.token_log_probs[1:, 8:12].sum(axis=1))
    assert abs(np.exp(log_probs).sum() - 1) < 1e-5
    counts = np.zeros(len(sequences))
    index = {tuple(s[8:12]): i for i, s in enumerate(sequences)}
    for seed in range(20):
        found = run(np.repeat(context, ROWS, 0), key=keys(100 + seed), prefix=np.array(start), max_points=2)
        for row in found.tokens:
            counts[index[tuple(row[8:12])]] += 1
    expected = np.exp(log_probs) / np.exp(log_probs).sum() * counts.sum()
    common = expected >= 5
    assert common.sum() > 8
    observed, wanted = ((np.append(x[common], x[~common].sum()) + 1e-9) for x in (counts, expected))
    assert chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-3
    # The test can fail: the probabilities without the grammar's renormalisation are not these.
    raw = score(random_params(CONFIG), CONFIG, sequences, np.repeat(context, len(sequences), 0), constrain=False)
    raw = np.exp(np.append(raw.token_log_probs[0, 8], raw.token_log_probs[1:, 8:12].sum(axis=1)))[common]
    assert chisquare(counts[common], raw / raw.sum() * counts[common].sum()).pvalue < 1e-6


draw = jax.jit(choose.draw, static_argnames="constrain")


def frequencies(logits, legal, number=20_000, **filters) -> np.ndarray:
    settings = {"temperature": 1.0, "top_k": None, "top_p": None} | filters
    settings = choose.Filters(*(None if x is None else jnp.asarray(x) for x in settings.values()))
    keys = jax.random.split(jax.random.PRNGKey(7), number)
    waits = choose.waiting_times(keys, jnp.arange(number), len(logits), jnp.float32)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (number, len(logits)))
    legal = jnp.broadcast_to(jnp.asarray(legal), rows.shape)
    value = draw(rows, legal, waits, settings, jnp.full(number, -1), constrain=True).value
    return np.bincount(np.asarray(value), minlength=len(logits))


def test_temperature_and_filters(rng):
    """Frequencies of 20,000 draws over 40 classes, a third of them forbidden, for every filter alone and together."""
    logits, legal = rng.normal(0, 2, 40), rng.random(40) > 1 / 3
    order = [i for i in np.argsort(-logits) if legal[i]]
    for temperature, top_k, top_p in [
        (1.0, None, None), (0.5, None, None), (3.0, None, None), (1.0, 5, None), (1.0, None, 0.8), (2.0, 12, 0.6),
        (1.0, 100, None), (1.0, None, 1e-6), (0.0, None, None),
    ]:  # fmt: skip
        weights = np.where(legal, np.exp((logits - logits[order[0]]) / max(temperature, 1e-6)), 0)
        if top_k is not None:
            weights[order[top_k:]] = 0
        if top_p is not None:
            mass = np.cumsum(weights[order]) / weights.sum()
            weights[order[int(np.searchsorted(mass, top_p)) + 1 :]] = 0
        counts = frequencies(logits, legal, temperature=temperature, top_k=top_k, top_p=top_p)
        assert not counts[weights == 0].any()
        expected = weights / weights.sum() * counts.sum()
        common = expected >= 5
        observed, wanted = ((np.append(x[common], x[~common].sum()) + 1e-9) for x in (counts, expected))
        if common.sum() > 1:
            assert chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-4


@pytest.mark.parametrize(("top_k", "top_p"), [(5, None), (None, 0.8)])
def test_filters_in_float64(rng, x64, top_k, top_p):
    """The last class that a filter keeps can be drawn, and the next one cannot, whichever way float32 rounds it."""
    logits = rng.normal(0, 2, (200, 40))
    order, rows = np.argsort(-logits), np.arange(200)
    probs = np.take_along_axis(np.exp(logits), order, 1)
    last = top_k - 1 if top_k else (np.cumsum(probs, axis=1) < top_p * probs.sum(axis=1, keepdims=True)).sum(axis=1)
    filters = choose.Filters(jnp.float64(1), top_k and jnp.int32(top_k), top_p and jnp.float64(top_p))
    for place, kept in ((last, True), (last + 1, False)):
        # A class that is kept at all wins with a waiting time this short.
        waits = np.ones_like(logits)
        waits[rows, order[rows, place]] = 1e-9
        args = jnp.asarray(logits), jnp.ones(logits.shape, bool), jnp.asarray(waits), filters, jnp.full(200, -1)
        value = np.asarray(draw(*args, constrain=True).value)
        assert ((value == order[rows, place]) == kept).all()


def test_hopeless_logits(rng):
    """Legal classes that the model finds impossible are still drawn from, and nothing is NaN."""
    logits = jnp.where(jnp.arange(6) < 3, 0.0, -300.0 + jnp.arange(6.0))
    legal = jnp.arange(6) >= 3
    counts = frequencies(logits, legal, number=3000)
    assert counts[:3].sum() == 0
    expected = np.exp([0.0, 1, 2]) / np.exp([0.0, 1, 2]).sum() * 3000
    assert chisquare(counts[3:], expected).pvalue > 1e-4
    filters = choose.Filters(jnp.float32(1.0), None, None)
    one = draw(logits[None], legal[None], jnp.ones((1, 6)), filters, jnp.array([-1]), constrain=True)
    assert float(one.masked_mass[0]) == 1.0
    np.testing.assert_allclose(one.log_prob[0], np.log(np.exp(2) / np.exp([0.0, 1, 2]).sum()), atol=1e-4)
