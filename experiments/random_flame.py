"""A random head in the layout of FLAME's `.pkl`, for benchmarks and tests: nothing of FLAME itself."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import scipy.sparse

from pointillist_jax.files import atomic_path


def random_flame(seed: int = 0, num_vertices: int = 5023, num_faces: int = 9976) -> dict:
    """A dictionary with FLAME's keys, shapes and dtypes (facts/avatars_gsplat.md A.1) and values of a head's size."""
    rng = np.random.default_rng(seed)
    regressor = np.zeros((5, num_vertices))
    for j in range(5):
        picked = rng.choice(num_vertices, 20, replace=False)
        regressor[j, picked] = rng.dirichlet(np.ones(20))
    # Three different corners for every face.
    steps = rng.integers(1, num_vertices // 3, (num_faces, 3))
    corners = np.arange(num_faces)[:, None] + np.cumsum(steps, axis=1)
    return {
        "v_template": rng.normal(0, 0.08, (num_vertices, 3)),
        "f": (corners % num_vertices).astype(np.uint32),
        "shapedirs": rng.normal(0, 2e-3, (num_vertices, 3, 400)),
        "posedirs": rng.normal(0, 2e-3, (num_vertices, 3, 36)),
        "J_regressor": scipy.sparse.csc_matrix(regressor),
        "kintree_table": np.array([[2**32 - 1, 0, 1, 1, 1], [0, 1, 2, 3, 4]], np.int64),
        "weights": rng.dirichlet(np.ones(5) * 0.3, num_vertices),
        "J": rng.normal(0, 0.05, (5, 3)),
        "bs_style": "lbs",
        "bs_type": "lrotmin",
    }


def write_flame(path: Path, content: dict | None = None, *, protocol: int = 2) -> Path:
    """Pickles `content` (default: `random_flame()`) to `path`, and returns it."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(pickle.dumps(random_flame() if content is None else content, protocol=protocol))
    return path
