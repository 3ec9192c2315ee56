"""Skin, eyes and teeth of a synthetic person: where their Gaussians lie and what colour they have."""

from __future__ import annotations

import numpy as np

from pointillist_jax.data.identities.anatomy import Anatomy, azimuth, smoothstep, unit
from pointillist_jax.data.identities.surface import Splats, SurfacePoints, discs, locate, scatter
from pointillist_jax.data.identities.traits import Traits

# Metres between neighbouring Gaussians at density 1; infinite leaves a region empty.
_SPACING = {
    "face": 3.7e-3, "nose": 2.6e-3, "lips": 1.7e-3, "lids": 1.5e-3, "ears": 3.0e-3, "brows": 3.0e-3, "scalp": 6.5e-3,
    "neck": 6.0e-3, "shoulders": 6.5e-3, "teeth": 3.6e-3, "tongue": 5.0e-3, "mouth_inside": 7.0e-3, "sockets": 2.2e-3,
    "eyes": np.inf, "iris": np.inf, "pupil": np.inf,
}  # fmt: skip
_PLAIN = 4.0e-3
_INSIDE_MOUTH = np.array([0.30, 0.09, 0.09])
_TONGUE = np.array([0.66, 0.32, 0.32])
_TEETH = np.array([0.90, 0.86, 0.78])
# Degrees from the gaze axis, seen from the centre of an eye.
PUPIL, IRIS = 11.5, 29.5


def skin_points(anatomy: Anatomy, vertices: np.ndarray, density: float, rng: np.random.Generator) -> SurfacePoints:
    """Even points on everything but the eyeballs, dense where colours change quickly or skin unfolds."""
    spacing = np.full(len(anatomy.faces), _PLAIN)
    for name, value in _SPACING.items():
        spacing[anatomy.faces_of(name)] = value
    centers = anatomy.template[anatomy.faces].mean(axis=1)
    # Round the eyes and the mouth, where shading and folds are; and never behind an eyeball, where nothing is seen.
    eye = np.minimum(*(np.linalg.norm((centers - [s * 0.029, 0.023, 0.045]) * [0.8, 1, 0.7], axis=1) for s in (1, -1)))
    spacing *= 1 - 0.4 * smoothstep(eye, 0.026, 0.012) * anatomy.faces_of("face")
    spacing[anatomy.faces_of("sockets") & (centers[:, 2] < 0.0395)] = np.inf
    spacing[anatomy.faces_of("mouth_inside") & (centers[:, 2] < -0.005)] = np.inf
    spacing[anatomy.faces_of("eyes")] = np.inf
    spacing = spacing * anatomy.unit / np.sqrt(density * np.minimum(anatomy.stretch, 4.0))
    return scatter(anatomy, vertices, spacing, rng)


def skin_colors(anatomy: Anatomy, points: SurfacePoints, traits: Traits, rng: np.random.Generator) -> np.ndarray:
    """[P, 3] albedo by region, without light."""
    q = points.template
    tone = np.array(traits.skin_color)
    dark = traits.skin_tone  # 0 fair … 1 deep
    colors = np.tile(tone, (len(points), 1))
    x, y, z = np.abs(q[:, 0]), q[:, 1], q[:, 2]

    def mix(weight: np.ndarray, target) -> None:
        nonlocal colors
        colors = colors + weight[:, None] * (np.asarray(target) - colors)

    flush = tone * [1.04, 0.80, 0.77]
    deep = tone * [0.80, 0.72, 0.70]
    cheek = np.exp(-(((x - 0.043) / 0.016) ** 2) - (((y + 0.004) / 0.016) ** 2)) * (z > 0.0)
    mix(0.55 * traits.blush * cheek, flush)
    mix(0.5 * traits.blush * np.exp(-(((x / 0.013) ** 2) + ((y + 0.010) / 0.012) ** 2)) * (z > 0.055), flush)
    mix(0.45 * points.blend(anatomy, anatomy.region("ears")), flush)
    mix(0.30 * np.exp(-((x / 0.02) ** 2) - ((y + 0.075) / 0.012) ** 2) * (z > 0.03), flush)
    # The ring round an eye: brownish lids and the shadow below.
    ring = np.exp(-(((x - 0.030) / 0.017) ** 2) - (((y - 0.021) / 0.011) ** 2)) * (z > 0.03)
    mix(0.42 * ring, deep)
    mix(0.35 * points.blend(anatomy, anatomy.region("lids")), tone * [0.86, 0.70, 0.68])
    mix(
        0.30 * np.exp(-(((x - 0.027) / 0.013) ** 2) - (((y - 0.011) / 0.004) ** 2)) * (z > 0.03),
        tone * [0.78, 0.68, 0.72],
    )
    # Waterline, then the dark inside of the socket.
    margin = points.blend(anatomy, anatomy.region("sockets"))
    mix(smoothstep(margin, 0.15, 0.6), tone * [0.80, 0.56, 0.53])
    mix(smoothstep(z, 0.0425, 0.0405) * margin, tone * 0.3)
    lips = smoothstep(points.blend(anatomy, anatomy.region("lips")), 0.35, 0.75)
    mix(lips * traits.lip_strength, traits.lip_color)
    seam = np.exp(-(((y + 0.0415) / 0.0016) ** 2)) * (x < 0.024) * lips
    mix(0.55 * seam, np.array(traits.lip_color) * 0.45)
    nostril = (
        np.exp(-(((x - 0.0085) / 0.0042) ** 2) - (((y + 0.0205) / 0.0030) ** 2))
        * (points.normals[:, 1] < -0.3)
        * (z > 0.055)
    )
    mix(0.75 * nostril, tone * [0.32, 0.22, 0.20])
    mix(smoothstep(points.blend(anatomy, anatomy.region("mouth_inside")), 0.3, 0.8), _INSIDE_MOUTH)

    # Blotches of a few centimetres, grain, and freckles on fair cheeks.
    waves = rng.normal(size=(3, 10)) * 110
    blotch = np.cos(q @ waves + rng.uniform(0, 2 * np.pi, 10)).mean(axis=1)
    grain = rng.normal(size=len(points))
    colors = colors * (1 + 0.03 * blotch + 0.010 * grain)[:, None]
    if traits.freckles:
        near = np.exp(-(((x - 0.03) / 0.028) ** 2) - (((y - 0.0) / 0.018) ** 2)) * (z > 0.01)
        spot = (rng.random(len(points)) < 0.35 * near) * rng.uniform(0.3, 0.8, len(points)) * traits.freckles
        mix(spot * (1 - lips), tone * [0.78, 0.62, 0.50])
    return np.clip(colors * (1 - 0.02 * dark), 0.0, 1.0)


def shading(anatomy: Anatomy, points: SurfacePoints, contrast: float = 1.0) -> np.ndarray:
    """[P] light on the surface: soft sky and window light from above, darker where the head shades itself."""
    sky = points.blend(anatomy, anatomy.light)
    key = np.maximum(points.normals @ _KEY, 0)
    level = 0.36 + 0.50 * sky + 0.26 * key
    return 1 + contrast * (level - 1)


def gloss(points: SurfacePoints) -> np.ndarray:
    """[P] sheen of skin for a viewer in front."""
    return np.maximum(points.normals @ _HALF, 0) ** 28


def head_splats(anatomy: Anatomy, points: SurfacePoints, colors: np.ndarray, traits: Traits) -> list[Splats]:
    """Discs for skin, teeth and the mouth's inside, lit."""
    light = shading(anatomy, points)
    shine = (0.07 + 0.09 * traits.skin_tone) * gloss(points) * (1 + points.blend(anatomy, anatomy.region("lips")))
    lit = colors * light[:, None] + shine[:, None]
    inside = anatomy.faces_of("mouth_inside")[points.faces]
    teeth, tongue = (anatomy.faces_of(name)[points.faces] for name in ("teeth", "tongue"))
    # Teeth and tongue lie in the dark of a closed mouth; they are seen only when it opens.
    front = 0.45 + 0.6 * smoothstep(points.template[:, 2], 0.015, 0.05)
    side = points.template[:, 0] / 0.0042
    gap = 1 - 0.22 * (np.abs(side - np.round(side)) > 0.40)
    lit = np.where(teeth[:, None], _TEETH * (front * gap)[:, None] * traits.teeth_brightness, lit)
    lit = np.where(tongue[:, None], _TONGUE * front[:, None] * 0.8, lit)
    lit = np.where(inside[:, None], colors * (0.45 + 0.5 * light)[:, None], lit)
    splats = []
    for part, rows in (("skin", ~(inside | teeth | tongue)), ("mouth", inside | tongue), ("teeth", teeth)):
        splats.append(discs(points.take(rows), lit[rows], part, spread=0.86))
    return splats


def eye_splats(
    anatomy: Anatomy, vertices: np.ndarray, joints: np.ndarray, traits: Traits, density: float, rng: np.random.Generator
) -> Splats:
    """Both eyeballs: pupil, striped iris with a dark rim, sclera with a shadow below the lid, a catch light.

    Args:
      joints: [2, 3] centres of the eyes.
    """
    parts = []
    weights = np.asarray(anatomy.model.skin_weights)[anatomy.faces].mean(axis=1)
    tilt = rng.normal(0, 0.01, 2)
    for eye in range(2):
        own = np.flatnonzero(weights[:, 3 + eye] > 0.5)
        center = joints[eye]
        ring_faces = vertices[anatomy.faces[own]].mean(axis=1)
        radius = np.percentile(np.linalg.norm(ring_faces - center, axis=1), 75)
        polar, turn, size = _eye_grid(density, rng)
        direction = np.stack([np.sin(polar) * np.cos(turn), np.sin(polar) * np.sin(turn), np.cos(polar)], axis=1)
        # Each point takes the face it lies over and that face's plane, so it moves and turns as the eyeball does.
        faces, bary = _project(anatomy, vertices, own, center, direction)
        points = locate(anatomy, vertices, faces, bary, radius * size)
        colors = _eye_colors(np.degrees(polar), turn, direction, traits, rng)
        splats = discs(points, colors, "eyes", spread=0.60, opacity=0.98)
        catch = np.array([[0.10, 0.17, 1.0], [-0.12, -0.10, 1.0]]) + np.append(tilt, 0.0)
        glint_faces, glint_bary = _project(anatomy, vertices, own, center, unit(catch))
        glint = discs(
            locate(anatomy, vertices, glint_faces, glint_bary, radius * np.array([0.085, 0.05])),
            np.ones((2, 3)), "eyes", spread=1.0, lift=0.05 * radius, opacity=np.array([0.95, 0.35]),
        )  # fmt: skip
        parts += [splats, glint]
    return join(parts)


def _eye_grid(density: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rings from the pole outwards, finer in the iris: polar angle and azimuth (radians), spacing in eye radii."""
    polar, turn, size = [], [], []
    at, scale = 0.0, density**-0.5
    while at < 84:
        step = (4.2 if at < IRIS + 3 else 8.5) * scale
        middle = np.radians(at + step / 2)
        number = max(3, round(2 * np.pi * np.sin(middle) / np.radians(step)))
        polar.append(np.full(number, middle))
        turn.append((np.arange(number) + rng.random()) * 2 * np.pi / number)
        size.append(np.full(number, np.radians(step)))
        at += step
    return np.concatenate(polar), np.concatenate(turn), np.concatenate(size)


def _eye_colors(
    degrees: np.ndarray, turn: np.ndarray, direction: np.ndarray, traits: Traits, rng: np.random.Generator
) -> np.ndarray:
    iris, rim = np.array(traits.eye_color), np.array(traits.eye_color) * 0.28
    streaks = np.cos(np.outer(turn, rng.integers(7, 23, 4)) + rng.uniform(0, 6.3, 4)).mean(axis=1)
    inner = smoothstep(degrees, PUPIL + 9, PUPIL + 1)
    color = iris * (1 + 0.25 * streaks[:, None]) + inner[:, None] * (np.array(traits.eye_color_inner) - iris) * 0.7
    # Light that enters above gathers below.
    color = color * (1.0 - 0.45 * direction[:, 1:2] / np.sin(np.radians(IRIS)) * (degrees < IRIS)[:, None])
    white = np.array([0.90, 0.885, 0.87]) * (1 - 0.10 * smoothstep(degrees, 35, 75))[:, None]
    white = white * (1 + 0.10 * np.array([0.3, -0.4, -0.4]) * smoothstep(degrees, 45, 80)[:, None])
    lid = smoothstep(direction[:, 1], 0.10, 0.42)
    color = np.where((degrees > IRIS)[:, None], white, color)
    color = color + (smoothstep(degrees, IRIS - 6, IRIS - 1) * (degrees < IRIS + 2))[:, None] * (rim - color) * 0.85
    color = np.where((degrees < PUPIL)[:, None], [[0.015, 0.012, 0.012]], color)
    return np.clip(color * (1 - 0.42 * lid)[:, None], 0, 1)


def _project(
    anatomy: Anatomy, vertices: np.ndarray, own: np.ndarray, center: np.ndarray, direction: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where rays from `center` meet the faces `own`: face [P] and barycentrics [P, 3]."""
    triangles = vertices[anatomy.faces[own]] - center
    inverse = np.linalg.pinv(triangles.transpose(0, 2, 1))
    weights = np.einsum("fck,pk->pfc", inverse, direction)
    share = weights / np.maximum(np.abs(weights.sum(axis=2, keepdims=True)), 1e-12)
    forward = np.einsum("fa,pa->pf", triangles.mean(axis=1), direction) > 0
    best = np.argmax(np.where(forward, share.min(axis=2), -np.inf), axis=1)
    bary = np.clip(share[np.arange(len(direction)), best], 0, None)
    return own[best], bary / bary.sum(axis=1, keepdims=True)


def join(parts: list[Splats]) -> Splats:
    """One set of the same part."""
    names = ("means", "axes", "scales", "opacities", "colors", "binding")
    return Splats(**{n: np.concatenate([getattr(p, n) for p in parts]) for n in names}, part=parts[0].part)


def stubble_weight(q: np.ndarray) -> np.ndarray:
    """[P] in [0, 1]: where a full beard grows, in template coordinates (moustache and chin included)."""
    x, y, z = np.abs(q[:, 0]), q[:, 1], q[:, 2]
    around = np.abs(azimuth(q))
    # The upper line falls from the sideburn to the corner of the mouth.
    line = np.interp(
        around, [0, 14, 22, 34, 48, 62, 72, 90], [-0.026, -0.027, -0.040, -0.046, -0.040, -0.018, 0.002, 0.005]
    )
    side = smoothstep(y, line + 0.004, line - 0.004) * smoothstep(around, 86, 80)
    under = smoothstep(y, -0.106, -0.098) * smoothstep(z, -0.030, -0.015)
    return side * under * (x < 0.075)


_KEY = unit(np.array([0.35, 0.62, 0.70]))
_HALF = unit(unit(np.array([0.20, 0.60, 0.75])) + np.array([0.0, 0.0, 1.0]))
