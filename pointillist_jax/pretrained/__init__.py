"""Small models trained on synthetic people, and one such person to try them on (`experiments/pretrain` makes both).

ar.npz, decoder.npz: weights in half precision (`training/weights.py`). example/: the capture of somebody whom they
never saw, with the portrait. README.md: what they are, how they were made and what they are good for.
"""

from __future__ import annotations

from pathlib import Path

from pointillist_jax.files import require_file

EXAMPLE = Path(__file__).parent / "example"


def weights_file(kind: str) -> Path:
    """The file of the shipped "ar" or "decoder". Raises FileNotFoundError where this installation lacks it."""
    return require_file(
        Path(__file__).parent / f"{kind}.npz", "the pretrained weights (python -m experiments.pretrain makes them)"
    )
