"""Run by test_decoder.py in processes of its own: stage two on simulated devices, and the script's own training."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np
from absl import flags

from pointillist_jax.data.subject_views import FeatureClouds, SubjectViews, subject_batches
from pointillist_jax.models.gaussian_decoder import param_specs
from pointillist_jax.models.layers import init_params
from pointillist_jax.sharding import make_mesh, shard_batch, shardings_for, start_processes
from pointillist_jax.training import decoder
from pointillist_jax.training.state import init_state, make_optimizer
from tests.training.decoder_scene import CONFIG, open_people


def meshes(people: Path) -> None:
    """Prints {mesh: largest differences of loss and gradients to a single device's} as JSON."""
    head, features, captures = open_people(people)
    config = CONFIG.decoder.for_features(features.tokenizer, 6)
    source = SubjectViews(captures, FeatureClouds(features), views=2)
    batch = next(iter(subject_batches(source, 4)))
    specs = param_specs(config)
    params = init_params(specs, jax.random.PRNGKey(1))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + rng.normal(0, 0.05, x.shape).astype(np.float32), params)
    boxed = jax.eval_shape(functools.partial(init_params, specs, boxed=True), jax.random.PRNGKey(1))

    def step(params, batch, frozen):
        def mean(params):
            loss_fn = decoder.make_loss(config, frozen, source.width, source.height, capacity=8192)
            total, weight, extra = loss_fn(params, batch, None)
            return total / weight, extra["overflow"][0]

        return jax.value_and_grad(mean, has_aux=True)(params)

    single = make_mesh("", jax.devices()[:1])
    with jax.set_mesh(single):
        arrays = jax.device_put(params, jax.devices()[0]), shard_batch(batch, single), decoder.frozen_on(single, head)
        (expected_loss, overflow), expected = jax.tree.map(np.asarray, jax.jit(step)(*arrays))
    assert overflow == 0
    found = {}
    for text in ("data:4", "data:2,fsdp:2"):
        mesh = make_mesh(text)
        shardings = shardings_for(boxed, mesh)
        arrays = jax.device_put(params, shardings), shard_batch(batch, mesh), decoder.frozen_on(mesh, head)
        with jax.set_mesh(mesh):
            (loss, _), gradients = jax.jit(step, out_shardings=(None, shardings))(*arrays)
        worst = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), gradients, expected)
        found[text] = {
            "loss": abs(float(loss) - float(expected_loss)),
            "gradients": max(jax.tree.leaves(worst)),
            "largest": max(float(np.abs(x).max()) for x in jax.tree.leaves(expected)),
        }
    print(json.dumps(found))


def grow(people: Path) -> None:
    """One step with enough room and one that begins with too little; prints how they differ as JSON."""
    head, features, captures = open_people(people)
    source = SubjectViews(captures, FeatureClouds(features), views=2)
    config = CONFIG.decoder.for_features(features.tokenizer, 6)
    mesh = make_mesh("", jax.devices()[:1])
    frozen, optimizer = decoder.frozen_on(mesh, head), make_optimizer(config.train)
    batch = shard_batch(next(iter(subject_batches(source, 2))), mesh)
    after, grown, found = [], [], {"steps": [], "finite": []}
    for capacity in (8192, 70):
        state, _ = init_state(decoder.init_params(config), optimizer, config.train, jax.random.PRNGKey(0), mesh)
        before = jax.tree.map(np.asarray, state.params)
        step = decoder.GrowingStep(
            config, frozen, optimizer, source.width, source.height, state=state, capacity=capacity,
            on_grow=grown.append,
        )  # fmt: skip
        with jax.set_mesh(mesh):
            state, metrics = step(state, batch)
        found["steps"].append(int(state.step))
        found["finite"].append(bool(metrics["finite"]))
        after.append(jax.tree.map(np.asarray, (state, metrics)))
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, after[0][0].params)
    differences = jax.tree.map(lambda a, b: float(np.abs(a.astype(float) - b.astype(float)).max()), *after)
    found |= {"moved": max(jax.tree.leaves(moved)), "difference": max(jax.tree.leaves(differences)), "grown": grown}
    print(json.dumps(found))


def train(people: Path, workdir: Path, steps: int, mesh: str = "", port: int = 0, process: int = 0) -> None:
    """Trains to `steps`, or goes on; held-out evaluation and card included.

    With a port this is one of two processes. On a mesh a batch has a subject for each of four devices.
    """
    from experiments.train_decoder import Data, train_decoder

    flags.FLAGS(["decoder_program"])
    if port:
        start_processes(f"localhost:{port}", 2, process)
    head, features, captures = open_people(people)
    settings = dataclasses.replace(CONFIG.decoder.train, steps=steps, **({"batch_size": 4} if mesh else {}))
    config = dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, train=settings))
    data = Data(features, head, (captures[0],), (captures[1],))
    state, stopped = train_decoder(data, config, workdir, mesh=mesh, bar=False)
    print("stopped by", stopped) if stopped else print("done", int(state.step))


if __name__ == "__main__":
    people, rest = Path(sys.argv[2]), sys.argv[3:]
    if sys.argv[1] in ("meshes", "grow"):
        {"meshes": meshes, "grow": grow}[sys.argv[1]](people)
    else:
        train(people, Path(rest[0]), int(rest[1]), *rest[2:3], *map(int, rest[3:]))
