"""Random and degenerate scenes, as numpy float32."""

from __future__ import annotations

import numpy as np


def cameras(count: int, width: int, height: int, distance: float = 4.0, focal: float = 1.6):
    """Cameras around the origin, looking at it from slightly different sides. → viewmats [C,4,4], Ks [C,3,3]."""
    viewmats, Ks = [], []
    for i in range(count):
        yaw, pitch = 0.5 * i - 0.2 * (count > 1), 0.15 * i + 0.1
        cy, sy, cp, sp = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
        rotation = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]]) @ np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
        matrix = np.eye(4)
        matrix[:3, :3], matrix[:3, 3] = rotation, (0.05 * i, -0.03, distance)
        viewmats.append(matrix)
        f = focal * width
        Ks.append([[f, 0, width * 0.51], [0, 1.05 * f, height * 0.48], [0, 0, 1]])
    return np.asarray(viewmats, np.float32), np.asarray(Ks, np.float32)


def random_scene(count: int, seed: int = 0, size: float = 0.05, spread: float = 1.0, channels: int = 3):
    """means, quats, scales, opacities, colors."""
    rng = np.random.default_rng(seed)
    means = rng.uniform(-spread, spread, (count, 3))
    quats = rng.normal(size=(count, 4))
    scales = size * np.exp(rng.normal(0, 0.5, (count, 3)))
    opacities = rng.uniform(0.02, 0.98, count)
    colors = rng.uniform(0, 1, (count, channels))
    return tuple(np.asarray(x, np.float32) for x in (means, quats, scales, opacities, colors))


def head_scene(count: int, seed: int = 0):
    """Gaussians on a sphere that fills a third of a square image of `cameras`: long lists amid empty tiles."""
    means, quats, scales, opacities, colors = random_scene(count, seed)
    direction = np.random.default_rng(seed).normal(size=means.shape)
    means = 0.8 * direction / np.linalg.norm(direction, axis=1, keepdims=True)
    scales = scales / scales.mean() * 1.2 / np.sqrt(count)
    return means.astype(np.float32), quats, scales.astype(np.float32), opacities, colors


def opaque_scene(count: int, seed: int = 0):
    """Nearly opaque large Gaussians: every pixel stops early, many alphas are clamped."""
    means, quats, scales, _, colors = random_scene(count, seed, size=0.3)
    opacities = np.random.default_rng(seed).uniform(0.9, 1.0, count).astype(np.float32)
    opacities[::3] = 1.0
    return means, quats, scales, opacities, colors


def needle_scene(count: int, seed: int = 0):
    """Needles and pancakes, some of zero thickness, some huge, some on the image border, some at equal depth."""
    means, quats, scales, opacities, colors = random_scene(count, seed, size=0.03)
    scales[:, 0] *= 20
    scales[::2, 1] = 0
    scales[::5, 2] *= 50
    means[::7, 2] = 0.25
    means[::11] *= 2
    return means, quats, scales, opacities, colors


SCENES = {
    "random": lambda: random_scene(400),
    "dense": lambda: random_scene(3000, seed=1, size=0.08),
    "head": lambda: head_scene(2000, seed=2),
    "opaque": lambda: opaque_scene(500, seed=3),
    "needles": lambda: needle_scene(300, seed=4),
    "one": lambda: random_scene(1, seed=5, spread=0.1, size=0.3),
}
