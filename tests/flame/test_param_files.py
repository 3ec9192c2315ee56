"""FLAME parameter files: both layouts, round trips, and what is refused by name."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from pointillist_jax.files import FileFormatError, write_npz
from pointillist_jax.flame import FlameParams, open_head
from pointillist_jax.flame.param_files import load_flame_params, save_flame_params
from tests.conftest import random_params


def one_identity(rng, model, num: int) -> FlameParams:
    params = random_params(rng, model, (num,))
    return params.replace(shape=params.shape[0], static_offset=params.static_offset[0])


def as_arrays(params: FlameParams) -> dict[str, np.ndarray]:
    return {key: np.asarray(value) for key, value in vars(params).items()}


@pytest.mark.parametrize("num", [1, 4])
def test_round_trip_is_exact(rng, flame_model, tmp_path, num):
    params = one_identity(rng, flame_model, num)
    save_flame_params(tmp_path / "p.npz", params, flame_model, dynamic_offset=True)
    loaded = load_flame_params(tmp_path / "p.npz", flame_model)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    with np.load(tmp_path / "p.npz") as file:
        assert {key: file[key].shape for key in file.files} == {
            "shape": (300,), "expr": (num, 100), "rotation": (num, 3), "neck_pose": (num, 3), "jaw_pose": (num, 3),
            "eyes_pose": (num, 6), "translation": (num, 3), "static_offset": (1, 5143, 3),
            "dynamic_offset": (num, 5143, 3),
        }  # fmt: skip


def test_one_pose_without_a_time_axis_is_one_timestep(rng, flame_model, tmp_path):
    params = random_params(rng, flame_model).replace(static_offset=None)
    save_flame_params(tmp_path / "p.npz", params, flame_model)
    loaded = load_flame_params(tmp_path / "p.npz", flame_model)
    assert loaded.static_offset is None
    assert loaded.expr.shape == (1, 100)
    np.testing.assert_array_equal(loaded.jaw_pose[0], params.jaw_pose)


def test_a_capture_file_with_leading_axes_and_the_small_offset(rng, flame_model, tmp_path):
    arrays = as_arrays(one_identity(rng, flame_model, 1))
    expected = arrays["static_offset"].copy()
    expected[5023:] = 0
    arrays |= {"shape": arrays["shape"][None], "static_offset": arrays["static_offset"][None, :5023]}
    write_npz(tmp_path / "p.npz", arrays)
    loaded = load_flame_params(tmp_path / "p.npz", flame_model)
    np.testing.assert_array_equal(loaded.shape, arrays["shape"][0])
    np.testing.assert_array_equal(loaded.static_offset, expected)


def test_fewer_coefficients_are_padded_and_more_need_to_be_zero(rng, flame_model, tmp_path):
    arrays = as_arrays(one_identity(rng, flame_model, 2))
    short = arrays | {"shape": arrays["shape"][:50], "expr": arrays["expr"][:, :10]}
    write_npz(tmp_path / "short.npz", short)
    loaded = load_flame_params(tmp_path / "short.npz", flame_model)
    np.testing.assert_array_equal(loaded.shape[:50], short["shape"])
    assert not np.any(loaded.shape[50:])
    assert not np.any(loaded.expr[:, 10:])
    write_npz(tmp_path / "zeros.npz", arrays | {"shape": np.pad(arrays["shape"], (0, 7))})
    np.testing.assert_array_equal(load_flame_params(tmp_path / "zeros.npz", flame_model).shape, arrays["shape"])
    write_npz(tmp_path / "long.npz", arrays | {"shape": np.pad(arrays["shape"], (0, 7), constant_values=1)})
    with pytest.raises(FileFormatError, match=r"shape uses 307 coefficients.*has 300"):
        load_flame_params(tmp_path / "long.npz", flame_model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expr": None}, "expr is missing"),
        ({"jaw_pose": np.full((3, 3), np.nan, np.float32)}, "jaw_pose holds 9 NaN"),
        ({"neck_pose": np.zeros((3, 4), np.float32)}, r"neck_pose has shape \(3, 4\), expected \(\.\.\., 3\)"),
        ({"rotation": np.zeros((2, 3), np.float32)}, "rotation has 2 timesteps, other arrays 3"),
        ({"shape": np.eye(3, 300, dtype=np.float32)}, "shape differs between timesteps"),
        ({"static_offset": np.ones((1, 77, 3), np.float32)}, "static_offset is for 77 vertices"),
        ({"static_offset": np.float32(1)}, r"static_offset has shape \(1,\)"),
        ({"translation": np.full((3, 3), 1e5, np.float32)}, "translation has values in"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(rng, flame_model, tmp_path, change, message):
    arrays = as_arrays(one_identity(rng, flame_model, 3)) | change
    write_npz(tmp_path / "p.npz", {key: value for key, value in arrays.items() if value is not None})
    with pytest.raises(FileFormatError, match=message):
        load_flame_params(tmp_path / "p.npz", flame_model)


@pytest.mark.parametrize("keys", [("expr", "rotation", "neck_pose", "jaw_pose", "eyes_pose", "translation"),
                                  ("shape",), ("jaw_pose",), ("static_offset",)])  # fmt: skip
def test_no_timesteps_are_refused(rng, flame_model, tmp_path, keys):
    arrays = as_arrays(one_identity(rng, flame_model, 1))
    axes = {"shape": 1, "static_offset": 2}
    empty = {key: np.zeros((0, *arrays[key].shape[-axes.get(key, 1) :]), np.float32) for key in keys}
    write_npz(tmp_path / "p.npz", arrays | empty)
    with pytest.raises(FileFormatError, match=rf"{keys[0]} has shape \(0, .*at least one timestep"):
        load_flame_params(tmp_path / "p.npz", flame_model)


def test_zeros_for_another_head_are_refused(tmp_path):
    coarse, full = open_head("coarse"), open_head("full")
    path = tmp_path / "flame_param.npz"
    save_flame_params(path, coarse.neutral_params(), coarse)
    assert load_flame_params(path, coarse).static_offset is None
    with pytest.raises(FileFormatError, match="static_offset is for 1281 vertices"):
        load_flame_params(path, full)


def test_a_small_file_that_unpacks_to_gigabytes_is_refused_unread(rng, flame_model, tmp_path):
    arrays = as_arrays(one_identity(rng, flame_model, 1))
    write_npz(tmp_path / "p.npz", arrays | {"expr": np.zeros((200_000, 100), np.float32)})
    assert (tmp_path / "p.npz").stat().st_size < 1 << 20
    with pytest.raises(FileFormatError, match="unpacks to more than 64 MiB"):
        load_flame_params(tmp_path / "p.npz", flame_model)
