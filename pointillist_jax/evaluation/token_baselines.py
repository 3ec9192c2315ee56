"""What a model of point tokens has to beat: histograms of the training subjects' tokens (ours).

A histogram gives each slot (x, y, z, b) a distribution that depends on nothing but how far the sequence has come:

* **unigram**, one stage: how often a token stands in its slot at all;
* **mean head**, many stages: points are sorted from the chin to the crown, so "the tokens that stand here in the heads
  I know" is a blurred copy of the mean head. It is told the length of the sequence, which no model is.

Blur and floor are chosen on subjects left out of the histogram, so that neither baseline is weaker than it need be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from pointillist_jax.files import UserError
from pointillist_jax.tokens import PointTokenizer

MEAN_HEAD_STAGES = 64
_BLURS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
_FLOORS = (1e-4, 1e-3, 1e-2, 1e-1, 0.5)


@dataclasses.dataclass(frozen=True)
class TokenHistogram:
    """Log-probabilities by stage of the sequence.

    Attributes:
      log_probs: of the x, y, z and b slots, [R, C] nats: R stages; C = bins + 1 (the last is E), bins, bins, faces.
      tokenizer: whose ids they are.
    """

    log_probs: tuple[Float[np.ndarray, "R C"], ...]
    tokenizer: PointTokenizer

    def nll(self, sequences: Sequence[Int[np.ndarray, "T"]]) -> dict[str, float]:
        """Mean nats per token, over all (`loss`) and by slot (`loss_x` …): points' tokens and the first E."""
        sums, counts = np.zeros(4), np.zeros(4)
        for tokens in sequences:
            for slot, (stages, classes) in enumerate(_by_slot(tokens, self.tokenizer, len(self.log_probs[0]))):
                sums[slot] -= self.log_probs[slot][stages, classes].sum()
                counts[slot] += len(classes)
        by_slot = {f"loss_{name}": float(s / max(n, 1)) for name, s, n in zip("xyzb", sums, counts, strict=True)}
        return {"loss": float(sums.sum() / max(counts.sum(), 1)), **by_slot}


def fit_histogram(
    sequences: Sequence[Int[np.ndarray, "T"]], tokenizer: PointTokenizer, stages: int = 1
) -> TokenHistogram:
    """A histogram of training sequences (S S S S … E E E E each).

    Args:
      sequences: of at least two subjects.
      tokenizer: theirs.
      stages: 1 is the unigram baseline, `MEAN_HEAD_STAGES` the mean head.

    Raises:
      UserError: fewer than two sequences, so that nothing could be left out to choose the blur by.
    """
    if len(sequences) < 2:
        raise UserError(f"a baseline needs at least two training subjects, got {len(sequences)}.")
    counted = _count(sequences, tokenizer, stages)
    kept, left_out = _count(sequences[::2], tokenizer, stages), sequences[1::2]
    log_probs = []
    for slot in range(4):
        # Faces have no neighbours in their numbering: only coordinates are blurred.
        options = [(blur, floor) for blur in (_BLURS if slot < 3 else (0.0,)) for floor in _FLOORS]
        scores = []
        for blur, floor in options:
            table = _smooth(kept[slot], blur, floor)
            parts = [_by_slot(tokens, tokenizer, stages)[slot] for tokens in left_out]
            scores.append(sum(table[r, c].sum() for r, c in parts))
        log_probs.append(_smooth(counted[slot], *options[int(np.argmax(scores))]))
    return TokenHistogram(tuple(log_probs), tokenizer)


def _by_slot(tokens: np.ndarray, tokenizer: PointTokenizer, stages: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(stage, class) of every counted token of the x, y, z and b slots."""
    points = np.asarray(tokens)[4:-4].reshape(-1, 4)
    stage = np.arange(len(points)) * stages // max(len(points), 1)
    out = [(stage, points[:, slot] - (tokenizer.bins if slot == 3 else 0)) for slot in range(4)]
    # E ends the sequence at an x slot; the three after it are certain.
    out[0] = (np.append(out[0][0], stages - 1), np.append(out[0][1], tokenizer.bins))
    return out


def _count(sequences, tokenizer: PointTokenizer, stages: int) -> list[np.ndarray]:
    sizes = (tokenizer.bins + 1, tokenizer.bins, tokenizer.bins, tokenizer.num_faces)
    counts = [np.zeros((stages, size)) for size in sizes]
    for tokens in sequences:
        for slot, (r, c) in enumerate(_by_slot(tokens, tokenizer, stages)):
            np.add.at(counts[slot], (r, c), 1)
    return counts


def _smooth(counts: np.ndarray, blur: float, floor: float) -> np.ndarray:
    """Counts [R, C] → log-probabilities: blurred along C, mixed with `floor` of the mean over stages and of uniform."""
    if blur:
        reach = np.arange(-int(4 * blur), int(4 * blur) + 1)
        kernel = np.exp(-0.5 * (reach / blur) ** 2)
        counts = np.stack([np.convolve(row, kernel / kernel.sum(), mode="same") for row in counts])
    size = counts.shape[1]
    whole = (counts.sum(axis=0) + 1 / size) / (counts.sum() + 1)
    probs = (counts + whole) / (counts.sum(axis=1, keepdims=True) + 1)
    return np.log((1 - floor) * probs + floor * (0.5 * whole + 0.5 / size))
