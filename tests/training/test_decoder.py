"""Stage two: capacity that grows, meshes, bitwise resume, kills; what subjects' batches hold."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from pointillist_jax.data.subject_views import FeatureClouds, SubjectViews, TemplateClouds, subject_batches
from pointillist_jax.files import UserError
from pointillist_jax.flame import flame_vertices
from pointillist_jax.training.checkpoints import Checkpoints, load_params
from pointillist_jax.training.metric_log import read_metrics
from pointillist_jax.training.state import TrainState
from tests.training.decoder_scene import CONFIG, open_people, write_people

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    root = tmp_path_factory.mktemp("people")
    write_people(root)
    return root


@pytest.fixture(scope="module")
def opened(people):
    return open_people(people)


def sources(opened, **options):
    _, features, captures = opened
    options = {"views": 2, "seed": 1} | options
    return SubjectViews(captures, FeatureClouds(features), **options)


def test_records_are_the_subjects(opened):
    _, features, captures = opened
    source = sources(opened)
    assert source.max_points == 256
    # Every pass shows every view, grouped anew.
    groups = source.groups_per_epoch
    seen = [set(), set()]
    for i in range(2 * groups):
        record = source[i]
        for t, c in zip(record["timestep"], record["camera"], strict=True):
            seen[i // groups].add((int(record["subject"]), int(t), int(c)))
    views = {
        (s, int(t), int(c))
        for s, capture in enumerate(captures)
        for t, c in zip(capture.split("train").timesteps, capture.split("train").camera_indices, strict=True)
    }
    assert seen == [views, views]
    assert [source[i]["camera"].tolist() for i in range(groups)] != [
        source[groups + i]["camera"].tolist() for i in range(groups)
    ]
    record = source[3]
    cloud, capture = features.load(source.subjects[record["subject"]]), captures[record["subject"]]
    n = record["num_points"]
    assert n == cloud.num_points
    for name in ("points", "binding", "hidden"):
        np.testing.assert_array_equal(record[name][:n], getattr(cloud, name))
    assert record["hidden"].shape == (256, 4, 6)
    np.testing.assert_array_equal(record["canonical"]["shape"], capture.params.shape)
    np.testing.assert_allclose(record["canonical"]["jaw_pose"], [0.3, 0, 0])
    np.testing.assert_array_equal(record["flame"]["expr"][1], capture.params.expr[record["timestep"][1]])


def test_evaluation_sees_every_view_once(opened):
    source = sources(opened, split="test", shuffle=False, views=4)
    batches = list(subject_batches(source, 4))
    weights = np.concatenate([b["weight"] for b in batches])
    assert weights.sum() == 10
    assert len(sources(opened, split="test", shuffle=False, views=4, limit=3)) == 2
    with pytest.raises(UserError, match=r"bob has 75 points, more than decoder\.max_points=72"):
        sources(opened, max_points=72)


def test_template_clouds_are_the_canonical_vertices(opened):
    head, _, captures = opened
    clouds = TemplateClouds(head, captures, 0.3)
    cloud = clouds.load("bob")
    expected = flame_vertices(head, captures[1].params.timestep(0).canonical(0.3))
    np.testing.assert_allclose(cloud.points, expected, atol=1e-7)
    corners = np.asarray(head.faces)[cloud.binding]
    assert (corners == np.arange(head.num_vertices)[:, None]).any(axis=1).all()
    assert clouds.num_points("bob") == head.num_vertices


def run_program(*arguments, devices: int = 1, wait: bool = True):
    environment = os.environ | {
        # Compilation is most of the time; what is tested does not depend on its optimisations.
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tests.training.decoder_program", *map(str, arguments)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if not wait:
        return process
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said[-3000:]
    return said


def test_resume_refuses_another_decoder(people, opened, tmp_path):
    """A checkpoint of another decoder of equal shapes; only its meta is read."""
    features = opened[1].spec
    decoder = CONFIG.decoder.for_features(features.store.tokenizer, features.width)
    other = dataclasses.replace(CONFIG, decoder=dataclasses.replace(decoder, max_offset=0.25))
    state = TrainState(np.int32(5), {"w": np.zeros(2)}, (), None, jax.random.PRNGKey(0))
    meta = {"config": dataclasses.asdict(other), "features": features.to_json(), "capacity": 64}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, SimpleNamespace(get_state=dict), meta)
    process = run_program("train", people, tmp_path, 6, wait=False)
    said, _ = process.communicate(timeout=600)
    assert process.returncode != 0, said
    assert "UserError" in said
    assert "decoder.max_offset=0.25 (now 0.1): resume with --config.decoder.max_offset=0.25, or" in said
    assert "going on with" not in said


@pytest.mark.slow
def test_a_capacity_too_small_grows_and_changes_nothing(people):
    said = run_program("grow", people)
    found = json.loads(said.splitlines()[-1])
    assert "capacity grows" in said
    assert found["grown"][0] > 70
    assert found["steps"] == [1, 1]
    assert found["finite"] == [True, True]
    assert found["moved"] > 1e-3
    assert found["difference"] < 1e-5


@pytest.mark.slow
def test_four_devices_agree_with_one(people):
    """The same batch of four subjects on meshes of four devices, and on one."""
    found = json.loads(run_program("meshes", people, devices=4).splitlines()[-1])
    assert set(found) == {"data:4", "data:2,fsdp:2"}
    for mesh, each in found.items():
        assert each["loss"] < 1e-5, mesh
        assert each["gradients"] < 1e-5 * each["largest"], mesh
        assert each["largest"] > 1e-3


@pytest.mark.slow
def test_resumed_and_killed_runs_equal_the_uninterrupted_one(people, tmp_path):
    run_program("train", people, tmp_path / "whole", 30)
    run_program("train", people, tmp_path / "parts", 15)
    said = run_program("train", people, tmp_path / "parts", 30)
    assert "done 30" in said
    assert "going on from step 15" in said

    process = run_program("train", people, tmp_path / "killed", 30, wait=False)
    limit = time.monotonic() + 600
    checkpoints = tmp_path / "killed" / "checkpoints"
    while process.poll() is None and time.monotonic() < limit:
        if any(p.name.isdigit() for p in checkpoints.glob("*")):
            break
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[0][-3000:]
    process.kill()
    process.communicate()
    assert "going on from step" in run_program("train", people, tmp_path / "killed", 30)

    def losses(name):
        return [line["loss"] for line in read_metrics(tmp_path / name) if "loss" in line]

    whole, _ = load_params(tmp_path / "whole")
    for name in ("parts", "killed"):
        jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / name)[0], whole)
        assert losses(name) == losses("whole")
    assert len(losses("whole")) == 30
    assert losses("whole")[-1] < 0.8 * losses("whole")[0]
    card = json.loads((tmp_path / "whole" / "card.json").read_text())
    assert {"views_psnr", "expressions_ssim", "people_psnr"} <= set(card["scores"])
    assert {p.name.split("_", 1)[1] for p in (tmp_path / "whole" / "strips").iterdir()} >= {"views.png", "people.png"}
    assert dataclasses.asdict(CONFIG.decoder)["inputs"] == card["inputs"]
    assert np.isfinite(losses("whole")).all()
