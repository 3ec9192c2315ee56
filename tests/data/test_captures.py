"""Capture folders: what is read, every problem listed at once, hostile images, the bounded cache."""

from __future__ import annotations

import dataclasses
import io
import pickle
import shutil
import struct
import tempfile
import threading
import zlib

import imageio.v3 as iio
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pointillist_jax.cameras import load_transforms, orbit
from pointillist_jax.data.captures import CaptureError, find_captures, load_capture
from pointillist_jax.data.images import ImageCache, check_header, load_rgba, square_portrait
from pointillist_jax.data.subjects import find_portrait
from pointillist_jax.data.views import view_batches
from pointillist_jax.files import FileFormatError, UserError, write_npz
from pointillist_jax.fitting import FitData, evaluate, fit
from pointillist_jax.flame import open_head
from pointillist_jax.flame.param_files import load_flame_params
from tests.data.capture_files import read_frames, write_capture, write_transforms
from tests.fitting.scenes import SCHEDULE, write_person

MODEL = open_head("coarse")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "person_0007"


@pytest.mark.parametrize(
    ("image_mode", "masks"), [("RGB", "L"), ("RGB", "RGB"), ("RGB", None), ("RGBA", None), ("L", "L")]
)
def test_images_are_composited_by_mask_or_alpha(root, rng, image_mode, masks):
    written = write_capture(root, MODEL, rng, image_mode=image_mode, masks=masks)
    capture = load_capture(root, MODEL)
    for name in ("train", "val", "test"):
        split = capture.split(name)
        for n in range(len(split)):
            key = f"{capture.timestep_indices[split.timesteps[n]]:05d}_{split.camera_indices[n]:02d}"
            image = written[key] / 255.0
            mask = written[f"mask_{key}"] / 255.0 if masks else np.ones(image.shape[:2])
            if image_mode == "RGBA":
                image, mask = image[..., :3], image[..., 3]
            image = np.repeat(image[..., None], 3, axis=-1) if image.ndim == 2 else image
            for background in (1.0, 0.25, (0.1, 0.5, 0.9)):
                want = image * mask[..., None] + np.array(background) * (1 - mask[..., None])
                have = split.image(n, background)
                assert have.dtype == np.float32
                assert have.shape == (*split.sizes[n][::-1], 3)
                np.testing.assert_allclose(have, want, atol=0.5 / 255 + 1e-6)
            np.testing.assert_allclose(split.mask(n), mask, atol=1e-6)
            np.testing.assert_array_equal(split.image_uint8(n), np.uint8(np.round(split.image(n) * 255)))


def test_images_on_white_are_not_cut_out_twice(tmp_path, rng):
    """VHAP exports pictures composited by their soft masks; GaussianAvatars trains on them as they are."""
    mask = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (4, 1))
    person = rng.integers(0, 256, (4, 16, 3))
    white = np.round((person * mask[..., None] + 255 * (255 - mask[..., None].astype(int))) / 255).astype(np.uint8)
    iio.imwrite(tmp_path / "i.png", white)
    iio.imwrite(tmp_path / "m.png", mask)
    rgba = load_rgba(tmp_path / "i.png", tmp_path / "m.png")
    np.testing.assert_allclose(rgba[..., :3] + (255.0 - rgba[..., 3:]), white, atol=1)
    np.testing.assert_allclose(rgba[..., :3], person * (mask[..., None] / 255), atol=1)


def test_what_a_capture_holds(root, rng):
    write_capture(root, MODEL, rng, timesteps=5)
    capture = load_capture(root, MODEL)
    assert capture.subject == "person_0007"
    assert capture.num_timesteps == 5
    assert {name: len(split) for name, split in capture.splits.items()} == {"train": 8, "val": 4, "test": 3}
    assert set(capture.split("val").camera_indices) == {1}
    for t in range(5):
        want = load_flame_params(root / "flame_param" / f"{t:05d}.npz", MODEL)
        for field in ("expr", "rotation", "neck_pose", "jaw_pose", "eyes_pose", "translation"):
            np.testing.assert_array_equal(getattr(capture.params, field)[t], getattr(want, field)[0])
        np.testing.assert_array_equal(capture.params.shape, want.shape)
        np.testing.assert_array_equal(capture.params.static_offset, want.static_offset)
    np.testing.assert_allclose(capture.canonical.jaw_pose, [0.3, 0, 0], atol=1e-7)
    frames = load_transforms(root / "transforms_train.json")
    split = capture.split("train")
    np.testing.assert_array_equal(split.Ks, np.stack([f.camera.Ks for f in frames]))
    np.testing.assert_array_equal(split.viewmats, np.stack([f.camera.viewmats for f in frames]))
    assert split.camera(1).width == split.sizes[1][0]
    centers = np.stack([np.asarray(f.camera.positions) for f in frames])
    far = np.linalg.norm(centers - centers.mean(axis=0), axis=1).max()
    assert capture.extent == pytest.approx(1.1 * far, rel=1e-5)
    with pytest.raises(UserError, match="no split 'val'"):
        load_capture(root, MODEL, splits=("train",)).split("val")


def test_flames_offset_without_teeth_is_filled_up(root, rng, flame_model):
    offset = rng.normal(0, 1e-3, (1, 5023, 3)).astype(np.float32)
    identity = {"shape": np.zeros(300, np.float32), "static_offset": offset}
    write_capture(root, flame_model, rng, timesteps=2, identity=identity)
    offset = load_capture(root, flame_model).params.static_offset
    assert offset.shape == (5143, 3)
    np.testing.assert_array_equal(offset[:5023], identity["static_offset"][0])
    assert not jnp.any(offset[5023:])


def test_a_single_camera_leaves_no_validation_views(root, rng):
    write_capture(root, MODEL, rng)
    write_transforms(root, "val", [])
    capture = load_capture(root, MODEL)
    assert {name: len(split) for name, split in capture.splits.items()} == {"train": 6, "val": 0, "test": 3}
    assert find_portrait([root], MODEL, 16) is None
    with pytest.raises(UserError, match="nothing to make batches of"):
        view_batches([capture], batch_size=1, split="val")
    write_transforms(root, "train", [])
    with pytest.raises(CaptureError, match=r"transforms_train.json: frames is missing or empty"):
        load_capture(root, MODEL)


@pytest.mark.parametrize("tracked", ["together", "apart"])
def test_union_of_sequences(tmp_path, rng, tracked, caplog):
    """`../<sequence>/…` paths; train and test number their timesteps independently."""
    sequences = [tmp_path / name for name in ("306_EMO-1", "306_EXP-2", "306_EXP-5")]
    shapes = rng.normal(size=(3, MODEL.shape_dirs.shape[-1])).astype(np.float32)
    union = tmp_path / "UNION_306"
    union.mkdir()
    frames = {"train": [], "val": [], "test": []}
    for i, sequence in enumerate(sequences):
        identity = {"shape": shapes[i if tracked == "apart" else 0]}
        write_capture(sequence, MODEL, rng, timesteps=3, identity=identity)
        for split in ("train", "val", "test"):
            for frame in read_frames(sequence, split):
                frame = {k: v for k, v in frame.items() if k != "timestep_id"}
                for key in ("file_path", "fg_mask_path", "flame_param_path"):
                    frame[key] = f"../{sequence.name}/{frame[key]}"
                if i == 2:
                    split = "test"
                else:
                    frame["timestep_index"] += 3 * i
                frames[split].append(frame)
    # The test sequence counts from 0 again, and would clash with the first one's test timestep within the split.
    frames["test"] = [f for f in frames["test"] if sequences[2].name in f["file_path"]]
    for split, entries in frames.items():
        write_transforms(union, split, entries)
    shutil.copy(sequences[0] / "canonical_flame_param.npz", union)
    capture = load_capture(union, MODEL)
    # 2 training timesteps of each of two sequences, and 3 of the third.
    assert capture.num_timesteps == 7
    assert capture.params.static_offset is None
    np.testing.assert_array_equal(capture.params.shape, shapes[0])
    assert ("shape differs from the first sequence's" in caplog.text) == (tracked == "apart")
    for name, entries in frames.items():
        split = capture.split(name)
        for n, frame in enumerate(entries):
            want = load_flame_params(union / frame["flame_param_path"], MODEL)
            np.testing.assert_array_equal(capture.params.expr[split.timesteps[n]], want.expr[0])
            assert split.image_paths[n].parts[-3] in frame["file_path"]
    assert capture.split("test").image(0).shape == (16, 20, 3)
    # A link to the set elsewhere: ".." leads from the set itself.
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "306").symlink_to(union)
    assert load_capture(tmp_path / "elsewhere" / "306", MODEL).num_timesteps == 7


def test_resizing_keeps_the_view(root, rng):
    write_capture(root, MODEL, rng)
    full, half = load_capture(root, MODEL), load_capture(root, MODEL, downscale=2)
    fixed = load_capture(root, MODEL, resize=(10, 9))
    point = jnp.array([[0.01, 0.02, 0.03]])
    for n in range(len(full.split("train"))):
        w, h = full.split("train").sizes[n].tolist()
        want = full.split("train").image(n).reshape(h // 2, 2, w // 2, 2, 3).mean(axis=(1, 3))
        np.testing.assert_allclose(half.split("train").image(n), want, atol=2 / 255)
        assert fixed.split("train").image(n).shape == (9, 10, 3)
        for other, size in ((half, (w // 2, h // 2)), (fixed, (10, 9))):
            camera = other.split("train").camera(n)
            assert (camera.width, camera.height) == size
            resized = full.split("train").camera(n).resized(*size)
            np.testing.assert_allclose(camera.project(point)[0], resized.project(point)[0], rtol=1e-5)
    for bad in ({"resize": (4, 4), "downscale": 2}, {"downscale": 0}, {"resize": (0, 4)}):
        with pytest.raises(UserError, match="give one of them"):
            load_capture(root, MODEL, **bad)


def test_all_problems_are_listed_at_once(root, rng):
    write_capture(root, MODEL, rng, timesteps=6)
    images, flame = root / "images", root / "flame_param"
    (images / "00000_00.png").unlink()
    (images / "00000_02.png").write_bytes(b"no picture")
    iio.imwrite(images / "00001_00.png", np.zeros((16, 21, 3), np.uint8))
    data = (images / "00001_02.png").read_bytes()
    (images / "00001_02.png").write_bytes(data[: len(data) // 2])
    (root / "fg_masks" / "00002_00.png").unlink()
    (flame / "00003.npz").unlink()
    for t, change in (
        (1, {"expr": np.full((1, 3), np.nan)}),
        (2, {"shape": np.ones(4)}),
        (4, {"jaw_pose": np.zeros((1, 4))}),
    ):
        with np.load(flame / f"{t:05d}.npz") as arrays:
            write_npz(flame / f"{t:05d}.npz", {**arrays, **change})
    frames = read_frames(root, "train")
    frames[6]["fl_x"] = "wide"
    frames[7]["transform_matrix"] = [[1, 2], [3, 4]]
    frames[5] |= {"timestep_index": 0}
    frames.append(frames[0])
    write_transforms(root, "train", frames)
    (root / "transforms_val.json").unlink()
    (root / "transforms_test.json").write_text("{")
    (root / "canonical_flame_param.npz").unlink()
    with pytest.raises(CaptureError) as caught:
        load_capture(root, MODEL)
    found = "\n".join(caught.value.problems)
    for part in (
        "transforms_val.json is missing", "transforms_test.json is not valid JSON", "frame 6: fl_x is 'wide'",
        "frame 7: transform_matrix", "frame 10: timestep 0 of camera 0 appears twice", "timestep_index 0 stands for",
        "00000_00.png does not exist", "00000_02.png is not a readable", "00001_00.png is 21 × 16 pixels, expected 20",
        "00001_02.png is a truncated PNG", "fg_masks/00002_00.png does not exist",
        "00001.npz: expr holds 3 NaN", "00002.npz: shape differs", "canonical_flame_param.npz does not exist",
    ):  # fmt: skip
        assert part in found, part
    assert f"{len(caught.value.problems)} problems" in str(caught.value)


def test_many_problems_are_told_by_kind_and_listed_in_a_file(root, rng, tmp_path, monkeypatch):
    write_capture(root, MODEL, rng, timesteps=12)
    shutil.rmtree(root / "images")
    (root / "images").mkdir()
    (root / "images" / "00003_01.png").write_bytes(b"no picture")
    (root / "fg_masks" / "00011_02.png").write_bytes(png(9, 9))
    (root / "canonical_flame_param.npz").unlink()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    before = sorted(root.rglob("*"))
    with pytest.raises(CaptureError) as caught:
        load_capture(root, MODEL)
    problems, lines = caught.value.problems, str(caught.value).splitlines()
    assert len(problems) == 38
    assert "38 problems" in lines[0]
    # The rare ones stand among the examples of the frequent one.
    for rare in (
        "00003_01.png is not a readable",
        "00011_02.png is 9 × 9 pixels",
        "canonical_flame_param.npz does not",
    ):
        assert any(rare in line for line in lines), rare
    assert sum("images/" in line and "does not exist" in line for line in lines) == 5
    assert "    … and 30 more like these" in lines
    assert len(lines) == 1 + 5 + 1 + 3 + 1
    (listed,) = (tmp_path / "tmp").iterdir()
    assert lines[-1] == f"All 38, a line each: {listed}"
    assert listed.read_text().splitlines() == list(problems)
    assert sorted(root.rglob("*")) == before
    assert pickle.loads(pickle.dumps(caught.value)).problems == problems
    # A disk that takes no file hides neither the problems nor that some are not told.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(CaptureError, match=r"30 more like these\n(.*\n)+The list of all 38 could not be written: "):
        load_capture(root, MODEL)


def test_a_few_problems_are_all_told_without_a_file(root, rng, tmp_path, monkeypatch):
    write_capture(root, MODEL, rng)
    shutil.rmtree(root / "images")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    with pytest.raises(CaptureError) as caught:
        load_capture(root, MODEL)
    assert str(caught.value).splitlines()[1:] == [f"  - {problem}" for problem in caught.value.problems]
    assert len(caught.value.problems) == 12
    assert not list((tmp_path / "tmp").iterdir())


def test_timesteps_are_numbered_and_belong_to_one_flame_file(root, rng):
    write_capture(root, MODEL, rng)

    def problems(**changed) -> list[str]:
        for split, change in changed.items():
            write_transforms(root, split, [change(dict(frame)) for frame in originals[split]])
        with pytest.raises(CaptureError) as caught:
            load_capture(root, MODEL)
        for split in changed:
            write_transforms(root, split, originals[split])
        return list(caught.value.problems)

    originals = {split: read_frames(root, split) for split in ("train", "val", "test")}
    drop = lambda frame: {key: value for key, value in frame.items() if key != "timestep_index"}  # noqa: E731
    missing = [f"transforms_test.json: frame {n}: timestep_index is missing" for n in range(3)]
    found = problems(test=drop)
    assert all(text.startswith(want) for text, want in zip(found, missing, strict=True))
    assert len(problems(train=drop, val=drop, test=drop)) == sum(map(len, originals.values()))
    # Camera 1's pictures of the same tracked heads, numbered otherwise than the others'.
    found = problems(val=lambda frame: frame | {"timestep_index": frame["timestep_index"] + 7})
    assert len(found) == len(originals["val"])
    assert (
        "flame_param/00000.npz belongs to timestep_index 7 here and to 0 in transforms_train.json: frame 0" in found[0]
    )
    # One head that all the pictures show needs no number.
    write_transforms(root, "val", [])
    for split, n in (("train", 2), ("test", 1)):
        same = {"flame_param_path": "flame_param/00000.npz"}
        write_transforms(root, split, [drop(frame) | same for frame in originals[split][:n]])
    capture = load_capture(root, MODEL)
    assert capture.timestep_indices.tolist() == [0]
    assert capture.split("test").timesteps.tolist() == [0]


def test_names_without_a_suffix_are_completed(root, rng):
    written = write_capture(root, MODEL, rng)
    for split in ("train", "val", "test"):
        frames = read_frames(root, split)
        for frame in frames:
            frame |= {key: frame[key].removesuffix(".png") for key in ("file_path", "fg_mask_path")}
        write_transforms(root, split, frames)
    split = load_capture(root, MODEL).split("train")
    np.testing.assert_array_equal(split.rgba(0)[..., 3], written["mask_00000_00"])


def test_one_question_about_cy_for_all_splits(root, rng, caplog):
    write_capture(root, MODEL, rng)
    load_capture(root, MODEL)  # Half a pixel off.
    for split in ("train", "val", "test"):
        write_transforms(root, split, [frame | {"cy": frame["h"] / 2 + 2} for frame in read_frames(root, split)])
    for said in (True, False):
        cy = load_capture(root, MODEL, cy_from_bottom=said).split("train").Ks[0, 1, 2]
        assert cy == 8 - 2 * (1 if said else -1)
    assert not caplog.records
    assert load_capture(root, MODEL).split("train").Ks[0, 1, 2] == 10
    (record,) = caplog.records
    assert f"{root}: cy lies up to 2.0 pixels off the middle" in record.getMessage()


def test_folders_that_only_look_like_captures_are_named(tmp_path, rng, caplog):
    write_capture(tmp_path / "ann", MODEL, rng, timesteps=2)
    for name in ("fits", ".bob.tmp-1"):
        (tmp_path / name / "point_cloud").mkdir(parents=True)
    (tmp_path / ".bob.tmp-1" / "images").mkdir()
    (tmp_path / "gallery.png").write_bytes(png(3, 3))
    assert list(find_captures(tmp_path)) == ["ann"]
    assert not caplog.records
    (tmp_path / "bob" / "images").mkdir(parents=True)
    for name in ("cyd", "dan", "eve", "fay", "gil"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "transforms_val.json").write_text("{}")
    assert list(find_captures(tmp_path)) == ["ann"]
    (record,) = caplog.records
    assert "bob, cyd, dan, eve, fay and 1 more left out" in record.getMessage()


def test_oblong_pictures_with_an_off_centre_principal_point(root, rng):
    """48 × 32 pixels: width and height, x and y must not change places anywhere."""
    write_capture(root, MODEL, rng)
    want = {"cx": 19.0, "cy": 21.0, "fl_x": 70.0, "fl_y": 66.0}
    pictures = {}
    for split in ("train", "val", "test"):
        frames = [frame | want | {"w": 48, "h": 32} for frame in read_frames(root, split)]
        write_transforms(root, split, frames)
        for frame in frames:
            pictures[frame["file_path"]] = rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)
            iio.imwrite(root / frame["file_path"], pictures[frame["file_path"]])
            iio.imwrite(root / frame["fg_mask_path"], np.full((32, 48), 255, np.uint8))
    full = load_capture(root, MODEL, cy_from_bottom=False).split("train")
    assert full.image_uint8(0).tobytes() == pictures["images/00000_00.png"].tobytes()
    np.testing.assert_array_equal(full.Ks[0], [[70, 0, 19], [0, 66, 21], [0, 0, 1]])
    half = load_capture(root, MODEL, cy_from_bottom=False, downscale=2).split("train")
    assert half.image(0).shape == (16, 24, 3)
    np.testing.assert_allclose(half.Ks[0], [[35, 0, 9.5], [0, 33, 10.5], [0, 0, 1]])
    other = load_capture(root, MODEL, cy_from_bottom=True, resize=(24, 32)).split("train")
    assert other.image(0).shape == (32, 24, 3)
    np.testing.assert_allclose(other.Ks[0], [[35, 0, 9.5], [0, 66, 11], [0, 0, 1]])
    camera = full.camera(0)
    assert (camera.width, camera.height) == (48, 32)
    # A point on the optical axis lands on the principal point.
    ahead = np.linalg.inv(full.viewmats[0]) @ np.array([0, 0, 0.5, 1])
    np.testing.assert_allclose(camera.project(jnp.asarray(ahead[None, :3]))[0][0], [19, 21], atol=1e-3)


def test_another_persons_shape_is_named_or_taken_from_the_first(root, rng):
    write_capture(root, MODEL, rng)
    with np.load(root / "flame_param" / "00002.npz") as arrays:
        write_npz(root / "flame_param" / "00002.npz", {**arrays, "shape": arrays["shape"] + 0.1})
    with pytest.raises(CaptureError, match=r"00002.npz: shape differs from the one in .*00000.npz"):
        load_capture(root, MODEL)
    first = load_flame_params(root / "flame_param" / "00000.npz", MODEL)
    np.testing.assert_array_equal(load_capture(root, MODEL, identity="first").params.shape, first.shape)
    with pytest.raises(UserError, match="identity"):
        load_capture(root, MODEL, identity="any")
    with pytest.raises(FileNotFoundError, match="not a folder"):
        load_capture(root / "nothing", MODEL)


def png(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, with next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")


def test_hostile_images_are_refused_before_they_are_decoded(tmp_path):
    path = tmp_path / "bomb.png"
    for size in ((20_000, 20_000), (1 << 20, 1 << 20), (9000, 9000)):
        path.write_bytes(png(*size))
        with pytest.raises(FileFormatError, match=r"bomb.png"):
            check_header(path)
        with pytest.raises(FileFormatError, match=r"bomb.png"):
            load_rgba(path)
    path.write_bytes(png(30, 20))
    assert check_header(path) == (30, 20)
    with pytest.raises(FileFormatError, match="cannot be decoded"):
        load_rgba(path)
    with pytest.raises(FileFormatError, match="30 × 20 pixels, expected 10 × 20"):
        load_rgba(path, size=(10, 20))
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(FileFormatError, match="not a readable PNG"):
        load_rgba(path)


@pytest.mark.slow
def test_oblong_pictures_are_fitted(tmp_path, caplog):
    cameras = orbit(5, width=48, height=32, distance=0.8, target=(0.0, 0.0, 0.0))
    cameras = cameras.replace(Ks=cameras.Ks.at[:, :2, :].multiply(0.7).at[:, :2, 2].set(np.array([17.0, 20.0])))
    model = write_person(tmp_path / "ball", cameras=cameras)

    def val_psnr(iterations: int, **how) -> float:
        data = FitData.from_capture(load_capture(tmp_path / "ball", model, **how))
        config = dataclasses.replace(SCHEDULE, iterations=iterations, densify=False, opacity_reset_interval=0)
        result = fit(data, model, config)
        return evaluate(result.state, result.scene, data, capacity=result.capacity)["val"]["psnr"]

    right = val_psnr(80)
    assert "cy lies up to 4.0 pixels off the middle" in caplog.text
    assert right > val_psnr(2) + 3
    assert right > val_psnr(80, cy_from_bottom=True) + 1.5


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True, "comment": b"\xff\xd9"}),  # As a thumbnail in the header ends.
        ("MPO", {"save_all": True}),
        ("WEBP", {}),
    ],
)
def test_files_that_broke_off_are_refused_up_front(tmp_path, rng, kind, options):
    path, written = tmp_path / "image", io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(written, kind, **options)
    whole = written.getvalue()
    path.write_bytes(whole)
    assert check_header(path) == (80, 60)
    path.write_bytes(whole + b"written by a camera")
    assert check_header(path) == (80, 60)
    for part in (0.5, 0.99):
        path.write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(FileFormatError, match="truncated" if kind != "WEBP" else "not a readable"):
            check_header(path)


def test_sixteen_bit_masks_and_palettes(tmp_path, rng):
    grey = rng.integers(0, 65536, (4, 5), dtype=np.uint16)
    iio.imwrite(tmp_path / "mask.png", grey)
    image = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(image).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "image.png")
    rgba = load_rgba(tmp_path / "image.png", tmp_path / "mask.png")
    np.testing.assert_array_equal(rgba[..., 3], grey >> 8)


def test_cache_is_bounded_shared_and_safe_between_threads(root, rng, monkeypatch):
    write_capture(root, MODEL, rng, timesteps=8)
    one = 24 * 18 * 4
    split = load_capture(root, MODEL, cache_bytes=6 * one).split("train")
    want = [split.rgba(n).copy() for n in range(len(split))]
    cache = split.cache
    assert cache.num_bytes <= 6 * one
    assert split.rgba(len(split) - 1) is split.rgba(len(split) - 1)
    with pytest.raises(ValueError, match="read-only"):
        split.rgba(0)[:] = 0
    failed = []

    def read(seed: int) -> None:
        for n in np.random.default_rng(seed).integers(0, len(split), 60):
            if not np.array_equal(split.rgba(n), want[n]) or cache.num_bytes > 6 * one:
                failed.append(n)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert cache.num_bytes == sum(image.nbytes for image in cache._images.values())
    copy = pickle.loads(pickle.dumps(split))
    np.testing.assert_array_equal(copy.rgba(0), want[0])
    uncached = ImageCache(0)
    uncached.get(split.image_paths[0], None, (20, 16), (20, 16))
    assert uncached.num_bytes == 0


def test_portraits_are_whole_and_square(rng):
    rgba = np.dstack([np.full((6, 4, 3), 40, np.uint8), np.full((6, 4), 255, np.uint8)])
    square = square_portrait(rgba, 6)
    np.testing.assert_array_equal(square[:, 1:5], 40)
    np.testing.assert_array_equal(square[:, [0, 5]], 255)
    assert square_portrait(rgba, 12).shape == (12, 12, 3)
    rgba[..., :] = 0
    assert (square_portrait(rgba, 9) == 255).all()  # Nothing but background.
