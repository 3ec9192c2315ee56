"""The paper's truncated sliding windows over the token store (paper §5.1 after Meshtron; DESIGN §6).

A subject's sequence is x[0 … n), S S S S, points, E E E E, n a multiple of 4. Window w of a subject begins at
s = w · stride and holds

    tokens[t]    = x[s + t]           what the model reads,          t = 0 … T-1
    targets[t]   = x[s + t + 1]       what it predicts there
    positions[t] = s + t              absolute: slot = positions % 4 (x, y, z, b)

so that a window reads T tokens and carries one token more than it reads, as its last target. Windows go on until the
last token has been a target. At stride = T every token but the four given S is therefore a target exactly once, the
first token of a window as the last target of the window before it, with that window as its context. Behind the end
`tokens` and `targets` are P. `mask[t]` says whether targets[t] counts: it is a point's token or an E. S stands only in
a subject's first window and E only at its true end: a crop of the middle holds neither.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from pointillist_jax.data.condition_features import ConditionFeatures
from pointillist_jax.data.streams import Batches, locate, prefix_sums
from pointillist_jax.data.token_store import FLAME_FIELDS, TokenStore
from pointillist_jax.files import UserError

CONDITIONS = ("portrait", "flame")


class WindowSource:
    """Random access to all windows of the chosen subjects. Picklable; NumPy only.

    Record `i` is a dict: `tokens`, `targets`, `positions` [T] int32, `mask` [T] bool, `length` int32 (tokens that are
    not P), `subject` int32 (index in the store), `window` int32, and what `condition` and `features` ask for:
    `condition = {"portrait": [side, side, 3] uint8, "flame": {name: [n] float32}, "features": {"image": [1 + T, Di],
    "points": [Q, Dp]}}`.
    """

    def __init__(
        self,
        store: TokenStore,
        window: int,
        stride: int | None = None,
        *,
        subjects: Sequence[str] | None = None,
        condition: Sequence[str] = (),
        features: ConditionFeatures | None = None,
        exchange_conditions: bool = False,
        new_targets_only: bool = False,
    ):
        """See `window_batches`."""
        stride = window if stride is None else stride
        if window < 4 or window % 4 or stride < 4 or stride % 4 or stride > window:
            raise UserError(
                f"window={window} and stride={stride} must be positive multiples of 4 (a point is four tokens), "
                "and the stride at most the window, or tokens would be left out."
            )
        if unknown := [name for name in condition if name not in CONDITIONS]:
            raise UserError(f"condition {unknown[0]!r} must be one of {', '.join(CONDITIONS)}.")
        names = store.subjects if subjects is None else tuple(subjects)
        if len(set(names)) != len(names):
            raise UserError("subjects names a subject twice.")
        self.store, self.window, self.stride = store, window, stride
        self.indices = np.array([store.index(name) for name in names], np.int64)
        self.condition, self.features, self.new_targets_only = tuple(condition), features, new_targets_only
        givers = np.roll(self.indices, -1) if exchange_conditions else self.indices
        self._givers = dict(zip(self.indices.tolist(), givers.tolist(), strict=True))
        if ("portrait" in condition or features is not None) and not store.has_portrait[self.indices].all():
            bad = [store.subjects[i] for i in self.indices if not store.has_portrait[i]]
            raise UserError(
                f"{len(bad)} of {len(names)} subjects of {store.path} have no portrait, e.g. {bad[0]!r}: tokenise anew "
                "(--overwrite) with --captures, choose others with subjects, or train without the portrait."
            )
        if features is not None:
            features.require(names)
        lengths = store.lengths[self.indices]
        counts = 1 + -(-np.maximum(lengths - window, 0) // stride)
        self.offsets = prefix_sums(counts)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        group, w = locate(self.offsets, index)
        subject = int(self.indices[group])
        x = self.store.tokens(subject)
        t, start = self.window, w * self.stride
        length = min(t, len(x) - start)
        record = self._blank(start, subject, w)
        record["tokens"][:length] = x[start : start + length]
        following = x[start + 1 : start + t + 1]
        record["targets"][: len(following)] = following
        # Before position 3 only S S S S are predicted, and they are given.
        first = max(3 - start, 0)
        if self.new_targets_only and w:
            first = t - self.stride
        record["mask"][first : len(following)] = True
        record["length"] = np.int32(length)
        if condition := self._condition_of(subject):
            record["condition"] = condition
        return record

    def empty(self) -> dict[str, Any]:
        record = self._blank(0, -1, -1)
        if condition := self._condition_of(int(self.indices[0])):
            record["condition"] = _zeros_like(condition)
        return record

    def fingerprint(self) -> dict[str, Any]:
        chosen = [(self.store.subjects[i], int(self.store.lengths[i]), self.store.fit_sha256[i]) for i in self.indices]
        spec = json.dumps([self.store.spec.to_json(), chosen], sort_keys=True).encode()
        return {
            "features": None if self.features is None else json.dumps(self.features.spec.to_json(), sort_keys=True),
            "subjects": len(chosen),
            "window": self.window,
            "stride": self.stride,
            "records": len(self),
            "data": hashlib.sha256(spec).hexdigest()[:16],
        }

    def _blank(self, start: int, subject: int, w: int) -> dict[str, Any]:
        pad = self.store.tokenizer.pad
        return {
            "tokens": np.full(self.window, pad, np.int32),
            "targets": np.full(self.window, pad, np.int32),
            "mask": np.zeros(self.window, bool),
            "positions": np.arange(start, start + self.window, dtype=np.int32),
            "length": np.int32(0),
            "subject": np.int32(subject),
            "window": np.int32(w),
        }

    def _condition_of(self, subject: int) -> dict[str, Any]:
        subject = self._givers[subject]
        chosen: dict[str, Any] = {}
        if self.features is not None:
            chosen["features"] = self.features[subject]
        if not self.condition:
            return chosen
        condition = self.store.condition(subject)
        if "portrait" in self.condition:
            chosen["portrait"] = condition["portrait"]
        if "flame" in self.condition:
            chosen["flame"] = {name: condition["flame"][name] for name in FLAME_FIELDS}
        return chosen


def window_batches(
    store: TokenStore,
    *,
    window: int,
    batch_size: int,
    stride: int | None = None,
    subjects: Sequence[str] | None = None,
    condition: Sequence[str] = (),
    features: ConditionFeatures | None = None,
    exchange_conditions: bool = False,
    new_targets_only: bool = False,
    **how: Any,
) -> Batches:
    """Batches of windows.

    A batch is a dict of NumPy arrays with a leading axis B: `tokens`, `targets`, `positions` [B, T] int32, `mask`
    [B, T] bool, `length`, `subject`, `window` [B] int32 and `condition` as asked.

    Args:
      store: from `open_store`.
      window: T, tokens a window reads; a multiple of 4. Paper: 12,000.
      batch_size: rows over all processes.
      stride: from one window to the next, a multiple of 4; None is the window (no overlap).
      subjects: names to use; None takes all. See `split_subjects`.
      condition: which of `CONDITIONS` every row carries.
      features: of frozen encoders, which every row carries as `condition["features"]`.
      exchange_conditions: every subject carries the condition of the next one: a test of whether it is used.
      new_targets_only: mask out targets that the window before had too, so that an evaluation with overlap scores
        every token once, with more context.
      how: seed, shuffle, num_epochs, process_index, process_count, drop_remainder, num_workers, num_threads, prefetch
        of `streams.Batches`.

    Raises:
      UserError: a window or stride that is no multiple of 4, unknown subjects, subjects without portrait or features.
    """
    source = WindowSource(
        store,
        window,
        stride,
        subjects=subjects,
        condition=condition,
        features=features,
        exchange_conditions=exchange_conditions,
        new_targets_only=new_targets_only,
    )
    return Batches(source, batch_size, **how)


def split_subjects(names: Sequence[str], held_out: int, seed: int = 0) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(training, held-out) subjects, both in the given order. The paper holds out 25 of 419.

    Names are ranked by a hash of seed and name, so the choice depends neither on their order nor on the machine.

    Raises:
      UserError: nobody would be left to train on.
    """
    if not 0 <= held_out < max(len(names), 1):
        raise UserError(f"held_out={held_out} must leave at least one of the {len(names)} subjects for training.")
    ranked = sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    out = set(ranked[:held_out])
    return tuple(n for n in names if n not in out), tuple(n for n in names if n in out)


def _zeros_like(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _zeros_like(value) for key, value in tree.items()}
    return np.zeros_like(tree)
