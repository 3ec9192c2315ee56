"""FLAME parameters on disk: GaussianAvatars' `flame_param.npz` and the capture schema's file per timestep.

Both hold the same arrays (facts/avatars_gsplat.md A.6, A.8): a fit's file has T timesteps, a capture's has one.
"""

from __future__ import annotations

import os

import jax.numpy as jnp
import numpy as np

from pointillist_jax.files import ArraySpec, FileFormatError, read_npz, write_npz
from pointillist_jax.flame.model import FlameModel, FlameParams
from pointillist_jax.flame.teeth import NUM_TEETH_VERTICES

_POSES = {"rotation": 3, "neck_pose": 3, "jaw_pose": 3, "eyes_pose": 6, "translation": 3}
# Coefficients are standard deviations, angles radians, lengths metres: anything beyond is another unit or damage.
_BOUND = {"low": -1e3, "high": 1e3}
# Tens of thousands of timesteps; a capture has a file for each, so a hostile one must not fill the memory.
_MAX_BYTES = 64 << 20
_SPECS = {
    "shape": ArraySpec((..., "S"), **_BOUND),
    "expr": ArraySpec((..., "E"), **_BOUND),
    **{key: ArraySpec((..., size), **_BOUND) for key, size in _POSES.items()},
    "static_offset": ArraySpec((..., "V", 3), optional=True, **_BOUND),
}


def load_flame_params(path: str | os.PathLike, model: FlameModel) -> FlameParams:
    """Reads FLAME parameters of one subject over T timesteps.

    Coefficients beyond those of the head must be zero; missing ones are zero. An offset for FLAME's 5023 vertices gets
    zeros for the teeth of a head of 5143. `dynamic_offset` is not read: GaussianAvatars ignores it too (facts A.1).

    Args:
      path: an untrusted `.npz`.
      model: the head the parameters are for.

    Returns:
      FlameParams with a leading axis [T] everywhere but on shape [S] and static_offset [V, 3] (None where the file has
      none, or zeros).

    Raises:
      FileNotFoundError: no such file.
      FileFormatError: names file, key, expected and found.
    """
    arrays = read_npz(path, _SPECS, "a flame_param.npz", max_bytes=_MAX_BYTES)
    arrays = {key: np.asarray(value, np.float32) for key, value in arrays.items()}
    for key, value in arrays.items():
        if not value.size:
            raise FileFormatError(f"{path}: {key} has shape {value.shape}, no values; write at least one timestep.")
    shapes = arrays["shape"].reshape(-1, arrays["shape"].shape[-1])
    if (shapes != shapes[0]).any():
        raise FileFormatError(f"{path}: shape differs between timesteps; one file holds one identity, split it.")
    values = {"shape": _fit(path, "shape", shapes[0], model.shape_dirs.shape[-1], model)}

    timed = {key: arrays[key].reshape(-1, arrays[key].shape[-1]) for key in ("expr", *_POSES)}
    num = max(len(value) for value in timed.values())
    for key, value in timed.items():
        if len(value) not in (1, num):
            raise FileFormatError(f"{path}: {key} has {len(value)} timesteps, other arrays {num}; write them alike.")
        timed[key] = np.broadcast_to(value, (num, value.shape[-1]))
    timed["expr"] = _fit(path, "expr", timed["expr"], model.expr_dirs.shape[-1], model)
    offset = _static_offset(path, arrays.get("static_offset"), model)
    return FlameParams(
        **{key: jnp.asarray(value) for key, value in (values | timed).items()},
        static_offset=None if offset is None else jnp.asarray(offset),
    )


def save_flame_params(
    path: str | os.PathLike, params: FlameParams, model: FlameModel, *, dynamic_offset: bool = False
) -> None:
    """Writes GaussianAvatars' flame_param.npz: shape [S], static_offset [1, V, 3], everything else [T, ...].

    Args:
      path: written atomically, the same bytes for the same parameters.
      params: one identity; with or without a leading axis [T].
      model: its number of vertices gives the size of an absent static offset, which viewers expect as zeros.
      dynamic_offset: add the zeros [T, V, 3] that a fit's file has.
    """
    arrays = {key: np.atleast_2d(np.asarray(getattr(params, key), np.float32)) for key in ("expr", *_POSES)}
    num = max(len(value) for value in arrays.values())
    offset = np.zeros((model.num_vertices, 3)) if params.static_offset is None else params.static_offset
    arrays = {key: np.broadcast_to(value, (num, value.shape[-1])) for key, value in arrays.items()}
    arrays["shape"] = np.asarray(params.shape, np.float32).reshape(-1, params.shape.shape[-1])[0]
    arrays["static_offset"] = np.asarray(offset, np.float32).reshape(-1, model.num_vertices, 3)[:1]
    if dynamic_offset:
        arrays["dynamic_offset"] = np.zeros((num, model.num_vertices, 3), np.float32)
    write_npz(path, arrays)


def _fit(path, key: str, value: np.ndarray, size: int, model: FlameModel) -> np.ndarray:
    """`value` [..., n] with zeros added or dropped at the end, so that n = `size`."""
    if (beyond := value[..., size:]).any():
        used = size + 1 + int(np.flatnonzero(beyond.reshape(-1, beyond.shape[-1]).any(axis=0))[-1])
        raise FileFormatError(
            f"{path}: {key} uses {used} coefficients, but {model.source or 'the head'} has {size}: load the head the "
            "parameters were tracked with, with all its directions."
        )
    missing = max(size - value.shape[-1], 0)
    return np.pad(value[..., :size], [(0, 0)] * (value.ndim - 1) + [(0, missing)])


def _static_offset(path, offset: np.ndarray | None, model: FlameModel) -> np.ndarray | None:
    """[V, 3], or None for no offset at all."""
    if offset is None:
        return None
    offset = offset.reshape(-1, *offset.shape[-2:])
    if (offset != offset[0]).any():
        raise FileFormatError(f"{path}: static_offset differs between timesteps; one file holds one identity.")
    offset = offset[0]
    if len(offset) == model.num_vertices - NUM_TEETH_VERTICES:
        offset = np.pad(offset, [(0, NUM_TEETH_VERTICES), (0, 0)])
    if len(offset) != model.num_vertices:
        raise FileFormatError(
            f"{path}: static_offset is for {len(offset)} vertices, but {model.source or 'the head'} has "
            f"{model.num_vertices}: load the head the parameters were tracked with."
        )
    # Zeros are no offset, but their number still tells the head.
    return offset if offset.any() else None
