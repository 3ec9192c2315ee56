"""What `experiments.scaling_study` found, as tables, pictures, CSV and JSON."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.charts import line_chart
from experiments.media import write_image
from pointillist_jax.configs import Config, config_from_json
from pointillist_jax.files import FileFormatError, atomic_path
from pointillist_jax.flops import Peak, device_peak, training_flops, transformer_flops
from pointillist_jax.models.condition import context_length
from pointillist_jax.scaling.collectives import Collective, inventory
from pointillist_jax.scaling.hardware import HARDWARE, Hardware
from pointillist_jax.scaling.memory import Memory, fit_factors
from pointillist_jax.scaling.roofline import StepCost, step_time

# Of a device's memory, what a step may fill: the rest is the runtime's.
USABLE = 0.92


def write(study: Mapping[str, Any], workdir: Path) -> tuple[str, dict[str, Any]]:
    """Writes report.md, report.json and pictures; returns the tables as text and what the JSON line shows."""
    config = config_from_json(Config, json.loads(json.dumps(study["config"])), "the study")
    text, figures = {"measure": measured, "predict": predicted, "size": sized}[study["mode"]](study, config, workdir)
    about = f"jax {jax.__version__}, {jax.devices()[0].device_kind}, preset `{study['preset']}`, flags " + ", ".join(
        f"{name}={value}" for name, value in study["flags"].items() if value not in ("", None)
    )
    page = f"# Scaling study: {study['mode']}\n\n{about}\n\n{text}\n"
    for name, content in (("report.md", page), ("report.json", json.dumps({**study, **figures}, indent=1))):
        with atomic_path(workdir / name) as temporary:
            temporary.write_text(content)
    return text, figures


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier run."""
    if not path.exists():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        if not all(isinstance(row.get("key"), str) for row in rows):
            raise ValueError("a row without a key")
    except (ValueError, AttributeError) as error:
        raise FileFormatError(f"{path} is damaged ({error}); start again with --overwrite.") from None
    return rows


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A column per figure; nested ones as JSON."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in rows:
            nested = {k: json.dumps(v) if isinstance(v, (dict, list)) else v for k, v in row.items()}
            writer.writerow(nested)


# Costs of a row.


def found_collectives(row: Mapping[str, Any]) -> tuple[Collective, ...]:
    return tuple(Collective(**{**one, "axes": tuple(one["axes"])}) for one in row["collectives"])


def step_cost(row: Mapping[str, Any], config: Config) -> StepCost:
    """What one device does in a step of stage one."""
    model, memory = config.model, Memory(**row["estimate"])
    flops = row["batch"] * training_flops(transformer_flops(model, context_length(model))) / row["devices"]
    # Weights are read by forward, backward and its gradient of the weights; AdamW reads four numbers of each parameter
    # and writes three; what is kept is written and read, and as much again passes between products.
    weights = 3 * memory.gradients * row["sizes"]["fsdp"]
    return StepCost(flops, weights + 7 * memory.gradients + 4 * memory.kept, found_collectives(row))


def needed_bytes(row: Mapping[str, Any]) -> float:
    """Of one device: arguments and temporaries of the compiled program (new state takes the old one's place)."""
    return row["argument_bytes"] + row["temporary_bytes"]


def largest_batch(row: Mapping[str, Any], hardware: Hardware, factors: Mapping[str, float]) -> int:
    """Windows of all devices that fit: what one more takes is predicted, and the rest has been compiled."""
    shares = row["sizes"]["data"] * row["sizes"]["fsdp"]
    each = max(factors["kept"], 1.0) * row["estimate"]["kept"] / max(row["batch"] // shares, 1)
    room = USABLE * hardware.memory - needed_bytes(row)
    return max(row["batch"] // shares + math.floor(room / each), 0) * shares


# Measured.


def measured(study: Mapping[str, Any], config: Config, workdir: Path) -> tuple[str, dict[str, Any]]:
    rows = [row for row in study["rows"] if "failed" not in row]
    simulated = any(row["simulated"] for row in rows)
    base = {(row["stage"]): row for row in reversed(rows) if row["devices"] == 1}
    table = [["stage", "devices", "mesh", "batch", "scaling", "s/step", "tokens/s/device", "MFU", "efficiency",
              "memory MiB", "compile s", "predicted s/step", "error"]]  # fmt: skip
    throughput: dict[str, list[tuple[float, float]]] = {}
    efficiency: dict[str, list[tuple[float, float]]] = {}
    errors = []
    hardware = host_hardware(rows) if rows else None
    for row in rows:
        rate = row["tokens"] / row["seconds"]
        first = base.get(row["stage"])
        # Simulated devices share this machine: with them the whole rate is to stay what one device's is.
        share = 1 if row["simulated"] else row["devices"]
        kind = "weak" if not first or row["batch"] == first["batch"] * _shares(row) else "strong"
        gained = rate / (first["tokens"] / first["seconds"]) / share if first else math.nan
        peak = device_peak(row["device"])
        predicted_s = error = mfu = math.nan
        if row["stage"] == "one":
            predicted_s = step_time(step_cost(row, config), hardware(row), 0.5).middle
            error = predicted_s / row["seconds"] - 1
            errors.append(error)
            flops = row["batch"] * training_flops(transformer_flops(config.model, context_length(config.model)))
            mfu = flops / row["seconds"] / peak.flops / row["devices"] if peak else math.nan
        row |= {"tokens_per_s": rate, "efficiency": gained, "predicted_s": predicted_s, "scaling": kind, "mfu": mfu}
        throughput.setdefault(f"stage {row['stage']}, {kind}", []).append((row["devices"], rate))
        efficiency.setdefault(f"stage {row['stage']}, {kind}", []).append((row["devices"], gained))
        table.append(
            [row["stage"], row["devices"], f"`{row['mesh']}`", row["batch"], kind, f"{row['seconds']:.3f}",
             f"{rate / row['devices']:,.0f}", _percent(mfu), _percent(gained),
             f"{(row.get('peak_bytes') or needed_bytes(row)) / 2**20:,.0f}", f"{row['compile_s']:.1f}",
             f"{predicted_s:.3f}" if predicted_s == predicted_s else "–", _percent(error, signed=True)]
        )  # fmt: skip
    for name, series, what in (
        ("throughput", throughput, "tokens (stage two: pictures) a second, all devices"),
        ("efficiency", efficiency, "efficiency"),
    ):
        best = {key: sorted({x: max(y for at, y in found if at == x) for x, _ in found}.items())
                for key, found in series.items()}  # fmt: skip
        write_image(workdir / f"{name}.png", line_chart(best, {}, "devices", f"{what}, best mesh"))
    note = "Simulated devices share this machine's cores: efficiency compares the whole rate with one device's.\n\n"
    failed = [f"* `{row['mesh']}`, batch {row['batch']}: {row['failed']}" for row in study["rows"] if "failed" in row]
    text = (note if simulated else "") + markdown(table) + ("\n\nFailed:\n" + "\n".join(failed) if failed else "")
    text += "\n\n![throughput](throughput.png) ![efficiency](efficiency.png)"
    middle = float(np.median(np.abs(errors))) if errors else None
    return text, {"rows_measured": len(rows), "rows_failed": len(failed), "median_prediction_error": middle}


def host_hardware(rows: Sequence[Mapping[str, Any]]):
    """Row → what its devices are: datasheet figures where there are some, else what this machine is measured to do."""
    names = [name for name in HARDWARE if name in rows[0]["device"].replace("-", " ").split()]
    if names:
        return lambda row: HARDWARE[names[0]]
    flops, bandwidth = machine_rates()
    # Devices on one CPU are parts of it, and their links are copies in its memory.
    return lambda row: Hardware(
        Peak(flops / row["devices"], bandwidth / row["devices"]), math.inf, bandwidth / row["devices"],
        bandwidth / row["devices"], row["devices"] + 1, (20e-6, 20e-6),
    )  # fmt: skip


def machine_rates(size: int = 2048) -> tuple[float, float]:
    """(FLOP/s of a float32 product, bytes/s read and written) of this machine's first device."""
    import time

    x = jax.numpy.ones((size, size), jax.numpy.float32)
    long = jax.numpy.ones(1 << 26, jax.numpy.float32)
    product, copy = jax.jit(lambda x: x @ x), jax.jit(lambda x: x + 1)

    def fastest(function, x) -> float:
        jax.block_until_ready(function(x))
        spent = []
        for _ in range(5):
            start = time.perf_counter()
            jax.block_until_ready(function(x))
            spent.append(time.perf_counter() - start)
        return min(spent)

    return 2 * size**3 / fastest(product, x), 2 * long.nbytes / fastest(copy, long)


# Predicted.


def predicted(study: Mapping[str, Any], config: Config, workdir: Path) -> tuple[str, dict[str, Any]]:
    rows = [row for row in study["rows"] if "failed" not in row]
    utilisation, names = study["flags"]["utilisation"], study["flags"]["hardware"]
    programs = [["stage", "devices", "mesh", "batch", "arguments MiB", "temporaries MiB", "by shapes MiB", "error",
                 "collectives of a device in a step"]]  # fmt: skip
    staged = [row for row in rows if row["stage"] == "one"]
    # Every second program sets the factors, and the others say how good they are.
    known = staged[::2]
    factors = fit_factors([Memory(**row["estimate"]) for row in known], [row["temporary_bytes"] for row in known])
    errors = []
    for row in rows:
        guess = Memory(**row["estimate"]).temporary(factors) if "estimate" in row else math.nan
        held_out = "estimate" in row and row not in known
        error = guess / row["temporary_bytes"] - 1 if held_out else math.nan
        errors += [error] if held_out else []
        listed = inventory(found_collectives(row)).items()
        shown = "; ".join(f"{name}: {one['bytes'] / 2**20:,.1f} MiB in {one['count']}" for name, one in listed)
        programs.append(
            [row["stage"], row["devices"], f"`{row['mesh']}`", row["batch"], _mib(row["argument_bytes"]),
             _mib(row["temporary_bytes"]), _mib(guess) if guess == guess else "–",
             _percent(error, signed=True) if "estimate" not in row or held_out else "fitted", shown or "none"]
        )  # fmt: skip
    fitted = ", ".join(f"{factor:.2f} × {name}" for name, factor in factors.items() if factor) or "nothing"
    kinds = {row["simulated"] for row in rows}
    compilers = " and ".join(
        {"gpu": "XLA's GPU compiler (H100)", "cpu": "XLA's CPU compiler"}[kind] for kind in sorted(kinds)
    )
    sections = [
        f"## Compiled programs\n\nOf {compilers}. Bytes of one device, and temporaries by shapes alone: "
        f"{fitted} (`pointillist_jax/scaling/memory.py`), fitted to every second program.\n\n" + markdown(programs)
    ]
    best: dict[str, dict[int, dict[str, Any]]] = {}
    single = next((row for row in staged if row["devices"] == 1), None)
    for name in names if staged else ():
        hardware = HARDWARE[name]
        table = [["devices", "mesh", "batch", "predicted s/step (best – worst)", "tokens/s/device", "efficiency",
                  "MFU", "memory GiB", "largest batch"]]  # fmt: skip
        one = step_time(step_cost(single, config), hardware, utilisation).middle if single else math.nan
        for row in staged:
            cost = step_cost(row, config)
            time = step_time(cost, hardware, utilisation)
            rate = row["tokens"] / time.middle / row["devices"]
            gained = rate / (single["tokens"] / one) if single else math.nan
            fits = needed_bytes(row) < USABLE * hardware.memory
            mfu = cost.flops / time.middle / hardware.peak.flops
            figures = {"row": row, "time": time, "rate": rate, "efficiency": gained}
            known = best.setdefault(name, {}).get(row["devices"])
            if fits and (known is None or rate * row["devices"] > 1.02 * known["rate"] * row["devices"]):
                best[name][row["devices"]] = figures
            table.append(
                [row["devices"], f"`{row['mesh']}`", row["batch"],
                 f"{time.middle:.3g} ({time.best:.3g} – {time.worst:.3g})", f"{rate:,.0f}", _percent(gained),
                 _percent(mfu), f"{needed_bytes(row) / 2**30:.1f}" + ("" if fits else " (does not fit)"),
                 largest_batch(row, hardware, factors) or "–"]
            )  # fmt: skip
        sections.append(f"## {name}: predicted, not measured\n\n" + markdown(table))
    if best:
        sections.insert(0, recommended(best))
        series = {
            name: sorted((math.log2(count), 100 * one["efficiency"]) for count, one in found.items())
            for name, found in best.items()
        }
        write_image(
            workdir / "predicted.png",
            line_chart(series, {}, "log2 of devices", "predicted efficiency of the best mesh, %"),
        )
        sections.append("![predicted efficiency](predicted.png)")
    middle = float(np.median(np.abs(errors))) if errors else None
    worst = float(np.max(np.abs(errors))) if errors else None
    failed = [f"* `{row['mesh']}`: {row['failed']}" for row in study["rows"] if "failed" in row]
    if failed:
        sections.append("Failed:\n" + "\n".join(failed))
    return "\n\n".join(sections), {
        "rows_compiled": len(rows),
        "rows_failed": len(failed),
        "median_memory_error": middle,
        "largest_memory_error": worst,
        "recommended": {
            name: {str(count): one["row"]["mesh"] for count, one in found.items()} for name, found in best.items()
        },
    }


def recommended(best: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> str:
    """The table of meshes to take, and why."""
    table = [["devices", *(f"{name} (predicted)" for name in best), "why"]]
    for count in sorted({count for found in best.values() for count in found}):
        cells = [
            f"`{found[count]['row']['mesh']}`, {_percent(found[count]['efficiency'])}"
            if count in found
            else "none fits"
            for found in best.values()
        ]
        first = next(found[count] for found in best.values() if count in found)
        table.append([count, *cells, reason(first)])
    return (
        "## Recommended meshes\n\nThe mesh with the highest predicted rate among those that fit (another one has to "
        "win by 2 %), and its predicted efficiency against one device.\n\n" + markdown(table)
    )


def reason(one: Mapping[str, Any]) -> str:
    """Why the mesh wins, from its own figures."""
    sizes, time = one["row"]["sizes"], one["time"]
    cut = [axis for axis in ("fsdp", "tensor", "context") if sizes[axis] > 1]
    hidden = "hidden behind the arithmetic" if time.beside <= time.compute else "longer than the arithmetic"
    if one["row"]["devices"] == 1:
        return "one device"
    if not cut:
        return f"the model fits whole; only gradients are summed, {1e3 * time.beside:.0f} ms, {hidden}"
    what = {"fsdp": "parameters and moments are cut", "tensor": "heads are cut", "context": "windows are cut"}
    return (
        "; ".join(what[axis] for axis in cut)
        + f"; gradients {1e3 * time.beside:.0f} ms, {hidden}"
        + (f", and {1e3 * time.exposed:.0f} ms are waited for" if time.exposed > 1e-4 else "")
    )


# By size.


def sized(study: Mapping[str, Any], config: Config, workdir: Path) -> tuple[str, dict[str, Any]]:
    table = [["width × layers", "parameters", "tokens", "FLOPs", "held-out loss", "s/step"]]
    rows = study["rows"]
    for row in rows:
        table.append(
            [f"{row['width']} × {row['layers']}", f"{row['parameters']:,}", f"{row['tokens']:,}", f"{row['flops']:.3g}",
             f"{row['loss']:.4f}", f"{row['seconds_per_step']:.3f}" if row["seconds_per_step"] else "–"]
        )  # fmt: skip
    curves = {row["key"]: [(math.log10(flops), loss) for flops, loss in row["curve"]] for row in rows}
    write_image(workdir / "loss.png", line_chart(curves, {}, "log10 of training FLOPs", "held-out loss, nats a token"))
    text = markdown(table) + "\n\n![held-out loss by compute](loss.png)"
    figures: dict[str, Any] = {"sizes": {row["key"]: row["loss"] for row in rows}}
    if len(rows) > 2:
        slope, _ = np.polyfit(np.log([row["flops"] for row in rows]), np.log([row["loss"] for row in rows]), 1)
        figures["exponent"] = round(float(slope), 4)
        text += (
            f"\n\nLast losses follow compute^{slope:.3f} (a line through logarithms; no irreducible loss is assumed)."
        )
    return text, figures


def markdown(rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return os.linesep.join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _shares(row: Mapping[str, Any]) -> int:
    return row["sizes"]["data"] * row["sizes"]["fsdp"]


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f}"


def _percent(share: float, *, signed: bool = False) -> str:
    if share != share:
        return "–"
    return f"{share:+.1%}" if signed else f"{share:.1%}"
