"""Clothing at the neck, and glasses."""

from __future__ import annotations

import numpy as np

from pointillist_jax.data.identities.anatomy import Anatomy, smoothstep
from pointillist_jax.data.identities.hair import rigid_faces
from pointillist_jax.data.identities.skin import join, shading
from pointillist_jax.data.identities.strands import Strands, strand_splats
from pointillist_jax.data.identities.surface import Splats, SurfacePoints, discs, scatter
from pointillist_jax.data.identities.traits import Traits

_NECKLINE = {"tee": -0.137, "crew": -0.126, "turtleneck": -0.096, "hoodie": -0.134}


def below_neckline(q: np.ndarray, clothing: str) -> np.ndarray:
    """[P] metres below the upper border of the clothing, at template coordinates [P, 3]. It is lower in front."""
    return _NECKLINE[clothing] - 0.34 * q[:, 2] - q[:, 1]


def clothing_splats(
    anatomy: Anatomy, vertices: np.ndarray, traits: Traits, density: float, rng: np.random.Generator
) -> list[Splats]:
    """Cloth a few millimetres off neck and shoulders, with a thicker rim."""
    centers = anatomy.template[anatomy.faces].mean(axis=1)
    depth = below_neckline(centers, traits.clothing)
    body = anatomy.outside & (centers[:, 1] < -0.05)
    # Fine points where cloth ends, so that its border is sharp.
    ends = (depth < 0.012) | anatomy.rim
    spacing = np.where(body & (depth > -0.012), np.where(ends, 3.2e-3, 5.2e-3), np.inf)
    points = scatter(anatomy, vertices, spacing * anatomy.unit / np.sqrt(density), rng)
    depth = below_neckline(points.template, traits.clothing)
    points, depth = points.take(depth > 0), depth[depth > 0]
    if not len(points):
        return []
    rim, roll = {
        "tee": (0.005, 0.0018),
        "crew": (0.006, 0.002),
        "turtleneck": (0.010, 0.003),
        "hoodie": (0.014, 0.010),
    }[traits.clothing]
    edge = smoothstep(depth, 1.6 * rim, 0.6 * rim)
    lift = (0.0030 + roll * np.sin(np.pi * np.clip(depth / (1.5 * rim), 0, 1))) * anatomy.unit
    weave = np.cos(2 * np.pi * depth / 0.0042) * (0.05 if traits.clothing == "turtleneck" else 0.0)
    folds = np.cos(points.template @ (rng.normal(size=(3, 6)) * 60) + rng.uniform(0, 6.3, 6)).mean(axis=1)
    tone = shading(anatomy, points) * (1 + weave + 0.09 * folds - 0.14 * edge + 0.02 * rng.normal(size=len(points)))
    cloth = discs(points, np.array(traits.clothing_rgb) * tone[:, None], "clothing", spread=0.92)
    cloth.means = points.positions + lift[:, None] * points.normals
    return [cloth]


def covered(points: SurfacePoints, traits: Traits) -> np.ndarray:
    """[P] bool: skin that clothing hides for good."""
    return below_neckline(points.template, traits.clothing) > 0.006


def glasses_splats(
    anatomy: Anatomy, vertices: np.ndarray, joints: np.ndarray, traits: Traits, density: float, rng: np.random.Generator
) -> list[Splats]:
    """Two rims, a bridge and the temples to the ears, fixed to the skull.

    Args:
      joints: [2, 3] centres of the eyes.
    """
    if traits.glasses == "none":
        return []
    u = anatomy.unit
    thick = traits.glasses == "thick"
    width, height = (0.0245 + 0.002 * rng.random()) * u, (0.0185 + 0.003 * rng.random()) * u
    power = rng.uniform(2.2, 3.4)
    face = vertices[np.unique(anatomy.faces[anatomy.outside & ~anatomy.faces_of("ears")])]
    curves = []
    middle_y = joints[:, 1].mean() - 0.0025 * u
    centers_x = [joints[0, 0] + 0.0025 * u, joints[1, 0] - 0.0025 * u]

    def front(x, y):
        """Depth of a plane, bowed with the face, that just clears it."""
        near = (
            (np.abs(face[:, 1] - middle_y) < height + 0.004 * u) & (face[:, 2] > 0) & (np.abs(face[:, 0]) > 0.009 * u)
        )
        near &= np.abs(face[:, 0]) < centers_x[0] + 0.8 * width
        bow = 3.2 / u
        reach = (face[near, 2] + bow * face[near, 0] ** 2).max() + 0.0025 * u
        return reach - bow * x**2

    turns = np.linspace(0, 2 * np.pi, max(16, int(54 * np.sqrt(density))) + 1)
    for cx in centers_x:
        cos, sin = np.cos(turns), np.sin(turns)
        x = cx + width * np.sign(cos) * np.abs(cos) ** (2 / power)
        y = middle_y + height * np.sign(sin) * np.abs(sin) ** (2 / power)
        curves.append(np.stack([x, y, front(x, y)], axis=1))
    inner = [centers_x[0] - width, centers_x[1] + width]
    x = np.linspace(inner[0], inner[1], 9)
    y = middle_y + 0.0035 * u + 0.0025 * u * np.cos(np.linspace(-np.pi / 2, np.pi / 2, 9))
    curves.append(np.stack([x, y, front(x, y) + 0.001 * u], axis=1))
    ear = {}
    for side in (1, -1):
        place = np.argmin(np.linalg.norm(anatomy.template - [side * 0.071, 0.032, -0.036], axis=1))
        ear[side] = vertices[place] + np.array([side * 0.0015, 0.001, 0.0]) * u
    for side, cx in zip((1, -1), centers_x, strict=True):
        hinge = np.array([cx + side * width, middle_y + 0.006 * u, front(np.array(cx + side * width), 0)])
        share = np.linspace(0, 1, max(12, int(34 * np.sqrt(density))))[:, None]
        stem = hinge + share * (ear[side] - hinge)
        # Past the temple the stem leaves the skull's side alone.
        stem[:, 0] += side * 0.0035 * u * np.sin(np.pi * share[:, 0])
        tip = ear[side] + np.linspace(0, 1, 8)[1:, None] * np.array([0, -0.022, -0.014]) * u
        curves += [stem, tip]
    held = rigid_faces(anatomy, vertices, np.array([[0.0, middle_y + 0.04 * u, 0.05 * u]]))[0]
    radius = (0.00155 if thick else 0.00075) * u
    parts = []
    for curve in curves:
        strands = Strands(curve[None], np.array([held]), np.array([radius]), np.ones((1, len(curve))))
        parts.append(
            strand_splats(
                strands, np.array(traits.glasses_rgb), "glasses", rng, variation=0.0, shine=0.12, flat=0.9, tip=1.0,
                opacity=0.97, overlap=0.7,
            )
        )  # fmt: skip
    return [join(parts)]
