"""Scaling studies of training: measured on the devices at hand, predicted for those that are not, and by model size.

    python -m experiments.scaling_study --mode=measure --config=small --workdir=outputs/scaling [--stages=one,two]
    python -m experiments.scaling_study --mode=predict --config=paper --workdir=outputs/predicted
        [--device_counts=1,8,16,64,256,512] [--hardware=A100,H100,H200,H20] [--meshes=data:2,fsdp:8;data:8,tensor:2]
    python -m experiments.scaling_study --mode=size --store=outputs/tokens --workdir=outputs/sizes [--sizes=64x2,128x4]

measure: steps of both stages on 1, 2, 4 … all devices, weak scaling (a batch for each device) and strong scaling (one
batch divided), medians; --simulate=8 takes so many simulated CPU devices, which share this machine's cores. Beside each
time stands what the model of --mode=predict says of this machine, and the error.

predict: compiles the step for meshes of devices that are not there and reads from the compiled program what a device
holds and which collectives it takes part in; `pointillist_jax/scaling/roofline.py` makes a step time of that and of
datasheets. Everything that comes out is a prediction and is labelled so. The programs are those of XLA's GPU compiler
where JAX's CUDA plugin is installed, which needs no GPU for that (`pointillist_jax/scaling/gpu_programs.py` says how).
Else they are XLA's for CPUs, which has no reduce-scatter and sums bfloat16 as float32: an upper bound.

size: trains models of several sizes on the same data for the same steps (`experiments.train_ar`): loss against compute.

Every row is a process of its own and is written to <workdir>/rows.jsonl and rows.csv when it is there; --resume goes on
after a kill. The report is <workdir>/report.md with its pictures.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import flags
from tqdm import tqdm

from experiments import scaling_report
from experiments.common import json_line, open_workdir, refuse_flags, run, whole_numbers
from experiments.config_flags import define_config
from experiments.scaling_sizes import planned_sizes, size_rows
from experiments.scaling_worker import Row, run_row
from pointillist_jax.configs import Config
from pointillist_jax.files import UserError, atomic_path
from pointillist_jax.scaling import gpu_programs
from pointillist_jax.scaling.hardware import HARDWARE
from pointillist_jax.scaling.meshes import meshes_of, powers, takes
from pointillist_jax.sharding import mesh_sizes

MODE = flags.DEFINE_enum("mode", "measure", ["measure", "predict", "size"], "What to study.")
WORKDIR = flags.DEFINE_string("workdir", "outputs/scaling", "Where the rows and the report are written.")
STAGES = flags.DEFINE_list("stages", ["one"], "Of one, two.")
COUNTS = flags.DEFINE_list("device_counts", [], "Numbers of devices; by default 1, 2, 4 … all, or 1,8,16,64,256,512.")
MESHES = flags.DEFINE_string("meshes", "", "Meshes, with semicolons: data:8;data:4,tensor:2.")
HARDWARE_NAMES = flags.DEFINE_list("hardware", list(HARDWARE), f"With --mode=predict: of {', '.join(HARDWARE)}.")
BATCH = flags.DEFINE_integer("batch_per_device", 1, "Windows (stage two: subjects) of a device.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 5, "With --mode=measure: timed steps of a row; the median counts.", lower_bound=1)
SIMULATE = flags.DEFINE_integer("simulate", 0, "With --mode=measure: so many simulated CPU devices.", lower_bound=0)
UTILISATION = flags.DEFINE_float("utilisation", 0.5, "With --mode=predict: share of the peak of products.", 0.01, 1)
COMPILER = flags.DEFINE_enum(
    "compiler",
    "auto",
    ["auto", "gpu", "cpu"],
    "With --mode=predict: whose programs; auto is gpu where it is installed.",
)
TIMEOUT = flags.DEFINE_integer("timeout", 3600, "Seconds for one row.", lower_bound=1)
STORE = flags.DEFINE_string("store", None, "With --mode=size: a token store.")
SIZES = flags.DEFINE_list("sizes", ["64x2", "128x2", "128x4", "192x4"], "With --mode=size: <width>x<layers>.")
RESUME = flags.DEFINE_boolean("resume", False, "Go on with the rows that lie in --workdir.")
OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Replace what lies in --workdir.")
CONFIG = define_config("model", "train", "decoder")

OUTPUTS = ("rows.jsonl", "rows.csv", "report.md", "report.json", "runs", "throughput.png", "efficiency.png", "loss.png",
           "predicted.png")  # fmt: skip
# Flags that only one mode reads.
ONLY = {"simulate": "measure", "steps": "measure", "hardware": "predict", "utilisation": "predict",
        "compiler": "predict", "store": "size", "sizes": "size"}  # fmt: skip


def main() -> None:
    config = CONFIG()
    refuse_flags([name for name, mode in ONLY.items() if mode != MODE.value], f"with --mode={MODE.value}")
    if unknown := [name for name in HARDWARE_NAMES.value if name not in HARDWARE]:
        raise UserError(f"--hardware={unknown[0]} is none of {', '.join(HARDWARE)}.")
    if not STAGES.value or not set(STAGES.value) <= {"one", "two"}:
        raise UserError(f"--stages={','.join(STAGES.value)} must be of one, two.")
    if MODE.value == "predict":
        # It needs no device at hand.
        jax.config.update("jax_platforms", "cpu")
        if COMPILER.value == "gpu":
            gpu_programs.require_gpu_compiler()
    by_size = MODE.value == "size"
    work = planned_sizes(config, STORE.value, SIZES.value) if by_size else list(planned(config))
    workdir = open_workdir(WORKDIR.value, OUTPUTS, resume=RESUME.value, overwrite=OVERWRITE.value)
    found = size_rows(config, STORE.value, work, workdir) if by_size else run_rows(work, workdir)
    study = {
        "mode": MODE.value,
        "preset": flags.FLAGS["config"].value,
        "flags": {
            name: flags.FLAGS[name].value
            for name in ("stages", "meshes", "batch_per_device", *ONLY)
            if ONLY.get(name, MODE.value) == MODE.value
        },
        "config": dataclasses.asdict(config),
        "rows": found,
    }
    text, figures = scaling_report.write(study, workdir)
    print(text)
    json_line("scaling", {"mode": MODE.value, "preset": study["preset"], **figures})
    print(f"the report lies in {workdir}/report.md")


def planned(config: Config) -> Iterator[Row]:
    """The rows of --mode=measure and --mode=predict."""
    measure = MODE.value == "measure"
    at_hand = SIMULATE.value or len(jax.devices())
    counts = whole_numbers(COUNTS) if COUNTS.value else powers(at_hand) if measure else [1, 8, 16, 64, 256, 512]
    if measure and max(counts) > at_hand:
        raise UserError(f"--device_counts={max(counts)}: there are {at_hand} devices; --simulate=8 simulates eight.")
    compiler = COMPILER.value if COMPILER.value != "auto" else "gpu" if gpu_programs.has_gpu_compiler() else "cpu"
    simulated = ("cpu" if SIMULATE.value else "") if measure else compiler
    content = json.loads(json.dumps(dataclasses.asdict(config)))
    if MESHES.value and not any(takes(mesh, count) for mesh in MESHES.value.split(";") for count in counts):
        raise UserError(f"--meshes={MESHES.value}: none is a mesh of {' or '.join(map(str, counts))} devices.")
    seen = set()
    for stage in STAGES.value:
        for count in counts:
            for mesh in meshes_of(count, config, stage, MESHES.value):
                sizes = mesh_sizes(mesh, count)
                shares = sizes["data"] * sizes["fsdp"]
                # Weak scaling: as much for every device; strong: the largest count's batch for all.
                batches = {BATCH.value * shares} | ({BATCH.value * max(counts)} if measure else set())
                for batch in sorted(batches):
                    row = Row(stage, mesh, count, batch, STEPS.value if measure else 0, simulated, content)
                    if batch % shares == 0 and row.key not in seen:
                        seen.add(row.key)
                        yield row


def run_rows(rows: list[Row], workdir: Path) -> list[dict[str, Any]]:
    """The rows' figures, those of an earlier run included; each is on disk before the next begins."""
    path = workdir / "rows.jsonl"
    done = {row["key"]: row for row in scaling_report.read_rows(path)}
    found = []
    bar = tqdm(rows, unit="row")
    for row in bar:
        bar.set_description(f"stage {row.stage}, {row.mesh}")
        if row.key not in done:
            parts = {"key": row.key, "stage": row.stage, "mesh": row.mesh, "devices": row.devices, "batch": row.batch}
            simulated = {"simulated": row.simulated, "sizes": mesh_sizes(row.mesh, row.devices)}
            done[row.key] = parts | simulated | run_row(row, TIMEOUT.value)
            append(path, done[row.key])
        found.append(done[row.key])
    scaling_report.write_csv(found, workdir / "rows.csv")
    return found


def append(path: Path, row: Mapping[str, Any]) -> None:
    """One more line, which is whole or not there."""
    lines = path.read_text() if path.exists() else ""
    with atomic_path(path) as temporary:
        temporary.write_text(lines + json.dumps(row) + os.linesep)


if __name__ == "__main__":
    run(main)
