"""Batches of (subject, timestep, camera) for stage two: photographs, cameras, tracked heads (paper §4.4.2).

The stream has the guarantees of `streams.Batches`. Captures are checked when they are loaded; here images are decoded
in prefetching threads or workers, through each capture's bounded cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from pointillist_jax.data.captures import Capture
from pointillist_jax.data.streams import Batches, locate, prefix_sums
from pointillist_jax.data.token_store import FLAME_FIELDS
from pointillist_jax.files import UserError


class ViewSource:
    """Random access to all views of one split of some captures. Picklable; NumPy only.

    Record `i` is a dict: `image` [H, W, 3] uint8 on white, `mask` [H, W] uint8, `viewmats` [4, 4], `Ks` [3, 3] float32,
    `subject` int32 (index into `subjects`), `timestep` int32 (row of that capture's params), `camera` int32, and
    `flame`: name → [n] float32, with `static_offset` [V, 3] if any of the captures has one.
    """

    def __init__(self, captures: Sequence[Capture], split: str = "train"):
        """See `view_batches`."""
        if not captures:
            raise UserError("view_batches needs at least one capture.")
        self.subjects = tuple(capture.subject for capture in captures)
        if len(set(self.subjects)) != len(self.subjects):
            raise UserError("two captures have the same subject name: rename one of the folders.")
        self.split = split
        self.views = tuple(capture.split(split) for capture in captures)
        sizes = {tuple(size) for views in self.views for size in np.unique(views.sizes, axis=0).tolist()}
        if len(sizes) > 1:
            raise UserError(
                f"images of one batch need one size, but there are {sorted(sizes)}: load the captures with resize=."
            )
        self.width, self.height = next(iter(sizes), (0, 0))
        # Only NumPy goes to the workers.
        self._flame = [{name: np.asarray(getattr(c.params, name)) for name in FLAME_FIELDS} for c in captures]
        offsets = [c.params.static_offset for c in captures]
        shape = next((o.shape for o in offsets if o is not None), None)
        if shape is not None:
            for flame, offset in zip(self._flame, offsets, strict=True):
                flame["static_offset"] = np.zeros(shape, np.float32) if offset is None else np.asarray(offset)
        self.offsets = prefix_sums(np.array([len(views) for views in self.views]))

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def offset_shape(self) -> tuple[int, ...] | None:
        """Of `static_offset`, if any of the captures has one."""
        return self._flame[0]["static_offset"].shape if "static_offset" in self._flame[0] else None

    def __getitem__(self, index: int) -> dict[str, Any]:
        subject, n = locate(self.offsets, index)
        views, flame = self.views[subject], self._flame[subject]
        rgba, t = views.rgba(n), int(views.timesteps[n])
        shared = ("shape", "static_offset")
        return {
            "image": rgba[..., :3] + (255 - rgba[..., 3:]),
            "mask": rgba[..., 3],
            "viewmats": views.viewmats[n],
            "Ks": views.Ks[n],
            "subject": np.int32(subject),
            "timestep": np.int32(t),
            "camera": views.camera_indices[n],
            "flame": {name: value if name in shared else value[t] for name, value in flame.items()},
        }

    def empty(self) -> dict[str, Any]:
        some = next(views for views in self.views if len(views))
        flame = {name: v if name in ("shape", "static_offset") else v[0] for name, v in self._flame[0].items()}
        return {
            "image": np.full((self.height, self.width, 3), 255, np.uint8),
            "mask": np.zeros((self.height, self.width), np.uint8),
            # A camera that can be used in arithmetic: zeros would give NaN, even under a mask.
            "viewmats": some.viewmats[0],
            "Ks": some.Ks[0],
            "subject": np.int32(-1),
            "timestep": np.int32(-1),
            "camera": np.int32(-1),
            "flame": {name: np.zeros_like(value) for name, value in flame.items()},
        }

    def fingerprint(self) -> dict[str, Any]:
        parts = [
            (name, v.timesteps.tolist(), v.camera_indices.tolist())
            for name, v in zip(self.subjects, self.views, strict=True)
        ]
        return {
            "subjects": len(self.subjects),
            "split": self.split,
            "size": [self.width, self.height],
            "records": len(self),
            "data": hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16],
        }


def view_batches(captures: Sequence[Capture], *, batch_size: int, split: str = "train", **how: Any) -> Batches:
    """Batches of views, subjects, timesteps and cameras mixed: a dict as `ViewSource` with a leading axis B.

    Args:
      captures: from `load_capture`, with one `resize` for all if their images differ in size.
      batch_size: rows over all processes.
      split: "train", "val" or "test".
      how: see `streams.Batches`.

    Raises:
      UserError: images of several sizes, subjects of one name, a split that was not loaded.
    """
    return Batches(ViewSource(captures, split), batch_size, **how)
