"""FLAME-layout heads: loading, posing, and binding Gaussians to their faces (DESIGN §3, §4)."""

from pointillist_jax.files import UnsafeFileError
from pointillist_jax.flame.binding import (
    FaceFrames,
    PointRig,
    animate,
    bind_points,
    face_frames,
    global_to_local,
    local_to_global,
)
from pointillist_jax.flame.lbs import flame_vertices
from pointillist_jax.flame.model import FlameModel, FlameParams, load_flame, open_head, save_flame

__all__ = [
    "FaceFrames",
    "FlameModel",
    "FlameParams",
    "PointRig",
    "UnsafeFileError",
    "animate",
    "bind_points",
    "face_frames",
    "flame_vertices",
    "global_to_local",
    "load_flame",
    "local_to_global",
    "open_head",
    "save_flame",
]
