"""People nobody fitted, on meshes nobody modelled: what benchmarks animate and train on."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pointillist_jax.flame import FlameModel, bind_points, flame_vertices
from pointillist_jax.gaussians import Avatar, Gaussians


def made_up_avatar(head: FlameModel, num: int, seed: int = 0) -> Avatar:
    """`num` flat Gaussians of random greys and browns on random places of the canonical mesh."""
    rng = np.random.default_rng(seed)
    canonical = head.neutral_params().canonical()
    triangles = np.asarray(flame_vertices(head, canonical))[np.asarray(head.faces)]
    area = np.linalg.norm(np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]), axis=1)
    binding = rng.choice(len(area), num, p=area / area.sum())
    points = np.einsum("pc,pca->pa", rng.dirichlet(np.ones(3), num), triangles[binding])
    # As many as cover the head about three times.
    scale = float(np.sqrt(3 * 0.5 * area.sum() / num / np.pi)) / 2
    gaussians = Gaussians(
        means=jnp.asarray(points, jnp.float32),
        quats=jnp.asarray(rng.normal(size=(num, 4)), jnp.float32),
        scales=jnp.asarray(scale * rng.uniform(0.5, 1.5, (num, 3)), jnp.float32),
        opacities=jnp.asarray(rng.uniform(0.3, 0.99, num), jnp.float32),
        colors=jnp.asarray(rng.uniform(0.2, 0.9, (num, 3)), jnp.float32),
    )
    return Avatar(gaussians, bind_points(head, canonical, gaussians.means, jnp.asarray(binding)))


def subdivided(head: FlameModel) -> FlameModel:
    """The same head with every face cut in four at the middles of its edges: four times the mesh, no finer shape."""
    faces, V = np.asarray(head.faces), head.num_vertices
    edges = np.sort(faces[:, [[0, 1], [1, 2], [2, 0]]], axis=-1)  # [F, 3, 2]
    unique, which = np.unique(edges.reshape(-1, 2), axis=0, return_inverse=True)
    (a, b, c), (ab, bc, ca) = faces.T, V + which.reshape(-1, 3).T
    cut = np.stack([np.stack(f, axis=-1) for f in ((a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca))], axis=1)
    names = ("v_template", "shape_dirs", "expr_dirs", "pose_dirs", "skin_weights")
    arrays = {name: np.asarray(getattr(head, name)) for name in names}
    arrays = {name: jnp.asarray(np.concatenate([x, x[unique].mean(axis=1)])) for name, x in arrays.items()}
    return head.replace(
        faces=jnp.asarray(cut.reshape(-1, 3), head.faces.dtype),
        joint_regressor=jnp.pad(head.joint_regressor, ((0, 0), (0, len(unique)))),
        face_regions=jnp.repeat(head.face_regions, 4),
        **arrays,
    )
