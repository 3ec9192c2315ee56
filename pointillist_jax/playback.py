"""Avatars in motion: frames posed and splatted by one compiled program, everything static kept on the device."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pointillist_jax.cameras import Camera
from pointillist_jax.files import UserError
from pointillist_jax.flame import FlameModel, FlameParams, animate
from pointillist_jax.gaussians import Avatar, Gaussians
from renderer_bridge import estimate_capacity, rasterize


class AvatarRenderer:
    """Renders an avatar at any pose from any camera of one size.

    The avatar, its rig and the head are handed to one jitted program, compiled at the first frame. The tile capacity of
    the JAX back end is measured there and grows when a frame needs more, so that every picture is exact.
    """

    def __init__(
        self,
        avatar: Avatar,
        head: FlameModel,
        width: int,
        height: int,
        *,
        background: Sequence[float] = (1.0, 1.0, 1.0),
        follow_stretch: bool = True,
        backend: str = "auto",
    ):
        """Prepares; nothing is compiled yet.

        Args:
          avatar: canonical Gaussians and rig.
          head: that it was made for.
          width, height: of the pictures, pixels.
          background: RGB behind the head.
          follow_stretch: see `flame.animate`.
          backend: of `renderer_bridge.rasterize`.
        """
        self._avatar, self._head = avatar, head
        self.width, self.height = width, height
        self._background = jnp.asarray(background, jnp.float32)
        self._options = {"width": width, "height": height, "follow_stretch": follow_stretch, "backend": backend}
        self.capacity: int | None = None

    def pose(self, params: FlameParams) -> Gaussians:
        """The Gaussians at a pose (without leading axes)."""
        return _pose(self._avatar, self._head, params, self._options["follow_stretch"])

    def __call__(self, params: FlameParams, viewmat: Float[Array, "4 4"], K: Float[Array, "3 3"]) -> np.ndarray:
        """One frame, [H, W, 3] float32 in [0, 1]. `params`: one timestep; the identity is the avatar's own."""
        viewmat, K = jnp.asarray(viewmat, jnp.float32), jnp.asarray(K, jnp.float32)
        if self.capacity is None:
            self.capacity = self._measure(params, viewmat, K)
        while True:
            image, overflow = self.frame(params, viewmat, K)
            if not int(overflow):
                return np.clip(np.asarray(image), 0, 1)
            self.capacity = max(self._measure(params, viewmat, K), self.capacity + 1)

    def frame(self, params: FlameParams, viewmat, K) -> tuple[Array, Array]:
        """Like a call, but unchecked and left on the device: (image, overflow); for loops that check later."""
        return _frame(
            self._avatar, self._head, params, viewmat, K, self._background, capacity=self.capacity, **self._options
        )

    def _measure(self, params: FlameParams, viewmat, K) -> int:
        world = self.pose(params)
        return estimate_capacity(
            world.means, world.quats, world.scales, world.opacities, viewmat[None], K[None], self.width, self.height,
            margin=1.5,
        )  # fmt: skip

    def play(self, motion: FlameParams, cameras: Camera) -> Iterator[np.ndarray]:
        """Frames of a motion [T, ...]: from one camera, or from a camera for each frame ([T])."""
        num = motion.expr.shape[0]
        viewmats, Ks = (np.asarray(x).reshape(-1, *x.shape[-2:]) for x in (cameras.viewmats, cameras.Ks))
        if len(viewmats) not in (1, num) or (cameras.width, cameras.height) != (self.width, self.height):
            raise UserError(
                f"{len(viewmats)} cameras of {cameras.width} × {cameras.height} cannot show {num} frames of "
                f"{self.width} × {self.height}: give one camera, or one for each frame, of that size."
            )
        for t in range(num):
            c = t % len(viewmats)
            yield self(motion.timestep(t), viewmats[c], Ks[c])


@functools.partial(jax.jit, static_argnames="follow_stretch")
def _pose(avatar, head, params, follow_stretch: bool) -> Gaussians:
    return animate(avatar, head, params, follow_stretch=follow_stretch)


@functools.partial(jax.jit, static_argnames=("width", "height", "capacity", "follow_stretch", "backend"))
def _frame(avatar, head, params, viewmat, K, background, *, width, height, capacity, follow_stretch, backend):
    world = animate(avatar, head, params, follow_stretch=follow_stretch)
    degree = None if world.sh is None else round(world.sh.shape[-2] ** 0.5) - 1
    image, _, info = rasterize(
        world.means,
        world.quats,
        world.scales,
        world.opacities,
        world.colors if world.sh is None else world.sh,
        viewmat[None],
        K[None],
        width,
        height,
        sh_degree=degree,
        backgrounds=background[None],
        backend=backend,
        capacity=capacity,
    )
    return image[0], info["overflow"]
