"""The state of a fit: raw values of the Gaussians in a bucket of fixed size, FLAME parameters, Adam's moments.

Letters: N rows of the bucket, of which the first `num` are Gaussians and the rest padding; T timesteps; K SH functions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pointillist_jax.configs import FitConfig
from pointillist_jax.files import ArraySpec, FileFormatError, read_npz, write_npz
from pointillist_jax.flame import FlameModel, FlameParams
from pointillist_jax.gaussians import SH_C0, Gaussians

RAW = ("means", "f_dc", "f_rest", "opacities", "scales", "quats")
FLAME = ("expr", "rotation", "neck_pose", "jaw_pose", "eyes_pose", "translation")
_MAX_GAUSSIANS = 1 << 24
_OPAQUE = 1e-7, 1 - 1e-7  # Opacities whose logits are finite.


@flax.struct.dataclass
class FitState:
    """Everything a step changes.

    Attributes:
      params: raw values. `means` [N, 3] local; `f_dc` [N, 3] and `f_rest` [N, K − 1, 3] SH; `opacities` [N] logits;
        `scales` [N, 3] local logs; `quats` [N, 4] of any length; with FLAME fine-tuning also `expr` [T, E],
        `rotation`, `neck_pose`, `jaw_pose`, `translation` [T, 3] and `eyes_pose` [T, 6].
      mu, nu: Adam's first and second moments of the same.
      binding: [N] int32 face.
      num: how many rows are Gaussians.
      step: optimiser steps done.
      grad_sum: [N] sum over steps of |d loss / d means2d| in normalised device coordinates, where visible.
      grad_count: [N] number of those steps.
      max_radii: [N] largest screen radius in pixels since the last density control.
    """

    params: dict[str, Array]
    mu: dict[str, Array]
    nu: dict[str, Array]
    binding: Int[Array, "N"]
    num: Int[Array, ""]
    step: Int[Array, ""]
    grad_sum: Float[Array, "N"]
    grad_count: Float[Array, "N"]
    max_radii: Float[Array, "N"]

    @property
    def bucket(self) -> int:
        return self.binding.shape[0]


def init_state(model: FlameModel, flame: FlameParams, config: FitConfig) -> FitState:
    """One Gaussian per face: local origin, local scale 1, opacity 0.1, nearly grey (facts A.3)."""
    num, rest = model.num_faces, (config.sh_degree + 1) ** 2 - 1
    rng = np.random.default_rng([config.seed, 1])
    rows = {
        "means": np.zeros((num, 3)),
        "f_dc": rng.uniform(size=(num, 3)) / 255,
        "f_rest": np.zeros((num, rest, 3)),
        "opacities": np.full(num, np.log(0.1 / 0.9)),
        "scales": np.zeros((num, 3)),
        "quats": np.tile([1.0, 0, 0, 0], (num, 1)),
    }
    params = {key: np.asarray(value, np.float32) for key, value in rows.items()}
    if config.finetune_flame:
        params |= {key: np.asarray(getattr(flame, key), np.float32) for key in FLAME}
    zeros = {key: np.zeros_like(value) for key, value in params.items()}
    return to_device(params, zeros, zeros, np.arange(num), bucket=bucket_size(num), step=0)


def bucket_size(num: int) -> int:
    """Rows for `num` Gaussians: the next 512 · 2^n, so that few programs are compiled while they grow."""
    return max(512, 1 << (num - 1).bit_length())


def to_device(
    params: Mapping[str, np.ndarray],
    mu: Mapping[str, np.ndarray],
    nu: Mapping[str, np.ndarray],
    binding: np.ndarray,
    *,
    bucket: int,
    step: int,
) -> FitState:
    """Host rows [G, …] → a padded state with empty statistics. Padding: zeros, opacity masked, identity rotations."""
    num = len(binding)

    def pad(tree: Mapping[str, np.ndarray]) -> dict[str, Array]:
        return {
            key: jnp.asarray(
                np.pad(value, [(0, bucket - num)] + [(0, 0)] * (value.ndim - 1)) if key in RAW else value, jnp.float32
            )
            for key, value in tree.items()
        }

    params = pad(params)
    # A quaternion of zeros is no rotation; the rasteriser would count it as invalid.
    params["quats"] = jnp.where(jnp.arange(bucket)[:, None] < num, params["quats"], jnp.array([1.0, 0, 0, 0]))
    return FitState(
        params=params,
        mu=pad(mu),
        nu=pad(nu),
        binding=jnp.asarray(np.pad(binding, (0, bucket - num)), jnp.int32),
        num=jnp.int32(num),
        step=jnp.int32(step),
        grad_sum=jnp.zeros(bucket),
        grad_count=jnp.zeros(bucket),
        max_radii=jnp.zeros(bucket),
    )


def gaussians(state: FitState) -> Gaussians:
    """The fitted Gaussians, triangle-local and without padding, with activated values."""
    num = int(state.num)
    raw = {key: state.params[key][:num] for key in RAW}
    f_dc, f_rest = raw["f_dc"], raw["f_rest"]
    plain = f_rest.shape[1] == 0
    return Gaussians(
        means=raw["means"],
        quats=raw["quats"] / jnp.linalg.norm(raw["quats"], axis=-1, keepdims=True),
        scales=jnp.exp(raw["scales"]),
        opacities=jax.nn.sigmoid(raw["opacities"]),
        colors=0.5 + SH_C0 * f_dc if plain else None,
        sh=None if plain else jnp.concatenate([f_dc[:, None], f_rest], axis=1),
        binding=state.binding[:num],
    )


def state_of(fitted: Gaussians, bucket: int) -> FitState:
    """The inverse of `gaussians`, for rendering a saved fit: without moments and statistics, FLAME as it was tracked.

    Args:
      fitted: [G] triangle-local, with binding.
      bucket: rows, at least G.
    """
    plain = fitted.sh is None
    opacities = np.clip(np.asarray(fitted.opacities, np.float32), _OPAQUE[0], _OPAQUE[1])
    params = {
        "means": fitted.means,
        "f_dc": (fitted.colors - 0.5) / SH_C0 if plain else fitted.sh[:, 0],
        "f_rest": np.zeros((fitted.num_gaussians, 0, 3)) if plain else fitted.sh[:, 1:],
        "opacities": np.log(opacities / (1 - opacities)),
        "scales": np.log(fitted.scales),
        "quats": fitted.quats,
    }
    params = {key: np.asarray(value, np.float32) for key, value in params.items()}
    zeros = {key: np.zeros_like(value) for key, value in params.items()}
    return to_device(params, zeros, zeros, np.asarray(fitted.binding), bucket=bucket, step=0)


def flame_params(state: FitState, tracked: FlameParams) -> FlameParams:
    """The timesteps' parameters, with what was fine-tuned."""
    return tracked.replace(**{key: state.params[key] for key in FLAME if key in state.params})


def save_state(path: str | os.PathLike, state: FitState, extra: Mapping[str, Any]) -> None:
    """Writes the whole state and a JSON-able record; atomic, the same bytes for the same state."""
    trees = {"params": state.params, "mu": state.mu, "nu": state.nu}
    arrays = {f"{tree}.{key}": np.asarray(value) for tree, values in trees.items() for key, value in values.items()}
    arrays |= {key: np.asarray(getattr(state, key)) for key in _VECTORS}
    arrays |= {"num": np.asarray(state.num)[None], "step": np.asarray(state.step)[None]}
    arrays["extra"] = np.frombuffer(json.dumps(extra).encode(), np.uint8)
    write_npz(path, arrays)


def load_state(path: str | os.PathLike, template: FitState) -> tuple[FitState, dict[str, Any]]:
    """Reads `save_state`'s file.

    Args:
      path: the file.
      template: a state of the same head, configuration and data, whatever its bucket: it gives the expected shapes.

    Raises:
      FileNotFoundError: no such file.
      FileFormatError: damaged, or of another head or configuration.
    """
    specs = {"extra": ArraySpec((None,), "int", low=0, high=255), "binding": ArraySpec(("N",), "int", low=0)}
    for tree in ("params", "mu", "nu"):
        for key, value in template.params.items():
            shape = ("N", *value.shape[1:]) if key in RAW else value.shape
            specs[f"{tree}.{key}"] = ArraySpec(shape)
    specs |= {key: ArraySpec(("N",)) for key in _VECTORS if key != "binding"}
    specs |= {"num": ArraySpec((1,), "int", low=1, high=_MAX_GAUSSIANS), "step": ArraySpec((1,), "int", low=0)}
    arrays = read_npz(path, specs, "the checkpoint of a fit of this head with this configuration")
    try:
        extra = json.loads(arrays.pop("extra").astype(np.uint8).tobytes())
    except ValueError:
        raise FileFormatError(f"{path}: its record is not JSON; the file is damaged, start again.") from None
    if not isinstance(extra, dict) or int(arrays["num"][0]) > len(arrays["binding"]):
        raise FileFormatError(f"{path} contradicts itself; the file is damaged, start again.")
    trees = {
        tree: {key: jnp.asarray(arrays[f"{tree}.{key}"]) for key in template.params} for tree in ("params", "mu", "nu")
    }
    vectors = {key: jnp.asarray(arrays[key]) for key in _VECTORS}
    state = FitState(**trees, **vectors, num=jnp.int32(arrays["num"][0]), step=jnp.int32(arrays["step"][0]))
    return state, extra


_VECTORS = ("binding", "grad_sum", "grad_count", "max_radii")
