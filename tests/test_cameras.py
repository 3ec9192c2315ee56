"""Camera conventions, conversions, transforms.json and orbits."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.cameras import (
    Camera,
    intrinsics,
    load_transforms,
    look_at,
    opengl_to_viewmats,
    orbit,
    viewmats_to_opengl,
)
from pointillist_jax.files import FileFormatError


def random_c2w(rng, *batch):
    q, _ = np.linalg.qr(rng.normal(size=(*batch, 3, 3)))
    q = q * np.sign(np.linalg.det(q))[..., None, None]
    out = np.zeros((*batch, 4, 4))
    out[..., :3, :3], out[..., :3, 3], out[..., 3, 3] = q, rng.normal(size=(*batch, 3)), 1
    return out


def test_opengl_and_opencv_are_inverse(rng):
    c2w = random_c2w(rng, 5)
    viewmats = opengl_to_viewmats(c2w)
    np.testing.assert_allclose(viewmats_to_opengl(viewmats), c2w, atol=1e-5)
    want = np.linalg.inv(c2w @ np.diag([1, -1, -1, 1]))
    np.testing.assert_allclose(viewmats, want, atol=1e-5)


def test_conventions_by_hand():
    """OpenGL camera at z = 2 without rotation looks down -z at the origin, x right, y up."""
    c2w = np.eye(4)
    c2w[2, 3] = 2
    camera = Camera(opengl_to_viewmats(c2w), intrinsics(math.pi / 2, 100, 80), 100, 80)
    pixels, depths = camera.project(jnp.array([[0.0, 0, 0], [0.5, 0.25, 0], [0, 0, 1]]))
    np.testing.assert_allclose(depths, [2, 2, 1], atol=1e-6)
    # fov 90° over 100 px: focal 50. Right is +x, up is a smaller row.
    np.testing.assert_allclose(pixels, [[50, 40], [62.5, 33.75], [50, 40]], atol=1e-4)
    np.testing.assert_allclose(camera.positions, [0, 0, 2], atol=1e-6)
    np.testing.assert_allclose(
        camera.resized(200, 40).project(jnp.array([[0.5, 0.25, 0.0]]))[0], [[125, 16.875]], atol=1e-4
    )


def test_orbit_looks_at_the_face_and_stays_upright():
    target = (0.0, 0.01, -0.02)
    camera = orbit(8, width=64, height=48, distance=0.9, target=target, elevation=(0.0, 0.3))
    assert camera.viewmats.shape == (8, 4, 4)
    pixels, depths = camera.project(jnp.array([target]))
    np.testing.assert_allclose(pixels[:, 0], np.tile([32, 24], (8, 1)), atol=1e-3)
    np.testing.assert_allclose(depths[:, 0], 0.9, atol=1e-5)
    above = camera.project(jnp.array([target]) + jnp.array([[0.0, 0.05, 0.0]]))[0][:, 0]
    assert (above[:, 1] < 24).all()
    front = orbit(3, width=64, height=64, azimuth=(0.0, math.pi / 2), closed=False)
    np.testing.assert_allclose(front.positions[0], [0, 0, 0.98], atol=1e-5)  # In front of the face …
    np.testing.assert_allclose(front.positions[2], [1, 0, -0.02], atol=1e-5)  # … to its left, +x.
    rotation = camera.viewmats[:, :3, :3]
    np.testing.assert_allclose(rotation @ jnp.swapaxes(rotation, 1, 2), np.tile(np.eye(3), (8, 1, 1)), atol=1e-5)
    np.testing.assert_allclose(np.linalg.det(rotation), 1, atol=1e-5)


def test_looking_straight_down_is_finite():
    for y in (1.0, -1.0):
        rotation = look_at(jnp.array([0.0, y, 0.0]), jnp.zeros(3))[:3, :3]
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-6)
        np.testing.assert_allclose(np.linalg.det(rotation), 1, atol=1e-6)


def test_cameras_are_pytrees_under_jit(rng):
    camera = orbit(2, width=8, height=8)
    points = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    got = jax.jit(lambda c, p: c.project(p)[0])(camera, points)
    np.testing.assert_allclose(got, camera.project(points)[0], rtol=1e-5)
    np.testing.assert_allclose(look_at(jnp.array([0.0, 0, 1]), jnp.zeros(3))[2, 3], 1)


# --- transforms.json ---


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def frame(rng, **extra):
    return {"transform_matrix": random_c2w(rng).tolist(), "file_path": "images/00000_00.png", **extra}


def test_vhap_schema(tmp_path, rng):
    """Per-frame intrinsics, all keys of facts/avatars_gsplat.md A.8, paths out of the folder."""
    frames = [
        frame(
            rng,
            timestep_index=3,
            timestep_index_original=30,
            timestep_id="00030",
            camera_index=c,
            camera_id=f"222200{c}",
            cx=270.0 + c,
            cy=400.5,
            fl_x=1000.0 * (c + 1),
            fl_y=1001.0,
            h=802,
            w=550,
            camera_angle_x=0.5,
            camera_angle_y=0.7,
            fg_mask_path="fg_masks/00003_00.png",
            flame_param_path="../EMO-1/flame_param/00003.npz",
        )
        for c in range(2)
    ]
    sequence = tmp_path / "UNION"
    sequence.mkdir()
    path = write(sequence / "transforms_train.json", {"frames": frames, "cx": 1.0, "timestep_indices": [3]})
    loaded = load_transforms(path)
    assert len(loaded) == 2
    for c, got in enumerate(loaded):
        assert (got.camera.width, got.camera.height) == (550, 802)
        want = [[1000 * (c + 1), 0, 270 + c], [0, 1001, 400.5], [0, 0, 1]]
        np.testing.assert_allclose(got.camera.Ks, want)
        np.testing.assert_allclose(viewmats_to_opengl(got.camera.viewmats), frames[c]["transform_matrix"], atol=1e-5)
        assert (got.timestep_index, got.camera_index, got.camera_id, got.timestep_id) == (3, c, f"222200{c}", "00030")
        assert got.image_path == sequence / "images/00000_00.png"
        assert got.mask_path == sequence / "fg_masks/00003_00.png"
        assert got.flame_param_path == tmp_path / "EMO-1/flame_param/00003.npz"
    flipped = load_transforms(path, cy_from_bottom=True)[0]
    np.testing.assert_allclose(flipped.camera.Ks[1, 2], 802 - 400.5)


def test_shared_intrinsics_and_angles(tmp_path, rng):
    top = {"w": 100, "h": 50, "camera_angle_x": math.pi / 2}
    path = write(tmp_path / "t.json", {**top, "frames": [frame(rng), frame(rng, fl_x=10, fl_y=20)]})
    first, second = load_transforms(path)
    np.testing.assert_allclose(first.camera.Ks, [[50, 0, 50], [0, 50, 25], [0, 0, 1]], atol=1e-4)
    np.testing.assert_allclose(second.camera.Ks, [[10, 0, 50], [0, 20, 25], [0, 0, 1]], atol=1e-4)
    own = write(tmp_path / "o.json", {"w": 100, "h": 50, "fl_x": 7, "frames": [frame(rng, camera_angle_x=math.pi / 2)]})
    np.testing.assert_allclose(load_transforms(own)[0].camera.Ks[0, 0], 50, atol=1e-4)
    assert (first.mask_path, first.flame_param_path, first.timestep_index) == (None, None, None)
    assert (first.index, second.index) == (0, 1)


def test_which_border_cy_is_counted_from_is_asked_where_it_matters(tmp_path, rng, caplog):
    frames = [frame(rng, w=20, h=16, fl_x=30, cy=cy) for cy in (8.5, 5.0, 10.0)]
    path = write(tmp_path / "t.json", {"frames": frames})
    asked = load_transforms(path)
    (record,) = caplog.records
    assert "t.json: cy lies up to 3.0 pixels off" in record.getMessage()
    assert "--cy_from_bottom" in record.getMessage()
    assert "cy_from_bottom=True" in record.getMessage()
    caplog.clear()
    below, above = (load_transforms(path, cy_from_bottom=said) for said in (True, False))
    assert not caplog.records
    for n, cy in enumerate((8.5, 5.0, 10.0)):
        assert asked[n].camera.Ks[1, 2] == above[n].camera.Ks[1, 2] == cy
        assert below[n].camera.Ks[1, 2] == 16 - cy
    load_transforms(write(tmp_path / "t.json", {"frames": frames[:1]}))
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": None}, "w is missing"),
        ({"w": 10.5}, "whole pixels"),
        ({"w": 1e9}, "w is 1000000000.0"),
        ({"h": True}, "h is True"),
        ({"fl_x": "long"}, "fl_x is 'long'"),
        ({"fl_x": -3}, "fl_x is -3"),
        ({"fl_x": "9" * 10**6}, r"fl_x is '9+\.\.\.9+', expected"),
        ({"fl_x": None}, "neither fl_x nor camera_angle_x"),
        ({"timestep_index": 1.5}, "timestep_index is 1.5"),
        ({"camera_index": 1 << 31}, "camera_index is 2147483648"),
        ({"transform_matrix": [[1, 0, 0, 1e39], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]}, "finite numbers"),
        ({"file_path": None}, "file_path is missing"),
        ({"file_path": 3}, "expected a path"),
        ({"fg_mask_path": "a\0b"}, "expected a path"),
        ({"transform_matrix": None}, "transform_matrix must be"),
        ({"transform_matrix": [[1, 2], [3]]}, "transform_matrix must be"),
        ({"transform_matrix": np.zeros((4, 4)).tolist()}, "transform_matrix"),
        ({"transform_matrix": np.diag([2, 2, 2, 1]).tolist()}, "not a rotation"),
        ({"transform_matrix": np.diag([1, 1, -1, 1]).tolist()}, "not a rotation"),
    ],
)
def test_bad_frames_are_named(tmp_path, rng, change, message):
    good = frame(rng, w=10, h=10, fl_x=5)
    path = write(tmp_path / "t.json", {"frames": [good, {**good, **change}]})
    with pytest.raises(FileFormatError, match=message) as caught:
        load_transforms(path)
    assert "frame 1" in str(caught.value)
    assert "t.json" in str(caught.value)


@pytest.mark.parametrize("content", [{}, {"frames": []}, {"frames": 3}, {"frames": ["a"]}])
def test_no_frames(tmp_path, content):
    with pytest.raises(FileFormatError, match="frame"):
        load_transforms(write(tmp_path / "t.json", content))


def test_nan_is_not_json(tmp_path):
    (tmp_path / "t.json").write_text('{"frames": [{"w": NaN}]}')
    with pytest.raises(FileFormatError, match="NaN is not a JSON number"):
        load_transforms(tmp_path / "t.json")
