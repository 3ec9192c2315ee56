"""JAX against the PyTorch reference: block by block, whole models, gradients, optimiser steps, sampling, speed.

    python -m experiments.compare_torch --config=tiny --seeds=0,1 [--dtype=float64] [--steps=100]
       [--what=blocks,gradients,steps,sampling,speed] [--config.model.<field>=…] [--workdir=outputs/compare_torch]

The same random weights and inputs go through `pointillist_jax` and through experiments/torch_reference. Every block is
given the same input on both sides, so that its row speaks of this block alone; "models" are the same places with all
blocks in a chain. `steps` trains the point transformer (with its encoders, unless they are frozen) and the Gaussian
decoder (through head, rig, rasteriser and losses) from the same weights on the same batches. `sampling` draws with the
same uniform numbers, with the grammar and (longer than the window) without.

Prints a table, worst first: largest difference, the same over the largest value expected, 1 - cosine, tolerance
(`torch_parity/rows.py` says where the tolerances come from). Writes rows.json, rows.csv and drift.png. `speed` times
both sides in turn, at --length and --points. Exit code 1 if a tolerance is broken; the last lines then name the first
diverging block in the order of the data flow.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments.charts import line_chart
from experiments.common import json_line, run
from experiments.config_flags import define_config
from experiments.media import write_image
from pointillist_jax.configs import Config
from pointillist_jax.files import UserError, atomic_path, require_writable
from pointillist_jax.models.condition import context_length

CONFIG = define_config("model", "decoder", "train")
SEEDS = flags.DEFINE_list("seeds", ["0"], "Of weights and inputs; every one is a comparison of its own.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "float64", "bfloat16"], "Of the computation.")
STEPS = flags.DEFINE_integer("steps", 20, "Optimiser steps of stage one.", lower_bound=1)
STEPS_TWO = flags.DEFINE_integer(
    "steps_two", 5, "Optimiser steps of stage two (experiments/LOG.md: why few).", lower_bound=1
)
WHAT = flags.DEFINE_list("what", ["blocks", "gradients", "steps", "sampling"], "Parts; speed is one more.")
LENGTH = flags.DEFINE_integer("length", 64, "Tokens of a window that is compared, a multiple of 4.", lower_bound=8)
POINTS = flags.DEFINE_integer("points", 64, "Points of a cloud that is decoded and splatted.", lower_bound=4)
TOKENS = flags.DEFINE_integer("tokens", 400, "Tokens that are sampled, with the grammar and without.", lower_bound=4)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed runs of each contestant of `speed`.", lower_bound=1)
WORKDIR = flags.DEFINE_string("workdir", "outputs/compare_torch", "Where rows and chart go.")

PARTS = ("blocks", "gradients", "steps", "sampling", "speed")


def main() -> None:
    seeds = _checked()
    try:
        import torch  # noqa: F401
    except ImportError:
        raise UserError("this comparison needs torch: pip install -e '.[test]'.") from None
    # Before anything is computed.
    jax.config.update("jax_enable_x64", DTYPE.value == "float64")
    from experiments.torch_parity.rows import TOLERANCES, first_diverging, table
    from experiments.torch_parity.suite import Suite

    config = _with_dtype(CONFIG(), DTYPE.value)
    bounds, rows, drifts = TOLERANCES[DTYPE.value], {}, {}
    speed: list[dict[str, Any]] = []
    context = context_length(config.model)
    for seed in seeds:
        suite = Suite(config, seed, bounds, length=LENGTH.value, points=POINTS.value, context=context)
        found = []
        if "blocks" in WHAT.value:
            found += suite.blocks()
        if "gradients" in WHAT.value:
            found += suite.gradients()
        if "sampling" in WHAT.value:
            part, total = suite.sampling(TOKENS.value)
            found += part
            print(f"seed {seed}: {total} tokens sampled", flush=True)
        if "steps" in WHAT.value:
            part, drift = suite.steps(STEPS.value, STEPS_TWO.value)
            found += part
            drifts |= {f"{stage}, seed {seed}": list(enumerate(values)) for stage, values in drift.items()}
        if "speed" in WHAT.value and not speed:
            speed = suite.speed(ROUNDS.value)
        rows[seed] = found
        print(f"\nseed {seed}, {DTYPE.value}:\n{table(found)}", flush=True)
    workdir = Path(WORKDIR.value)
    write(workdir, rows, drifts)
    for row in speed:
        slower = "  JAX IS SLOWER" if row["torch_over_jax_cpu"] < 1 else ""
        print(
            f"  {row['what']:<32} jax {row['jax_cpu_ms']:9.2f} ms of CPU, torch {row['torch_cpu_ms']:9.2f}: torch "
            f"takes {row['torch_over_jax_cpu']:.2f} × jax's ({row['torch_over_jax_wall']:.2f} × by the clock){slower}"
        )
    broken = {seed: first_diverging(found) for seed, found in rows.items()}
    print(f"\neverything lies in {workdir}/: rows.json, rows.csv" + (", drift.png" if drifts else ""))
    json_line("compare_torch", {
        "dtype": DTYPE.value,
        "config": dataclasses.asdict(config),
        "rows": sum(len(found) for found in rows.values()),
        "broken": [row.name for found in rows.values() for row in found if not row.holds],
        "speed": speed,
    })  # fmt: skip
    for seed, row in broken.items():
        if row is not None:
            print(f"seed {seed}: the first diverging block is {row.name} ({row.section}): {row.max_rel:.2e} > "
                  f"{row.tolerance:.0e}")  # fmt: skip
    if any(broken.values()):
        sys.exit(1)


def write(workdir: Path, rows: dict[int, list], drifts: dict[str, list[tuple[int, float]]]) -> None:
    """rows.json, rows.csv, and drift.png if there is a drift to draw."""
    entries = [{"seed": seed, **dataclasses.asdict(row), "holds": row.holds} for seed in rows for row in rows[seed]]
    with atomic_path(workdir / "rows.json") as path:
        # What is not finite has no number in JSON.
        plain = [
            {k: v if not isinstance(v, float) or np.isfinite(v) else str(v) for k, v in e.items()} for e in entries
        ]
        path.write_text(json.dumps({"rows": plain, "drift": drifts}, indent=1) + "\n")
    if entries:
        with atomic_path(workdir / "rows.csv") as path, open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(entries[0]))
            writer.writeheader()
            writer.writerows(entries)
    if drifts:
        # Zero has no logarithm: rounding's own size stands for it.
        series = {name: [(x, float(np.log10(max(y, 1e-17)))) for x, y in points] for name, points in drifts.items()}
        write_image(workdir / "drift.png", line_chart(series, {}, "step", "log10 of the loss's relative difference"))


def _with_dtype(config: Config, dtype: str) -> Config:
    model = dataclasses.replace(config.model, dtype=dtype, encoder=dataclasses.replace(config.model.encoder))
    # As it is told by the token store and the AR model in a training.
    decoder = config.decoder.for_features(model.tokenizer, model.width, config.decoder.space, context_length(model))
    return dataclasses.replace(config, model=model, decoder=dataclasses.replace(decoder, dtype=dtype))


def _checked() -> list[int]:
    if unknown := sorted(set(WHAT.value) - set(PARTS)):
        raise UserError(f"--what={','.join(WHAT.value)}: {unknown[0]!r} is none of {', '.join(PARTS)}.")
    if LENGTH.value % 4:
        raise UserError(f"--length={LENGTH.value} must be a multiple of 4.")
    if not SEEDS.value or not all(seed.isdigit() for seed in SEEDS.value):
        raise UserError(f"--seeds={','.join(SEEDS.value)} must be whole numbers with commas.")
    if (workdir := Path(WORKDIR.value)).exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file; name a folder.")
    require_writable(workdir)
    return [int(seed) for seed in SEEDS.value]


if __name__ == "__main__":
    run(main)
