"""Random heads in the layout of FLAME's `.pkl`, for tests: nothing of FLAME itself."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import scipy.sparse


def random_flame(seed: int = 0, num_vertices: int = 5023, num_faces: int = 9976) -> dict[str, np.ndarray]:
    """A dictionary with FLAME's keys, shapes and dtypes and random values of a head's size."""
    rng = np.random.default_rng(seed)
    regressor = np.zeros((5, num_vertices))
    for j in range(5):
        picked = rng.choice(num_vertices, 20, replace=False)
        regressor[j, picked] = rng.dirichlet(np.ones(20))
    return {
        "v_template": rng.normal(0, 0.08, (num_vertices, 3)),
        "f": rng.permuted(np.tile(np.arange(num_vertices), (3, 1)), axis=1)[:, np.arange(num_faces) % num_vertices]
        .T.copy()
        .astype(np.uint32),
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
    """Pickles `content` (default: `random_flame()`) to `path`."""
    path.write_bytes(pickle.dumps(random_flame() if content is None else content, protocol=protocol))
    return path
