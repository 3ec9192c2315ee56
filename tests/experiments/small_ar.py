"""A token store of small people and a model that was never trained: what generating and extracting begin with."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import experiments
from pointillist_jax.configs import Config, DataConfig, EncoderConfig, ModelConfig
from pointillist_jax.data.token_store import (
    FLAME_FIELDS,
    StoreSpec,
    StoreWriter,
    SubjectRecord,
    TokenStore,
    open_store,
)
from pointillist_jax.flame import open_head
from pointillist_jax.tokens import PointTokenizer
from pointillist_jax.training.ar import init_params
from pointillist_jax.training.checkpoints import Checkpoints
from pointillist_jax.training.state import TrainState
from tests.compiler import QUICK

ROOT = Path(experiments.__file__).parent.parent
CONFIG = Config(
    model=ModelConfig(
        width=16, layers=1, heads=2, head_dim=8, mlp_width=16, window=32, attention="xla", slot_layers=1,
        encoder=EncoderConfig(image_size=14, num_points=16),
    ),
    data=DataConfig(held_out=2, portrait_size=14),
)  # fmt: skip


def write_people(path: Path, people: int, points: int = 20, head=None) -> TokenStore:
    """People whose clouds are ellipsoids of their own, with portraits of their own grey."""
    rng, head = np.random.default_rng(0), head or open_head("coarse")
    tokenizer = PointTokenizer(num_faces=head.num_faces)
    flame = {key: np.asarray(getattr(head.neutral_params(), key)) for key in FLAME_FIELDS}
    records = []
    for i in range(people):
        cloud = rng.normal(size=(points + i, 3))
        cloud *= rng.uniform(0.05, 0.15, 3) / np.linalg.norm(cloud, axis=1, keepdims=True)
        binding = rng.integers(0, head.num_faces, points + i)
        records.append(
            SubjectRecord(
                name=f"p{i}", tokens=tokenizer.encode(cloud, binding), shape=flame["shape"],
                portrait=np.full((14, 14, 3), 255 * i // people, np.uint8), flame=flame, fit_sha256=str(i),
            )
        )  # fmt: skip
    writer = StoreWriter(path, StoreSpec(tokenizer, head.sha256, head.source, portrait_size=14))
    writer.write_shard(records)
    writer.finish()
    return open_store(path)


def write_ar(workdir: Path, store: TokenStore, config: Config = CONFIG, seed: int = 0) -> None:
    """A checkpoint as `experiments.train_ar` leaves it, of step 7, with random parameters."""

    class Stream:
        def get_state(self):
            return {}

    config = dataclasses.replace(config, model=config.model.for_tokenizer(store.tokenizer))
    params = nn.unbox(jax.jit(init_params(config.model))(jax.random.PRNGKey(seed)))
    state = TrainState(jnp.asarray(7), params, {"none": jnp.zeros(1)}, None, jax.random.PRNGKey(0))
    meta = {"config": dataclasses.asdict(config), "store": store.spec.to_json(), "seed": 0}
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(state, Stream(), meta)


def command(script: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"experiments.{script}", *arguments]


def environment(root: Path, quick: bool = False) -> dict[str, str]:
    """With a cache of compiled programs below `root`, shared by all processes of a test module.

    Args:
      quick: without most of the compiler's optimisations, which short runs take longer for than they save.
    """
    return (os.environ | {"XLA_FLAGS": QUICK} if quick else dict(os.environ)) | {
        "JAX_COMPILATION_CACHE_DIR": str(root / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def start(root: Path, script: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(script, *arguments), cwd=ROOT, env=environment(root), capture_output=True, text=True, timeout=900
    )
