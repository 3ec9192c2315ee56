"""Scores of fitted Gaussians: PSNR and SSIM of every view, and how many Gaussians the parts of the head have."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pointillist_jax.fitting.data import FitData, Views
from pointillist_jax.fitting.state import FitState
from pointillist_jax.fitting.step import Scene, pose, render
from pointillist_jax.flame import FlameModel, flame_vertices
from pointillist_jax.losses import l1, psnr, ssim
from renderer_bridge import estimate_capacity


def render_views(
    state: FitState,
    scene: Scene,
    views: Views,
    *,
    sh_degree: int = 0,
    background: float = 1.0,
    capacity: int | None = None,
) -> Iterator[np.ndarray]:
    """Renders every view in turn: [H, W, 3] in [0, 1]. `capacity` is measured if None, grown if it does not suffice."""
    if capacity is None:
        capacity = measure_capacity(state, scene, views)
    for n in range(len(views)):
        width, height = (int(x) for x in views.sizes[n])
        while True:
            image, overflow = _render(
                state,
                scene,
                jnp.int32(views.timesteps[n]),
                jnp.asarray(views.viewmats[n], jnp.float32),
                jnp.asarray(views.Ks[n], jnp.float32),
                width=width,
                height=height,
                capacity=capacity,
                sh_degree=sh_degree,
                background=background,
            )
            if int(overflow) == 0:
                break
            capacity = measure_capacity(state, scene, views, at_least=capacity + int(overflow))
        yield np.clip(np.asarray(image), 0, 1)


def evaluate(
    state: FitState,
    scene: Scene,
    data: FitData,
    *,
    sh_degree: int = 0,
    background: float = 1.0,
    capacity: int | None = None,
    progress: Callable[[], None] | None = None,
) -> dict:
    """PSNR (dB), SSIM (zero padding, as the loss has it) and L1 of every view of every split, and their means.

    `progress` is called after every view.
    """
    out = {}
    for name, views in data.splits.items():
        rows = []
        images = render_views(state, scene, views, sh_degree=sh_degree, background=background, capacity=capacity)
        for n, image in enumerate(images):
            scores = _scores(image, views.image(n, background))
            rows.append(
                {
                    "timestep": int(views.timesteps[n]),
                    "camera": int(views.camera_indices[n]),
                    # An empty view is rendered exactly: 100 dB stand for the infinity that JSON cannot hold.
                    **{key: round(min(float(value), 100.0), 5) for key, value in scores.items()},
                }
            )
            if progress is not None:
                progress()
        means = {key: round(float(np.mean([row[key] for row in rows])), 5) for key in ("psnr", "ssim", "l1")}
        out[name] = {"views": len(rows), **means, "per_view": rows}
    return out


def count_by_part(state: FitState, data: FitData, model: FlameModel) -> dict[str, dict]:
    """Gaussians, faces and area (cm², canonical mesh) of every region of the head and every named group of faces.

    `added` leaves out the one that every face begins with: meshes have more faces on cheeks than on scalps.
    """
    counts = np.bincount(np.asarray(state.binding)[: int(state.num)], minlength=model.num_faces)
    canonical = data.params.timestep(0).canonical()
    triangles = np.asarray(flame_vertices(model, canonical), np.float64)[np.asarray(model.faces)]
    edges = triangles[:, 1:] - triangles[:, :1]
    areas = 0.5e4 * np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1)
    groups = {name: model.region_faces(name) for name in model.region_names} | data.face_groups
    return {
        name: {
            "gaussians": int(counts[faces].sum()),
            "faces": len(faces),
            "area_cm2": round(float(areas[faces].sum()), 3),
            "per_face": round(float(counts[faces].mean()), 3),
            "per_cm2": round(float(counts[faces].sum() / max(areas[faces].sum(), 1e-9)), 3),
            "added": int((counts[faces] - 1).sum()),
            "added_per_cm2": round(float((counts[faces] - 1).sum() / max(areas[faces].sum(), 1e-9)), 3),
        }
        for name, faces in groups.items()
        if len(faces)
    }


def measure_capacity(state: FitState, scene: Scene, views: Views, *, at_least: int = 1, margin: float = 1.5) -> int:
    """A rasteriser capacity for single views like these, with room for growth."""
    need, num = 1, int(state.num)
    world_at = _posed(state, scene)
    for n in np.unique(np.linspace(0, len(views) - 1, 6).astype(int)):
        width, height = (int(x) for x in views.sizes[n])
        world = world_at(jnp.int32(views.timesteps[n]))
        opacities = jnp.where(jnp.arange(state.bucket) < num, jax.nn.sigmoid(state.params["opacities"]), 0.0)
        camera = jnp.asarray(views.viewmats[n : n + 1], jnp.float32), jnp.asarray(views.Ks[n : n + 1], jnp.float32)
        need = max(
            need,
            estimate_capacity(world.means, world.quats, world.scales, opacities, *camera, width, height, margin=margin),
        )
    # Two leading bits: few distinct capacities, hence few compilations.
    need = max(need, int(margin * at_least), 2 * state.bucket)
    step = 1 << max(need.bit_length() - 2, 0)
    return -(-need // step) * step


def _posed(state: FitState, scene: Scene) -> Callable:
    return lambda timestep: _pose(state.params, state.binding, scene, timestep)


_pose = jax.jit(pose)


@functools.partial(jax.jit, static_argnames=("width", "height", "capacity", "sh_degree", "background"))
def _render(state, scene, timestep, viewmat, K, *, width, height, capacity, sh_degree, background):
    image, info = render(
        state.params, state.binding, state.num, scene, timestep, viewmat, K, width, height,
        capacity=capacity, sh_degree=sh_degree, background=background,
    )  # fmt: skip
    return image, info["overflow"]


@jax.jit
def _scores(image, target):
    return {"psnr": psnr(image, target), "ssim": ssim(image, target), "l1": l1(image, target)}
