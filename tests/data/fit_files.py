"""Random rigged fits in GaussianAvatars' layout, on the coarse open head."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pointillist_jax.data.fits import save_fit
from pointillist_jax.data.token_store import StoreSpec
from pointillist_jax.flame import face_frames, flame_vertices, open_head
from pointillist_jax.gaussians import Gaussians
from pointillist_jax.tokens import PointTokenizer

MODEL = open_head("coarse")
HEAD_SPEC = StoreSpec(
    PointTokenizer(num_faces=MODEL.num_faces), MODEL.sha256, MODEL.source, canonical_jaw=0.3, portrait_size=24
)


def random_person(rng):
    neutral = MODEL.neutral_params()
    return neutral.replace(
        shape=jnp.asarray(0.5 * rng.normal(size=neutral.shape.shape), jnp.float32),
        expr=jnp.asarray(rng.normal(size=(3, neutral.expr.shape[0])), jnp.float32),
        static_offset=jnp.asarray(rng.normal(0, 1e-3, (MODEL.num_vertices, 3)), jnp.float32),
        **{name: jnp.asarray(rng.normal(0, 0.1, (3, n)), jnp.float32)
           for name, n in (("rotation", 3), ("neck_pose", 3), ("jaw_pose", 3), ("eyes_pose", 6), ("translation", 3))},
    )  # fmt: skip


def write_fit(folder, rng, points: int, spread: float = 1.0):
    """A random person's Gaussians around the canonical mesh, as a fit; returns their world centres and bindings."""
    params, binding = random_person(rng), rng.integers(0, MODEL.num_faces, points)
    first = params.replace(**{k: v[0] for k, v in vars(params).items() if k not in ("shape", "static_offset")})
    vertices = flame_vertices(MODEL, first.canonical(HEAD_SPEC.canonical_jaw))
    rotation, scale, center = (np.asarray(x, np.float64)[binding] for x in face_frames(vertices, MODEL.faces))
    local = rng.normal(0, spread, (points, 3)).astype(np.float32)
    gaussians = Gaussians(
        means=local,
        quats=rng.normal(size=(points, 4)).astype(np.float32),
        scales=np.full((points, 3), 0.5),
        opacities=np.full(points, 0.5),
        colors=np.full((points, 3), 0.5),
        binding=binding,
    )
    save_fit(folder, gaussians, params, MODEL)
    return scale[:, None] * np.einsum("pab,pb->pa", rotation, local) + center, binding
