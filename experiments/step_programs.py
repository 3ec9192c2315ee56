"""Training steps of both stages on made-up data, to be compiled, counted and timed: `bench_train`, `scaling_study`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.made_up import made_up_avatar
from experiments.motions import turn_and_talk
from pointillist_jax.cameras import orbit
from pointillist_jax.configs import DecoderConfig, ModelConfig, TrainConfig
from pointillist_jax.data.token_store import FLAME_FIELDS
from pointillist_jax.flame import FlameModel, open_head
from pointillist_jax.models.ar import param_specs
from pointillist_jax.models.layers import init_params
from pointillist_jax.sharding import batch_sharding, require_share, shard_batch
from pointillist_jax.training import decoder
from pointillist_jax.training.ar import training_window, window_loss
from pointillist_jax.training.state import TrainState, abstract_state, init_state, jit_step, make_optimizer, train_step


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """A jitted train step with what it is to be called on.

    Attributes:
      mesh: that it is laid out on.
      step: (state, batch) → (state, metrics).
      state, batch: abstract, with their shardings.
      make_state, make_batch: the same with values.
      tokens: of a step, or pictures in stage two.
    """

    mesh: Mesh
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
    state: TrainState
    batch: Any
    make_state: Callable[[], TrainState]
    make_batch: Callable[[], Any]
    tokens: int

    def compile(self) -> jax.stages.Compiled:
        with jax.set_mesh(self.mesh):
            return self.step.lower(self.state, self.batch).compile()


def stage_one(
    model: ModelConfig, train: TrainConfig, mesh: Mesh, batch: int, context: int, seed: int = 0
) -> StepProgram:
    """The point transformer's step with given contexts: encoders are left out.

    Args:
      batch: windows of all devices. context: tokens of a condition.
    """

    def loss_fn(params, batch, key):
        del key
        loss = window_loss(params, model, batch, batch["context"])
        return loss.total, loss.count, {}

    require_share(batch, mesh)
    optimizer, key = make_optimizer(train), jax.random.PRNGKey(seed)
    init = functools.partial(init_params, param_specs(model), boxed=True)
    abstract, _ = abstract_state(init, optimizer, train, key, mesh)
    shapes = abstract_windows(model, batch, context)
    rows = batch_sharding(mesh)
    step = functools.partial(train_step, loss_fn=loss_fn, optimizer=optimizer, config=train)
    return StepProgram(
        mesh,
        jit_step(step, abstract),
        abstract,
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), shapes),
        lambda: init_state(init, optimizer, train, key, mesh)[0],
        lambda: shard_batch(random_windows(np.random.default_rng(seed), model, batch, context), mesh),
        batch * model.window_tokens,
    )


def stage_two(config: DecoderConfig, mesh: Mesh, subjects: int, points: int, size: int, seed: int = 0) -> StepProgram:
    """The decoder's step through the renderer, on made-up people and photographs, over the coarse open head.

    The renderer has room for twice the intersections that clouds of this kind have; a loss of NaN says that it was not
    enough.

    Args:
      subjects: of all devices. points: of a person. size: of a picture, pixels.
    """
    require_share(subjects, mesh)
    head, optimizer, key = open_head("coarse"), make_optimizer(config.train), jax.random.PRNGKey(seed)
    init = decoder.init_params(config)
    # On devices that are only compiled for (`scaling.gpu_programs`) nothing can lie.
    frozen = decoder.frozen_on(mesh, head) if mesh.devices.flat[0] in jax.devices() else {"head": head}
    abstract, _ = abstract_state(init, optimizer, config.train, key, mesh)
    make_batch = functools.partial(made_up_batch, head, config, subjects, points, size)
    rows = batch_sharding(mesh)
    loss_fn = decoder.make_loss(config, frozen, size, size, capacity=2 * decoder.first_capacity(points, size, size))
    step = functools.partial(train_step, loss_fn=loss_fn, optimizer=optimizer, config=config.train)
    return StepProgram(
        mesh,
        jit_step(step, abstract),
        abstract,
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), make_batch()),
        lambda: init_state(init, optimizer, config.train, key, mesh)[0],
        lambda: shard_batch(make_batch(), mesh),
        subjects * config.views,
    )


def made_up_batch(head: FlameModel, settings: DecoderConfig, subjects: int, points: int, size: int) -> dict[str, Any]:
    """What `data.subject_views` would give."""
    B, K, rng = subjects, settings.views, np.random.default_rng(0)
    people = [made_up_avatar(head, points, seed) for seed in range(B)]
    motion, canonical = turn_and_talk(head, B * K), people[0].rig.canonical
    cameras = orbit(B * K, width=size, height=size, distance=1.2, azimuth=(-1.0, 1.0), closed=False)
    timed = [name for name in FLAME_FIELDS if name != "shape"]
    batch = {
        "points": np.stack([person.gaussians.means for person in people]),
        "binding": np.stack([person.rig.binding for person in people]),
        "num_points": np.full(B, points, np.int32),
        "hidden": rng.normal(size=(B, points, 4, settings.feature_width)).astype(np.float16),
        "canonical": {name: np.stack([np.asarray(getattr(canonical, name))] * B) for name in FLAME_FIELDS},
        "flame": {name: np.asarray(getattr(motion, name)).reshape(B, K, -1) for name in timed},
        "viewmats": np.asarray(cameras.viewmats).reshape(B, K, 4, 4),
        "Ks": np.asarray(cameras.Ks).reshape(B, K, 3, 3),
        "image": rng.integers(0, 256, (B, K, size, size, 3), dtype=np.uint8),
        "weight": np.ones((B, K), np.float32),
    }
    if settings.cross_attention:
        batch["context"] = rng.normal(size=(B, 64, settings.context_width)).astype(np.float32)
    return batch


def random_windows(rng: np.random.Generator, model: ModelConfig, batch: int, context: int) -> dict[str, np.ndarray]:
    """True beginnings of random clouds, as `data.windows` gives them, with a context [B,S,D] float32."""
    length, sequences = training_window(model)["window"], []
    for _ in range(batch):
        points = rng.uniform(-0.25, 0.25, (length // 4 + 1, 3))
        sequences.append(model.tokenizer.encode(points, rng.integers(0, model.num_faces, len(points)))[: length + 1])
    tokens = np.stack(sequences)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "mask": np.ones((batch, length), bool),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length)),
        "context": rng.normal(size=(batch, context, model.width)).astype(np.float32),
    }


def abstract_windows(model: ModelConfig, batch: int, context: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of `random_windows`."""
    length = training_window(model)["window"]
    kinds = {"tokens": np.int32, "targets": np.int32, "mask": bool, "positions": np.int32}
    shapes = {name: jax.ShapeDtypeStruct((batch, length), kind) for name, kind in kinds.items()}
    return shapes | {"context": jax.ShapeDtypeStruct((batch, context, model.width), np.float32)}
