"""Speed of stage one's training step: the point transformer's forward, backward and AdamW.

    python -m experiments.bench_train --config=tiny [--windows=1024,6000] [--batch=1] [--against=torch] [--sweep]

Prints a card (parameters, bytes, FLOPs per token, compile time) and, per window, step time, tokens/s, MFU against the
device's datasheet peak (where there is one) and memory. The context is given, so encoders are not timed.

--against=torch runs the same model in PyTorch (`torch_reference/point_transformer.py`: same sizes, dtype and weights,
torch.compile, scaled_dot_product_attention, fused AdamW) in the same process, in turns of two seconds, A B A B,
medians; the losses are checked to be equal first. --sweep tables the rematerialisation policies with layers scanned and
unrolled.
"""

from __future__ import annotations

import dataclasses
import functools
import resource
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from experiments.common import Seconds, alternate_clocks, calls_in, json_line, run
from experiments.config_flags import define_config
from experiments.step_programs import random_windows, stage_one
from pointillist_jax.configs import ModelConfig, TrainConfig
from pointillist_jax.files import UserError
from pointillist_jax.flops import device_peak, training_flops, transformer_flops
from pointillist_jax.models.ar import param_specs
from pointillist_jax.models.condition import context_length
from pointillist_jax.models.layers import count_parameters, init_params
from pointillist_jax.sharding import make_mesh

CONFIG = define_config("model", "train")
WINDOWS = flags.DEFINE_list("windows", [], "Window lengths, multiples of 4; the preset's if not given.")
BATCH = flags.DEFINE_integer("batch", 1, "Windows per step.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed turns of each contestant; medians are reported.", lower_bound=1)
AGAINST = flags.DEFINE_enum("against", None, ["torch"], "Also time an equivalent torch step in the same run.")
SWEEP = flags.DEFINE_boolean("sweep", False, "Also table remat none|dots|attention|full × layers scanned|unrolled.")
MESH = flags.DEFINE_string("mesh", "", "Sizes of data, fsdp, tensor, context; data takes what is left.")
SEED = flags.DEFINE_integer("seed", 0, "Of parameters and tokens.", lower_bound=0)

MEBI = 2**20
TURN_SECONDS = 2.0


@dataclasses.dataclass
class Program:
    """A compiled step and what it costs before it runs."""

    step: Callable[[], Any]
    first_loss: float
    compile_s: float
    temp_bytes: int | None


def main() -> None:
    config = CONFIG()
    train = dataclasses.replace(config.train, warmup_steps=0)
    if AGAINST.value == "torch" and config.model.step == "point":
        raise UserError("--against=torch knows token steps only; leave --config.model.step=point out.")
    windows = [_window(text) for text in WINDOWS.value] or [config.model.window]
    device = jax.devices()[0]
    context = context_length(config.model)
    rows = []
    for window in windows:
        model = dataclasses.replace(config.model, window=window)
        if not rows:
            card(model, context, device)
        rows.append(measure(model, train, context, device))
    figures: dict[str, Any] = {
        "preset": flags.FLAGS["config"].value,
        "model": dataclasses.asdict(config.model),
        "parameters": count_parameters(param_specs(config.model)),
        "batch": BATCH.value,
        "context": context,
        "rows": rows,
    }
    if SWEEP.value:
        figures["sweep"] = sweep(dataclasses.replace(config.model, window=windows[-1]), train, context)
    figures["process_peak_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    json_line("train", figures)


def card(model: ModelConfig, context: int, device: jax.Device) -> None:
    sizes = {name: count_parameters(specs) for name, specs in param_specs(model).items()}
    total, flops = sum(sizes.values()), transformer_flops(model, context)
    parts = ", ".join(f"{name} {size / 1e6:.2f} M" for name, size in sizes.items() if size > 1e4)
    print(f"{device.device_kind}: {total / 1e6:.2f} M parameters ({parts})")
    print(f"  {4 * total / MEBI:.1f} MiB in float32, {16 * total / MEBI:.1f} MiB with gradients and AdamW's moments")
    each = training_flops(flops) / model.window_tokens / 1e6
    print(f"  {each:.2f} MFLOP a token at a window of {model.window} {model.step}s, context {context}")
    print(f"  dtype {model.dtype}, attention {model.attention}, remat {model.remat}, scan_layers {model.scan_layers}")


def measure(model: ModelConfig, train: TrainConfig, context: int, device: jax.Device) -> dict[str, Any]:
    """One row: the step's figures, and torch's beside them."""
    batch = random_windows(np.random.default_rng(SEED.value), model, BATCH.value, context)
    params = jax.tree.map(np.asarray, init_params(param_specs(model), jax.random.PRNGKey(SEED.value)))
    program = jax_program(model, train, context)
    cases, compile_s = {"jax": program.step}, {"jax": program.compile_s}
    if AGAINST.value == "torch":
        twin = torch_program(model, train, batch, params)
        tolerance = 1e-4 if model.dtype == "float32" else 2e-2
        if not abs(twin.first_loss - program.first_loss) < tolerance * abs(program.first_loss):
            raise UserError(
                f"torch starts at loss {twin.first_loss}, jax at {program.first_loss}: not the same model, so the "
                "comparison would mean nothing. Please report it."
            )
        cases["torch"], compile_s["torch"] = twin.step, twin.compile_s
    seconds = timed(cases, f"window {model.window}")

    tokens, peak = BATCH.value * model.window_tokens, device_peak(device.device_kind)
    flops = BATCH.value * training_flops(transformer_flops(model, context))
    row: dict[str, Any] = {"window": model.window, "tokens": tokens, "flops": flops}
    row["loss"] = round(program.first_loss, 4)
    print(f"window {model.window}, batch {BATCH.value}: loss {program.first_loss:.4f} before the first step")
    for name, spent in seconds.items():
        rate = flops / spent.wall
        mfu = f", MFU {rate / (peak.flops * jax.device_count()):.1%}" if peak else ""
        print(
            f"  {name:<6} {1e3 * spent.wall:9.1f} ms a step ({1e3 * spent.cpu:9.1f} of CPU), "
            f"{tokens / spent.wall:9.0f} tokens/s, {rate / 1e9:8.1f} GFLOP/s{mfu}; compiled in {compile_s[name]:.1f} s"
        )
        row |= {f"{name}_{key}": value for key, value in _figures(spent, tokens, rate, compile_s[name]).items()}
        if peak:
            row[f"{name}_mfu"] = round(rate / (peak.flops * jax.device_count()), 4)
    if "torch" in seconds:
        for clock in ("wall", "cpu"):
            ratio = getattr(seconds["torch"], clock) / getattr(seconds["jax"], clock)
            row[f"torch_over_jax_{clock}"] = round(ratio, 3)
        wall, cpu = row["torch_over_jax_wall"], row["torch_over_jax_cpu"]
        print(f"  torch takes {wall:.2f} × jax's time (CPU seconds: {cpu:.2f} ×)")
    if program.temp_bytes is not None:
        row["temp_mib"] = round(program.temp_bytes / MEBI, 1)
        print(f"  temporaries of the step by XLA's own figure: {row['temp_mib']} MiB")
    if stats := device.memory_stats():
        row["device_peak_mib"] = round(stats["peak_bytes_in_use"] / MEBI)
        print(f"  the device's largest use so far: {row['device_peak_mib']} MiB")
    return row


def timed(cases: dict[str, Callable[[], Any]], label: str) -> dict[str, Seconds]:
    """Of one step of each contestant, in turns of about two seconds: as in training, a step follows its own kind."""
    steps = calls_in(TURN_SECONDS, cases)
    total = ROUNDS.value * sum(number + 1 for number in steps.values())
    with tqdm(total=total, desc=label, unit="step", leave=False) as bar:

        def counted(case: Callable[[], Any]) -> None:
            case()
            bar.update()

        turns = {name: functools.partial(counted, case) for name, case in cases.items()}
        return alternate_clocks(turns, ROUNDS.value, warmup=0, in_a_row=steps)


def sweep(model: ModelConfig, train: TrainConfig, context: int) -> list[dict[str, Any]]:
    """Every rematerialisation policy with layers scanned and unrolled: compile time, step time, memory."""
    rows = []
    heads = f"{'remat':<12}{'layers':<10}{'compile s':>10}{'ms a step':>11}{'CPU ms':>9}{'temp MiB':>10}"
    print(f"\nwindow {model.window:<8}{heads}")
    for scan in (True, False):
        for remat in ("none", "dots", "attention", "full"):
            changed = dataclasses.replace(model, scan_layers=scan, remat=remat)
            row: dict[str, Any] = {"remat": remat, "layers": "scanned" if scan else "unrolled"}
            try:
                program = jax_program(changed, train, context)
                spent = timed({"jax": program.step}, f"{remat}, {row['layers']}")["jax"]
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                rows.append(row | {"failed": "out of memory"})
                print(f"{'':>15}{remat:<12}{row['layers']:<10}{'out of memory':>30}")
                continue
            row |= {"compile_s": round(program.compile_s, 1), "ms": round(1e3 * spent.wall, 1)}
            row |= {"cpu_ms": round(1e3 * spent.cpu, 1), "temp_mib": round((program.temp_bytes or 0) / MEBI, 1)}
            rows.append(row)
            print(
                f"{'':>15}{remat:<12}{row['layers']:<10}{row['compile_s']:>10}{row['ms']:>11}{row['cpu_ms']:>9}"
                f"{row['temp_mib']:>10}"
            )
    return rows


def jax_program(model: ModelConfig, train: TrainConfig, context: int) -> Program:
    """The project's own train step on a given context."""
    program = stage_one(model, train, make_mesh(MESH.value), BATCH.value, context, SEED.value)
    # The plain initialisation, so that torch can have the same.
    with jax.set_mesh(program.mesh):
        fresh = nn.unbox(init_params(param_specs(model), jax.random.PRNGKey(SEED.value), boxed=True))
        state = program.make_state()
        params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), fresh, state.params)
        holder, on_device = [state.replace(params=params)], program.make_batch()
        start = time.perf_counter()
        compiled = program.compile()
        compile_s = time.perf_counter() - start

    def once() -> float:
        holder[0], metrics = compiled(holder[0], on_device)
        jax.block_until_ready(holder[0])
        return float(metrics["loss"])

    memory = compiled.memory_analysis()
    return Program(once, once(), compile_s, getattr(memory, "temp_size_in_bytes", None))


def torch_program(model: ModelConfig, train: TrainConfig, batch: dict[str, np.ndarray], params) -> Program:
    """The same step in torch: compiled loss, clipping, fused AdamW."""
    try:
        import torch
    except ImportError:
        raise UserError("--against=torch needs torch: pip install -e '.[test]'.") from None
    from experiments.torch_reference.layers import load_arrays
    from experiments.torch_reference.point_transformer import PointTransformer

    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    if jax.device_count() > 1:
        raise UserError("--against=torch compares one device; hide the others (CUDA_VISIBLE_DEVICES=0).")
    twin = PointTransformer(model)
    load_arrays(twin, params)
    twin.to(device)
    matrices = [p for name, p in twin.named_parameters() if not name.endswith("norm.weight")]
    norms = [p for name, p in twin.named_parameters() if name.endswith("norm.weight")]
    groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=train.learning_rate, betas=(train.b1, train.b2), fused=True)
    integers = [torch.tensor(batch[name], dtype=torch.long, device=device) for name in ("tokens", "targets")]
    context = torch.tensor(batch["context"], device=device)
    half = model.dtype == "bfloat16"
    loss_fn = torch.compile(twin.loss)

    def once() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = loss_fn(*integers, context)
        loss.backward()
        if train.clip_norm:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), train.clip_norm)
        optimizer.step()
        return float(loss.detach())  # Waits for the device.

    start = time.perf_counter()
    first = once()
    if device == "cuda":
        torch.cuda.synchronize()
    return Program(once, first, time.perf_counter() - start, None)


def _figures(spent: Seconds, tokens: int, rate: float, compile_s: float) -> dict[str, float]:
    return {
        "ms": round(1e3 * spent.wall, 2),
        "cpu_ms": round(1e3 * spent.cpu, 2),
        "tokens_per_s": round(tokens / spent.wall),
        "gflops": round(rate / 1e9, 2),
        "compile_s": round(compile_s, 1),
    }


def _window(text: str) -> int:
    if not text.isdigit() or int(text) < 4 or int(text) % 4:
        raise UserError(f"--windows={text} must be multiples of 4, e.g. --windows=1024,6000.")
    return int(text)


if __name__ == "__main__":
    run(main)
