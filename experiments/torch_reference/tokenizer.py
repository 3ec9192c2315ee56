"""The token language (DESIGN §5; paper §3.2): bound points as one integer sequence, and its grammar.

A point is four tokens x, y, z, b; points are sorted by (y, z, x), ties by binding; S S S S before, E E E E after them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.torch_reference.settings import Vocabulary

Bounds = tuple[tuple[float, float, float], tuple[float, float, float]]


def encode(points: Tensor, bindings: Tensor, bounds: Bounds, bins: int, num_faces: int) -> Tensor:
    """[P, 3] metres and [P] faces → [4P + 8] ids.

    Args:
      bounds: corners of the quantised box; points beyond it land in its outermost cells.
    """
    lower, upper = (torch.tensor(corner, dtype=torch.float64) for corner in bounds)
    cells = ((points.double() - lower) / (upper - lower) * bins).floor().long().clamp(0, bins - 1)
    rows = torch.cat([cells, bindings.long()[:, None]], dim=1)
    # Stable sorts, the least significant key first.
    for column in (3, 0, 2, 1):
        rows = rows[rows[:, column].argsort(stable=True)]
    ids = Vocabulary(bins, num_faces)
    body = rows + torch.tensor([0, 0, 0, bins])
    return torch.cat([torch.full((4,), ids.bos), body.flatten(), torch.full((4,), ids.eos)])


def decode(tokens: Tensor, bounds: Bounds, bins: int, num_faces: int) -> tuple[Tensor, Tensor]:
    """The inverse: cell centres [P, 3] float64, metres, and faces [P].

    Raises:
      ValueError: a sequence that breaks the grammar.
    """
    broken = first_illegal(tokens, bins, num_faces)
    if broken is not None:
        raise ValueError(f"token {broken} cannot stand where it stands")
    lower, upper = (torch.tensor(corner, dtype=torch.float64) for corner in bounds)
    body = tokens.long()[4:-4].reshape(-1, 4)
    return lower + (body[:, :3] + 0.5) / bins * (upper - lower), body[:, 3] - bins


def first_illegal(tokens: Tensor, bins: int, num_faces: int) -> int | None:
    """Position of the first token that cannot follow those before it, the length if more are missing, or None."""
    ids, sequence = Vocabulary(bins, num_faces), tokens.tolist()
    previous, point, ends = None, [], 0
    for position, token in enumerate(sequence):
        if position < 4:
            if token != ids.bos:
                return position
        elif ends or (token == ids.eos and not point):
            if token != ids.eos or ends == 4:
                return position
            ends += 1
        else:
            low, high = (bins, ids.bos) if len(point) == 3 else (0, bins)
            if not low <= token < high or not can_follow(previous, [*point, token - low], bins):
                return position
            point.append(token - low)
            if len(point) == 4:
                previous, point = point, []
    return None if ends == 4 else len(sequence)


def can_follow(previous: list[int] | None, beginning: list[int], bins: int) -> bool:
    """Whether a point that begins with these of its values (x, y, z, face) can come after `previous`.

    It can if its largest completion is no smaller in the order of points; the values to come are free.
    """
    if previous is None:
        return True
    x, y, z, b = [*beginning, *[bins - 1] * (3 - len(beginning)), float("inf")][:4]
    return (y, z, x, b) >= (previous[1], previous[2], previous[0], previous[3])
