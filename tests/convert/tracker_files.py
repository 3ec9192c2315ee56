"""Two editions of a head of FLAME's layout and a head's size, and what Pixel3DMM leaves of people tracked with one."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import torch
from plyfile import PlyData, PlyElement
from scipy.spatial.transform import Rotation

from experiments.random_flame import random_flame, write_flame
from pointillist_jax.flame import FlameModel, FlameParams, flame_vertices, load_flame


class Editions(NamedTuple):
    """`old` and `new` FLAME files: the same faces and joints, another template, other directions of the same space."""

    old: Path
    new: Path


def write_editions(folder: Path) -> Editions:
    rng, content = np.random.default_rng(3), random_flame()
    ball = rng.normal(size=(5023, 3))
    content["v_template"] = ball / np.linalg.norm(ball, axis=1, keepdims=True) * [0.1, 0.15, 0.11]
    # Skin that follows its nearest joint would be a real head's; that correctives stay small is enough here.
    content["posedirs"] = content["posedirs"] * 0.1
    other = dict(content)
    dirs = content["shapedirs"]
    turn = [np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (300, 100)]
    other["shapedirs"] = np.concatenate([dirs[..., :300] @ turn[0], dirs[..., 300:] @ turn[1]], axis=-1)
    other["v_template"] = content["v_template"] + dirs[..., :300] @ rng.normal(0, 0.05, 300)
    return Editions(write_flame(folder / "old.pkl", content), write_flame(folder / "new.pkl", other))


class Tracked(NamedTuple):
    """The truth of one picture: parameters without the rigid pose, and that pose, about the origin."""

    params: FlameParams
    rotation: np.ndarray
    translation: np.ndarray

    def world(self, head: FlameModel) -> np.ndarray:
        """[5023, 3] where the picture's vertices are: FLAME first, then R and t outside it."""
        return np.asarray(flame_vertices(head, self.params))[:5023] @ self.rotation.T + self.translation


def somebody(rng: np.random.Generator, head: FlameModel, num: int = 1) -> list[Tracked]:
    """One person in `num` pictures."""
    neutral = head.neutral_params()
    shape = jnp.asarray(rng.normal(0, 0.1, neutral.shape.shape), jnp.float32)
    pictures = []
    for _ in range(num):
        poses = {name: jnp.asarray(rng.normal(0, 0.1, n), jnp.float32)
                 for name, n in (("neck_pose", 3), ("jaw_pose", 3), ("eyes_pose", 6))}  # fmt: skip
        expr = jnp.asarray(rng.normal(0, 0.1, neutral.expr.shape), jnp.float32)
        turn = Rotation.from_rotvec(rng.normal(0, 0.8, 3)).as_matrix()
        pictures.append(Tracked(neutral.replace(shape=shape, expr=expr, **poses), turn, rng.normal(0, 0.2, 3)))
    return pictures


def write_pixel3dmm(folder: Path, head: FlameModel, pictures: list[Tracked], *, meshes: bool = True, **change) -> Path:
    """Pixel3DMM's output folder: checkpoint/*.frame and, if asked, mesh/*.ply. `change`: "flame/jaw" → another array.

    None leaves a key out.
    """
    (folder / "checkpoint").mkdir(parents=True)
    for i, picture in enumerate(pictures):
        torch.save(frame_content(picture, i) | change, folder / "checkpoint" / f"{i:05d}.frame")
        if meshes:
            write_mesh(folder / "mesh" / f"{i:05d}.ply", np.asarray(flame_vertices(head, picture.params)), head)
    if meshes:
        neutral = head.neutral_params().replace(shape=pictures[0].params.shape)
        write_mesh(folder / "mesh/canonical.ply", np.asarray(flame_vertices(head, neutral)), head)
    return folder


def frame_content(picture: Tracked, number: int = 0) -> dict:
    params = picture.params

    def six(vector) -> np.ndarray:
        """The first two rows; optimisers leave them at any length."""
        rows = Rotation.from_rotvec(np.asarray(vector)).as_matrix()[:2]
        return (rows * [[1.3], [0.8]]).reshape(1, 6).astype(np.float32)

    def batch(x) -> np.ndarray:
        return np.asarray(x, np.float32)[None]

    return {
        "flame/shape": batch(params.shape),
        "flame/exp": batch(params.expr),
        "flame/jaw": six(params.jaw_pose),
        "flame/neck": six(params.neck_pose),
        "flame/eyes": np.concatenate([six(params.eyes_pose[:3]), six(params.eyes_pose[3:])], axis=1),
        "flame/eyelids": np.zeros((1, 2), np.float32),
        "flame/R": picture.rotation[:2].reshape(1, 6).astype(np.float32),
        "flame/R_rotation_matrix": batch(picture.rotation),
        "flame/t": batch(picture.translation),
        "camera/R_base_0": np.eye(3, dtype=np.float32)[None],
        "camera/t_base_0": np.array([[0, 0, -1]], np.float32),
        "camera/fl": np.array([[3.9]], np.float32),
        "camera/pp": np.array([[0.02, -0.03]], np.float32),
        "joint_transforms": np.zeros((1, 5, 4, 4), np.float32),
        "img_size": 256,
        "frame_id": number,
        "global_step": np.int64(800),
    }


def write_mesh(path: Path, vertices: np.ndarray, head: FlameModel, num: int = 5023) -> None:
    """A binary PLY with vertices and triangles, as trimesh writes them, by an independent writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.zeros(num, [(axis, "<f4") for axis in "xyz"])
    for i, axis in enumerate("xyz"):
        rows[axis] = vertices[:num, i]
    faces = np.zeros(head.num_faces, [("vertex_indices", "<i4", (3,))])
    faces["vertex_indices"] = np.asarray(head.faces)
    PlyData([PlyElement.describe(rows, "vertex"), PlyElement.describe(faces, "face")], byte_order="<").write(str(path))


@functools.cache
def loaded(path: Path) -> FlameModel:
    """A head, read once for all tests."""
    return load_flame(path)
