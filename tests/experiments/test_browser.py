"""The viewer and the one-file player in a real browser: splats appear, sliders and time move them."""

from __future__ import annotations

import io
import math
import re
import signal
import subprocess
import sys
import time

import imageio.v3 as iio
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.player import write_player
from experiments.web_scene import FIELD_OF_VIEW
from pointillist_jax.flame import flame_vertices, open_head
from pointillist_jax.gaussians import save_avatar
from tests.experiments.browser import chromium, difference
from tests.experiments.plain_avatars import red_faced_avatar
from tests.experiments.small_ar import ROOT, environment

HEAD = open_head("coarse")
BACKGROUND = np.array([237, 240, 242])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("browser")
    save_avatar(root / "someone", red_faced_avatar(HEAD))
    return root


@pytest.fixture(scope="module")
def new_page():
    with chromium() as new_page:
        yield new_page


def shows_the_face(picture: np.ndarray) -> bool:
    """Red in the middle: splats are there, sorted, and seen from the front. Background in the corner."""
    height, width, _ = picture.shape
    red, _, blue = picture[height // 2 - 8 : height // 2 + 8, width // 2 - 8 : width // 2 + 8].mean(axis=(0, 1))
    return red > 1.8 * blue and np.abs(picture[4, 4] - BACKGROUND).max() < 4


def test_viewer_shows_splats_and_its_sliders_move_them(root, new_page):
    command = [sys.executable, "-m", "experiments.view", f"--avatar={root}/someone", "--port=0"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(root), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            said = re.compile(r"open (http://127\.0\.0\.1:\d+) ")
            url = next((found[1] for line in server.stdout if (found := said.search(line))), None)
            assert url, server.stderr.read()
            page = new_page(640, 320)
            page.open(f"{url}?fixedDpr=1")
            before = page.still_picture(shows_the_face)
            page.slide_to_end("jaw open")
            after = page.still_picture(lambda picture: difference(before, picture).max() > 40)
            check_only_the_jaw_moved(difference(before, after))
            page.page.get_by_label("show", exact=True).click()
            page.page.get_by_role("option", name="bindings").click()
            colored = page.picture_when(lambda picture: difference(after, picture).mean() > 10)
            assert np.abs(colored[4, 4] - BACKGROUND).max() < 4
            check_screenshot(page, colored)
            assert re.search(r"\d+ points · \d+ ms a frame · \d+ frames/s", page.page.inner_text("body"))
            assert page.complaints == []
        finally:
            server.send_signal(signal.SIGINT)
            _, err = server.communicate(timeout=60)
    assert err == "stopped by Ctrl-C.\n"
    assert server.returncode == 130


def check_only_the_jaw_moved(changed: np.ndarray) -> None:
    """Pixels change from the lips to the chin, and neither at the brows nor in the corners."""
    avatar = red_faced_avatar(HEAD)
    height, width = changed.shape
    low, high = np.percentile(np.asarray(avatar.gaussians.means), (0.5, 99.5), axis=0)
    center, half = (low + high) / 2, (high - low) / 2
    vertices = np.asarray(flame_vertices(HEAD, HEAD.neutral_params()))

    def below(region: str) -> np.ndarray:
        # The camera looks straight at the middle of the box, from where its front fills 1 / 1.2 of the view.
        point = vertices[np.asarray(HEAD.faces)[HEAD.region_faces(region)]].mean(axis=(0, 1)) - center
        distance = half[2] + 1.2 * max(half[1], half[0] / 1.1) / math.tan(FIELD_OF_VIEW / 2) - point[2]
        focal = 0.5 * height / math.tan(FIELD_OF_VIEW / 2)
        x, y = width / 2 + focal * point[0] / distance, height / 2 - focal * point[1] / distance
        return changed[round(y) : round(y) + 30, round(x) - 10 : round(x) + 10]

    assert below("lips").mean() > 25
    assert below("brows").mean() < 2
    for corner in (changed[:20, :20], changed[:20, -20:], changed[-20:, :20], changed[-20:, -20:]):
        assert corner.max() < 8


def check_screenshot(page, seen: np.ndarray) -> None:
    """The button gives what is seen, as a PNG."""
    with page.page.expect_download() as download:
        page.page.get_by_role("button", name="screenshot").click()
    assert download.value.suggested_filename == "avatar.png"
    with open(download.value.path(), "rb") as file:
        picture = iio.imread(io.BytesIO(file.read()))
    assert picture.shape == seen.shape
    assert difference(picture, seen).mean() < 3


def test_player_opens_from_disk_and_moves(root, new_page):
    motion = HEAD.neutral_params((6,))
    yaw = 0.5 * np.sin(2 * np.pi * np.arange(6) / 6)
    motion = motion.replace(rotation=jnp.asarray(np.stack([0 * yaw, yaw, 0 * yaw], axis=-1), jnp.float32))
    chosen = write_player(root / "player.html", red_faced_avatar(HEAD), HEAD, motion, fps=4, title="<Someone>")
    assert (chosen["frames"], chosen["points"]) == (6, chosen["of_points"])
    page = new_page(320, 300)
    page.open(f"{(root / 'player.html').as_uri()}?fixedDpr=1")
    first = page.picture_when(shows_the_face)
    page.picture_when(lambda picture: difference(first, picture).mean() > 4)
    # Splats are there most of the time, also where the motion starts again: a slow browser may blink between frames.
    end, covered = time.monotonic() + 6, []
    while time.monotonic() < end:
        covered.append((np.abs(page.picture() - BACKGROUND).max(axis=-1) > 40).mean())
    assert np.mean(np.array(covered) > 0.05) > 0.5, covered
    assert page.page.title() == "<Someone>"
    assert page.complaints == []
