"""experiments.evaluate as a user starts it: who is scored on what, tables, baselines, ablations, going on, refusals."""

from __future__ import annotations

import json
import re
import shutil

import imageio.v3 as iio
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.trained import load_ar
from pointillist_jax.data.captures import load_capture
from pointillist_jax.data.token_store import open_store
from pointillist_jax.gaussians import load_avatar
from pointillist_jax.losses import psnr, ssim
from pointillist_jax.playback import AvatarRenderer
from tests.data.fit_files import MODEL
from tests.evaluation.test_networks import small_clip
from tests.experiments.evaluation_runs import SIZE, write_everything
from tests.experiments.script_program import refusals, run_script

# Three timesteps from three cameras, but for the portrait.
VIEWS = 3 * 3 - 1


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    write_everything(root)
    small_clip(root / "clip")
    return root


def data(root) -> list[str]:
    return [f"--ar={root}/ar", f"--store={root}/store", f"--captures={root}/captures"]


@pytest.fixture(scope="module")
def held_out(root) -> tuple[str, ...]:
    return load_ar(str(root / "ar")).held_out(open_store(root / "store"))


@pytest.fixture(scope="module")
def of_truth(root):
    """Evaluation of avatars that are the truth, by both protocols, beside all baselines."""
    (ended,) = run_script(root, "evaluate", [*data(root), f"--avatars={root}/truth", f"--fits={root}/fits",
                          f"--workdir={root}/of_truth", "--protocols=self,cross", f"--clip={root}/clip"])  # fmt: skip
    assert ended.code == 0, ended.err
    return ended


def test_the_truth_is_as_good_as_its_photographs_and_beats_every_guess(root, of_truth, held_out):
    results = json.loads((root / "of_truth/results.json").read_text())
    assert sorted(results["subjects"]) == sorted(held_out)
    own = results["protocols"]["self"]
    assert (own["people"], own["pictures"]) == (2, 2 * VIEWS)
    scores = own["scores"]
    assert list(scores) == ["ours", "mean", "mean_on_shape", "mean_image", "mean_image_on_shape", "nearest",
                            "nearest_on_shape", "nearest_shape"]  # fmt: skip
    # Files hold 256 levels; the truth is the avatar they were rendered from.
    assert scores["ours"]["psnr"] > 50
    assert scores["ours"]["ssim"] > 0.999
    for name in list(scores)[1:]:
        assert 3 < scores[name]["psnr"] < 40
        assert own["first_is_better"][name] == {
            "psnr": [2, 2],
            "ssim": [2, 2],
            "clip": own["first_is_better"][name]["clip"],
        }
    # Two people make the mean: their mean picture is no worse than the worse of the two.
    assert results["baselines"]["people in mean_image"] == 2
    crossed = results["protocols"]["cross"]
    a, b = sorted(held_out)
    assert crossed["drivers"] == {a: b, b: a}
    assert set(crossed["scores"]["ours"]) == {"clip"}
    assert -1 <= crossed["scores"]["ours"]["clip"] <= 1
    assert own["drivers"] == {a: a, b: b}


def test_tables_state_what_is_there_and_what_is_missing(root, of_truth):
    table = (root / "of_truth/table.md").read_text()
    scores = json.loads((root / "of_truth/results.json").read_text())["protocols"]["self"]["scores"]
    row = re.search(r"^\| ours \| ([\d.]+) \| ([\d.]+) \| (-?[\d.]+) \|", table, re.MULTILINE)
    assert [float(x) for x in row.groups()] == [round(scores["ours"]["psnr"], 2), round(scores["ours"]["ssim"], 4),
                                                round(scores["ours"]["clip"], 4)]  # fmt: skip
    for missing in (
        "**LPIPS**: not available: torchvision's vgg16-397923af.pth with --vgg",
        "**FID**: not available: weights-inception-2015-12-05-6726825d.pth with --inception",
        "**AKD px**: not available: face_landmarker.task with --face_landmarker",
        "**APD °**: not available: 6DRepNet_300W_LP_AFLW2000.pth with --sixdrepnet",
    ):
        assert missing in table
    assert "CLIP**: not available" not in table
    assert f"2 held-out people, {2 * VIEWS} pictures of 32 × 32 on white" in table
    for line in ("Self-reenactment", "LPIPS: not available"):
        assert line in of_truth.out
    # A row of six views and the portrait for the photographs and each of eight methods, enlarged to 160 pixels.
    for name in ("self/p0", "cross/p0"):
        path = root / f"of_truth/pictures/{name}.png"
        if path.is_file():
            assert iio.imread(path).shape == (9 * (160 + 18), 7 * 160, 3)
    assert (root / "of_truth/pictures/overview_self.png").is_file()


def test_scores_are_those_of_the_written_avatars(root, held_out, tmp_path):
    """Avatars from portraits, two decoders beside each other; then one person again, and another one."""
    run = [*data(root), f"--decoder={root}/compared", "--ablations=all", "--baselines=none", "--max_points=12",
           "--views=5", f"--workdir={tmp_path}/out"]  # fmt: skip
    (ended,) = run_script(root, "evaluate", run)
    assert ended.code == 0, ended.err
    results = (tmp_path / "out/results.json").read_bytes()
    scores = json.loads(results)["protocols"]["self"]["scores"]
    assert list(scores) == ["full", "flame_vertices"]
    name = sorted(held_out)[0]
    counts = {m: load_avatar(tmp_path / f"out/avatars/{m}/{name}").gaussians.num_gaussians for m in scores}
    assert 0 < counts["full"] <= 12
    assert counts["flame_vertices"] == MODEL.num_vertices
    card = json.loads((tmp_path / f"out/scores/self/{name}.json").read_text())
    assert len(card["views"]) == 5
    capture = load_capture(root / "captures" / name, MODEL)
    for method in scores:
        renderer = AvatarRenderer(load_avatar(tmp_path / f"out/avatars/{method}/{name}"), MODEL, SIZE, SIZE)
        for n, view in enumerate(card["views"]):
            split = capture.split(view["split"])
            times = capture.timestep_indices[split.timesteps]
            (row,) = np.flatnonzero((split.camera_indices == view["camera"]) & (times == view["timestep"]))
            pose = capture.params.timestep(int(split.timesteps[row]))
            found = jnp.asarray(renderer(pose, split.viewmats[row], split.Ks[row]))
            truth = jnp.asarray(split.image(int(row)))
            assert card["scores"][method]["psnr"][n] == pytest.approx(float(psnr(found, truth)), abs=2e-3)
            assert card["scores"][method]["ssim"][n] == pytest.approx(float(ssim(found, truth)), abs=2e-4)

    # A kill before the last person was scored, and before an avatar was written.
    other = sorted(held_out)[1]
    (tmp_path / f"out/scores/self/{other}.json").unlink()
    shutil.rmtree(tmp_path / f"out/avatars/full/{other}")
    kept = (tmp_path / f"out/scores/self/{name}.json").stat().st_mtime_ns
    (tmp_path / "out/results.json").unlink()
    resumed, changed, again = run_script(
        root, "evaluate", [*run, "--resume"], [*run, "--resume", "--views=4"], run
    )  # fmt: skip
    assert resumed.code == 0, resumed.err
    assert (tmp_path / "out/results.json").read_bytes() == results
    assert (tmp_path / f"out/scores/self/{name}.json").stat().st_mtime_ns == kept
    assert changed.code == again.code == 2
    assert "was made with another views: start anew with --overwrite" in changed.err
    assert "is not empty" in again.err


def test_refusals_are_sentences(root, held_out, tmp_path):
    seen = next(name for name in ("p0", "p1", "p2", "p3") if name not in held_out)
    (tmp_path / "other").mkdir()
    shutil.copytree(root / f"fits/{held_out[0]}", tmp_path / "fits" / seen)
    shutil.copytree(root / "truth" / held_out[0], tmp_path / "avatars" / held_out[0])
    made = [*data(root), f"--workdir={tmp_path}/out", f"--avatars={root}/truth"]
    drawn = [*data(root), f"--workdir={tmp_path}/out", f"--decoder={root}/decoder", "--baselines=none"]
    refusals(
        root,
        "evaluate",
        {
            "--ar is missing": [],
            "--store is missing": [f"--ar={root}/ar"],
            "--captures is missing": data(root)[:2],
            "give either --decoder": data(root),
            "--fits is missing": made,
            "/nowhere holds no fits": [*made, "--fits=/nowhere"],
            "must be some of self, cross": [*made, "--protocols=own"],
            "must be some of mean": [*made, "--baselines=median"],
            "--temperature does nothing with --avatars": [*made, "--temperature=0.5"],
            "--ablations does nothing with --avatars": [*made, "--ablations=all"],
            "--mean_of does nothing without the baseline mean_image": [*made, "--baselines=none", "--mean_of=3"],
            f"was trained on {seen}": [*drawn, f"--subjects={seen}"],
            "holds no subject 'nobody'": [*drawn, "--subjects=nobody"],
            "holds none of full": [*drawn, "--ablations=all"],
            "holds no bundle of": [*data(root), f"--avatars={tmp_path}/avatars", "--baselines=none",
                                   f"--workdir={tmp_path}/out"],
            "is another fit of": [*made, f"--fits={tmp_path}/fits", "--baselines=mean"],
            "needs two people": [*drawn, f"--subjects={held_out[0]}", "--protocols=cross", "--max_points=4"],
            "is not a folder with config.json": [*drawn, f"--clip={tmp_path}"],
        },
    )  # fmt: skip
    # All of it before anything is written.
    assert not (tmp_path / "out").exists()
