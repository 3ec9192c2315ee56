"""Can the data keep up? Tokens per second from the token store to device arrays, beside what training consumes.

    python -m experiments.bench_data [--points=86127] [--subjects=8] [--workers=2] [--rounds=7] [--against=tiny|none]

Writes a store of random subjects of GaussianAvatars' size (86,127 points = 344,516 tokens each), then takes turns, A B
C A B C …, medians: shuffled windows of 1,024, 6,000 and 12,000 tokens to device arrays, bare and with portraits, with
threads, with worker processes, and with a cache so small that every window reads its subject from the file anew; and
the optimiser step of a preset on a batch that lies on the device (trainable encoders included; where a preset freezes
them, a random context stands for their stored features). Then tokenises a fit of that size from its PLY, first cold,
then warm. Says whether the slowest case reaches 20 times what the preset consumes, and the slowest of window 12,000 two
million tokens a second. Ends in one JSON line.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import resource
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from experiments.common import alternate, json_line, run, whole_numbers
from experiments.random_flame import write_flame
from pointillist_jax.configs import PRESETS, Config, ModelConfig, preset
from pointillist_jax.data.streams import BatchIterator
from pointillist_jax.data.subjects import subject_record
from pointillist_jax.data.token_store import FLAME_FIELDS, StoreSpec, StoreWriter, SubjectRecord, TokenStore, open_store
from pointillist_jax.data.windows import window_batches
from pointillist_jax.files import UserError
from pointillist_jax.flame import FlameModel, FlameParams, load_flame
from pointillist_jax.flame.param_files import save_flame_params
from pointillist_jax.gaussians import Gaussians, save_ply
from pointillist_jax.tokens import PointTokenizer

POINTS = flags.DEFINE_integer("points", 86_127, "Points of a subject.", lower_bound=1)
SUBJECTS = flags.DEFINE_integer("subjects", 8, "Subjects of the store.", lower_bound=1)
PORTRAIT = flags.DEFINE_integer("portrait_size", 518, "Side of the portraits, pixels.", lower_bound=1, upper_bound=4096)
WINDOWS = flags.DEFINE_list("windows", ["1024", "6000", "12000"], "Windows, in tokens.")
BATCH = flags.DEFINE_integer("batch_size", 4, "Windows of a batch (paper: 4).", lower_bound=1)
WORKERS = flags.DEFINE_integer("workers", 2, "Processes of the cases with workers; 0 leaves them out.", lower_bound=0)
TOKENS = flags.DEFINE_integer("tokens", 2_000_000, "Tokens read per case and round.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds; medians are reported.", lower_bound=1)
AGAINST = flags.DEFINE_enum("against", "tiny", [*PRESETS, "none"], "Preset whose training step is timed too.")

CONTEXT = 512  # Tokens of the random context.
TIMES_TRAINING = 20  # What reading has to reach, beside training with `tiny`,
LONG_WINDOW, LONG_RATE = 12_000, 2_000_000  # and by itself, tokens per second.


def main() -> None:
    windows = whole_numbers(WINDOWS)
    if odd := [window for window in windows if window % 4]:
        raise UserError(f"--windows={','.join(WINDOWS.value)} must be multiples of 4, which {odd[0]} is not.")
    with tempfile.TemporaryDirectory() as folder:
        store = random_store(Path(folder) / "tokens")
        size = sum(path.stat().st_size for path in store.path.glob("tokens-*"))
        print(f"{len(store)} subjects, {store.lengths.sum():,} tokens, {size / 2**20:.0f} MiB with portraits")
        head = load_flame(write_flame(Path(folder) / "random_flame.pkl"))
        cases, tokens, streams = reading_cases(store, windows)
        if AGAINST.value != "none":
            tokens["train"], cases["train"] = training_case(store, preset(AGAINST.value), head)
        seconds = alternate(cases, ROUNDS.value, warmup=1)
        for stream in streams:
            stream.close()
        rates = {name: tokens[name] / seconds[name] for name in cases}
        cold, warm = tokenise_seconds(Path(folder), head)

    print(f"\nmillion tokens per second from the store to device arrays, batches of {BATCH.value}")
    for name in rates:
        if name != "train":
            print(f"  {name:<34} {rates[name] / 1e6:8.2f}")
    if "train" in rates:
        print(f"training, {AGAINST.value}: {rates['train']:,.0f} tokens/s in the optimiser step")
    goals = judge(rates)
    for goal in goals.values():
        print(f"goal {'reached' if goal['met'] else 'MISSED'}: {goal['what']}: {goal['measured']:,} ({goal['case']})")
    print(f"tokenising a fit of {POINTS.value:,} Gaussians from its PLY: {cold:.2f} s cold, {warm:.2f} s warm")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"peak memory: {memory:.0f} MiB, largest worker {workers:.0f} MiB")
    figures = {
        "points": POINTS.value,
        "subjects": len(store),
        "batch_size": BATCH.value,
        "portrait_size": PORTRAIT.value,
        "rounds": ROUNDS.value,
        "tokens_per_s": {name: round(rate) for name, rate in rates.items() if name != "train"},
        "train": AGAINST.value,
        "train_tokens_per_s": round(rates["train"]) if "train" in rates else None,
        "data_over_train": {
            name: round(rate / rates["train"], 1)
            for name, rate in rates.items()
            if "train" in rates and name != "train"
        },
        "goals": goals,
        "tokenise_cold_s": round(cold, 3),
        "tokenise_s": round(warm, 3),
        "peak_mib": round(memory),
        "worker_peak_mib": round(workers),
    }
    json_line("data", figures)


def judge(rates: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """The goals that can be judged, each by its slowest case.

    Args:
      rates: case → tokens per second, "train" among them or not.
    """
    reading = {name: rate for name, rate in rates.items() if name != "train"}
    long = {name: rate for name, rate in reading.items() if re.match(rf"{LONG_WINDOW}\b", name)}
    goals = {}
    if "train" in rates:
        case = min(reading, key=reading.get)
        what = f"reading at least {TIMES_TRAINING} × what training with {AGAINST.value} consumes"
        goals["times_training"] = _goal(what, TIMES_TRAINING, round(reading[case] / rates["train"], 1), case)
    if long:
        case = min(long, key=long.get)
        what = f"at least {LONG_RATE:,} tokens/s at window {LONG_WINDOW:,}"
        goals["long_window_tokens_per_s"] = _goal(what, LONG_RATE, round(long[case]), case)
    return goals


def _goal(what: str, goal: float, measured: float, case: str) -> dict[str, Any]:
    return {"what": what, "goal": goal, "measured": measured, "case": case, "met": measured >= goal}


def random_store(path: Path) -> TokenStore:
    """Subjects of random points; tokenised for real, so that the sequences are legal."""
    rng, tokenizer = np.random.default_rng(0), PointTokenizer()
    spec = StoreSpec(tokenizer, flame_sha256="0" * 64, flame_source="random", portrait_size=PORTRAIT.value)
    sizes = {"shape": 300, "expr": 100, "eyes_pose": 6}
    writer = StoreWriter(path, spec)
    for i in tqdm(range(SUBJECTS.value), desc="store", unit="person"):
        points = rng.uniform(tokenizer.lower, tokenizer.upper, (POINTS.value, 3))
        flame = {name: rng.normal(size=sizes.get(name, 3)).astype(np.float32) for name in FLAME_FIELDS}
        record = SubjectRecord(
            name=f"person_{i:04d}",
            tokens=tokenizer.encode(points, rng.integers(0, tokenizer.num_faces, POINTS.value)),
            shape=flame["shape"],
            portrait=rng.integers(0, 256, (PORTRAIT.value, PORTRAIT.value, 3), dtype=np.uint8),
            flame=flame,
        )
        writer.write_shard([record])
    writer.finish()
    return open_store(path)


def reading_cases(
    store: TokenStore, windows: list[int]
) -> tuple[dict[str, Callable[[], None]], dict[str, int], list[BatchIterator]]:
    """Name → a turn that takes some batches to the device; how many tokens a turn takes; the streams, to be closed."""
    cases, tokens, streams = {}, {}, []
    for window in windows:
        batches = max(TOKENS.value // (window * BATCH.value), 8)
        for condition in ((), ("portrait", "flame")):
            for workers in sorted({0, WORKERS.value}):
                how = {"window": window, "batch_size": BATCH.value, "condition": condition, "num_workers": workers}
                stream = iter(window_batches(store, **how))
                name = f"{window}{'+condition' if condition else ''}{f', {workers} workers' if workers else ''}"
                # Portraits are eight hundred kilobytes a row: fewer batches measure as well.
                count = max(batches // 4, 8) if condition else batches
                cases[name] = functools.partial(take, stream, count)
                tokens[name] = count * BATCH.value * window
                streams.append(stream)
        uncached = open_store(store.path, cache_bytes=0)
        streams.append(iter(window_batches(uncached, window=window, batch_size=BATCH.value)))
        name, count = f"{window}, no cache", max(batches // 8, 8)
        cases[name], tokens[name] = functools.partial(take, streams[-1], count), count * BATCH.value * window
    return cases, tokens, streams


def take(stream: BatchIterator, count: int) -> None:
    on_device = None
    for _ in range(count):
        # The batch before has to be there before this one is handed over, as in a training loop.
        jax.block_until_ready(on_device)
        on_device = jax.device_put(next(stream))
    jax.block_until_ready(on_device)


def training_case(store: TokenStore, config: Config, head: FlameModel) -> tuple[int, Callable[[], None]]:
    """Tokens of a step, and the optimiser step of a preset on one batch."""
    from pointillist_jax.models.ar import param_specs
    from pointillist_jax.models.layers import init_params
    from pointillist_jax.sharding import make_mesh
    from pointillist_jax.training import ar
    from pointillist_jax.training.state import init_state, make_optimizer, train_step

    model = config.model.for_tokenizer(store.tokenizer)
    settings = dataclasses.replace(config.train, batch_size=BATCH.value)
    window = min(model.window, int(store.lengths.max()) // 4 * 4)
    condition = () if model.encoder.frozen else ("portrait", "flame")
    batch = jax.device_put(
        next(iter(window_batches(store, window=window, batch_size=BATCH.value, condition=condition)))
    )
    if model.encoder.frozen:
        batch["context"] = jax.random.normal(jax.random.key(1), (BATCH.value, CONTEXT, model.width), jnp.float32)
        loss_fn = transformer_loss(model)
        initialise = functools.partial(init_params, param_specs(model), boxed=True)
    else:
        loss_fn, initialise = ar.make_loss(model, head), ar.init_params(model)

    optimizer, mesh = make_optimizer(settings), make_mesh()
    state, _ = init_state(initialise, optimizer, settings, jax.random.PRNGKey(0), mesh)
    step = functools.partial(train_step, loss_fn=loss_fn, optimizer=optimizer, config=settings)
    compiled, held = jax.jit(step, donate_argnums=0), [state]

    def turn() -> None:
        with jax.set_mesh(mesh):
            held[0], metrics = compiled(held[0], batch)
        jax.block_until_ready((held[0], metrics))

    return BATCH.value * window, turn


def transformer_loss(model: ModelConfig) -> Callable:
    """The next-token loss of the transformer alone, on a given context."""
    from pointillist_jax.losses.cross_entropy import slot_cross_entropy
    from pointillist_jax.models.ar import hidden_states, output_tables

    def loss_fn(params, batch, key):
        hidden = hidden_states(params, model, batch["tokens"], batch["context"], batch["positions"])
        targets = jnp.where(batch["mask"], batch["targets"], model.tokenizer.pad)
        loss = slot_cross_entropy(hidden, targets, output_tables(params, model), model.tokenizer.eos)
        return loss.total, loss.count, {}

    return loss_fn


def tokenise_seconds(folder: Path, model: FlameModel) -> tuple[float, float]:
    """Seconds from a PLY of SH degree 3 and its flame_param.npz to tokens, on a head of FLAME's size: cold, warm.

    Cold is the first time in this process, compiling what has not been compiled; warm the median of `--rounds` more.
    """
    rng, count = np.random.default_rng(1), POINTS.value
    gaussians = Gaussians(
        means=rng.normal(0, 0.3, (count, 3)).astype(np.float32),
        quats=rng.normal(size=(count, 4)).astype(np.float32),
        scales=np.full((count, 3), 0.5),
        opacities=np.full(count, 0.5),
        sh=rng.normal(0, 0.1, (count, 16, 3)).astype(np.float32),
        binding=rng.integers(0, model.num_faces, count),
    )
    save_ply(folder / "fit" / "point_cloud.ply", gaussians)
    save_flame_params(folder / "fit" / "flame_param.npz", timesteps(model, rng, 20), model, dynamic_offset=True)
    # A random head is larger than a real one.
    spec = StoreSpec(
        PointTokenizer(num_faces=model.num_faces, lower=-3.0, upper=3.0), model.sha256, out_of_bounds="clip"
    )
    seconds = []
    for _ in range(ROUNDS.value + 1):
        start = time.perf_counter()
        subject_record("fit", folder / "fit", model, spec)
        seconds.append(time.perf_counter() - start)
    return seconds[0], float(np.median(seconds[1:]))


def timesteps(model: FlameModel, rng: np.random.Generator, count: int) -> FlameParams:
    def normal(n: int) -> jax.Array:
        return jnp.asarray(rng.normal(0, 0.1, (count, n)), jnp.float32)

    return FlameParams(
        shape=jnp.asarray(0.3 * rng.normal(size=model.shape_dirs.shape[-1]), jnp.float32),
        expr=normal(model.expr_dirs.shape[-1]),
        rotation=normal(3),
        neck_pose=normal(3),
        jaw_pose=normal(3),
        eyes_pose=normal(6),
        translation=normal(3),
    )


if __name__ == "__main__":
    run(main)
