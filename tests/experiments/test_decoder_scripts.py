"""train_decoder, reconstruct and animate as a user starts them: what they refuse, what they write."""

from __future__ import annotations

import itertools

import imageio.v3 as iio
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.motions import MOTIONS
from pointillist_jax.flame import bind_points, flame_vertices, open_head
from pointillist_jax.flame.param_files import save_flame_params
from pointillist_jax.gaussians import Avatar, Gaussians, save_avatar
from tests.experiments.test_scripts import start
from tests.training.decoder_scene import write_people


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A coarse head with one Gaussian on every face."""
    head, rng = open_head("coarse"), np.random.default_rng(0)
    canonical = head.neutral_params().canonical()
    points = flame_vertices(head, canonical)[np.asarray(head.faces)].mean(1)
    num = head.num_faces
    gaussians = Gaussians(
        means=points,
        quats=jnp.asarray(rng.normal(size=(num, 4)), jnp.float32),
        scales=jnp.full((num, 3), 0.004),
        opacities=jnp.full(num, 0.9),
        colors=jnp.asarray(rng.uniform(size=(num, 3)), jnp.float32),
    )
    path = tmp_path_factory.mktemp("bundles") / "someone"
    save_avatar(path, Avatar(gaussians, bind_points(head, canonical, points, np.arange(num))))
    return path


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


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train_decoder", (), "--features and --captures are missing"),
        ("train_decoder", ("--features={people}/features", "--captures={people}"), "made with the head 'ball'"),
        ("train_decoder", ("--config.decoder.points=flame_vertices",), "no AR features"),
        ("reconstruct", ("--portrait=README.md",), "--decoder is missing"),
        ("animate", ("--avatar={bundle}", "--motion=dance"), "must be one of turn, talk"),
        ("animate", ("--avatar={bundle}", "--output={people}"), "did not write"),
    ],
)
def test_user_errors_are_sentences(tmp_path, bundle, script, arguments, message):
    if any("{people}" in a for a in arguments):
        write_people(tmp_path, captures=False)
    filled = (a.format(people=tmp_path, bundle=bundle) for a in arguments)
    done = start("-m", f"experiments.{script}", *filled)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_animate_films_motions_of_others(tmp_path, bundle):
    head = open_head("coarse")
    motion = MOTIONS["turn"](head, 3)
    # Somebody else's motion: the shape must stay the avatar's.
    other = motion.replace(shape=motion.shape.at[:].set(2.0))
    save_flame_params(tmp_path / "theirs.npz", other, head)
    save_flame_params(tmp_path / "mine.npz", motion, head)
    sheets = []
    for name in ("theirs", "mine"):
        done = start("-m", "experiments.animate", f"--avatar={bundle}", f"--motion={tmp_path}/{name}.npz",
                     "--size=48", f"--output={tmp_path}/{name}.png")  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "(3 frames)" in done.stdout
        sheets.append(iio.imread(tmp_path / f"{name}.png"))
    np.testing.assert_array_equal(*sheets)
    frames = np.split(sheets[0][:48], 3, axis=1)
    assert all(np.abs(a.astype(int) - b).max() > 60 for a, b in itertools.pairwise(frames))
