"""Point features on disk: a subject's points and the AR model's hidden states at their tokens (DESIGN §7).

`experiments.extract_features` writes them once, stage two reads them. Layout:

    <folder>/meta.json        what they were made with, and of whom
    <folder>/<subject>.npz    tokens, points, binding, hidden
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from pointillist_jax.data.token_store import META, StoreSpec, read_spec, spec_difference
from pointillist_jax.files import (
    ArraySpec,
    FileFormatError,
    UserError,
    atomic_path,
    read_json,
    read_npz,
    require_file,
    write_npz,
)
from pointillist_jax.tokens import PointTokenizer

FORMAT, VERSION = "pointillist-features", 1
SOURCES = ("sampled", "teacher_forced")
_NAME = re.compile(r"[^/\\\0.][^/\\\0]{0,199}")


@dataclasses.dataclass(frozen=True)
class PointFeatures:
    """One subject. All NumPy.

    Attributes:
      tokens: [4P + 8], S S S S … E E E E, of which the rest follows.
      points: [P, 3] metres, centres of the tokens' cells, in the canonical space of the identity.
      binding: [P] face of each point.
      hidden: [P, 4, D] final hidden state at each point's x, y, z and b token (after the last norm).
    """

    tokens: Int[np.ndarray, "T"]
    points: Float[np.ndarray, "P 3"]
    binding: Int[np.ndarray, "P"]
    hidden: Float[np.ndarray, "P 4 D"]

    @property
    def num_points(self) -> int:
        return len(self.points)


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """What all subjects of a folder have in common.

    Attributes:
      store: tokenizer, head and canonical pose, as the token store has them.
      width: D of the hidden states.
      source: "sampled" (paper: tokens that the AR model drew) or "teacher_forced" (the fits' own).
      checkpoint: which AR parameters: {"workdir": …, "step": …} or whatever identifies them; JSON.
      sampling: temperature and so on, for `source="sampled"`; JSON.
      held_out: people of the store that the AR model was not trained on: stage two keeps the same ones back.
    """

    store: StoreSpec
    width: int
    source: str
    checkpoint: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    held_out: tuple[str, ...] = ()

    def __post_init__(self):
        if self.source not in SOURCES or type(self.width) is not int or not 0 < self.width <= 1 << 16:
            raise UserError(f"source={self.source!r} must be one of {SOURCES} and width={self.width!r} a positive int.")

    def to_json(self) -> dict[str, Any]:
        rest = {name: getattr(self, name) for name in ("width", "source")}
        rest |= {"checkpoint": dict(self.checkpoint), "sampling": dict(self.sampling), "held_out": list(self.held_out)}
        return {**self.store.to_json(), **rest}


def save_point_features(path: str | os.PathLike, features: PointFeatures) -> None:
    """Writes one subject's `.npz`, atomically; hidden states as float16.

    Raises:
      UserError: arrays that do not belong together, or that are not finite.
    """
    num = len(features.points)
    shapes = (np.shape(features.tokens), np.shape(features.points), np.shape(features.binding))
    if shapes != ((4 * num + 8,), (num, 3), (num,)) or np.shape(features.hidden)[:2] != (num, 4):
        raise UserError(
            f"tokens {shapes[0]}, points {shapes[1]}, binding {shapes[2]} and hidden {np.shape(features.hidden)} must "
            "be [4P + 8], [P, 3], [P] and [P, 4, D]; nothing was written."
        )
    # Norms bound hidden states to a few dozen; half precision holds 65,504.
    with np.errstate(over="ignore"):
        hidden = np.asarray(features.hidden).astype(np.float16)
    if not (np.isfinite(hidden).all() and np.isfinite(features.points).all()):
        raise UserError("points or hidden states are NaN, infinite or beyond float16; nothing was written.")
    write_npz(
        path,
        {
            "tokens": np.asarray(features.tokens, np.int32),
            "points": np.asarray(features.points, np.float32),
            "binding": np.asarray(features.binding, np.int32),
            "hidden": hidden,
        },
    )


def load_point_features(path: str | os.PathLike) -> PointFeatures:
    """Reads one subject's features. Untrusted.

    Raises:
      FileNotFoundError: no such file.
      FileFormatError: names file, key, expected and found.
    """
    specs = {
        "points": ArraySpec(("P", 3), low=-1e3, high=1e3),
        "binding": ArraySpec(("P",), "int", low=0, high=(1 << 31) - 1),
        "tokens": ArraySpec(("T",), "int", low=0, high=(1 << 31) - 1),
        "hidden": ArraySpec(("P", 4, "D")),
    }
    arrays = read_npz(path, specs, "a subject's point features")
    if len(arrays["tokens"]) != 4 * len(arrays["points"]) + 8:
        raise FileFormatError(
            f"{path}: {len(arrays['tokens'])} tokens do not belong to {len(arrays['points'])} points (4 each, and 8); "
            "extract the features again."
        )
    return PointFeatures(
        tokens=arrays["tokens"].astype(np.int32),
        points=arrays["points"].astype(np.float32),
        binding=arrays["binding"].astype(np.int32),
        hidden=arrays["hidden"].astype(np.float16),
    )


def write_feature_meta(folder: str | os.PathLike, spec: FeatureSpec, subjects: Sequence[str]) -> None:
    """Writes `meta.json`, atomically; before the first subject, so that a killed job can be told from a whole one.

    Args:
      subjects: all that will be there when the job is done.

    Raises:
      UserError: the folder has another spec (the sentence names the difference), or a name no file can have.
    """
    folder = Path(folder)
    if bad := [name for name in subjects if not _NAME.fullmatch(name)]:
        raise UserError(f"{bad[0]!r} cannot be a subject's name: no slashes, no leading dot, 1 to 200 letters.")
    if (folder / META).exists() and (difference := features_difference(FeatureSet(folder, partial=True).spec, spec)):
        raise UserError(f"{folder} was made with {difference}: extract into another folder, or give --overwrite.")
    content = {"format": FORMAT, "version": VERSION, **spec.to_json(), "subjects": list(subjects)}
    with atomic_path(folder / META) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


class FeatureSet:
    """A folder of point features, open for reading. Picklable; nothing is kept in memory.

    Attributes:
      path: the folder.
      spec: what all of them were made with.
      subjects: names, in the order of the extraction; with `partial`, those that are there.
    """

    def __init__(self, path: str | os.PathLike, *, flame_sha256: str | None = None, partial: bool = False):
        """Opens the folder.

        Args:
          path: untrusted.
          flame_sha256: of the head the caller works with; None accepts any.
          partial: accept a folder whose extraction was interrupted.

        Raises:
          FileNotFoundError: no features there.
          FileFormatError: damaged.
          UserError: made with another head, or unfinished.
        """
        self.path = Path(path)
        require_file(self.path / META, "point features (python -m experiments.extract_features makes them)")
        meta = read_json(self.path / META, "the meta.json of point features")
        if (meta.get("format"), meta.get("version")) != (FORMAT, VERSION):
            raise FileFormatError(
                f"{self.path / META}: format {meta.get('format')!r} version {meta.get('version')!r}, expected "
                f"{FORMAT!r} version {VERSION}: is this a folder that experiments.extract_features wrote?"
            )
        store = read_spec(self.path, meta)
        names, held_out = (meta.get(key) for key in ("subjects", "held_out"))
        checkpoint, sampling = (meta.get(key) for key in ("checkpoint", "sampling"))
        lists = all(isinstance(x, list) and all(isinstance(n, str) for n in x) for x in (names, held_out))
        if not (lists and isinstance(checkpoint, dict) and isinstance(sampling, dict)):
            raise FileFormatError(f"{self.path / META} is damaged (subjects, checkpoint or sampling); extract again.")
        try:
            self.spec = FeatureSpec(store, meta.get("width"), meta.get("source"), checkpoint, sampling, tuple(held_out))
        except UserError as error:
            raise FileFormatError(f"{self.path / META} is damaged ({error}); extract again.") from None
        if len(set(names)) != len(names) or not all(_NAME.fullmatch(n) for n in names):
            raise FileFormatError(f"{self.path / META} is damaged (its subjects); extract again.")
        there = [name for name in names if self.file(name).is_file()]
        if len(there) < len(names) and not partial:
            raise UserError(
                f"{self.path} is unfinished ({len(there)} of {len(names)} subjects): finish it with "
                "`python -m experiments.extract_features … --resume`."
            )
        self.subjects = tuple(there)
        if flame_sha256 is not None and flame_sha256 != store.flame_sha256:
            raise UserError(
                f"{self.path} was made with the head {store.flame_source!r} (sha256 {store.flame_sha256[:12]}), not "
                f"with this one (sha256 {flame_sha256[:12]}): extract again, or use that head."
            )

    def __len__(self) -> int:
        return len(self.subjects)

    @property
    def tokenizer(self) -> PointTokenizer:
        return self.spec.store.tokenizer

    def file(self, name: str) -> Path:
        """Where the named subject lies, or will lie."""
        return self.path / f"{name}.npz"

    def load(self, name: str) -> PointFeatures:
        """The named subject's features, checked against the spec.

        Raises:
          UserError: no such subject.
          FileFormatError: damaged, or of another width or head.
        """
        if name not in self.subjects:
            near = ", ".join(self.subjects[:5]) + (" …" if len(self) > 5 else "")
            raise UserError(f"{self.path} holds no features of {name!r}; it has {len(self)} subjects: {near}.")
        features, faces = load_point_features(self.file(name)), self.tokenizer.num_faces
        if features.hidden.shape[-1] != self.spec.width:
            raise FileFormatError(
                f"{self.file(name)}: hidden states are {features.hidden.shape[-1]} wide, {META} says "
                f"{self.spec.width}; extract again."
            )
        if features.num_points and features.binding.max() >= faces:
            raise FileFormatError(
                f"{self.file(name)}: binding {features.binding.max()} lies outside the head's {faces} faces."
            )
        return features


def features_difference(have: FeatureSpec, want: FeatureSpec) -> str | None:
    """How two specs differ, as "<name> <have>, not <want>", or None."""
    if difference := spec_difference(have.store, want.store):
        return difference
    for name in ("width", "source", "checkpoint", "sampling"):
        old, new = getattr(have, name), json.loads(json.dumps(getattr(want, name)))
        if old != new:
            return f"{name} {old}, not {new}"
    return None
