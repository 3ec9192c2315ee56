"""What a step of stage two sees: subjects with their points and AR features, K photographs of each (paper §4.4.2).

A record is one subject with K of its views, so that its attributes are decoded once and compared K times. The stream
(`streams.Batches`, without shuffling) has the guarantees of all streams here; the order is made in the source.

Letters: P points (padded), K views, E width of the hidden states, H × W pixels.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from pointillist_jax.data.captures import Capture
from pointillist_jax.data.point_features import FeatureSet, PointFeatures
from pointillist_jax.data.streams import Batches, prefix_sums
from pointillist_jax.data.template_space import Placement
from pointillist_jax.data.token_store import FLAME_FIELDS
from pointillist_jax.data.views import ViewSource
from pointillist_jax.files import ArraySpec, UserError, read_npz
from pointillist_jax.flame import FlameModel, flame_vertices

# Passes of a training stream before it would begin again.
_EPOCHS = 1 << 20
_BUCKET = 256


class Clouds(Protocol):
    """Canonical points of subjects."""

    def load(self, name: str) -> PointFeatures: ...

    def num_points(self, name: str) -> int: ...


class FeatureClouds:
    """The generated points and their AR features, from a folder of them, each on its person's canonical mesh."""

    def __init__(self, features: FeatureSet, placements: Mapping[str, Placement] | None = None):
        """`placements`: of each subject (`template_space.placement`); None where tokens are in the people's space."""
        self._features, self._placements = features, placements or {}

    def load(self, name: str) -> PointFeatures:
        found = self._features.load(name)
        place = self._placements.get(name, Placement())
        return dataclasses.replace(found, points=place(found.points, found.binding))

    def num_points(self, name: str) -> int:
        spec = {"points": ArraySpec(("P", 3))}
        return len(read_npz(self._features.file(name), spec, "a subject's point features")["points"])


class TemplateClouds:
    """The canonical mesh's vertices, each bound to a face that it is a corner of: the paper's static template."""

    def __init__(self, head: FlameModel, captures: Sequence[Capture], canonical_jaw: float):
        faces = np.asarray(head.faces)
        self._binding = np.zeros(head.num_vertices, np.int32)
        self._binding[faces.reshape(-1)] = np.repeat(np.arange(len(faces)), 3)
        # A vertex of no face would hang on face 0; heads have none.
        self._points = {
            c.subject: np.asarray(flame_vertices(head, c.params.timestep(0).canonical(canonical_jaw)), np.float32)
            for c in captures
        }

    def load(self, name: str) -> PointFeatures:
        points = self._points[name]
        return PointFeatures(
            np.zeros(4 * len(points) + 8, np.int32), points, self._binding, np.zeros((len(points), 4, 0), np.float16)
        )

    def num_points(self, name: str) -> int:
        return len(self._points[name])


class SubjectViews:
    """Random access to (subject, K views) of some captures. Picklable; NumPy only.

    Record `i` is a dict: `subject` int32 (index into `subjects`, -1 for none), `num_points` int32, `points` [P, 3]
    float32 metres, `binding` [P] int32, `hidden` [P, 4, E] float16 (with `features` only), `context` [S, C] (if given),
    `canonical` name → the canonical mesh's parameters, `image` [K, H, W, 3] uint8 on white, `viewmats` [K, 4, 4], `Ks`
    [K, 3, 3], `flame` name → [K, n], `timestep`, `camera` [K] int32, and `weight` [K] float32: 0 where a group of views
    was filled up.
    """

    def __init__(
        self,
        captures: Sequence[Capture],
        clouds: Clouds,
        *,
        views: int,
        split: str = "train",
        canonical_jaw: float = 0.3,
        features: bool = True,
        contexts: Mapping[str, np.ndarray] | None = None,
        seed: int = 0,
        shuffle: bool = True,
        limit: int = 0,
        max_points: int = 0,
        cache_bytes: int = 4 << 30,
    ):
        """Prepares the source.

        Args:
          captures: one per subject, of one image size (`load_capture(resize=…)`).
          clouds: their points.
          views: K.
          split: "train", "val" or "test".
          canonical_jaw: of the canonical mesh the points lie around, radians.
          features: records carry `hidden`.
          contexts: subject → [S, C] of the AR model.
          seed: of the order. shuffle: every pass over the views groups and orders them anew, and there is no end of
            passes; else one pass in the capture's order.
          limit: evenly spaced views taken of each subject; 0 for all. Only without shuffling.
          max_points: P; 0 is the largest cloud's, rounded up.
          cache_bytes: bound on the clouds kept in memory.

        Raises:
          UserError: no captures, different image sizes, a cloud larger than `max_points`.
        """
        self._source, self._clouds, self._contexts = ViewSource(captures, split), clouds, contexts
        self.subjects = self._source.subjects
        self.views, self.seed, self.shuffle, self.features = views, seed, shuffle, features
        counts = {name: clouds.num_points(name) for name in self.subjects}
        if empty := [name for name, n in counts.items() if n == 0]:
            raise UserError(f"{empty[0]} has no points: generate it again, or leave it out.")
        largest = max(counts, key=counts.get)
        if max_points and counts[largest] > max_points:
            raise UserError(
                f"{largest} has {counts[largest]} points, more than decoder.max_points={max_points}: raise it, or "
                "give 0 for the largest cloud."
            )
        self.max_points = max_points or -(-counts[largest] // _BUCKET) * _BUCKET
        self._canonical = []
        for capture in captures:
            params = capture.params.timestep(0).canonical(canonical_jaw)
            self._canonical.append({name: np.asarray(getattr(params, name), np.float32) for name in FLAME_FIELDS})
        if (shape := self._source.offset_shape) is not None:
            for canonical, capture in zip(self._canonical, captures, strict=True):
                offset = capture.params.static_offset
                canonical["static_offset"] = np.zeros(shape, np.float32) if offset is None else np.asarray(offset)
        sizes = np.diff(self._source.offsets)
        kept = [np.arange(n) for n in sizes]
        if limit and not shuffle:
            kept = [np.unique(np.linspace(0, n - 1, min(limit, n)).astype(int)) if n else np.arange(0) for n in sizes]
        self._kept = [first + k for first, k in zip(self._source.offsets[:-1].tolist(), kept, strict=True)]
        self.groups = prefix_sums(np.array([-(-len(k) // views) for k in self._kept]))
        self._cache_bytes = cache_bytes
        self._reset()

    def _reset(self) -> None:
        self._lock, self._cache, self._cached = threading.Lock(), OrderedDict(), 0
        self._epoch = functools.lru_cache(maxsize=2)(self._order)

    def __getstate__(self) -> dict:
        return {k: v for k, v in vars(self).items() if k not in ("_lock", "_cache", "_cached", "_epoch")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._reset()

    @property
    def width(self) -> int:
        return self._source.width

    @property
    def height(self) -> int:
        return self._source.height

    @property
    def groups_per_epoch(self) -> int:
        """Records in which every view appears."""
        return int(self.groups[-1])

    def __len__(self) -> int:
        return self.groups_per_epoch * (_EPOCHS if self.shuffle else 1)

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, place = divmod(index, self.groups_per_epoch)
        subject, chosen, real = self._epoch(epoch)[place]
        rows = [self._source[i] for i in chosen]
        weight = np.zeros(self.views, np.float32)
        weight[:real] = 1
        record = {name: np.stack([row[name] for row in rows]) for name in ("image", "viewmats", "Ks")}
        record |= {name: np.array([row[name] for row in rows], np.int32) for name in ("timestep", "camera")}
        # The identity is the canonical mesh's.
        timed = [name for name in rows[0]["flame"] if name not in ("shape", "static_offset")]
        record["flame"] = {name: np.stack([row["flame"][name] for row in rows]) for name in timed}
        return record | self._cloud(subject) | {"weight": weight}

    def empty(self) -> dict[str, Any]:
        record = self[0]
        return record | {"subject": np.int32(-1), "weight": np.zeros(self.views, np.float32)}

    def fingerprint(self) -> dict[str, Any]:
        # The order's seed is the source's, as the shuffling is.
        return {**self._source.fingerprint(), "views": self.views, "max_points": self.max_points, "order": self.seed}

    def _order(self, epoch: int) -> list[tuple[int, np.ndarray, int]]:
        """(subject, K views, how many of them count) of every record of one pass."""
        records = []
        for subject, kept in enumerate(self._kept):
            if self.shuffle:
                kept = np.random.default_rng([self.seed, epoch, subject]).permutation(kept)
            for first in range(0, len(kept), self.views):
                group = kept[first : first + self.views]
                # A short group is filled with views of the beginning; in training they count: all steps weigh alike.
                real = self.views if self.shuffle else len(group)
                records.append((subject, np.resize(np.concatenate([group, kept]), self.views), real))
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(records))
            records = [records[i] for i in order]
        return records

    def _cloud(self, subject: int) -> dict[str, Any]:
        with self._lock:
            if subject in self._cache:
                self._cache.move_to_end(subject)
                return self._cache[subject]
        name = self.subjects[subject]
        found = self._clouds.load(name)
        more = self.max_points - found.num_points
        cloud = {
            "subject": np.int32(subject),
            "num_points": np.int32(found.num_points),
            # Padding repeats a point: zeros could lie where nothing should be bound.
            "points": np.pad(found.points, [(0, more), (0, 0)], mode="edge"),
            "binding": np.pad(found.binding, (0, more), mode="edge"),
            "canonical": self._canonical[subject],
        }
        if self.features:
            cloud["hidden"] = np.pad(found.hidden, [(0, more), (0, 0), (0, 0)])
        if self._contexts is not None:
            cloud["context"] = np.asarray(self._contexts[name], np.float32)
        size = sum(cloud[name].nbytes for name in ("points", "binding", "hidden") if name in cloud)
        with self._lock:
            if subject not in self._cache:
                self._cache[subject] = cloud
                self._cached += size
                while self._cached > self._cache_bytes and len(self._cache) > 1:
                    old = self._cache.popitem(last=False)[1]
                    self._cached -= sum(old[n].nbytes for n in ("points", "binding", "hidden") if n in old)
        return cloud


def subject_batches(source: SubjectViews, batch_size: int, **how: Any) -> Batches:
    """Batches of `source`: without end if it shuffles, else one pass. `how`: see `streams.Batches`."""
    return Batches(source, batch_size, shuffle=False, num_epochs=None if source.shuffle else 1, **how)
