"""Eyebrows, lashes, stubble and beards."""

from __future__ import annotations

import numpy as np

from pointillist_jax.data.identities.anatomy import Anatomy, smoothstep, unit
from pointillist_jax.data.identities.skin import stubble_weight
from pointillist_jax.data.identities.strands import Strands, grow, strand_splats
from pointillist_jax.data.identities.surface import Collider, Splats, SurfacePoints, discs, scatter
from pointillist_jax.data.identities.traits import Traits

_BROW_X = [0.009, 0.012, 0.020, 0.032, 0.040, 0.048]
_BROW_Y = [0.0370, 0.0385, 0.0410, 0.0440, 0.0435, 0.0395]
_BROW_HALF = [0.0022, 0.0042, 0.0044, 0.0036, 0.0026, 0.0006]


def beard_weight(q: np.ndarray, beard: str) -> np.ndarray:
    """[P] in [0, 1]: where this beard grows, at template coordinates [P, 3]. Lips are not left out here."""
    x, y, z = np.abs(q[:, 0]), q[:, 1], q[:, 2]
    if beard == "none":
        return np.zeros(len(q))
    everywhere = stubble_weight(q)
    front = z > 0.015
    moustache = smoothstep(x, 0.030, 0.025) * smoothstep(y, -0.024, -0.0265) * smoothstep(y, -0.044, -0.040) * front
    if beard == "moustache":
        return moustache
    if beard == "goatee":
        chin = smoothstep(x, 0.025, 0.020) * smoothstep(y, -0.050, -0.054)
        beside = smoothstep(np.abs(x - 0.0265), 0.005, 0.0035) * (y < -0.030) * (y > -0.066)
        return np.maximum(moustache, np.maximum(chin, beside) * everywhere) * front
    return np.maximum(everywhere, moustache)


def beard_tint(anatomy: Anatomy, points: SurfacePoints, traits: Traits) -> np.ndarray:
    """[P] in [0, 1]: how much the beard darkens the skin below it."""
    strength = {"none": 0.0, "stubble": 0.38}.get(traits.beard, 0.62)
    lips = smoothstep(points.blend(anatomy, anatomy.region("lips")), 0.1, 0.4)
    return strength * beard_weight(points.template, traits.beard) * (1 - lips)


def brow_tint(points: SurfacePoints, traits: Traits) -> np.ndarray:
    """[P] in [0, 1]: how much the brows' fine hair darkens the skin below them."""
    across, _ = _brow_place(points.template)
    soft = smoothstep(np.abs(across) / traits.brow_thickness, 1.25, 0.5)
    return 0.5 * soft * (points.template[:, 2] > 0.02)


def brow_color(traits: Traits) -> np.ndarray:
    """[3] a little darker than the head's hair, much darker than fair hair."""
    color = np.array(traits.hair_rgb) * (0.62 if max(traits.hair_rgb) > 0.35 else 0.85)
    return 0.8 * color + 0.2 * np.array(traits.skin_color) * 0.4


def beard_faces(anatomy: Anatomy, traits: Traits) -> np.ndarray:
    """[F] bool: faces that carry this person's beard."""
    corners = anatomy.template[anatomy.faces]
    places = np.concatenate([corners, corners.mean(axis=1, keepdims=True)], axis=1)
    bare = _bare(anatomy)
    lips = anatomy.region("lips")[anatomy.faces].min(axis=1) > 0.2
    weight = beard_weight(places.reshape(-1, 3), traits.beard).reshape(-1, 4).max(axis=1)
    return (weight > 0.5) & ~bare & ~lips


def beard_splats(
    anatomy: Anatomy, vertices: np.ndarray, collider: Collider, traits: Traits, density: float, rng: np.random.Generator
) -> list[Splats]:
    """Stubble as dots, beards as locks that hang from the face and move with the jaw."""
    if traits.beard == "none":
        return []
    stubble = traits.beard == "stubble"
    spacing = {"stubble": 2.3e-3, "full": 2.7e-3}.get(traits.beard, 2.1e-3)
    roots = _roots(anatomy, vertices, traits, spacing * anatomy.unit / np.sqrt(density), rng)
    if not len(roots):
        return []
    color, num = np.array(traits.beard_rgb), len(roots)
    if stubble:
        rgb = (
            color * np.exp(0.25 * rng.normal(size=(num, 1))) * (0.7 + 0.3 * np.clip(roots.normals[:, 1:2] + 0.6, 0, 1))
        )
        size = roots.spacing * 0 + 0.52e-3 / np.sqrt(density)
        dots = SurfacePoints(roots.faces, roots.barycentrics, roots.positions, roots.normals, roots.template, size)
        return [discs(dots, rgb, "beard", spread=0.9, lift=4e-4, opacity=0.42)]
    q = roots.template
    lip = smoothstep(q[:, 1], -0.043, -0.038) * (np.abs(q[:, 0]) < 0.032)
    side = np.sign(q[:, :1])
    down = np.concatenate([0.10 * side, -1.0 + 0 * side, 0.20 + 0 * side], axis=1)
    # The moustache is combed from the middle to the sides.
    comb = np.concatenate([(0.35 + 30 * np.abs(q[:, :1])) * side, -1.0 + 0 * side, 0 * side], axis=1)
    flow = lip[:, None] * comb + (1 - lip[:, None]) * down
    direction = unit(flow) + 0.55 * roots.normals + 0.16 * rng.normal(size=(num, 3))
    chin = np.exp(-((q[:, 0] / 0.03) ** 2)) * smoothstep(q[:, 1], -0.055, -0.08)
    edge = 0.45 + 0.55 * beard_weight(q, traits.beard) * smoothstep(q[:, 1], -0.005, -0.03)
    length = traits.beard_length * np.where(lip > 0.5, 0.42, 0.55 + 0.9 * chin) * edge * rng.uniform(0.75, 1.15, num)
    length = np.where(lip > 0.5, np.clip(length, 0.005 * anatomy.unit, 0.0085 * anatomy.unit), length)
    height = rng.random(num)
    points = grow(collider, roots.positions, direction, length, (0.1 + 0.35 * height) * length, 4, gravity=0.18, rise=3)
    shade = (0.62 + 0.38 * height)[:, None] * np.array([0.7, 0.9, 1, 1, 1])[None]
    shade = shade * (0.72 + 0.28 * smoothstep(q[:, 1], -0.09, -0.06))[:, None]
    strands = Strands(points, roots.faces, 1.15e-3 / np.sqrt(density) * rng.uniform(0.8, 1.2, num), shade)
    return [
        strand_splats(
            strands, color, "beard", rng, variation=0.22, grey=0.8 * traits.grey, shine=0.02, opacity=0.88, flat=0.7
        )
    ]


def brow_splats(
    anatomy: Anatomy, vertices: np.ndarray, collider: Collider, traits: Traits, density: float, rng: np.random.Generator
) -> list[Splats]:
    """Short hairs along the arch of each brow, upright at its inner end."""
    centers = anatomy.template[anatomy.faces].mean(axis=1)
    near = anatomy.outside & (np.abs(_brow_place(centers)[0]) < 6) & (centers[:, 2] > 0.02)
    spacing = np.where(near, 1.45e-3 * anatomy.unit / np.sqrt(density), np.inf)
    roots = scatter(anatomy, vertices, spacing, rng)
    across, along = _brow_place(roots.template)
    across = across / traits.brow_thickness
    roots, across, along = (
        roots.take(rows := (np.abs(across + 0.25 * rng.normal(size=len(across))) < 1) & (roots.template[:, 2] > 0.02)),
        across[rows],
        along[rows],
    )
    if not len(roots):
        return []
    num, side = len(roots), np.sign(roots.template[:, :1])
    rise = 0.95 - 1.7 * along - 0.35 * across
    direction = np.concatenate([side * (0.35 + along[:, None]), rise[:, None], 0 * side], axis=1)
    normals = roots.normals
    direction = unit(direction - np.einsum("pa,pa->p", direction, normals)[:, None] * normals) + 0.15 * normals
    direction = direction + 0.12 * rng.normal(size=(num, 3))
    length = 0.0068 * rng.uniform(0.7, 1.1, num) * (1 - 0.4 * np.abs(across)) * anatomy.unit
    points = grow(collider, roots.positions, direction, length, np.full(num, 7e-4), 2, rise=1)
    color = brow_color(traits)
    strands = Strands(points, roots.faces, 0.48e-3 / np.sqrt(density) * np.ones(num), np.ones((num, 3)))
    return [strand_splats(strands, color, "brow", rng, variation=0.15, shine=0.02, opacity=0.55, flat=0.7, tip=0.6)]


def lash_splats(
    anatomy: Anatomy, vertices: np.ndarray, joints: np.ndarray, traits: Traits, density: float, rng: np.random.Generator
) -> list[Splats]:
    """Lashes along the margins of the lids. None on a head without lids of its own.

    Args:
      joints: [2, 3] centres of the eyes.
    """
    lids, sockets = anatomy.faces_of("lids"), anatomy.faces_of("sockets")
    edges = _shared_edges(anatomy.faces, lids, sockets)
    if not len(edges):
        return []
    ends = vertices[edges[:, :2]]
    lengths = np.linalg.norm(ends[:, 0] - ends[:, 1], axis=1)
    eye = np.where(anatomy.template[edges[:, 0], 0] > 0, 0, 1)
    strands = []
    for k in range(2):
        for upper in (True, False):
            height = ends.mean(axis=1)[:, 1]
            own = eye == k
            if not own.any():
                continue
            # The corners of an eye part its upper from its lower margin.
            xs = ends.mean(axis=1)[:, 0]
            inner, outer = (np.flatnonzero(own)[f(np.abs(xs[own]))] for f in (np.argmin, np.argmax))
            line = np.interp(np.abs(xs), np.abs(xs[[inner, outer]]), height[[inner, outer]])
            rows = np.flatnonzero(own & ((height > line) == upper))
            if not len(rows):
                continue
            num = max(6, int((26 if upper else 7) * np.sqrt(density)))
            pick = rng.choice(rows, num, p=lengths[rows] / lengths[rows].sum())
            share = rng.random((num, 1))
            roots = share * ends[pick, 0] + (1 - share) * ends[pick, 1]
            outward = unit(roots - joints[k])
            fan = np.concatenate(
                [0.5 * np.sign(roots[:, :1]), np.full((num, 1), 0.25 if upper else -0.5), np.full((num, 1), 0.3)],
                axis=1,
            )
            size = (0.0042 if upper else 0.0020) * anatomy.unit * rng.uniform(0.75, 1.1, (num, 1))
            steps = np.array([0, 0.4, 0.75, 1.0])[None, :, None]
            bend = np.array([0.0, 1.0 if upper else -0.5, 0.0])
            points = roots[:, None] + size[:, None] * (
                steps * unit(outward + 0.6 * fan)[:, None] + 0.55 * steps**2 * bend
            )
            strands.append(Strands(points, edges[pick, 2], np.full(num, 0.14e-3), np.full((num, 4), 0.8)))
    color = np.minimum(np.array(traits.hair_rgb) * 0.4, 0.12)
    return [strand_splats(s, color, "lash", rng, shine=0.0, opacity=0.42, flat=0.8, tip=0.5) for s in strands]


def _roots(anatomy, vertices, traits, spacing, rng) -> SurfacePoints:
    corners = anatomy.template[anatomy.faces]
    weight = beard_weight(corners.reshape(-1, 3), traits.beard).reshape(-1, 3).max(axis=1)
    bare = _bare(anatomy)
    points = scatter(anatomy, vertices, np.where((weight > 0.05) & ~bare, spacing, np.inf), rng)
    lips = points.blend(anatomy, anatomy.region("lips"))
    kept = (rng.random(len(points)) < beard_weight(points.template, traits.beard)) & (lips < 0.2)
    return points.take(kept)


def _bare(anatomy: Anatomy) -> np.ndarray:
    """[F] bool: where no beard grows: ears, the nose down to its base, whatever is inside."""
    height = anatomy.template[anatomy.faces].mean(axis=1)[:, 1]
    return anatomy.faces_of("ears") | (anatomy.faces_of("nose") & (height > -0.0235)) | ~anatomy.outside


def _brow_place(q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Across [P] (-1 lower to 1 upper border; far outside beyond the ends) and along [P] (0 inner to 1 outer end)."""
    x = np.abs(q[:, 0])
    half = np.interp(x, _BROW_X, _BROW_HALF, left=1e-5, right=1e-5)
    return (q[:, 1] - np.interp(x, _BROW_X, _BROW_Y)) / half, (x - _BROW_X[0]) / (_BROW_X[-1] - _BROW_X[0])


def _shared_edges(faces: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """[K, 3] edges (two vertices) between the face sets, and the face of the first set at each."""

    def edges(mask):
        index = np.flatnonzero(mask)
        pairs = np.sort(np.concatenate([faces[index][:, [i, (i + 1) % 3]] for i in range(3)]), axis=1)
        return {tuple(pair): face for pair, face in zip(pairs.tolist(), np.tile(index, 3).tolist(), strict=True)}

    a, b = edges(first), edges(second)
    return np.array([(*pair, a[pair]) for pair in sorted(a.keys() & b.keys())], int).reshape(-1, 3)
