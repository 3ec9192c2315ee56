"""Features of frozen encoders: computed once per subject, kept in the token store (DESIGN §6).

    <store>/features/<kind>/meta.json        the encoders, the weights they had, the precision
    <store>/features/<kind>/<subject>.npz    image [1 + T, Di], points [Q, Dp]

Letters: T image patches, Q point queries, Di and Dp widths of the two encoders.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pointillist_jax.configs import EncoderConfig
from pointillist_jax.data.byte_cache import ByteCache
from pointillist_jax.data.token_store import META, TokenStore
from pointillist_jax.files import ArraySpec, FileFormatError, UserError, atomic_path, read_json, read_npz, write_npz

FORMAT, VERSION = "pointillist-condition-features", 1
DTYPES = ("float16", "float32")
COMMAND = "python -m experiments.encode_conditions"

Shapes = Mapping[str, tuple[int, ...]]


def feature_kind(config: EncoderConfig) -> str:
    """The name of these encoders' features, e.g. "vitl14_reg-518_michelangelo-4096"."""
    return f"{config.image}-{config.image_size}_{config.points}-{config.num_points}"


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """What all features of one kind in a store have in common.

    Attributes:
      kind: `feature_kind`.
      shapes: {"image": (1 + T, Di), "points": (Q, Dp)} (`models.condition.feature_shapes`).
      weights: {"image": …, "points": …}: what the encoders' parameters were (`FrozenEncoders.weights`).
      dtype: of the stored arrays, "float16" or "float32".
    """

    kind: str
    shapes: Shapes
    weights: Mapping[str, str]
    dtype: str = "float16"

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "weights": dict(self.weights),
            "dtype": self.dtype,
        }


class ConditionFeatures:
    """The features of one kind in a store. Picklable; safe between threads.

    Attributes:
      store: of the subjects.
      spec: what made them.
      folder: where they lie.
    """

    def __init__(self, store: TokenStore, spec: FeatureSpec, cache_bytes: int = 1 << 30):
        """See `open_features` and `create_features`."""
        self.store, self.spec = store, spec
        self.folder = store.features_path(spec.kind, 0).parent
        self._cache = ByteCache(cache_bytes)

    def has(self, i: int) -> bool:
        """Whether subject i's features are there."""
        return self.store.features_path(self.spec.kind, i).is_file()

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """Subject i's {"image": [1 + T, Di], "points": [Q, Dp]}, read-only, in the spec's dtype.

        Raises:
          FileNotFoundError, FileFormatError: missing or damaged; NaN.
        """
        return self._cache.get(i, lambda: self._read(i))

    def _read(self, i: int) -> tuple[dict[str, np.ndarray], int]:
        path = self.store.features_path(self.spec.kind, i)
        specs = {name: ArraySpec(tuple(shape)) for name, shape in self.spec.shapes.items()}
        arrays = read_npz(path, specs, "features of a frozen encoder")
        arrays = {name: array.astype(self.spec.dtype, copy=False) for name, array in arrays.items()}
        for array in arrays.values():
            array.flags.writeable = False
        return arrays, sum(array.nbytes for array in arrays.values())

    def write(self, i: int, arrays: Mapping[str, np.ndarray]) -> Path:
        """Stores subject i's features, atomically.

        Raises:
          UserError: NaN, or values beyond the dtype.
        """
        path = self.store.features_path(self.spec.kind, i)
        with np.errstate(over="ignore"):
            stored = {name: np.asarray(arrays[name]).astype(self.spec.dtype) for name in self.spec.shapes}
        for name, array in stored.items():
            assert array.shape == tuple(self.spec.shapes[name]), (array.shape, self.spec.shapes[name])
            if not np.isfinite(array).all():
                finite = np.isfinite(np.asarray(arrays[name])).all()
                cause = f"are beyond {self.spec.dtype}: use float32" if finite else "hold NaN: check the weights"
                raise UserError(f"the {name} features of {self.store.subjects[i]!r} {cause}.")
        write_npz(path, stored)
        return path

    def require(self, subjects: Sequence[str]) -> None:
        """Raises UserError unless all the named subjects have features."""
        if missing := [name for name in subjects if not self.has(self.store.index(name))]:
            raise UserError(
                f"{len(missing)} of {len(subjects)} subjects have no features in {self.folder}, e.g. {missing[0]!r}: "
                f"go on with `{COMMAND} --store={self.store.path} … --resume`."
            )


def open_features(
    store: TokenStore, kind: str, shapes: Shapes, weights: Mapping[str, str] | None = None
) -> ConditionFeatures:
    """The features of this kind that a store holds.

    Args:
      kind: `feature_kind` of the encoders in use.
      shapes: of their outputs (`models.condition.feature_shapes`).
      weights: of the encoders that a model was trained with (`meta["features"]["weights"]`); None takes any.

    Raises:
      UserError: there are none, and the sentence names the command that makes them; or they are of other weights.
      FileFormatError: their meta.json is damaged or says something else.
    """
    spec = _read_spec(store, kind)
    if spec is None:
        raise UserError(
            f"the encoders are frozen and {store.path} holds no features {kind}: compute them with `{COMMAND} "
            f"--store={store.path} --image_weights=… --point_weights=…` and the same --config, or train small encoders "
            "along with --config.model.encoder.frozen=false."
        )
    if (found := {k: tuple(v) for k, v in spec.shapes.items()}) != {k: tuple(v) for k, v in shapes.items()}:
        raise FileFormatError(
            f"{store.features_path(kind, 0).parent / META} says shapes {found}, expected {dict(shapes)}: compute the "
            f"features again with `{COMMAND} … --overwrite`."
        )
    if weights is not None and dict(weights) != spec.weights:
        raise UserError(
            f"the features {kind} of {store.path} are of other weights ({dict(spec.weights)}) than the model was "
            f"trained with ({dict(weights)}): compute them again with `{COMMAND} … --overwrite` and those weights."
        )
    return ConditionFeatures(store, spec)


def create_features(store: TokenStore, spec: FeatureSpec, *, resume: bool, overwrite: bool) -> ConditionFeatures:
    """Features to be written: new ones, or (`resume`) more of those that are there.

    Raises:
      UserError: there are some already and neither flag is given, or they were made by other weights.
    """
    if spec.dtype not in DTYPES:
        raise UserError(f"features are stored as {' or '.join(DTYPES)}, not {spec.dtype}.")
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other; give one.")
    features = ConditionFeatures(store, spec)
    if overwrite:
        shutil.rmtree(features.folder, ignore_errors=True)
    old = _read_spec(store, spec.kind)
    if old is not None and not resume:
        raise UserError(f"{features.folder} holds features already; go on with --resume or replace them: --overwrite.")
    if old is None:
        with atomic_path(features.folder / META) as temporary:
            temporary.write_text(json.dumps({"format": FORMAT, "version": VERSION, **spec.to_json()}, indent=1) + "\n")
    elif old.to_json() != (new := spec.to_json()):
        name = next(name for name, value in old.to_json().items() if value != new[name])
        raise UserError(
            f"{features.folder} holds features of other {name} ({getattr(old, name)}, not {getattr(spec, name)}): use "
            "what they were made with, or replace them with --overwrite."
        )
    for leftover in features.folder.glob(".*.tmp-*"):  # What a killed run was writing.
        leftover.unlink(missing_ok=True)
    return features


def _read_spec(store: TokenStore, kind: str) -> FeatureSpec | None:
    path = store.features_path(kind, 0).parent / META
    if not path.is_file():
        return None
    meta = read_json(path, "meta.json of stored features", max_bytes=1 << 20)
    try:
        if (meta["format"], meta["version"], meta["kind"]) != (FORMAT, VERSION, kind):
            raise ValueError(f"{meta['format']!r} version {meta['version']!r} of {meta['kind']!r}")
        shapes = {name: tuple(meta["shapes"][name]) for name in ("image", "points")}
        weights = {name: meta["weights"][name] for name in ("image", "points")}
        sizes = [n for shape in shapes.values() for n in shape]
        good = all(type(n) is int and 0 < n < 1 << 20 for n in sizes) and all(len(s) == 2 for s in shapes.values())
        if not good or meta["dtype"] not in DTYPES or not all(isinstance(w, str) for w in weights.values()):
            raise ValueError("shapes, weights or dtype")
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(
            f"{path} is damaged ({error!s:.200}): compute the features again with `{COMMAND} … --overwrite`."
        ) from None
    return FeatureSpec(kind, shapes, weights, meta["dtype"])
