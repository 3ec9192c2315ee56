"""Avatars in motion: frames posed and splatted by one compiled program, everything static kept on the device.

Programs are shared: Gaussians are padded to buckets by invisible ones and tile capacities are rounded, so that people
of about one size are shown by the same program (`AvatarRenderer.with_person`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pointillist_jax.cameras import Camera
from pointillist_jax.files import UserError
from pointillist_jax.flame import FlameModel, FlameParams, animate, face_frames, flame_vertices, local_to_global
from pointillist_jax.gaussians import Avatar, Gaussians
from renderer_bridge import estimate_capacity, rasterize

_BUCKET = 1024
# Views that `AvatarRenderer.frames` renders by one call of its program.
_VIEWS_PER_CALL = 16


@flax.struct.dataclass
class RiggedPerson:
    """Triangle-local Gaussians and whose head they sit on: a rigged fit (`data.fits`), moved as GaussianAvatars does.

    Attributes:
      gaussians: with `binding`, and `colors`.
      identity: its `shape` and `static_offset` count; without leading axes.
    """

    gaussians: Gaussians
    identity: FlameParams


class AvatarRenderer:
    """Renders an avatar, or a rigged person, at any pose from any camera of one size.

    The Gaussians, their rig and the head are handed to one jitted program, compiled at the first frame. The tile
    capacity of the JAX back end is measured there and grows when a frame needs more, so that every picture is exact.
    """

    def __init__(
        self,
        avatar: Avatar | RiggedPerson,
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
          avatar: canonical Gaussians and rig, or triangle-local Gaussians of a person.
          head: that it was made for.
          width, height: of the pictures, pixels.
          background: RGB behind the head.
          follow_stretch: see `flame.animate`; rigged persons always follow their triangles.
          backend: of `renderer_bridge.rasterize`.
        """
        self._head = head
        self.width, self.height = width, height
        self._background = jnp.asarray(background, jnp.float32)
        self._options = {"width": width, "height": height, "follow_stretch": follow_stretch, "backend": backend}
        # (kind, padded number of Gaussians) → capacity; those of `with_person` share it.
        self._capacities: dict[tuple[type, int], int] = {}
        self._hold(avatar)

    def _hold(self, avatar: Avatar | RiggedPerson) -> None:
        self._num = avatar.gaussians.num_gaussians
        self._avatar = padded(avatar, bucket(self._num))
        self._key = (type(avatar), self._avatar.gaussians.num_gaussians)

    def with_person(self, avatar: Avatar | RiggedPerson) -> AvatarRenderer:
        """The same kind of pictures of somebody else, by the same program where both have about as many Gaussians."""
        other = copy.copy(self)
        other._hold(avatar)
        return other

    @property
    def capacity(self) -> int | None:
        """Tile intersections there is room for; None before the first frame."""
        return self._capacities.get(self._key)

    @capacity.setter
    def capacity(self, value: int) -> None:
        self._capacities[self._key] = value

    def pose(self, params: FlameParams) -> Gaussians:
        """The Gaussians at a pose (without leading axes)."""
        return _pose(self._avatar, self._head, params, self._options["follow_stretch"], self._num)

    def __call__(self, params: FlameParams, viewmat: Float[Array, "4 4"], K: Float[Array, "3 3"]) -> np.ndarray:
        """One frame, [H, W, 3] float32 in [0, 1]. `params`: one timestep; the identity is the avatar's own."""
        viewmat, K = jnp.asarray(viewmat, jnp.float32), jnp.asarray(K, jnp.float32)
        if self.capacity is None:
            self.capacity = self._measure(params, viewmat, K)
        while True:
            image, overflow = self.frame(params, viewmat, K)
            if not int(overflow):
                return np.clip(np.asarray(image), 0, 1)
            self.capacity = max(self._measure(params, viewmat, K), _rounded(self.capacity + 1))

    def frame(self, params: FlameParams, viewmat, K) -> tuple[Array, Array]:
        """Like a call, but unchecked and left on the device: (image, overflow); for loops that check later."""
        return _frame(
            self._avatar, self._head, params, viewmat, K, self._background, capacity=self.capacity, **self._options
        )

    def frames(
        self, params: FlameParams, viewmats: Float[np.ndarray, "N 4 4"], Ks: Float[np.ndarray, "N 3 3"]
    ) -> Float[np.ndarray, "N H W 3"]:
        """N frames at once, each with its own pose and camera: the same pictures as N calls, with fewer dispatches.

        Args:
          params: [N, …]; the identity is the avatar's own.
          viewmats, Ks: a camera for each frame.
        """
        num, step = len(viewmats), min(_VIEWS_PER_CALL, len(viewmats))
        timed = {name: np.asarray(getattr(params, name), np.float32) for name in _TIMED}
        out = []
        for first in range(0, num, step):
            # The last group is filled up with its last frame: one program for all.
            rows = np.minimum(np.arange(first, first + step), num - 1)
            group = params.replace(shape=None, static_offset=None, **{name: x[rows] for name, x in timed.items()})
            cameras = np.asarray(viewmats, np.float32)[rows], np.asarray(Ks, np.float32)[rows]
            if self.capacity is None:
                self.capacity = self._measure(_row(group, 0), cameras[0][0], cameras[1][0])
            while True:
                images, overflow = _frames(
                    self._avatar, self._head, group, *cameras, self._background,
                    capacity=self.capacity, **self._options,
                )  # fmt: skip
                worst = int(np.argmax(np.asarray(overflow)))
                if not int(overflow[worst]):
                    break
                needed = self._measure(_row(group, worst), cameras[0][worst], cameras[1][worst])
                self.capacity = max(needed, _rounded(self.capacity + 1))
            out.append(np.asarray(images)[: num - first])
        return np.clip(np.concatenate(out), 0, 1)

    def _measure(self, params: FlameParams, viewmat, K) -> int:
        padded_to = self._avatar.gaussians.num_gaussians
        world = _pose(self._avatar, self._head, params, self._options["follow_stretch"], padded_to)
        return _rounded(
            estimate_capacity(
                world.means, world.quats, world.scales, world.opacities, jnp.asarray(viewmat)[None],
                jnp.asarray(K)[None], self.width, self.height, margin=1.5,
            )
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


def bucket(num: int) -> int:
    """The number of Gaussians that `num` are padded to: at most an eighth more, or up to 1,023 for small ones."""
    step = max(_BUCKET, 1 << max(num.bit_length() - 4, 0))
    return -(-max(num, 1) // step) * step


def padded(avatar: Avatar | RiggedPerson, num: int) -> Avatar | RiggedPerson:
    """Fills up to `num` Gaussians with copies of the last one that have opacity 0: no picture changes.

    Copies, because zeros could lie where nothing can be posed or projected.
    """
    have = avatar.gaussians.num_gaussians
    if num == have:
        return avatar

    def pad(x):
        x = np.asarray(x)
        return jnp.asarray(np.pad(x, [(0, num - have)] + [(0, 0)] * (x.ndim - 1), mode="edge" if have else "constant"))

    gaussians = jax.tree.map(pad, avatar.gaussians)
    gaussians = gaussians.replace(opacities=gaussians.opacities.at[have:].set(0.0))
    if isinstance(avatar, RiggedPerson):
        return avatar.replace(gaussians=gaussians)
    per_point = {name: pad(getattr(avatar.rig, name)) for name in _RIG_ARRAYS}
    return Avatar(gaussians, avatar.rig.replace(**per_point))


_RIG_ARRAYS = ("binding", "barycentrics", "skin_weights", "rest_offset", "rest_linear", "canonical_scale")
_TIMED = ("expr", "rotation", "neck_pose", "jaw_pose", "eyes_pose", "translation")


def _rounded(capacity: int) -> int:
    """Up to three leading bits: few distinct capacities, hence few programs."""
    step = 1 << max(int(capacity).bit_length() - 3, 0)
    return -(-int(capacity) // step) * step


def _row(params: FlameParams, i: int) -> FlameParams:
    return params.replace(**{name: getattr(params, name)[i] for name in _TIMED})


def _posed(avatar, head, params, follow_stretch: bool) -> Gaussians:
    if isinstance(avatar, RiggedPerson):
        identity = {name: getattr(avatar.identity, name) for name in ("shape", "static_offset")}
        vertices = flame_vertices(head, params.replace(**identity))
        return local_to_global(avatar.gaussians, face_frames(vertices, head.faces))
    return animate(avatar, head, params, follow_stretch=follow_stretch)


@functools.partial(jax.jit, static_argnames=("follow_stretch", "num"))
def _pose(avatar, head, params, follow_stretch: bool, num: int) -> Gaussians:
    """The first `num` of them."""
    return jax.tree.map(lambda x: x[:num], _posed(avatar, head, params, follow_stretch))


_STATIC = ("width", "height", "capacity", "follow_stretch", "backend")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _frame(avatar, head, params, viewmat, K, background, *, width, height, capacity, follow_stretch, backend):
    world = _posed(avatar, head, params, follow_stretch)
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


@functools.partial(jax.jit, static_argnames=_STATIC)
def _frames(avatar, head, params, viewmats, Ks, background, **static):
    def one(row):
        pose, viewmat, K = row
        return _frame(avatar, head, params.replace(**pose), viewmat, K, background, **static)

    timed = {name: getattr(params, name) for name in _TIMED}
    return jax.lax.map(one, (timed, viewmats, Ks))
