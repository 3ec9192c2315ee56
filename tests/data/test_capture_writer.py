"""Capture folders of synthetic people: the schema of facts A.8, and images that the files alone reproduce."""

from __future__ import annotations

import json

import imageio.v3 as iio
import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.cameras import load_transforms
from pointillist_jax.configs import IdentityConfig
from pointillist_jax.data.capture_writer import (
    VALIDATION_CAMERA,
    FrameRenderer,
    capture_rig,
    pad_gaussians,
    write_capture,
)
from pointillist_jax.data.captures import load_capture
from pointillist_jax.data.fits import load_fit, save_fit
from pointillist_jax.data.identities import random_motion, sample_identity
from pointillist_jax.flame import face_frames, flame_vertices, local_to_global, open_head
from pointillist_jax.flame.param_files import load_flame_params
from renderer_bridge import rasterize

TIMESTEPS, SIZE = 4, 48
FRAME_KEYS = {
    "timestep_index", "timestep_index_original", "timestep_id", "camera_index", "camera_id", "cx", "cy", "fl_x", "fl_y",
    "h", "w", "camera_angle_x", "camera_angle_y", "transform_matrix", "file_path", "fg_mask_path", "flame_param_path",
}  # fmt: skip
TOP_KEYS = {
    "cx", "cy", "fl_x", "fl_y", "h", "w", "camera_angle_x", "camera_angle_y", "timestep_indices", "camera_indices",
    "frames",
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return open_head("coarse")


@pytest.fixture(scope="module")
def person(model):
    return sample_identity(model, 77, IdentityConfig(density=0.15), hair_style="short", beard="goatee")


@pytest.fixture(scope="module")
def folder(model, person, tmp_path_factory):
    folder = tmp_path_factory.mktemp("people") / "person_0000"
    motion = random_motion(model, np.asarray(person.params.shape), TIMESTEPS, np.random.default_rng(0))
    write_capture(folder, model, person.gaussians, motion, person.canonical, capture_rig(SIZE), FrameRenderer(model))
    save_fit(folder / "truth", person.gaussians, motion, model)
    return folder


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((a - b) ** 2) + 1e-12))


def test_files_and_keys_are_those_of_the_schema(folder):
    names = {f"{t:05d}_{c:02d}.png" for t in range(TIMESTEPS) for c in range(16)}
    assert {p.name for p in (folder / "images").iterdir()} == names
    assert {p.name for p in (folder / "fg_masks").iterdir()} == names
    assert {p.name for p in (folder / "flame_param").iterdir()} == {f"{t:05d}.npz" for t in range(TIMESTEPS)}
    splits = {}
    for split in ("", "_train", "_val", "_test"):
        content = json.loads((folder / f"transforms{split}.json").read_text())
        assert set(content) == TOP_KEYS
        for frame in content["frames"]:
            assert set(frame) == FRAME_KEYS
        splits[split] = {(f["timestep_index"], f["camera_index"]) for f in content["frames"]}
    last = round(0.7 * TIMESTEPS)
    everything = {(t, c) for t in range(TIMESTEPS) for c in range(16)}
    assert splits[""] == everything
    assert splits["_test"] == {(t, c) for t, c in everything if t >= last}
    assert splits["_val"] == {(t, c) for t, c in everything if t < last and c == VALIDATION_CAMERA == 8}
    assert splits["_train"] == everything - splits["_test"] - splits["_val"]
    for t in range(TIMESTEPS):
        arrays = np.load(folder / f"flame_param/{t:05d}.npz")
        for key, size in {"translation": 3, "rotation": 3, "neck_pose": 3, "jaw_pose": 3, "eyes_pose": 6}.items():
            assert arrays[key].shape == (1, size)
        assert {"shape", "expr", "static_offset"} <= set(arrays)
    canonical = np.load(folder / "canonical_flame_param.npz")
    np.testing.assert_allclose(canonical["jaw_pose"], [[0.3, 0, 0]], rtol=1e-6)
    assert not canonical["expr"].any()


def test_canonical_obj_is_the_canonical_mesh(folder, model, person):
    lines = (folder / "canonical.obj").read_text().splitlines()
    vertices = np.array([line.split()[1:] for line in lines if line.startswith("v ")], float)
    faces = np.array([line.split()[1:] for line in lines if line.startswith("f ")], int) - 1
    np.testing.assert_allclose(vertices, flame_vertices(model, person.canonical), atol=1e-6)
    np.testing.assert_array_equal(faces, model.faces)


def test_images_follow_from_the_files_alone(folder, model):
    """Truth PLY + FLAME files + transforms → the same pictures: one wrong convention anywhere would show."""
    fit = load_fit(folder, model)
    frames = load_transforms(folder / "transforms_test.json")[::5] + load_transforms(folder / "transforms_val.json")
    for frame in frames:
        params = load_flame_params(frame.flame_param_path, model).timestep(0)
        world = local_to_global(fit.gaussians, face_frames(flame_vertices(model, params), model.faces))
        image, _, info = rasterize(
            world.means, world.quats, world.scales, world.opacities, world.colors, frame.camera.viewmats[None],
            frame.camera.Ks[None], frame.camera.width, frame.camera.height, backgrounds=jnp.ones((1, 3)),
            capacity=1 << 16,
        )  # fmt: skip
        assert int(info["overflow"]) == 0
        written = iio.imread(frame.image_path).astype(np.float32) / 255
        assert written.shape == (SIZE, SIZE, 3)
        assert psnr(np.clip(np.asarray(image[0]), 0, 1), written) > 50


def test_the_person_is_in_every_picture_on_white(folder):
    for path in sorted((folder / "images").iterdir()):
        image = iio.imread(path).astype(np.float32) / 255
        mask = iio.imread(folder / "fg_masks" / path.name)
        assert mask.shape == image.shape[:2]
        assert set(np.unique(mask)) <= {0, 255}
        assert 0.08 < (mask > 0).mean() < 0.7
        assert image[mask == 0].min() > 0.995
        assert image[mask > 0].mean() < 0.9
        # The head is whole: only the bust reaches a border.
        assert (mask[0] == 0).all()
    pictures = [iio.imread(folder / f"images/{t:05d}_08.png").astype(float) for t in range(TIMESTEPS)]
    assert np.abs(pictures[0] - pictures[-1]).mean() > 0.5


def test_the_capture_reader_takes_it(folder, model, person):
    capture = load_capture(folder, model)
    assert capture.num_timesteps == TIMESTEPS
    assert [len(capture.split(s)) for s in ("train", "val", "test")] == [15 * 3, 3, 16]
    np.testing.assert_array_equal(capture.params.shape, person.params.shape)
    np.testing.assert_array_equal(capture.canonical.jaw_pose, person.canonical.jaw_pose)
    val = capture.split("val")
    written = iio.imread(folder / "images/00000_08.png").astype(np.float32) / 255
    # Cutting the person out once more must not change a picture that lies on white already.
    np.testing.assert_allclose(val.image(0, 1.0), written, atol=2.5 / 255)


def test_padding_and_a_capacity_that_is_too_small_do_not_change_a_pixel(model, person):
    cameras = capture_rig(SIZE)
    params = person.params
    render = FrameRenderer(model)
    image, alpha = render(person.gaussians, params, cameras)
    padded, _ = render(pad_gaussians(person.gaussians, person.gaussians.num_gaussians + 1000), params, cameras)
    np.testing.assert_array_equal(image, padded)
    assert alpha.max() > 0.95
    small = FrameRenderer(model, first_capacity=64)
    again, _ = small(person.gaussians, params, cameras)
    np.testing.assert_array_equal(image, again)
