"""A plain float64 NumPy FLAME, written from facts/avatars_gsplat.md F alone: one head, loops, no cleverness."""

from __future__ import annotations

import numpy as np


def rotation(axis_angle: np.ndarray) -> np.ndarray:
    angle = np.linalg.norm(axis_angle)
    if angle == 0:
        return np.eye(3)
    x, y, z = axis_angle / angle
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k


def vertices(model, params) -> np.ndarray:
    """[V, 3] for a FlameModel and FlameParams without leading axes."""
    m = {name: np.asarray(value, np.float64) for name, value in vars(model).items() if hasattr(value, "dtype")}
    p = {name: np.asarray(value, np.float64) for name, value in vars(params).items() if value is not None}
    shaped = m["v_template"] + m["shape_dirs"] @ p["shape"] + m["expr_dirs"] @ p["expr"] + p.get("static_offset", 0)
    joints = m["joint_regressor"] @ shaped
    poses = [p["rotation"], p["neck_pose"], p["jaw_pose"], p["eyes_pose"][:3], p["eyes_pose"][3:]]
    rotations = [rotation(pose) for pose in poses]
    feature = np.concatenate([(r - np.eye(3)).ravel() for r in rotations[1:]])
    shaped = shaped + m["pose_dirs"] @ feature

    world = []
    for j, parent in enumerate(model.parents):
        local = np.eye(4)
        local[:3, :3] = rotations[j]
        local[:3, 3] = joints[j] - (joints[parent] if parent >= 0 else 0)
        world.append(world[parent] @ local if parent >= 0 else local)
    skinned = np.zeros_like(shaped)
    for j, transform in enumerate(world):
        moved = shaped @ transform[:3, :3].T + transform[:3, 3] - transform[:3, :3] @ joints[j]
        skinned += m["skin_weights"][:, j, None] * moved
    return skinned + p["translation"]
