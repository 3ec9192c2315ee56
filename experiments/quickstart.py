"""The main job, end to end, with everything that exists so far. It grows with the project.

    python -m experiments.quickstart [--workdir=outputs/quickstart] [--smoke]

A head model → a random person's Gaussians, bound to its faces (GaussianAvatars' files) → one token sequence and back →
a rigged avatar bundle → a talking, turning head. Needs no GPU, no torch and no files of the user's.
"""

from __future__ import annotations

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
from experiments.pictures import head_colors, head_sheet, render_mesh
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
    local_to_global,
    open_head,
)
from pointillist_jax.flame.rotations import rotation_to_quat
from pointillist_jax.gaussians import Avatar, Gaussians, load_avatar, load_ply, save_avatar, save_ply
from pointillist_jax.tokens import PointTokenizer

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
    points, frames, size = (2000, 8, 96) if SMOKE.value else (POINTS.value, FRAMES.value, SIZE.value)
    rng = np.random.default_rng(SEED.value)

    model = load_flame(FLAME.value) if FLAME.value else open_head("coarse" if SMOKE.value else "full")
    print(f"[1/5] head: {model.source}, {model.num_vertices} vertices, {model.num_faces} faces")
    coarse = None if FLAME.value or SMOKE.value else open_head("coarse")
    write_image(workdir / "head.png", head_sheet(model, coarse, size=96 if SMOKE.value else 192))

    person = random_person(model, rng)
    canonical = person.canonical()
    local = gaussians_on_the_mesh(model, canonical, points, rng)
    save_ply(workdir / "fit" / "point_cloud.ply", local)
    write_npz(workdir / "fit" / "flame_param.npz", flame_param_arrays(canonical))
    print(f"[2/5] person: {points} Gaussians bound to the mesh, in GaussianAvatars' layout")

    local = load_ply(workdir / "fit" / "point_cloud.ply", num_faces=model.num_faces)
    world = local_to_global(local, face_frames(flame_vertices(model, canonical), model.faces))
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
    show(workdir, model, avatar, person, motion, size)
    print(f"\ndone in {time.perf_counter() - start:.0f} s; everything lies in {workdir}/:")
    for name, what in OUTPUTS.items():
        print(f"  {name:<22} {what}")


OUTPUTS = {
    "head.png": "what the head can do: identities, expressions, jaw, eyes, neck",
    "talking.mp4": "the person, turning and talking",
    "frame.ply": "one animated frame as a standard splat file: open it in any 3DGS viewer",
    "avatar/": "the avatar bundle: canonical splats, rig, card",
    "fit/": "the same person as a GaussianAvatars fit (point_cloud.ply, flame_param.npz)",
    "tokens.npz": "the person as a token sequence",
}


def random_person(model: FlameModel, rng: np.random.Generator) -> FlameParams:
    """A neutral identity a little nearer to the mean than the population, so that the first one seen is no oddity."""
    neutral = model.neutral_params()
    return neutral.replace(shape=jnp.asarray(0.7 * rng.normal(size=neutral.shape.shape), jnp.float32))


def gaussians_on_the_mesh(model: FlameModel, canonical: FlameParams, num: int, rng: np.random.Generator) -> Gaussians:
    """Flat, coloured Gaussians spread over the canonical mesh by area, local to their faces."""
    vertices = np.asarray(flame_vertices(model, canonical))
    triangles = vertices[np.asarray(model.faces)]
    normals = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    area = 0.5 * np.linalg.norm(normals, axis=1)
    binding = np.sort(rng.choice(len(area), num, p=area / area.sum()))
    barycentrics = rng.dirichlet([1, 1, 1], num)
    spacing = np.sqrt(area.sum() / num)
    frames = face_frames(jnp.asarray(vertices), model.faces)
    # A triangle's frame has its normal as the second axis: discs that lie on the skin.
    flat = np.tile([0.6 * spacing, 0.1 * spacing, 0.6 * spacing], (num, 1))
    world = Gaussians(
        means=jnp.asarray(np.einsum("pc,pca->pa", barycentrics, triangles[binding]), jnp.float32),
        quats=rotation_to_quat(frames.rotation)[binding],
        scales=jnp.asarray(flat, jnp.float32),
        opacities=jnp.full((num,), 0.95, jnp.float32),
        colors=jnp.asarray(head_colors(model)[binding], jnp.float32),
    )
    return global_to_local(world, binding, frames)


def flame_param_arrays(params: FlameParams) -> dict[str, np.ndarray]:
    """GaussianAvatars' flame_param.npz for one timestep (facts/avatars_gsplat.md A.6)."""
    arrays = {name: np.asarray(value, np.float32) for name, value in vars(params).items() if value is not None}
    return {name: value if name == "shape" else value[None] for name, value in arrays.items()}


def round_trip_error(tokenizer: PointTokenizer, points, binding, decoded, decoded_binding) -> float:
    """Largest distance along an axis, in metres, between points and what their tokens say; checks the bindings."""
    x, y, z = tokenizer.quantize(points).T
    order = np.lexsort((binding, x, z, y))
    if not np.array_equal(binding[order], decoded_binding):
        raise UserError("the tokens changed a binding: this is a defect, please report it.")
    return float(np.abs(points[order] - decoded).max())


def show(workdir: Path, model: FlameModel, avatar: Avatar, person: FlameParams, motion: FlameParams, size: int) -> None:
    """Renders the motion to talking.mp4 and bakes one frame."""
    posed = jax.jit(flame_vertices)
    colors, faces = head_colors(model), np.asarray(model.faces)
    num_frames = motion.expr.shape[0]
    images = []
    for t in tqdm(range(num_frames), desc="[5/5] video", unit="frame"):
        params = jax.tree.map(lambda x, t=t: x[t], motion).replace(shape=person.shape)
        images.append(render_mesh(np.asarray(posed(model, params)), faces, colors, width=size, height=size))
    write_video(workdir / "talking.mp4", images)
    middle = jax.tree.map(lambda x: x[num_frames // 4], motion)
    save_ply(workdir / "frame.ply", animate(avatar, model, middle))


if __name__ == "__main__":
    run(main)
