"""A photograph of somebody and what a FLAME tracker found in it: what `generate` and `reconstruct` share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from experiments.common import refuse_flags
from pointillist_jax.convert import flame_params_from_tracker
from pointillist_jax.data.images import load_rgba, square_portrait
from pointillist_jax.data.subjects import flame_fields
from pointillist_jax.data.token_store import StoreSpec
from pointillist_jax.files import UserError
from pointillist_jax.flame import FlameModel, FlameParams, load_flame


class Portrait(NamedTuple):
    """Who is on --portrait.

    Attributes:
      path: of the photograph.
      image: [side, side, 3] uint8, on white.
      tracked: FLAME parameters without a time axis; neutral ones if there is no tracker.
    """

    path: Path
    image: np.ndarray
    tracked: FlameParams

    @property
    def condition(self) -> dict[str, Any]:
        """What the AR model is conditioned on."""
        return {"portrait": self.image, "flame": flame_fields(self.tracked)}


class PortraitFlags:
    """--portrait, --tracker, --tracker_flame and --timestep. Make one at import; the rest is for `main`."""

    def __init__(self):
        self._portrait = flags.DEFINE_string("portrait", None, "A photograph of a head.")
        self._tracker = flags.DEFINE_string(
            "tracker",
            None,
            "What a FLAME tracker found in it: a flame_param.npz or folder of VHAP, LAM or GaussianAvatars, a .frame, "
            "mesh/canonical.ply or folder of Pixel3DMM; a neutral head if not given.",
        )
        self._tracker_flame = flags.DEFINE_string(
            "tracker_flame", None, "The FLAME .pkl Pixel3DMM ran with; needed only where its meshes are not there."
        )
        self._timestep = flags.DEFINE_integer(
            "timestep", 0, "Which timestep of --tracker shows the portrait.", lower_bound=0
        )

    @property
    def path(self) -> Path | None:
        """Of --portrait."""
        return Path(self._portrait.value) if self._portrait.value else None

    def check(self) -> None:
        """Raises UserError for flags that would do nothing without the one they belong to."""
        if self.path is None:
            refuse_flags(("tracker", "tracker_flame", "timestep"), "without --portrait, which it belongs to")
        if self._tracker.value is None:
            refuse_flags(("timestep", "tracker_flame"), "without --tracker, which it belongs to")

    def read(self, spec: StoreSpec, head: FlameModel) -> Portrait:
        """The portrait at the size that models of this store see, and its head.

        Raises:
          UserError: an image or a tracker's file that is damaged; a timestep that it does not have.
        """
        return read_portrait(
            self.path, spec, head, self._tracker.value, timestep=self._timestep.value,
            tracker_flame=self._tracker_flame.value,
        )  # fmt: skip


def read_portrait(
    path: Path,
    spec: StoreSpec,
    head: FlameModel,
    tracker: str | Path | None = None,
    *,
    timestep: int = 0,
    tracker_flame: str | None = None,
    crop: Sequence[str] | None = None,
    flag: str = "--tracker",
) -> Portrait:
    """A photograph at the size that models of this store see, and its head.

    Args:
      path: any picture that `load_rgba` reads.
      spec: of the models' token store.
      head: of that store.
      tracker: as `convert.flame_params_from_tracker` reads; None for a neutral head, with a warning.
      timestep: which of the tracker's.
      tracker_flame: the FLAME file that Pixel3DMM ran with, where its meshes are not there.
      crop: left, top and side in pixels of the square to use; None takes the largest square.
      flag: that gives `tracker`, for the warning.

    Raises:
      UserError: an image or a tracker's file that is damaged; a timestep that it does not have; a square beyond the
        picture.
    """
    image = square_portrait(_cropped(load_rgba(path), crop, path), spec.portrait_size)
    if tracker is None:
        print(
            f"warning: no {flag}: the model is told a neutral head of mean shape, so only the photograph says who this "
            "is; give a FLAME tracker's output for a likeness of shape."
        )
        return Portrait(path, image, head.neutral_params())
    ran_with = load_flame(tracker_flame) if tracker_flame else None
    params = flame_params_from_tracker(tracker, head, tracker_head=ran_with)
    if timestep >= len(params.expr):
        raise UserError(f"{tracker} holds {len(params.expr)} timesteps; --timestep={timestep} is none.")
    return Portrait(path, image, params.timestep(timestep))


def _cropped(image: np.ndarray, crop: Sequence[str] | None, path: Path) -> np.ndarray:
    if crop is None:
        return image
    height, width = image.shape[:2]
    numbers = [int(text) if text.isdecimal() and len(text) < 7 else -1 for text in crop]
    if len(numbers) != 3 or min(numbers) < 0 or not 0 < numbers[2] <= min(width - numbers[0], height - numbers[1]):
        raise UserError(
            f"--crop={','.join(crop)} must be left,top,side of a square inside {path}, which has {width} × {height} "
            "pixels."
        )
    left, top, side = numbers
    return image[top : top + side, left : left + side]
