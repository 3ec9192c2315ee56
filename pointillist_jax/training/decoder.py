"""Stage two: the Gaussian decoder trained on photographs through the renderer (paper §4.4.2; DESIGN §7, §8, §10).

The AR model is frozen: its hidden states come from disk. A batch holds B subjects with K views each
(`data.subject_views`); every subject is decoded once, posed to each view's timestep, splatted and compared.

Letters: B subjects, K views, P points, H × W pixels.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from pointillist_jax.configs import DecoderConfig, TrainConfig
from pointillist_jax.flame import FlameModel, FlameParams, animate, bind_points
from pointillist_jax.gaussians import Avatar, Gaussians
from pointillist_jax.losses import l1, lpips, psnr, ssim
from pointillist_jax.models.gaussian_decoder import Decoded, decode, param_specs, rigged
from pointillist_jax.models.layers import init_params as init_from_specs
from pointillist_jax.sharding import is_shared, shard_batch
from pointillist_jax.training.state import Batch, Key, LossFn, Params, TrainState, jit_step, train_step
from renderer_bridge import rasterize

_log = logging.getLogger(__name__)


def init_params(config: DecoderConfig) -> Callable[[Key], Params]:
    """key → parameters with their logical axes, for `training.state.init_state`."""
    return functools.partial(init_from_specs, param_specs(config), boxed=True)


def frozen_on(mesh: Mesh, head: FlameModel, lpips_params: Any = None) -> dict[str, Any]:
    """What steps read and never change, on every device of the mesh."""
    frozen = {"head": head} | ({} if lpips_params is None else {"lpips": lpips_params})
    return jax.device_put(jax.tree.map(np.asarray, frozen), NamedSharding(mesh, PartitionSpec()))


def decode_batch(params: Params, config: DecoderConfig, batch: Mapping[str, Any]) -> Decoded:
    """Attributes of the B subjects of a batch."""
    return decode(params, config, *(batch.get(name) for name in ("points", "hidden", "num_points", "context")))


def render_views(
    head: FlameModel,
    decoded: Decoded,
    batch: Mapping[str, Any],
    width: int,
    height: int,
    *,
    capacity: int | None = None,
    backend: str = "auto",
) -> tuple[Float[Array, "B K H W 3"], dict[str, Int[Array, "B K"]]]:
    """Every subject posed and splatted for each of its views, on white; each device renders its own subjects.

    Args:
      head: that the points are bound to.
      decoded: of B subjects.
      batch: of `SubjectViews`: points, binding, canonical, viewmats, Ks, flame.
      capacity: tile intersections of one view (JAX back end); None is the renderer's generous guess.

    Returns:
      The images and, of each view, `overflow` (intersections the renderer had no room for; 0 = exact) and
      `intersections`.
    """
    names = ("points", "binding", "canonical", "viewmats", "Ks", "flame")
    inputs = decoded, {name: batch[name] for name in names}
    how = {"width": width, "height": height, "capacity": capacity, "backend": backend}
    local = functools.partial(_render_rows, **how)
    if not is_shared():
        return local(head, *inputs)
    spec = PartitionSpec(("data", "fsdp"))
    return jax.shard_map(local, in_specs=(PartitionSpec(), spec, spec), out_specs=spec)(head, *inputs)


def make_loss(
    config: DecoderConfig,
    frozen: Mapping[str, Any],
    width: int,
    height: int,
    *,
    capacity: int | None = None,
    backend: str = "auto",
) -> LossFn:
    """The photometric loss over a batch, as sums over its views; NaN where the renderer's capacity did not suffice.

    The extra sums: l1, ssim, psnr, lpips (where `frozen` has its weights), offset (root mean square, millimetres),
    overflow and intersections (largest of a view).
    """

    def loss_fn(frozen: Mapping[str, Any], params: Params, batch: Batch, key: Key):
        del key  # Nothing here is random.
        total, count, extra, _ = _compare(
            params, config, frozen, batch, width, height, capacity=capacity, backend=backend
        )
        return total, count, extra

    return Partial(loss_fn, frozen)


def _compare(params, config: DecoderConfig, frozen, batch: Batch, width: int, height: int, **how):
    """What `make_loss` gives, and the images."""
    decoded = decode_batch(params, config, batch)
    images, info = render_views(frozen["head"], decoded, batch, width, height, **how)
    total, count, extra = compose_loss(config, frozen, decoded, images, batch)
    overflow, intersections = (jnp.max(info[name]).astype(jnp.float32) for name in ("overflow", "intersections"))
    one = jnp.ones((), jnp.float32)
    extra |= {"overflow": (overflow, one), "intersections": (intersections, one)}
    # A step on a wrong picture must not count: `train_step` leaves the state alone where the loss is not finite.
    return jnp.where(overflow > 0, jnp.nan, total), count, extra, images


def compose_loss(
    config: DecoderConfig,
    frozen: Mapping[str, Any],
    decoded: Decoded,
    images: Float[Array, "B K H W 3"],
    batch: Mapping[str, Any],
) -> tuple[Array, Array, dict[str, tuple[Array, Array]]]:
    """λ₁ L1 + λ₂ (1 − SSIM) + λ₃ LPIPS + λ₄ mean squared offset (paper §4.4.2), summed over views; their number; the
    other sums of `make_loss`."""
    dtype = images.dtype
    weight = batch["weight"].astype(dtype)
    with jax.named_scope("loss"):
        target = batch["image"].astype(dtype) / 255
        views = {"l1": l1(images, target), "ssim": ssim(images, target)}
        if "lpips" in frozen and config.lambda_lpips:
            views["lpips"] = lpips(images, target, frozen["lpips"])
        square = jnp.sum(decoded.offsets.astype(dtype) ** 2, axis=(1, 2)) / batch["num_points"]
        each = config.lambda_l1 * views["l1"] + config.lambda_ssim * (1 - views["ssim"])
        each += config.lambda_reg * square[:, None]
        if "lpips" in views:
            each += config.lambda_lpips * views["lpips"]
        # An equal image would be infinitely good.
        views["psnr"] = jnp.minimum(psnr(jax.lax.stop_gradient(images), target), 100)
    total, count = jnp.sum(each * weight), jnp.sum(weight)
    extra = {name: (jnp.sum(value * weight), count) for name, value in views.items()}
    extra["offset_mm"] = 1e3 * jnp.sum(jnp.sqrt(square) * weight.max(1)), jnp.sum(weight.max(1))
    return total, count, extra


class GrowingStep:
    """The train step with a capacity that grows: a step whose pictures did not fit is done again with more room.

    Call it as `training.loop.train` does. `capacity` is what is in use; it belongs into the checkpoint (`meta`),
    because another one may round differently. `taken` counts the steps.
    """

    def __init__(
        self,
        config: DecoderConfig,
        frozen: Mapping[str, Any],
        optimizer: optax.GradientTransformation,
        width: int,
        height: int,
        *,
        state: TrainState,
        capacity: int,
        backend: str = "auto",
        on_grow: Callable[[int], None] = lambda capacity: None,
    ):
        """`state`: one that lies as those that will be stepped; the other arguments as `make_loss`."""
        self.capacity, self._frozen, self._on_grow = capacity, frozen, on_grow
        self._exact, self.taken = renders_exactly(backend), 0
        settings: TrainConfig = config.train

        def step(state, batch, frozen, capacity):
            loss_fn = make_loss(config, frozen, width, height, capacity=capacity, backend=backend)
            return train_step(state, batch, loss_fn=loss_fn, optimizer=optimizer, config=settings)

        self._step = jit_step(step, state, static_argnums=3)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        while True:
            state, metrics = self._step(state, batch, self._frozen, self.capacity)
            metrics = dict(metrics)
            overflow, needed = metrics.pop("overflow"), metrics.pop("intersections")
            # gsplat has no bound, and asking would make the device wait for the host.
            if self._exact or float(jax.device_get(overflow)) == 0:
                self.taken += 1
                return state, metrics
            self.capacity = grown(self.capacity, float(jax.device_get(needed)))
            _log.warning(
                "the renderer's capacity grows to %d tile intersections per view; step repeated", self.capacity
            )
            self._on_grow(self.capacity)
            state = _step_back(state)


def renders_exactly(backend: str) -> bool:
    """Whether this back end needs no capacity."""
    from renderer_bridge import gsplat_dlpack

    return backend == "gsplat" or (backend == "auto" and gsplat_dlpack.unavailable() is None)


def first_capacity(points: int, width: int, height: int) -> int:
    """Tile intersections of one view to begin with: four a point, as clouds of this kind have."""
    return grown(0, 4 * points + 16 * math.ceil(width / 16) * math.ceil(height / 16))


def grown(capacity: int, needed: float) -> int:
    """The next capacity: a quarter above the need, at two leading bits, so that few programs are compiled."""
    need = max(int(1.25 * needed), capacity + 1, 1024)
    step = 1 << max(need.bit_length() - 2, 0)
    return -(-need // step) * step


class ShownView(NamedTuple):
    """One view of an evaluation, to look at.

    Attributes:
      rendered, photograph: [H, W, 3] float in [0, 1].
      subject: number in the stream's source. timestep, camera: of the capture.
    """

    rendered: np.ndarray
    photograph: np.ndarray
    subject: int
    timestep: int
    camera: int


class Evaluation:
    """Scores parameters on finite streams of batches; compiled once for all of them."""

    def __init__(
        self,
        config: DecoderConfig,
        frozen: Mapping[str, Any],
        mesh: Mesh,
        width: int,
        height: int,
        *,
        capacity: int,
        backend: str = "auto",
    ):
        """`capacity`: to begin with; grown when a view needs more."""
        self.capacity, self._frozen, self._mesh = capacity, frozen, mesh

        def score(params, batch, frozen, capacity):
            _, _, extra, images = _compare(
                params, config, frozen, batch, width, height, capacity=capacity, backend=backend
            )
            return extra, images

        self._score = jax.jit(score, static_argnums=3)

    def __call__(
        self,
        params: Params,
        streams: Mapping[str, Callable[[], Iterable[Mapping[str, Any]]]],
        strips: Callable[[str, list[ShownView]], None] | None = None,
        num_strips: int = 6,
        bar: bool = False,
        stopped: Callable[[], bool] = lambda: False,
    ) -> dict[str, float] | None:
        """Means over the views of each stream.

        Args:
          streams: name → makes a stream (`subject_batches` of a source that does not shuffle).
          strips: gets a stream's name and its first pictures, one of each record of this process's.
          num_strips: at most so many.
          bar: show progress.
          stopped: asked before every batch.

        Returns:
          {"<stream>_psnr": dB, "<stream>_ssim": …, "<stream>_l1", "<stream>_lpips"}; None once `stopped()`.
        """
        found = {}
        for name, stream in streams.items():
            totals: dict[str, np.ndarray] = {}
            pictures: list[ShownView] = []
            for batch in tqdm(stream(), desc=f"score {name}", unit="batch", disable=not bar):
                if stopped():
                    return None
                batch = dict(batch)
                with jax.set_mesh(self._mesh):
                    arrays = shard_batch(batch, self._mesh)
                    while True:
                        extra, images = self._score(params, arrays, self._frozen, self.capacity)
                        if not float(extra["overflow"][0]):
                            break
                        self.capacity = grown(self.capacity, float(extra["intersections"][0]))
                for key in set(extra) - {"overflow", "intersections", "offset_mm"}:
                    totals[key] = totals.get(key, np.zeros(2)) + np.array([float(x) for x in extra[key]])
                if strips is not None and len(pictures) < num_strips:
                    pictures += _shown(images, batch)
            found |= {f"{name}_{key}": float(v / max(n, 1)) for key, (v, n) in totals.items()}
            if strips is not None:
                strips(name, pictures[:num_strips])
        return found


def _shown(images: Array, batch: Mapping[str, Any]) -> list[ShownView]:
    """One view of each of this process's subjects."""
    shards = sorted(images.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    rows = np.concatenate([np.asarray(s.data) for s in shards if s.replica_id == 0])
    return [
        ShownView(
            np.clip(rows[i, 0], 0, 1),
            np.asarray(batch["image"][i, 0], np.float32) / 255,
            int(batch["subject"][i]),
            int(batch["timestep"][i, 0]),
            int(batch["camera"][i, 0]),
        )
        for i in np.flatnonzero(np.asarray(batch["weight"])[:, 0] > 0)
    ]


def _render_rows(head: FlameModel, decoded: Decoded, batch, *, width: int, height: int, capacity, backend: str):
    """[b, K, H, W, 3] of this device's subjects."""
    map_ = jax.vmap if renders_exactly(backend) else _one_by_one
    splat = functools.partial(splat_view, width=width, height=height, capacity=capacity, backend=backend)

    def subject(row):
        decoded, batch = row
        avatar = rig_subject(head, decoded, batch)
        views = {name: batch[name] for name in ("viewmats", "Ks", "flame")}
        return map_(lambda one: splat(pose_view(head, avatar, one["flame"]), one["viewmats"], one["Ks"]))(views)

    return map_(subject)((decoded, batch))


def rig_subject(head: FlameModel, decoded: Decoded, batch: Mapping[str, Any]) -> Avatar:
    """One subject of a batch (no axis B) as an avatar."""
    with jax.named_scope("rig"):
        rig = bind_points(head, FlameParams(**batch["canonical"]), batch["points"], batch["binding"])
    return rigged(decoded, rig)


def pose_view(head: FlameModel, avatar: Avatar, flame: Mapping[str, Array]) -> Gaussians:
    """The avatar at one view's pose. `flame`: what changes with time."""
    return animate(avatar, head, avatar.rig.canonical.replace(**flame))


def splat_view(posed: Gaussians, viewmat, K, *, width: int, height: int, capacity: int | None, backend: str):
    """[H, W, 3] on white, and the view's `overflow` and `intersections`."""
    image, _, info = rasterize(
        posed.means,
        posed.quats,
        posed.scales,
        posed.opacities,
        posed.colors,
        viewmat[None],
        K[None],
        width,
        height,
        backgrounds=jnp.ones((1, 3), posed.means.dtype),
        backend=backend,
        capacity=capacity,
    )
    return image[0], {name: info[name] for name in ("overflow", "intersections")}


def _one_by_one(function):
    # Tiles of the JAX rasteriser are loops of data-dependent length: a batch of views would wait for the longest.
    return functools.partial(jax.lax.map, function)


@functools.partial(jax.jit, donate_argnums=0)
def _step_back(state: TrainState) -> TrainState:
    return state.replace(step=state.step - 1)
