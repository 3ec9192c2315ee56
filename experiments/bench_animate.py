"""Times an avatar: animation, rendering and both, for several numbers of Gaussians and sizes of pictures.

    python -m experiments.bench_animate [--gaussians=5000,20000,90000] [--sizes=256,512] [--repeats=10] [--detail=full]

The avatar is made up: skin-coloured Gaussians spread over the open head. Frames differ in pose, and every step is
finished before the next is timed; medians, by the wall clock and on the CPU. The same Gaussians are also animated on
coarser and finer meshes beside the head model alone: beyond one pass of it the cost must not depend on the mesh. Ends
in one JSON line.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from absl import flags

from experiments.common import Seconds, alternate_clocks, json_line, milliseconds, run, whole_numbers
from experiments.heads import DETAILS
from experiments.made_up import made_up_avatar, subdivided
from experiments.motions import turn_and_talk
from pointillist_jax.cameras import orbit
from pointillist_jax.flame import FlameModel, flame_vertices, open_head
from pointillist_jax.gaussians import Avatar
from pointillist_jax.playback import AvatarRenderer
from renderer_bridge import rasterize

GAUSSIANS = flags.DEFINE_list("gaussians", ["5000", "20000", "90000"], "Numbers of Gaussians.")
SIZES = flags.DEFINE_list("sizes", ["256", "512"], "Sides of the pictures, pixels.")
REPEATS = flags.DEFINE_integer("repeats", 10, "Timed frames of each case; the median counts.", lower_bound=1)
DETAIL = flags.DEFINE_enum("detail", "full", DETAILS, "Which open head.")


def main() -> None:
    counts, sizes = (whole_numbers(flag) for flag in (GAUSSIANS, SIZES))
    head = open_head(DETAIL.value)
    heads = [*([] if DETAIL.value == "coarse" else [open_head("coarse")]), head, subdivided(head)]
    print(f"{jax.devices()[0].device_kind}; head {head.source}: {head.num_vertices} vertices, {head.num_faces} faces; "
          "wall ms, CPU ms in brackets")  # fmt: skip
    print(f"  {'Gaussians':>9} {'size':>5} {'animate':>17} {'render':>17} {'both':>17} {'frames/s':>9}")
    cases, animation = [], {}
    for num in counts:
        avatar = made_up_avatar(head, num)
        for size in sizes:
            cases.append(measure(avatar, head, size, num))
            cells = "".join(f" {_cell(cases[-1], name):>17}" for name in ("animate", "render", "both"))
            print(f"  {num:>9} {size:>5}{cells} {cases[-1]['frames_per_s']:>9.1f}", flush=True)
    print(f"  {'Gaussians':>9} {'vertices':>9} {'animate':>17} {'head alone':>17} {'beyond it':>17}")
    for num in counts:
        animation[str(num)] = on_meshes(heads, num)
        for row in animation[str(num)]:
            cells = "".join(f" {_cell(row, name):>17}" for name in ("animate", "head", "beyond"))
            print(f"  {num:>9} {row['vertices']:>9}{cells}", flush=True)
    json_line("animate", {"cases": cases, "animation": animation})


def on_meshes(heads: Sequence[FlameModel], num: int) -> list[dict[str, float]]:
    """Milliseconds to animate `num` Gaussians on each head, of the head's vertices alone, and their difference."""
    timed = {}
    for i, head in enumerate(heads):
        motion = turn_and_talk(head, 16)
        timed[f"animate {i}"] = _rotating(AvatarRenderer(made_up_avatar(head, num), head, 16, 16).pose, motion)
        timed[f"head {i}"] = _rotating(functools.partial(_vertices, head), motion)
    found, rows = alternate_clocks(timed, REPEATS.value), []
    for i, head in enumerate(heads):
        whole, alone = found[f"animate {i}"], found[f"head {i}"]
        beyond = Seconds(whole.wall - alone.wall, whole.cpu - alone.cpu)
        times = {"animate": whole, "head": alone, "beyond": beyond}
        rows.append({"vertices": head.num_vertices, "faces": head.num_faces, **milliseconds(times)})
    return rows


def _cell(row: dict[str, float], name: str) -> str:
    return f"{row[f'{name}_ms']:.2f} ({row[f'{name}_cpu_ms']:.2f})"


def measure(avatar: Avatar, head: FlameModel, size: int, num: int) -> dict[str, float]:
    """Milliseconds a frame of animation, rendering and both."""
    motion = turn_and_talk(head, 16)
    camera = orbit(1, width=size, height=size, distance=1.2, target=(0.0, -0.03, -0.04), azimuth=(0.0, 0.0))
    renderer = AvatarRenderer(avatar, head, size, size)
    viewmat, K = camera.viewmats[0], camera.Ks[0]
    for t in range(16):  # Until no pose of the motion overflows.
        renderer(motion.timestep(t), viewmat, K)
    world = renderer.pose(motion.timestep(3))

    @jax.jit
    def splat(g):
        image, _, info = rasterize(
            g.means, g.quats, g.scales, g.opacities, g.colors, camera.viewmats, camera.Ks, size, size,
            backgrounds=jnp.ones((1, 3)), capacity=renderer.capacity,
        )  # fmt: skip
        return image, info["overflow"]

    found = alternate_clocks(
        {
            "animate": _rotating(renderer.pose, motion),
            "render": lambda: jax.block_until_ready(splat(world)),
            "both": _rotating(lambda p: renderer.frame(p, viewmat, K), motion),
        },
        REPEATS.value,
    )
    return {
        "gaussians": num,
        "size": size,
        **milliseconds(found),
        "frames_per_s": round(1 / found["both"].wall, 2),
        "capacity": renderer.capacity,
    }


@jax.jit
def _vertices(head, params):
    return flame_vertices(head, params)


def _rotating(function, motion):
    """A call that takes the next pose each time and waits for the result."""
    poses = [motion.timestep(t) for t in range(motion.expr.shape[0])]
    at = [0]

    def call():
        at[0] = (at[0] + 1) % len(poses)
        jax.block_until_ready(function(poses[at[0]]))

    return call


if __name__ == "__main__":
    run(main)
