"""Head hair in six styles: where it grows, how it is combed, and how it falls."""

from __future__ import annotations

import numpy as np

from pointillist_jax.data.identities.anatomy import Anatomy, azimuth, smoothstep, unit
from pointillist_jax.data.identities.skin import join
from pointillist_jax.data.identities.strands import Strands, curl, grow, strand_splats
from pointillist_jax.data.identities.surface import Collider, Splats, SurfacePoints, scatter
from pointillist_jax.data.identities.traits import Traits

# Metres between roots at density 1, and segments of a lock.
_ROOTS = {
    "cropped": (3.3e-3, 2),
    "short": (4.6e-3, 6),
    "long": (5.6e-3, 18),
    "bun": (5.4e-3, 10),
    "ponytail": (5.4e-3, 10),
}
_TIES = {"bun": (0.0, 0.088, -0.119), "ponytail": (0.0, 0.058, -0.128)}


def above_hairline(q: np.ndarray, recession: float = 0.0) -> np.ndarray:
    """[P] metres above the line where hair begins, at template coordinates [P, 3]."""
    around = np.abs(azimuth(q))
    line = np.interp(
        around,
        [0, 18, 32, 44, 54, 63, 70, 75, 81, 85, 88, 98, 104, 112, 122, 140, 180],
        [
            0.089, 0.089, 0.087, 0.082, 0.069, 0.048, 0.028, 0.010, 0.003, 0.024, 0.036, 0.037, 0.033, 0.016, -0.012,
            -0.034, -0.044,
        ],
    )  # fmt: skip
    back = recession * (np.exp(-(((around - 36) / 15) ** 2)) + 0.35 * np.exp(-((around / 25) ** 2)))
    return q[:, 1] - line - back


def scalp_tint(anatomy: Anatomy, points: SurfacePoints, traits: Traits) -> np.ndarray:
    """[P] in [0, 1]: how much of the skin's colour is hidden by hair that grows there."""
    if traits.hair_style == "bald":
        return np.zeros(len(points))
    soft = smoothstep(above_hairline(points.template, traits.recession), -0.002, 0.007)
    return (
        soft * (1 - points.blend(anatomy, anatomy.region("ears"))) * (0.72 if traits.hair_style == "cropped" else 0.9)
    )


def hair_faces(anatomy: Anatomy, traits: Traits) -> np.ndarray:
    """[F] bool: faces that carry this person's head hair."""
    centers = anatomy.template[anatomy.faces].mean(axis=1)
    grown = above_hairline(centers, traits.recession) > 0
    return grown & anatomy.outside & ~anatomy.faces_of("ears") & (traits.hair_style != "bald")


def head_hair(
    anatomy: Anatomy, vertices: np.ndarray, collider: Collider, traits: Traits, density: float, rng: np.random.Generator
) -> list[Splats]:
    """The hair of one person; nothing for a bald one."""
    if traits.hair_style == "bald":
        return []
    spacing, segments = _ROOTS[traits.hair_style]
    roots = _roots(anatomy, vertices, traits, spacing * anatomy.unit / np.sqrt(density), rng)
    if traits.hair_style != "cropped" and density < 0.5:
        segments = max(2, round(segments * 0.75))
    comb = {"cropped": _cropped, "short": _short, "long": _long, "bun": _tied, "ponytail": _tied}[traits.hair_style]
    if traits.hair_style == "short" and traits.curl > 0.6:
        comb = _curly
    return comb(anatomy, vertices, collider, roots, segments, traits, density, rng)


def rigid_faces(anatomy: Anatomy, vertices: np.ndarray, points: np.ndarray) -> np.ndarray:
    """[P] the faces nearest to points [P, 3] that turn with the skull alone, so that long things on them stay rigid."""
    from scipy.spatial import cKDTree

    candidates = np.flatnonzero(anatomy.rigid if anatomy.rigid.any() else anatomy.outside)
    _, nearest = cKDTree(vertices[anatomy.faces[candidates]].mean(axis=1)).query(points)
    return candidates[nearest]


def _roots(anatomy, vertices, traits, spacing: float, rng) -> SurfacePoints:
    wanted = np.full(len(anatomy.faces), np.inf)
    corners = anatomy.template[anatomy.faces]
    high = above_hairline(corners.reshape(-1, 3), traits.recession).reshape(-1, 3).max(axis=1)
    wanted[anatomy.outside & ~anatomy.faces_of("ears") & (high > -0.003)] = spacing
    if traits.fringe:
        centers = corners.mean(axis=1)
        wanted[(np.abs(azimuth(centers)) < 48) & (above_hairline(centers, traits.recession) < 0.022)] *= 0.6
    points = scatter(anatomy, vertices, wanted, rng)
    # A natural hairline is no line: hair thins out over a few millimetres.
    edge = above_hairline(points.template, traits.recession) + rng.normal(0, 0.0015, len(points))
    return points.take(edge > 0.001)


def _tangential(vectors: np.ndarray, normals: np.ndarray) -> np.ndarray:
    return unit(vectors - np.einsum("pa,pa->p", vectors, normals)[:, None] * normals)


def _face_guard(anatomy: Anatomy, vertices: np.ndarray, top: float = 0.086):
    """A pull that leads locks round the face: outwards and back wherever they would hang before it."""
    scale, shift = _template_frame(anatomy, vertices)

    def pull(points: np.ndarray, heading: np.ndarray, step: int) -> np.ndarray:
        q = (points - shift) / scale
        before = (
            smoothstep(q[:, 2], -0.012, 0.02)
            * smoothstep(q[:, 1], top, top - 0.015)
            * smoothstep(np.abs(q[:, 0]), 0.094, 0.078)
        )
        side = np.where(q[:, 0] >= 0, 1.0, -1.0)
        return before[:, None] * np.stack([1.3 * side, np.zeros(len(q)), -1.5 + 0 * side], axis=1)

    return pull


def _template_frame(anatomy: Anatomy, vertices: np.ndarray) -> tuple[float, np.ndarray]:
    """Scale and shift from template coordinates to this identity, by the mean of its skull."""
    keep = anatomy.template[:, 1] > -0.05
    source, target = anatomy.template[keep], vertices[keep]
    scale = np.linalg.norm(target - target.mean(axis=0)) / np.linalg.norm(source - source.mean(axis=0))
    return float(scale), target.mean(axis=0) - scale * source.mean(axis=0)


def _center(anatomy, vertices) -> np.ndarray:
    scale, shift = _template_frame(anatomy, vertices)
    return scale * np.array([0.0, 0.03, -0.035]) + shift


def _layer_shade(height: np.ndarray, steps: int, dark: float = 0.55, root: float = 0.65) -> np.ndarray:
    """[N, S + 1] brightness: `dark` for the innermost locks, and roots darker than lengths."""
    depth = dark + (1 - dark) * height
    along = root + (1 - root) * np.minimum(np.arange(steps + 1) / max(1.0, 0.3 * steps), 1.0)
    return depth[:, None] * along[None]


def _cropped(anatomy, vertices, collider, roots, segments, traits, density, rng):
    scale, shift = _template_frame(anatomy, vertices)
    whorl = scale * np.array([0.006, 0.126, -0.086]) + shift
    flow = _tangential(roots.positions - whorl + [0, -0.02, 0], roots.normals)
    num = len(roots)
    lift = rng.uniform(0.35, 0.9, (num, 1)) + 0.5 * traits.curl
    direction = flow + lift * roots.normals + 0.25 * rng.normal(size=(num, 3))
    length = traits.hair_length * rng.uniform(0.7, 1.2, num) * np.where(roots.template[:, 1] < 0.06, 0.7, 1.0)
    length *= smoothstep(above_hairline(roots.template, traits.recession), -0.002, 0.012) * 0.6 + 0.4
    points = grow(collider, roots.positions, direction, length, rng.uniform(0.3, 0.8, num) * length, segments, rise=2)
    height = rng.random(num)
    strands = Strands(
        points, roots.faces, 1.35e-3 / np.sqrt(density) * np.ones(num), _layer_shade(height, segments, 0.7, 0.75)
    )
    look = {"variation": 0.20, "grey": 0.4 * traits.grey, "shine": 0.05, "flat": 0.6, "overlap": 0.6, "tip": 0.75}
    return [_hair(strands, traits, rng, _center(anatomy, vertices), opacity=0.9, **look)]


def _short(anatomy, vertices, collider, roots, segments, traits, density, rng):
    num = len(roots)
    q, normals = roots.template, roots.normals
    top = smoothstep(q[:, 1] + 0.25 * q[:, 2], 0.062, 0.098)
    side = np.where(q[:, 0] > traits.parting, 1.0, -1.0)[:, None]
    swept = rng.random()
    if traits.fringe:
        comb = np.array([0.25, -0.2, 1.0]) * np.concatenate([side, side * 0 + 1, side * 0 + 1], axis=1)
    elif swept < 0.4:
        comb = np.concatenate([0.15 * side, 0.3 + 0 * side, -1.0 + 0 * side], axis=1)
    else:
        over = -np.sign(traits.parting or 1.0)
        comb = np.concatenate([np.where(side == over, over, 0.6 * side), 0 * side, 0.25 + 0 * side], axis=1)
    sides = np.concatenate([0 * side, -1.0 + 0 * side, -0.45 + 0 * side], axis=1)
    flow = _tangential(top[:, None] * comb + (1 - top[:, None]) * sides, normals)
    # Neighbours are combed alike: the disorder is smooth over a few centimetres, with a little for each lock.
    flow = flow + 0.20 * _smooth_noise(roots.positions, rng, 40.0) + 0.07 * rng.normal(size=(num, 3))
    height = rng.random(num)
    direction = flow + (0.15 + 0.25 * top)[:, None] * normals
    length = traits.hair_length * (0.42 + 0.58 * top) * rng.uniform(0.8, 1.1, num)
    front = smoothstep(above_hairline(q, traits.recession), 0.0, 0.02)
    # Hair lies flat at its edge and along the parting.
    flat = (0.5 + 0.5 * front) * (0.6 + 0.4 * smoothstep(np.abs(q[:, 0] - traits.parting), 0.0, 0.02))
    clearance = (0.0015 + 0.003 * height + top * (0.002 + 0.008 * height)) * flat * (1 + 0.7 * traits.curl)
    guard = _face_guard(anatomy, vertices, top=0.058 if traits.fringe else 0.088)
    points = grow(collider, roots.positions, direction, length, clearance, segments, gravity=0.20, pull=guard, rise=3)
    points = curl(points, traits.curl, 0.0035, 38, rng)
    strands = Strands(
        points,
        rigid_faces(anatomy, vertices, roots.positions),
        2.1e-3 / np.sqrt(density) * rng.uniform(0.75, 1.2, num),
        _layer_shade(height, segments),
    )
    return [_hair(strands, traits, rng, _center(anatomy, vertices), shine=0.14)]


def _curly(anatomy, vertices, collider, roots, segments, traits, density, rng):
    """Short, tightly curled hair that stands all round the head."""
    num, segments, normals = len(roots), segments + 2, roots.normals
    q, height = roots.template, rng.random(len(roots))
    edge = smoothstep(above_hairline(q, traits.recession), 0.0, 0.03)
    top = smoothstep(q[:, 1], 0.02, 0.10)
    direction = normals + 0.25 * _smooth_noise(roots.positions, rng, 60.0) + 0.25 * rng.normal(size=(num, 3))
    length = 0.85 * traits.hair_length * (0.45 + 0.55 * top) * (0.35 + 0.65 * edge) * (0.55 + 0.5 * height)
    points = grow(collider, roots.positions, direction, length, 0.4 * length, segments, gravity=0.03, rise=3)
    points = curl(points, 1.0, 0.0042 * traits.curl, 75, rng)
    shade = _layer_shade(0.6 + 0.4 * height, segments, 0.6, 0.5)
    width = 1.9e-3 / np.sqrt(density) * rng.uniform(0.75, 1.2, num)
    strands = Strands(points, rigid_faces(anatomy, vertices, roots.positions), width, shade)
    return [_hair(strands, traits, rng, _center(anatomy, vertices), shine=0.05, flat=0.8, tip=0.9)]


def _long(anatomy, vertices, collider, roots, segments, traits, density, rng):
    num = len(roots)
    q, normals = roots.template, roots.normals
    offset = q[:, 0] - traits.parting
    side = np.where(offset >= 0, 1.0, -1.0)
    forward = smoothstep(q[:, 2], -0.05, 0.03)
    comb = np.stack([side, -0.25 + 0 * side, -0.9 * forward - 0.25], axis=1)
    # Behind the crown hair falls straight down.
    behind = smoothstep(q[:, 2], -0.06, -0.10)
    comb = (1 - behind)[:, None] * comb + behind[:, None] * np.stack(
        [0.25 * side, -1 + 0 * side, -0.2 + 0 * side], axis=1
    )
    flow = (
        _tangential(comb, normals) + 0.22 * _smooth_noise(roots.positions, rng, 35.0) + 0.08 * rng.normal(size=(num, 3))
    )
    height = rng.random(num)
    # Hair is cut at one height all round: locks from the nape are short, those from the crown go sideways first.
    hem = 0.19 - traits.hair_length
    length = (q[:, 1] - hem + 0.05 * smoothstep(q[:, 1], 0.04, 0.125)) * rng.uniform(0.90, 1.04, num) * anatomy.unit
    length = np.maximum(length, 0.02 * anatomy.unit)
    bangs = np.zeros(num, bool)
    if traits.fringe:
        bangs = (np.abs(azimuth(q)) < 44) & (above_hairline(q) < 0.018)
        flow[bangs] = _tangential(
            np.array([[0.0, -1.0, 0.5]]) + 0.35 * np.sign(q[bangs, :1]) * [[1.0, 0, 0]], normals[bangs]
        )
        length[bangs] = 0.046 * anatomy.unit * rng.uniform(0.85, 1.1, int(bangs.sum()))
    # Roots low at the sides and the nape lie under the others.
    upper = smoothstep(q[:, 1], -0.02, 0.09)
    clearance = 0.0015 + (0.001 + 0.010 * height) * (0.3 + 0.7 * upper) * (1 + 0.7 * traits.curl)
    clearance[bangs] *= 0.5
    direction = flow + 0.3 * normals
    face = _face_guard(anatomy, vertices)
    brow = _face_guard(anatomy, vertices, top=0.058)

    scale, shift = _template_frame(anatomy, vertices)

    def pull(points, heading, step):
        # Below the chin hair falls before or behind the shoulders, not over their ends.
        at = (points - shift) / scale
        low, wide = smoothstep(at[:, 1], -0.03, -0.08), smoothstep(np.abs(at[:, 0]), 0.05, 0.085)
        before = np.where(at[:, 2] > -0.045, 0.55, -0.55)
        shoulders = low[:, None] * np.stack([-0.9 * np.sign(at[:, 0]) * wide, 0 * wide, before * wide], axis=1)
        return np.where(bangs[:, None], brow(points, heading, step), face(points, heading, step)) + shoulders

    points = grow(collider, roots.positions, direction, length, clearance, segments, gravity=0.75, pull=pull, rise=2)
    amount = np.where(bangs, 0.3, 1.0)[:, None, None]
    points = points + amount * (curl(points, traits.curl, 0.0065, 17, rng) - points)
    shade = _layer_shade(0.5 * height + 0.5 * upper, segments, 0.5, 0.7)
    strands = Strands(
        points,
        rigid_faces(anatomy, vertices, roots.positions),
        2.5e-3 / np.sqrt(density) * rng.uniform(0.7, 1.2, num),
        shade,
    )
    return [_hair(strands, traits, rng, _center(anatomy, vertices), shine=0.17, tip=0.55)]


def _tied(anatomy, vertices, collider, roots, segments, traits, density, rng):
    num = len(roots)
    scale, shift = _template_frame(anatomy, vertices)
    tie = scale * np.array(_TIES[traits.hair_style]) + shift
    (tie,), (back,) = collider.push_out(tie[None], np.array([0.006]))
    away = tie - roots.positions
    # Round a head of radius r a chord c is an arc of 2 r asin(c / 2 r).
    chord, radius = np.linalg.norm(away, axis=1), 0.105 * scale
    length = 2 * radius * np.arcsin(np.minimum(chord / (2 * radius), 0.999))
    height = rng.random(num)

    def pull(points, heading, step):
        to = tie - points
        return 1.6 * unit(to) * np.minimum(np.linalg.norm(to, axis=1) / 0.01, 1.0)[:, None]

    direction = (
        _tangential(away, roots.normals) + 0.12 * roots.normals + 0.10 * _smooth_noise(roots.positions, rng, 40.0)
    )
    points = grow(collider, roots.positions, direction, length, 0.0015 + 0.0045 * height, segments, pull=pull, rise=2)
    width = 2.4e-3 / np.sqrt(density) * rng.uniform(0.75, 1.2, num)
    bound = rigid_faces(anatomy, vertices, roots.positions)
    combed = Strands(points, bound, width, _layer_shade(height, segments, 0.7, 0.85))
    center = _center(anatomy, vertices)
    parts = [_hair(combed, traits, rng, center, shine=0.20, tip=0.8)]
    held = rigid_faces(anatomy, vertices, tie[None])[0]
    if traits.hair_style == "bun":
        parts.append(_bun(tie, back, held, traits, density, scale, rng))
    else:
        parts += _tail(collider, tie, back, held, traits, density, scale, center, rng)
    return [join(parts)]


def _bun(tie, back, held, traits, density, scale, rng):
    """A ball of hair: arcs wound round it like wool, most of them the same way."""
    num, segments = max(40, int(300 * density)), 8
    radius = scale * rng.uniform(0.026, 0.032)
    middle = tie + back * radius * 0.75
    pole = unit(back + 0.5 * rng.normal(size=(num, 3)))
    start = _tangential(rng.normal(size=(num, 3)), pole)
    other = np.cross(pole, start)
    # Spread the arcs between equator and pole, so that no side of the ball is bare.
    latitude = np.arcsin(rng.uniform(-0.75, 0.95, num))
    angle = rng.uniform(0, 2 * np.pi, (num, 1)) + np.linspace(0, rng.uniform(1.4, 2.0), segments + 1)[None]
    size = radius * rng.uniform(0.86, 1.04, num)
    ring = np.cos(angle)[..., None] * start[:, None] + np.sin(angle)[..., None] * other[:, None]
    points = middle + size[:, None, None] * (
        np.cos(latitude)[:, None, None] * ring + np.sin(latitude)[:, None, None] * pole[:, None]
    )
    shade = np.clip(0.55 + 0.45 * (size / radius - 0.86) / 0.18, 0.4, 1)[:, None] * np.ones((1, segments + 1))
    strands = Strands(points, np.full(num, held), 2.6e-3 / np.sqrt(density) * rng.uniform(0.7, 1.2, num), shade)
    return _hair(strands, traits, rng, middle, shine=0.16, tip=1.0)


def _tail(collider, tie, back, held, traits, density, scale, center, rng):
    num, segments = max(40, int(260 * density)), 16
    spread = _tangential(rng.normal(size=(num, 3)), np.broadcast_to(back, (num, 3)))
    distance = scale * 0.011 * np.sqrt(rng.random((num, 1)))
    roots = tie + 0.008 * scale * back + distance * spread
    direction = back + 0.1 * np.array([0, 1.0, 0]) + 18 * distance * spread
    length = traits.hair_length * rng.uniform(0.85, 1.05, num) * scale
    height = rng.random(num)
    points = grow(collider, roots, direction, length, 0.004 + 0.022 * height, segments, gravity=0.6, rise=4)
    points = curl(points, traits.curl, 0.009, 17, rng)
    shade = (0.6 + 0.4 * height)[:, None] * np.ones((1, segments + 1))
    strands = Strands(points, np.full(num, held), 2.8e-3 / np.sqrt(density) * rng.uniform(0.7, 1.2, num), shade)
    tail = _hair(strands, traits, rng, center, shine=0.16, tip=0.5)
    band_turns = np.linspace(0, 2 * np.pi, 15)
    first = _tangential(np.array([[0.0, 1.0, 0.2]]), back[None])[0]
    circle = (
        tie
        + 0.010 * scale * back
        + 0.0125 * scale * (np.cos(band_turns)[:, None] * first + np.sin(band_turns)[:, None] * np.cross(back, first))
    )
    band = Strands(circle[None], np.array([held]), np.array([2.4e-3]), np.ones((1, 15)))
    return [
        tail,
        strand_splats(
            band, np.array(traits.clothing_rgb) * 0.6, "hair", rng, shine=0.03, flat=0.9, tip=1.0, center=center
        ),
    ]


def _hair(strands: Strands, traits: Traits, rng: np.random.Generator, center: np.ndarray, **look) -> Splats:
    """Strands in the person's hair colour; `look` as `strand_splats` takes it."""
    return strand_splats(strands, np.array(traits.hair_rgb), "hair", rng, center=center, **{"grey": traits.grey} | look)


def _smooth_noise(points: np.ndarray, rng: np.random.Generator, frequency: float) -> np.ndarray:
    """[P, 3] of size about 1, varying over 1 / `frequency` metres."""
    waves, phases = rng.normal(size=(3, 8, 3)) * frequency, rng.uniform(0, 2 * np.pi, (8, 3))
    return np.cos(np.einsum("pa,abk->pbk", points, waves) + phases).sum(axis=1) / 2
