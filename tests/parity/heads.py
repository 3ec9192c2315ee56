"""A small head that uses every part of the model: random weights, joints and correctives."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from pointillist_jax.flame import FlameModel
from tests.conftest import random_params
from tests.fitting.scenes import ball_head


def random_head(rng: np.random.Generator) -> FlameModel:
    """18 vertices, 32 faces, radius 0.1 m, float64."""
    head = ball_head().astype(jnp.float64)
    vertices = head.num_vertices
    return dataclasses.replace(
        head,
        v_template=head.v_template + rng.normal(0, 0.005, (vertices, 3)),
        pose_dirs=jnp.asarray(rng.normal(0, 0.004, (vertices, 3, 36))),
        joint_regressor=jnp.asarray(rng.dirichlet(np.ones(vertices), 5)),
        skin_weights=jnp.asarray(rng.dirichlet(np.full(5, 0.4), vertices)),
    )


def params_of(rng: np.random.Generator, head: FlameModel, *batch: int) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in vars(random_params(rng, head, batch)).items()}
