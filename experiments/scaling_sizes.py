"""`experiments.scaling_study --mode=size`: models of several sizes, trained alike on the same data."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from experiments.scaling_worker import ROOT
from pointillist_jax.configs import Config, ModelConfig
from pointillist_jax.data.token_store import open_store
from pointillist_jax.files import UserError
from pointillist_jax.flops import training_flops, transformer_flops
from pointillist_jax.models.ar import param_specs
from pointillist_jax.models.condition import context_length
from pointillist_jax.models.layers import count_parameters
from pointillist_jax.training.metric_log import read_metrics


def parse_sizes(texts: Sequence[str]) -> list[tuple[int, int]]:
    """(width, layers) of each "<width>x<layers>"."""
    found = [re.fullmatch(r"(\d{1,5})x(\d{1,3})", text) for text in texts]
    if not found or not all(match and int(match[1]) and int(match[2]) for match in found):
        raise UserError(f"--sizes={','.join(texts)} must be <width>x<layers>, with commas: 64x2,128x4.")
    return [(int(match[1]), int(match[2])) for match in found]


def sized(model: ModelConfig, width: int, layers: int) -> ModelConfig:
    """The model with the proportions of `model`: heads of the same size, the same ratio of feed-forward width."""
    if width % model.head_dim:
        raise UserError(f"--sizes={width}x{layers}: the width must be a multiple of the heads' {model.head_dim}.")
    heads, ffw = width // model.head_dim, round(model.mlp_width / model.width * width / 8) * 8
    return dataclasses.replace(model, width=width, layers=layers, heads=heads, mlp_width=ffw, kv_heads=0)


def planned_sizes(config: Config, store: str | None, texts: Sequence[str]) -> list[ModelConfig]:
    """The models to train, once it is sure that they can be."""
    models = [sized(config.model, *size) for size in parse_sizes(texts)]
    if store is None:
        raise UserError("--store is missing: name a token store (python -m experiments.tokenize makes one).")
    open_store(store)
    return models


def size_rows(config: Config, store: str, models: Sequence[ModelConfig], workdir: Path) -> list[dict[str, Any]]:
    """Trains each model for the config's steps with `experiments.train_ar`; a run that was begun goes on."""
    rows = []
    for model in tqdm(models, unit="model"):
        name = f"{model.width}x{model.layers}"
        run = workdir / "runs" / name
        changed = {name: getattr(model, name) for name in ("width", "layers", "heads", "mlp_width", "kv_heads")}
        command = [sys.executable, "-m", "experiments.train_ar", f"--config={flags.FLAGS['config'].value}",
                   f"--store={Path(store).resolve()}", f"--workdir={run.resolve()}", "--resume",
                   *(f"--config.model.{key}={value}" for key, value in changed.items()), *_given()]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
            raise UserError(f"training {name} has failed: {said[-1]}")
        rows.append({"key": name, **changed, **outcome(model, config, read_metrics(run))})
    return rows


def outcome(model: ModelConfig, config: Config, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a run cost and reached, from its metric lines."""
    evaluated = [line for line in lines if line.get("eval_loss") is not None]
    if not evaluated:
        raise UserError("the run has no evaluation: the store needs held-out subjects (--config.data.held_out).")
    last = evaluated[-1]
    window = training_flops(transformer_flops(model, context_length(model)))
    timed = [line["seconds_per_step"] for line in lines if "seconds_per_step" in line]
    return {
        "parameters": count_parameters(param_specs(model)),
        "steps": last["step"],
        "tokens": last["step"] * config.train.batch_size * model.window_tokens,
        "flops": last["step"] * config.train.batch_size * window,
        "loss": last["eval_loss"],
        "curve": [[line["step"] * config.train.batch_size * window, line["eval_loss"]] for line in evaluated],
        "seconds_per_step": sorted(timed)[len(timed) // 2] if timed else None,
    }


def _given() -> list[str]:
    """The --config flags of this command, for the runs."""
    return [arg for arg in sys.argv[1:] if arg.startswith(("--config.", "--noconfig."))]
