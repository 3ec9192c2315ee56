"""What the tests of stage two's scripts begin with: people with a store, an untrained AR model, captures, features."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import flax.linen as nn
import imageio.v3 as iio
import jax
import jax.numpy as jnp
import numpy as np

from pointillist_jax.cameras import orbit
from pointillist_jax.configs import DecoderConfig
from pointillist_jax.data.capture_writer import write_capture
from pointillist_jax.data.point_features import FeatureSet
from pointillist_jax.flame import open_head
from pointillist_jax.flame.param_files import save_flame_params
from pointillist_jax.training.checkpoints import Checkpoints
from pointillist_jax.training.decoder import init_params
from pointillist_jax.training.state import TrainState
from tests.experiments.small_ar import start, write_ar, write_people

SIZE, PEOPLE = 32, 4
SETTINGS = {
    "width": 16, "layers": 1, "heads": 2, "head_dim": 8, "mlp_width": 16, "attention": "xla", "views": 2,
    "eval_views": 2, "train.steps": 4, "train.batch_size": 2, "train.eval_every": 2, "train.checkpoint_every": 2,
    # Evaluations fall between logged steps.
    "train.log_every": 3, "train.warmup_steps": 1, "train.learning_rate": 1e-2,
}  # fmt: skip


def small(**changes) -> list[str]:
    """Flags of a decoder that trains in seconds."""
    return [f"--config.decoder.{name}={value}" for name, value in (SETTINGS | changes).items()]


def write_decoder(workdir: Path, features: FeatureSet) -> None:
    """A checkpoint as `experiments.train_decoder` leaves it, of step 7, with random parameters."""

    class Stream:
        def get_state(self):
            return {}

    changes = {name: value for name, value in SETTINGS.items() if not name.startswith("train.")}
    config = dataclasses.replace(DecoderConfig(), **changes)
    config = config.for_features(features.spec.store.tokenizer, features.spec.width)
    params = nn.unbox(jax.jit(init_params(config))(jax.random.PRNGKey(0)))
    state = TrainState(jnp.asarray(7), params, {"none": jnp.zeros(1)}, None, jax.random.PRNGKey(0))
    meta = {"config": {"decoder": dataclasses.asdict(config)}, "features": features.spec.to_json(), "seed": 0}
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(state, Stream(), meta | {"capacity": 1})


def write_everything(root: Path) -> None:
    """`store/`, `ar/`, `features/`, `captures/p0` … `p3`, `me.png` and its tracker's `me.npz` of two timesteps.

    The photographs are plain pictures that no renderer made: what is tested is what becomes of them.
    """
    store = write_people(root / "store", PEOPLE)
    write_ar(root / "ar", store)
    head, rng = open_head("coarse"), np.random.default_rng(0)
    cameras = orbit(3, width=SIZE, height=SIZE, distance=1.0, azimuth=(-0.6, 0.9), closed=False)

    def render(local, params, cameras):
        del local, params
        images = np.ones((3, SIZE, SIZE, 3))
        images[:, 8:24, 8:24] = rng.uniform(size=(3, 1, 1, 3))
        return images, np.ones((3, SIZE, SIZE))

    for name in store.subjects:
        folder = root / "captures" / name
        folder.mkdir(parents=True)
        neutral = head.neutral_params((2,))
        shape = store.identity(store.index(name))["shape"]
        motion = neutral.replace(
            shape=jnp.asarray(shape), rotation=jnp.asarray(rng.normal(0, 0.2, (2, 3)), jnp.float32)
        )
        canonical = head.neutral_params().replace(shape=motion.shape).canonical()
        write_capture(folder, head, None, motion, canonical, cameras, render, validation_camera=1)
    iio.imwrite(root / "me.png", rng.integers(0, 256, (20, 16, 4), dtype=np.uint8))
    tracked = head.neutral_params((2,))
    tracked = tracked.replace(shape=tracked.shape + 1.0, expr=tracked.expr.at[1].set(0.8))
    save_flame_params(root / "me.npz", tracked, head)
    done = start(root, "extract_features", f"--ar={root}/ar", f"--store={root}/store", f"--workdir={root}/features")
    assert done.returncode == 0, done.stderr
