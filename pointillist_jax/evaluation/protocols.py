"""Which views are rendered and compared: the paper's self- and cross-reenactment (paper §5.1, §5.2; DESIGN §11).

The avatar of a held-out person is made from one portrait. **Self-reenactment** drives it with the person's own capture
and compares it with that capture's photographs, all but the portrait. **Cross-reenactment** drives it with another
held-out person's capture; of what it should look like there is no photograph, so nothing is compared pixel by pixel.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from pointillist_jax.data.captures import SPLITS, Capture
from pointillist_jax.data.images import square_portrait
from pointillist_jax.data.token_store import FLAME_FIELDS
from pointillist_jax.files import UserError
from pointillist_jax.flame import FlameParams

PROTOCOLS = ("self", "cross")
# A tracker's float32 numbers went through a file or two.
_SAME_POSE = 1e-5
# Mean difference, of 255, between a portrait and the view it was cut from, decoded at another size.
_SAME_PICTURE = 4.0


@dataclasses.dataclass(frozen=True)
class Views:
    """Some views of one capture, in the order of their splits, timesteps and cameras.

    Attributes:
      capture: whose.
      splits, rows: view n is row `rows[n]` of the split `splits[n]`.
    """

    capture: Capture
    splits: tuple[str, ...]
    rows: Int[np.ndarray, "N"]

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, chosen: Sequence[int]) -> Views:
        """The views with these numbers."""
        chosen = np.asarray(chosen, int)
        return Views(self.capture, tuple(self.splits[i] for i in chosen), self.rows[chosen])

    def _gather(self, name: str) -> np.ndarray:
        return np.stack([getattr(self.capture.split(s), name)[r] for s, r in zip(self.splits, self.rows, strict=True)])

    @property
    def viewmats(self) -> Float[np.ndarray, "N 4 4"]:
        return self._gather("viewmats")

    @property
    def Ks(self) -> Float[np.ndarray, "N 3 3"]:
        return self._gather("Ks")

    @property
    def cameras(self) -> Int[np.ndarray, "N"]:
        return self._gather("camera_indices")

    @property
    def timesteps(self) -> Int[np.ndarray, "N"]:
        """Rows of the capture's parameters."""
        return self._gather("timesteps")

    @property
    def params(self) -> FlameParams:
        """[N, …]: the tracked head of each view."""
        return self.capture.params.timestep(self.timesteps)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height). Raises UserError if the views differ."""
        sizes = {tuple(row) for row in self._gather("sizes").tolist()}
        if len(sizes) != 1:
            raise UserError(f"{self.capture.root} has pictures of several sizes, {sorted(sizes)}: resize them to one.")
        return sizes.pop()

    def photographs(self) -> Float[np.ndarray, "N H W 3"]:
        """In [0, 1], on white."""
        return np.stack([self.capture.split(s).image(int(r)) for s, r in zip(self.splits, self.rows, strict=True)])

    def describe(self) -> list[dict[str, Any]]:
        """Split, camera and timestep of each view, as the capture numbers them, for a table of scores."""
        times = self.capture.timestep_indices[self.timesteps]
        rows = zip(self.splits, self.cameras.tolist(), times.tolist(), strict=True)
        return [{"split": s, "camera": c, "timestep": t} for s, c, t in rows]


def all_views(capture: Capture) -> Views:
    """Every view of a capture, of all splits, by split, timestep and camera."""
    splits: list[str] = []
    rows: list[int] = []
    for name in SPLITS:
        if name in capture.splits:
            split = capture.split(name)
            order = np.lexsort((split.camera_indices, split.timesteps))
            splits += [name] * len(order)
            rows += order.tolist()
    return Views(capture, tuple(splits), np.array(rows, int))


def held_out_views(views: Views, condition: dict[str, Any]) -> Views:
    """All views but the portrait the avatar is made from.

    A view is the portrait if its tracked head is the portrait's and its picture, cut to a square, looks the same. A
    portrait from elsewhere is none of them.

    Args:
      condition: `TokenStore.condition`: `portrait` [side, side, 3] uint8 and `flame`.
    """
    portrait = np.asarray(condition["portrait"], np.float32)
    params = views.capture.params
    same_pose = np.ones(views.capture.num_timesteps, bool)
    for name in FLAME_FIELDS:
        if name != "shape":
            difference = np.abs(np.asarray(getattr(params, name)) - np.asarray(condition["flame"][name]))
            same_pose &= difference.max(axis=-1) <= _SAME_POSE
    kept = []
    for n, t in enumerate(views.timesteps):
        if same_pose[t]:
            picture = square_portrait(views.capture.split(views.splits[n]).rgba(int(views.rows[n])), len(portrait))
            if np.abs(picture - portrait).mean() <= _SAME_PICTURE:
                continue
        kept.append(n)
    return views.subset(kept)


def chosen_views(views: Views, limit: int, seed: int) -> Views:
    """At most `limit` of the views (0: all), spread over cameras and timesteps; who else is evaluated does not matter.

    Cameras take turns in a random order, each with its timesteps in a random order: the same for the same person.
    """
    if not limit or limit >= len(views):
        return views
    rng = np.random.default_rng([seed, zlib.crc32(views.capture.subject.encode())])
    cameras = views.cameras
    by_camera = [rng.permutation(np.flatnonzero(cameras == c)) for c in rng.permutation(np.unique(cameras))]
    turns = [group[i] for i in range(max(map(len, by_camera))) for group in by_camera if i < len(group)]
    return views.subset(sorted(turns[:limit]))


def cross_pairs(names: Sequence[str]) -> dict[str, str]:
    """Who drives whom: the next person in the order of names, and the first the last. Each drives one and is driven.

    Raises:
      UserError: fewer than two people.
    """
    names = sorted(names)
    if len(names) < 2:
        raise UserError("cross-reenactment needs two people or more: add subjects, or give --protocols=self.")
    return dict(zip(names, [*names[1:], names[0]], strict=True))
