"""One seed's weights, inputs and twins, and every comparison of them: what `experiments.compare_torch` runs."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from experiments.common import alternate_clocks
from experiments.torch_parity import condition, gaussian_decoder, point_transformer, stage_two, training
from experiments.torch_parity.rows import Row
from experiments.torch_parity.sampling import sampling_rows
from experiments.torch_parity.taps import load_arrays, tensors
from experiments.torch_reference import flame as torch_flame
from experiments.torch_reference.condition import Condition
from experiments.torch_reference.decode import decoder_of
from experiments.torch_reference.gaussian_decoder import GaussianDecoder
from experiments.torch_reference.point_step import PointStepTransformer
from experiments.torch_reference.point_transformer import PointTransformer
from experiments.torch_reference.training import Optimizer, StageOne, stage_one_step
from pointillist_jax.configs import Config, ModelConfig
from pointillist_jax.convert.reference import ar_to_torch, decoder_to_torch, transformer_to_torch
from pointillist_jax.flame import FlameParams, flame_vertices, open_head
from pointillist_jax.models import ar
from pointillist_jax.models.condition import condition_specs
from pointillist_jax.models.gaussian_decoder import param_specs as decoder_specs
from pointillist_jax.models.layers import init_params
from pointillist_jax.sampling import generate
from pointillist_jax.training.ar import window_loss
from pointillist_jax.training.state import TrainState, jit_step, make_optimizer, train_step

CONTEXT = 11  # Tokens of a given context where its length does not matter.


class Suite:
    """Everything of one seed. Parameters are the models' initial ones, with noise on all that start at one or zero."""

    def __init__(
        self,
        config: Config,
        seed: int,
        bounds: Mapping[str, float],
        *,
        length: int,
        points: int,
        context: int = CONTEXT,
    ):
        """Args:
        length: tokens of a window. points: of a cloud. context: tokens of the condition.
        """
        self.config, self.seed, self.bounds = config, seed, bounds
        self.dtype = np.float64 if config.model.dtype == "float64" else np.float32
        self.rng, self.length, self.points, self.context = np.random.default_rng(seed), length, points, context
        self.transformer = self._params(ar.param_specs(config.model), seed)
        self.decoder = self._params(decoder_specs(config.decoder), seed + 1)
        self.condition = self._params(condition_specs(config.model), seed + 2)
        self.head = stage_two.astype(open_head("coarse"), self.dtype)
        self.batch = random_window(self.rng, config.model, length, context, self.dtype)

    def twin(self) -> PointTransformer:
        return load_arrays(_transformer(self.config.model), transformer_to_torch(self.transformer, self.config.model))

    def stage_one(self) -> tuple[dict[str, Any], StageOne]:
        """Parameters of the transformer and its condition, and their twin."""
        model, params = self.config.model, {"transformer": self.transformer, "condition": self.condition}
        twin = StageOne(_transformer(model), Condition(model, torch_flame.make_head(vars(self.head))))
        return params, load_arrays(twin, ar_to_torch(params, model))

    def decoder_twin(self) -> GaussianDecoder:
        return load_arrays(GaussianDecoder(self.config.decoder), decoder_to_torch(self.decoder, self.config.decoder))

    def blocks(self) -> list[Row]:
        """The condition, the point transformer, the Gaussian decoder, and what lies between it and the loss, in this
        order."""
        params, model = self.stage_one()
        rows = condition.block_rows(params, model, self.config.model, self.head, self._conditioned(), self.bounds)
        rows += point_transformer.block_rows(self.transformer, self.twin(), self.config.model, self.batch, self.bounds)
        rows += gaussian_decoder.block_rows(
            self.decoder, self.decoder_twin(), self.config.decoder, self._cloud(), self.bounds
        )
        if self.config.model.dtype == "bfloat16":
            return rows  # Head, renderer and losses have no bf16.
        return rows + stage_two.block_rows(self._scene(), self.rng, self.bounds)

    def gradients(self) -> list[Row]:
        model, decoder = self.config.model, self.config.decoder
        rows = training.gradient_rows(self.transformer, self.twin(), model, self.batch, self.bounds)
        params, twin = self.stage_one()
        rows += condition.gradient_rows(params, twin, model, self.head, self._conditioned(), self.bounds)
        return rows + gaussian_decoder.gradient_rows(
            self.decoder, self.decoder_twin(), decoder, self._cloud(), self.bounds
        )

    def steps(self, number: int, number_two: int) -> tuple[list[Row], dict[str, list[float]]]:
        """Both stages; also the loss's relative difference at every step, by stage."""
        model = self.config.model
        params, twin = self.stage_one()
        batches = [self._conditioned(new=True) for _ in range(number)]
        rows, one = training.stage_one_rows(params, twin, model, self.head, self.config.train, batches, self.bounds)
        first = self._scene()
        scenes = [first, *(dataclasses.replace(first, batch=self._scene().batch) for _ in range(number_two - 1))]
        more, two = stage_two.step_comparison(self.decoder, self.config.decoder, scenes, self.rng, self.bounds)
        return rows + more, {"stage one": one, "stage two": two}

    def sampling(self, tokens: int) -> tuple[list[Row], int]:
        params = {**self.transformer}
        # Clouds are to grow long: E is made one of many.
        table = "embedding" if self.config.model.tied_head else "head"
        params[table] = params[table].at[self.config.model.tokenizer.eos].set(0)
        twin = load_arrays(_transformer(self.config.model), transformer_to_torch(params, self.config.model))
        return sampling_rows(params, twin, self.config.model, self.rng, self.context, tokens, self.seed, self.bounds)

    def speed(self, rounds: int) -> list[dict[str, Any]]:
        """Training step, cached sampling, head and rasteriser, in turn; medians of milliseconds and torch's over JAX's.

        Where there is a C++ compiler, the step is also timed against the one that `torch.compile` makes.
        """
        cases = {"training step": (self._jax_step(), self._torch_step())}
        if shutil.which(os.environ.get("CXX", "g++")):
            cases["training step, torch.compile"] = self._jax_step(), self._torch_step(compiled=True)
        cases |= {
            "cached sampling": (self._jax_sampling(), self._torch_sampling()),
            "lbs, 64 poses": self._lbs(),
            "rasteriser, forward and backward": self._rasteriser(),
        }
        rows = []
        for what, (ours, theirs) in cases.items():
            seconds = alternate_clocks({"jax": ours, "torch": theirs}, rounds)
            row: dict[str, Any] = {"what": what}
            for name, spent in seconds.items():
                row |= {f"{name}_ms": round(1e3 * spent.wall, 3), f"{name}_cpu_ms": round(1e3 * spent.cpu, 3)}
            for clock in ("wall", "cpu"):
                ratio = getattr(seconds["torch"], clock) / getattr(seconds["jax"], clock)
                row[f"torch_over_jax_{clock}"] = round(ratio, 3)
            rows.append(row)
        return rows

    def _params(self, specs: Any, seed: int) -> Any:
        # Many small random programs, run once: not worth optimising.
        quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        make = jax.jit(lambda key: init_params(specs, key, self.dtype), compiler_options=quick)
        params = make(jax.random.PRNGKey(seed))
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.05, x.shape), x.dtype), params)

    def _conditioned(self, new: bool = False) -> dict[str, Any]:
        """The window with a condition in place of a context; or a new one."""
        model = self.config.model
        batch = random_window(self.rng, model, self.length, 1, self.dtype) if new else self.batch
        given = condition.random_condition(self.rng, model, self.head, len(batch["tokens"]))
        return {name: x for name, x in batch.items() if name != "context"} | {"condition": given}

    def _cloud(self) -> dict[str, Any]:
        return gaussian_decoder.random_inputs(self.rng, self.config.decoder, self.points, self.context, self.dtype)

    def _scene(self) -> stage_two.Scene:
        return stage_two.make_scene(self.rng, self.config.decoder, self.points, self.dtype)

    def _jax_step(self):
        model, train = self.config.model, self.config.train

        def loss_fn(params, batch, key):
            del key
            loss = window_loss(params, model, batch, batch["context"])
            return loss.total, loss.count, {}

        optimizer, params = make_optimizer(train), jax.tree.map(jnp.copy, self.transformer)
        held = [TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), None, jax.random.PRNGKey(0))]
        step = jit_step(functools.partial(train_step, loss_fn=loss_fn, optimizer=optimizer, config=train), held[0])
        batch = jax.tree.map(jnp.asarray, self.batch)

        def once() -> None:
            held[0], _ = step(held[0], batch)
            jax.block_until_ready(held[0])

        return once

    def _torch_step(self, compiled: bool = False):
        twin = self.twin()
        if compiled:
            twin.loss_sums = torch.compile(twin.loss_sums)
        model, optimizer, batch = StageOne(twin), Optimizer(twin, self.config.train), tensors(dict(self.batch))
        return lambda: stage_one_step(model, optimizer, batch)

    def _jax_sampling(self):
        config, context = self.config.model, self.batch["context"][:1]
        return lambda: generate(
            self.transformer, config, config.tokenizer, context, key=jax.random.PRNGKey(0), max_points=64
        )

    def _torch_sampling(self):
        twin, context = self.twin(), tensors(self.batch["context"][:1])

        def once() -> None:
            with torch.inference_mode():
                decoder_of(twin, context).generate(64)

        return once

    def _rasteriser(self):
        given, scene = stage_two.random_gaussians(self.rng, self.points, self.dtype), self._scene()
        given |= {name: jnp.asarray(scene.batch[name][0]) for name in ("viewmats", "Ks")}
        ours, leaves = stage_two.jax_render(self.rng, self.dtype), tensors(given)
        theirs = stage_two.torch_render(self.rng, self.dtype)
        return lambda: jax.block_until_ready(ours(given)), lambda: theirs(leaves)

    def _lbs(self):
        scene = self._scene()
        params = {name: np.tile(value[:, 0], (32, 1)) for name, value in scene.batch["flame"].items()}
        ours = jax.jit(lambda p: flame_vertices(scene.head, FlameParams(**p)))
        head, given = torch_flame.make_head(vars(scene.head)), tensors(params)
        params = jax.tree.map(jnp.asarray, params)

        def theirs() -> None:
            with torch.inference_mode():
                torch_flame.vertices(head, given)

        return lambda: jax.block_until_ready(ours(params)), theirs


def _transformer(config: ModelConfig) -> PointTransformer:
    return (PointStepTransformer if config.step == "point" else PointTransformer)(config)


def random_window(
    rng: np.random.Generator, config: ModelConfig, length: int, context: int, dtype: Any, rows: int = 2
) -> dict[str, np.ndarray]:
    """{"tokens", "targets", "mask", "positions" [B,T], "context" [B,S,D]}: two windows of random points from the middle
    of their sequences, the last of which ends halfway."""
    ids = config.tokenizer
    points = rng.integers(0, ids.bins, (rows, length // 4 + 1, 4))
    points[..., 3] = ids.bins + rng.integers(0, ids.num_faces, points.shape[:2])
    tokens = points.reshape(rows, -1)
    half = length // 8 * 4
    tokens[-1, half : half + 4] = ids.eos
    tokens[-1, half + 4 :] = ids.pad
    mask = np.ones((rows, length), bool)
    mask[-1, half + 3 :] = False
    return {
        "tokens": tokens[:, :length].astype(np.int32),
        "targets": tokens[:, 1 : length + 1].astype(np.int32),
        "mask": mask,
        "positions": np.arange(length, dtype=np.int32) + np.array([[4000], [0]], np.int32)[:rows],
        "context": rng.normal(size=(rows, context, config.width)).astype(dtype),
    }
