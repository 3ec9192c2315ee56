"""Hyper-parameters: one frozen dataclass per part of the method, and named presets (DESIGN §1, §6).

The only place where they live. Scripts take `--config=<preset>` and `--config.<part>.<field>=<value>`
(`experiments/config_flags.py`).
"""

from __future__ import annotations

import dataclasses

from pointillist_jax.files import UserError


@dataclasses.dataclass(frozen=True)
class IdentityConfig:
    """Synthetic people (`data/identities.py`)."""


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """Rigged Gaussian fitting (`fitting/`; facts/avatars_gsplat.md A.3–A.5)."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Token store, windows and views (`data/`; DESIGN §5, §6)."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a run depends on, by part."""

    identities: IdentityConfig = IdentityConfig()
    fit: FitConfig = FitConfig()
    data: DataConfig = DataConfig()


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
