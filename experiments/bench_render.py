"""How fast the rasteriser is, beside a dense torch compositor in the same run; ends in one JSON line.

    python -m experiments.bench_render                    # the grid on the JAX back end, 4 minutes on 2 free cores
    python -m experiments.bench_render --quick            # three sizes
    python -m experiments.bench_render --against=gsplat   # CUDA machines: overhead over plain torch + gsplat
    python -m experiments.bench_render --against=gsplat --jax_too   # and the JAX back end there, which is slow

An *evaluation* is one Gaussian tested against one pixel of a 16×16 tile that its box touches: evaluations =
intersections × 256. Early stop makes the renderer do fewer, padding of lists to chunks and groups more; neither is
counted, so that figures of different renderers compare. Compositing time is that of the blending alone, given the
lists; `ms` is the whole call: projection, binning, blending. Each case is timed in turns of a fifth of a second.
"""

from __future__ import annotations

import functools
import resource
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import common
from renderer_bridge import binning, estimate_capacity, gsplat_dlpack, projection, rasterize, tiles

_QUICK = flags.DEFINE_bool("quick", False, "Only the smallest, middle and largest size.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed turns of each case (the median is shown).", lower_bound=1)
_AGAINST = flags.DEFINE_enum("against", None, ["gsplat"], "Compare with plain torch + gsplat instead (needs CUDA).")
_JAX_TOO = flags.DEFINE_bool("jax_too", False, "With --against=gsplat: time the JAX back end as well.")

_TURN_SECONDS = 0.2
_COUNTS = (2_000, 20_000, 100_000)
_SIDES = (128, 256, 512)
_DENSE_LIMIT = 2_000 * 128 * 128  # pairs of Gaussian and pixel that the dense compositor is asked for


def scene(kind: str, count: int, side: int) -> tuple[jax.Array, ...]:
    """`even`: a cube full of Gaussians over the whole image; `head`: a sphere's surface on a third of its area.

    Gaussians have the same size in pixels at every image size (about four tiles each), as a fit's would.

    Returns:
      means, quats, scales, opacities, colors, viewmats [1,4,4], Ks [1,3,3].
    """
    rng = np.random.default_rng(0)
    focal, distance = 1.9 * side, 4.0
    means = rng.uniform(-1, 1, (count, 3))
    pixels = 1.5
    if kind == "head":
        means = rng.normal(size=(count, 3))
        # A circle of a third of the image: radius sqrt(side² / 3 / pi).
        means *= 0.3257 * side * distance / focal / np.linalg.norm(means, axis=1, keepdims=True)
    scales = pixels * distance / focal * rng.uniform(0.5, 1.5, (count, 3))
    viewmat = np.eye(4)
    viewmat[2, 3] = distance
    K = [[focal, 0, side / 2], [0, focal, side / 2], [0, 0, 1]]
    arrays = (
        means,
        rng.normal(size=(count, 4)),
        scales,
        rng.uniform(0.05, 0.9, count),
        rng.uniform(0, 1, (count, 3)),
        viewmat[None],
        np.asarray([K]),
    )
    return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


def main() -> None:
    if _AGAINST.value == "gsplat":
        against_gsplat()
        return
    rows = []
    print("blending: million evaluations/s, wall clock (and per core-second); yardstick: million exponentials/s")
    print(
        f"{'scene':5} {'G':>7} {'side':>4} {'isects':>8} | {'fwd ms':>7} {'f+b ms':>7} {'ratio':>5} {'bin ms':>6} | "
        f"{'blend fwd':>11} {'blend bwd':>11} {'yardstick':>9} | {'peak MB':>7} | {'dense f':>7} {'dense f+b':>9}"
    )
    for kind in ("even", "head"):
        for count, side in cases(kind):
            row = measure(kind, count, side)
            rows.append(row)
            dense = f"{row['dense_ms']:7.0f} {row['dense_both_ms']:9.0f}" if "dense_ms" in row else f"{'-':>7} {'-':>9}"
            print(
                f"{kind:5} {count:7} {side:4} {row['intersections']:8} | {row['ms']:7.1f} {row['both_ms']:7.1f} "
                f"{row['both_ms'] / row['ms']:5.1f} {row['binning_ms']:6.1f} | "
                f"{row['forward_meps']:5.0f} ({row['forward_meps_per_core']:3.0f}) "
                f"{row['backward_meps']:5.0f} ({row['backward_meps_per_core']:3.0f}) {row['yardstick_meps']:9.0f} | "
                f"{row['peak_mb']:7.1f} | {dense}",
                flush=True,
            )
    linear = linearity(rows)
    print(f"largest case, ms per million evaluations against the smallest of its scene: {linear}")
    print(f"process peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")
    common.json_line("bench_render", {"rows": rows, "linearity": linear})


def cases(kind: str) -> list[tuple[int, int]]:
    """The whole grid of even scenes, its diagonal of heads (and of everything with --quick)."""
    if _QUICK.value or kind == "head":
        return list(zip(_COUNTS, _SIDES, strict=True))
    return [(count, side) for count in _COUNTS for side in _SIDES]


def measure(kind: str, count: int, side: int) -> dict:
    arrays = scene(kind, count, side)
    capacity = estimate_capacity(*arrays[:4], *arrays[5:], side, side, margin=1.0)

    def render(*arrays):
        return rasterize(*arrays, side, side, backend="jax", capacity=capacity)

    forward = jax.jit(lambda *a: render(*a)[:2])
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(1, side, side, 3)), jnp.float32)
    both = jax.jit(jax.value_and_grad(lambda *a: jnp.sum(weight * render(*a)[0]), argnums=range(7)))
    details = jax.jit(lambda *a: {k: v for k, v in render(*a)[2].items() if isinstance(v, jax.Array)})(*arrays)
    if int(details["overflow"]):
        raise AssertionError("the measured capacity must hold its own scene")

    # The blending alone: from projected Gaussians and their lists to the image, and back.
    projected = jax.jit(lambda *a: projection.project(*a, side, side))(*arrays[:4], *arrays[5:])
    bin_all = jax.jit(functools.partial(binning.bin_gaussians, width=side, height=side, capacity=capacity))
    lists = (projected.means2d, projected.radii, projected.depths)
    bins = bin_all(*lists)
    inputs = (projected.means2d, projected.conics, projected.opacities, arrays[4][None])

    def blend(*inputs):
        return tiles.blend_tiles(*inputs, bins, side, side, max_alpha=0.999)

    blend_forward = jax.jit(blend)
    (_, alpha), pullback = jax.vjp(blend_forward, *inputs)
    bars = (weight, jnp.zeros_like(alpha))
    blend_backward = jax.jit(lambda pullback, bars: pullback(bars))

    compiled = both.lower(*arrays).compile()
    memory = compiled.memory_analysis()
    cases = {
        "ms": lambda: jax.block_until_ready(forward(*arrays)),
        "both_ms": lambda: jax.block_until_ready(compiled(*arrays)),
        "blend": lambda: jax.block_until_ready(blend_forward(*inputs)),
        "back": lambda: jax.block_until_ready(blend_backward(pullback, bars)),
        "binning_ms": lambda: jax.block_until_ready(bin_all(*lists)),
    }
    if kind == "even" and count * side * side <= _DENSE_LIMIT:
        cases |= dense_cases(inputs, projected, side, weight)
    # A fixed piece of work, timed in turn with the rest: how busy the machine was. An idle core of the machine that
    # the figures in LOG.md come from does about 2000 M exponentials/s.
    tile = jnp.full((64, 256), 0.3)
    exponentials = jax.jit(lambda x: jax.lax.fori_loop(0, 200, lambda _, x: jnp.exp(-x), x))
    cases["exponentials"] = lambda: jax.block_until_ready(exponentials(tile))
    cpu = {"blend": cpu_seconds(cases["blend"]), "back": cpu_seconds(cases["back"])}
    seconds = common.alternate(cases, _REPEATS.value, warmup=1, turn_seconds=_TURN_SECONDS)
    intersections = int(details["intersections"])
    evaluations = intersections * binning.TILE**2
    row = {
        "scene": kind,
        "gaussians": count,
        "side": side,
        "intersections": intersections,
        "evaluations": evaluations,
        "yardstick_meps": tile.size * 200 / seconds.pop("exponentials") / 1e6,
        "forward_meps_per_core": evaluations / cpu["blend"] / 1e6,
        "backward_meps_per_core": evaluations / cpu["back"] / 1e6,
        "forward_meps": evaluations / seconds.pop("blend") / 1e6,
        "backward_meps": evaluations / seconds.pop("back") / 1e6,
        "peak_mb": (memory.temp_size_in_bytes + memory.output_size_in_bytes + memory.argument_size_in_bytes) / 2**20,
    }
    return row | {name: value * 1e3 for name, value in seconds.items()}


def cpu_seconds(case) -> float:
    """Processor time of one run over all threads, best of three: what a busy neighbour does not stretch."""
    case()
    spent = []
    for _ in range(3):
        start = time.process_time()
        case()
        spent.append(time.process_time() - start)
    return min(spent)


def dense_cases(inputs, projected, side: int, weight) -> dict:
    """The plain torch compositor: every Gaussian against every pixel, in depth order, by cumulative products."""
    try:
        import torch
    except ImportError:
        print("torch is not installed: no dense compositor beside", file=sys.stderr)
        return {}
    order = np.argsort(np.asarray(projected.depths[0]), kind="stable")
    order = order[(np.asarray(projected.radii[0]) > 0).all(-1)[order]]
    leaves = [torch.tensor(np.asarray(x[0])[order]) for x in inputs]
    bar = torch.tensor(np.asarray(weight[0])).reshape(-1, 3)
    ys, xs = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    pixels = torch.stack([xs, ys], -1).reshape(-1, 2)

    def strip(start: int, leaves):
        means, conics, opacities, colors = leaves
        dx, dy = (means[:, i] - pixels[start : start + 2048, i, None] for i in range(2))
        sigma = 0.5 * (conics[:, 0] * dx * dx + conics[:, 2] * dy * dy) + conics[:, 1] * dx * dy
        alpha = (opacities * torch.exp(-sigma)).clamp(max=0.999)
        alpha = torch.where((sigma >= 0) & (alpha >= 1 / 255), alpha, torch.zeros_like(alpha))
        light = torch.cumprod(1 - alpha, 1)
        weights = torch.where(light > 1e-4, alpha, torch.zeros_like(alpha))
        return (weights * torch.cat([torch.ones_like(light[:, :1]), light[:, :-1]], 1)) @ colors

    def forward():
        with torch.no_grad():
            for start in range(0, side * side, 2048):
                strip(start, leaves)

    def both():
        variables = [x.clone().requires_grad_(True) for x in leaves]
        for start in range(0, side * side, 2048):
            (strip(start, variables) * bar[start : start + 2048]).sum().backward()

    return {"dense_ms": forward, "dense_both_ms": both}


def linearity(rows: list[dict]) -> dict[str, float]:
    """Per scene: ms per evaluation of the largest case over that of the smallest of over a million; 1 = linear."""
    result = {}
    for kind in ("even", "head"):
        mine = sorted(
            (r for r in rows if r["scene"] == kind and r["evaluations"] > 1e6), key=lambda r: r["evaluations"]
        )
        if len(mine) > 1:
            small, large = (r["both_ms"] / r["evaluations"] for r in (mine[0], mine[-1]))
            result[kind] = round(large / small, 2)
    return result


def against_gsplat() -> None:
    """The bridge against plain `gsplat.rasterization` in the same process on the same scene, forward + backward."""
    reason = gsplat_dlpack.unavailable()
    if reason is not None:
        raise common.UserError(f"--against=gsplat cannot run: {reason}.")
    rows = []
    print(
        f"{'scene':5} {'G':>7} {'side':>4} | {'gsplat f+b':>10} {'bridge f+b':>10} {'overhead':>8} | {'jax f+b':>8} | "
        f"{'gsplat MB':>9} {'bridge MB':>9} {'of JAX MB':>9}"
    )
    for kind in ("even", "head"):
        for count, side in cases(kind):
            row = {"scene": kind, "gaussians": count, "side": side} | compare_with_gsplat(
                scene(kind, count, side), side
            )
            rows.append(row)
            jax_ms = f"{row['jax_ms']:8.3f}" if _JAX_TOO.value else f"{'-':>8}"
            print(
                f"{kind:5} {count:7} {side:4} | {row['gsplat_ms']:10.3f} {row['bridge_ms']:10.3f} "
                f"{row['overhead']:8.1%} | {jax_ms} | {row['gsplat_torch_peak_mb']:9.1f} "
                f"{row['bridge_torch_peak_mb']:9.1f} {row['jax_peak_mb']:9.1f}",
                flush=True,
            )
    common.json_line("bench_render_against_gsplat", {"rows": rows})


def compare_with_gsplat(arrays, side: int) -> dict[str, float]:
    """One case: milliseconds of a loss and its gradients; peaks of torch's memory, and of JAX's so far in this process.

    Raises:
      AssertionError: the images' losses or the gradients differ, so that the times would mean nothing.
    """
    import gsplat
    import torch

    target = jnp.asarray(np.random.default_rng(1).uniform(size=(1, side, side, 3)), jnp.float32)

    # The image enters the loss's gradient, or XLA would leave out the forward pass, which plain torch never does.
    def program(backend: str, capacity: int | None):
        def loss(*arrays):
            return jnp.mean((rasterize(*arrays, side, side, backend=backend, capacity=capacity)[0] - target) ** 2)

        return jax.jit(jax.value_and_grad(loss, argnums=range(6)))

    capacity = estimate_capacity(*arrays[:4], *arrays[5:], side, side, margin=1.0)
    programs = {"bridge": program("gsplat", None)} | ({"jax": program("jax", capacity)} if _JAX_TOO.value else {})
    leaves = [torch.from_dlpack(x).clone().requires_grad_(True) for x in arrays[:6]]
    Ks, goal = torch.from_dlpack(arrays[6]).clone(), torch.from_dlpack(target).clone()

    def plain():
        image, _, _ = gsplat.rasterization(*leaves, Ks, side, side, packed=False)
        loss = ((image - goal) ** 2).mean()
        gradients = torch.autograd.grad(loss, leaves)
        torch.cuda.synchronize()
        return loss.detach(), gradients

    steps = {"gsplat": plain}
    steps |= {name: functools.partial(lambda p: jax.block_until_ready(p(*arrays)), p) for name, p in programs.items()}
    results, row = {}, {}
    for name, step in steps.items():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        loss, gradients = step()
        results[name] = float(loss), [np.asarray(x.cpu() if name == "gsplat" else x) for x in gradients]
        row[f"{name}_torch_peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
    row["jax_peak_mb"] = jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] / 2**20
    expected_loss, expected = results.pop("gsplat")
    for name, (loss, gradients) in results.items():
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-4, err_msg=name)
        for mine, theirs in zip(gradients, expected, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=2e-2, atol=1e-2 * np.abs(theirs).max(), err_msg=name)
    seconds = common.alternate(steps, max(_REPEATS.value, 20), warmup=5)
    row |= {f"{name}_ms": value * 1e3 for name, value in seconds.items()}
    return row | {"overhead": seconds["bridge"] / seconds["gsplat"] - 1}


if __name__ == "__main__":
    common.run(main)
