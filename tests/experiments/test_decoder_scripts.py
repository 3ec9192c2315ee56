"""train_decoder and reconstruct as a user starts them: comparisons, cross-attention, avatars, refusals."""

from __future__ import annotations

import json
import re

import imageio.v3 as iio
import jax
import numpy as np
import pytest

from pointillist_jax.data.point_features import FeatureSet
from pointillist_jax.flame import open_head
from pointillist_jax.gaussians import load_avatar
from pointillist_jax.training.checkpoints import load_params
from tests.experiments.decoder_runs import small, write_everything
from tests.experiments.script_program import refusals, run_script
from tests.training.decoder_scene import write_people

PARTS = {"full": {"position_mlp", "feature_mlp"}, "ar_only": {"feature_mlp"}, "position_only": {"position_mlp"},
         "flame_vertices": {"position_mlp"}, "mean_colour": set()}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("stage_two")
    write_everything(root)
    return root


def data(root) -> list[str]:
    return [f"--features={root}/features", f"--captures={root}/captures"]


def cross(root) -> list[str]:
    """The decoder reads the AR model's context."""
    return ["--config.decoder.cross_attention", f"--ar={root}/ar", f"--store={root}/store"]


@pytest.fixture(scope="module")
def two(root):
    """What a comparison of two variants in `compared/` said."""
    workdir = f"--workdir={root}/compared"
    (two,) = run_script(root, "train_decoder", [*data(root), *small(), workdir, "--compare=full,flame_vertices"])
    assert two.code == 0, two.err
    return two


@pytest.fixture(scope="module")
def compared(root, two):
    """The same, continued as one of all: what both said. The first's checkpoints are not written again."""
    workdir, newest = f"--workdir={root}/compared", root / "compared/full/checkpoints/4"
    written = newest.stat().st_mtime_ns
    (every,) = run_script(root, "train_decoder", [*data(root), *small(), workdir, "--compare=all", "--resume"])
    assert every.code == 0, every.err
    assert newest.stat().st_mtime_ns == written
    return two, every


@pytest.mark.slow
def test_compare_trains_every_variant_and_prints_one_table(root, compared):
    two, every = compared
    workdir, names = root / "compared", ["full", "ar_only", "position_only", "flame_vertices", "mean_colour"]
    table = json.loads((workdir / "table.json").read_text())
    assert list(table) == names
    assert "2 training people, 2 unseen" in every.out
    streams = ("views", "expressions", "people", "people_expressions")
    for said, rows in ((two.out, ("full", "flame_vertices")), (every.out, names)):
        printed = dict(re.findall(r"^  (\w+) +((?:[\d.]+ / -?[\d.]+ *)+)$", said, re.MULTILINE))
        assert list(printed) == list(rows)
        for name in rows:
            cells = [tuple(map(float, cell.split(" / "))) for cell in re.split(r"  +", printed[name].strip())]
            scores = table[name]
            assert cells == [(round(scores[f"{s}_psnr"], 2), round(scores[f"{s}_ssim"], 4)) for s in streams]
    features, head = FeatureSet(root / "features"), open_head("coarse")
    for name in names:
        card = json.loads((workdir / name / "card.json").read_text())
        assert card["scores"] == table[name]
        assert (card["inputs"], card["points"]) == {
            "full": ("both", "ar"), "ar_only": ("ar_only", "ar"), "position_only": ("position_only", "ar"),
            "flame_vertices": ("position_only", "flame_vertices"), "mean_colour": ("none", "ar"),
        }[name]  # fmt: skip
        params, _ = load_params(workdir / name)
        assert set(params) & {"position_mlp", "feature_mlp"} == PARTS[name]
        for subject in features.subjects:
            expected = head.num_vertices if name == "flame_vertices" else features.load(subject).num_points
            assert card["num_points"][subject] == expected
        assert (workdir / name / "curve.png").is_file()
        strips = {path.name for path in (workdir / name / "strips").iterdir()}
        assert strips == {f"{step:06d}_{stream}.png" for step in (2, 4) for stream in streams}
    # Different models: no two rows agree.
    assert len({json.dumps(scores) for scores in table.values()}) == 5


@pytest.mark.slow
def test_the_tables_scores_are_those_of_the_filmed_avatars(root, two, tmp_path):
    """train_decoder's held-out views, scored again by reconstruct and animate: other programs on the same pictures."""
    features = FeatureSet(root / "features")
    people = features.spec.held_out
    (made,) = run_script(root, "reconstruct", [f"--decoder={root}/compared/full", f"--features={root}/features",
                         f"--store={root}/store", f"--workdir={tmp_path}/avatars"])  # fmt: skip
    assert made.code == 0, made.err
    for name in features.subjects:
        avatar, cloud = load_avatar(tmp_path / "avatars" / name), features.load(name)
        np.testing.assert_array_equal(avatar.rig.binding, cloud.binding)
        offsets = np.asarray(avatar.gaussians.means) - cloud.points
        assert 0 < np.abs(offsets).max() <= 0.1 + 1e-6
        assert iio.imread(tmp_path / "avatars" / f"{name}.png").shape == (256, 768, 3)
    scores = json.loads((root / "compared/full/card.json").read_text())["scores"]
    filmed = run_script(root, "animate", *(
        [f"--avatar={tmp_path}/avatars/{name}", f"--capture={root}/captures/{name}", "--split=val",
         f"--output={tmp_path}/{name}.png"] for name in people
    ))  # fmt: skip
    found = [re.search(r"self-reenactment: PSNR ([\d.]+) dB, SSIM (-?[\d.]+)", one.out) for one in filmed]
    assert all(found), filmed
    decibels, similarity = np.mean([(float(f[1]), float(f[2])) for f in found], axis=0)
    assert decibels == pytest.approx(scores["people_psnr"], abs=0.011)
    assert similarity == pytest.approx(scores["people_ssim"], abs=2e-4)


@pytest.mark.slow
def test_cross_attention_trains_and_reconstructs(root, tmp_path):
    workdir = f"--workdir={tmp_path}/decoder"
    (trained,) = run_script(root, "train_decoder", [*data(root), *small(), *cross(root), workdir])
    assert trained.code == 0, trained.err
    params, meta = load_params(tmp_path / "decoder")
    assert meta["config"]["decoder"]["context_width"] == 16
    assert np.abs(jax.tree.leaves(params["layers"]["cross_attention"])[0]).max() > 0
    features = [f"--decoder={tmp_path}/decoder", f"--features={root}/features", f"--store={root}/store",
                f"--workdir={tmp_path}/avatars"]  # fmt: skip
    portrait = [f"--decoder={tmp_path}/decoder", f"--ar={root}/ar", f"--portrait={root}/me.png", "--max_points=6"]
    without, of_features, of_portrait = run_script(
        root,
        "reconstruct",
        [*features, "--subjects=p1"],
        [*features, f"--ar={root}/ar", "--subjects=p1,p3"],
        [*portrait, f"--workdir={tmp_path}/avatars"],
    )
    assert without.code == 2
    assert "cross-attention to the AR model's context: name that model with --ar" in without.err
    assert of_features.code == 0, of_features.err
    assert of_portrait.code == 0, of_portrait.err
    assert {p.name for p in (tmp_path / "avatars").iterdir() if p.is_dir()} == {"p1", "p3", "me"}
    assert 0 < load_avatar(tmp_path / "avatars/me").gaussians.num_gaussians <= 6
    # Resumed without it, this would be another model.
    (again,) = run_script(root, "train_decoder", [*data(root), *small(), workdir, "--resume"])
    assert again.code == 2
    assert "decoder.cross_attention" in again.err


@pytest.mark.slow
def test_a_portrait_at_a_timestep_of_its_tracker(root, two, tmp_path):
    common = [f"--decoder={root}/compared/full", f"--ar={root}/ar", f"--portrait={root}/me.png", "--max_points=6"]
    tracker = f"--tracker={root}/me.npz"
    first, second, neutral, beyond = run_script(
        root,
        "reconstruct",
        [*common, tracker, f"--workdir={tmp_path}/first"],
        [*common, tracker, "--timestep=1", f"--workdir={tmp_path}/second"],
        [*common, f"--workdir={tmp_path}/neutral"],
        [*common, tracker, "--timestep=2", f"--workdir={tmp_path}/beyond"],
    )
    for ended in (first, second, neutral):
        assert ended.code == 0, ended.err
    assert "warning: no --tracker" in neutral.out
    assert "warning" not in first.out
    assert beyond.code == 2
    assert "holds 2 timesteps; --timestep=2 is none" in beyond.err
    a, b, c = (load_avatar(tmp_path / name / "me") for name in ("first", "second", "neutral"))
    # One identity in the canonical pose; another expression is another condition.
    for x, y in zip(*map(jax.tree.leaves, (a.rig.canonical, b.rig.canonical)), strict=True):
        np.testing.assert_array_equal(x, y)
    assert np.abs(a.rig.canonical.shape - c.rig.canonical.shape).max() == 1
    assert a.gaussians.means.shape != b.gaussians.means.shape or np.abs(a.gaussians.means - b.gaussians.means).max() > 0


@pytest.mark.slow
def test_reconstruct_looks_before_it_draws(root, two, tmp_path):
    common = [f"--decoder={root}/compared/full", f"--workdir={tmp_path}"]
    features = [*common, f"--features={root}/features", f"--store={root}/store"]
    portrait = [*common, f"--ar={root}/ar", f"--portrait={root}/me.png"]
    (tmp_path / "p3.png").write_bytes(b"mine")
    (tmp_path / "p2").mkdir()
    refusals(
        root,
        "reconstruct",
        {
            "p3.png exists; give --overwrite": [*features, "--subjects=p1,p3"],
            "p2 exists and is no avatar bundle": [*features, "--subjects=p1,p2", "--overwrite"],
            "no features of 'nobody'": [*features, "--subjects=p1,nobody"],
            "is the portrait itself": [*portrait, f"--workdir={root}", "--overwrite"],
            "--subjects does nothing with --portrait": [*portrait, "--subjects=p1"],
            "--temperature does nothing with --features": [*features, "--temperature=0.5"],
            "--ar does nothing with --features": [*features, f"--ar={root}/ar"],
            "--tracker does nothing without --portrait": [*features, f"--tracker={root}/me.npz"],
            "--timestep does nothing without --tracker": [*portrait, "--timestep=1"],
            "either --portrait": common,
            "--features needs --store": [*common, f"--features={root}/features"],
            "an ablation without clouds": [*features, f"--decoder={root}/compared/flame_vertices"],
        },
    )
    assert {path.name for path in tmp_path.iterdir()} == {"p3.png", "p2"}
    assert (tmp_path / "p3.png").read_bytes() == b"mine"


def test_refusals_are_sentences(tmp_path):
    write_people(tmp_path, captures=False)
    mine = [f"--features={tmp_path}/features", f"--captures={tmp_path}"]
    refusals(
        tmp_path,
        "train_decoder",
        {
            "--features and --captures are missing": [],
            "made with the head 'ball'": mine,
            "no AR features": ["--config.decoder.points=flame_vertices"],
            "none of all, full": [*mine, "--compare=best"],
            "--config.decoder.inputs does nothing with --compare": ["--compare=all", "--config.decoder.inputs=ar_only"],
            "--config.decoder.context_width does nothing": ["--config.decoder.context_width=3"],
            "--config.data.held_out does nothing": ["--config.data.held_out=3"],
            "--config.decoder.train.z_loss does nothing": ["--config.decoder.train.z_loss=0.1"],
            "--ar does nothing without": [f"--ar={tmp_path}"],
            "--vgg does nothing": ["--vgg=x.pth", "--config.decoder.lambda_lpips=0"],
            "--store does nothing without": [f"--store={tmp_path}"],
        },
    )
    refusals(tmp_path, "reconstruct", {"--decoder is missing": ["--portrait=README.md"]})
