"""The baselines are normalised, are what they say on known data, and order as they should."""

from __future__ import annotations

import numpy as np
import pytest

from pointillist_jax.evaluation.token_baselines import MEAN_HEAD_STAGES, fit_histogram
from pointillist_jax.files import UserError
from pointillist_jax.tokens import PointTokenizer

TOKENIZER = PointTokenizer(num_faces=50, bins=32)


def cloud(rng, num: int = 300) -> np.ndarray:
    """A sphere's points, bound to faces by height."""
    points = rng.normal(size=(num, 3))
    points *= 0.2 / np.linalg.norm(points, axis=1, keepdims=True)
    binding = np.clip(((points[:, 1] + 0.2) / 0.4 * 50).astype(int), 0, 49)
    return TOKENIZER.encode(points, binding)


@pytest.fixture
def clouds(rng):
    return [cloud(rng, rng.integers(200, 400)) for _ in range(6)]


@pytest.mark.parametrize("stages", [1, 5])
def test_distributions_are_normalised_over_the_classes_of_their_slot(clouds, stages):
    histogram = fit_histogram(clouds, TOKENIZER, stages)
    assert [table.shape for table in histogram.log_probs] == [(stages, n) for n in (33, 32, 32, 50)]
    for table in histogram.log_probs:
        np.testing.assert_allclose(np.exp(table).sum(axis=1), 1, rtol=1e-9)


def test_loss_is_the_mean_over_points_tokens_and_the_first_end(clouds, rng):
    histogram = fit_histogram(clouds, TOKENIZER)
    tokens = cloud(rng)
    points = tokens[4:-4].reshape(-1, 4)
    expected = -sum(histogram.log_probs[s][0, row[s] - (32 if s == 3 else 0)] for row in points for s in range(4))
    expected -= histogram.log_probs[0][0, 32]
    assert histogram.nll([tokens])["loss"] == pytest.approx(expected / (points.size + 1))


def test_the_mean_head_knows_height_and_so_beats_the_unigram(clouds, rng):
    unseen = [cloud(rng) for _ in range(3)]
    unigram, mean_head = (fit_histogram(clouds, TOKENIZER, n).nll(unseen) for n in (1, MEAN_HEAD_STAGES))
    assert mean_head["loss_y"] < unigram["loss_y"] - 1
    assert mean_head["loss_b"] < unigram["loss_b"] - 1
    assert mean_head["loss"] < unigram["loss"]
    # A sphere's heights are spread evenly, so the unigram can do no better than the logarithm of the bins it covers.
    covered = 0.4 / (TOKENIZER.cell[1])
    assert unigram["loss_y"] == pytest.approx(np.log(covered), abs=0.15)


def test_one_subject_is_too_few(clouds):
    with pytest.raises(UserError, match="at least two"):
        fit_histogram(clouds[:1], TOKENIZER)
