"""Hyper-parameters: one frozen dataclass per part of the method, and named presets (DESIGN §1, §6).

The only place where they live. Scripts take `--config=<preset>` and `--config.<part>.<field>=<value>`
(`experiments/config_flags.py`).
"""

from __future__ import annotations

import dataclasses

from pointillist_jax.files import UserError


@dataclasses.dataclass(frozen=True)
class IdentityConfig:
    """Synthetic people (`data/identities/`). All of it is ours: the paper's people are licensed captures.

    Attributes:
      density: Gaussians per area and locks of hair, relative to the full head's; about 7,000 for a bald head and
        25,000 with long hair at 1.
      shape_spread: standard deviation of the shape coefficients; 1 is the head model's whole population.
      canonical_jaw: radians, of the canonical mesh (DESIGN §3).
    """

    density: float = 1.0
    shape_spread: float = 0.6
    canonical_jaw: float = 0.3


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """Rigged Gaussian fitting (`fitting/`; facts/avatars_gsplat.md A.3–A.5)."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Token store, windows and views (`data/`; DESIGN §5, §6)."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The runtime of both training stages (`training/`; DESIGN §10; paper §5.1).

    Attributes:
      steps: optimiser steps in all.
      batch_size: examples per step, over all devices and processes.
      learning_rate: peak, reached after `warmup_steps`.
      schedule: what follows the warm-up: "constant" (as the paper seems to do) or "cosine" down to a tenth.
      weight_decay: AdamW, on matrices only.
      clip_norm: of the global gradient; 0 is off.
      accumulate: micro-batches per step, for batches that do not fit.
      ema_decay: of an averaged copy of the parameters; 0 is off.
      log_every, eval_every, checkpoint_every: steps. keep: newest checkpoints that stay.
    """

    steps: int = 50_000
    batch_size: int = 4
    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup_steps: int = 1000
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.95
    clip_norm: float = 1.0
    accumulate: int = 1
    ema_decay: float = 0.0
    log_every: int = 10
    eval_every: int = 500
    checkpoint_every: int = 500
    keep: int = 3

    def __post_init__(self):
        if self.schedule not in ("constant", "cosine"):
            raise UserError(f"train.schedule={self.schedule!r} must be constant or cosine.")
        low = {"steps": 1, "batch_size": 1, "warmup_steps": 0, "accumulate": 1, "log_every": 1, "eval_every": 0}
        low |= {"checkpoint_every": 1, "keep": 1, "learning_rate": 0, "weight_decay": 0, "clip_norm": 0, "ema_decay": 0}
        for name, least in low.items():
            if getattr(self, name) < least:
                raise UserError(f"train.{name}={getattr(self, name)} must be at least {least}.")
        if self.batch_size % self.accumulate:
            raise UserError(
                f"train.batch_size={self.batch_size} does not divide into train.accumulate={self.accumulate} parts."
            )
        if not self.ema_decay < 1:
            raise UserError(f"train.ema_decay={self.ema_decay} must lie below 1.")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a run depends on, by part."""

    identities: IdentityConfig = IdentityConfig()
    fit: FitConfig = FitConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()


PRESETS = {
    "tiny": Config(),
    "small": Config(),
    "paper": Config(),
}


def preset(name: str) -> Config:
    """The named preset: "tiny" (tests, laptops), "small" (one GPU) or "paper".

    Raises:
      UserError: no such preset.
    """
    if name not in PRESETS:
        raise UserError(f"no preset {name!r}; there are {', '.join(PRESETS)}.")
    return PRESETS[name]
