"""Tracker output where scripts take it: --tracker of generate and reconstruct, --motion of animate and export."""

from __future__ import annotations

import functools

import imageio.v3 as iio
import jax
import numpy as np
import pytest
from absl import flags

from experiments.motions import MOTIONS, check_motion, load_motion
from experiments.portraits import PortraitFlags
from pointillist_jax.convert import flame_params_from_tracker
from pointillist_jax.data.token_store import StoreSpec
from pointillist_jax.files import UserError
from pointillist_jax.flame import open_head
from pointillist_jax.flame.param_files import save_flame_params
from pointillist_jax.tokens import PointTokenizer

HEAD = open_head("coarse")


def test_motions_come_from_files_and_folders(tmp_path):
    truth = MOTIONS["turn_and_talk"](HEAD, 3)
    truth = truth.replace(shape=truth.shape[0])
    save_flame_params(tmp_path / "one.npz", truth, HEAD)
    for t in range(3):
        save_flame_params(tmp_path / "export/flame_param" / f"{t:05d}.npz", truth.timestep(t), HEAD)
    for name in ("one.npz", "export"):
        assert not check_motion(str(tmp_path / name))
        # Tracked motions have their own length.
        found = load_motion(str(tmp_path / name), HEAD, frames=99, fps=24)
        jax.tree.map(np.testing.assert_array_equal, found, truth)
    assert check_motion("turn")
    assert load_motion("turn", HEAD, 5, 24).expr.shape[0] == 5
    with pytest.raises(UserError, match=r"--motion=dance must be one of turn, talk, .*\.frame"):
        check_motion("dance")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no tracker output"):
        load_motion(str(tmp_path / "empty"), HEAD, 5, 24)


@pytest.fixture
def read(tmp_path, monkeypatch):
    """What --portrait and --tracker give, for a head."""
    # Flags of their own: a process has each name once, and other tests import scripts.
    values = flags.FlagValues()
    for name in ("DEFINE_string", "DEFINE_integer"):
        monkeypatch.setattr(flags, name, functools.partial(getattr(flags, name), flag_values=values))
    monkeypatch.setattr(flags, "FLAGS", values)
    portrait_flags = PortraitFlags()
    iio.imwrite(tmp_path / "me.png", np.full((20, 16, 3), 200, np.uint8))

    def read(head, *arguments):
        spec = StoreSpec(PointTokenizer(num_faces=head.num_faces), head.sha256, head.source, portrait_size=14)
        values.unparse_flags()
        for name in ("tracker", "tracker_flame", "timestep"):
            values[name].unparse()
        values(["script", f"--portrait={tmp_path}/me.png", *arguments])
        portrait_flags.check()
        return portrait_flags.read(spec, head)

    return read


def test_a_portrait_with_an_export_and_its_timestep(read, tmp_path):
    truth = MOTIONS["turn_and_talk"](HEAD, 3)
    truth = truth.replace(shape=truth.shape[0] + 0.5)
    for t in range(3):
        save_flame_params(tmp_path / "export/flame_param" / f"{t:05d}.npz", truth.timestep(t), HEAD)
    portrait = read(HEAD, f"--tracker={tmp_path}/export", "--timestep=2")
    jax.tree.map(np.testing.assert_array_equal, portrait.tracked, truth.timestep(2))
    assert portrait.image.shape == (14, 14, 3)
    np.testing.assert_array_equal(portrait.condition["flame"]["shape"], truth.shape)
    with pytest.raises(UserError, match="holds 3 timesteps; --timestep=3 is none"):
        read(HEAD, f"--tracker={tmp_path}/export", "--timestep=3")
    with pytest.raises(UserError, match="--tracker_flame does nothing without --tracker"):
        read(HEAD, "--tracker_flame=x.pkl")


def test_a_portrait_tracked_by_pixel3dmm(read, rng, tmp_path):
    pytest.importorskip("torch")
    from tests.convert.tracker_files import loaded, somebody, write_editions, write_pixel3dmm

    editions = write_editions(tmp_path)
    old, new = loaded(editions.old), loaded(editions.new)
    folder = write_pixel3dmm(tmp_path / "tracked", old, somebody(rng, old), meshes=False)
    with pytest.raises(UserError, match="--tracker_flame of reconstruct"):
        read(new, f"--tracker={folder}")
    portrait = read(new, f"--tracker={folder}", f"--tracker_flame={editions.old}")
    expected = flame_params_from_tracker(folder, new, tracker_head=old).timestep(0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), portrait.tracked, expected)
    assert np.abs(np.asarray(portrait.tracked.shape)).max() > 0.1
