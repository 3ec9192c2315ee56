"""Generation: caches change nothing, and neither does the company a subject keeps."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from pointillist_jax.files import UserError
from pointillist_jax.sampling import Request, generate, generate_many, score
from tests.models.tiny_ar import changed, random_params
from tests.sampling.small import (
    CONFIG,
    OPTIONS,
    contexts,
    params_without_end,
    random_cloud,
    uncached_log_probs,
)

IDS = CONFIG.tokenizer
# Of float32 values of size one to forty.
LAST_DIGIT = 1e-5
run = functools.partial(generate, params_without_end(CONFIG), CONFIG, IDS, **OPTIONS)


def test_cached_equals_uncached_at_every_fill(rng):
    """Forced through 24 points, six windows: log-probabilities and hidden states of every token ≤ 1e-5.

    The window is four points, so fills 1 … 16, the edge and five windows beyond are all among the tokens.
    """
    context = contexts(rng, CONFIG, 2)
    clouds = [random_cloud(rng, CONFIG, 24) for _ in range(2)]
    found = run(context, key=jax.random.PRNGKey(0), prefix=clouds)
    np.testing.assert_array_equal(found.tokens, np.stack(clouds))
    assert found.stop_reason == ["max_points"] * 2
    expected, hidden = uncached_log_probs(params_without_end(CONFIG), CONFIG, found.tokens, context, legal=True)
    expected[:, -4:] = 0  # The forced E is certain.
    np.testing.assert_allclose(found.token_log_probs[:, 4:], expected, atol=1e-5)
    np.testing.assert_allclose(found.hidden.reshape(2, 96, -1), hidden[:, 4:100], atol=1e-5)
    # One token less of a window is another model, by far more than the tolerance.
    other = uncached_log_probs(
        params_without_end(CONFIG), dataclasses.replace(CONFIG, window=12), found.tokens, context, legal=True
    )[0]
    np.testing.assert_allclose(other[:, :8], expected[:, :8], atol=1e-5)
    assert np.abs(other - expected)[:, 16:96].max() > 1e-3


def test_sampled_tokens_have_the_log_probabilities_of_score(rng):
    """The same, for tokens that the loop drew itself, and what the grammar removed; with a filter at work or not."""
    context = contexts(rng, CONFIG, 3)
    for seed, temperature in ((0, 1.0), (1, 2.0)):
        found = run(context, key=jax.random.split(jax.random.PRNGKey(seed), 3), temperature=temperature)
        again = score(params_without_end(CONFIG), CONFIG, found.tokens, context)
        forced = np.array(found.stop_reason) == "max_points"
        ends = (np.arange(found.tokens.shape[1]) == 4 + 4 * found.num_points[:, None]) & forced[:, None]
        for name in ("token_log_probs", "token_masked_mass"):
            np.testing.assert_allclose(getattr(found, name), np.where(ends, 0, getattr(again, name)), atol=1e-5)
        np.testing.assert_allclose(found.hidden, again.hidden, atol=1e-5)
        np.testing.assert_allclose(found.log_prob, found.token_log_probs.sum(axis=1))
        assert 0.05 < found.masked_mass.mean() < 0.95


def test_every_option_the_other_way(rng):
    """The paper's recipe: self-attention first, one learned table, an untied head over the whole vocabulary, …"""
    config = changed(
        order="self_first", mlp="plain", qk_norm=False, slot_embedding=False, tied_head=False, kv_heads=0,
        coord_tables="learned", loss_support="vocab", window=8, layers=1, scan_layers=False,
    )  # fmt: skip
    params, context = random_params(config), contexts(rng, config, 2)
    clouds = [random_cloud(rng, config, n) for n in (7, 5)]
    lengths = np.array([11, 6])
    found = generate(
        params, config, config.tokenizer, context, key=jax.random.PRNGKey(0), max_points=9, prefix=clouds, chunk=4,
        context_lengths=lengths,
    )  # fmt: skip
    for i, cloud in enumerate(clouds):
        np.testing.assert_array_equal(found.tokens[i, : len(cloud) - 4], cloud[:-4])
    again = score(params, config, found.tokens, context, context_lengths=lengths)
    np.testing.assert_allclose(found.hidden, again.hidden, atol=1e-5)
    np.testing.assert_allclose(found.token_log_probs[:, :24], again.token_log_probs[:, :24], atol=1e-5)


@pytest.mark.parametrize(("dtype", "least", "most"), [("int8", 1e-4, 0.1), ("bfloat16", 1e-4, 0.1)])
def test_small_caches_are_close(rng, dtype, least, most):
    config = changed(window=16, layers=1)
    params, context = params_without_end(config), contexts(rng, config, 1)
    args = params, config, config.tokenizer, context
    options = {"key": jax.random.PRNGKey(0), "max_points": 12, "prefix": random_cloud(rng, config, 12), "chunk": 13}
    found = generate(*args, **options, cache_dtype=dtype)
    off = np.abs(found.token_log_probs - score(params, config, found.tokens, context).token_log_probs)[:, :52].max()
    assert least < off < most


def test_the_batch_changes_nothing(rng):
    """Batch 1, 7, and a queue of eleven through eight rows: the same tokens for the same key and subject."""
    params, context = params_without_end(CONFIG), contexts(rng, CONFIG, 11)
    keys = np.array(jax.random.split(jax.random.PRNGKey(3), 11))
    # Different limits, so that rows become free at different times.
    limits = [24, 3, 9, 17, 5, 0, 24, 12, 7, 20, 24]
    seven = run(context[:7], key=keys[:7])
    assert len({tuple(row) for row in seven.tokens}) == 7
    requests = [Request(i, context[i], keys[i], limits[i]) for i in range(11)]
    queue = {}
    for name, one in generate_many(params, CONFIG, IDS, requests, **OPTIONS | {"slots": 8}):
        queue[name] = one
    assert sorted(queue) == list(range(11))
    assert list(queue) != sorted(queue)
    for i in range(11):
        # The very same program. A row's place may still show in the last digit: not all CPUs round all rows alike.
        alone = run(context[i : i + 1], key=keys[i])
        points = min(limits[i], alone.num_points[0])
        assert queue[i].num_points[0] == points
        np.testing.assert_array_equal(queue[i].tokens[0, : 4 + 4 * points], alone.tokens[0, : 4 + 4 * points])
        np.testing.assert_allclose(queue[i].hidden[0], alone.hidden[0, :points], atol=LAST_DIGIT)
        limited = run(context[i : i + 1], key=keys[i], max_points=limits[i])
        assert queue[i].stop_reason == limited.stop_reason
        for name in ("log_prob", "token_log_probs", "masked_mass", "token_masked_mass"):
            np.testing.assert_allclose(getattr(queue[i], name), getattr(limited, name), atol=LAST_DIGIT)
        if i < 7:
            np.testing.assert_array_equal(alone.tokens[0], seven.tokens[i])
            np.testing.assert_allclose(alone.token_log_probs[0], seven.token_log_probs[i], atol=LAST_DIGIT)
    # One row alone, unpadded, is another program: the same up to rounding, which decides no token here.
    for i in (0, 6):
        alone = run(context[i : i + 1], key=keys[i], slots=0)
        np.testing.assert_array_equal(alone.tokens[0], seven.tokens[i])
        np.testing.assert_allclose(alone.token_log_probs[0], seven.token_log_probs[i], atol=1e-5)


@pytest.mark.parametrize("token", [IDS.eos, IDS.pad, IDS.bos])
@pytest.mark.parametrize(("at", "times"), [(12, 4), (12, 1), (13, 1), (4, 4)])
def test_only_the_end_of_a_prefix_is_dropped(rng, token, at, times):
    """E, P or S between the points is refused with its place, not left out."""
    cloud = random_cloud(rng, CONFIG, 6)
    prefix = np.insert(cloud, [at] * times, token)
    # E at an x slot is legal as such: then what follows it is not.
    place = at + times if token == IDS.eos and at % 4 == 0 else at
    with pytest.raises(UserError, match=rf"prefix of 0: at token {place}, .* A prefix is S S S S and whole points\."):
        run(contexts(rng, CONFIG, 1), key=jax.random.PRNGKey(0), prefix=prefix)


def test_the_end_of_a_prefix_is_dropped(rng):
    context, cloud = contexts(rng, CONFIG, 1), random_cloud(rng, CONFIG, 6)
    plain = run(context, key=jax.random.PRNGKey(0), prefix=cloud[:-4])
    padded = np.append(cloud, [IDS.pad] * 5)
    for prefix in (cloud, padded, cloud[:-3]):
        np.testing.assert_array_equal(run(context, key=jax.random.PRNGKey(0), prefix=prefix).tokens, plain.tokens)
    for wrong, said in ((cloud[:-6], "at its end"), (cloud[None], "shape"), (cloud / 2, "dtype")):
        with pytest.raises(UserError, match=said):
            run(context, key=jax.random.PRNGKey(0), prefix=[wrong])


def test_a_row_ends_alone(rng):
    """Rows of one chunk end at 5, 9 and 14 points or by E while others go on: each has what `score` says, no more."""
    params, context = params_without_end(CONFIG), contexts(rng, CONFIG, 12)
    keys, limits = np.array(jax.random.split(jax.random.PRNGKey(4), 12)), [5, 9, 14, 24] * 3
    requests = [Request(i, context[i], keys[i], limits[i]) for i in range(12)]
    seven = dict(generate_many(params, CONFIG, IDS, requests[:7], **OPTIONS))
    queue = dict(generate_many(params, CONFIG, IDS, requests, **OPTIONS))
    reasons = set()
    for i, limit in enumerate(limits):
        found, n = queue[i], int(queue[i].num_points[0])
        reasons |= {(limit, *found.stop_reason)}
        assert found.stop_reason == (["max_points"] if n == limit else ["eos"])
        whole = score(params, CONFIG, np.pad(found.tokens, ((0, 0), (0, 96 - 4 * limit)), constant_values=IDS.pad),
                      context[i : i + 1])  # fmt: skip
        drawn = 4 * n + (n < limit)  # The E of max_points is forced.
        for name in ("token_log_probs", "token_masked_mass"):
            np.testing.assert_allclose(
                getattr(found, name)[:, : 4 + drawn], getattr(whole, name)[:, : 4 + drawn], atol=1e-5
            )
            assert not getattr(found, name)[:, 4 + drawn :].any()
        np.testing.assert_allclose(found.log_prob, whole.token_log_probs[:, : 4 + drawn].sum(axis=1), atol=1e-4)
        masked = whole.token_masked_mass[:, 4 : 4 + drawn].mean(axis=1)
        np.testing.assert_allclose(found.masked_mass, masked, atol=1e-5)
        # Alone, among seven and through the queue.
        alone = run(context[i : i + 1], key=keys[i], max_points=limit)
        for other in [alone, seven[i]] if i < 7 else [alone]:
            assert other.stop_reason == found.stop_reason
            np.testing.assert_array_equal(other.tokens, found.tokens)
            for name in ("log_prob", "token_log_probs", "masked_mass", "token_masked_mass", "hidden"):
                np.testing.assert_allclose(getattr(other, name), getattr(found, name), atol=LAST_DIGIT)
    assert {(limit, "max_points") for limit in (5, 9, 14)} <= reasons
    assert {reason for _, reason in reasons} == {"eos", "max_points"}


def test_a_prefix_is_continued(rng):
    """Its own beginning as prefix gives the same cloud again, from every kind of cut; another cloud is kept as is."""
    context, key = contexts(rng, CONFIG, 1), jax.random.PRNGKey(5)
    whole = run(context, key=key)
    n = int(whole.num_points[0])
    assert n > 8
    for cut in (0, 1, 4, 5, n):
        again = run(context, key=key, prefix=whole.tokens[0, : 4 + 4 * cut])
        np.testing.assert_array_equal(again.tokens, whole.tokens)
        np.testing.assert_allclose(again.log_prob, whole.log_prob, atol=1e-5)
    cloud = random_cloud(rng, CONFIG, 10)
    found = run(context, key=key, prefix=cloud)
    assert found.num_points[0] >= 10
    np.testing.assert_array_equal(found.tokens[0, :44], cloud[:44])
    IDS.decode(found.tokens[0, : 8 + 4 * found.num_points[0]])


def test_result(rng):
    """Points, bindings, padding, stop reasons and progress belong to the tokens."""
    context, seen = contexts(rng, CONFIG, 5), []
    keys = np.array(jax.random.split(jax.random.PRNGKey(0), 5))
    params = random_params(CONFIG)  # These say E.
    found = generate(params, CONFIG, IDS, context, key=keys, progress=seen.append, **OPTIONS)
    assert set(found.stop_reason) == {"eos", "max_points"} or found.stop_reason == ["eos"] * 5
    assert found.tokens.shape == (5, 4 * 24 + 8)
    for i, n in enumerate(found.num_points):
        points, binding = IDS.decode(found.tokens[i, : 8 + 4 * n])
        np.testing.assert_array_equal(found.points[i, :n], points)
        np.testing.assert_array_equal(found.binding[i, :n], binding)
        assert (found.tokens[i, 8 + 4 * n :] == IDS.pad).all()
        assert not found.points[i, n:].any()
        assert not found.hidden[i, n:].any()
    np.testing.assert_array_equal(seen[-1], found.num_points)


def test_progress_counts_rows_that_have_ended(rng):
    """Rows that ended in the first chunk are reported with their points after the second too."""
    context, seen = contexts(rng, CONFIG, 8), []
    keys = np.array(jax.random.split(jax.random.PRNGKey(1), 8))
    found = run(context, key=keys, progress=seen.append)
    assert found.num_points.max() > 16 > found.num_points.min()  # Two chunks of 16 steps.
    assert len(seen) == 2
    np.testing.assert_array_equal(seen[0], np.minimum(found.num_points, 15))  # The first step is S S S S.
    np.testing.assert_array_equal(seen[1], found.num_points)


def test_the_condition_is_used(rng):
    context = contexts(rng, CONFIG, 2)
    found = run(context, key=jax.random.PRNGKey(0))
    assert (found.tokens[0] != found.tokens[1]).any()
    same = run(np.stack([context[0]] * 2), key=jax.random.PRNGKey(0))
    np.testing.assert_array_equal(same.tokens[0], same.tokens[1])
    np.testing.assert_array_equal(same.tokens[0], found.tokens[0])


@pytest.mark.parametrize(("change", "said"), [
    ({"temperature": -1.0}, "temperature"), ({"temperature": float("nan")}, "temperature"), ({"top_p": 0.0}, "top_p"),
    ({"top_k": -1}, "top_k"), ({"max_points": -1}, "max_points"), ({"chunk": 0}, "chunk"),
    ({"cache_dtype": "int4"}, "cache_dtype"), ({"key": np.zeros(3, np.uint32)}, "key"),
    ({"prefix": np.array([1, 2, 3])}, "prefix"), ({"max_points": 2, "prefix": "cloud"}, "more than max_points"),
    ({"context_lengths": np.array([0])}, "context"), ({"context_lengths": np.array([12])}, "context"),
])  # fmt: skip
def test_bad_settings_are_sentences(rng, change, said):
    options = {"key": jax.random.PRNGKey(0)} | change
    if isinstance(options.get("prefix"), str):
        options["prefix"] = random_cloud(rng, CONFIG, 3)
    with pytest.raises(UserError, match=said):
        run(contexts(rng, CONFIG, 1), **options)


def test_another_tokenizer_is_refused(rng):
    with pytest.raises(UserError, match="the tokenizer has"):
        generate({}, CONFIG, changed(bins=64).tokenizer, contexts(rng, CONFIG, 1), key=np.zeros(2, np.uint32),
                 max_points=1)  # fmt: skip
