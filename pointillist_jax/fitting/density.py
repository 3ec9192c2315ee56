"""Density control on the host: clone, split, prune, reset, budget, with bindings inherited (facts A.4, A.5).

It runs once in hundreds of steps on arrays whose sizes change, so it is NumPy; the padded arrays of the steps are made
from its result. Letters: G Gaussians, F faces.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from pointillist_jax.configs import FitConfig
from pointillist_jax.files import UserError
from pointillist_jax.fitting.state import RAW, FitState, to_device

_SPLIT = 2
_RESET_OPACITY = 0.01


@dataclasses.dataclass(frozen=True)
class Cloud:
    """Raw Gaussians without padding, with Adam's moments.

    Attributes:
      params, mu, nu: the per-Gaussian entries of FitState, [G, ...].
      binding: [G].
    """

    params: dict[str, np.ndarray]
    mu: dict[str, np.ndarray]
    nu: dict[str, np.ndarray]
    binding: np.ndarray

    def __len__(self) -> int:
        return len(self.binding)

    def take(self, rows: np.ndarray) -> Cloud:
        """The rows of a mask or index, moments included."""
        trees = ({key: value[rows] for key, value in tree.items()} for tree in (self.params, self.mu, self.nu))
        return Cloud(*trees, self.binding[rows])

    def append(self, params: dict[str, np.ndarray], binding: np.ndarray) -> Cloud:
        """With new rows behind, whose moments are zero."""
        zeros = {key: np.zeros_like(value) for key, value in params.items()}
        trees = (
            {key: np.concatenate([value, new[key]]) for key, value in tree.items()}
            for tree, new in ((self.params, params), (self.mu, zeros), (self.nu, zeros))
        )
        return Cloud(*trees, np.concatenate([self.binding, binding]))


@dataclasses.dataclass(frozen=True)
class Changes:
    """What one density control did."""

    cloned: int
    split: int
    pruned: int


def to_host(state: FitState) -> Cloud:
    num = int(state.num)
    trees = ({key: np.asarray(tree[key])[:num] for key in RAW} for tree in (state.params, state.mu, state.nu))
    return Cloud(*trees, np.asarray(state.binding)[:num])


def from_host(state: FitState, cloud: Cloud, bucket: int) -> FitState:
    """`state` with other Gaussians and empty statistics; FLAME parameters and their moments stay."""
    trees = []
    for tree, rows in ((state.params, cloud.params), (state.mu, cloud.mu), (state.nu, cloud.nu)):
        trees.append({key: rows.get(key, np.asarray(value)) for key, value in tree.items()})
    return to_device(*trees, cloud.binding, bucket=max(bucket, state.bucket), step=int(state.step))


def prune(cloud: Cloud, marked: np.ndarray) -> tuple[Cloud, np.ndarray]:
    """Removes marked Gaussians, but none of a face that would lose all of its own (facts A.5).

    Args:
      cloud: G Gaussians.
      marked: [G] bool.

    Returns:
      The rest, and the mask [G] of those kept.
    """
    faces = int(cloud.binding.max(initial=-1)) + 1
    left = np.bincount(cloud.binding, minlength=faces) - np.bincount(cloud.binding[marked], minlength=faces)
    keep = ~(marked & (left[cloud.binding] > 0))
    return cloud.take(keep), keep


def densify_and_prune(
    cloud: Cloud,
    gradients: np.ndarray,
    radii: np.ndarray,
    face_scales: np.ndarray,
    extent: float,
    config: FitConfig,
    rng: np.random.Generator,
    *,
    prune_large: bool = False,
    room: int | None = None,
) -> tuple[Cloud, Changes]:
    """One density control: clones small and splits large Gaussians of large gradient, then prunes.

    Args:
      cloud: G Gaussians.
      gradients: [G] mean |d loss / d means2d| in normalised device coordinates, 0 where never visible.
      radii: [G] largest screen radius in pixels.
      face_scales: [F] metres per local unit.
      extent: of the cameras, metres.
      config: thresholds.
      rng: for the places of a split's children.
      prune_large: also prune by size on the screen and in the world.
      room: at most so many Gaussians more (ours, for a budget): those of the largest gradients are taken.
    """
    world = np.exp(cloud.params["scales"]).max(axis=1) * face_scales[cloud.binding]
    chosen = gradients >= config.densify_grad
    if room is not None and chosen.sum() > max(room, 0):
        first = np.argsort(-gradients, kind="stable")[: max(room, 0)]
        chosen &= np.isin(np.arange(len(cloud)), first)
    large = world > config.percent_dense * extent
    clones, splits = chosen & ~large, chosen & large

    G, parents = len(cloud), cloud.take(splits)
    cloned = cloud.take(clones)
    grown = cloud.append(cloned.params, cloned.binding)
    children, binding = _children(parents, face_scales, config.split_std, rng)
    grown = grown.append(children, binding)
    # The children are there already, so no face loses its last Gaussian with the parents.
    gone = np.zeros(len(grown), bool)
    gone[:G] = splits
    grown, kept = prune(grown, gone)
    radii = np.concatenate([radii, np.zeros(len(kept) - G, radii.dtype)])[kept]

    marked = _sigmoid(grown.params["opacities"]) < config.prune_opacity
    if prune_large:
        world = np.exp(grown.params["scales"]).max(axis=1) * face_scales[grown.binding]
        marked |= (radii > config.prune_radius) | (world > config.prune_scale * extent)
    before = len(grown)
    grown, _ = prune(grown, marked)
    return grown, Changes(int(clones.sum()), int(splits.sum()), before - len(grown))


def reset_opacities(cloud: Cloud) -> Cloud:
    """Opacities to at most 0.01, with their moments forgotten."""
    limit = np.float32(np.log(_RESET_OPACITY / (1 - _RESET_OPACITY)))
    zeros = np.zeros_like(cloud.params["opacities"])
    return Cloud(
        cloud.params | {"opacities": np.minimum(cloud.params["opacities"], limit)},
        cloud.mu | {"opacities": zeros},
        cloud.nu | {"opacities": zeros},
        cloud.binding,
    )


def prune_to_budget(cloud: Cloud, importance: np.ndarray, budget: int) -> Cloud:
    """Exactly `budget` Gaussians, if there are more: the most important of every face, then the most important (ours).

    Args:
      cloud: G Gaussians.
      importance: [G].
      budget: at least the number of faces that have Gaussians.

    Raises:
      UserError: a budget with which some face would lose its last Gaussian.
    """
    if len(cloud) <= budget:
        return cloud
    faces = len(np.unique(cloud.binding))
    if budget < faces:
        raise UserError(
            f"max_points={budget} is less than one Gaussian for each of the {faces} faces; raise it, or take a head "
            "with fewer faces."
        )
    order = np.argsort(-importance, kind="stable")
    _, first = np.unique(cloud.binding[order], return_index=True)
    keep = np.zeros(len(cloud), bool)
    keep[order[first]] = True
    rest = order[~keep[order]]
    keep[rest[: budget - faces]] = True
    return cloud.take(keep)


def _children(
    parents: Cloud, face_scales: np.ndarray, spread: str, rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Two smaller Gaussians for each parent, drawn from it."""
    twice = {key: np.concatenate([value] * _SPLIT) for key, value in parents.params.items()}
    binding = np.concatenate([parents.binding] * _SPLIT)
    std = np.exp(twice["scales"])
    if spread == "world":
        std = std * face_scales[binding][:, None]
    elif spread != "local":
        raise UserError(f'split_std={spread!r}: it must be "world" or "local".')
    rotation = _rotations(twice["quats"])
    draw = rng.normal(size=std.shape).astype(np.float32) * std
    twice["means"] = (twice["means"] + np.einsum("gab,gb->ga", rotation, draw)).astype(np.float32)
    twice["scales"] = np.log(np.exp(twice["scales"]) / np.float32(0.8 * _SPLIT))
    return twice, binding


def _rotations(quats: np.ndarray) -> np.ndarray:
    w, x, y, z = (quats / np.maximum(np.linalg.norm(quats, axis=1, keepdims=True), 1e-10)).T
    return np.stack(
        [
            np.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], -1),
            np.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], -1),
            np.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1),
        ],
        -2,
    )


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))
