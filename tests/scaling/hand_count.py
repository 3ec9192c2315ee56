"""Collectives of a two-layer model on meshes of 8 simulated devices; prints {mesh: inventory} as JSON.

python -m tests.scaling.hand_count '{"accumulate": 1}' data:8 tensor:8 …
"""

from __future__ import annotations

import dataclasses
import json
import sys

from experiments.step_programs import stage_one
from pointillist_jax.configs import ModelConfig, TrainConfig
from pointillist_jax.scaling.collectives import collectives, inventory
from pointillist_jax.sharding import make_mesh

BATCH, CONTEXT = 8, 16
MODEL = ModelConfig(
    num_faces=90, bins=64, width=64, layers=2, heads=8, head_dim=8, mlp_width=128, window=64, coord_tables="learned",
    loss_support="vocab", tied_head=False, remat="none", scan_layers=False, attention_block=64,
)  # fmt: skip


def main() -> None:
    train = dataclasses.replace(TrainConfig(warmup_steps=0), **json.loads(sys.argv[1]))
    found = {}
    for text in sys.argv[2:]:
        mesh = make_mesh(text)
        compiled = stage_one(MODEL, train, mesh, BATCH * train.accumulate, CONTEXT).compile()
        found[text] = inventory(collectives(compiled.as_text(), mesh.shape))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
