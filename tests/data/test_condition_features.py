"""Stored features of frozen encoders: what is written is what windows carry, and what does not belong is refused."""

from __future__ import annotations

import dataclasses
import json
import pickle

import numpy as np
import pytest

from pointillist_jax.data.condition_features import FeatureSpec, create_features, open_features
from pointillist_jax.data.windows import window_batches
from pointillist_jax.files import FileFormatError, UserError
from tests.data.stores import write_store

SHAPES = {"image": (3, 4), "points": (2, 5)}
SPEC = FeatureSpec("eye-28_hand-10", SHAPES, {"image": "ab" * 32, "points": "cd" * 32})


def random_features(rng) -> dict[str, np.ndarray]:
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def store(rng, tmp_path):
    return write_store(tmp_path / "store", rng, [20, 9, 14])[0]


@pytest.fixture
def written(rng, store):
    features = create_features(store, SPEC, resume=False, overwrite=False)
    arrays = [random_features(rng) for _ in range(len(store))]
    for i, each in enumerate(arrays):
        features.write(i, each)
    return arrays


def test_windows_carry_what_was_written(store, written):
    features = open_features(store, SPEC.kind, SHAPES)
    assert features.spec == SPEC
    names = ("person_0002", "person_0000")
    for exchange in (False, True):
        how = {"window": 12, "batch_size": 5, "num_epochs": 1, "subjects": names, "exchange_conditions": exchange}
        seen = set()
        for batch in window_batches(store, features=features, condition=("flame",), **how):
            assert set(batch["condition"]) == {"features", "flame"}
            for row, subject in enumerate(batch["subject"].tolist()):
                seen.add(subject)
                giver = {0: 2, 2: 0, -1: -1}[subject] if exchange else subject
                for name, stored in batch["condition"]["features"].items():
                    assert stored.dtype == np.float16
                    expected = 0 if giver < 0 else written[giver][name].astype(np.float16)
                    np.testing.assert_array_equal(stored[row], expected)
                flame = batch["condition"]["flame"]["expr"][row]
                np.testing.assert_array_equal(flame, 0 if giver < 0 else store.condition(giver)["flame"]["expr"])
        assert seen == {0, 2, -1}
    again = pickle.loads(pickle.dumps(features))
    np.testing.assert_array_equal(again[1]["image"], features[1]["image"])


def test_a_stream_belongs_to_its_features(store, written):
    how = {"window": 12, "batch_size": 2}
    state = iter(window_batches(store, features=open_features(store, SPEC.kind, SHAPES), **how)).get_state()
    with pytest.raises(UserError, match="saved with features="):
        iter(window_batches(store, **how)).set_state(state)


def test_missing_features_name_the_command(rng, store, written):
    with pytest.raises(UserError, match=r"holds no features other-1_hand-10.*experiments\.encode_conditions"):
        open_features(store, "other-1_hand-10", SHAPES)
    store.features_path(SPEC.kind, 1).unlink()
    features = open_features(store, SPEC.kind, SHAPES)
    with pytest.raises(UserError, match=r"1 of 3 subjects have no features .*'person_0001'.*--resume"):
        window_batches(store, window=8, batch_size=1, features=features)
    window_batches(store, window=8, batch_size=1, features=features, subjects=["person_0000"])


def test_what_is_there_is_kept_resumed_or_replaced(store, written):
    with pytest.raises(UserError, match=r"--resume.*--overwrite"):
        create_features(store, SPEC, resume=False, overwrite=False)
    for change, said in (
        ({"weights": SPEC.weights | {"image": "ef" * 32}}, "other weights"),
        ({"dtype": "float32"}, "dtype"),
    ):
        with pytest.raises(UserError, match=said):
            create_features(store, dataclasses.replace(SPEC, **change), resume=True, overwrite=False)
    assert open_features(store, SPEC.kind, SHAPES, SPEC.weights).spec == SPEC
    with pytest.raises(UserError, match=r"other weights .* than the model was trained with"):
        open_features(store, SPEC.kind, SHAPES, SPEC.weights | {"points": "random-0"})
    leftover = store.features_path(SPEC.kind, 0).parent / ".person_0000.tmp-abc.npz"
    leftover.write_bytes(b"half")
    assert create_features(store, SPEC, resume=True, overwrite=False).has(2)
    assert not leftover.exists()
    other = dataclasses.replace(SPEC, dtype="float32")
    assert not create_features(store, other, resume=False, overwrite=True).has(2)
    assert open_features(store, SPEC.kind, SHAPES).spec == other


def test_what_is_not_finite_is_not_stored(rng, store):
    features = create_features(store, SPEC, resume=False, overwrite=False)
    good = random_features(rng)
    for value, said in ((np.nan, "'person_0001' hold NaN"), (1e5, "beyond float16: use float32")):
        with pytest.raises(UserError, match=said):
            features.write(1, good | {"points": np.full(SHAPES["points"], value)})
    assert not features.has(1)


@pytest.mark.parametrize(
    "change",
    [{"kind": "x"}, {"version": 9}, {"shapes": {"image": [3]}}, {"dtype": "object"}, {"weights": {"image": 1}},
     {"shapes": {"image": [-3, 4], "points": [2, 5]}}, {"shapes": {"image": [3, 4], "points": [2, 6]}}],
)  # fmt: skip
def test_damaged_meta_is_refused(store, written, change):
    path = store.features_path(SPEC.kind, 0).parent / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FileFormatError, match=r"meta\.json .*--overwrite"):
        open_features(store, SPEC.kind, SHAPES)


def test_damaged_files_are_refused(store, written):
    path = store.features_path(SPEC.kind, 0)
    whole = path.read_bytes()
    for data in (whole[:-30], whole[: len(whole) // 2], b""):
        path.write_bytes(data)
        with pytest.raises(FileFormatError, match=r"person_0000\.npz"):
            open_features(store, SPEC.kind, SHAPES)[0]
    np.savez(path, image=np.full((3, 4), np.nan, np.float16), points=np.zeros((2, 5), np.float16))
    with pytest.raises(FileFormatError, match="NaN"):
        open_features(store, SPEC.kind, SHAPES)[0]
