"""A real browser for tests: headless Chromium with software WebGL, its pictures, and what it complains of."""

from __future__ import annotations

import contextlib
import io
import shutil
import time
from collections.abc import Callable, Iterator

import imageio.v3 as iio
import numpy as np
import pytest

ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
)
# Software rendering on a machine with other work can be a hundred times slower than on an idle one.
PATIENCE = 240
# viser 1.1.1 gives three.js corners of splats without a z when it culls them; nothing is wrong in the picture.
KNOWN = "THREE.BufferGeometry.computeBoundingSphere(): Computed radius is NaN."


class Page:
    """A page that is open. `complaints` are errors of its console and requests that failed."""

    def __init__(self, page):
        self.page, self.complaints = page, []
        page.set_default_timeout(1e3 * PATIENCE)
        page.on("console", lambda m: self._note(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self._note(str(error)))
        page.on("requestfailed", lambda request: self._note(f"failed: {request.url[:200]}"))

    def _note(self, text: str) -> None:
        if not text.startswith(KNOWN):
            self.complaints.append(text)

    def open(self, url: str) -> None:
        self.page.goto(url)
        # A notice that WebGL runs in software would cover the scene.
        self.page.add_style_tag(content=".mantine-Notifications-root { display: none }")

    def picture(self) -> np.ndarray:
        """[H, W, 3] uint8 of the scene; controls and playback bar are left out."""
        canvas = self.page.locator("canvas").first.bounding_box()
        shot = iio.imread(io.BytesIO(self.page.screenshot()))[..., :3]
        left, top, width, height = (round(canvas[key]) for key in ("x", "y", "width", "height"))
        return shot[top : top + height, left : left + width]

    def picture_when(self, condition: Callable[[np.ndarray], bool], seconds: float = PATIENCE) -> np.ndarray:
        """The first picture that fulfils the condition. Fails the test if none comes in time."""
        end = time.monotonic() + seconds
        while True:
            picture = self.picture()
            if condition(picture):
                return picture
            if time.monotonic() > end:
                pytest.fail(f"no such picture came in {seconds} s; complaints: {self.complaints}")
            time.sleep(0.2)

    def still_picture(self, condition: Callable[[np.ndarray], bool], seconds: float = PATIENCE) -> np.ndarray:
        """A picture that fulfils the condition and does not change any more."""
        last: list[np.ndarray] = []

        def calm(picture: np.ndarray) -> bool:
            same = bool(last) and last[-1].shape == picture.shape and difference(last[-1], picture).max() < 8
            last.append(picture)
            return same and condition(picture)

        return self.picture_when(calm, seconds)

    def slide_to_end(self, label: str) -> None:
        """Moves the slider with this label to its largest value, by the keyboard."""
        name = self.page.locator("label", has_text=label).first.get_attribute("for")
        self.page.locator(f"[id='{name}'] [role=slider]").press("End")


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[H, W] largest difference of the channels."""
    return np.abs(a.astype(int) - b.astype(int)).max(axis=-1)


@contextlib.contextmanager
def chromium() -> Iterator[Callable[[int, int], Page]]:
    """Gives a function that opens an empty page of a width and height. Skips the test without Chromium."""
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        try:
            yield lambda width, height: Page(browser.new_page(viewport={"width": width, "height": height}))
        finally:
            browser.close()
