"""One optimiser step of a fit: pose, splat, compare, differentiate, update. Pure and jitted (facts A.4).

Letters: N rows of the bucket, B views of a step, T timesteps, V vertices, H × W pixels.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pointillist_jax.configs import FitConfig
from pointillist_jax.fitting.state import FLAME, FitState
from pointillist_jax.flame import FlameModel, FlameParams, face_frames, flame_vertices, local_to_global
from pointillist_jax.gaussians import SH_C0, Gaussians
from pointillist_jax.losses import l1, ssim
from renderer_bridge import rasterize

_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-15


@flax.struct.dataclass
class Scene:
    """What a step reads and never changes.

    Attributes:
      model: the head.
      tracked: FLAME parameters [T, ...].
      vertices: [T, V, 3] of the posed meshes, or None when FLAME is fine-tuned and they are computed in every step.
    """

    model: FlameModel
    tracked: FlameParams
    vertices: Float[Array, "T V 3"] | None


@flax.struct.dataclass
class Batch:
    """B views of one size."""

    images: Float[Array, "B H W 3"]
    viewmats: Float[Array, "B 4 4"]
    Ks: Float[Array, "B 3 3"]
    timesteps: Int[Array, "B"]


class StepOptions(NamedTuple):
    """What is static in a step: a change recompiles it."""

    capacity: int  # of the rasteriser
    sh_degree: int
    background: float
    lambda_ssim: float
    lambda_position: float
    threshold_position: float
    lambda_scaling: float
    threshold_scaling: float

    @classmethod
    def of(cls, config: FitConfig, capacity: int, sh_degree: int) -> StepOptions:
        return cls(capacity, sh_degree, *(getattr(config, name) for name in cls._fields[2:]))


class Metrics(NamedTuple):
    """Means over the views of a step; `overflow` is the largest: intersections the rasteriser had no room for."""

    loss: Array
    l1: Array
    mse: Array
    overflow: Array


def make_scene(model: FlameModel, tracked: FlameParams, finetune_flame: bool) -> Scene:
    if finetune_flame:
        return Scene(model, tracked, None)
    return Scene(model, tracked, flame_vertices(model, tracked))


@functools.partial(jax.jit, static_argnames="options")
def train_step(
    state: FitState, batch: Batch, scene: Scene, rates: dict[str, Array], options: StepOptions
) -> tuple[FitState, Metrics]:
    """One Adam step on the mean loss of B views; gathers the statistics of density control.

    Args:
      state: not changed when `overflow` of the returned metrics is not 0: repeat with a larger `options.capacity`.
      batch: the views.
      scene: constants.
      rates: learning rate of every entry of `state.params`.
      options: static.
    """
    B = batch.images.shape[0]

    def one_view(carry, view):
        gradients, state, metrics = carry
        probe = jnp.zeros((state.bucket, 2))
        (_, (values, radii)), (of_view, of_means2d) = jax.value_and_grad(view_loss, (0, 1), has_aux=True)(
            state.params, probe, state, view, scene, options
        )
        H, W = view.images.shape[:2]
        state = _gather(state, of_means2d, radii, W, H)
        metrics = Metrics(*(m + v / B for m, v in zip(metrics[:3], values[:3], strict=True)), metrics.overflow)
        metrics = metrics._replace(overflow=jnp.maximum(metrics.overflow, values.overflow))
        return (jax.tree.map(lambda a, b: a + b / B, gradients, of_view), state, metrics), None

    zero = jax.tree.map(jnp.zeros_like, state.params)
    start = (zero, state, Metrics(jnp.float32(0), jnp.float32(0), jnp.float32(0), jnp.int32(0)))
    # A scan rather than a batch: every view has its own pose, hence its own Gaussians in the world.
    (gradients, gathered, metrics), _ = jax.lax.scan(one_view, start, batch)
    updated = _adam(gathered, gradients, rates)
    kept = metrics.overflow == 0
    return jax.tree.map(lambda new, old: jnp.where(kept, new, old), updated, state), metrics


def view_loss(
    params: dict[str, Array], probe: Float[Array, "N 2"], state: FitState, view: Batch, scene: Scene, options
) -> tuple[Array, tuple[Metrics, Int[Array, "N"]]]:
    """The loss of one view (a Batch without its leading axis), and with it (metrics, screen radii [N])."""
    image, info = render(
        params,
        state.binding,
        state.num,
        scene,
        view.timesteps,
        view.viewmats,
        view.Ks,
        view.images.shape[1],
        view.images.shape[0],
        capacity=options.capacity,
        sh_degree=options.sh_degree,
        background=options.background,
        probe=probe,
    )
    radii = jnp.where(jnp.all(info["radii"][0] > 0, -1), jnp.max(info["radii"][0], -1), 0)
    visible = (radii > 0).astype(jnp.float32)
    seen = jnp.maximum(jnp.sum(visible), 1.0)
    absolute = l1(image, view.images)
    loss = (1 - options.lambda_ssim) * absolute + options.lambda_ssim * (1 - ssim(image, view.images))
    with jax.named_scope("regularise"):
        away = jax.nn.relu(_norm(params["means"]) - options.threshold_position)
        large = _norm(jax.nn.relu(jnp.exp(params["scales"]) - options.threshold_scaling))
        loss += options.lambda_position * jnp.sum(away * visible) / seen
        loss += options.lambda_scaling * jnp.sum(large * visible) / seen
    mse = jnp.mean((jnp.clip(image, 0, 1) - view.images) ** 2)
    return loss, (Metrics(loss, absolute, mse, info["overflow"]), radii)


def render(
    params: dict[str, Array],
    binding: Int[Array, "N"],
    num: Int[Array, ""],
    scene: Scene,
    timestep: Int[Array, ""],
    viewmat: Float[Array, "4 4"],
    K: Float[Array, "3 3"],
    width: int,
    height: int,
    *,
    capacity: int,
    sh_degree: int,
    background: float,
    probe: Float[Array, "N 2"] | None = None,
    colors: Float[Array, "N X"] | None = None,
):
    """One view of raw parameters: image [H, W, 3] (or of `colors` [H, W, X]) and the rasteriser's info."""
    world = pose(params, binding, scene, timestep)
    opacities = jnp.where(jnp.arange(binding.shape[0]) < num, jax.nn.sigmoid(params["opacities"]), 0.0)
    if colors is not None:
        channels, degree, backgrounds = colors, None, None
    else:
        backgrounds = jnp.full(3, background)
        if sh_degree == 0:
            channels, degree = jnp.maximum(0.5 + SH_C0 * params["f_dc"], 0.0), None
        else:
            channels, degree = jnp.concatenate([params["f_dc"][:, None], params["f_rest"]], axis=1), sh_degree
    image, _, info = rasterize(
        world.means,
        world.quats,
        world.scales,
        opacities,
        channels,
        viewmat[None],
        K[None],
        width,
        height,
        sh_degree=degree,
        backgrounds=backgrounds,
        capacity=capacity,
        means2d_probe=None if probe is None else probe[None],
    )
    return image[0], info


def pose(params: dict[str, Array], binding: Int[Array, "N"], scene: Scene, timestep: Int[Array, ""]) -> Gaussians:
    """The Gaussians in the world at one timestep; opacities are left at 1, colours out."""
    with jax.named_scope("pose"):
        if scene.vertices is None:
            at = {
                key: params[key][timestep] if key in params else getattr(scene.tracked, key)[timestep] for key in FLAME
            }
            vertices = flame_vertices(scene.model, scene.tracked.replace(**at))
        else:
            vertices = scene.vertices[timestep]
        local = Gaussians(
            means=params["means"],
            quats=params["quats"],
            scales=jnp.exp(params["scales"]),
            opacities=jnp.ones(binding.shape[0]),
            binding=binding,
        )
        return local_to_global(local, face_frames(vertices, scene.model.faces))


@functools.partial(jax.jit, static_argnames=("width", "height", "capacity"))
def blending_weights(state: FitState, scene: Scene, timestep, viewmat, K, *, width: int, height: int, capacity: int):
    """[N] sum over the pixels of one view of each Gaussian's blending weight T α, and the overflow.

    The weight is the derivative of the picture's sum with respect to a grey colour.
    """

    def total(grey):
        image, info = render(
            state.params, state.binding, state.num, scene, timestep, viewmat, K, width, height,
            capacity=capacity, sh_degree=0, background=0.0, colors=grey,
        )  # fmt: skip
        return jnp.sum(image), info["overflow"]

    weights, overflow = jax.grad(total, has_aux=True)(jnp.zeros((state.bucket, 1)))
    return weights[:, 0], overflow


def _gather(state: FitState, of_means2d: Array, radii: Array, width: int, height: int) -> FitState:
    """Adds one view to the statistics. Pixels = (ndc + 1) · size / 2, so that d/d ndc = d/d pixel · size / 2."""
    norm = _norm(of_means2d * jnp.array([width / 2, height / 2]))
    visible = radii > 0
    return state.replace(
        grad_sum=state.grad_sum + jnp.where(visible, norm, 0.0),
        grad_count=state.grad_count + visible,
        max_radii=jnp.maximum(state.max_radii, radii.astype(jnp.float32)),
    )


def _adam(state: FitState, gradients: dict[str, Array], rates: dict[str, Array]) -> FitState:
    """Torch's Adam with one step count for all, as in GaussianAvatars: rows added later start with zero moments."""
    with jax.named_scope("adam"):
        step = state.step + 1
        unbias1, unbias2 = 1 - _BETA1 ** step.astype(jnp.float32), 1 - _BETA2 ** step.astype(jnp.float32)
        mu = jax.tree.map(lambda m, g: _BETA1 * m + (1 - _BETA1) * g, state.mu, gradients)
        nu = jax.tree.map(lambda n, g: _BETA2 * n + (1 - _BETA2) * g * g, state.nu, gradients)
        params = {
            key: p - rates[key] * (mu[key] / unbias1) / (jnp.sqrt(nu[key] / unbias2) + _EPS)
            for key, p in state.params.items()
        }
        return state.replace(params=params, mu=mu, nu=nu, step=step)


def _norm(x: Array) -> Array:
    """Euclidean length of the last axis, with gradient 0 at 0."""
    square = jnp.sum(x * x, axis=-1)
    zero = square == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, square)))
