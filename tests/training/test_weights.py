"""Weights as one file: there and back, through `load_params`, and damage."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from pointillist_jax.files import FileFormatError, UserError, write_npz
from pointillist_jax.training.checkpoints import load_params, newest_step
from pointillist_jax.training.weights import load_weights, save_weights

META = {"config": {"model": {"width": 4}}, "seed": 0}


@pytest.fixture
def params(rng):
    return {
        "a": {"kernel": rng.normal(size=(3, 4)).astype(np.float32), "bias": np.zeros(4, np.float32)},
        "b": {"c": {"scale": np.ones(1, np.float32)}},
    }


def test_there_and_back_in_half_precision(tmp_path, params):
    save_weights(tmp_path / "w.npz", params, META, 7)
    found, meta, step = load_weights(tmp_path / "w.npz")
    assert (meta, step) == (META, 7)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.float32(np.float16(a)), b), params, found)
    assert jax.tree.leaves(found)[0].dtype == np.float32
    # Rounded once, they stay as they are; and the same parameters give the same bytes.
    save_weights(tmp_path / "again.npz", found, META, 7)
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "w.npz").read_bytes()


def test_load_params_reads_them_as_a_run(tmp_path, params):
    save_weights(tmp_path / "w.npz", params, META, 7)
    found, meta = load_params(tmp_path / "w.npz")
    assert meta == META
    assert newest_step(tmp_path / "w.npz") == 7
    assert sorted(found) == ["a", "b"]
    load_params(tmp_path / "w.npz", 7)
    with pytest.raises(FileNotFoundError, match="holds step 7, not 8"):
        load_params(tmp_path / "w.npz", 8)


def test_what_half_precision_cannot_hold_is_refused(tmp_path, params):
    params["a"]["bias"][1] = 1e6
    with pytest.raises(UserError, match=r"a\.bias has values beyond 65504"):
        save_weights(tmp_path / "w.npz", params, META, 0)
    with pytest.raises(UserError, match=r"written as \.npz"):
        save_weights(tmp_path / "w.bin", params, META, 0)
    with pytest.raises(UserError, match=r"named .x\.y."):
        save_weights(tmp_path / "w.npz", {"x.y": np.zeros(1)}, META, 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"step": -1},
        {"step": "1"},
        {"meta": []},
        {"shapes": {"a": [9, 9]}},
        {"shapes": {"missing": [1]}},
        {"shapes": {"a": ["x"]}},
        {"shapes": {"a": [2], "a.b": [2]}},
        {"shapes": {"a.b": [2], "a": [2]}},
        {"shapes": 3},
    ],
)
def test_damage_is_one_sentence(tmp_path, change):
    card = {"format": "pointillist_jax weights", "step": 1, "meta": {}, "shapes": {"a": [2]}} | change
    arrays = {"a": np.zeros(2, np.float16), "a.b": np.zeros(2, np.float16)}
    write_npz(tmp_path / "w.npz", {"card": np.array([json.dumps(card)]), **arrays})
    with pytest.raises(FileFormatError, match=r"w\.npz"):
        load_weights(tmp_path / "w.npz")


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_params(tmp_path / "w.npz")
    (tmp_path / "w.npz").write_bytes(b"hello")
    with pytest.raises(FileFormatError, match=r"cannot be read as \.npz"):
        load_params(tmp_path / "w.npz")
    write_npz(tmp_path / "v.npz", {"card": np.array(["{"])})
    with pytest.raises(FileFormatError, match="copy it again"):
        load_weights(tmp_path / "v.npz")
