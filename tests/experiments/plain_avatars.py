"""An avatar whose front is red with white lips and whose back is blue, in that order in its file."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pointillist_jax.flame import FlameModel, bind_points, flame_vertices
from pointillist_jax.gaussians import Avatar, Gaussians


def red_faced_avatar(head: FlameModel, every: int = 4) -> Avatar:
    """Large splats on one of `every` faces, small ones on all of the lips.

    Drawn in the file's order, the blue ones would cover the red ones.
    """
    canonical = head.neutral_params().canonical()
    points = np.asarray(flame_vertices(head, canonical))[np.asarray(head.faces)].mean(axis=1)
    lips = head.region_faces("lips")
    chosen = np.union1d(np.arange(0, head.num_faces, every), lips)
    chosen = chosen[np.argsort(-points[chosen, 2])]
    points, num = points[chosen], len(chosen)
    rng = np.random.default_rng(0)
    shade = rng.uniform(0.4, 1.0, num)
    front = points[:, 2] > np.median(points[:, 2])
    colors = shade[:, None] * np.where(front[:, None], [1.0, 0.15, 0.1], [0.1, 0.2, 1.0])
    colors[np.isin(chosen, lips)] = 1
    gaussians = Gaussians(
        means=jnp.asarray(points, jnp.float32),
        quats=jnp.tile(jnp.array([1.0, 0, 0, 0], jnp.float32), (num, 1)),
        scales=jnp.asarray(np.where(np.isin(chosen, lips), 0.002, 0.007)[:, None] * np.ones(3), jnp.float32),
        opacities=jnp.full(num, 0.95, jnp.float32),
        colors=jnp.asarray(colors, jnp.float32),
    )
    return Avatar(gaussians, bind_points(head, canonical, gaussians.means, chosen))
