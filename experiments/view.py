"""Avatars in a browser: splats to turn around, sliders for jaw, neck, eyes and expressions, motions to play.

    python -m experiments.view --avatar=outputs/avatars/me[,outputs/avatars/other] [--motion=talk] [--port=8080]

Several avatars stand side by side and move alike. `--motion` (turn, talk, expressions, turn_and_talk, or what a
tracker left) plays at once; all of them can be chosen in the browser, and sliders add to what plays. Besides colours
the splats show the regions and faces they are bound to, and how densely the points lie. The server listens to this
machine alone unless --host says otherwise; from another, `ssh -L 8080:localhost:8080 <this machine>` reaches it.
Ctrl-C ends it. One HTML file that needs no server: `experiments.export --format=html`.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from absl import flags

from experiments.common import refuse_flags, run
from experiments.heads import avatar_head
from experiments.motions import MOTIONS, TRACKED, check_motion, load_motion
from experiments.viewer import STILL, Viewer
from experiments.web_scene import open_server, quiet
from pointillist_jax.files import UserError
from pointillist_jax.flame import FlameModel, FlameParams, load_flame
from pointillist_jax.gaussians import Avatar, load_avatar

AVATAR = flags.DEFINE_list("avatar", None, "Avatar bundles (experiments.reconstruct, experiments.quickstart).")
MOTION = flags.DEFINE_string("motion", None, f"Plays at first: {', '.join(MOTIONS)}, or {TRACKED}.")
FRAMES = flags.DEFINE_integer("frames", 96, "Length of the built-in motions.", lower_bound=2, upper_bound=100_000)
FPS = flags.DEFINE_integer("fps", 24, "Frames a second of motions.", lower_bound=1, upper_bound=240)
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 lets everyone in who reaches it.")
PORT = flags.DEFINE_integer("port", 8080, "Port to listen on; 0 takes any free one.", 0, 65535)
FLAME = flags.DEFINE_string("flame", None, "Your FLAME .pkl, if the avatars were made with it.")
STRETCH = flags.DEFINE_boolean("follow_stretch", True, "Gaussians grow and shrink with their faces.")


def main() -> None:
    if not AVATAR.value:
        raise UserError("--avatar is missing: name an avatar bundle (python -m experiments.reconstruct makes them).")
    if MOTION.value is not None:
        check_motion(MOTION.value)
    avatars = load_avatars(AVATAR.value)
    head = next(iter(avatars.values()))[1]
    motions = load_motions(head)
    server = open_server(HOST.value, PORT.value, "Pointillist")
    # Stopping a server is no failure when an init system does it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        start = STILL if MOTION.value is None else motion_name(MOTION.value)
        viewer = Viewer(server, avatars, motions, motion=start, fps=FPS.value, follow_stretch=STRETCH.value)
        where = f"http://{HOST.value}:{server.get_port()}"
        for name, (avatar, _) in avatars.items():
            print(f"  {name}: {avatar.gaussians.num_gaussians:,} points")
        print(f"open {where} in a browser; Ctrl-C ends", flush=True)
        viewer.run()
    finally:
        with quiet():
            server.stop()


def load_avatars(paths: list[str]) -> dict[str, tuple[Avatar, FlameModel]]:
    """Avatars and their heads by the names of their folders; the same name twice gets a number."""
    own = load_flame(FLAME.value) if FLAME.value else None
    avatars: dict[str, tuple[Avatar, FlameModel]] = {}
    for path in paths:
        stem = name = Path(path).resolve().name
        while name in avatars:
            name = f"{stem} {len(avatars) + 1}"
        avatars[name] = load_avatar(path), own or avatar_head(path, None)
    return avatars


def load_motions(head: FlameModel) -> dict[str, FlameParams]:
    """The built-in motions and the one of --motion, if that is a file."""
    motions = {name: make(head, FRAMES.value, FPS.value) for name, make in MOTIONS.items()}
    if MOTION.value is not None and MOTION.value not in MOTIONS:
        refuse_flags(("frames",), "with a flame_param.npz or another tracked motion, which has its own length")
        moving = load_motion(MOTION.value, head, FRAMES.value, FPS.value)
        # Trackers place heads in their own rooms: here it stays in its place.
        moving = moving.replace(translation=moving.translation - moving.translation.mean(axis=0), static_offset=None)
        motions[motion_name(MOTION.value)] = moving
    return motions


def motion_name(text: str) -> str:
    return text if text in MOTIONS else Path(text).name


if __name__ == "__main__":
    run(main)
