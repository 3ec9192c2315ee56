"""The token language: the same sequences, the same points, the same grammar, JAX against PyTorch."""

from __future__ import annotations

import numpy as np
import pytest

from pointillist_jax.tokens import PointTokenizer

torch = pytest.importorskip("torch")
from experiments.torch_reference import tokenizer as twin  # noqa: E402

BINS, FACES = 8, 5
OURS = PointTokenizer(FACES, BINS)
SIZES = (OURS.lower, OURS.upper), BINS, FACES


def test_sequences_and_points(rng):
    """Few cells, so that many points share one; the box's own corners among them."""
    points = rng.uniform(OURS.lower, OURS.upper, (300, 3))
    points[:2] = OURS.lower, OURS.upper
    binding = rng.integers(0, FACES, 300)
    tokens = OURS.encode(points, binding)
    found = twin.encode(torch.tensor(points), torch.tensor(binding), *SIZES)
    np.testing.assert_array_equal(found, tokens)
    again, faces = OURS.decode(tokens)
    points, binding = twin.decode(found, *SIZES)
    np.testing.assert_allclose(points, again, atol=1e-7)
    np.testing.assert_array_equal(binding, faces)
    with pytest.raises(ValueError, match="token 308"):
        twin.decode(torch.cat([found[:-400], found[-400:-396] * 0, found[-396:]])[:308], *SIZES)


def test_grammar(rng):
    """Legal sequences with a token changed, two points exchanged, or the end cut: the same first error."""
    legal = 0
    for _ in range(600):
        count = int(rng.integers(0, 6))
        tokens = OURS.encode(rng.uniform(-0.3, 0.2, (count, 3)), rng.integers(0, FACES, count))
        if rng.random() < 0.5 and count > 1:
            tokens[4:8], tokens[8:12] = tokens[8:12].copy(), tokens[4:8].copy()
        change = rng.integers(0, 4)
        if change == 0:
            tokens[rng.integers(len(tokens))] = rng.integers(0, OURS.vocab_size)
        elif change == 1:
            tokens = tokens[: rng.integers(len(tokens))]
        elif change == 2:
            tokens = np.append(tokens, OURS.eos)
        error = OURS.first_error(tokens)
        found = twin.first_illegal(torch.tensor(tokens), BINS, FACES)
        assert found == (None if error is None else error.position), tokens
        legal += error is None
    assert 50 < legal < 500
