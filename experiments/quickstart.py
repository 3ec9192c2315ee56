"""The main job, end to end, with everything that exists so far. It grows with the project.

    python -m experiments.quickstart [--workdir=outputs/quickstart] [--smoke]

A head model → a random person's Gaussians, bound to its faces (GaussianAvatars' files) → one token sequence and back →
a rigged avatar bundle → a talking, turning head, splatted. Needs no GPU, no torch and no files of the user's.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from experiments.common import run
from experiments.media import write_image, write_video
from experiments.motions import turn_and_talk
from experiments.pictures import BACKGROUND, contact_sheet, head_colors, head_sheet
from pointillist_jax.cameras import orbit
from pointillist_jax.data.fits import load_fit, save_fit
from pointillist_jax.files import UserError, write_npz
from pointillist_jax.flame import (
    FlameModel,
    FlameParams,
    animate,
    bind_points,
    face_frames,
    flame_vertices,
    global_to_local,
    load_flame,
    open_head,
)
from pointillist_jax.flame.rotations import rotation_to_quat
from pointillist_jax.gaussians import Avatar, Gaussians, load_avatar, save_avatar, save_ply
from pointillist_jax.tokens import PointTokenizer
from renderer_bridge import rasterize

WORKDIR = flags.DEFINE_string("workdir", "outputs/quickstart", "Where to write; files of an earlier run are replaced.")
FLAME = flags.DEFINE_string("flame", None, "Your FLAME .pkl; the embedded open head if not given.")
POINTS = flags.DEFINE_integer("points", 20_000, "Gaussians of the person.", lower_bound=1)
FRAMES = flags.DEFINE_integer("frames", 96, "Length of the video at 24 frames a second.", lower_bound=2)
SIZE = flags.DEFINE_integer("size", 256, "Side of the video's pictures in pixels.", lower_bound=32, upper_bound=2048)
SEED = flags.DEFINE_integer("seed", 0, "Which person.", lower_bound=0)
SMOKE = flags.DEFINE_boolean("smoke", False, "The smallest setting: the coarse head, few points, few frames.")


def main() -> None:
    start = time.perf_counter()
    workdir = Path(WORKDIR.value)
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file; name a folder.")
    points, frames, size = (3000, 8, 96) if SMOKE.value else (POINTS.value, FRAMES.value, SIZE.value)
    rng = np.random.default_rng(SEED.value)

    model = load_flame(FLAME.value) if FLAME.value else open_head("coarse" if SMOKE.value else "full")
    print(f"[1/5] head: {model.source}, {model.num_vertices} vertices, {model.num_faces} faces")
    coarse = None if FLAME.value or SMOKE.value else open_head("coarse")
    write_image(workdir / "head.png", head_sheet(model, coarse, size=96 if SMOKE.value else 192))

    person = random_person(model, rng)
    canonical = person.canonical()
    local = gaussians_on_the_mesh(model, canonical, points, rng)
    save_fit(workdir / "fit", local, canonical, model)
    print(f"[2/5] person: {points} Gaussians bound to the mesh, in GaussianAvatars' layout")

    fit = load_fit(workdir / "fit", model)
    local, (canonical, world) = fit.gaussians, fit.canonical(model, jaw=0.3)
    tokenizer = PointTokenizer(num_faces=model.num_faces)
    tokens = tokenizer.encode(world.means, local.binding)
    write_npz(workdir / "tokens.npz", {"tokens": tokens})
    positions, binding = tokenizer.decode(tokens)
    error = round_trip_error(tokenizer, np.asarray(world.means), np.asarray(local.binding), positions, binding)
    print(
        f"[3/5] tokens: {len(tokens)} of a vocabulary of {tokenizer.vocab_size}; legal, and read back within "
        f"{1e3 * error:.3f} mm (half a cell is {1e3 * tokenizer.cell.max() / 2:.3f} mm)"
    )

    avatar = Avatar(world, bind_points(model, canonical, world.means, local.binding))
    save_avatar(workdir / "avatar", avatar, provenance={"made_by": "experiments.quickstart", "seed": SEED.value})
    avatar = load_avatar(workdir / "avatar")
    print("[4/5] avatar: bound, saved as a bundle and read back")

    motion = turn_and_talk(model, frames)
    show(workdir, model, avatar, motion, size)
    print(f"\ndone in {time.perf_counter() - start:.0f} s; everything lies in {workdir}/:")
    for name, what in OUTPUTS.items():
        print(f"  {name:<22} {what}")


OUTPUTS = {
    "head.png": "what the head can do: identities, expressions, jaw, eyes, neck",
    "splats.png": "a person as Gaussians: views and expressions",
    "talking.mp4": "the same person, turning and talking",
    "frame.ply": "one animated frame as a standard splat file: open it in any 3DGS viewer",
    "avatar/": "the avatar bundle: canonical splats, rig, card",
    "fit/": "the same person as a GaussianAvatars fit (point_cloud.ply, flame_param.npz)",
    "tokens.npz": "the person as a token sequence",
}


def random_person(model: FlameModel, rng: np.random.Generator) -> FlameParams:
    """A neutral identity a little nearer to the mean than the population, so that the first one seen is no oddity."""
    neutral = model.neutral_params()
    return neutral.replace(shape=jnp.asarray(0.7 * rng.normal(size=neutral.shape.shape), jnp.float32))


# How many of the Gaussians beyond one per face go to a region, per area, relative to plain skin.
DENSITY = {
    "iris": 20.0, "pupil": 20.0, "eyes": 8.0, "lids": 8.0, "lips": 6.0, "brows": 5.0, "teeth": 4.0, "nose": 3.0,
    "ears": 2.0, "face": 2.0, "mouth_inside": 0.1, "sockets": 0.0,
}  # fmt: skip
LIGHT = np.array([0.25, 0.55, 0.8]) / np.linalg.norm([0.25, 0.55, 0.8])


def gaussians_on_the_mesh(model: FlameModel, canonical: FlameParams, num: int, rng: np.random.Generator) -> Gaussians:
    """Flat Gaussians that cover the canonical mesh, coloured by region and lit from above, local to their faces.

    Every face gets one that is spread as the triangle is, larger ones and those of `DENSITY` several smaller ones.
    """
    vertices = np.asarray(flame_vertices(model, canonical), np.float64)
    triangles = vertices[np.asarray(model.faces)]
    if num < len(triangles):
        raise UserError(f"--points={num} is less than one for each of the head's {len(triangles)} faces; raise it.")
    centers = triangles.mean(axis=1)
    normals = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    twice_area = np.maximum(np.linalg.norm(normals, axis=1), 1e-12)
    density = np.array([DENSITY.get(name, 1.0) for name in model.region_names])[np.asarray(model.face_regions)]
    more = rng.multinomial(num - len(triangles), twice_area * density / (twice_area * density).sum())
    counts = 1 + more
    binding = np.repeat(np.arange(len(triangles)), counts)

    # Covariance of a triangle's area, Σ (vᵢ - c)(vᵢ - c)ᵀ / 12; its axes are in-plane, the third is the normal.
    corners = triangles - centers[:, None]
    values, axes = np.linalg.eigh(np.einsum("fca,fcb->fab", corners, corners) / 12)
    axes = axes * np.sign(np.linalg.det(axes))[:, None, None]
    # Twice a triangle's own spread closes the gaps at its corners. Several in one face lie at random and overlap more.
    sizes = 2.1 * np.sqrt(np.maximum(values, 1e-9)) / counts[:, None] ** 0.35
    sizes[:, 0] = 0.1 * sizes[:, 2]

    barycentrics = rng.dirichlet([2, 2, 2], num)
    barycentrics[counts[binding] == 1] = 1 / 3
    shade = 0.75 + 0.25 * normals @ LIGHT / twice_area
    world = Gaussians(
        means=jnp.asarray(np.einsum("pc,pca->pa", barycentrics, triangles[binding]), jnp.float32),
        quats=rotation_to_quat(jnp.asarray(axes, jnp.float32))[binding],
        scales=jnp.asarray(sizes[binding], jnp.float32),
        opacities=jnp.full((num,), 0.95, jnp.float32),
        colors=jnp.asarray((head_colors(model) * shade[:, None])[binding], jnp.float32),
    )
    return global_to_local(world, binding, face_frames(jnp.asarray(vertices, jnp.float32), model.faces))


def round_trip_error(tokenizer: PointTokenizer, points, binding, decoded, decoded_binding) -> float:
    """Largest distance along an axis, in metres, between points and what their tokens say; checks the bindings."""
    x, y, z = tokenizer.quantize(points).T
    order = np.lexsort((binding, x, z, y))
    if not np.array_equal(binding[order], decoded_binding):
        raise UserError("the tokens changed a binding: this is a defect, please report it.")
    return float(np.abs(points[order] - decoded).max())


def show(workdir: Path, model: FlameModel, avatar: Avatar, motion: FlameParams, size: int) -> None:
    """Splats the avatar: a sheet of views and expressions, and the motion as a video; bakes one frame."""
    num_frames = motion.expr.shape[0]
    neutral = model.neutral_params()
    poses = {f"{angle}°": (neutral, math.radians(angle)) for angle in (0, 45, 90, 180)}
    poses["jaw"] = (neutral.replace(jaw_pose=jnp.array([0.3, 0.0, 0.0])), 0.3)
    poses["neck"] = (neutral.replace(neck_pose=jnp.array([0.0, 0.6, 0.0])), 0.0)
    for name in ("eye-left-closure", "mouth-corner-puller"):
        if name in model.expr_names:
            poses[name] = (neutral.replace(expr=neutral.expr.at[model.expr_names.index(name)].set(1.0)), 0.3)
    sheet = [splat(animate(avatar, model, params), azimuth, size) for params, azimuth in poses.values()]
    write_image(workdir / "splats.png", contact_sheet(sheet, list(poses), 4))

    images = []
    for t in tqdm(range(num_frames), desc="[5/5] video", unit="frame"):
        frame = animate(avatar, model, jax.tree.map(lambda x, t=t: x[t], motion))
        images.append(splat(frame, 0.0, size))
    write_video(workdir / "talking.mp4", images)
    save_ply(workdir / "frame.ply", animate(avatar, model, jax.tree.map(lambda x: x[num_frames // 4], motion)))


def splat(gaussians: Gaussians, azimuth: float, size: int) -> np.ndarray:
    """One view [size, size, 3] of a head from `azimuth` (radians, 0 in front), on light grey."""
    camera = orbit(1, width=size, height=size, distance=1.2, target=(0.0, -0.03, -0.04), azimuth=(azimuth, azimuth))
    image, _, info = rasterize(
        gaussians.means,
        gaussians.quats,
        gaussians.scales,
        gaussians.opacities,
        gaussians.colors,
        camera.viewmats,
        camera.Ks,
        size,
        size,
        backgrounds=jnp.array([BACKGROUND]),
    )
    if int(info["overflow"]):
        raise RuntimeError(f"{int(info['overflow'])} tile intersections are missing from the picture")
    return np.asarray(image[0])


if __name__ == "__main__":
    run(main)
