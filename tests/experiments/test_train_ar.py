"""The script that trains stage one: what it takes from the store, whatever the preset says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from pointillist_jax.convert import load_encoders
from pointillist_jax.training.checkpoints import load_params
from tests.convert.test_frozen_encoders import CONFIG, write_weights
from tests.experiments.bad_inputs import SCRIPTS, filled
from tests.experiments.small_ar import ROOT, write_people

PROGRAM = """
import dataclasses, json, sys
from absl import flags
from experiments import train_ar
from pointillist_jax.data.token_store import open_store

flags.FLAGS(sys.argv)
config = train_ar.with_store(train_ar.CONFIG(), open_store(train_ar.STORE.value))
print(json.dumps(dataclasses.asdict(config)))
"""


@pytest.mark.parametrize("given", [(), ("--config.data.space=identity", "--config.data.bins=1024")])
def test_what_the_store_decided_stands_in_the_config(tmp_path, given):
    """Preset `laptop` is for stores of another space, share of points and portrait size; no flag says so."""
    store = write_people(tmp_path, 2)
    command = [sys.executable, "-c", PROGRAM, "--config=laptop", f"--store={tmp_path}", *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    config = json.loads(done.stdout)
    names = ("space", "keep", "portrait_size", "bins", "lower", "stride")
    # The stride is no matter of the store: the preset's.
    assert [config["data"][name] for name in names] == ["identity", 1.0, 14, 1024, list(store.tokenizer.lower), 512]
    assert config["model"]["num_faces"] == store.tokenizer.num_faces


@pytest.fixture
def old_run(tmp_path):
    """Files of a finished run, as far as `--overwrite` looks at them."""
    files = [tmp_path / "out" / name for name in ("checkpoints/2/params/x", "metrics.jsonl", "card.json")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    return files


@pytest.mark.parametrize(
    ("script", "more", "said"),
    [
        ("train_ar", "--mesh=data:3", "asks for 3 devices"),
        ("train_ar", "--config.model.encoder.image=vitx14", "vits14"),
        ("train_ar", "--config.model.encoder.image=vits14", "--image_weights"),
        ("train_ar", "--config.model.attention=flash", "model.attention"),
        ("train_ar", "--config.model.attention=cudnn", "needs a GPU and bfloat16"),
        ("train_ar", "--config.model.encoder.frozen", "experiments.encode_conditions"),
        ("train_ar", "--config.data.stride=100000", "stride"),
        ("train_ar", "--image_weights=nowhere.pth", "nowhere.pth"),
        ("train_decoder", "--mesh=data:3", "asks for 3 devices"),
        ("train_decoder", "--config.decoder.attention=flash", "decoder.attention"),
        ("train_decoder", "--init=nowhere", "nowhere"),
    ],
)
def test_a_typo_beside_overwrite_costs_nothing(forks, good_root, old_run, tmp_path, script, more, said):
    good, out = filled(SCRIPTS[script].good, good_root), tmp_path / "out"
    ended = forks.run(script, *good, f"--workdir={out}", "--overwrite", more, where=out)
    assert ended.code == 2, ended.err[-3000:]
    assert said in ended.err
    assert [file.read_text() for file in old_run] == ["{}"] * 3


def test_encoders_that_are_trained_along_begin_with_the_weights_that_are_named(forks, good_root, rng, tmp_path):
    image, points, *_ = write_weights(rng, tmp_path)
    still = ("--config.train.learning_rate=0", "--config.train.steps=1", "--config.model.encoder.image_size=28")
    good, out = filled(SCRIPTS["train_ar"].good, good_root), tmp_path / "out"
    named = (f"--image_weights={image}", f"--point_weights={points}")
    ended = forks.run("train_ar", *good, *still, *named, f"--workdir={out}", where=out)
    assert ended.code == 0, ended.err[-3000:]
    found, expected = load_params(out)[0]["condition"], load_encoders(CONFIG, image, points)
    assert set(expected) == {"image_encoder", "point_encoder"}
    for name, tree in expected.items():
        jax.tree.map(np.testing.assert_array_equal, found[name], tree)
    # The same command line goes on, whatever became of the files.
    image.unlink()
    ended = forks.run("train_ar", *good, *still, *named, f"--workdir={out}", "--resume", where=out)
    assert ended.code == 0, ended.err[-3000:]


def test_a_decoder_goes_on_whatever_became_of_the_run_it_began_with(forks, good_root, tmp_path):
    good, first, out = filled(SCRIPTS["train_decoder"].good, good_root), tmp_path / "first", tmp_path / "out"
    for folder, more in ((first, ()), (out, (f"--init={first}",)), (out, (f"--init={first}", "--resume"))):
        ended = forks.run("train_decoder", *good, f"--workdir={folder}", *more, where=folder)
        assert ended.code == 0, ended.err[-3000:]
        if folder is out:
            shutil.rmtree(first, ignore_errors=True)


def test_few_people_are_not_held_out_but_for_two_and_that_is_said(forks, good_root, tmp_path):
    good, out = filled(SCRIPTS["train_ar"].good, good_root), tmp_path / "out"
    command = (*good, "--config.train.steps=1", f"--workdir={out}")
    ended = forks.run("train_ar", *command, "--config.data.held_out=3", where=out)
    assert ended.code == 0, ended.err[-3000:]
    assert "has 4 subjects and data.held_out=3: 2 are held out and 2 train; give --config.data.held_out." in ended.err
    assert len(json.loads((out / "card.json").read_text())["held_out"]) == 2
    assert load_params(out)[1]["config"]["data"]["held_out"] == 2

    one = write_people(tmp_path / "one", 1)
    ended = forks.run("train_ar", *command, f"--store={one.path}", "--overwrite", where=out)
    assert ended.code == 2, ended.err[-3000:]
    assert "data.held_out=1, but" in ended.err
    assert (out / "card.json").is_file()


def test_a_loss_that_is_no_number_is_told_and_is_null_on_the_card(forks, good_root, tmp_path):
    """Parameters of 1e16 are finite, and what the network makes of them is not."""
    good, out = filled(SCRIPTS["train_ar"].good, good_root), tmp_path / "out"
    far = ("--config.train.steps=1", "--config.train.learning_rate=1e16")
    ended = forks.run("train_ar", *good, *far, f"--workdir={out}", where=out)
    assert ended.code == 0, ended.err[-3000:]
    assert "it has diverged; train it again with a lower --config.train.learning_rate" in ended.out
    assert json.loads((out / "card.json").read_text())["model"]["loss"] is None
