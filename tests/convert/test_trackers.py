"""Tracker output: every kind and layout, numerically checked conversions, and what is refused by name."""

from __future__ import annotations

import os
import pickle
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from pointillist_jax.convert import flame_params_from_tracker, frame_camera
from pointillist_jax.convert.pixel3dmm import axis_angle, read_frame
from pointillist_jax.convert.refit import refit_shape
from pointillist_jax.files import FileFormatError, UnsafeFileError, UserError, write_npz
from pointillist_jax.flame import flame_vertices, open_head
from pointillist_jax.flame.param_files import save_flame_params
from tests.convert.tracker_files import (
    frame_content,
    loaded,
    somebody,
    write_editions,
    write_mesh,
    write_pixel3dmm,
)


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    editions = write_editions(tmp_path_factory.mktemp("editions"))
    return loaded(editions.old), loaded(editions.new)


def error_mm(a, b) -> float:
    return 1e3 * float(np.abs(np.asarray(a)[..., :5023, :] - np.asarray(b)[..., :5023, :]).max())


def motion(rng, head, num: int):
    params = head.neutral_params((num,))
    return params.replace(
        shape=jnp.asarray(rng.normal(0, 0.1, params.shape.shape[1:]), jnp.float32),
        **{n: jnp.asarray(rng.normal(0, 0.1, getattr(params, n).shape), jnp.float32)
           for n in ("expr", "rotation", "neck_pose", "jaw_pose", "eyes_pose", "translation")},
    )  # fmt: skip


def vhap_arrays(params, head) -> dict:
    arrays = {k: np.asarray(v) for k, v in vars(params).items() if v is not None}
    num = len(arrays["expr"])
    extra = {"timestep_id": np.array([f"frame_{t:05d}" for t in range(num)]), "image_size": np.array([512, 512]),
             "focal_length": np.array([1.5], np.float32), "n_processed_frames": np.array(num),
             "dynamic_offset": np.ones((num, head.num_vertices, 3), np.float32)}  # fmt: skip
    return arrays | extra


def assert_same(found, expected, atol: float = 0.0):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=0), found, expected)


def test_vhap_runs_exports_and_fits_are_read_alike(heads, rng, tmp_path):
    head = heads[1]
    truth = motion(rng, head, 3)
    run = tmp_path / "vhap" / "2024-05-01_12-00-00"
    write_npz(run / "tracked_flame_params_30.npz", vhap_arrays(truth, head))
    # An earlier epoch and an earlier run, which must not be taken.
    stale = vhap_arrays(motion(rng, head, 3), head)
    write_npz(run / "tracked_flame_params_9.npz", stale)
    write_npz(tmp_path / "vhap" / "2023-01-01_00-00-00" / "tracked_flame_params_99.npz", stale)
    for t in range(3):
        save_flame_params(tmp_path / "export/flame_param" / f"{t:05d}.npz", truth.timestep(t), head)
    save_flame_params(tmp_path / "fit/flame_param.npz", truth, head, dynamic_offset=True)
    for path in ("vhap", "vhap/2024-05-01_12-00-00", "vhap/2024-05-01_12-00-00/tracked_flame_params_30.npz", "export",
                 "export/flame_param", "fit", "fit/flame_param.npz"):  # fmt: skip
        assert_same(flame_params_from_tracker(tmp_path / path, head), truth)
    one = flame_params_from_tracker(tmp_path / "export/flame_param/00001.npz", head)
    assert_same(one.timestep(0), truth.timestep(1))
    save_flame_params(tmp_path / "export/flame_param/00003.npz", motion(rng, head, 1), head)
    with pytest.raises(FileFormatError, match="another shape: these are different people"):
        flame_params_from_tracker(tmp_path / "export", head)


def test_a_frame_of_the_same_edition_is_copied(heads, rng, tmp_path):
    old, _ = heads
    pictures = somebody(rng, old, 2)
    folder = write_pixel3dmm(tmp_path / "p", old, pictures)
    params = flame_params_from_tracker(folder, old)
    for t, picture in enumerate(pictures):
        np.testing.assert_array_equal(params.shape, picture.params.shape)
        for name in ("expr", "neck_pose", "jaw_pose", "eyes_pose"):
            np.testing.assert_allclose(getattr(params, name)[t], getattr(picture.params, name), atol=2e-6)
        # R about the origin and outside FLAME equals FLAME's own rotation about its root, with the moved translation.
        assert error_mm(flame_vertices(old, params.timestep(t)), picture.world(old)) < 2e-3
    # As an R applied about the root would not.
    naive = params.timestep(0).replace(translation=jnp.asarray(pictures[0].translation, jnp.float32))
    assert error_mm(flame_vertices(old, naive), pictures[0].world(old)) > 1


@pytest.mark.parametrize("source", ["meshes", "tracker_head"])
def test_another_edition_is_refitted_from_the_mesh(heads, rng, tmp_path, source):
    old, new = heads
    pictures = somebody(rng, old, 2)
    folder = write_pixel3dmm(tmp_path / "p", old, pictures, meshes=source == "meshes")
    given = {} if source == "meshes" else {"tracker_head": old}
    params = flame_params_from_tracker(folder, new, **given)
    assert params.expr.shape == (2, 100)
    assert params.static_offset is None
    for t, picture in enumerate(pictures):
        assert error_mm(flame_vertices(new, params.timestep(t)), picture.world(old)) < 0.5
    # What copying the numbers would have made of it.
    copied = params.timestep(0).replace(shape=pictures[0].params.shape, expr=pictures[0].params.expr)
    assert error_mm(flame_vertices(new, copied), pictures[0].world(old)) > 5


def test_what_a_refit_leaves_can_be_kept_as_an_offset(heads, rng, tmp_path):
    old, new = heads
    bumps = rng.normal(0, 1e-3, (5023, 3))
    shape = rng.normal(0, 0.1, 300)
    mesh = np.asarray(flame_vertices(old, old.neutral_params().replace(shape=jnp.asarray(shape, jnp.float32))))[:5023]
    write_mesh(tmp_path / "canonical.ply", mesh + bumps, old)
    plain = flame_params_from_tracker(tmp_path / "canonical.ply", new)
    kept = flame_params_from_tracker(tmp_path, new, static_offset=True)
    assert plain.static_offset is None
    assert kept.static_offset.shape == (5143, 3)
    assert not np.any(kept.static_offset[5023:])
    assert_same(kept.shape, plain.shape)
    assert error_mm(flame_vertices(new, kept.timestep(0)), mesh + bumps) < 1e-3
    # Without it only the directions' share of the noise is explained.
    assert 0.5 < error_mm(flame_vertices(new, plain.timestep(0)), mesh + bumps) < 6
    assert not np.any(plain.expr)


def test_refit_is_ridge_regression(heads, rng):
    """Against an independent solver: the stacked system of data and prior."""
    head = heads[1]
    vertices = np.asarray(head.v_template, np.float64)[:5023] + rng.normal(0, 2e-3, (5023, 3))
    shape, offset = refit_shape(head, vertices)
    A = np.asarray(head.shape_dirs, np.float64)[:5023].reshape(-1, 300)
    b = (vertices - np.asarray(head.v_template, np.float64)[:5023]).ravel()
    stacked, target = np.concatenate([A, 1e-3 * np.eye(300)]), np.concatenate([b, np.zeros(300)])
    np.testing.assert_allclose(shape, np.linalg.lstsq(stacked, target, rcond=None)[0], atol=1e-8)
    np.testing.assert_allclose(offset[:5023], (b - A @ shape).reshape(-1, 3), atol=1e-12)


def test_the_frames_camera_projects_as_pixel3dmm_does(heads, rng, tmp_path):
    old, _ = heads
    (picture,) = somebody(rng, old)
    base = Rotation.from_rotvec([0.1, -0.2, 0.05]).as_matrix()
    shift = np.array([0.02, 0.03, -1.1])
    folder = write_pixel3dmm(tmp_path / "p", old, [picture], meshes=False,
                             **{"camera/R_base_0": base[None], "camera/t_base_0": shift[None]})  # fmt: skip
    S, fl, pp = 256, np.float32(3.9), np.array([0.02, -0.03])
    world = picture.world(old)
    cam = world @ base.T + shift
    depth = -cam[:, 2]
    u = fl * S * cam[:, 0] / depth + S / 2 - 0.5 + pp[0] * (S / 2 + 0.5)
    v = -fl * S * cam[:, 1] / depth + S / 2 + 0.5 + pp[1] * (S / 2 + 0.5)
    camera = frame_camera(folder / "checkpoint/00000.frame", 512)
    assert (camera.width, camera.height) == (512, 512)
    pixels, depths = camera.project(jnp.asarray(world, jnp.float32))
    np.testing.assert_allclose(pixels[0], 2 * np.stack([u, v], axis=-1), atol=2e-2)
    np.testing.assert_allclose(depths[0], depth, rtol=1e-5)


def test_axis_angle_at_the_ends():
    for vector in ([0, 0, 0], [1e-7, 0, 0], [0, np.pi - 1e-6, 0], [0.3, -2.0, 1.0]):
        found = axis_angle(Rotation.from_rotvec(vector).as_matrix())
        np.testing.assert_allclose(found, vector, atol=2e-6)


def test_nested_dictionaries_and_bare_pickles_are_read(heads, rng, tmp_path):
    content = frame_content(somebody(rng, heads[0])[0])
    nested: dict = {}
    for key, value in content.items():
        group, _, name = key.partition("/")
        if name:
            nested.setdefault(group, {})[name] = value
        else:
            nested[group] = value
    flat_path, nested_path, bare = (tmp_path / name for name in ("flat.frame", "nested.frame", "bare.frame"))
    torch.save(content, flat_path)
    torch.save(nested, nested_path)
    bare.write_bytes(pickle.dumps(content, protocol=4))
    expected = read_frame(flat_path)
    for path in (nested_path, bare):
        for a, b in zip(read_frame(path)[:7], expected[:7], strict=True):
            np.testing.assert_array_equal(a, b)


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_nothing_in_a_frame_is_executed(heads, rng, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = frame_content(somebody(rng, heads[0])[0])
    torch.save(content | {"extra": Evil()}, tmp_path / "evil.frame")
    with pytest.raises(UnsafeFileError, match=r"refers to (posix|os)\.system.*nothing was executed"):
        flame_params_from_tracker(tmp_path / "evil.frame", heads[0])
    torch.save(content | {"flame/t": torch.zeros(1, 3)}, tmp_path / "tensor.frame")
    with pytest.raises(UnsafeFileError, match="nothing was executed"):
        flame_params_from_tracker(tmp_path / "tensor.frame", heads[0])
    assert not (tmp_path / "pwned").exists()


def test_damaged_frames_are_refused_by_name(heads, rng, tmp_path):
    old, _ = heads
    (picture,) = somebody(rng, old)
    good = frame_content(picture)
    cases = {
        r"key flame/exp is missing": {k: v for k, v in good.items() if k != "flame/exp"},
        r"flame/jaw has shape \(5,\), expected \(6\)": good | {"flame/jaw": np.zeros((1, 5))},
        r"flame/neck is no rotation": good | {"flame/neck": np.zeros((1, 6))},
        r"flame/eyes is no rotation": good | {"flame/eyes": np.ones((1, 12))},
        r"R_rotation_matrix is no rotation": good | {"flame/R_rotation_matrix": np.diag([1.0, 1, -1])[None]},
        r"flame/R and flame/R_rotation_matrix differ": good | {"flame/R_rotation_matrix": np.eye(3)[None]},
        r"flame/t holds 3 NaN": good | {"flame/t": np.full((1, 3), np.nan)},
        r"flame/t has values in": good | {"flame/t": np.full((1, 3), 1e5)},
        r"flame/shape is empty": good | {"flame/shape": np.zeros((1, 0))},
        r"flame/shape is not an array \(an array of unexpected type": good | {"flame/shape": np.array(["a"] * 300)},
        r"flame/shape is not an array": good | {"flame/shape": 3},
        r"holds a list, expected a dictionary": [1, 2],
    }
    for i, (message, content) in enumerate(cases.items()):
        path = tmp_path / f"{i}.frame"
        torch.save(content, path)
        with pytest.raises(FileFormatError, match=message):
            flame_params_from_tracker(path, old)
    path = tmp_path / "0.frame"
    torch.save(good, path, _use_new_zipfile_serialization=False)
    with pytest.raises(FileFormatError, match=r"format of PyTorch before 1\.6"):
        flame_params_from_tracker(path, old)
    torch.save(good, path)
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(FileFormatError, match=r"0\.frame"):
        flame_params_from_tracker(path, old)
    with zipfile.ZipFile(tmp_path / "bomb.frame", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    with pytest.raises(FileFormatError, match="compressed archive"):
        flame_params_from_tracker(tmp_path / "bomb.frame", old)


def test_what_cannot_be_converted_says_what_to_do(heads, rng, tmp_path):
    old, new = heads
    (picture,) = somebody(rng, old)
    alone = write_pixel3dmm(tmp_path / "alone", old, [picture], meshes=False)
    with pytest.raises(UserError, match=r"canonical\.ply is not there.*--tracker_flame"):
        flame_params_from_tracker(alone, new)
    half = write_pixel3dmm(tmp_path / "half", old, [picture])
    (half / "mesh/00000.ply").unlink()
    with pytest.raises(UserError, match=r"00000\.ply is not there.*--tracker_flame"):
        flame_params_from_tracker(half, new)
    with pytest.raises(UserError, match=r"open_head\(coarse\), which has \d+: give your FLAME file with --flame"):
        flame_params_from_tracker(half, open_head("coarse"))
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileFormatError, match="no tracker output that is read here"):
        flame_params_from_tracker(tmp_path / "notes.txt", new)
    with pytest.raises(FileNotFoundError, match="empty holds no tracker output"):
        flame_params_from_tracker(tmp_path / "empty", new)
    with pytest.raises(FileNotFoundError, match=r"gone\.npz does not exist"):
        flame_params_from_tracker(tmp_path / "gone.npz", new)


@pytest.mark.parametrize("scale", [5.0, 1000.0, 0.1])
def test_heads_of_another_scale_are_refused(heads, rng, tmp_path, scale):
    old, new = heads
    mesh = scale * np.asarray(old.v_template)[:5023]
    write_mesh(tmp_path / "canonical.ply", mesh, old)
    with pytest.raises(FileFormatError, match=r"its head is .* m, expected about .* another unit"):
        flame_params_from_tracker(tmp_path / "canonical.ply", new)
    params = motion(rng, new, 1).replace(static_offset=jnp.asarray((scale - 1) * np.asarray(new.v_template)))
    save_flame_params(tmp_path / "p.npz", params, new)
    with pytest.raises(FileFormatError, match=r"its head is .* m, expected about .* another unit|has values in"):
        flame_params_from_tracker(tmp_path / "p.npz", new)


def test_meshes_that_are_none_are_refused(heads, tmp_path):
    old, new = heads
    write_mesh(tmp_path / "few.ply", np.asarray(old.v_template), old, num=5000)
    with pytest.raises(FileFormatError, match="has 5000 vertices; a FLAME mesh has 5023"):
        flame_params_from_tracker(tmp_path / "few.ply", new)
    (tmp_path / "text.ply").write_bytes(b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nend_header\n1\n")
    with pytest.raises(FileFormatError, match="only binary PLY is read"):
        flame_params_from_tracker(tmp_path / "text.ply", new)
    with_teeth = np.asarray(new.v_template)
    write_mesh(tmp_path / "teeth.ply", with_teeth, new, num=5143)
    assert np.abs(flame_params_from_tracker(tmp_path / "teeth.ply", new).shape).max() < 1e-4
