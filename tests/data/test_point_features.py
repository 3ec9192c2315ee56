"""Point features: round trip, what is refused, unfinished and mixed folders."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from pointillist_jax.data.point_features import (
    FeatureSet,
    FeatureSpec,
    PointFeatures,
    load_point_features,
    save_point_features,
    write_feature_meta,
)
from pointillist_jax.files import FileFormatError, UserError, write_npz
from tests.data.stores import SPEC, TOKENIZER

FEATURES = FeatureSpec(SPEC, width=6, source="sampled", checkpoint={"step": 3}, sampling={"temperature": 0.9})


def random_features(rng, points: int = 9, width: int = 6) -> PointFeatures:
    t = TOKENIZER
    tokens = t.encode(rng.uniform(t.lower, t.upper, (points, 3)), rng.integers(0, t.num_faces, points))
    xyz, binding = t.decode(tokens)
    hidden = rng.normal(size=(points, 4, width)).astype(np.float32)
    return PointFeatures(tokens, np.asarray(xyz, np.float32), np.asarray(binding), hidden)


def test_round_trip(tmp_path, rng):
    features = random_features(rng)
    write_feature_meta(tmp_path, FEATURES, ["ann", "bob"])
    save_point_features(tmp_path / "ann.npz", features)
    with pytest.raises(UserError, match=r"unfinished .1 of 2"):
        FeatureSet(tmp_path)
    assert FeatureSet(tmp_path, partial=True).subjects == ("ann",)
    save_point_features(tmp_path / "bob.npz", random_features(rng, 0))

    found = FeatureSet(tmp_path, flame_sha256=SPEC.flame_sha256)
    assert found.subjects == ("ann", "bob")
    assert found.spec == FEATURES
    assert found.tokenizer == TOKENIZER
    back = found.load("ann")
    for name in ("tokens", "points", "binding"):
        np.testing.assert_array_equal(getattr(back, name), getattr(features, name))
    np.testing.assert_array_equal(back.hidden, features.hidden.astype(np.float16))
    assert found.load("bob").num_points == 0
    with pytest.raises(UserError, match=r"no features of 'cyd'; it has 2 subjects: ann, bob\."):
        found.load("cyd")


def test_another_job_does_not_mix_in(tmp_path):
    write_feature_meta(tmp_path, FEATURES, ["ann"])
    write_feature_meta(tmp_path, FEATURES, ["ann", "bob"])  # The same job with more people goes on.
    for change, message in (
        ({"source": "teacher_forced"}, "source sampled, not teacher_forced"),
        ({"checkpoint": {"step": 4}}, r"checkpoint .*3.*not .*4"),
        ({"store": dataclasses.replace(SPEC, canonical_jaw=0.0)}, "canonical_jaw 0.3, not 0.0"),
    ):
        with pytest.raises(UserError, match=message):
            write_feature_meta(tmp_path, dataclasses.replace(FEATURES, **change), ["ann"])
    with pytest.raises(UserError, match="made with the head 'random'"):
        FeatureSet(tmp_path, flame_sha256="00", partial=True)
    with pytest.raises(UserError, match="no slashes"):
        write_feature_meta(tmp_path / "new", FEATURES, ["../ann"])


def test_what_does_not_belong_together_is_not_written(tmp_path, rng):
    features = random_features(rng)
    for change, message in (
        ({"tokens": features.tokens[:-4]}, "4P"),
        ({"binding": features.binding[1:]}, "4P"),
        ({"hidden": features.hidden[:, :3]}, "4P"),
        ({"hidden": features.hidden * np.nan}, "NaN"),
        ({"hidden": features.hidden * 1e6}, "float16"),
        ({"points": features.points * np.inf}, "infinite"),
    ):
        with pytest.raises(UserError, match=message):
            save_point_features(tmp_path / "ann.npz", dataclasses.replace(features, **change))
    assert not list(tmp_path.iterdir())


def test_damaged_and_hostile_files(tmp_path, rng):
    features = random_features(rng)
    path = tmp_path / "ann.npz"
    arrays = {"tokens": features.tokens, "points": features.points, "binding": features.binding}
    arrays["hidden"] = features.hidden.astype(np.float16)
    nan = features.hidden.copy()
    nan[2, 1, 3] = np.nan
    for change, message in (
        ({"hidden": nan}, "hidden holds 1 NaN"),
        ({"hidden": arrays["hidden"][:4]}, "hidden has shape"),
        ({"tokens": features.tokens[:-4]}, "do not belong to 9 points"),
        ({"binding": features.binding - 100}, "binding has values"),
        ({"points": features.points * 1e6}, "points has values"),
    ):
        write_npz(path, arrays | change)
        with pytest.raises(FileFormatError, match=message):
            load_point_features(path)
    write_npz(path, arrays)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(FileFormatError, match=r"cannot be read as \.npz"):
        load_point_features(path)

    write_feature_meta(tmp_path, FEATURES, ["ann"])
    write_npz(path, arrays | {"binding": features.binding + TOKENIZER.num_faces})
    with pytest.raises(FileFormatError, match="outside the head's 50 faces"):
        FeatureSet(tmp_path).load("ann")
    write_npz(path, arrays | {"hidden": np.zeros((9, 4, 5), np.float16)})
    with pytest.raises(FileFormatError, match=r"5 wide, meta\.json says 6"):
        FeatureSet(tmp_path).load("ann")
    good = json.loads((tmp_path / "meta.json").read_text())
    for change, message in (
        ({"format": "other"}, "format 'other'"),
        ({"subjects": ["../../etc"]}, "damaged"),
        ({"subjects": ["ann", "ann"]}, "damaged"),
        ({"width": "6"}, "damaged"),
        ({"checkpoint": 3}, "damaged"),
        ({"tokenizer": {}}, "damaged"),
    ):
        (tmp_path / "meta.json").write_text(json.dumps(good | change))
        with pytest.raises(FileFormatError, match=message):
            FeatureSet(tmp_path)
    with pytest.raises(FileNotFoundError, match="extract_features"):
        FeatureSet(tmp_path / "nothing")
