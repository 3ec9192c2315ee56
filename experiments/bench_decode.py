"""Speed of generation: points of a batch through the compiled loop with full ring-buffer caches.

    python -m experiments.bench_decode --config=tiny [--batches=1,8] [--positions=1000,30000] [--cache_dtype=int8]
       [--against=torch] [--variants] [--config.model.step=point]

Prints a card (parameters, bytes that a point moves, and the tokens/s that a known device's bandwidth allows for them)
and per batch and position tokens/s, points/s, ms per point and the share of that ceiling. The window is read whole at
every position, so time does not depend on it; the card says so in numbers.

--against=torch runs the same model through a cached loop in PyTorch (`torch_reference/decode.py`: same sizes, dtype,
weights and tokens, its own ring caches, SDPA) in the same process, A B A B, medians; hidden states and
log-probabilities are checked to be equal first. Torch runs on one thread or on all, whichever is faster at that batch.
--variants also times a loop of a fixed number of steps. To try command buffers on a GPU, start it with
XLA_FLAGS=--xla_gpu_enable_command_buffer=+WHILE: the flags stand in the JSON line.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from experiments.common import Seconds, alternate_clocks, json_line, run
from experiments.config_flags import define_config
from pointillist_jax.configs import ModelConfig
from pointillist_jax.files import UserError
from pointillist_jax.flops import device_peak
from pointillist_jax.models.ar import param_specs
from pointillist_jax.models.condition import context_length
from pointillist_jax.models.layers import init_params
from pointillist_jax.sampling import choose, loop
from pointillist_jax.sampling.steppers import make_stepper

CONFIG = define_config("model")
BATCHES = flags.DEFINE_list("batches", ["1", "8"], "Rows of a batch.")
POSITIONS = flags.DEFINE_list("positions", ["1000", "30000"], "Tokens behind every row when the clock starts.")
POINTS = flags.DEFINE_integer("points", 128, "Points per timed run.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed runs of each contestant; medians are reported.", lower_bound=1)
CACHE_DTYPE = flags.DEFINE_string("cache_dtype", "", "Of keys and values; the model's if not given.")
AGAINST = flags.DEFINE_enum("against", None, ["torch"], "Also time an equivalent torch loop in the same run.")
VARIANTS = flags.DEFINE_boolean("variants", False, "Also time a loop of a fixed number of steps.")
SEED = flags.DEFINE_integer("seed", 0, "Of parameters, contexts and tokens.", lower_bound=0)

MEBI = 2**20


def main() -> None:
    model = CONFIG().model
    batches, positions = _integers(BATCHES.value, "batches", 1), _integers(POSITIONS.value, "positions", 0)
    if AGAINST.value and (model.step != "token" or jax.device_count() > 1):
        raise UserError("--against=torch compares token steps on one device: leave --config.model.step at token.")
    if AGAINST.value and CACHE_DTYPE.value not in ("", model.dtype):
        raise UserError(
            f"--against=torch keeps keys and values in the model's {model.dtype}: leave --cache_dtype="
            f"{CACHE_DTYPE.value} out, or time it without --against."
        )
    program = loop.Program(make_stepper(model, CACHE_DTYPE.value), model.tokenizer, POINTS.value)
    params = init_params(param_specs(model), jax.random.PRNGKey(SEED.value))
    if model.dtype == "bfloat16":
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 2 else x, params)
    size, device = context_length(model), jax.devices()[0]
    weights = loop.make_weights(program.stepper, params)
    rows = []
    for batch in batches:
        moved = card(model, program, weights, params, batch, size, device)
        bench = Bench(model, program, weights, params, batch, size)
        rows += bench.measure(positions, moved, device)
        if len(positions) > 1:
            spent = [row["jax_cpu_ms_per_point"] for row in rows[-len(positions) :]]
            rows[-1]["slowest_over_fastest_position_cpu"] = round(max(spent) / min(spent), 3)
            print(f"  slowest position / fastest, CPU seconds: {max(spent) / min(spent):.3f}")
    figures: dict[str, Any] = {"config": dataclasses.asdict(model), "context": size, "points": POINTS.value}
    figures |= {"cache_dtype": program.stepper.cache_dtype, "rows": rows, "xla_flags": os.environ.get("XLA_FLAGS", "")}
    json_line("decode", figures)


def card(model, program, weights, params, batch: int, size: int, device) -> float:
    """Prints what a point of every row moves through memory, and returns it in bytes."""
    backbone, rest = bytes_of_weights(weights)
    abstract = jax.eval_shape(functools.partial(program.stepper.cache, batch))
    cache, memory = _bytes(abstract), 2 * model.layers * batch * model.num_kv_heads * model.head_dim * size
    memory *= jnp.dtype(model.dtype).itemsize
    steps = 1 if model.step == "point" else 4
    moved = steps * (backbone + cache + memory) + rest
    total = sum(x.size for x in jax.tree.leaves(params))
    print(
        f"{device.device_kind}: {total / 1e6:.2f} M parameters, dtype {model.dtype}, batch {batch}, step {model.step}"
    )
    print(
        f"  weights {backbone / MEBI:.1f} MiB a step, {rest / MEBI:.1f} MiB a point for heads; caches of "
        f"{model.window} {model.step}s in {program.stepper.cache_dtype} {cache / MEBI:.1f} MiB; "
        f"context {memory / MEBI:.1f} MiB"
    )
    if peak := device_peak(device.device_kind):
        rate = batch * peak.bandwidth / moved
        print(f"  {moved / MEBI:.0f} MiB a point: at most {4 * rate:.0f} tokens/s at {peak.bandwidth / 1e12:.2f} TB/s")
    else:
        print(f"  {moved / MEBI:.1f} MiB a point; no datasheet bandwidth is known for this device")
    return moved


def bytes_of_weights(weights) -> tuple[int, int]:
    """Read by every step of the backbone, and once per point (classifiers, and the heads of point steps)."""
    layers = [
        {part: {k: v for k, v in p.items() if (part, k) != ("cross_attention", "kv")} for part, p in layer.items()}
        for layer in weights.layers
    ]
    return _bytes(layers), _bytes(weights.outputs) + _bytes(getattr(weights, "heads", ()))


class Bench:
    """The contestants at one batch size, on the same context and the same tokens."""

    def __init__(self, model: ModelConfig, program: loop.Program, weights, params, batch: int, size: int):
        rng, Q = np.random.default_rng(SEED.value), program.points
        self.model, self.program, self.weights, self.batch = model, program, weights, batch
        self.context = rng.normal(size=(batch, size, model.width)).astype(np.float32)
        ids = model.tokenizer
        clouds = [ids.encode(rng.uniform(-0.25, 0.25, (Q, 3)), rng.integers(0, ids.num_faces, Q)) for _ in range(batch)]
        # Tokens are drawn as ever and then replaced by these, so that no row ends and all contestants do the same.
        self.forced = np.stack(clouds)[:, 4:-4].reshape(batch, Q, 4) - np.array([0, 0, 0, ids.bins], np.int32)
        self.filters = choose.Filters(jnp.ones((), jnp.float32), None, None)
        self.loops = {"jax": program}
        if VARIANTS.value:
            self.loops["jax_fixed_trips"] = dataclasses.replace(program, fixed_trips=True)
        start = time.perf_counter()
        self.compiled = {
            name: loop.run_chunk.lower(p, weights, self._start(), self.filters, self.forced, batch).compile()
            for name, p in self.loops.items()
        }
        self.compile_s = (time.perf_counter() - start) / len(self.loops)
        self.twin = torch_decoder(model, params, self.context) if AGAINST.value == "torch" else None
        if self.twin is not None:
            self._check()

    def measure(self, positions: list[int], moved: float, device: jax.Device) -> list[dict[str, Any]]:
        """One row of the table per position, all timed in turn."""
        cases = {}
        for position in positions:
            cases |= {(name, position): self._jax_case(name, position) for name in self.loops}
            if self.twin is not None:
                cases["torch", position] = self.twin.case(self.forced, position)
        if self.twin is not None:
            self.twin.choose_threads(self.forced, max(positions))
        bar = tqdm(total=(ROUNDS.value + 1) * len(cases), desc=f"batch {self.batch}", unit="run")
        seconds = alternate_clocks({case: _counted(once, bar) for case, once in cases.items()}, ROUNDS.value, warmup=1)
        bar.close()
        return [
            self._row(position, {name: s for (name, at), s in seconds.items() if at == position}, moved, device)
            for position in positions
        ]

    def _row(self, position: int, seconds: dict[str, Seconds], moved: float, device: jax.Device) -> dict[str, Any]:
        peak, points = device_peak(device.device_kind), self.batch * self.program.points
        row: dict[str, Any] = {"batch": self.batch, "position": position, "compile_s": round(self.compile_s, 1)}
        print(f"  position {position} of every row, {self.program.points} points (compiled in {self.compile_s:.1f} s)")
        for name, spent in seconds.items():
            share = points / self.batch * moved / spent.wall / peak.bandwidth if peak else None
            row |= {f"{name}_{key}": value for key, value in _figures(spent, points, self.batch, share).items()}
            said = f", {share:.1%} of the bandwidth" if peak else ""
            ms, cpu_ms = row[f"{name}_ms_per_point"], row[f"{name}_cpu_ms_per_point"]
            print(
                f"    {name:<16}{4 * points / spent.wall:9.0f} tokens/s {points / spent.wall:8.0f} points/s, "
                f"{ms:8.3f} ms a point ({cpu_ms:.3f} of CPU){said}"
            )
        if "torch" in seconds:
            row["torch_threads"] = self.twin.threads
            for clock in ("wall", "cpu"):
                ratio = getattr(seconds["torch"], clock) / getattr(seconds["jax"], clock)
                row[f"torch_over_jax_{clock}"] = round(ratio, 3)
            print(
                f"    torch ({self.twin.threads} threads) takes {row['torch_over_jax_wall']:.2f} × jax's time "
                f"(CPU seconds: {row['torch_over_jax_cpu']:.2f} ×)"
            )
        return row

    def _start(self) -> loop.SamplingState:
        keys = np.asarray(jax.random.split(jax.random.PRNGKey(SEED.value), self.batch))
        lengths, limits = np.full(self.batch, self.context.shape[1], np.int32), np.full(self.batch, 1 << 30, np.int32)
        return loop.start(self.program.stepper, self.weights, self.context, lengths, keys, limits)

    def _jax_case(self, name: str, position: int) -> Callable[[], None]:
        held = [self._start()]

        def once() -> None:
            # The same age at every run; what the caches hold costs nothing.
            age = jnp.full(self.batch, max(position // 4, 1), jnp.int32)
            state = held[0]._replace(age=age)
            held[0], _ = self.compiled[name](self.weights, state, self.filters, self.forced, self.batch)
            jax.block_until_ready(held[0])

        return once

    def _check(self) -> None:
        """Raises if the contestants are not the same model."""
        # The loop's first step is S S S S.
        forced = np.concatenate([np.full((self.batch, 1, 4), -1, np.int32), self.forced[:, :-1]], axis=1)
        _, chunk = self.compiled["jax"](self.weights, self._start(), self.filters, forced, self.batch)
        log_probs, hidden = self.twin.first_points(self.forced[:, :-1])
        off = max(
            np.abs(log_probs - np.asarray(chunk.log_probs)[:, 1:]).max(),
            np.abs(hidden - np.asarray(chunk.hidden, np.float32)[:, 1:]).max(),
        )
        if not off < (1e-3 if self.model.dtype == "float32" else 0.3):
            raise UserError(f"torch and jax differ by {off:.2g}: the comparison would mean nothing. Please report it.")


def torch_decoder(model: ModelConfig, params, context: np.ndarray):
    """The torch loop with the same weights: an object with `case` and `first_points`."""
    try:
        import torch
    except ImportError:
        raise UserError("--against=torch needs torch: pip install -e '.[test]'.") from None
    from experiments.torch_reference.decode import Decoder
    from experiments.torch_reference.layers import load_arrays
    from experiments.torch_reference.point_transformer import PointTransformer

    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    dtype, cores = getattr(torch, model.dtype), _torch_cores()
    twin = PointTransformer(model)
    load_arrays(twin, jax.tree.map(lambda x: np.asarray(x, np.float32), params))
    twin.to(device, dtype)

    def tensor(x):
        return torch.tensor(np.asarray(x), device=device)

    class Twin:
        def __init__(self):
            with torch.inference_mode():
                self.decoder = Decoder(twin, tensor(context).to(dtype))
            self.threads = 0

        def choose_threads(self, forced, position: int) -> None:
            """Products this small may run faster on one thread than on all: torch gets the better of the two."""
            points = self.case(forced[:, :8], position)

            def on(threads: int) -> None:
                torch.set_num_threads(threads)
                points()

            trial = alternate_clocks({n: functools.partial(on, n) for n in sorted({1, cores})}, repeats=5)
            self.threads = min(trial, key=lambda n: trial[n].wall)
            torch.set_num_threads(self.threads)

        def case(self, forced, position: int) -> Callable[[], None]:
            forced, hidden = tensor(forced).long(), tensor(np.zeros((len(context), model.width))).to(dtype)

            def points(tokens) -> None:
                with torch.inference_mode():
                    self.decoder.points(hidden, max(position // 4, 1) - 1, tokens)
                if device == "cuda":
                    torch.cuda.synchronize()

            return lambda: points(forced)

        def first_points(self, forced) -> tuple[np.ndarray, np.ndarray]:
            with torch.inference_mode():
                _, logs, states, _ = self.decoder.points(self.decoder.start(), 0, tensor(forced).long())
                return logs.float().cpu().numpy(), states.float().cpu().numpy()

    return Twin()


@functools.cache
def _torch_cores() -> int:
    """Torch's threads as the process began: a batch's choice does not bind the next one."""
    import torch

    return torch.get_num_threads()


def _figures(spent: Seconds, points: int, batch: int, share: float | None) -> dict[str, float]:
    figures = {
        "tokens_per_s": round(4 * points / spent.wall),
        "points_per_s": round(points / spent.wall, 1),
        "ms_per_point": round(1e3 * batch * spent.wall / points, 4),
        "cpu_ms_per_point": round(1e3 * batch * spent.cpu / points, 4),
    }
    return figures if share is None else figures | {"share_of_bandwidth": round(share, 4)}


def _counted(case: Callable[[], None], bar: tqdm) -> Callable[[], None]:
    def counted() -> None:
        case()
        bar.update()

    return counted


def _bytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _integers(texts: list[str], name: str, least: int) -> list[int]:
    try:
        values = [int(text) for text in texts]
    except ValueError:
        values = []
    if not values or min(values) < least:
        raise UserError(f"--{name}={','.join(texts)} must be whole numbers of at least {least}, with commas.")
    return values


if __name__ == "__main__":
    run(main)
