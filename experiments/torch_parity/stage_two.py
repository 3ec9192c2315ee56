"""Stage two: head, rig, losses and rasteriser one by one on the same inputs, then whole optimiser steps.

The scene is made here: two people on the coarse open head, random clouds around them, expressions and poses, pictures
of noise to compare with.

Letters: B subjects, K views, P points, H × W pixels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from experiments.torch_parity.rows import Row, compare
from experiments.torch_parity.taps import load_arrays, tensors
from experiments.torch_parity.training import Steps, jax_steps, moments, step_rows
from experiments.torch_reference import flame as torch_flame
from experiments.torch_reference import losses as torch_losses
from experiments.torch_reference import rasterizer as torch_rasterizer
from experiments.torch_reference.gaussian_decoder import GaussianDecoder
from experiments.torch_reference.training import Optimizer, StageTwo, stage_two_step
from pointillist_jax.cameras import orbit
from pointillist_jax.configs import PATCH_COLORS, DecoderConfig
from pointillist_jax.convert import lpips_from_torch
from pointillist_jax.convert.reference import decoder_to_torch
from pointillist_jax.flame import FlameModel, FlameParams, animate, bind_points, flame_vertices, open_head
from pointillist_jax.gaussians import Avatar, Gaussians
from pointillist_jax.losses import l1, lpips, ssim
from pointillist_jax.losses.lpips import SLICES, linear_weights
from pointillist_jax.training import decoder
from renderer_bridge import rasterize

FLAME_FIELDS = ("shape", "expr", "rotation", "neck_pose", "jaw_pose", "eyes_pose", "translation")
RIG_FIELDS = ("barycentrics", "skin_weights", "rest_linear", "rest_offset", "canonical_scale")
PIXELS, VIEWS, CAPACITY = 32, 2, 1 << 14


@dataclasses.dataclass(frozen=True)
class Scene:
    """Attributes:
    head: in the dtype of the comparison.
    batch: of `training.decoder`, two subjects with K views each.
    """

    head: FlameModel
    batch: dict[str, Any]


def astype(head: FlameModel, dtype: Any) -> FlameModel:
    """The head's floating-point arrays in another dtype."""
    return jax.tree.map(lambda x: jnp.asarray(x, dtype if x.dtype.kind == "f" else x.dtype), head)


def make_scene(rng: np.random.Generator, config: DecoderConfig, points: int, dtype: Any) -> Scene:
    """Two people. `points`: P; a third of the second one's are padding."""
    head = astype(open_head("coarse"), dtype)
    neutral = {name: np.asarray(getattr(head.neutral_params(), name), dtype) for name in FLAME_FIELDS}
    deviations = {"shape": 0.5, "expr": 0.5, "rotation": 0.2, "neck_pose": 0.2, "jaw_pose": 0.1, "eyes_pose": 0.2}
    sample = lambda name, *batch: (  # noqa: E731
        neutral[name] + rng.normal(0, deviations.get(name, 0.005), (*batch, *neutral[name].shape))
    ).astype(dtype)
    canonical = {name: np.broadcast_to(neutral[name], (2, *neutral[name].shape)).copy() for name in FLAME_FIELDS}
    canonical["shape"] = sample("shape", 2)
    canonical["jaw_pose"] = canonical["jaw_pose"] + np.array([0.3, 0, 0], dtype)
    binding = rng.integers(0, head.num_faces, (2, points)).astype(np.int32)
    mesh = np.asarray(flame_vertices(head, FlameParams(**canonical)))
    corners = mesh[np.arange(2)[:, None, None], np.asarray(head.faces)[binding]]
    cloud = corners.mean(2) + rng.normal(0, 0.01, (2, points, 3))
    camera = orbit(VIEWS, width=PIXELS, height=PIXELS, azimuth=(-1.0, 1.0), closed=False)
    batch = {
        "points": cloud.astype(dtype),
        "binding": binding,
        "hidden": rng.normal(size=(2, points, 4, config.feature_width)).astype(dtype),
        "num_points": np.array([points, points - points // 3], np.int32),
        "canonical": canonical,
        "flame": {name: sample(name, 2, VIEWS) for name in FLAME_FIELDS if name != "shape"},
        "viewmats": np.broadcast_to(np.asarray(camera.viewmats, dtype), (2, VIEWS, 4, 4)).copy(),
        "Ks": np.broadcast_to(np.asarray(camera.Ks, dtype), (2, VIEWS, 3, 3)).copy(),
        "image": rng.integers(0, 256, (2, VIEWS, PIXELS, PIXELS, 3)).astype(np.uint8),
        "weight": np.ones((2, VIEWS), np.float32),
    }
    if config.cross_attention:
        tokens = rng.normal(size=(2, config.context_tokens or 7, config.context_width))
        if config.context_colors:
            tokens[..., -PATCH_COLORS:] = rng.uniform(-1, 1, (*tokens.shape[:2], PATCH_COLORS))
        batch["context"] = tokens.astype(dtype)
    # Every view needs an identity; the renderer takes the canonical one.
    batch["flame"]["shape"] = np.broadcast_to(canonical["shape"][:, None], (2, VIEWS, neutral["shape"].size)).copy()
    return Scene(head, batch)


def random_vgg(rng: np.random.Generator, dtype: Any) -> dict[str, np.ndarray]:
    """A VGG16 of random weights under torchvision's names: what LPIPS computes does not depend on what they are."""
    state = {}
    for index, size_in, size_out in (c for part in SLICES for c in part):
        state[f"features.{index}.weight"] = rng.normal(0, (2 / (9 * size_in)) ** 0.5, (size_out, size_in, 3, 3))
        state[f"features.{index}.bias"] = rng.normal(0, 0.1, size_out)
    return {name: x.astype(dtype) for name, x in state.items()}


def block_rows(scene: Scene, rng: np.random.Generator, bounds: Mapping[str, float]) -> list[Row]:
    """Head → rig → animation → pictures → losses of the first subject, each on JAX's inputs."""
    dtype, bound = scene.batch["points"].dtype, bounds["blocks"]
    rows: list[Row] = []

    def row(name: str, expected, found, section: str = "blocks") -> None:
        rows.append(compare(section, name, expected, found, bounds[section] if section != "blocks" else bound))

    first = jax.tree.map(lambda x: jnp.asarray(x[0]), {k: v for k, v in scene.batch.items() if k != "image"})
    head, canonical = scene.head, FlameParams(**first["canonical"])
    posed = {**{k: v[0] for k, v in first["flame"].items()}, "shape": first["canonical"]["shape"]}
    twin = torch_flame.make_head(vars(head))
    with torch.no_grad():
        row(
            "flame.canonical_vertices",
            flame_vertices(head, canonical),
            torch_flame.vertices(twin, tensors(first["canonical"])),
        )
        row(
            "flame.posed_vertices",
            flame_vertices(head, FlameParams(**posed)),
            torch_flame.vertices(twin, tensors(posed)),
        )
        rig = jax.jit(bind_points)(head, canonical, first["points"], first["binding"])
        other = torch_flame.bind(twin, tensors(first["canonical"]), tensors(first["points"]), tensors(first["binding"]))
        for name in RIG_FIELDS:
            row(f"rig.{name}", getattr(rig, name), getattr(other, name))
        given = random_gaussians(rng, len(first["points"]), dtype)
        gaussians = Gaussians(**{**given, "means": first["points"]})
        moved = jax.jit(animate)(Avatar(gaussians, rig), head, FlameParams(**posed))
        same_rig = other._replace(**{n: tensors(getattr(rig, n)) for n in RIG_FIELDS})
        found = torch_flame.animate(twin, same_rig, tensors(gaussians.quats), tensors(gaussians.scales), tensors(posed))
        for name, value in zip(("means", "quats", "scales"), found, strict=True):
            # q and -q are one rotation: their outer products with themselves are equal.
            square = (lambda q: q[:, :, None] * q[:, None]) if name == "quats" else (lambda x: x)
            row(f"animate.{name}", square(getattr(moved, name)), square(value))
    inputs = {name: getattr(moved, name) for name in ("means", "quats", "scales", "opacities", "colors")}
    inputs |= {"viewmats": first["viewmats"], "Ks": first["Ks"]}
    (_, (image, alpha, overflow)), gradients = jax_render(np.random.default_rng(0), dtype)(inputs)
    if int(jnp.max(overflow)):
        raise ValueError("the scene needs more tile intersections")
    leaves = tensors(inputs)
    pictures = torch_render(np.random.default_rng(0), dtype)(leaves)
    row("rasterizer.image", image, pictures[0])
    row("rasterizer.alpha", alpha, pictures[1])
    for name, leaf in leaves.items():
        row(f"rasterizer.{name}", gradients[name], leaf.grad, "gradients")
    weights = random_vgg(rng, dtype)
    ours = {"l1": l1, "ssim": ssim, "lpips": functools.partial(lpips, params=lpips_from_torch(weights, dtype=dtype))}
    theirs = {"l1": torch_losses.l1, "ssim": torch_losses.ssim, "lpips": _torch_lpips(weights)}
    # Not the render itself: on its flat background rounding decides which of four equal activations is pooled.
    picture, target = (jnp.asarray(rng.uniform(size=image.shape).astype(dtype)) for _ in range(2))
    for name, loss in ours.items():
        value, gradient = jax.jit(jax.value_and_grad(lambda x, loss=loss: jnp.sum(loss(x, target))))(picture)
        leaf = tensors(picture).requires_grad_()
        found = theirs[name](leaf, tensors(target)).sum()
        found.backward()
        row(f"losses.{name}", value, found)
        row(f"losses.{name} by the image", gradient, leaf.grad, "gradients")
    return rows


def random_gaussians(rng: np.random.Generator, count: int, dtype: Any) -> dict[str, jax.Array]:
    """Gaussians of millimetres around the head's place."""
    quats = rng.normal(size=(count, 4))
    arrays = {
        "means": rng.normal(0, 0.06, (count, 3)),
        "quats": quats / np.linalg.norm(quats, axis=1, keepdims=True),
        "scales": rng.uniform(0.005, 0.02, (count, 3)),
        "opacities": rng.uniform(0.2, 0.9, count),
        "colors": rng.uniform(size=(count, 3)),
    }
    return {name: jnp.asarray(x.astype(dtype)) for name, x in arrays.items()}


def jax_render(rng: np.random.Generator, dtype: Any):
    """inputs → ((a random sum of the pictures, (pictures, alphas, overflow)), its gradient by every input)."""
    bars = rng.normal(size=(VIEWS, PIXELS, PIXELS, 3)).astype(dtype)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def render(inputs):
        image, alpha, info = rasterize(**inputs, width=PIXELS, height=PIXELS, backgrounds=jnp.ones(3, dtype),
                                       backend="jax", capacity=CAPACITY)  # fmt: skip
        return jnp.sum(image * bars), (image, alpha, info["overflow"])

    return render


def torch_render(rng: np.random.Generator, dtype: Any):
    """inputs → (pictures, alphas), with the same sum's gradient in every input."""
    bars = torch.tensor(rng.normal(size=(VIEWS, PIXELS, PIXELS, 3)).astype(dtype))

    def render(inputs):
        for leaf in inputs.values():
            leaf.requires_grad_().grad = None
        pictures = torch_rasterizer.rasterize(
            **inputs, width=PIXELS, height=PIXELS, backgrounds=torch.ones(3, dtype=bars.dtype)
        )
        (pictures[0] * bars).sum().backward()
        return pictures

    return render


def step_comparison(
    params: Any,
    config: DecoderConfig,
    scenes: Sequence[Scene],
    rng: np.random.Generator,
    bounds: Mapping[str, float],
) -> tuple[list[Row], list[float]]:
    """One optimiser step per scene (all of one head): losses, parameters and moments."""
    head, dtype = scenes[0].head, scenes[0].batch["points"].dtype
    weights = random_vgg(rng, dtype)
    frozen = {"head": head, "lpips": lpips_from_torch(weights, dtype=dtype)}
    loss_fn = decoder.make_loss(config, frozen, PIXELS, PIXELS, capacity=CAPACITY, backend="jax")
    to_torch = functools.partial(decoder_to_torch, config=config)
    ours = jax_steps(params, loss_fn, config.train, [scene.batch for scene in scenes], to_torch)
    twin = load_arrays(GaussianDecoder(config), to_torch(params))
    model = StageTwo(twin, torch_flame.make_head(vars(head)), _torch_lpips(weights))
    optimizer = Optimizer(twin, config.train)
    losses = [float(stage_two_step(model, optimizer, tensors(scene.batch)).loss) for scene in scenes]
    theirs = Steps(losses, dict(twin.named_parameters()), *moments(twin, optimizer))
    return step_rows("stage two", ours, theirs, bounds)


def _torch_lpips(weights: Mapping[str, np.ndarray]) -> torch_losses.Lpips:
    linear = [np.asarray(w, weights["features.0.bias"].dtype) for w in linear_weights()]
    return torch_losses.Lpips(weights, linear)
