"""Which views are compared: all but the portrait, spread over the capture, the same whoever else is evaluated."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pointillist_jax.data.captures import load_capture
from pointillist_jax.data.images import square_portrait
from pointillist_jax.data.token_store import FLAME_FIELDS
from pointillist_jax.evaluation import protocols
from pointillist_jax.files import UserError
from tests.fitting.scenes import ball_head, write_person

HEAD = ball_head()


@pytest.fixture(scope="module")
def capture(tmp_path_factory):
    root = tmp_path_factory.mktemp("protocols")
    write_person(root / "ann", 0)
    return load_capture(root / "ann", HEAD)


def portrait_of(views: protocols.Views, n: int, side: int = 20) -> dict:
    """The condition of somebody whose portrait is view n."""
    split = views.capture.split(views.splits[n])
    params = views.capture.params.timestep(int(views.timesteps[n]))
    flame = {name: np.asarray(getattr(params, name)) for name in FLAME_FIELDS}
    return {"portrait": square_portrait(split.rgba(int(views.rows[n])), side), "flame": flame}


def test_views_are_all_of_the_captures(capture):
    views = protocols.all_views(capture)
    assert len(views) == sum(len(split) for split in capture.splits.values())
    n = len(views) - 1
    split = capture.split(views.splits[n])
    row = int(views.rows[n])
    np.testing.assert_array_equal(views.viewmats[n], split.viewmats[row])
    np.testing.assert_array_equal(views.subset([n]).photographs()[0], split.image(row))
    np.testing.assert_array_equal(views.params.expr[n], capture.params.expr[split.timesteps[row]])
    assert views.describe()[n] == {
        "split": views.splits[n], "camera": int(split.camera_indices[row]),
        "timestep": int(capture.timestep_indices[split.timesteps[row]]),
    }  # fmt: skip
    assert views.size == tuple(split.sizes[row])


def test_the_portrait_alone_is_left_out(capture):
    views = protocols.all_views(capture)
    for n in (0, len(views) // 2, len(views) - 1):
        condition = portrait_of(views, n)
        kept = protocols.held_out_views(views, condition)
        expected = [one for i, one in enumerate(views.describe()) if i != n]
        assert kept.describe() == expected
        # Another head, or the same head from elsewhere, is no view of the capture.
        moved = {**condition["flame"], "jaw_pose": condition["flame"]["jaw_pose"] + 0.01}
        assert len(protocols.held_out_views(views, {**condition, "flame": moved})) == len(views)
        elsewhere = {**condition, "portrait": 255 - condition["portrait"]}
        assert len(protocols.held_out_views(views, elsewhere)) == len(views)


def test_chosen_views_are_spread_over_cameras_and_belong_to_the_person(capture):
    views = protocols.all_views(capture)
    cameras = len(np.unique(views.cameras))
    few = protocols.chosen_views(views, cameras, 0)
    assert sorted(few.cameras.tolist()) == sorted(np.unique(views.cameras).tolist())
    assert few.describe() == protocols.chosen_views(views, cameras, 0).describe()
    assert few.describe() != protocols.chosen_views(views, cameras, 1).describe()
    # More views keep the first ones.
    more = protocols.chosen_views(views, cameras + 3, 0).describe()
    assert all(view in more for view in few.describe())
    renamed = protocols.Views(dataclasses.replace(capture, subject="bob"), views.splits, views.rows)
    assert protocols.chosen_views(renamed, cameras, 0).describe() != few.describe()
    assert protocols.chosen_views(views, 0, 0).describe() == views.describe()
    assert protocols.chosen_views(views, 999, 0).describe() == views.describe()


def test_everybody_drives_one_and_is_driven_by_one():
    pairs = protocols.cross_pairs(["c", "a", "b"])
    assert pairs == {"a": "b", "b": "c", "c": "a"}
    with pytest.raises(UserError, match="two people"):
        protocols.cross_pairs(["a"])
