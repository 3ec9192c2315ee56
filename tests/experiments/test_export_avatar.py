"""`experiments.export` of avatars as a user starts it: every format read back by an independent reader, refusals."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plyfile import PlyData

from experiments.motions import MOTIONS
from pointillist_jax.data.fits import load_fit
from pointillist_jax.flame import animate, bind_points, flame_vertices, open_head
from pointillist_jax.flame.param_files import load_flame_params, save_flame_params
from pointillist_jax.gaussians import SH_C0, Avatar, Gaussians, load_avatar, load_ply, save_avatar
from pointillist_jax.splat_files import load_splat
from tests.experiments.script_program import refusals, run_script

HEAD, NUM = open_head("coarse"), 300


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """`someone/`, an avatar of a person with a shape, and `theirs.npz`, somebody else's motion of three frames."""
    root, rng = tmp_path_factory.mktemp("export"), np.random.default_rng(0)
    shape = jnp.asarray(rng.normal(0, 0.5, HEAD.shape_dirs.shape[-1]), jnp.float32)
    canonical = HEAD.neutral_params().replace(shape=shape).canonical()
    vertices = flame_vertices(HEAD, canonical)
    binding = rng.integers(0, HEAD.num_faces, NUM)
    points = vertices[np.asarray(HEAD.faces)[binding]].mean(1) + rng.normal(0, 0.003, (NUM, 3))
    quats = rng.normal(size=(NUM, 4))
    gaussians = Gaussians(
        means=jnp.asarray(points, jnp.float32),
        quats=jnp.asarray(quats / np.linalg.norm(quats, axis=1, keepdims=True), jnp.float32),
        scales=jnp.asarray(rng.uniform(0.002, 0.006, (NUM, 3)), jnp.float32),
        opacities=jnp.asarray(rng.uniform(0.1, 0.9, NUM), jnp.float32),
        colors=jnp.asarray(rng.uniform(size=(NUM, 3)), jnp.float32),
    )
    save_avatar(root / "someone", Avatar(gaussians, bind_points(HEAD, canonical, gaussians.means, binding)))
    save_flame_params(root / "theirs.npz", MOTIONS["turn"](HEAD, 3).replace(shape=shape + 1), HEAD)
    return root


@pytest.fixture(scope="module")
def ended(root):
    """All exports, by one process."""
    common = (f"--avatar={root}/someone",)
    talk = ("--motion=talk", "--frames=8", "--frame=5")
    runs = {
        "neutral.ply": ("--format=ply",),
        "talk.ply": ("--format=ply", *talk),
        "talk.splat": ("--format=splat", *talk),
        "talk.spz": ("--format=spz", *talk),
        "fit": ("--format=gaussian_avatars", f"--motion={root}/theirs.npz"),
        "still_fit": ("--format=gaussian_avatars", f"--motion={root}/theirs.npz", "--frame=2"),
        "frames": ("--format=ply_sequence", "--motion=turn", "--frames=3"),
    }
    found = run_script(root, "export", *((*common, *run, f"--output={root}/{name}") for name, run in runs.items()))
    for name, one in zip(runs, found, strict=True):
        assert one.code == 0, one.err
        assert f"{root}/{name}" in one.out
    return dict(zip(runs, found, strict=True))


def posed(root, params) -> Gaussians:
    return animate(load_avatar(root / "someone"), HEAD, params)


def talking(frame: int = 5):
    return MOTIONS["talk"](HEAD, 8).timestep(frame)


def assert_ply(path, expected: Gaussians):
    """By plyfile and the definition of the format, not by our reader."""
    (element,) = PlyData.read(str(path)).elements
    names = [p.name for p in element.properties]
    assert names == ["x", "y", "z", "nx", "ny", "nz", *(f"f_dc_{i}" for i in range(3)), "opacity",
                     *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))]  # fmt: skip
    rows = np.stack([element[name] for name in names], axis=1).astype(np.float64)
    assert len(rows) == NUM
    np.testing.assert_allclose(rows[:, :3], expected.means, atol=1e-6)
    np.testing.assert_allclose(0.5 + SH_C0 * rows[:, 6:9], expected.colors, atol=1e-6)
    np.testing.assert_allclose(1 / (1 + np.exp(-rows[:, 9])), expected.opacities, atol=1e-6)
    np.testing.assert_allclose(np.exp(rows[:, 10:13]), expected.scales, rtol=1e-5)
    np.testing.assert_allclose(rows[:, 13:], expected.quats, atol=1e-5)


def test_ply_of_any_frame(root, ended):
    assert_ply(root / "neutral.ply", posed(root, HEAD.neutral_params()))
    assert_ply(root / "talk.ply", posed(root, talking()))
    moved = np.asarray(load_ply(root / "talk.ply").means - load_ply(root / "neutral.ply").means)
    assert np.abs(moved).max() > 5e-3


def test_splat_and_spz_hold_the_same_frame(root, ended):
    gsply = pytest.importorskip("gsply")
    expected = posed(root, talking())
    splat, spz = load_splat(root / "talk.splat"), gsply.read_spz(root / "talk.spz")
    order = np.argsort(-np.asarray(expected.opacities) * np.prod(np.asarray(expected.scales), axis=1), kind="stable")
    np.testing.assert_allclose(splat.means, expected.means[order], atol=1e-6)
    np.testing.assert_allclose(splat.colors, expected.colors[order], atol=1 / 510 + 1e-5)
    np.testing.assert_allclose(spz.means, expected.means, atol=2**-17 + 1e-6)
    np.testing.assert_allclose(spz.scales, np.log(expected.scales), atol=1 / 32 + 1e-4)


def test_gaussian_avatars_folder_is_a_fit(root, ended):
    avatar = load_avatar(root / "someone")
    fit = load_fit(root / "fit", HEAD)
    np.testing.assert_array_equal(fit.gaussians.binding, avatar.rig.binding)
    # The identity is the avatar's, the motion the other person's.
    np.testing.assert_array_equal(fit.params.shape, avatar.rig.canonical.shape)
    theirs = load_flame_params(root / "theirs.npz", HEAD)
    np.testing.assert_array_equal(fit.params.rotation, theirs.rotation)
    assert fit.params.expr.shape[0] == 3
    canonical, world = fit.canonical(HEAD, float(avatar.rig.canonical.jaw_pose[0]))
    jax.tree.map(np.testing.assert_array_equal, canonical, avatar.rig.canonical)
    for name in ("means", "scales", "opacities", "colors"):
        np.testing.assert_allclose(getattr(world, name), getattr(avatar.gaussians, name), atol=2e-6)
    along = np.abs((np.asarray(world.quats) * np.asarray(avatar.gaussians.quats)).sum(1))
    np.testing.assert_allclose(along, 1, atol=1e-5)
    still = load_fit(root / "still_fit", HEAD)
    np.testing.assert_array_equal(still.params.rotation, theirs.rotation[2:])
    assert "GaussianAvatars' viewer shows only" in ended["fit"].out


def test_a_sequence_is_a_folder_of_frames(root, ended):
    folder = root / "frames"
    assert sorted(p.name for p in folder.iterdir()) == ["00000.ply", "00001.ply", "00002.ply", "animation.json"]
    card = json.loads((folder / "animation.json").read_text())
    assert (card["made_by"], card["frames"], card["fps"]) == ("experiments.export", 3, 24)
    motion = MOTIONS["turn"](HEAD, 3)
    for t in range(3):
        assert_ply(folder / f"{t:05d}.ply", posed(root, motion.timestep(t)))


def test_overwriting_replaces_only_what_export_wrote(root, ended, tmp_path):
    common = (f"--avatar={root}/someone",)
    sequence = (*common, "--format=ply_sequence", "--motion=turn", "--frames=2", f"--output={tmp_path}/frames")
    fit = (*common, "--format=gaussian_avatars", f"--output={tmp_path}/fit")
    (tmp_path / "frames").mkdir()
    for name in ("foreign", "strange"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "00000.ply").write_bytes(b"precious")
    (tmp_path / "a.ply").write_bytes(b"old")
    found = run_script(
        root, "export", sequence, sequence, (*sequence, "--frames=1", "--overwrite"), fit, fit, (*fit, "--overwrite"),
        (*sequence[:-1], f"--output={tmp_path}/foreign", "--overwrite"),
        (*fit[:-1], f"--output={tmp_path}/strange", "--overwrite"),
        (*common, "--format=ply", f"--output={tmp_path}/a.ply"),
        (*common, "--format=ply", f"--output={tmp_path}/a.ply", "--overwrite"),
    )  # fmt: skip
    assert [one.code for one in found] == [0, 2, 0, 0, 2, 0, 2, 2, 2, 0], [one.err for one in found]
    assert "exists; replace it with --overwrite" in found[1].err
    assert sorted(p.name for p in (tmp_path / "frames").iterdir()) == ["00000.ply", "animation.json"]
    for one in found[6:8]:
        assert "holds something that this script did not write" in one.err
    for name in ("foreign", "strange"):
        assert (tmp_path / name / "00000.ply").read_bytes() == b"precious"
    assert_ply(tmp_path / "a.ply", posed(root, HEAD.neutral_params()))
    assert {p.name for p in tmp_path.iterdir()} == {"frames", "fit", "foreign", "strange", "a.ply"}


def test_refusals_are_sentences(root, tmp_path):
    avatar, npz, out = f"--avatar={root}/someone", f"--motion={root}/theirs.npz", f"--output={tmp_path}/x"
    (tmp_path / "folder.ply").mkdir()
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 not really")
    refusals(
        root,
        "export",
        {
            "--avatar is missing": ("--format=ply", f"{out}.ply"),
            "--output is missing": ("--format=ply", avatar),
            "avatar.json does not exist": ("--format=ply", f"--avatar={tmp_path}", f"{out}.ply"),
            "must end in .ply": ("--format=ply", avatar, f"{out}.splat"),
            "must end in .spz": ("--format=spz", avatar, out),
            "must end in .html": ("--format=html", avatar, out),
            "writes a folder": ("--format=ply_sequence", avatar, f"{out}.ply"),
            "is a folder; name a file": ("--format=ply", avatar, f"--output={tmp_path}/folder.ply", "--overwrite"),
            "is a file; name a folder": ("--format=gaussian_avatars", avatar, f"--output={tmp_path}/file"),
            "must be one of turn, talk": ("--format=ply", avatar, "--motion=dance", f"{out}.ply"),
            "bad.npz": ("--format=ply", avatar, f"--motion={tmp_path}/bad.npz", f"{out}.ply"),
            "--frame=3: the motion has frames 0 to 2": ("--format=ply", avatar, npz, "--frame=3", f"{out}.ply"),
            "--frame does nothing without --motion": ("--format=ply", avatar, "--frame=3", f"{out}.ply"),
            "--frame does nothing with --format=ply_seq": ("--format=ply_sequence", avatar, npz, "--frame=1", out),
            "--frames does nothing with a tracked": ("--format=ply", avatar, npz, "--frames=3", f"{out}.ply"),
            "--fps does nothing to --format=ply of": ("--format=ply", avatar, npz, "--fps=30", f"{out}.ply"),
            "--checkpoint does nothing with --format=ply": ("--format=ply", avatar, "--checkpoint=x", f"{out}.ply"),
            "--avatar does nothing with --format=torch": (avatar, "--checkpoint=x", f"{out}.safetensors"),
            "--step does nothing with --import": ("--import=x", "--step=1", out),
            "format=gif": ("--format=gif",),
        },
    )
    assert {p.name for p in tmp_path.iterdir()} == {"folder.ply", "file", "bad.npz"}
