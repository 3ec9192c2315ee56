"""Speed of the floor everything stands on: posing a head, animating a cloud, tokenising it.

    python -m experiments.bench_flame [--poses=64] [--points=100000] [--repeats=15]

Poses one FLAME-sized head (random values: 5143 vertices, 300 shape and 100 expression directions) and compares with a
straightforward torch version and with the PyPI package body-models' torch back end, A B C A B C … in one run, medians.
All three are checked to give the same vertices first. Ends in one JSON line.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.common import alternate, json_line, run
from experiments.random_flame import random_flame, write_flame
from pointillist_jax.files import UserError
from pointillist_jax.flame import FlameModel, FlameParams, animate, bind_points, flame_vertices, load_flame, open_head
from pointillist_jax.gaussians import Avatar, Gaussians
from pointillist_jax.tokens import PointTokenizer

POSES = flags.DEFINE_integer("poses", 64, "Batch of poses and expressions.", lower_bound=1)
POINTS = flags.DEFINE_integer("points", 100_000, "Points to animate and to tokenise.", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 15, "Timed rounds; medians are reported.", lower_bound=1)

VERTICES, FACES = 5143, 10144  # FLAME with teeth.


def main() -> None:
    rng = np.random.default_rng(0)
    content = random_flame(num_vertices=VERTICES, num_faces=FACES)
    with tempfile.TemporaryDirectory() as folder:
        path = write_flame(Path(folder) / "random_flame.pkl", content)
        model = load_flame(path, teeth=False)
        params = random_params(rng, model, POSES.value)
        cases = {"jax": jax_case(model, params)}
        cases["jax_one_identity"] = jax_case(model, params.replace(shape=params.shape[0]))
        for name, make in (("torch", torch_case), ("body_models", body_models_case)):
            try:
                cases[name] = make(path, model, params)
            except ImportError as error:
                print(f"{name}: left out, {error.name} is not installed (pip install -e '.[test]')")
    want = cases["jax"]()
    for name, case in cases.items():
        if name != "jax_one_identity" and (off := float(np.abs(np.asarray(case()) - want).max())) > 1e-5:
            raise UserError(f"{name} disagrees with jax by {off:.2g} m: the comparison would mean nothing.")

    seconds = alternate(cases, REPEATS.value)
    cloud_seconds = alternate(cloud_cases(rng, model, params), REPEATS.value)

    print(f"\n{POSES.value} poses × {VERTICES} vertices, 300 shape + 100 expression directions, float32")
    for name, value in seconds.items():
        print(f"  {name:<18} {1e3 * value:8.1f} ms   {value / seconds['jax']:5.2f} × jax")
    print(f"{POINTS.value} points")
    for name, value in cloud_seconds.items():
        print(f"  {name:<18} {1e3 * value:8.1f} ms")
    off_mesh = papers_formula_off_the_mesh(rng)
    print("the paper's interpolated skinning on the open head (neck 0.5 rad, jaw 0.3 rad), distance from the mesh")
    print(f"  mean {off_mesh['mean_mm']:.4f} mm, largest {off_mesh['largest_mm']:.3f} mm; surface skinning: ", end="")
    print(f"largest {off_mesh['surface_largest_mm']:.5f} mm")
    figures = {"poses": POSES.value, "points": POINTS.value, "repeats": REPEATS.value}
    figures |= {f"{name}_ms": round(1e3 * value, 2) for name, value in {**seconds, **cloud_seconds}.items()}
    figures |= {
        f"{n}_over_jax": round(seconds[n] / seconds["jax"], 2) for n in ("torch", "body_models") if n in seconds
    }
    json_line("flame", figures)


def random_params(rng: np.random.Generator, model: FlameModel, batch: int) -> FlameParams:
    def normal(n: int, size: float) -> jax.Array:
        return jnp.asarray(rng.normal(0, size, (batch, n)), jnp.float32)

    return FlameParams(
        shape=normal(300, 1.0),
        expr=normal(100, 1.0),
        rotation=normal(3, 0.3),
        neck_pose=normal(3, 0.2),
        jaw_pose=normal(3, 0.1),
        eyes_pose=normal(6, 0.2),
        translation=normal(3, 0.1),
    )


def jax_case(model: FlameModel, params: FlameParams) -> Callable[[], jax.Array]:
    posed = jax.jit(flame_vertices)
    return lambda: jax.block_until_ready(posed(model, params))


def torch_case(path: Path, model: FlameModel, params: FlameParams) -> Callable:
    """LBS as most torch code bases write it: einsum blendshapes, 4 × 4 transforms per vertex."""
    import torch

    def tensor(x) -> torch.Tensor:
        return torch.tensor(np.asarray(x))

    template, weights, regressor = tensor(model.v_template), tensor(model.skin_weights), tensor(model.joint_regressor)
    directions = torch.cat([tensor(model.shape_dirs), tensor(model.expr_dirs)], dim=-1)
    pose_dirs = tensor(model.pose_dirs).reshape(-1, 36).T.contiguous()
    betas = torch.cat([tensor(params.shape), tensor(params.expr)], dim=1)
    poses = (params.rotation, params.neck_pose, params.jaw_pose, params.eyes_pose[:, :3], params.eyes_pose[:, 3:])
    pose, translation = torch.stack([tensor(p) for p in poses], dim=1), tensor(params.translation)
    b, eye = len(betas), torch.eye(3)

    def rotations(r: torch.Tensor) -> torch.Tensor:
        angle = torch.linalg.norm(r + 1e-8, dim=-1, keepdim=True)
        x, y, z = (r / angle).unbind(-1)
        zero = torch.zeros_like(x)
        k = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).reshape(*r.shape[:-1], 3, 3)
        angle = angle[..., None]
        return eye + torch.sin(angle) * k + (1 - torch.cos(angle)) * k @ k

    def transform(rotation: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        last = torch.tensor([0.0, 0, 0, 1]).expand(b, 1, 4)
        return torch.cat([torch.cat([rotation, shift[..., None]], dim=-1), last], dim=-2)

    @torch.no_grad()
    def posed() -> torch.Tensor:
        shaped = template + torch.einsum("bl,vkl->bvk", betas, directions)
        joints = torch.einsum("jv,bvk->bjk", regressor, shaped)
        local = rotations(pose)
        feature = (local[:, 1:] - eye).reshape(b, 36)
        shaped = shaped + (feature @ pose_dirs).reshape(b, -1, 3)
        world = [transform(local[:, 0], joints[:, 0])]
        for j in range(1, 5):
            parent = model.parents[j]
            world.append(world[parent] @ transform(local[:, j], joints[:, j] - joints[:, parent]))
        world = torch.stack(world, dim=1)
        moved = torch.einsum("bjac,bjc->bja", world[..., :3, :3], joints)
        relative = world.clone()
        relative[..., :3, 3] -= moved
        per_vertex = torch.einsum("vj,bjac->bvac", weights, relative)
        homogeneous = torch.cat([shaped, torch.ones(b, len(template), 1)], dim=-1)
        return torch.einsum("bvac,bvc->bva", per_vertex, homogeneous)[..., :3] + translation[:, None]

    return posed


def body_models_case(path: Path, model: FlameModel, params: FlameParams) -> Callable:
    import torch
    from body_models.flame.torch import FLAME

    flame = FLAME(model_path=str(path))
    t = {name: torch.tensor(np.asarray(value)) for name, value in vars(params).items() if value is not None}
    pose = torch.stack([t["neck_pose"], t["jaw_pose"], t["eyes_pose"][:, :3], t["eyes_pose"][:, 3:]], dim=1)

    @torch.no_grad()
    def posed() -> torch.Tensor:
        return flame.forward_vertices(
            pose,
            head_rotation=t["rotation"],
            shape=t["shape"],
            expression=t["expr"],
            global_translation=t["translation"],
        )

    return posed


def cloud_cases(rng: np.random.Generator, model: FlameModel, params: FlameParams) -> dict[str, Callable]:
    """`animate`, `encode` and `decode` of one cloud of points around the head."""
    one = jax.tree.map(lambda x: x[0], params)
    canonical, p = one.canonical(), POINTS.value
    binding = rng.integers(0, model.num_faces, p)
    barycentrics = rng.dirichlet([1, 1, 1], p)
    corners = np.asarray(flame_vertices(model, canonical))[np.asarray(model.faces)[binding]]
    points = np.einsum("pc,pca->pa", barycentrics, corners) + rng.normal(0, 0.005, (p, 3))
    gaussians = Gaussians(
        means=jnp.asarray(points, jnp.float32),
        quats=jnp.tile(jnp.array([1.0, 0, 0, 0]), (p, 1)),
        scales=jnp.full((p, 3), 0.003),
        opacities=jnp.full((p,), 0.9),
        colors=jnp.full((p, 3), 0.5),
    )
    avatar = Avatar(gaussians, bind_points(model, canonical, points, binding))
    animated = jax.jit(animate)
    # The random head is larger than a real one: its own box keeps every point inside.
    tokenizer = PointTokenizer(num_faces=model.num_faces, lower=points.min() - 0.01, upper=points.max() + 0.01)
    tokens = tokenizer.encode(points, binding)
    return {
        "animate": lambda: jax.block_until_ready(animated(avatar, model, one)),
        "encode": lambda: tokenizer.encode(points, binding),
        "decode": lambda: tokenizer.decode(tokens),
    }


def papers_formula_off_the_mesh(rng: np.random.Generator) -> dict[str, float]:
    """How far points on the open head leave its mesh under the paper's equation (5), and under ours (DESIGN §4)."""
    model = open_head("full")
    canonical = model.neutral_params().canonical(0.0)
    binding = rng.integers(0, model.num_faces, 20_000)
    barycentrics = rng.dirichlet([1, 1, 1], len(binding))

    def on_mesh(params: FlameParams) -> np.ndarray:
        corners = np.asarray(flame_vertices(model, params), np.float64)[np.asarray(model.faces)[binding]]
        return np.einsum("pc,pca->pa", barycentrics, corners)

    points = on_mesh(canonical)
    count = len(points)
    gaussians = Gaussians(points, jnp.ones((count, 4)) / 2, jnp.ones((count, 3)), jnp.ones(count), jnp.ones((count, 3)))
    avatar = Avatar(gaussians, bind_points(model, canonical, points, binding))
    posed = canonical.replace(neck_pose=jnp.array([0.0, 0.5, 0.0]), jaw_pose=jnp.array([0.3, 0.0, 0.0]))
    want = on_mesh(posed)
    paper, ours = (
        1e3 * np.linalg.norm(animate(avatar, model, posed, skinning=skinning).means - want, axis=1)
        for skinning in ("interpolated", "surface")
    )
    return {
        "mean_mm": round(float(paper.mean()), 5),
        "largest_mm": round(float(paper.max()), 4),
        "surface_largest_mm": round(float(ours.max()), 6),
    }


if __name__ == "__main__":
    run(main)
