"""What a fit is made from: one person's views by split, and the tracked FLAME parameters of all timesteps."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, Protocol

import numpy as np

from pointillist_jax.files import UserError
from pointillist_jax.flame import FlameModel, FlameParams


class Views(Protocol):
    """N pictures of one person. `data.captures.CaptureSplit` is one, `ArrayViews` another.

    Attributes:
      viewmats: [N, 4, 4] world to camera, OpenCV axes.
      Ks: [N, 3, 3] pixels.
      sizes: [N, 2] width, height.
      timesteps: [N] row of the FLAME parameters.
      camera_indices: [N].
    """

    viewmats: np.ndarray
    Ks: np.ndarray
    sizes: np.ndarray
    timesteps: np.ndarray
    camera_indices: np.ndarray

    def __len__(self) -> int: ...

    def image(self, n: int, background: float = 1.0) -> np.ndarray:
        """[H, W, 3] float32 in [0, 1], the person on a grey level."""


@dataclasses.dataclass(frozen=True)
class ArrayViews:
    """Views in memory; `images` [N, H, W, 3] float32 have their background in them already."""

    images: np.ndarray
    viewmats: np.ndarray
    Ks: np.ndarray
    timesteps: np.ndarray
    camera_indices: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        height, width = self.images.shape[1:3]
        return np.tile([width, height], (len(self.images), 1))

    def __len__(self) -> int:
        return len(self.images)

    def image(self, n: int, background: float = 1.0) -> np.ndarray:
        del background
        return self.images[n]


@dataclasses.dataclass(frozen=True)
class FitData:
    """One person.

    Attributes:
      subject: name of the person.
      params: [T, ...] of all timesteps of all splits; shape [S] and static_offset ([V, 3] or None) are shared.
      extent: metres; 1.1 × the largest distance of a training camera from their mean (facts A.4).
      splits: "train", and optionally "val" (held-out cameras) and "test" (held-out expressions).
      face_groups: name → faces, for counting Gaussians by part of the head.
    """

    subject: str
    params: FlameParams
    extent: float
    splits: dict[str, Views]
    face_groups: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_capture(cls, capture: Any, face_groups: dict[str, np.ndarray] | None = None) -> FitData:
        """Of a `data.captures.Capture`: its three splits, those without views left out."""
        splits = {name: capture.split(name) for name in ("train", "val", "test")}
        splits = {name: views for name, views in splits.items() if len(views)}
        return cls(capture.subject, capture.params, capture.extent, splits, face_groups or {})

    @property
    def num_timesteps(self) -> int:
        return self.params.expr.shape[0]

    def check(self, model: FlameModel) -> None:
        """Raises UserError for data that cannot be fitted."""
        if "train" not in self.splits or not len(self.splits["train"]):
            raise UserError(f"{self.subject} has no training views; check its transforms_train.json.")
        expected = {"shape": (model.shape_dirs.shape[-1],), "expr": (self.num_timesteps, model.expr_dirs.shape[-1])}
        for key, shape in expected.items():
            if (found := np.shape(getattr(self.params, key))) != shape:
                raise UserError(f"{self.subject}: {key} has shape {found}, but {model.source} needs {shape}.")
        for name, views in self.splits.items():
            steps = np.asarray(views.timesteps)
            if len(steps) and (steps.min() < 0 or steps.max() >= self.num_timesteps):
                raise UserError(f"{self.subject}: {name} has timesteps beyond the {self.num_timesteps} tracked ones.")

    def fingerprint(self) -> str:
        """A hash of cameras, timesteps, parameters and picture files: a fit is resumed on the data it began with."""
        digest = hashlib.sha256(self.subject.encode())
        for name, views in sorted(self.splits.items()):
            digest.update(name.encode())
            for array in (views.viewmats, views.Ks, views.sizes, views.timesteps):
                digest.update(np.ascontiguousarray(array, np.float32).tobytes())
            # Sizes stand for contents: reading every picture would take longer than many a resumed fit.
            for path in (*getattr(views, "image_paths", ()), *getattr(views, "mask_paths", ())):
                if path is not None:
                    digest.update(f"{path.name}:{path.stat().st_size};".encode())
        for value in vars(self.params).values():
            if value is not None:
                digest.update(np.asarray(value, np.float32).tobytes())
        return digest.hexdigest()


def view_order(num_views: int, seed: int, first: int, count: int) -> np.ndarray:
    """Which views the draws `first`, `first + 1`, … show: shuffled passes, a pure function of seed and draw."""
    out = []
    for draw in range(first, first + count):
        epoch, place = divmod(draw, num_views)
        out.append(np.random.default_rng([seed, epoch]).permutation(num_views)[place])
    return np.array(out)
