"""Fewer faces: quadric edge collapse onto existing vertices, in several poses and identities at once, mirrored.

Every collapse moves a vertex onto a neighbour (Garland & Heckbert 1997, subset placement), so the vertices that stay
keep all their attributes. The error is summed over K shapes of the same mesh (closed eyes, open mouth, other people),
so that lids, lips and noses stay where any of them needs them. Letters: V vertices, F faces, K shapes.
"""

from __future__ import annotations

import heapq

import numpy as np
from tqdm import tqdm

# A plane through an open or region edge, across the surface, weighs this much against the surface's own planes.
_RIM_WEIGHT, _SEAM_WEIGHT = 30.0, 3.0
# Squared edge length's share in the cost: decides among flat neighbours, and keeps triangles compact.
_LENGTH_WEIGHT = 2e-3
# A face may turn by at most acos(0.3) = 73° in any of the shapes, and its compactness not fall below this.
_MIN_TURN, _MIN_COMPACT = 0.3, 0.06


def decimate(
    shapes: np.ndarray, faces: np.ndarray, weights: np.ndarray, seams: np.ndarray, mirror: np.ndarray, target: int
) -> np.ndarray:
    """Collapses edges until at most `target` faces are left or none may go.

    Manifoldness and the number of boundary loops are kept (link condition).

    Args:
      shapes: [K, V, 3] the same mesh in K shapes; the first is the neutral one.
      faces: [F, 3].
      weights: [F] importance of each face's surface.
      seams: [F] labels; edges between different ones are held in place.
      mirror: [V] mirrored vertex, or -1. Collapses are made in mirrored pairs.
      target: faces to keep.

    Returns:
      [F', 3] faces of the old vertices together with the index of the old face each came from, as [F', 4].
    """
    return _Collapser(shapes, faces, weights, seams, mirror).run(target)


class _Collapser:
    def __init__(self, shapes, faces, weights, seams, mirror):
        self.x = np.ascontiguousarray(shapes.transpose(1, 0, 2))  # [V, K, 3]
        self.faces = [tuple(f) for f in faces.tolist()]
        self.alive = [True] * len(self.faces)
        self.mirror = mirror.tolist()
        self.around: list[set[int]] = [set() for _ in range(len(self.x))]
        for i, face in enumerate(self.faces):
            for v in face:
                self.around[v].add(i)
        self.quadric = _quadrics(self.x, faces, weights, seams)
        self.version = [0] * len(self.x)
        self.heap: list[tuple[float, int, int, int, int]] = []
        self.count = len(self.faces)

    def run(self, target: int) -> np.ndarray:
        for v in range(len(self.x)):
            self._push(v, self._neighbours(v))
        with tqdm(total=self.count - target, desc="collapse", unit="face") as bar:
            while self.count > target and self.heap:
                _, u, v, version_u, version_v = heapq.heappop(self.heap)
                if (version_u, version_v) != (self.version[u], self.version[v]):
                    continue
                before = self.count
                self._collapse_pair(u, v)
                bar.update(before - self.count)
        kept = [i for i, alive in enumerate(self.alive) if alive]
        return np.array([(*self.faces[i], i) for i in kept])

    def _neighbours(self, v: int) -> set[int]:
        return {w for i in self.around[v] for w in self.faces[i]} - {v}

    def _push(self, u: int, others: set[int]) -> None:
        """Queues the collapses of u onto its neighbours."""
        if not others:
            return
        index = np.array(sorted(others))
        q = self.quadric[u] + self.quadric[index]  # [n, K, 11]
        length = ((self.x[index] - self.x[u]) ** 2).sum(axis=-1)  # [n, K]
        area = q[..., 9]
        cost = (_evaluate(q, self.x[index]) + _LENGTH_WEIGHT * area * length).sum(axis=1)
        for v, c in zip(index.tolist(), cost.tolist(), strict=True):
            heapq.heappush(self.heap, (c, u, v, self.version[u], self.version[v]))

    def _collapse_pair(self, u: int, v: int) -> None:
        mu, mv = self.mirror[u], self.mirror[v]
        if mu == v or (mu == u and mv != v):
            return  # would leave the mid-plane, or fold two mirrored vertices into one side
        single = mu < 0 or mv < 0 or (mu == u and mv == v)
        if not self._allowed(u, v) or not (single or self._allowed(mu, mv)):
            return
        self._collapse(u, v)
        if not single and self._allowed(mu, mv):
            self._collapse(mu, mv)

    def _allowed(self, u: int, v: int) -> bool:
        around_u, around_v = self.around[u], self.around[v]
        shared = around_u & around_v
        if not shared:
            return False
        near_u, near_v = self._neighbours(u), self._neighbours(v)
        opposite = {w for i in shared for w in self.faces[i]} - {u, v}
        # Link condition: the only common neighbours are those across the edge's own faces.
        if near_u & near_v != opposite or len(opposite) != len(shared):
            return False
        rim_u = len(near_u) != len(around_u)
        rim_v = len(near_v) != len(around_v)
        if rim_u and len(shared) != 1:
            return False  # a rim vertex only slides along the rim
        if len(shared) == 1 and not (rim_u and rim_v):
            return False
        # Nothing may become a double-sided sliver or a lone tetrahedron, and no vertex may lose its fan.
        if any(len(self.around[w]) <= 3 for w in opposite) or len(around_u | around_v) - len(shared) < 4:
            return False
        moved = [self.faces[i] for i in around_u - shared]
        if not moved:
            return False
        old = np.array(moved)
        new = np.where(old == u, v, old)
        n0, n1 = self._normals(old), self._normals(new)
        l0, l1 = np.linalg.norm(n0, axis=-1), np.linalg.norm(n1, axis=-1)
        if ((n0 * n1).sum(axis=-1) < _MIN_TURN * l0 * l1).any() or (l1 < 1e-9).any():
            return False
        p = self.x[new]
        edges = ((p - np.roll(p, 1, axis=1)) ** 2).sum(axis=(1, 3))
        compact = 2 * np.sqrt(3) * l1 / edges
        worst = 2 * np.sqrt(3) * l0 / ((self.x[old] - np.roll(self.x[old], 1, axis=1)) ** 2).sum(axis=(1, 3))
        # Only the neutral shape is asked for compact triangles; closed lids fold them anyway.
        return bool((compact[:, 0] > np.minimum(_MIN_COMPACT, worst[:, 0])).all())

    def _normals(self, faces: np.ndarray) -> np.ndarray:
        p, q, r = (self.x[faces[:, k]] for k in range(3))
        return np.cross(q - p, r - p)

    def _collapse(self, u: int, v: int) -> None:
        for i in list(self.around[u]):
            face = self.faces[i]
            if v in face:
                self.alive[i] = False
                self.count -= 1
                for w in face:
                    self.around[w].discard(i)
            else:
                self.faces[i] = tuple(v if w == u else w for w in face)
                self.around[v].add(i)
        self.around[u] = set()
        self.quadric[v] += self.quadric[u]
        self.version[u] += 1
        self.version[v] += 1
        near = self._neighbours(v)
        # Costs of edges that end in v changed; others near it may have become allowed: queue them again.
        self._push(v, near)
        for w in sorted(near):
            self._push(w, {v} | self._neighbours(w))


def _quadrics(x: np.ndarray, faces: np.ndarray, weights: np.ndarray, seams: np.ndarray) -> np.ndarray:
    """[V, K, 11] sums of weighted squared distances to planes, in `_plane_terms`' order."""
    v, k, _ = x.shape
    quadric = np.zeros((v, k, 11))
    normal = np.cross(x[faces[:, 1]] - x[faces[:, 0]], x[faces[:, 2]] - x[faces[:, 0]])
    double = np.linalg.norm(normal, axis=-1, keepdims=True)
    normal = normal / np.maximum(double, 1e-20)
    term = _plane_terms(normal, x[faces[:, 0]]) * (weights[:, None, None] * double / 6)
    for corner in range(3):
        np.add.at(quadric, faces[:, corner], term)
    sides: dict[tuple[int, int], list[int]] = {}
    for i, face in enumerate(faces.tolist()):
        for c in range(3):
            a, b = face[c], face[(c + 1) % 3]
            sides.setdefault((min(a, b), max(a, b)), []).append(i)
    for (a, b), owners in sides.items():
        rim = len(owners) == 1
        if not rim and seams[owners[0]] == seams[owners[1]]:
            continue
        for i in owners:
            edge = x[b] - x[a]
            across = np.cross(edge, normal[i])
            across /= np.maximum(np.linalg.norm(across, axis=-1, keepdims=True), 1e-20)
            size = (edge**2).sum(axis=-1, keepdims=True) * (_RIM_WEIGHT if rim else _SEAM_WEIGHT)
            held = _plane_terms(across, x[a]) * size * max(weights[owners])
            held[..., 9] = 0
            quadric[a] += held
            quadric[b] += held
    return quadric


def _plane_terms(normal: np.ndarray, point: np.ndarray) -> np.ndarray:
    """[..., 3] unit normal and a point of planes → [..., 11]: xx, xy, xz, yy, yz, zz, xd, yd, zd, weight, dd."""
    a, b, c = np.moveaxis(normal, -1, 0)
    d = -(normal * point).sum(axis=-1)
    return np.stack([a * a, a * b, a * c, b * b, b * c, c * c, a * d, b * d, c * d, np.ones_like(d), d * d], axis=-1)


def _evaluate(q: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Quadrics [..., 11] at points [..., 3]."""
    x, y, z = np.moveaxis(p, -1, 0)
    return (
        q[..., 0] * x * x + q[..., 3] * y * y + q[..., 5] * z * z
        + 2 * (q[..., 1] * x * y + q[..., 2] * x * z + q[..., 4] * y * z)
        + 2 * (q[..., 6] * x + q[..., 7] * y + q[..., 8] * z)
        + q[..., 10]
    )  # fmt: skip
