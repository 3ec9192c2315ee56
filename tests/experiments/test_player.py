"""What the one-file player holds: all that fits, then fewer frames, then fewer points, then less of the motion."""

from __future__ import annotations

import builtins
import re

import numpy as np
import pytest

from experiments import player
from experiments.motions import MOTIONS
from experiments.player import describe, write_player
from pointillist_jax.files import UserError
from pointillist_jax.flame import open_head
from tests.experiments.plain_avatars import red_faced_avatar

HEAD = open_head("coarse")


@pytest.fixture(scope="module")
def avatar():
    return red_faced_avatar(HEAD)


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        (96 * 9000, (96, 1, 9000, 96)),
        (48 * 9000, (48, 2, 9000, 96)),
        (32 * 9000, (32, 3, 9000, 96)),
        # 8 frames a second is the least; then points go.
        (32 * 7000, (32, 3, 7000, 96)),
        # 5,000 points are the least; then the end of the motion goes.
        (20 * 5000, (20, 3, 5000, 60)),
        (2 * 5000, (2, 3, 5000, 6)),
    ],
)
def test_frames_go_first_then_points_then_the_end(records, expected):
    choice = player._choose(records, of_frames=96, of_points=9000, fps=24)
    assert (len(choice.frames), choice.stride, choice.points, choice.length) == expected
    assert choice.records <= records


def test_next_to_nothing_is_no_choice():
    assert player._choose(9000, of_frames=96, of_points=9000, fps=24) is None
    # A motion of one frame is a still picture, whatever is left of its points.
    assert player._choose(6000, of_frames=1, of_points=9000, fps=24).points == 6000
    # However well it compresses, a browser has to hold it.
    assert player._choose(1e12, of_frames=1000, of_points=100_000, fps=24).records <= 6_000_000


def test_file_stays_below_its_limit_and_holds_what_it_says(avatar, tmp_path):
    motion = MOTIONS["turn_and_talk"](HEAD, 24, 24)
    whole = write_player(tmp_path / "whole.html", avatar, HEAD, motion)
    assert (whole["frames"], whole["points"], whole["fps"]) == (24, avatar.gaussians.num_gaussians, 24)
    size = (tmp_path / "whole.html").stat().st_size
    assert whole["bytes"] == size
    assert describe(whole) == f"{size / 1e6:.1f} MB, 24 of 24 frames (24 a second), all {whole['points']:,} points"
    limit = size - 150_000
    less = write_player(tmp_path / "less.html", avatar, HEAD, motion, max_bytes=limit)
    assert (tmp_path / "less.html").stat().st_size == less["bytes"] <= limit
    assert less["frames"] in (8, 12)
    assert less["seconds"] == 1
    page = (tmp_path / "less.html").read_text()
    # It asks nobody for anything: no address outside the page but names of XML vocabularies.
    loads = re.findall(r"""(?:src|href)=["'](?!data:)([^"']{1,80})""", page)
    assert loads == []
    with pytest.raises(UserError, match=r"0\.5 MB has no room"):
        write_player(tmp_path / "none.html", avatar, HEAD, motion, max_bytes=500_000)
    assert not (tmp_path / "none.html").exists()


def test_without_viser_the_sentence_names_the_command(avatar, tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "viser":
            raise ModuleNotFoundError("No module named 'viser'", name="viser")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=re.escape("pip install -e '.[viewer]'")):
        write_player(tmp_path / "x.html", avatar, HEAD, MOTIONS["turn"](HEAD, 2))


def test_the_most_important_points_are_kept(avatar):
    scene = player._Scene(avatar, HEAD, MOTIONS["turn"](HEAD, 2), 24, (1, 1, 1), True)
    area = np.sort(np.asarray(avatar.gaussians.scales), axis=1)[:, 1:].prod(axis=1)
    first = area[scene._order[: len(area) // 3]]
    assert first.min() >= np.median(area)
