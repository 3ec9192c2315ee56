"""The web viewer's controls and its loop: avatars as splats in a browser, moved by sliders and motions.

One thread draws: controls only leave word that something changed, so that a slider that is dragged costs one frame at a
time, however many values it passes. What a slow browser has not fetched yet is replaced by what is newer.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import imageio.v3 as iio
import jax.numpy as jnp
import numpy as np

from experiments.motions import named_expressions
from experiments.pictures import BACKGROUND
from experiments.web_scene import extent, face_front, paint_background
from pointillist_jax.files import UserError
from pointillist_jax.flame import FlameModel, FlameParams
from pointillist_jax.gaussians import Avatar
from pointillist_jax.splat_views import (
    DensityScale,
    binding_colors,
    own_colors,
    point_density,
    pose_splats,
    region_colors,
)

if TYPE_CHECKING:
    import viser

STILL = "none"
VIEWS = ("colours", "face regions", "bindings", "density")
# Of FLAME's numbered directions the first, strongest ones; they are in standard deviations.
_NUMBERED, _NUMBERED_RANGE = 10, 3.0
_GAP = 3.0  # Centimetres between avatars.
# Label, field of FlameParams, its components, range in radians.
_POSES = (
    ("jaw open", "jaw_pose", (0,), (0.0, 0.5)),
    ("jaw sideways", "jaw_pose", (1,), (-0.2, 0.2)),
    ("neck nod", "neck_pose", (0,), (-0.6, 0.6)),
    ("neck turn", "neck_pose", (1,), (-0.8, 0.8)),
    ("neck tilt", "neck_pose", (2,), (-0.5, 0.5)),
    # Both eyes: +x turns a gaze down, +y to the subject's left.
    ("eyes down", "eyes_pose", (0, 3), (-0.4, 0.4)),
    ("eyes left", "eyes_pose", (1, 4), (-0.6, 0.6)),
)


@dataclasses.dataclass(frozen=True)
class Slider:
    """One control of the pose: which components of which field of FlameParams it is added to."""

    label: str
    field: str
    components: tuple[int, ...]
    low: float
    high: float


def pose_sliders() -> list[Slider]:
    return [Slider(label, field, components, *limits) for label, field, components, limits in _POSES]


def expression_sliders(head: FlameModel) -> list[Slider]:
    """A head's named expressions, or the first of its numbered ones."""
    if named_expressions(head):
        return [Slider(name.replace("-", " "), "expr", (i,), 0.0, 1.0) for i, name in enumerate(head.expr_names)]
    count = min(_NUMBERED, head.expr_dirs.shape[-1])
    return [Slider(f"expression {i}", "expr", (i,), -_NUMBERED_RANGE, _NUMBERED_RANGE) for i in range(count)]


def add_sliders(params: FlameParams, amounts: Sequence[tuple[Slider, float]]) -> FlameParams:
    """Parameters of one timestep with the sliders' values added."""
    fields = {slider.field: np.array(getattr(params, slider.field), np.float32) for slider, _ in amounts}
    for slider, amount in amounts:
        fields[slider.field][list(slider.components)] += amount
    return params.replace(**{name: jnp.asarray(value) for name, value in fields.items()})


class _Shown:
    """An avatar on the stage: what of it does not move, and its splats in the scene."""

    def __init__(self, name: str, avatar: Avatar, head: FlameModel):
        gaussians = avatar.gaussians
        self.name, self.avatar, self.head = name, avatar, head
        self.low, self.high = extent(gaussians)
        self.opacities = np.asarray(gaussians.opacities, np.float32)[:, None]
        self.density = point_density(gaussians.means)
        self.offset = np.zeros(3, np.float32)
        self.splats: Any = None

    def colors(self, scale: DensityScale) -> dict[str, np.ndarray]:
        binding = self.avatar.rig.binding
        ways = (own_colors(self.avatar.gaussians), region_colors(binding, self.head), binding_colors(binding))
        return dict(zip(VIEWS, (*ways, scale.colors(self.density)), strict=True))


class Viewer:
    """Shows avatars side by side on a viser server. `run` draws until `stop`."""

    def __init__(
        self,
        server: viser.ViserServer,
        avatars: Mapping[str, tuple[Avatar, FlameModel]],
        motions: Mapping[str, FlameParams],
        *,
        motion: str = STILL,
        fps: float = 24,
        follow_stretch: bool = True,
    ):
        """Builds scene and controls.

        Args:
          server: fresh.
          avatars: by name, each with its head; heads of the same expressions, since they share sliders and motions.
          motions: by name, [T, ...]; identities in them do not count.
          motion: that plays at first, or STILL.
          fps: frames a second of the motions.
          follow_stretch: as `flame.animate`.

        Raises:
          UserError: heads with different expressions.
        """
        self._server, self._fps, self._stretch = server, fps, follow_stretch
        self._shown = [_Shown(name, avatar, head) for name, (avatar, head) in avatars.items()]
        first = self._shown[0]
        for other in self._shown[1:]:
            if other.head.expr_names != first.head.expr_names:
                raise UserError(
                    f"{first.name} and {other.name} have heads of different expressions ({first.head.source}, "
                    f"{other.head.source}), and sliders move all avatars alike: show them in viewers of their own."
                )
        self._motions = {STILL: first.head.neutral_params((1,)), **motions}
        self._scale = DensityScale.of(*(shown.density for shown in self._shown))
        self._colors = [shown.colors(self._scale) for shown in self._shown]
        self._sliders: list[tuple[Slider, Any]] = []
        self._changed, self._stopped = threading.Event(), threading.Event()
        self._at = 0.0  # Seconds of the motion.
        self._drawn: collections.deque[float] = collections.deque(maxlen=60)
        self._frame_ms = 0.0
        self._place()
        self._build_controls(motion if motion in self._motions else STILL)
        self.draw()  # Compiles.
        self._frame_ms = 0.0

    def run(self) -> None:
        """Draws what changes until `stop`."""
        last = told = time.perf_counter()
        while not self._stopped.is_set():
            playing = self._play.value and self._frames > 1
            # Twice a frame: a frame that is due waits no longer than half of one.
            self._changed.wait(timeout=0.5 / self._fps if playing else 0.5)
            now = time.perf_counter()
            if playing and self._server.get_clients():
                before = self._frame
                self._at = (self._at + (now - last) * self._speed.value) % (self._frames / self._fps)
                if self._frame != before:
                    self._timeline.value = self._frame
                    self._changed.set()
            last = now
            if self._changed.is_set():
                self._changed.clear()
                self.draw()
            if now - told > 0.5:
                told = now
                self._tell(now)

    def stop(self) -> None:
        """Ends `run`."""
        self._stopped.set()
        self._changed.set()

    def draw(self) -> None:
        """Poses all avatars and sends them."""
        start = time.perf_counter()
        params = self.params()
        with self._server.atomic():
            for shown, colors in zip(self._shown, self._colors, strict=True):
                posed = pose_splats(
                    shown.avatar, shown.head, params, size=self._size.value, follow_stretch=self._stretch
                )
                looks = {"rgbs": colors[self._view.value], "opacities": shown.opacities}
                if shown.splats is None:
                    shown.splats = self._server.scene.add_gaussian_splats(
                        f"/avatars/{shown.name}", *posed, **looks, position=shown.offset
                    )
                else:
                    shown.splats.set_gaussians(*posed, **looks)
        end = time.perf_counter()
        ms = 1e3 * (end - start)
        self._frame_ms = 0.8 * self._frame_ms + 0.2 * ms if self._frame_ms else ms
        self._drawn.append(end)

    def params(self) -> FlameParams:
        """What is shown: the motion's frame with the sliders added."""
        frame = self._motions[self._motion.value].timestep(min(self._frame, self._frames - 1))
        return add_sliders(frame, [(slider, handle.value) for slider, handle in self._sliders])

    @property
    def _frames(self) -> int:
        return self._motions[self._motion.value].expr.shape[0]

    @property
    def _frame(self) -> int:
        return int(self._at * self._fps + 1e-6) % self._frames

    def _place(self) -> None:
        """Puts avatars side by side, the first at the left, and the camera before all of them."""
        left = 0.0
        for shown in self._shown:
            shown.offset[0] = left - shown.low[0]
            left += shown.high[0] - shown.low[0] + _GAP
        middle = (left - _GAP) / 2
        if len(self._shown) == 1:
            # Alone, it stays where its coordinates say.
            middle = self._shown[0].offset[0]
        for shown in self._shown:
            shown.offset[0] -= middle
        low = np.min([shown.low + shown.offset for shown in self._shown], axis=0)
        high = np.max([shown.high + shown.offset for shown in self._shown], axis=0)
        if len(self._shown) > 1:
            high[1] += 3
            for shown in self._shown:
                at = shown.offset + np.array([(shown.low[0] + shown.high[0]) / 2, shown.high[1] + 3, 0])
                self._server.scene.add_label(f"/names/{shown.name}", shown.name, position=at)
        face_front(self._server, low, high)
        paint_background(self._server, BACKGROUND)

    def _build_controls(self, motion: str) -> None:
        gui = self._server.gui
        # The share button would open a tunnel from the internet to this machine.
        gui.configure_theme(show_logo=False, show_share_button=False)
        gui.main_panel.dock_right()
        self._status = gui.add_markdown("")
        with gui.add_folder("Motion"):
            self._motion = gui.add_dropdown("motion", tuple(self._motions), initial_value=motion)
            self._play = gui.add_checkbox("play", initial_value=motion != STILL)
            self._timeline = gui.add_slider("frame", 0, max(self._frames - 1, 1), 1, 0, disabled=self._frames < 2)
            self._speed = gui.add_slider("speed", 0.1, 3.0, 0.1, 1.0)
        with gui.add_folder("View"):
            self._view = gui.add_dropdown("show", VIEWS, initial_value=VIEWS[0])
            self._legend = gui.add_markdown("", visible=False)
            self._size = gui.add_slider("splat size", 0.1, 1.5, 0.05, 1.0)
            buttons = gui.add_button_group("camera", ("reset", "screenshot"))
        with gui.add_folder("Pose (radians)"):
            self._add_sliders(pose_sliders())
            zero = gui.add_button("all sliders to zero")
        with gui.add_folder("Expressions", expand_by_default=False):
            self._add_sliders(expression_sliders(self._shown[0].head))

        self._motion.on_update(lambda _: self._choose_motion())
        self._timeline.on_update(self._seek)
        self._view.on_update(lambda _: self._choose_view())
        for handle in (self._play, self._size):
            handle.on_update(lambda _: self._changed.set())
        zero.on_click(lambda _: self._zero())
        buttons.on_click(self._camera)

    def _add_sliders(self, sliders: Sequence[Slider]) -> None:
        for slider in sliders:
            handle = self._server.gui.add_slider(slider.label, slider.low, slider.high, 0.01, 0.0)
            handle.on_update(lambda _: self._changed.set())
            self._sliders.append((slider, handle))

    def _choose_motion(self) -> None:
        self._at = 0.0
        self._timeline.max = max(self._frames - 1, 1)
        self._timeline.value = 0
        self._timeline.disabled = self._frames < 2
        self._play.value = self._motion.value != STILL
        self._changed.set()

    def _seek(self, event) -> None:
        # While a motion plays, the program itself moves this slider.
        if event.client is not None:
            self._play.value = False
            self._at = (self._timeline.value + 0.5) / self._fps
            self._changed.set()

    def _choose_view(self) -> None:
        low, high = self._scale
        self._legend.content = f"from **{low:.2g}** (blue) to **{high:.2g}** (red) points per cm², at rest"
        self._legend.visible = self._view.value == "density"
        self._changed.set()

    def _zero(self) -> None:
        for _, handle in self._sliders:
            handle.value = 0.0
        self._changed.set()

    def _camera(self, event) -> None:
        if event.target.value == "reset":
            camera, home = event.client.camera, self._server.initial_camera
            with event.client.atomic():
                camera.position, camera.look_at, camera.up_direction = home.position, home.look_at, home.up
                camera.fov = home.fov
        else:
            self._screenshot(event.client)

    def _screenshot(self, client) -> None:
        """What this visitor sees, without the controls, as a PNG that the browser saves."""
        camera = client.camera
        try:
            picture = client.get_render(camera.image_height, camera.image_width, transport_format="png", timeout=30)
        except (RuntimeError, TimeoutError) as error:
            client.add_notification("No screenshot", f"The browser sent no picture: {error}")
            return
        picture = picture.astype(np.float32) / 255
        alpha = picture[..., 3:] if picture.shape[-1] == 4 else np.float32(1)
        seen = alpha * picture[..., :3] + (1 - alpha) * np.asarray(BACKGROUND, np.float32)
        file = io.BytesIO()
        iio.imwrite(file, np.round(255 * np.clip(seen, 0, 1)).astype(np.uint8), extension=".png")
        client.send_file_download("avatar.png", file.getvalue(), save_immediately=True)

    def _tell(self, now: float) -> None:
        """Points, milliseconds a frame takes here, and frames sent in the last second."""
        rate = sum(now - at < 1 for at in self._drawn)
        points = sum(shown.avatar.gaussians.num_gaussians for shown in self._shown)
        speed = f" · {self._frame_ms:.0f} ms a frame · {rate} frames/s" if self._frame_ms else ""
        self._status.content = f"{points:,} points{speed}"
