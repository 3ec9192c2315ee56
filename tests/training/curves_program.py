"""Loss curves of 20 steps on one device and on meshes of 8 simulated ones, in one process.

    python -m tests.training.curves_program ar|decoder <people> '[["data:8", 1], ["fsdp:8", 2], …]'

The pairs are meshes and `accumulate`; a mesh "one" is a single device. The last line is JSON: a list of curves.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from pointillist_jax.configs import TrainConfig
from pointillist_jax.data.condition_features import feature_kind, open_features
from pointillist_jax.data.subject_views import FeatureClouds, SubjectViews, subject_batches
from pointillist_jax.data.token_store import open_store
from pointillist_jax.data.windows import window_batches
from pointillist_jax.flame import open_head
from pointillist_jax.models.condition import feature_shapes
from pointillist_jax.sharding import make_mesh, shard_batch
from pointillist_jax.training import ar, decoder
from pointillist_jax.training.state import init_state, jit_step, make_optimizer, train_step
from tests.training import ar_runs, decoder_scene

STEPS, BATCH = 20, 16  # Two micro-batches of one example for each of 8 devices.
SETTINGS = TrainConfig(steps=STEPS, batch_size=BATCH, learning_rate=1e-3, warmup_steps=2)
CONFIG = dataclasses.replace(ar_runs.CONFIG.model, step="point", slot_layers=1)


def ar_stage(path: Path):
    """(init, mesh → loss, batches) of the point transformer."""
    store = open_store(path)
    model = CONFIG.for_tokenizer(store.tokenizer)
    batches = window_batches(
        store,
        batch_size=BATCH,
        condition=(),
        features=open_features(store, feature_kind(model.encoder), feature_shapes(model)),
        **ar.training_window(model, ar_runs.CONFIG.data.stride),
    )
    return ar.init_params(model), lambda mesh: ar.make_loss(model, open_head("coarse")), batches


def decoder_stage(path: Path):
    head, features, captures = decoder_scene.open_people(path)
    config = decoder_scene.CONFIG.decoder.for_features(features.tokenizer, decoder_scene.WIDTH)
    source = SubjectViews(captures, FeatureClouds(features), views=1)

    def loss_on(mesh: Mesh):
        frozen = decoder.frozen_on(mesh, head)
        return decoder.make_loss(config, frozen, source.width, source.height, capacity=8192)

    return decoder.init_params(config), loss_on, subject_batches(source, BATCH)


def curve(stage, batches, mesh: Mesh, accumulate: int) -> list[float]:
    init, loss_on, _ = stage
    config = dataclasses.replace(SETTINGS, accumulate=accumulate)
    optimizer = make_optimizer(config)
    state, _ = init_state(init, optimizer, config, jax.random.PRNGKey(0), mesh)
    step = functools.partial(train_step, loss_fn=loss_on(mesh), optimizer=optimizer, config=config)
    compiled, losses = jit_step(step, state), []
    for batch in batches:
        arrays = shard_batch(batch, mesh)
        with jax.set_mesh(mesh):
            state, metrics = compiled(state, arrays)
        losses.append(float(metrics["loss"]))
        assert metrics["finite"]
        assert not float(metrics.get("overflow", 0))
    return losses


def main() -> None:
    stage = {"ar": ar_stage, "decoder": decoder_stage}[sys.argv[1]](Path(sys.argv[2]))
    batches = [jax.tree.map(np.asarray, dict(batch)) for batch in itertools.islice(iter(stage[2]), STEPS)]
    assert len(batches) == STEPS
    found = []
    for text, accumulate in json.loads(sys.argv[3]):
        mesh = make_mesh("", jax.devices()[:1]) if text == "one" else make_mesh(text)
        found.append(curve(stage, batches, mesh, accumulate))
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
