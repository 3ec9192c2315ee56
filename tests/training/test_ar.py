"""Stage one end to end on a small store: resume, kills, meshes, processes, what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from absl import flags

from pointillist_jax.data.windows import window_batches
from pointillist_jax.files import UserError
from pointillist_jax.flame import open_head
from pointillist_jax.training.checkpoints import Checkpoints, load_params
from pointillist_jax.training.metric_log import read_metrics
from tests.training import ar_runs
from tests.training.ar_runs import CONFIG, changed, losses


@pytest.fixture(scope="session")
def people(tmp_path_factory):
    return ar_runs.write_people(tmp_path_factory.mktemp("people") / "store")


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Compiled programs, kept between processes and between calls in this one."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def train(people, cache):
    # The script's flags belong to its own command line; here only its functions are used.
    flags.FLAGS.unparse_flags()
    from experiments.train_ar import summarize, train_ar

    settings = {
        "jax_compilation_cache_dir": str(cache),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    jax.tree.map(jax.config.update, list(settings), list(settings.values()))

    def run(workdir, config=CONFIG):
        config = dataclasses.replace(config, model=config.model.for_tokenizer(people.tokenizer))
        state, stopped, held_out = train_ar(people, open_head("coarse"), config, workdir, bar=False)
        assert stopped is None
        return state, summarize(workdir, people, config, held_out)

    yield run
    jax.tree.map(jax.config.update, list(before), list(before.values()))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """Four steps without interruption, with an average and a z-loss."""
    workdir = tmp_path_factory.mktemp("whole")
    state, _ = train(workdir, changed(ema_decay=0.5, z_loss=1e-2))
    return workdir, state


def test_two_steps_and_two_more_are_four_bitwise(train, whole, tmp_path):
    train(tmp_path, changed(steps=2, ema_decay=0.5, z_loss=1e-2))
    state, _ = train(tmp_path, changed(ema_decay=0.5, z_loss=1e-2))
    assert_same(state, whole[1])
    assert losses(tmp_path) == losses(whole[0])
    assert list(losses(tmp_path)) == [1, 2, 3, 4]


def test_the_average_is_what_is_loaded_unless_one_asks_for_the_parameters(whole):
    workdir, state = whole
    params, meta = load_params(workdir)
    assert_same(params, state.ema)
    assert_same(load_params(workdir, ema=False)[0], state.params)
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), state.ema, state.params)
    assert all(jax.tree.leaves(moved))
    # What the run was trained on, so that a new portrait can be encoded the same way.
    assert meta["features"]["kind"] == "tiny-14_tiny-16"
    assert meta["features"]["weights"] == {"image": "random", "points": "random"}
    assert meta["config"]["model"]["encoder"]["frozen"] is True
