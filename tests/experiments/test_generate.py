"""`experiments.generate` as a user starts it: clouds of a portrait and of a store's people, and how it refuses."""

from __future__ import annotations

import json

import imageio.v3 as iio
import numpy as np
import pytest

from pointillist_jax.data.token_store import open_store
from pointillist_jax.files import ArraySpec, read_npz
from pointillist_jax.flame import open_head
from pointillist_jax.flame.param_files import save_flame_params
from pointillist_jax.gaussians import load_ply
from tests.experiments.small_ar import start, write_ar, write_people


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("generate")
    write_ar(root / "ar", write_people(root / "store", 5))
    rng = np.random.default_rng(0)
    iio.imwrite(root / "me.png", rng.integers(0, 256, (20, 16, 4), dtype=np.uint8))
    head = open_head("coarse")
    neutral = head.neutral_params()
    save_flame_params(root / "me.npz", neutral.replace(shape=neutral.shape + 1.0), head)
    return root


def tokens_of(folder):
    arrays = {"tokens": ArraySpec(("T",), "int"), "points": ArraySpec(("P", 3)), "binding": ArraySpec(("P",), "int")}
    return read_npz(folder / "tokens.npz", arrays, "tokens")


def test_people_of_a_store_beside_the_truth(root):
    done = start(root, "generate", f"--ar={root / 'ar'}", f"--store={root / 'store'}", f"--workdir={root / 'clouds'}",
                 "--prefix=5", "--max_points=30", "--seed=3")  # fmt: skip
    assert done.returncode == 0, done.stderr
    store, head = open_store(root / "store"), open_head("coarse")
    folders = sorted(path.name for path in (root / "clouds").iterdir() if path.is_dir())
    assert len(folders) == 2  # Those that the training held out.
    assert (root / "clouds/clouds.png").is_file()
    for name in folders:
        folder = root / "clouds" / name
        found = tokens_of(folder)
        points, binding = store.tokenizer.decode(found["tokens"])
        np.testing.assert_array_equal(found["points"], points)
        np.testing.assert_array_equal(found["binding"], binding)
        truth = store.tokens(store.index(name))
        np.testing.assert_array_equal(found["tokens"][:24], truth[:24])
        card = json.loads((folder / "card.json").read_text())
        assert card["points"] == len(points)
        assert card["prefix_points"] == 5
        assert card["truth_points"] == (len(truth) - 8) // 4
        assert card["stop_reason"] in ("eos", "max_points")
        assert (card["points"] == 30) >= (card["stop_reason"] == "max_points")
        assert card["log_prob"] < 0 < card["points_per_s"]
        assert 0 <= card["masked_mass"] <= 1
        assert card["settings"]["seed"] == 3
        assert card["checkpoint"]["step"] == 7
        splats = load_ply(folder / "cloud.ply")
        np.testing.assert_allclose(splats.means, points, atol=1e-6)
        # One colour per part of the head.
        colors, regions = np.asarray(splats.colors), np.asarray(head.face_regions)[binding]
        for region in set(regions):
            assert np.ptp(colors[regions == region], axis=0).max() < 1e-5
        assert len(np.unique(colors.round(3), axis=0)) == len(set(regions))
        picture = iio.imread(folder / "cloud.png")
        assert picture.shape == (2 * 274, 4 * 256, 3)
        assert f"{name} " in done.stdout


def test_a_portrait_with_and_without_tracker(root):
    common = (f"--ar={root / 'ar'}", f"--portrait={root / 'me.png'}", "--max_points=6")
    neutral = start(root, "generate", *common, f"--workdir={root / 'neutral'}")
    assert neutral.returncode == 0, neutral.stderr
    assert "warning: no --tracker" in neutral.stdout
    card = json.loads((root / "neutral/me/card.json").read_text())
    assert "truth_points" not in card
    again = start(root, "generate", *common, f"--workdir={root / 'neutral'}", "--resume", "--seed=1")
    assert again.returncode == 2
    assert "generated with other settings" in again.stderr
    tracked = start(root, "generate", *common, f"--workdir={root / 'tracked'}", f"--tracker={root / 'me.npz'}")
    assert tracked.returncode == 0, tracked.stderr
    assert "warning" not in tracked.stdout
    other = json.loads((root / "tracked/me/card.json").read_text())
    assert other["log_prob"] != card["log_prob"]  # The head is part of the condition.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--portrait=me.png",), "--ar is missing"),
        (("--ar=AR", "--portrait=me.png", "--store=STORE"), "either --portrait"),
        (("--ar=AR", "--store=STORE", "--subjects=nobody"), "no subject 'nobody'"),
    ],
)
def test_user_errors_are_sentences(root, arguments, message):
    named = [a.replace("AR", str(root / "ar")).replace("STORE", str(root / "store")) for a in arguments]
    done = start(root, "generate", *named, f"--workdir={root / 'refused'}")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
