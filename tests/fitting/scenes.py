"""A head of 32 faces, a person on it, and captures of a few small pictures: fits in seconds."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from pointillist_jax.cameras import Camera, orbit
from pointillist_jax.configs import FitConfig
from pointillist_jax.data.capture_writer import FrameRenderer, write_capture
from pointillist_jax.data.captures import load_capture
from pointillist_jax.fitting import FitData
from pointillist_jax.flame import FlameModel, FlameParams
from pointillist_jax.gaussians import Gaussians

SIZE = 32
# Every part of a schedule within forty steps.
SCHEDULE = FitConfig(
    iterations=40,
    lr_means=0.01,
    lr_means_final=0.001,
    lr_f_dc=0.05,
    lr_quats=0.01,
    densify_from=5,
    densify_interval=6,
    densify_grad=1e-5,
    percent_dense=0.02,
    split_std="local",
    prune_large_from=12,
    opacity_reset_interval=14,
    max_points=60,
    finetune_flame=False,
    save_interval=4,
    log_interval=10,
)


def ball_head() -> FlameModel:
    """An octahedron, each face cut in four: 18 vertices, 32 faces, radius 0.1 m."""
    vertices = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]
    faces = [(0, 2, 4), (2, 1, 4), (1, 3, 4), (3, 0, 4), (2, 0, 5), (1, 2, 5), (3, 1, 5), (0, 3, 5)]
    vertices, cut = [np.array(v, float) for v in vertices], []
    middle: dict[tuple[int, int], int] = {}

    def between(a: int, b: int) -> int:
        key = (min(a, b), max(a, b))
        if key not in middle:
            point = vertices[a] + vertices[b]
            middle[key] = len(vertices)
            vertices.append(point / np.linalg.norm(point))
        return middle[key]

    for a, b, c in faces:
        ab, bc, ca = between(a, b), between(b, c), between(c, a)
        cut += [(a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca)]
    points = 0.1 * np.array(vertices)
    V, rng = len(points), np.random.default_rng(5)
    weights = np.zeros((V, 5))
    weights[:, 0] = 1
    return FlameModel(
        v_template=jnp.asarray(points, jnp.float32),
        faces=jnp.asarray(cut, jnp.int32),
        shape_dirs=jnp.asarray(rng.normal(0, 0.004, (V, 3, 2)), jnp.float32),
        expr_dirs=jnp.asarray(rng.normal(0, 0.01, (V, 3, 3)), jnp.float32),
        pose_dirs=jnp.zeros((V, 3, 36)),
        joint_regressor=jnp.full((5, V), 1 / V),
        skin_weights=jnp.asarray(weights, jnp.float32),
        face_regions=jnp.asarray((points[np.array(cut)].mean(1)[:, 1] > 0).astype(np.int32)),
        parents=(-1, 0, 1, 1, 1),
        expr_names=("a", "b", "c"),
        region_names=("below", "above"),
        source="ball",
    )


def random_person(model: FlameModel, rng: np.random.Generator, num: int = 90) -> Gaussians:
    """Many small spots above, few large ones below."""
    above = model.region_faces("above")
    binding = np.concatenate([np.arange(model.num_faces), rng.choice(above, num - model.num_faces)])
    return Gaussians(
        means=jnp.asarray(rng.uniform(-0.4, 0.4, (num, 3)) * [1, 0.2, 1], jnp.float32),
        quats=jnp.asarray(rng.normal(size=(num, 4)), jnp.float32),
        scales=jnp.asarray(np.where(np.arange(num) < model.num_faces, 0.4, 0.12)[:, None] * [1, 0.8, 1], jnp.float32),
        opacities=jnp.full(num, 0.95),
        colors=jnp.asarray(rng.uniform(size=(num, 3)), jnp.float32),
        binding=jnp.asarray(binding, jnp.int32),
    )


def write_person(folder: Path, seed: int = 0, timesteps: int = 3, cameras: Camera | None = None) -> FlameModel:
    """A capture of five cameras, one of them held out; the last timestep is the test."""
    model, rng = ball_head(), np.random.default_rng(seed)
    motion = FlameParams(
        shape=jnp.asarray(rng.normal(size=2), jnp.float32),
        expr=jnp.asarray(rng.normal(size=(timesteps, 3)), jnp.float32),
        rotation=jnp.asarray(rng.normal(0, 0.2, (timesteps, 3)), jnp.float32),
        neck_pose=jnp.zeros((timesteps, 3)),
        jaw_pose=jnp.zeros((timesteps, 3)),
        eyes_pose=jnp.zeros((timesteps, 6)),
        translation=jnp.asarray(rng.normal(0, 0.002, (timesteps, 3)), jnp.float32),
    )
    canonical = motion.replace(**{k: v[0] for k, v in vars(motion).items() if v is not None and k != "shape"})
    if cameras is None:
        cameras = orbit(5, width=SIZE, height=SIZE, distance=0.8, target=(0.0, 0.0, 0.0), closed=True)
    write_capture(
        folder,
        model,
        random_person(model, rng),
        motion,
        canonical.canonical(),
        cameras,
        FrameRenderer(model),
        validation_camera=2,
    )
    return model


def person(tmp_path: Path, seed: int = 0) -> tuple[FitData, FlameModel]:
    folder = tmp_path / f"ball_{seed:04d}"
    model = write_person(folder, seed)
    return FitData.from_capture(load_capture(folder, model)), model
