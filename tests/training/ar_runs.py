"""Runs of experiments.train_ar on a store of six small people: what the tests of the whole runtime start and kill.

Encoders are frozen and their features random: nothing here is about encoders, and without them programs are small.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pointillist_jax.configs import Config, DataConfig, EncoderConfig, ModelConfig, TrainConfig, preset
from pointillist_jax.data.condition_features import ConditionFeatures, FeatureSpec, create_features, feature_kind
from pointillist_jax.data.token_store import (
    FLAME_FIELDS,
    StoreSpec,
    StoreWriter,
    SubjectRecord,
    TokenStore,
    open_store,
)
from pointillist_jax.flame import open_head
from pointillist_jax.models.condition import feature_shapes
from pointillist_jax.tokens import PointTokenizer
from pointillist_jax.training.metric_log import read_metrics

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Config(
    model=ModelConfig(
        width=32, layers=1, heads=4, head_dim=8, mlp_width=64, window=32, attention_block=16,
        encoder=EncoderConfig(image_size=14, num_points=16, frozen=True),
    ),
    data=DataConfig(held_out=0, portrait_size=14),
    train=TrainConfig(steps=4, batch_size=4, learning_rate=5e-3, warmup_steps=2, log_every=1, eval_every=0,
                      checkpoint_every=2),
)  # fmt: skip


def changed(config: Config = CONFIG, **train) -> Config:
    """The config with other fields of `train`."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train))


def write_people(path: Path, side: int = 14) -> TokenStore:
    """Six people whose clouds are ellipsoids of their own, with pictures of noise as portraits."""
    rng, head = np.random.default_rng(0), open_head("coarse")
    tokenizer = PointTokenizer(num_faces=head.num_faces)
    neutral = head.neutral_params()
    records = []
    for i in range(6):
        points = rng.normal(size=(40, 3))
        points *= (0.1 + 0.02 * i) / np.linalg.norm(points, axis=1, keepdims=True)
        flame = {key: rng.normal(0, 0.3, getattr(neutral, key).shape).astype(np.float32) for key in FLAME_FIELDS}
        records.append(
            SubjectRecord(
                name=f"p{i}", tokens=tokenizer.encode(points, rng.integers(0, 20, 40)), shape=flame["shape"],
                portrait=rng.integers(0, 256, (side, side, 3), dtype=np.uint8), flame=flame, fit_sha256=str(i),
            )
        )  # fmt: skip
    writer = StoreWriter(path, StoreSpec(tokenizer, head.sha256, head.source, portrait_size=side))
    writer.write_shard(records)
    writer.finish()
    return open_store(path)


def write_features(store: TokenStore, config: Config = CONFIG, weights: str = "noise", **options) -> ConditionFeatures:
    """Random features for everyone."""
    rng, shapes = np.random.default_rng(1), feature_shapes(config.model)
    spec = FeatureSpec(feature_kind(config.model.encoder), shapes, {"image": weights, "points": weights}, **options)
    features = create_features(store, spec, resume=False, overwrite=False)
    for i in range(len(store)):
        features.write(i, {name: rng.normal(size=shape) for name, shape in shapes.items()})
    return features


def command(store: Path, workdir: Path, config: Config = CONFIG, *more: str) -> list[str]:
    """`python -m experiments.train_ar` with this config, and --resume."""
    parts = ("model", "data", "train")
    settings = [line for part in parts for line in _flags(getattr(preset("tiny"), part), getattr(config, part), part)]
    script = [sys.executable, "-m", "experiments.train_ar", f"--store={store}", f"--workdir={workdir}", "--resume"]
    return [*script, *settings, *more]


def _flags(old, new, path: str) -> list[str]:
    found = []
    for field in dataclasses.fields(new):
        before, after, name = getattr(old, field.name), getattr(new, field.name), f"{path}.{field.name}"
        if dataclasses.is_dataclass(after):
            found += _flags(before, after, name)
        elif before != after and field.name != "num_faces":
            found.append(f"--config.{name}={','.join(map(str, after)) if isinstance(after, tuple) else after}")
    return found


def start(arguments: list[str], cache: Path, devices: int = 1, optimized: bool = False) -> subprocess.Popen:
    """Starts a command on simulated CPU devices. `cache` keeps compiled programs for the next start.

    Compiling is most of the time in these tests: unless `optimized`, LLVM's expensive passes are left out.
    """
    quick = "" if optimized else " --xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}{quick}",
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """Waits for a process that has to end with this exit code; returns what it said."""
    said, _ = process.communicate(timeout=600)
    assert process.returncode == code, said[-3000:]
    return said


def wait_for(event: Callable[[], bool], process: subprocess.Popen) -> bool:
    """Returns True when `event` happens, False if the process ends before; fails after ten minutes."""
    limit = time.monotonic() + 600
    while not event():
        if process.poll() is not None:
            return False
        assert time.monotonic() < limit, "nothing happened in ten minutes"
        time.sleep(0.002)
    return True


def losses(workdir: Path) -> dict[int, float]:
    """Step → training loss."""
    return {line["step"]: line["loss"] for line in read_metrics(workdir) if "loss" in line}
