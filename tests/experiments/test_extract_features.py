"""`experiments.extract_features` as a user starts it: what it writes, refusals, and the same bytes after SIGKILL."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from pointillist_jax.data.point_features import FeatureSet, load_point_features
from pointillist_jax.data.token_store import open_store
from pointillist_jax.flame import open_head
from pointillist_jax.models.ar import hidden_states
from pointillist_jax.training.ar import encode
from pointillist_jax.training.checkpoints import load_params
from tests.experiments import small_ar
from tests.experiments.small_ar import CONFIG, ROOT, command, environment, write_ar, write_people

PEOPLE = 40


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A store, an untrained model, and a cache of compiled programs for all processes."""
    root = tmp_path_factory.mktemp("features")
    write_ar(root / "ar", write_people(root / "store", PEOPLE))
    return root


def arguments(root: Path, workdir: Path, *more: str) -> tuple[str, ...]:
    return f"--ar={root / 'ar'}", f"--store={root / 'store'}", f"--workdir={workdir}", *more


def start(root: Path, workdir: Path, *more: str) -> subprocess.CompletedProcess:
    return small_ar.start(root, "extract_features", *arguments(root, workdir, *more))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def straight(root):
    """Everybody's features, extracted without interruption."""
    done = start(root, root / "straight", "--batch=8")
    assert done.returncode == 0, done.stderr
    assert str(root / "straight") in done.stdout
    return root / "straight"


def test_hidden_states_are_those_of_the_model(root, straight):
    store, head = open_store(root / "store"), open_head("coarse")
    features = FeatureSet(straight, flame_sha256=head.sha256)
    assert features.subjects == store.subjects
    assert (features.spec.source, features.spec.width, features.spec.sampling) == ("teacher_forced", 16, {})
    assert features.spec.checkpoint["step"] == 7
    params = jax.tree.map(jax.numpy.asarray, load_params(root / "ar")[0])
    model = CONFIG.model.for_tokenizer(store.tokenizer)
    forward = jax.jit(lambda tokens, one: hidden_states(
        params["transformer"], model, tokens, encode(params, model, head, one)
    ))  # fmt: skip
    for name in ("p0", "p39"):
        found, i = features.load(name), store.index(name)
        tokens = store.tokens(i)
        np.testing.assert_array_equal(found.tokens, tokens)
        points, binding = store.tokenizer.decode(tokens)
        np.testing.assert_array_equal(found.points, points)
        np.testing.assert_array_equal(found.binding, binding)
        condition = store.condition(i)
        one = {"portrait": condition["portrait"][None], "flame": {k: v[None] for k, v in condition["flame"].items()}}
        padded = np.pad(tokens, (0, 256 - len(tokens)), constant_values=store.tokenizer.pad)
        hidden = np.asarray(forward(padded[None], one))[0, 4 : len(tokens) - 4]
        expected = hidden.reshape(len(points), 4, -1)
        np.testing.assert_allclose(found.hidden, expected, atol=4e-3)


def test_user_errors_are_sentences(root, straight):
    def said(workdir: Path, *more: str) -> str:
        done = start(root, workdir, *more)
        assert done.returncode == 2, done.stdout
        assert "Traceback" not in done.stderr
        return done.stderr

    before = contents(straight)
    assert "go on with --resume" in said(straight)
    assert "was made with source teacher_forced, not sampled" in said(straight, "--resume", "--source=sampled")
    assert "--seed does nothing with --source=teacher_forced" in said(root / "new", "--seed=1")
    assert "has encoders of its own" in said(root / "new", "--image_weights=dinov2.pth")
    assert "no subject 'nobody'" in said(root / "new", "--subjects=nobody")
    assert contents(straight) == before


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(root, straight, tmp_path):
    """SIGKILL as soon as the first file is there: files are whole, none is made twice, the end is the same."""
    workdir = tmp_path / "killed"
    process = subprocess.Popen(
        command("extract_features", *arguments(root, workdir, "--batch=8")),
        cwd=ROOT, env=environment(root), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None and not list(workdir.glob("[!.]*.npz")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    there = {path: os.stat(path).st_mtime_ns for path in workdir.glob("[!.]*.npz")}
    assert 0 < len(there) < PEOPLE
    for path in there:
        load_point_features(path)
    # What a kill in the middle of a file leaves.
    (workdir / ".p39.tmp-abc.npz").write_bytes(b"half")
    done = start(root, workdir, "--batch=8", "--resume")
    assert done.returncode == 0, done.stderr
    assert f"{len(there)} of {PEOPLE} people are done already" in done.stdout
    assert {path: os.stat(path).st_mtime_ns for path in there} == there
    assert contents(workdir) == contents(straight)


@pytest.mark.slow
def test_shards_share_a_folder(root, straight, tmp_path):
    for shard in range(2):
        done = start(root, tmp_path / "shards", "--batch=8", "--num_shards=2", f"--shard={shard}")
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "shards") == contents(straight)


@pytest.mark.slow
def test_sampled_clouds_do_not_depend_on_the_batch(root, tmp_path):
    """One step per point: drawn three at a time or alone, interrupted or not, a person's cloud is the same."""
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, step="point"))
    write_ar(tmp_path / "ar", open_store(root / "store"), config)
    names = ("p1", "p2", "p3", "p5", "p8")
    options = (f"--store={root / 'store'}", "--source=sampled", "--max_points=12", "--temperature=1.5")
    for workdir, more in (("a", ["--batch=3"]), ("b", ["--batch=1"])):
        done = small_ar.start(
            root, "extract_features", f"--ar={tmp_path / 'ar'}", f"--workdir={tmp_path / workdir}",
            f"--subjects={','.join(names)}", *options, *more,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    a, b = FeatureSet(tmp_path / "a"), FeatureSet(tmp_path / "b")
    assert a.subjects == names
    assert a.spec == b.spec
    assert a.spec.sampling["temperature"] == 1.5
    for name in names:
        one, other = a.load(name), b.load(name)
        assert a.tokenizer.first_error(one.tokens) is None
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.hidden, other.hidden, atol=2e-3)
        assert 0 < one.num_points <= 12
