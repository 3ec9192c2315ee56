"""Stage one as its script runs it, on a small store: resume, kills, signals, meshes, processes, divergence."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import socket
import sys
import time

import jax
import numpy as np
import pytest

from pointillist_jax.training.checkpoints import Checkpoints, load_params
from pointillist_jax.training.metric_log import read_metrics
from tests.training.ar_runs import changed, command, finish, losses, start, wait_for, write_features, write_people

# An average and a z-loss, so that both are part of what has to be resumed.
SETTINGS = {"ema_decay": 0.5, "z_loss": 1e-2}
MESH = "data:2,fsdp:2,tensor:2"


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    store = write_people(tmp_path_factory.mktemp("people") / "store")
    write_features(store)
    return store.path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled programs, kept between processes."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def runs(people, cache, tmp_path_factory):
    """Runs on 8 devices: four steps at once, two and two, and two more on another mesh."""
    root = tmp_path_factory.mktemp("runs")
    both = SETTINGS | {"steps": 2}
    wanted = [
        (root / "halves", MESH, both),
        (root / "other", MESH, both),
        (root / "one", MESH, both),
        (root / "halves", MESH, SETTINGS),
        (root / "whole", MESH, SETTINGS),
        (root / "other", "fsdp:4,context:2", SETTINGS),
    ]
    arguments = json.dumps([(str(workdir), mesh, changes) for workdir, mesh, changes in wanted])
    said = finish(start([sys.executable, "-m", "tests.training.ar_program", str(people), arguments], cache, devices=8))
    return root, json.loads(said.splitlines()[-1])


def test_two_steps_and_two_more_are_four_bitwise(runs):
    root, found = runs
    halves, whole = found[3], found[4]
    assert whole["shard"] == [1, 16, 2, 8]
    assert halves == whole
    assert losses(root / "halves") == losses(root / "whole")
    assert list(losses(root / "whole")) == [1, 2, 3, 4]
    assert found[0]["state"] == found[1]["state"] != whole["state"]


def test_a_checkpoint_goes_on_on_another_mesh_and_another_number_of_devices(runs, people, cache):
    root, found = runs
    assert found[5]["shard"] == [1, 8, 4, 8]
    finish(start(command(people, root / "one", changed(**SETTINGS)), cache))
    expected = list(losses(root / "whole").values())
    for name in ("other", "one"):
        np.testing.assert_allclose(list(losses(root / name).values()), expected, rtol=1e-5)
    for a, b in zip(*(jax.tree.leaves(load_params(root / name)[0]) for name in ("one", "whole")), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_average_is_what_is_loaded_unless_one_asks_for_the_parameters(runs):
    root, _ = runs
    average, meta = load_params(root / "whole")
    params, _ = load_params(root / "whole", ema=False)
    before, _ = load_params(root / "whole", step=2)
    # Steps 3 and 4 come from step 2's average; its memory is (1 + n) / (10 + n) while the run is young.
    for old, new, last in zip(*map(jax.tree.leaves, (before, average, params)), strict=True):
        assert np.abs(new - last).max() > 0
        assert np.abs(new - last).max() <= np.abs(old - last).max() + 1e-6
    # What the run was trained on, so that a new portrait can be encoded the same way.
    assert meta["features"]["kind"] == "tiny-14_tiny-16"
    assert meta["features"]["weights"] == {"image": "noise", "points": "noise"}
    assert meta["config"]["model"]["encoder"]["frozen"] is True


def test_z_loss_is_part_of_the_loss_and_not_of_the_likelihood(runs):
    root, _ = runs
    for line in read_metrics(root / "whole"):
        # Over 1024 or more classes of about equal logits log²(Σ exp) is at least ln(1024)² = 48.
        assert 0.3 < line["loss"] - line["nll"] < 1


@pytest.mark.parametrize(("number", "name", "code"), [(signal.SIGTERM, "SIGTERM", 0), (signal.SIGINT, "Ctrl-C", 130)])
def test_signals_save_and_end_the_run(people, cache, tmp_path, number, name, code):
    run = command(people, tmp_path, changed(steps=1_000_000, checkpoint_every=1_000_000))
    process = start(run, cache)
    assert wait_for(lambda: 3 in losses(tmp_path), process), finish(process)
    process.send_signal(number)
    said = finish(process, code)
    assert f"stopped by {name} at step" in said
    assert "Traceback" not in said
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [list(losses(tmp_path))[-1]]


def test_divergence_ends_in_one_sentence_and_the_profile_is_written(people, cache, tmp_path):
    config = changed(learning_rate=1e30, warmup_steps=0, clip_norm=0.0, checkpoint_every=1)
    process = start(command(people, tmp_path, config, "--profile=1:4"), cache)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 2, said
    assert "Traceback" not in said
    assert re.search(r"error: step 1: loss .*parameter norm inf must all be finite \(subjects p\d.*no checkpoint", said)
    # The trace that the divergence cut short is on disk.
    assert any(path.stat().st_size for path in (tmp_path / "profile").rglob("*.xplane.pb"))


def test_resume_refuses_another_model_and_says_what_it_trains_differently(people, cache, tmp_path):
    config = changed(steps=1)
    finish(start(command(people, tmp_path, config), cache))
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, rope_theta=50.0))
    process = start(command(people, tmp_path, other), cache)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 2, said
    assert "Traceback" not in said
    assert "model.rope_theta=1000000.0 (now 50.0): resume with --config.model.rope_theta=1000000.0" in said

    # A finished run whose metrics are gone is still one.
    (tmp_path / "metrics.jsonl").unlink()
    card = (tmp_path / "card.json").read_bytes()
    said = finish(start(command(people, tmp_path, changed(config, learning_rate=1e-3)), cache))
    assert "going on with other settings: train.learning_rate 0.005 → 0.001\n" in said
    assert "metrics.jsonl is gone" in said
    assert (tmp_path / "card.json").read_bytes() == card


@pytest.mark.slow
def test_killed_at_random_moments_the_curve_is_the_uninterrupted_one(people, cache, rng, tmp_path):
    config = changed(steps=300, checkpoint_every=5)
    finish(start(command(people, tmp_path / "whole", config), cache))
    killed = tmp_path / "killed"
    saving = cut = 0
    for kill in range(10):
        lines = len(losses(killed))
        process = start(command(people, killed, config), cache)
        going = wait_for(lambda lines=lines: len(losses(killed)) > lines, process)
        if kill % 2:  # What the last kill left of a save is gone by now.
            going = wait_for(lambda: any((killed / "checkpoints").glob("*tmp*")), process)
        else:
            time.sleep(rng.uniform(0, 0.3))
        cut += going and process.poll() is None
        process.kill()
        process.communicate()
        saving += any((killed / "checkpoints").glob("*tmp*"))
    assert cut > 2
    assert saving
    finish(start(command(people, killed, config), cache))
    assert losses(killed) == losses(tmp_path / "whole")
    assert len(losses(killed)) == 300
    params = [load_params(path)[0] for path in (killed, tmp_path / "whole")]
    jax.tree.map(np.testing.assert_array_equal, *params)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "ended"), [("data:2,fsdp:2", "last step"), ("tensor:4", "SIGTERM")])
def test_two_processes_are_one(people, cache, tmp_path, mesh, ended):
    """Two processes of two devices each, against one of four. tensor:4: both read the same examples."""
    config = changed(steps=3, **SETTINGS)
    finish(start(command(people, tmp_path / "one", config, f"--mesh={mesh}"), cache, devices=4))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    job = [f"--mesh={mesh}", f"--coordinator=localhost:{port}", "--num_processes=2"]
    if ended == "SIGTERM":
        config = changed(steps=1_000_000, checkpoint_every=1_000_000, **SETTINGS)
    two = tmp_path / "two"
    both = [
        start(command(people, two, config, *job, f"--process_id={i}"), tmp_path / f"cache{i}", devices=2)
        for i in range(2)
    ]
    if ended == "SIGTERM":
        # One process is told; all agree on a step, save it and stop.
        assert wait_for(lambda: 3 in losses(two), both[0]), finish(both[0])
        both[1].send_signal(signal.SIGTERM)
    said = [finish(process) for process in both]
    assert ("stopped by preemption" in said[0]) == (ended == "SIGTERM")
    assert "everything lies in" not in said[1]
    with Checkpoints(two) as checkpoints:
        assert checkpoints.steps[-1] == list(losses(two))[-1]
    found, expected = losses(two), losses(tmp_path / "one")
    np.testing.assert_allclose([found[step] for step in expected], list(expected.values()), rtol=1e-5)
