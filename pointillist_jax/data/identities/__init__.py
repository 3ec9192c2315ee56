"""Synthetic people: seeded identities with known ground truth, for every step that real captures go through."""

from pointillist_jax.data.identities.anatomy import Anatomy, study
from pointillist_jax.data.identities.motion import portrait_params, random_motion
from pointillist_jax.data.identities.person import PARTS, Identity, sample_identity
from pointillist_jax.data.identities.traits import BEARDS, HAIR_STYLES, Traits

__all__ = [
    "BEARDS",
    "HAIR_STYLES",
    "PARTS",
    "Anatomy",
    "Identity",
    "Traits",
    "portrait_params",
    "random_motion",
    "sample_identity",
    "study",
]
