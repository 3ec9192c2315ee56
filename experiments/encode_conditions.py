"""Runs frozen encoders over the conditions of a token store once, and keeps their features in it (DESIGN §6).

    python -m experiments.encode_conditions --config=paper --store=outputs/tokens \
       --image_weights=dinov2_vitl14_reg4_pretrain.pth --point_weights=shapevae-256.ckpt [--resume|--overwrite]

Which encoders: config.model.encoder. Their weights are yours to download: DINOv2's .pth or .safetensors, Michelangelo's
.ckpt. `--random_weights` stands in for both, to try a pipeline out. Writes <store>/features/<kind>/<subject>.npz, which
`train_ar` reads where the same config says that the encoders are frozen. A kill costs the batch being encoded: --resume
goes on, also after subjects were added to the store. Features of other weights are refused.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from experiments.common import run
from experiments.config_flags import define_config
from experiments.encoder_weights import RANDOM_WEIGHTS, frozen_encoders
from experiments.heads import named_head
from pointillist_jax.configs import ModelConfig
from pointillist_jax.data.condition_features import (
    DTYPES,
    ConditionFeatures,
    FeatureSpec,
    create_features,
    feature_kind,
)
from pointillist_jax.data.token_store import open_store
from pointillist_jax.files import UserError
from pointillist_jax.flame import FlameModel
from pointillist_jax.models.condition import encode_features, feature_shapes
from pointillist_jax.sharding import make_mesh, shard_batch

STORE = flags.DEFINE_string("store", None, "The token store (experiments.tokenize); features are written into it.")
DTYPE = flags.DEFINE_enum("dtype", "float16", DTYPES, "Of the stored features.")
BATCH = flags.DEFINE_integer("batch_size", 4, "Subjects per device and pass.", lower_bound=1)
FLAME = flags.DEFINE_string("flame", None, "Your FLAME .pkl, if the store was made with it.")
SEED = flags.DEFINE_integer("seed", 0, "Of --random_weights.", lower_bound=0)
RESUME = flags.DEFINE_boolean("resume", False, "Encode the subjects that have no features yet.")
OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Delete the features that are there first.")
CONFIG = define_config("model.encoder")


def main() -> None:
    start = time.perf_counter()
    if STORE.value is None:
        raise UserError("--store is missing: name a token store (python -m experiments.tokenize makes one).")
    store = open_store(STORE.value)
    head = named_head(store.spec.flame_source, store.spec.flame_sha256, STORE.value, FLAME.value)
    model = CONFIG().model
    model = dataclasses.replace(model, encoder=dataclasses.replace(model.encoder, frozen=True))
    encoders = frozen_encoders(model, SEED.value)
    if RANDOM_WEIGHTS.value:
        print("warning: the encoders are random and see nothing; give --image_weights and --point_weights.")
    spec = FeatureSpec(feature_kind(model.encoder), feature_shapes(model), encoders.weights, DTYPE.value)
    features = create_features(store, spec, resume=RESUME.value, overwrite=OVERWRITE.value)
    encode(features, encoders.params, model, head, BATCH.value * jax.device_count())

    size = sum(path.stat().st_size for path in features.folder.glob("*.npz"))
    shapes = ", ".join(f"{name} {tuple(shape)}" for name, shape in spec.shapes.items())
    if without := int((~store.has_portrait).sum()):
        print(f"{without} of {len(store)} subjects have no portrait and get no features.")
    print(f"{spec.kind}: {shapes}, {spec.dtype}, {size / 2**20:.1f} MiB; done in {time.perf_counter() - start:.0f} s")
    print(f"everything lies in {features.folder}/:")
    print(
        "  <subject>.npz  image and points, for train_ar with --config.model.encoder.frozen=true and the same encoders"
    )
    print("  meta.json      the encoders and the sha256 of their weights")


def encode(
    features: ConditionFeatures,
    encoders: dict,
    config: ModelConfig,
    head: FlameModel,
    batch_size: int,
    bar: bool = True,
) -> list[Path]:
    """Encodes every subject that has a portrait and no features yet. Returns the files written."""
    store = features.store
    able = np.flatnonzero(store.has_portrait).tolist()
    todo = [i for i in able if not features.has(i)]
    mesh = make_mesh("")
    run_encoders = jax.jit(lambda params, portrait, flame: encode_features(params, config, head, portrait, flame))
    written = []
    with tqdm(total=len(able), initial=len(able) - len(todo), unit="person", disable=not bar) as progress:
        for first in range(0, len(todo), batch_size):
            group = todo[first : first + batch_size]
            # The last batch is filled up with its last subject: one program for all.
            rows = [store.condition(i) for i in (group + [group[-1]] * batch_size)[:batch_size]]
            batch = shard_batch(jax.tree.map(lambda *x: np.stack(x), *rows), mesh)
            with jax.set_mesh(mesh):
                found = jax.tree.map(np.asarray, run_encoders(encoders, batch["portrait"], batch["flame"]))
            for row, i in enumerate(group):
                written.append(features.write(i, {name: value[row] for name, value in found.items()}))
            progress.update(len(group))
    return written


if __name__ == "__main__":
    run(main)
