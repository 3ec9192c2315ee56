"""FLAME-layout heads: loading, posing, and binding Gaussians to their faces (DESIGN §3, §4)."""

from pointillist_jax.files import UnsafeFileError
from pointillist_jax.flame.lbs import flame_vertices
from pointillist_jax.flame.model import FlameModel, FlameParams, load_flame, open_head, save_flame

__all__ = ["FlameModel", "FlameParams", "UnsafeFileError", "flame_vertices", "load_flame", "open_head", "save_flame"]
