"""Times one training step of the Gaussian decoder, and where its time goes: decode, animate, rasterise, loss, backward.

    python -m experiments.bench_stage_two [--config=tiny] [--points=2000,20000] [--sizes=64,128] [--subjects=4]
       [--repeats=10] [--detail=coarse] [--config.decoder.views=4 …]

People and photographs are made up. Every part is a program of its own on the step's own arrays, all are timed in turn,
and medians count; `forward` is the loss as one program, `backward` what its gradient takes beyond it, `update` what the
whole step takes beyond both (the optimiser). LPIPS is off without --vgg, as in training. Ends in one JSON line.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments.common import Seconds, alternate_clocks, json_line, milliseconds, run, whole_numbers
from experiments.config_flags import define_config
from experiments.heads import DETAILS
from experiments.step_programs import made_up_batch
from pointillist_jax.configs import DecoderConfig
from pointillist_jax.convert import load_torch_file, lpips_from_torch
from pointillist_jax.flame import FlameModel, open_head
from pointillist_jax.sharding import make_mesh, shard_batch
from pointillist_jax.training import decoder
from pointillist_jax.training.state import init_state, make_optimizer

POINTS = flags.DEFINE_list("points", ["2000", "20000"], "Points of a person.")
SIZES = flags.DEFINE_list("sizes", ["64", "128"], "Sides of the pictures, pixels.")
SUBJECTS = flags.DEFINE_integer("subjects", 4, "In a step; --config.decoder.views sets views of each.", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 10, "Timed runs of each part; the median counts.", lower_bound=1)
DETAIL = flags.DEFINE_enum("detail", "coarse", DETAILS, "Which open head.")
VGG = flags.DEFINE_string("vgg", None, "torchvision's vgg16-397923af.pth, for LPIPS.")
CONFIG = define_config("decoder")

# Parts that are measured alone, and those that are differences.
PARTS = ("decode", "animate", "raster", "loss")
DIFFERENCES = {"backward": ("gradient", "forward"), "update": ("step", "gradient")}


def main() -> None:
    settings, head = CONFIG().decoder, open_head(DETAIL.value)
    lpips = None if VGG.value is None else lpips_from_torch(load_torch_file(VGG.value))
    cases = [(p, s) for p in whole_numbers(POINTS) for s in whole_numbers(SIZES)]
    print(
        f"{jax.devices()[0].device_kind}; {SUBJECTS.value} subjects × {settings.views} views, LPIPS "
        f"{'off' if lpips is None else 'on'}; wall ms, CPU ms in brackets"
    )
    titles = (*PARTS, "forward", *DIFFERENCES, "step")
    print(f"  {'points':>7} {'side':>5}" + "".join(f"{title:>17}" for title in titles))
    rows = []
    for points, size in cases:
        rows.append(measure(settings, head, lpips, points, size))
        cells = (f"{rows[-1][f'{t}_ms']:.1f} ({rows[-1][f'{t}_cpu_ms']:.1f})" for t in titles)
        print(f"  {points:>7} {size:>5}" + "".join(f"{cell:>17}" for cell in cells), flush=True)
    found = {"subjects": SUBJECTS.value, "views": settings.views, "lpips": lpips is not None, "head": head.source}
    json_line("stage_two", found | {"decoder": dataclasses.asdict(settings), "rows": rows})


def measure(settings: DecoderConfig, head: FlameModel, lpips: Any, points: int, size: int) -> dict[str, Any]:
    """Milliseconds of the parts and of the whole, by the wall clock and on the CPU."""
    mesh = make_mesh("", jax.devices()[:1])
    frozen, optimizer = decoder.frozen_on(mesh, head, lpips), make_optimizer(settings.train)
    batch = shard_batch(made_up_batch(head, settings, SUBJECTS.value, points, size), mesh)
    with jax.set_mesh(mesh):
        state, _ = init_state(decoder.init_params(settings), optimizer, settings.train, jax.random.PRNGKey(0), mesh)
        step = decoder.GrowingStep(
            settings, frozen, optimizer, size, size, state=state, capacity=decoder.first_capacity(points, size, size)
        )
        held = [step(state, batch)[0]]  # Its capacity suffices from here on.
        parts = programs(settings, frozen, batch, held[0].params, size, step.capacity)

        def whole():
            held[0], metrics = step(held[0], batch)
            jax.block_until_ready((held[0], metrics))

        capacity = step.capacity
        found = alternate_clocks(parts | {"step": whole}, REPEATS.value)
    if step.capacity != capacity:  # The pictures change with the parameters; the parts were measured with less room.
        print(f"  (the step's capacity grew from {capacity} to {step.capacity} while it was timed)")
    for name, (more, less) in DIFFERENCES.items():
        found[name] = Seconds(found[more].wall - found[less].wall, found[more].cpu - found[less].cpu)
    return {"points": points, "size": size, "capacity": step.capacity, **milliseconds(found)}


def programs(
    settings: DecoderConfig, frozen: dict[str, Any], batch: dict[str, Any], params: Any, size: int, capacity: int
) -> dict[str, Callable[[], None]]:
    """Each part as a compiled program on its own inputs, and the whole loss without and with its gradient."""
    params = jax.tree.map(jnp.copy, params)  # The step donates its own.
    how = {"width": size, "height": size, "capacity": capacity, "backend": "auto"}

    @jax.jit
    def decode(params, batch):
        return decoder.decode_batch(params, settings, batch)

    @jax.jit
    def animate(head, decoded, batch):
        def subject(decoded, batch):
            avatar = decoder.rig_subject(head, decoded, batch)
            return jax.vmap(functools.partial(decoder.pose_view, head, avatar))(batch["flame"])

        rows = {name: batch[name] for name in ("points", "binding", "canonical", "flame")}
        return jax.vmap(subject)(decoded, rows)

    @jax.jit
    def raster(posed, viewmats, Ks):
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (posed, viewmats, Ks))
        if decoder.renders_exactly("auto"):
            images, _ = jax.vmap(functools.partial(decoder.splat_view, **how))(*flat)
        else:
            images, _ = jax.lax.map(lambda one: decoder.splat_view(*one, **how), flat)
        return images.reshape(*viewmats.shape[:2], size, size, 3)

    @jax.jit
    def loss(decoded, images, frozen, batch):
        return decoder.compose_loss(settings, frozen, decoded, images, batch)[0]

    def whole(params, frozen, batch):
        total, count, _ = decoder.make_loss(settings, frozen, size, size, capacity=capacity)(params, batch, None)
        return total / count

    forward, gradient = jax.jit(whole), jax.jit(jax.value_and_grad(whole))
    decoded = decode(params, batch)
    posed = animate(frozen["head"], decoded, batch)
    images = raster(posed, batch["viewmats"], batch["Ks"])
    calls = {
        "decode": (decode, params, batch),
        "animate": (animate, frozen["head"], decoded, batch),
        "raster": (raster, posed, batch["viewmats"], batch["Ks"]),
        "loss": (loss, decoded, images, frozen, batch),
        "forward": (forward, params, frozen, batch),
        "gradient": (gradient, params, frozen, batch),
    }
    return {name: lambda f=f, rest=rest: jax.block_until_ready(f(*rest)) for name, (f, *rest) in calls.items()}


if __name__ == "__main__":
    run(main)
