"""`experiments.animate` as a user starts it: captures with their cameras, paths of cameras, videos, sheets, folders."""

from __future__ import annotations

import json
import re
import shutil

import imageio.v3 as iio
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.motions import MOTIONS
from pointillist_jax.cameras import orbit
from pointillist_jax.data.capture_writer import FrameRenderer, write_capture
from pointillist_jax.data.captures import load_capture
from pointillist_jax.flame import bind_points, face_frames, flame_vertices, global_to_local, open_head
from pointillist_jax.flame.param_files import save_flame_params
from pointillist_jax.gaussians import Avatar, Gaussians, load_avatar, save_avatar
from pointillist_jax.playback import AvatarRenderer
from tests.experiments.script_program import refusals, run_script

HEAD, SIZE = open_head("coarse"), 32


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """`someone/` has one Gaussian on every face; `capture/` are photographs of it, turning and shifting."""
    root, rng = tmp_path_factory.mktemp("animate"), np.random.default_rng(0)
    canonical = HEAD.neutral_params().canonical()
    vertices = flame_vertices(HEAD, canonical)
    points, num = vertices[np.asarray(HEAD.faces)].mean(1), HEAD.num_faces
    gaussians = Gaussians(
        means=points,
        quats=jnp.asarray(rng.normal(size=(num, 4)), jnp.float32),
        scales=jnp.asarray(rng.uniform(0.002, 0.006, (num, 3)), jnp.float32),
        opacities=jnp.full(num, 0.9),
        colors=jnp.asarray(rng.uniform(size=(num, 3)), jnp.float32),
    )
    save_avatar(root / "someone", Avatar(gaussians, bind_points(HEAD, canonical, points, np.arange(num))))
    local = global_to_local(gaussians, jnp.arange(num), face_frames(vertices, HEAD.faces))
    # Rigid: where expressions bend the skin, Gaussians in triangles and skinned ones differ.
    motion = HEAD.neutral_params((3,)).replace(
        shape=canonical.shape,
        jaw_pose=jnp.tile(canonical.jaw_pose, (3, 1)),
        rotation=jnp.asarray(rng.normal(0, 0.3, (3, 3)), jnp.float32),
        translation=jnp.asarray(rng.normal(0, 0.01, (3, 3)), jnp.float32),
    )
    cameras = orbit(3, width=SIZE, height=SIZE, distance=1.0, azimuth=(-0.6, 0.9), closed=False)
    folder = root / "capture"
    folder.mkdir()
    write_capture(folder, HEAD, local, motion, canonical, cameras, FrameRenderer(HEAD), validation_camera=0)
    # The test split is a hand-held camera: one index, another place for every timestep.
    content = json.loads((folder / "transforms.json").read_text())
    content["frames"] = [f | {"camera_index": 7} for f in content["frames"] if f["timestep_index"] == f["camera_index"]]
    assert len(content["frames"]) == 3
    (folder / "transforms_test.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize("name", list(MOTIONS))
def test_built_in_motions_move_without_jumps(name):
    head = open_head("coarse")
    motion = MOTIONS[name](head, 24, 24)
    fields = ("expr", "rotation", "neck_pose", "jaw_pose", "eyes_pose", "translation")
    values = np.concatenate([np.asarray(getattr(motion, f)).reshape(24, -1) for f in fields], axis=1)
    assert np.isfinite(values).all()
    assert np.ptp(values, axis=0).max() > 0.1
    # No jumps: each frame is near the one before.
    assert np.abs(np.diff(values, axis=0)).max() < 1.01
    if name == "talk":
        assert not np.any(motion.rotation)
        assert not np.any(motion.neck_pose)


def frames_of(folder):
    return [iio.imread(path) for path in sorted(folder.glob("*.png"))]


def test_a_capture_is_filmed_by_its_own_cameras_and_folders_are_safe(root):
    common = (f"--avatar={root}/someone", f"--capture={root}/capture")
    folder, foreign = root / "frames", root / "foreign"
    foreign.mkdir()
    for i in range(3):
        iio.imwrite(foreign / f"{i:05d}.png", np.zeros((4, 4, 3), np.uint8))
    mixed = root / "mixed"
    first, again, theirs, shorter, others = run_script(
        root,
        "animate",
        (*common, f"--output={folder}"),
        (*common, f"--output={folder}"),
        (*common, f"--output={foreign}", "--overwrite"),
        (*common, "--split=val", "--capture_camera=0", f"--output={folder}", "--overwrite"),
        (*common, "--split=train", "--camera=front", "--size=40", f"--output={mixed}"),
    )
    assert first.code == 0, first.err
    found = re.search(r"3 frames, self-reenactment: PSNR ([\d.]+) dB, SSIM ([\d.]+)", first.out)
    assert found, first.out
    # Eight bits leave 59 dB at best.
    assert float(found[1]) > 45
    assert float(found[2]) > 0.995
    assert again.code == 2
    assert "give --overwrite" in again.err
    assert theirs.code == 2
    assert "did not write" in theirs.err
    assert len(frames_of(foreign)) == 3
    assert shorter.code == 0, shorter.err
    frames = frames_of(folder)
    assert len(frames) == 2  # Timesteps of the validation split; the third frame of before is gone.
    for frame in frames:
        assert frame.shape == (SIZE, 2 * SIZE, 3)
        left, right = np.split(frame.astype(int), 2, axis=1)
        assert left.std() > 20
        assert np.abs(left - right).max() <= 6
    # Another camera takes the motion alone.
    assert others.code == 0, others.err
    assert "PSNR" not in others.out
    assert [f.shape for f in frames_of(mixed)] == [(40, 40, 3)] * 2
    assert json.loads((mixed / "animation.json").read_text())["frames"] == 2


@pytest.mark.slow
def test_videos_sheets_and_paths_of_cameras(root, tmp_path):
    head, avatar = HEAD, load_avatar(root / "someone")
    # Somebody else, tracked in a room of his own.
    tracked = MOTIONS["turn"](head, 3)
    tracked = tracked.replace(shape=tracked.shape + 1.0, translation=tracked.translation + jnp.array([0.3, 0.1, 0.2]))
    save_flame_params(tmp_path / "theirs.npz", tracked, head)
    stranger = tmp_path / "stranger"
    shutil.copytree(root / "capture", stranger)
    for path in (stranger / "flame_param").iterdir():
        one = load_capture(root / "capture", head).params.timestep(int(path.stem))
        save_flame_params(path, one.replace(shape=one.shape + 1.0), head)
    common = (f"--avatar={root}/someone",)
    turning, sheet, orbiting, path, cross = run_script(
        root,
        "animate",
        (*common, "--motion=turn", "--frames=5", "--size=33", "--fps=10", f"--output={tmp_path}/turn.mp4"),
        (*common, f"--motion={tmp_path}/theirs.npz", f"--size={SIZE}", f"--output={tmp_path}/theirs.png"),
        (*common, "--motion=talk", "--frames=4", "--camera=orbit", f"--size={SIZE}", f"--output={tmp_path}/orbit"),
        (*common, "--motion=talk", f"--camera={root}/capture/transforms_test.json", f"--output={tmp_path}/path"),
        (*common, f"--capture={stranger}", "--split=test", f"--output={tmp_path}/cross.png"),
    )
    for ended in (turning, sheet, orbiting, path, cross):
        assert ended.code == 0, ended.err
    video = iio.imread(tmp_path / "turn.mp4", plugin="FFMPEG")
    assert video.shape == (5, 34, 34, 3)  # H.264 has even sides.
    assert iio.immeta(tmp_path / "turn.mp4", plugin="FFMPEG")["fps"] == pytest.approx(10)
    assert np.abs(np.diff(video.astype(int), axis=0)).max(axis=(1, 2, 3)).min() > 30
    assert "cross-reenactment" in cross.out

    def rendered(motion, cameras):
        renderer = AvatarRenderer(avatar, head, SIZE, SIZE, background=(0.93, 0.94, 0.95))
        return list(renderer.play(motion, cameras))

    def assert_same(pictures, expected):
        assert len(pictures) == len(expected)
        for a, b in zip(pictures, expected, strict=True):
            np.testing.assert_allclose(a, 255 * b, atol=1.6)

    around = orbit(4, width=SIZE, height=SIZE, distance=1.2, target=(0.0, -0.03, -0.04), azimuth=(0.0, 2 * np.pi))
    front = jax.tree.map(lambda x: x[:1], around)
    # The shape stays the avatar's, and the camera stays in front of the head.
    own = MOTIONS["turn"](head, 3)
    shown = iio.imread(tmp_path / "theirs.png")[:SIZE].astype(int)
    assert_same(np.split(shown, 3, axis=1), rendered(own, front))
    assert_same(frames_of(tmp_path / "orbit"), rendered(MOTIONS["talk"](head, 4), around))
    views = load_capture(root / "capture", head).split("test")
    their = front.replace(viewmats=jnp.asarray(views.viewmats), Ks=jnp.asarray(views.Ks))
    assert_same(frames_of(tmp_path / "path"), rendered(MOTIONS["talk"](head, 3), their))


def test_refusals_are_sentences(root, tmp_path):
    avatar, capture = f"--avatar={root}/someone", f"--capture={root}/capture"
    save_flame_params(tmp_path / "motion.npz", MOTIONS["turn"](HEAD, 2), HEAD)
    motion = f"--motion={tmp_path}/motion.npz"
    (tmp_path / "old.mp4").write_bytes(b"precious")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").write_bytes(b"")
    # A picture more than its card knows of, or somebody else's card, protects the whole folder.
    for name, maker in (("more", "experiments.animate"), ("theirs", "me")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "animation.json").write_text(json.dumps({"made_by": maker, "frames": 1}))
        for i in range(2 if name == "more" else 1):
            (tmp_path / name / f"{i:05d}.png").write_bytes(b"")
    sizes = json.loads((root / "capture/transforms_test.json").read_text())
    sizes["frames"][1]["w"] = 31
    (tmp_path / "sizes.json").write_text(json.dumps(sizes))
    refusals(
        root,
        "animate",
        {
            "--avatar is missing": (),
            "avatar.json does not exist": (f"--avatar={tmp_path}", f"--output={tmp_path}/x.mp4"),
            "must end in .mp4 or .png": (avatar, f"--output={tmp_path}/x.avi"),
            "exists; give --overwrite": (avatar, f"--output={tmp_path}/old.mp4"),
            "is a folder; name a file": (avatar, f"--output={tmp_path}/folder.mp4", "--overwrite"),
            "more holds something": (avatar, f"--output={tmp_path}/more", "--overwrite"),
            "theirs holds something": (avatar, f"--output={tmp_path}/theirs", "--overwrite"),
            "is a file; name a folder": (avatar, f"--output={tmp_path}/file", "--overwrite"),
            "must be one of turn, talk": (avatar, "--motion=dance"),
            "must be front, orbit, or a transforms.json": (avatar, "--camera=back"),
            "pictures of different sizes": (avatar, f"--camera={tmp_path}/sizes.json", f"--output={tmp_path}/x"),
            "3 cameras of 32 × 32 cannot show 2 frames": (
                avatar, motion, f"--camera={root}/capture/transforms_test.json", f"--output={tmp_path}/x"
            ),
            "--frames does nothing with a flame_param": (avatar, motion, "--frames=3"),
            "--frames does nothing with a path of several": (
                avatar, "--frames=3", f"--camera={root}/capture/transforms_test.json", f"--output={tmp_path}/x"
            ),
            "--motion does nothing with --capture": (avatar, capture, "--motion=turn"),
            "--size does nothing with --capture": (avatar, capture, "--size=64"),
            "--capture_camera does nothing with --camera": (avatar, capture, "--camera=front", "--capture_camera=1"),
            "--split does nothing without --capture": (avatar, "--split=val"),
            "--cy_from_bottom does nothing": (avatar, "--cy_from_bottom"),
            "--fps does nothing": (avatar, motion, "--fps=12", f"--output={tmp_path}/x.png"),
            "--capture_camera=3: the split 'test'": (
                avatar, capture, "--capture_camera=3", f"--output={tmp_path}/x.png"
            ),
            "nowhere": (avatar, "--capture=nowhere", f"--output={tmp_path}/x.png"),
        },
    )  # fmt: skip
    assert (tmp_path / "old.mp4").read_bytes() == b"precious"
