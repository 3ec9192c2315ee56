"""One HTML file that plays an avatar in motion: it opens from disk in any browser, without a server or a network.

The file holds viser's client and, for each frame, every Gaussian's place and shape (32 bytes each before compression):
what it may weigh decides how many frames and points it holds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from experiments.pictures import BACKGROUND
from experiments.web_scene import extent, face_front, open_server, paint_background, quiet
from pointillist_jax.files import UserError, atomic_path
from pointillist_jax.flame import FlameModel, FlameParams
from pointillist_jax.gaussians import Avatar
from pointillist_jax.splat_views import importance, own_colors, pose_splats

# Fewer frames a second than this look broken, so then points are left out; with fewer points than that the skin has
# holes, so then the end of the motion is.
_MIN_RATE, _MIN_POINTS = 8.0, 5000
# Bytes of HTML for a Gaussian of a frame, of a head that turns and talks; the first guess.
_GUESS = 27.0
# A browser holds all of them unpacked, 32 bytes each, however well they compress.
_MAX_RECORDS = 6_000_000
# Places are rounded to 0.02 mm and angles to 1e-4 rad: what is the same to the eye becomes the same to the bit and is
# stored once (-9 % for a head that turns and talks, half for one that turns to both sides).
_STEPS_PER_CM, _ANGLE_DECIMALS = 512.0, 4
_TRIES = 6

# viser sorts splats by depth in a worker that is a module in a blob. Of pages opened from disk, whose origin is opaque,
# Chromium does not start those, and without it the back of the head is painted over the face. Modules in data: URLs it
# starts.
_WORKERS_FROM_DISK = """<script>
if (location.protocol === "file:") {
  const sources = new WeakMap(), urls = new Map();
  const NativeBlob = Blob, NativeWorker = Worker, createObjectURL = URL.createObjectURL.bind(URL);
  window.Blob = class extends NativeBlob {
    constructor(parts, options) {
      super(parts, options);
      const script = /javascript/.test((options || {}).type) && parts.every((part) => typeof part === "string");
      if (script) sources.set(this, parts.join(""));
    }
  };
  URL.createObjectURL = (object) => {
    const url = createObjectURL(object);
    if (sources.has(object)) urls.set(url, "data:text/javascript," + encodeURIComponent(sources.get(object)));
    return url;
  };
  window.Worker = class extends NativeWorker {
    constructor(url, options) {
      super(urls.get(String(url)) || url, options);
    }
  };
}
</script>"""


@dataclasses.dataclass(frozen=True)
class _Choice:
    """What a file holds: every `stride`-th of the first `length` frames, and so many points."""

    stride: int
    length: int
    points: int

    @property
    def frames(self) -> range:
        return range(0, self.length, self.stride)

    @property
    def records(self) -> int:
        return len(self.frames) * self.points


def write_player(
    path: str | os.PathLike,
    avatar: Avatar,
    head: FlameModel,
    motion: FlameParams,
    *,
    fps: float = 24,
    max_bytes: int = 15_000_000,
    background: Sequence[float] = BACKGROUND,
    title: str = "Avatar",
    follow_stretch: bool = True,
) -> dict[str, Any]:
    """Writes the player. Atomic.

    If the whole does not fit, frames are thinned to 8 a second, then the points that cover least (opacity times area)
    are left out down to 5,000, then the motion is cut short.

    Args:
      path: of the .html file.
      avatar, head: as `flame.animate` takes them.
      motion: [T, ...]; the identity is the avatar's own. It starts again when it ends.
      fps: frames a second of the motion.
      max_bytes: of the file, which holds about 1.2 MB of program.
      background: RGB in [0, 1].
      title: of the page.
      follow_stretch: as `flame.animate`.

    Returns:
      What was chosen: {"frames", "of_frames", "points", "of_points", "fps", "seconds", "of_seconds", "bytes"}.

    Raises:
      UserError: viser is not installed, or max_bytes is too small for anything that moves.
    """
    motion = _rounded(motion)
    of_frames, of_points = motion.expr.shape[0], avatar.gaussians.num_gaussians
    with _Scene(avatar, head, motion, fps, background, follow_stretch) as scene:
        shell = len(scene.html(_Choice(1, 1, 1), title))
        page, choice = _largest_that_fits(scene, title, max_bytes, shell, of_frames, of_points, fps)
    with atomic_path(path) as temporary:
        temporary.write_bytes(page)
    return {
        "frames": len(choice.frames),
        "of_frames": of_frames,
        "points": choice.points,
        "of_points": of_points,
        "fps": round(fps / choice.stride, 3),
        "seconds": round(choice.length / fps, 3),
        "of_seconds": round(of_frames / fps, 3),
        "bytes": len(page),
    }


def describe(chosen: dict[str, Any]) -> str:
    """What `write_player` chose, as part of a sentence."""
    points = "all" if chosen["points"] == chosen["of_points"] else f"{chosen['points']:,} of"
    cut = "" if chosen["seconds"] == chosen["of_seconds"] else f", the first {chosen['seconds']:.1f} s"
    return (
        f"{chosen['bytes'] / 1e6:.1f} MB, {chosen['frames']} of {chosen['of_frames']} frames{cut} "
        f"({chosen['fps']:.3g} a second), {points} {chosen['of_points']:,} points"
    )


def _largest_that_fits(scene, title, max_bytes, shell, of_frames, of_points, fps) -> tuple[bytes, _Choice]:
    """How well a motion compresses is only known when it is compressed: guess, measure, and guess again."""
    best: tuple[bytes, _Choice] | None = None
    rate, tried = _GUESS, set()
    for _ in range(_TRIES):
        choice = _choose((0.98 * max_bytes - shell) / rate, of_frames, of_points, fps)
        if choice is None or choice in tried:
            break
        tried.add(choice)
        page = scene.html(choice, title)
        rate = max((len(page) - shell) / choice.records, 1e-3)
        if len(page) <= max_bytes and (best is None or choice.records > best[1].records):
            best = page, choice
        # Enough is known: all of it fits, or most of the room is used.
        if best is not None:
            used = (len(best[0]) - shell) / (max_bytes - shell)
            if used > 0.85 or best[1].records == of_frames * of_points:
                break
    if best is None:
        raise UserError(
            f"a player of {max_bytes / 1e6:.1f} MB has no room for this motion: its program alone takes "
            f"{shell / 1e6:.1f} MB; allow some MB more."
        )
    return best


def _choose(records: float, of_frames: int, of_points: int, fps: float) -> _Choice | None:
    """The most that so many records (points times frames) hold; None if that is next to nothing."""
    records = min(records, _MAX_RECORDS)
    for stride in range(1, max(1, math.floor(fps / _MIN_RATE)) + 1):
        choice = _Choice(stride, of_frames, of_points)
        if choice.records <= records:
            return choice
    fewest = min(_MIN_POINTS, of_points)
    frames = min(len(choice.frames), int(records / fewest))
    if frames < min(2, of_frames):
        return None
    length = min(of_frames, frames * stride)
    return _Choice(stride, length, min(of_points, int(records / frames)))


def _rounded(motion: FlameParams) -> FlameParams:
    return jax.tree.map(lambda x: np.round(np.asarray(x, np.float32), _ANGLE_DECIMALS), motion)


class _Scene:
    """Makes pages of one avatar and motion. Poses are computed once and kept for the next try."""

    def __init__(self, avatar, head, motion, fps, background, follow_stretch):
        gaussians = avatar.gaussians
        self._avatar, self._head, self._motion, self._fps = avatar, head, motion, fps
        self._background, self._stretch = background, follow_stretch
        self._rgbs, self._opacities = own_colors(gaussians), np.asarray(gaussians.opacities, np.float32)[:, None]
        self._order = np.argsort(-importance(gaussians), kind="stable")
        self._posed: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __enter__(self) -> _Scene:
        return self

    def __exit__(self, *_) -> None:
        self._posed.clear()

    def html(self, choice: _Choice, title: str) -> bytes:
        # The points in the file's order: neighbours in it are neighbours on the head, which compresses better.
        kept = np.sort(self._order[: choice.points])
        frames = iter(self._frames(choice.frames, kept))
        with _server() as server:
            paint_background(server, self._background)
            face_front(server, *extent(self._avatar.gaussians))
            looks = {"rgbs": self._rgbs[kept], "opacities": self._opacities[kept]}
            centers, covariances = next(frames)
            splats = server.scene.add_gaussian_splats("/avatar", centers, covariances, **looks)
            recording = server.get_scene_serializer()
            for centers, covariances in frames:
                recording.insert_sleep(choice.stride / self._fps)
                splats.set_gaussians(centers, covariances, **looks)
            if len(choice.frames) > 1:
                recording.insert_sleep(choice.stride / self._fps)
            page = recording.as_html()
        page = page.replace("<title>Viser</title>", f"<title>{html.escape(title)}</title>", 1)
        return page.replace("<head>", f"<head>{_WORKERS_FROM_DISK}", 1).encode()

    def _frames(self, frames: range, kept: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for t in tqdm(frames, desc="player", unit="frame", disable=len(frames) < 2):
            if t not in self._posed:
                centers, covariances = pose_splats(
                    self._avatar, self._head, self._motion.timestep(t), follow_stretch=self._stretch
                )
                # Half floats, as they are stored, so that hundreds of frames can be kept.
                self._posed[t] = np.round(centers * _STEPS_PER_CM) / _STEPS_PER_CM, covariances.astype(np.float16)
            centers, covariances = self._posed[t]
            yield centers[kept], covariances[kept]


@contextlib.contextmanager
def _server() -> Iterator[Any]:
    """viser only writes scenes that a server shows: one that nobody is told of, on this machine alone."""
    server = open_server("127.0.0.1", 0, "")
    try:
        yield server
    finally:
        with quiet():
            server.stop()
