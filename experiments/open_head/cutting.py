"""The head's topology: skin cut off at the shoulders, eyeballs, capped teeth and tongue, and their face regions.

Every vertex of the head is a fixed linear combination of base vertices (a row of a sparse matrix), so shapes,
expressions and skin weights all carry over by one product. Letters: N base vertices, V head vertices, F faces.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import sparse
from scipy.spatial import cKDTree

from experiments.open_head.sources import BaseMesh, Wheel

# Where FLAME's origin lies in MakeHuman's base frame (metres): between the ears, 2.5 cm below and 3.5 cm behind the
# eyeballs' centres.
ORIGIN = np.array([0.0, 0.703, 0.090])
# The shoulders are cut by an ellipsoid around this point of the head's frame: its rim is one smooth loop.
CUT_CENTER, CUT_AXES = np.array([0.0, 0.0, -0.045]), np.array([0.125, 0.205, 0.19])
# Edges cut closer to their end than this get the end itself moved onto the rim, which avoids slivers.
_SNAP = 0.25
# The eyeball: polar angles of its rings in degrees (8° pupil, 23.5° iris) and meridians. Every second meridian and
# the rings marked below suffice for the coarse head.
EYE_RINGS = (8.0, 15.5, 23.5, 33.0, 45.0, 62.0, 90.0, 130.0)
EYE_COARSE_RINGS = (0, 2, 4, 6)
EYE_MERIDIANS = 16
# Faces whose outermost ring is below these belong to the pupil and the iris.
PUPIL_RINGS, IRIS_RINGS = 1, 3

# Lines between regions of skin, on the neutral head in metres, chosen by eye. Hair: (z, y); jaw: y = a + b z;
# shoulders: y = a + b z + c |x|; brows: (|x|, y).
HAIR_LINE = np.array(
    [(-0.15, -0.045), (-0.10, -0.040), (-0.08, -0.015), (-0.055, 0.0), (-0.03, 0.02), (-0.012, 0.03), (0.0, 0.05),
     (0.015, 0.066), (0.03, 0.078), (0.045, 0.088), (0.08, 0.10)]
)  # fmt: skip
JAW_LINE = (-0.073, -0.43)
SHOULDER_LINE = (-0.155, -0.15, 0.25)
NOSE_WIDTH = np.array([(-0.031, 0.012), (-0.027, 0.020), (-0.012, 0.020), (0.0, 0.013), (0.022, 0.008)])  # (y, |x|)
BROW_LINE = np.array(
    [(0.0105, 0.0449), (0.0195, 0.0446), (0.0279, 0.0445), (0.0359, 0.0435), (0.0432, 0.0416), (0.0486, 0.0385)]
)
BROW_HALF_HEIGHT = 0.0022

# Skin nearer to the eyeball's centre than these many radii (anywhere; behind its front) is the socket.
SOCKET = (0.99, 1.1)
# MakeHuman's rows of teeth and its tongue are wider than the mouth when it opens; they are narrowed by these factors.
NARROWER = {3: 0.88, 4: 0.88, 5: 0.84}

REGIONS = (
    "face", "scalp", "lips", "lids", "ears", "eyes", "teeth", "tongue", "neck",
    "shoulders", "nose", "brows", "mouth_inside", "sockets", "iris", "pupil",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
    """The head before any shape.

    Attributes:
      neutral: [N, 3] neutral base vertices in the head's frame, metres.
      rows: [V, N] sparse; head vertices = rows @ base vertices.
      faces: [F, 3] outward-facing.
      regions: [F] index into REGIONS.
      part: [V] 0 skin, 1 left eye, 2 right eye, 3 upper teeth, 4 lower teeth, 5 tongue.
      mirror: [V] index of the mirrored vertex, or -1.
      eye_coarse: [V] bool, eyeball vertices that the coarse head keeps.
    """

    neutral: np.ndarray
    rows: sparse.csr_matrix
    faces: np.ndarray
    regions: np.ndarray
    part: np.ndarray
    mirror: np.ndarray
    eye_coarse: np.ndarray

    def reduced(self, faces: np.ndarray, regions: np.ndarray) -> tuple[Topology, np.ndarray]:
        """The head with these faces of its vertices instead, and the indices [V'] of the vertices that they use."""
        used, local = np.unique(faces, return_inverse=True)
        number = np.full(len(self.part) + 1, -1)
        number[used] = np.arange(len(used))
        return Topology(
            self.neutral,
            self.rows[used],
            local.reshape(-1, 3),
            regions,
            self.part[used],
            number[self.mirror[used]],
            self.eye_coarse[used],
        ), used


def build_topology(wheel: Wheel, base: BaseMesh, neutral: np.ndarray) -> Topology:
    """Cuts the head out of the base mesh.

    Args:
      wheel: for the region masks.
      base: the base mesh.
      neutral: [N, 3] its neutral shape in the head's frame (metres).
    """
    n = len(neutral)
    names = ["body", "helper-upper-teeth", "helper-lower-teeth", "helper-tongue"]
    parts = []
    for part, name in zip((0, 3, 4, 5), names, strict=True):
        quads = base.groups[name]
        faces, uvs = _triangulate(base.quads[quads], base.quad_uvs[quads], neutral)
        quad, uvs = np.repeat(np.arange(len(quads)), 2), base.uvs[uvs]
        rows = sparse.identity(n, format="csr")
        if part == 0:
            rows, faces, uvs, quad = _cut(faces, uvs, quad, neutral)
        if part in (3, 4):
            faces, uvs, quad = _capped(faces, uvs, quad, neutral)
        if part in NARROWER:
            # Part of the way to its mirror image: in a symmetric shape a vertex keeps y and z and only nears x = 0.
            mixed = (1 - NARROWER[part]) / 2
            rows = (1 - mixed) * rows + mixed * rows[_twins(np.unique(faces), neutral)]
        used, faces = np.unique(faces, return_inverse=True)
        parts.append((part, rows[used], faces.reshape(-1, 3), uvs, quad, np.zeros(len(used), bool)))
    for part, name in ((1, "helper-l-eye"), (2, "helper-r-eye")):
        rows, faces, kept = _eyeball(base.group_vertices(name), neutral)
        parts.append((part, rows, faces, np.zeros((len(faces), 3, 2)), np.arange(len(faces)), kept))

    parts.sort(key=lambda entry: entry[0])
    rows = sparse.vstack([entry[1] for entry in parts], format="csr")
    starts = np.cumsum([0, *(entry[1].shape[0] for entry in parts)])
    faces = np.concatenate([entry[2] + start for entry, start in zip(parts, starts[:-1], strict=True)])
    uvs = np.concatenate([entry[3] for entry in parts])
    quads = np.concatenate([entry[4] + i * len(base.quads) for i, entry in enumerate(parts)])
    part = np.concatenate([np.full(entry[1].shape[0], entry[0]) for entry in parts])
    vertices = rows @ neutral
    mirror = _mirror(vertices, part)
    regions = _regions(wheel, vertices, faces, uvs, np.unique(quads, return_inverse=True)[1], part, mirror)
    return Topology(neutral, rows, faces, regions, part, mirror, np.concatenate([entry[5] for entry in parts]))


def _triangulate(quads: np.ndarray, uvs: np.ndarray, vertices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits quads [Q, 4] along the shorter diagonal (rounded, so that mirrored quads split alike)."""
    corner = vertices[quads]
    first = np.linalg.norm(corner[:, 0] - corner[:, 2], axis=1)
    second = np.linalg.norm(corner[:, 1] - corner[:, 3], axis=1)
    # On a tie take the diagonal that starts at the corner nearest the mid-plane and lowest: the same on both sides.
    key = np.round(np.abs(corner[..., 0]), 5) + 1e-3 * np.round(corner[..., 1], 5) + 1e-6 * corner[..., 2]
    tie = np.argmin(key, axis=1) % 2 == 0
    even = np.where(np.abs(first - second) < 1e-5, tie, first < second)
    a, b = np.array([[0, 1, 2], [0, 2, 3]]), np.array([[1, 2, 3], [1, 3, 0]])
    pick = np.where(even[:, None, None], a, b).reshape(len(quads), 6)
    faces = np.take_along_axis(quads, pick, axis=1).reshape(-1, 3)
    return faces, np.take_along_axis(uvs, pick, axis=1).reshape(-1, 3)


def _cut(faces: np.ndarray, uvs: np.ndarray, quad: np.ndarray, vertices: np.ndarray):
    """Keeps what lies inside the cutting ellipsoid, splitting the triangles that cross it.

    Returns rows [N', N] (old vertices, some snapped onto the rim, then new ones), faces [F, 3], uvs [F, 3, 2] and
    quad [F].
    """
    n = len(vertices)
    value = 1 - np.linalg.norm((vertices - CUT_CENTER) / CUT_AXES, axis=1)
    near = faces[(value[faces] > 0).any(axis=1)]
    edges = np.unique(np.sort(np.concatenate([near[:, [0, 1]], near[:, [1, 2]], near[:, [2, 0]]]), axis=1), axis=0)
    edges = edges[(value[edges[:, 0]] > 0) != (value[edges[:, 1]] > 0)]
    identity = sparse.identity(n, format="lil")
    # Shortest snap first; a vertex snaps once, and its value becomes exactly zero: it lies on the rim.
    t = value[edges[:, 0]] / (value[edges[:, 0]] - value[edges[:, 1]])
    candidates = [(t[i], a, b) for i, (a, b) in enumerate(edges)] + [(1 - t[i], b, a) for i, (a, b) in enumerate(edges)]
    for share, a, b in sorted(candidates):
        if share < _SNAP and value[a] != 0:
            identity[a, a], identity[a, b] = 1 - share, share
            value[a] = 0
    rows = [identity.tocsr()]
    fresh: dict[tuple[int, int], int] = {}
    new_faces, new_uvs, new_quad = [], [], []

    def crossing(a: int, b: int) -> int:
        key = (min(a, b), max(a, b))
        if key not in fresh:
            fresh[key] = n + len(fresh)
            t = value[key[0]] / (value[key[0]] - value[key[1]])
            row = sparse.csr_matrix(([1 - t, t], ([0, 0], key)), shape=(1, n))
            rows.append(row)
        return fresh[key]

    sign = np.sign(value).astype(int)
    keep = np.flatnonzero((sign[faces] >= 0).all(axis=1) & (sign[faces] > 0).any(axis=1))
    split = np.flatnonzero((sign[faces] > 0).any(axis=1) & (sign[faces] < 0).any(axis=1))
    for f in split:
        polygon, corners = [], []
        for k in range(3):
            a, b = int(faces[f, k]), int(faces[f, (k + 1) % 3])
            if sign[a] >= 0:
                polygon.append(a)
                corners.append(uvs[f, k])
            if sign[a] * sign[b] < 0:
                polygon.append(crossing(a, b))
                t = value[a] / (value[a] - value[b])
                corners.append((1 - t) * uvs[f, k] + t * uvs[f, (k + 1) % 3])
        for k in range(1, len(polygon) - 1):
            new_faces.append([polygon[0], polygon[k], polygon[k + 1]])
            new_uvs.append([corners[0], corners[k], corners[k + 1]])
            new_quad.append(quad[f])
    return (
        sparse.vstack(rows, format="csr"),
        np.concatenate([faces[keep], np.array(new_faces, np.int64).reshape(-1, 3)]),
        np.concatenate([uvs[keep], np.array(new_uvs).reshape(-1, 3, 2)]),
        np.concatenate([quad[keep], np.array(new_quad, np.int64)]),
    )


def _twins(members: np.ndarray, vertices: np.ndarray) -> np.ndarray:
    """[N] for each of `members` the member nearest to its mirror image; others map to themselves."""
    twins = np.arange(len(vertices))
    twins[members] = members[cKDTree(vertices[members]).query(vertices[members] * [-1, 1, 1])[1]]
    return twins


def boundary_loops(faces: np.ndarray) -> list[list[int]]:
    """Vertex loops along the open edges of a triangle mesh, each in the direction of its faces."""
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).tolist()
    present = {(a, b) for a, b in edges}
    after = {a: b for a, b in edges if (b, a) not in present}
    loops = []
    while after:
        start = min(after)
        loop, at = [start], after.pop(start)
        while at != start:
            loop.append(at)
            at = after.pop(at)
        loops.append(loop)
    return loops


def _capped(faces: np.ndarray, uvs: np.ndarray, quad: np.ndarray, vertices: np.ndarray):
    """Closes a row of teeth, which the base mesh leaves open towards the gums, and turns its faces outward."""
    cap = _cap(faces, vertices)
    faces = np.concatenate([faces, cap])
    if signed_volume(vertices, faces) < 0:
        faces = faces[:, ::-1]
    uvs = np.concatenate([uvs, np.zeros((len(cap), 3, 2))])
    return faces, uvs, np.concatenate([quad, quad.max() + 1 + np.arange(len(cap))])


def signed_volume(vertices: np.ndarray, faces: np.ndarray) -> float:
    """Volume of a closed mesh in the cube of its unit, positive when its faces look outward."""
    p, q, r = (vertices[faces[:, k]] for k in range(3))
    return float(np.einsum("fi,fi->", p, np.cross(q, r)) / 6)


def _cap(faces: np.ndarray, vertices: np.ndarray) -> np.ndarray:
    """Triangles of least total area that close each open loop (dynamic programming over the loop)."""
    out: list[list[int]] = []
    for loop in boundary_loops(faces):
        ring = loop[::-1]  # the cap runs against the direction of the faces it joins
        p, m = vertices[ring], len(ring)
        cost, choice = np.zeros((m, m)), np.zeros((m, m), np.int64)
        for gap in range(2, m):
            for i in range(m - gap):
                j = i + gap
                k = np.arange(i + 1, j)
                area = np.linalg.norm(np.cross(p[k] - p[i], p[j] - p[i]), axis=1)
                total = cost[i, k] + cost[k, j] + area
                choice[i, j] = k[np.argmin(np.round(total, 10))]
                cost[i, j] = total.min()
        stack = [(0, m - 1)]
        while stack:
            i, j = stack.pop()
            if j - i > 1:
                k = int(choice[i, j])
                out.append([ring[i], ring[k], ring[j]])
                stack += [(i, k), (k, j)]
    return np.array(out)


def _eyeball(members: np.ndarray, vertices: np.ndarray):
    """A finer sphere in the place of the 72 vertices of the base mesh's eyeball, with rings for pupil and iris.

    Its vertices are the combinations of least norm that are exact for every affine motion of the eyeball.
    Returns rows [M, N], faces [F, 3], coarse [M] bool.
    """
    old = vertices[members]
    center = old.mean(axis=0)  # its rings lie symmetrically, so this is the sphere's centre
    radius = np.linalg.norm(old - center, axis=1).mean()
    polar = np.radians(EYE_RINGS)
    around = 2 * np.pi * np.arange(EYE_MERIDIANS) / EYE_MERIDIANS
    ring = np.stack(
        [
            np.sin(polar)[:, None] * np.cos(around),
            np.sin(polar)[:, None] * np.sin(around),
            np.broadcast_to(np.cos(polar)[:, None], (len(polar), EYE_MERIDIANS)),
        ],
        axis=-1,
    ).reshape(-1, 3)
    points = center + radius * np.concatenate([[[0, 0, 1]], ring, [[0, 0, -1]]])
    affine = np.concatenate([(old - center) / radius, np.ones((len(old), 1))], axis=1)
    wanted = np.concatenate([(points - center) / radius, np.ones((len(points), 1))], axis=1)
    weights = wanted @ np.linalg.solve(affine.T @ affine, affine.T)
    rows = sparse.csr_matrix(
        (weights.ravel(), (np.repeat(np.arange(len(points)), len(members)), np.tile(members, len(points)))),
        shape=(len(points), len(vertices)),
    )
    faces = sphere_faces(len(EYE_RINGS), EYE_MERIDIANS)
    coarse = np.zeros(len(points), bool)
    coarse[[0, -1]] = True
    for r in EYE_COARSE_RINGS:
        coarse[1 + r * EYE_MERIDIANS : 1 + (r + 1) * EYE_MERIDIANS : 2] = True
    return rows, faces, coarse


def sphere_faces(rings: int, meridians: int) -> np.ndarray:
    """Outward faces of a sphere: front pole, `rings` rings of `meridians` counter-clockwise vertices, back pole."""
    i = np.arange(meridians)
    j = (i + 1) % meridians
    last = 1 + rings * meridians
    front = np.stack([np.zeros_like(i), 1 + i, 1 + j], axis=1)
    back = np.stack([np.full_like(i, last), last - meridians + j, last - meridians + i], axis=1)
    bands = []
    for r in range(rings - 1):
        a, b = 1 + r * meridians, 1 + (r + 1) * meridians
        bands += [np.stack([a + i, b + i, b + j], axis=1), np.stack([a + i, b + j, a + j], axis=1)]
    return np.concatenate([front, *bands, back])


def _mirror(vertices: np.ndarray, part: np.ndarray) -> np.ndarray:
    """[V] index of each vertex' mirror image across x = 0 (0.3 mm tolerance), -1 where there is none."""
    twin = np.array([0, 2, 1, 3, 4, 5])
    mirror = np.full(len(vertices), -1)
    for p in range(6):
        here, there = np.flatnonzero(part == p), np.flatnonzero(part == twin[p])
        distance, index = cKDTree(vertices[there]).query(vertices[here] * [-1, 1, 1])
        mirror[here] = np.where(distance < 3e-4, there[index], -1)
    # Only mutual pairs count.
    ok = (mirror >= 0) & (mirror[np.maximum(mirror, 0)] == np.arange(len(vertices)))
    return np.where(ok, mirror, -1)


def _regions(wheel, vertices, faces, uvs, quads, part, mirror) -> np.ndarray:
    """[F] regions: eyes, teeth and tongue by part; skin by the painted masks and by position.

    Decided once per quad of the base mesh: borders then follow the mesh's lines instead of the triangles' zigzag.
    """
    index = {name: i for i, name in enumerate(REGIONS)}
    size = np.bincount(quads)

    def per_quad(value: np.ndarray) -> np.ndarray:
        return (np.bincount(quads, value) / size)[quads]

    center = np.stack([per_quad(c) for c in vertices[faces].mean(axis=1).T], axis=1)
    owner = part[faces[:, 0]]
    skin = owner == 0

    def painted(name: str) -> np.ndarray:
        mask = wheel.mask(name)
        h, w = mask.shape
        # Mean over the centre and three points inside the triangle.
        bary = np.array([[1, 1, 1], [4, 1, 1], [1, 4, 1], [1, 1, 4]]) / np.array([[3], [6], [6], [6]])
        at = np.einsum("pk,fkc->fpc", bary, uvs)
        x = np.clip((at[..., 0] * w).astype(int), 0, w - 1)
        y = np.clip(((1 - at[..., 1]) * h).astype(int), 0, h - 1)
        return per_quad(_symmetric(mask[y, x].mean(axis=1), faces, mirror))

    x, y, z = center.T
    x = np.abs(x)
    region = np.full(len(faces), index["face"])
    region[skin & (y > np.interp(z, *HAIR_LINE.T))] = index["scalp"]
    region[skin & (y < JAW_LINE[0] + JAW_LINE[1] * z)] = index["neck"]
    region[skin & (y < SHOULDER_LINE[0] + SHOULDER_LINE[1] * z + SHOULDER_LINE[2] * x)] = index["shoulders"]
    nose = np.interp(y, *NOSE_WIDTH.T, left=0, right=0)
    region[skin & (x < nose) & (z > 0.03)] = index["nose"]
    brow = np.interp(x, *BROW_LINE.T, left=-1, right=-1)
    region[skin & (z > 0) & (np.abs(y - brow) < BROW_HALF_HEIGHT)] = index["brows"]
    region[skin & (painted("ears") > 0.5)] = index["ears"]
    region[skin & (painted("eyelids") > 0.5)] = index["lids"]
    region[skin & (painted("lips") > 0.5)] = index["lips"]
    region[skin & (painted("inside-mouth") > 0.5)] = index["mouth_inside"]
    for p in (1, 2):
        ball = vertices[part == p]
        middle = (ball.min(axis=0) + ball.max(axis=0)) / 2
        radius = np.abs(ball - middle).max()
        # The skin behind the eyeball, which nobody sees: all that dips into it or lies around its back half.
        distance = np.linalg.norm(center - middle, axis=1)
        hidden = (distance < SOCKET[0] * radius) | ((distance < SOCKET[1] * radius) & (z < middle[2] + 0.4 * radius))
        region[skin & hidden] = index["sockets"]
    region[owner == 3], region[owner == 4], region[owner == 5] = index["teeth"], index["teeth"], index["tongue"]
    for p in (1, 2):
        own = np.flatnonzero(owner == p)
        region[own] = eye_regions(faces[own], np.flatnonzero(part == p)[0])
    return region


def eye_regions(faces: np.ndarray, first: int) -> np.ndarray:
    """[F] pupil, iris or eyes (the white) for the faces of an eyeball.

    Args:
      faces: [F, 3] vertex indices of the full sphere.
      first: index of its front pole.
    """
    outer = (faces - first - 1).max(axis=1) // EYE_MERIDIANS  # outermost ring a face touches
    names = np.where(outer < PUPIL_RINGS, "pupil", np.where(outer < IRIS_RINGS, "iris", "eyes"))
    return np.array([REGIONS.index(name) for name in names])


def _symmetric(value: np.ndarray, faces: np.ndarray, mirror: np.ndarray) -> np.ndarray:
    """Averages a per-face value with that of the mirrored face where there is one."""
    lookup = {tuple(sorted(face)): i for i, face in enumerate(faces.tolist())}
    twin = [lookup.get(tuple(sorted(face)), i) for i, face in enumerate(mirror[faces].tolist())]
    return (value + value[twin]) / 2
