"""Collectives of a two-layer model on meshes of 8 devices that are not there; prints {mesh: inventory} as JSON.

python -m tests.scaling.hand_count cpu '{"accumulate": 1}' data:8 tensor:8 …

With "gpu" the programs are those of XLA's GPU compiler (`scaling.gpu_programs`), else those of simulated CPU devices.
"""

from __future__ import annotations

import dataclasses
import json
import sys

from experiments.step_programs import stage_one
from pointillist_jax.configs import ModelConfig, TrainConfig
from pointillist_jax.scaling.collectives import collectives, inventory
from pointillist_jax.scaling.gpu_programs import gpu_devices
from pointillist_jax.sharding import make_mesh

BATCH, CONTEXT = 8, 16
MODEL = ModelConfig(
    num_faces=90, bins=64, width=64, layers=2, heads=8, head_dim=8, mlp_width=128, window=64, coord_tables="learned",
    loss_support="vocab", tied_head=False, remat="none", scan_layers=False, attention_block=64,
)  # fmt: skip


def main() -> None:
    devices = gpu_devices(8) if sys.argv[1] == "gpu" else None
    train = dataclasses.replace(TrainConfig(warmup_steps=0), **json.loads(sys.argv[2]))
    found = {}
    for text in sys.argv[3:]:
        mesh = make_mesh(text, devices)
        compiled = stage_one(MODEL, train, mesh, BATCH * train.accumulate, CONTEXT).compile()
        found[text] = inventory(collectives(compiled.as_text(), mesh.shape))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
