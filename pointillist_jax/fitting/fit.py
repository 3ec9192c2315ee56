"""The fitting loop: steps, density control, budget, checkpoints (DESIGN §9; facts A.3–A.5)."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from pointillist_jax.configs import FitConfig
from pointillist_jax.files import UserError
from pointillist_jax.fitting import density, schedule
from pointillist_jax.fitting.data import FitData, Views, view_order
from pointillist_jax.fitting.evaluate import measure_capacity
from pointillist_jax.fitting.state import (
    FitState,
    bucket_size,
    flame_params,
    gaussians,
    init_state,
    load_state,
    save_state,
)
from pointillist_jax.fitting.step import Batch, Metrics, Scene, StepOptions, blending_weights, make_scene, train_step
from pointillist_jax.flame import FlameModel, FlameParams, face_frames, flame_vertices
from pointillist_jax.gaussians import Gaussians

_log = logging.getLogger(__name__)

# Views whose blending weights are summed into the importance of a Gaussian.
_IMPORTANCE_VIEWS = 96


@dataclasses.dataclass(frozen=True)
class FitResult:
    """A finished fit.

    Attributes:
      gaussians: triangle-local, with binding.
      params: FLAME parameters [T, ...], fine-tuned if so configured.
      state, scene: for `evaluate` and `render_views`.
      history: what happened: counts, losses, density control, by iteration.
      capacity: of the rasteriser at the end.
    """

    gaussians: Gaussians
    params: FlameParams
    state: FitState
    scene: Scene
    history: list[dict[str, Any]]
    capacity: int


def fit(
    data: FitData,
    model: FlameModel,
    config: FitConfig,
    *,
    checkpoint: str | os.PathLike | None = None,
    progress: Callable[[int, dict[str, Any]], None] | None = None,
) -> FitResult:
    """Fits rigged Gaussians to one person's views.

    The result is a function of data, head and configuration (seed included), bit for bit on one machine, however often
    it was interrupted and resumed.

    Args:
      data: views and tracked FLAME parameters.
      model: the head that was tracked.
      config: schedule.
      checkpoint: file that the whole state is written to every `save_interval` iterations, and continued from if it
        exists. It must be of the same data, head and configuration.
      progress: called after every step with the iteration and figures of the last steps.

    Raises:
      UserError: data that cannot be fitted, a configuration that cannot run, a checkpoint of something else.
    """
    require_fittable(data, model, config)
    scene = make_scene(model, data.params, config.finetune_flame)
    run = _Run(data, model, config, scene)
    # Both open heads lie in one file: its sha256 alone does not tell them apart.
    head = {"sha256": model.sha256, "faces": model.num_faces}
    identity = {"config": dataclasses.asdict(config), "data": data.fingerprint(), "head": head}
    if checkpoint is not None and Path(checkpoint).exists():
        run.restore(checkpoint, identity)
    for iteration in range(int(run.state.step) + 1, config.iterations + 1):
        figures = run.iterate(iteration)
        if checkpoint is not None and (iteration % config.save_interval == 0 or iteration == config.iterations):
            run.save(checkpoint, identity)
        if progress is not None:
            progress(iteration, figures)
    return FitResult(
        gaussians(run.state), flame_params(run.state, data.params), run.state, scene, run.history, run.capacity
    )


def require_fittable(data: FitData, model: FlameModel, config: FitConfig) -> None:
    """Raises UserError for data that cannot be fitted, and for a configuration that cannot run."""
    data.check(model)
    schedule.check(config, model.num_faces)
    train = data.splits["train"]
    if config.views_per_step > 1 and len(np.unique(train.sizes, axis=0)) > 1:
        raise UserError(f"{data.subject} has images of different sizes; set fit.views_per_step=1 or resize the images.")


class _Run:
    """The mutable part of a fit: the state and what is chosen around it on the host."""

    def __init__(self, data: FitData, model: FlameModel, config: FitConfig, scene: Scene):
        self.data, self.model, self.config, self.scene = data, model, config, scene
        self.views: Views = data.splits["train"]
        self.state = init_state(model, data.params, config)
        # With a budget the largest number of Gaussians is known, so one bucket and one compilation serve the whole run.
        ceiling = self._ceiling()
        self.bucket = (
            bucket_size(model.num_faces) if ceiling is None else -(-max(ceiling, model.num_faces) // 256) * 256
        )
        self.state = density.from_host(self.state, density.to_host(self.state), self.bucket)
        self.capacity = measure_capacity(self.state, scene, self.views)
        # Sizes of triangles, which the thresholds in metres need, are those of the first training timestep.
        first = int(np.asarray(self.views.timesteps)[0])
        vertices = flame_vertices(model, data.params.timestep(first))
        self.face_scales = np.asarray(face_frames(vertices, model.faces).scale)
        self.history: list[dict[str, Any]] = []
        self.recent: list[tuple[float, float]] = []

    def iterate(self, iteration: int) -> dict[str, Any]:
        config = self.config
        metrics = self._step(iteration)
        self.recent = [*self.recent[-99:], (float(metrics.loss), float(metrics.mse))]
        event = self._control(iteration)
        figures = self._figures()
        if event or iteration % config.log_interval == 0 or iteration == config.iterations:
            self.history.append({"iteration": iteration, **figures, **event})
        return figures

    def save(self, path: str | os.PathLike, identity: dict[str, Any]) -> None:
        extra = {
            "identity": identity,
            "capacity": self.capacity,
            "bucket": self.bucket,
            "history": self.history,
            "recent": self.recent,
        }
        save_state(path, self.state, extra)

    def restore(self, path: str | os.PathLike, identity: dict[str, Any]) -> None:
        state, extra = load_state(path, self.state)
        found = extra.get("identity")
        if found != identity:
            raise UserError(
                f"{path} was written by a fit of {_difference(found, identity)}; continue with the same settings, or "
                "start again with --overwrite."
            )
        self.state, self.capacity, self.bucket = state, int(extra["capacity"]), int(extra["bucket"])
        self.history, self.recent = extra["history"], [tuple(pair) for pair in extra["recent"]]

    def _step(self, iteration: int) -> Metrics:
        batch = self._batch(iteration)
        rates = schedule.learning_rates(self.config, iteration, self.data.extent)
        rates = {key: np.float32(value) for key, value in rates.items()}
        while True:
            options = StepOptions.of(self.config, self.capacity, schedule.active_sh_degree(self.config, iteration))
            state, metrics = train_step(self.state, batch, self.scene, rates, options)
            if (overflow := int(metrics.overflow)) == 0:
                break
            # The step was not taken: again, with room for every intersection.
            grown = measure_capacity(self.state, self.scene, self.views, at_least=self.capacity + overflow)
            _log.info("iteration %d: rasteriser capacity %d → %d", iteration, self.capacity, grown)
            self.capacity = grown
        if not np.isfinite(float(metrics.loss)):
            raise UserError(
                f"{self.data.subject}: the loss is not finite at iteration {iteration}; check its cameras, images and "
                "FLAME parameters, or lower the learning rates."
            )
        self.state = state
        return metrics

    def _batch(self, iteration: int) -> Batch:
        B, views = self.config.views_per_step, self.views
        chosen = view_order(len(views), self.config.seed, (iteration - 1) * B, B)
        return Batch(
            images=np.stack([views.image(int(n), self.config.background) for n in chosen]).astype(np.float32),
            viewmats=np.asarray(views.viewmats, np.float32)[chosen],
            Ks=np.asarray(views.Ks, np.float32)[chosen],
            timesteps=np.asarray(views.timesteps, np.int32)[chosen],
        )

    def _control(self, iteration: int) -> dict[str, Any]:
        """Whatever of density control is due after this iteration; says what was done."""
        config, event = self.config, {}
        if schedule.densifies(config, iteration):
            cloud = density.to_host(self.state)
            ceiling = self._ceiling()
            cloud, changes = density.densify_and_prune(
                cloud,
                self._mean_gradients(),
                np.asarray(self.state.max_radii)[: len(cloud)],
                self.face_scales,
                self.data.extent,
                config,
                np.random.default_rng([config.seed, 2, iteration]),
                prune_large=schedule.prunes_large(config, iteration),
                room=None if ceiling is None else ceiling - len(cloud),
            )
            self._replace(cloud)
            event |= dataclasses.asdict(changes)
        if schedule.resets_opacities(config, iteration):
            # The statistics go on through a reset unless density control cleared them just now.
            statistics = {k: getattr(self.state, k) for k in ("grad_sum", "grad_count", "max_radii")}
            self._replace(density.reset_opacities(density.to_host(self.state)))
            self.state = self.state.replace(**statistics)
            event["opacities_reset"] = True
        budget = schedule.budget_at(config, iteration, int(self.state.num))
        if budget is not None:
            cloud = density.to_host(self.state)
            self._replace(density.prune_to_budget(cloud, self._importance(), budget))
            event["pruned_to"] = int(self.state.num)
        return event

    def _replace(self, cloud: density.Cloud) -> None:
        if len(cloud) > self.bucket:
            self.bucket = bucket_size(len(cloud))
            self.capacity = max(self.capacity, 2 * self.bucket)
            _log.info("%d Gaussians: bucket of %d rows", len(cloud), self.bucket)
        self.state = density.from_host(self.state, cloud, self.bucket)

    def _ceiling(self) -> int | None:
        config = self.config
        return int(config.max_points * config.overshoot) if config.max_points else None

    def _mean_gradients(self) -> np.ndarray:
        num = int(self.state.num)
        total, count = np.asarray(self.state.grad_sum)[:num], np.asarray(self.state.grad_count)[:num]
        return total / np.maximum(count, 1)

    def _importance(self) -> np.ndarray:
        """[G] accumulated blending weight over training views."""
        views, total = self.views, np.zeros(int(self.state.num), np.float64)
        for n in np.unique(np.linspace(0, len(views) - 1, min(len(views), _IMPORTANCE_VIEWS)).astype(int)):
            width, height = (int(x) for x in views.sizes[n])
            while True:
                weights, overflow = blending_weights(
                    self.state,
                    self.scene,
                    jnp.int32(views.timesteps[n]),
                    jnp.asarray(views.viewmats[n], jnp.float32),
                    jnp.asarray(views.Ks[n], jnp.float32),
                    width=width,
                    height=height,
                    capacity=self.capacity,
                )
                if int(overflow) == 0:
                    break
                self.capacity = measure_capacity(self.state, self.scene, views, at_least=self.capacity + int(overflow))
            total += np.asarray(weights)[: len(total)]
        return total

    def _figures(self) -> dict[str, Any]:
        loss, mse = np.mean(self.recent, axis=0)
        return {
            "gaussians": int(self.state.num),
            "loss": round(float(loss), 6),
            "train_psnr": round(float(-10 * np.log10(max(mse, 1e-12))), 3),
        }


def _difference(found: Any, wanted: dict[str, Any]) -> str:
    if not isinstance(found, dict) or found.get("head") != wanted["head"]:
        return "another head"
    if found.get("data") != wanted["data"]:
        return "other cameras, timesteps or parameters"
    old, new = found.get("config", {}), wanted["config"]
    changed = [f"{key}={old.get(key)!r} (now {value!r})" for key, value in new.items() if old.get(key) != value]
    return f"another configuration: {', '.join(changed[:4])}"
