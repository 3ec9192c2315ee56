"""Times an avatar: animation, rendering and both, for several numbers of Gaussians and sizes of pictures.

    python -m experiments.bench_animate [--gaussians=5000,20000,90000] [--sizes=256,512] [--repeats=10] [--detail=full]

The avatar is made up: skin-coloured Gaussians spread over the open head. Frames differ in pose, and every step is
finished before the next is timed. Also times animation on the coarse head (five times fewer vertices): beyond one pass
of the head model the cost must not depend on the mesh. Ends in one JSON line.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.common import alternate, json_line, run
from experiments.heads import DETAILS
from experiments.motions import turn_and_talk
from pointillist_jax.cameras import orbit
from pointillist_jax.files import UserError
from pointillist_jax.flame import FlameModel, bind_points, flame_vertices, open_head
from pointillist_jax.gaussians import Avatar, Gaussians
from pointillist_jax.playback import AvatarRenderer
from renderer_bridge import rasterize

GAUSSIANS = flags.DEFINE_list("gaussians", ["5000", "20000", "90000"], "Numbers of Gaussians.")
SIZES = flags.DEFINE_list("sizes", ["256", "512"], "Sides of the pictures, pixels.")
REPEATS = flags.DEFINE_integer("repeats", 10, "Timed frames of each case; the median counts.", lower_bound=1)
DETAIL = flags.DEFINE_enum("detail", "full", DETAILS, "Which open head.")


def main() -> None:
    numbers, sizes = (_numbers(flag) for flag in (GAUSSIANS, SIZES))
    head, coarse = open_head(DETAIL.value), open_head("coarse")
    print(f"{jax.devices()[0].device_kind}; head {head.source}: {head.num_vertices} vertices, {head.num_faces} faces")
    print(f"  {'Gaussians':>9} {'size':>5} {'animate':>10} {'render':>10} {'both':>10} {'frames/s':>9}")
    cases, animation = [], {}
    for num in numbers:
        avatar, small = made_up_avatar(head, num), made_up_avatar(coarse, num)
        posing, posing_small = AvatarRenderer(avatar, head, 16, 16).pose, AvatarRenderer(small, coarse, 16, 16).pose
        motion, other = turn_and_talk(head, 16), turn_and_talk(coarse, 16)
        timed = {
            "animate": _rotating(posing, motion),
            "animate_coarse": _rotating(posing_small, other),
            "head": _rotating(lambda p: _vertices(head, p), motion),
            "head_coarse": _rotating(lambda p: _vertices(coarse, p), other),
        }
        animation[str(num)] = {k: round(1e3 * v, 3) for k, v in alternate(timed, REPEATS.value).items()}
        for size in sizes:
            cases.append(measure(avatar, head, size, num))
            c = cases[-1]
            print(f"  {num:>9} {size:>5} {c['animate_ms']:>7.2f} ms {c['render_ms']:>7.2f} ms {c['both_ms']:>7.2f} ms "
                  f"{c['frames_per_s']:>9.1f}", flush=True)  # fmt: skip
    for num, t in animation.items():
        print(
            f"  {num} Gaussians, ms: {head.num_vertices} vertices {t['animate']} (head alone {t['head']}), "
            f"{coarse.num_vertices} vertices {t['animate_coarse']} (head alone {t['head_coarse']})"
        )
    json_line("animate", {"cases": cases, "animation_ms": animation})


def made_up_avatar(head: FlameModel, num: int, seed: int = 0) -> Avatar:
    """`num` flat Gaussians of random greys and browns on random places of the canonical mesh."""
    rng = np.random.default_rng(seed)
    canonical = head.neutral_params().canonical()
    triangles = np.asarray(flame_vertices(head, canonical))[np.asarray(head.faces)]
    area = np.linalg.norm(np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]), axis=1)
    binding = rng.choice(len(area), num, p=area / area.sum())
    points = np.einsum("pc,pca->pa", rng.dirichlet(np.ones(3), num), triangles[binding])
    # As many as cover the head about three times.
    scale = float(np.sqrt(3 * 0.5 * area.sum() / num / np.pi)) / 2
    gaussians = Gaussians(
        means=jnp.asarray(points, jnp.float32),
        quats=jnp.asarray(rng.normal(size=(num, 4)), jnp.float32),
        scales=jnp.asarray(scale * rng.uniform(0.5, 1.5, (num, 3)), jnp.float32),
        opacities=jnp.asarray(rng.uniform(0.3, 0.99, num), jnp.float32),
        colors=jnp.asarray(rng.uniform(0.2, 0.9, (num, 3)), jnp.float32),
    )
    return Avatar(gaussians, bind_points(head, canonical, gaussians.means, jnp.asarray(binding)))


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

    found = alternate(
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
        **{f"{name}_ms": round(1e3 * seconds, 3) for name, seconds in found.items()},
        "frames_per_s": round(1 / found["both"], 2),
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


def _numbers(flag) -> list[int]:
    if not all(x.isdigit() and 0 < int(x) < 10**7 for x in flag.value):
        raise UserError(f"--{flag.name}={','.join(flag.value)} must be positive whole numbers.")
    return [int(x) for x in flag.value]


if __name__ == "__main__":
    run(main)
