"""The quickstart in both its ways: what it writes, and that a photograph works."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

import experiments
from experiments.html_report import Section, Table, write_report
from pointillist_jax.data.fits import load_fit
from pointillist_jax.data.token_store import open_store
from pointillist_jax.files import read_json
from pointillist_jax.flame import open_head
from pointillist_jax.gaussians import load_avatar, load_ply
from tests.experiments.small_ar import environment

ROOT = Path(experiments.__file__).parent.parent


def quickstart(*arguments: str, timeout: float = 1200, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.quickstart", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, **options)


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> dict[str, str]:
    """Surroundings of runs that compile more than they compute."""
    return environment(tmp_path_factory.mktemp("compiled"), quick=True)


def check_report(page: Path) -> str:
    """Everything lies inside it: no file of this machine, no address."""
    text = page.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|player\.html|evaluation/table\.md)[^"]*"', text)
    assert str(page.parent) not in text
    return text


def moves(video: Path, frames: int, side: int) -> None:
    film = iio.imread(video, plugin="FFMPEG")
    assert film.shape == (frames, side, side, 3)
    assert np.abs(np.diff(film.astype(int), axis=0)).max(axis=(1, 2, 3)).min() > 20  # Every frame moves.


def test_the_shipped_weights_make_an_avatar_of_somebody_they_never_saw(tmp_path):
    done = quickstart("--smoke", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    for name in ("report.html", "talking.mp4", "sheet.png", "cloud.png", "avatar/", "frame.ply", "views.png"):
        assert name in done.stdout
        assert (tmp_path / name).exists()
    moves(tmp_path / "talking.mp4", 8, 96)
    avatar = load_avatar(tmp_path / "avatar")
    assert load_ply(tmp_path / "frame.ply").num_gaussians == avatar.gaussians.num_gaussians > 100
    scores = read_json(tmp_path / "scores.json", "scores")
    assert scores["views"] > 20
    text = check_report(tmp_path / "report.html")
    assert f"{scores['psnr']:.2f}" in text
    assert "never saw" in text


@pytest.mark.slow
def test_a_photograph_works_end_to_end(tmp_path):
    from skimage import data

    iio.imwrite(tmp_path / "astronaut.jpg", data.astronaut())
    done = quickstart("--smoke", f"--portrait={tmp_path}/astronaut.jpg", "--crop=70,0,300", f"--workdir={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    assert "neutral head of mean shape" in done.stdout
    assert "a photograph shows one view" in done.stdout
    moves(tmp_path / "out" / "talking.mp4", 8, 96)
    assert "synthetic likeness" in check_report(tmp_path / "out" / "report.html")
    assert not (tmp_path / "out" / "views.png").exists()


@pytest.mark.parametrize("crop", ["1,2", "0,0,9999", "-1,0,10", "a,b,c", "0,0,0"])
def test_a_crop_beyond_the_picture_is_one_sentence(tmp_path, crop):
    iio.imwrite(tmp_path / "me.png", np.zeros((20, 30, 3), np.uint8))
    done = quickstart(f"--portrait={tmp_path}/me.png", f"--crop={crop}", f"--workdir={tmp_path}/out")
    assert done.returncode == 2
    assert "must be left,top,side of a square inside" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_training_from_nothing_writes_what_it_names(tmp_path, quick):
    done = quickstart("--train", "--smoke", f"--workdir={tmp_path}", timeout=3000, env=quick)
    assert done.returncode == 0, done.stderr
    named = ("head.png", "people/gallery.png", "fits/", "tokens/", "ar/", "clouds/clouds.png", "decoder/",
             "from_portrait.mp4", "evaluation/", "splats.png", "talking.mp4", "frame.ply", "report.html")  # fmt: skip
    assert all(name in done.stdout for name in (*named, str(tmp_path)))
    for name in (*named, "people/person_0001/truth/", "ar/curve.png", "fits/person_0001/report.png"):
        assert (tmp_path / name).exists()
    head = iio.imread(tmp_path / "head.png")
    assert head.ndim == 3
    assert head.std() > 20
    portrait = load_avatar(tmp_path / "avatars" / "portrait")
    assert 0 < portrait.gaussians.num_gaussians <= 32
    assert iio.imread(tmp_path / "from_portrait.mp4", plugin="FFMPEG").shape == (8, 96, 96, 3)
    moves(tmp_path / "talking.mp4", 8, 96)
    model = open_head("coarse")
    fit = load_fit(tmp_path / "fits/person_0001", model)
    avatar = load_avatar(tmp_path / "avatar")
    np.testing.assert_array_equal(fit.gaussians.binding, avatar.rig.binding)
    frame = load_ply(tmp_path / "frame.ply")
    assert frame.num_gaussians == avatar.gaussians.num_gaussians >= model.num_faces
    assert np.abs(np.asarray(frame.means - avatar.gaussians.means)).max() > 0.01
    store = open_store(tmp_path / "tokens", flame_sha256=model.sha256)
    assert store.subjects == ("person_0000", "person_0001", "person_0002")
    text = check_report(tmp_path / "report.html")
    for name in ("people/gallery.png", "fits/person_0001/report.png"):  # The people; one of them, truth beside fit.
        assert base64.b64encode((tmp_path / name).read_bytes()).decode() in text


@pytest.mark.slow
@pytest.mark.slow
def test_training_may_end_with_truth_beside_fit(tmp_path, quick):
    done = quickstart("--train", "--until=fit", "--smoke", f"--workdir={tmp_path}", env=quick)
    assert done.returncode == 0, done.stderr
    assert "[4/4]" in done.stdout
    assert not {"tokens", "ar", "decoder"} & {path.name for path in tmp_path.iterdir()}
    text = check_report(tmp_path / "report.html")
    picture = (tmp_path / "fits/person_0001/report.png").read_bytes()  # Truth beside fit.
    assert base64.b64encode(picture).decode() in text


def test_until_does_nothing_with_pretrained_weights(tmp_path):
    done = quickstart("--until=fit", f"--workdir={tmp_path}/out")
    assert done.returncode == 2
    assert "--until does nothing without --train" in done.stderr


@pytest.mark.slow
def test_pretraining_makes_weights_that_scripts_take(tmp_path, quick):
    command = [
        sys.executable,
        "-m",
        "experiments.pretrain",
        "--smoke",
        "--num_identities=4",
        f"--workdir={tmp_path}/run",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000, env=quick)
    assert done.returncode == 0, done.stderr
    weights = tmp_path / "run" / "weights"
    assert {path.name for path in weights.iterdir()} == {"ar.npz", "decoder.npz", "example", "card.json"}
    assert (tmp_path / "run" / "evaluation" / "table.md").is_file()


def test_a_report_escapes_what_it_shows(tmp_path):
    iio.imwrite(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
    table = Table(["name", "dB"], [["<b>", "21.5"], ["x", "-3"]])
    section = Section("A & B", ["<script>"], "mind", [(tmp_path / "a.png", '"quoted"')], [table], {"a.html": "other"})
    write_report(tmp_path / "page.html", "T<", "lead", [section])
    text = (tmp_path / "page.html").read_text()
    assert "<script>" not in text
    for part in ("A &amp; B", "&lt;script&gt;", "T&lt;", "&lt;b&gt;", '<td class=number>21.5</td>', 'href="a.html"',
                 "data:image/png;base64,"):  # fmt: skip
        assert part in text
