"""One row of `experiments.scaling_study` in a process of its own: it sees as many devices as the row asks for.

    python -m experiments.scaling_worker '{"stage": "one", "mesh": "data:8", …}'

Reads a `Row` as JSON, ends in one line of JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pointillist_jax.configs import Config, config_from_json
from pointillist_jax.files import UserError
from pointillist_jax.scaling import gpu_programs

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Row:
    """What is compiled, or run.

    Attributes:
      stage: "one" (transformer) or "two" (decoder, renderer).
      mesh: as of `--mesh`. devices: that it takes, simulated or not.
      batch: windows of all devices in stage one, subjects in stage two.
      steps: timed steps; 0 only compiles.
      simulated: "cpu" (host devices), "gpu" (`scaling.gpu_programs`, compile only), or "" for the devices at hand.
      config: the whole config.
      points, size: of a subject and a picture in stage two.
    """

    stage: str
    mesh: str
    devices: int
    batch: int
    steps: int
    simulated: str
    config: Mapping[str, Any]
    points: int = 1000
    size: int = 64

    @property
    def key(self) -> str:
        """What the row is, for resuming: another config, other pictures or more steps make another row."""
        rest = json.dumps([self.config, self.points, self.size, self.steps, self.simulated], sort_keys=True)
        return f"{self.stage} {self.mesh} {self.devices} {self.batch} {zlib.crc32(rest.encode()):08x}"


def run_row(row: Row, timeout: float) -> dict[str, Any]:
    """The row's figures, or {"failed": a sentence}."""
    environment = dict(os.environ)
    if row.simulated == "cpu":
        flag = f"--xla_force_host_platform_device_count={row.devices}"
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{environment.get('XLA_FLAGS', '')} {flag}".strip()}
    if row.simulated == "gpu":
        environment |= gpu_programs.environment()
    command = [sys.executable, "-m", "experiments.scaling_worker", json.dumps(dataclasses.asdict(row))]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"it took longer than {timeout:.0f} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return {"failed": (said or [f"exit code {done.returncode}"])[-1][:300]}


def figures(row: Row) -> dict[str, Any]:
    """Compiles the row's step, counts it and, if it is to be run, times it."""
    import jax

    from experiments import step_programs
    from pointillist_jax.models.condition import context_length
    from pointillist_jax.scaling.collectives import collectives
    from pointillist_jax.scaling.memory import stage_one_memory
    from pointillist_jax.sharding import make_mesh

    config: Config = config_from_json(Config, row.config, "the row")
    devices = gpu_programs.gpu_devices(row.devices) if row.simulated == "gpu" else jax.devices()
    if len(devices) < row.devices:
        raise UserError(f"--mesh={row.mesh} asks for {row.devices} devices, but there are {len(devices)}.")
    mesh = make_mesh(row.mesh, devices[: row.devices])
    if row.stage == "one":
        train = dataclasses.replace(config.train, warmup_steps=0)
        program = step_programs.stage_one(config.model, train, mesh, row.batch, context_length(config.model))
    else:
        program = step_programs.stage_two(config.decoder, mesh, row.batch, row.points, row.size)
    start = time.perf_counter()
    compiled = program.compile()
    memory = compiled.memory_analysis()
    found: dict[str, Any] = {
        "compile_s": round(time.perf_counter() - start, 2),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "collectives": [dataclasses.asdict(one) for one in collectives(compiled.as_text(), mesh.shape)],
        "tokens": program.tokens,
        "device": devices[0].device_kind,
        "jax": jax.__version__,
    }
    if row.stage == "one":
        found["estimate"] = dataclasses.asdict(stage_one_memory(config.model, train, mesh.shape, row.batch))
    return found | (timed(program, compiled, row.steps) if row.steps else {})


def timed(program: Any, compiled: Any, steps: int, warmup: int = 2) -> dict[str, Any]:
    """Median seconds of a step after a warm-up, their spread, and the losses."""
    import jax

    with jax.set_mesh(program.mesh):
        state, batch = program.make_state(), program.make_batch()
        seconds, losses = [], []
        for _ in range(warmup + steps):
            start = time.perf_counter()
            state, metrics = compiled(state, batch)
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - start)
            losses.append(float(metrics["loss"]))
    if not all(map(math.isfinite, losses)):
        raise UserError("the loss is not finite: in stage two the renderer's capacity may be too small for --points.")
    used = seconds[warmup:]
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "seconds": statistics.median(used),
        "fastest": min(used),
        "slowest": max(used),
        "losses": [round(loss, 6) for loss in losses],
        "peak_bytes": stats.get("peak_bytes_in_use"),
    }


def main() -> None:
    content = json.loads(sys.argv[1])
    try:
        print(json.dumps(figures(Row(**content))))
    except Exception as error:  # One sentence for the row; the study goes on with the next.
        if os.environ.get("POINTILLIST_DEBUG"):
            raise
        sys.exit(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:250]}")


if __name__ == "__main__":
    main()
