"""Scenes of viser, which shows splats in a browser: what the viewer and the one-file player share.

viser is an optional package: it is imported when a server is opened.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import math
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pointillist_jax.files import UserError
from pointillist_jax.gaussians import Gaussians
from pointillist_jax.splat_views import CENTIMETRES

if TYPE_CHECKING:
    import viser

# Narrow, as portraits are taken.
FIELD_OF_VIEW = math.radians(20)
INSTALL = "pip install -e '.[viewer]'"


def open_server(host: str, port: int, label: str) -> viser.ViserServer:
    """A running server.

    Args:
      host, port: it listens there and nowhere else; port 0 takes any free one.
      label: above its controls.

    Raises:
      UserError: viser is not installed; no such host; the port is taken or may not be used.
    """
    try:
        import viser
    except ImportError:
        raise UserError(f"viser, which shows splats in a browser, is not installed: {INSTALL}") from None
    _check_port(host, port)
    # The server under it reports every visitor through absl's log.
    logging.getLogger("websockets").setLevel(logging.WARNING)
    # It announces itself in a box; the scripts say where they are in their own words.
    with quiet():
        server = viser.ViserServer(host=host, port=port, label=label, verbose=False)
    # It takes the next port where somebody was faster.
    if port and server.get_port() != port:
        with quiet():
            server.stop()
        raise _taken(host, port)
    server.scene.set_up_direction("+y")
    return server


def _check_port(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise _nowhere(host) from None
    with socket.socket(family, kind, protocol) as probe:
        # As servers do: a port whose last connections are just closing is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except PermissionError:
            raise UserError(f"--port={port} is for system services only; choose one above 1023.") from None
        except OSError as error:
            raise (_taken(host, port) if error.errno == errno.EADDRINUSE else _nowhere(host)) from None


def _taken(host: str, port: int) -> UserError:
    return UserError(f"port {port} of {host} is in use; choose another with --port, or --port=0 for any free one.")


def _nowhere(host: str) -> UserError:
    return UserError(f"--host={host} is no address of this machine; give 127.0.0.1, or 0.0.0.0 for all.")


@contextlib.contextmanager
def quiet():
    """Swallows what viser prints about itself."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def extent(gaussians: Gaussians) -> tuple[np.ndarray, np.ndarray]:
    """Two corners [3] of the box around an avatar, in centimetres; a few Gaussians astray do not count."""
    means = CENTIMETRES * np.asarray(gaussians.means, np.float64)
    low, high = np.percentile(means, (0.5, 99.5), axis=0) if len(means) else (np.zeros(3), np.ones(3))
    return low, high


def face_front(server: viser.ViserServer, low: np.ndarray, high: np.ndarray, aspect: float = 1.1) -> None:
    """Lets new visitors look frontally at a box [3], [3] (centimetres) that fills their view; "reset" comes back here.

    Args:
      aspect: width over height that the view has at least.
    """
    center, half = (low + high) / 2, (high - low) / 2
    fit = max(half[1], half[0] / aspect) / math.tan(FIELD_OF_VIEW / 2)
    camera = server.initial_camera
    # From the front of the box, with a little air around it.
    camera.position = tuple(center + np.array([0.0, 0.0, half[2] + 1.2 * fit]))
    camera.look_at = tuple(center)
    camera.up = (0.0, 1.0, 0.0)
    camera.fov = FIELD_OF_VIEW
    camera.near, camera.far = 1.0, 1e4


def paint_background(server: viser.ViserServer, color: Sequence[float]) -> None:
    """One colour behind everything, RGB in [0, 1]."""
    pixel = np.round(255 * np.clip(np.asarray(color, np.float64), 0, 1)).astype(np.uint8)
    server.scene.set_background_image(np.tile(pixel, (16, 16, 1)), format="png")
