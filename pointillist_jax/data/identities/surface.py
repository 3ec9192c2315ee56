"""Even random points on a head's surface, and flat Gaussians on them."""

from __future__ import annotations

import dataclasses

import numpy as np

from pointillist_jax.data.identities.anatomy import Anatomy, face_normals, unit, vertex_normals


@dataclasses.dataclass(frozen=True)
class SurfacePoints:
    """P points on a mesh.

    Attributes:
      faces: [P] face of each.
      barycentrics: [P, 3].
      positions: [P, 3] metres, on the identity's neutral mesh.
      normals: [P, 3] smooth unit normals.
      template: [P, 3] the same places in template coordinates.
      spacing: [P] metres, about the distance between neighbours here.
    """

    faces: np.ndarray
    barycentrics: np.ndarray
    positions: np.ndarray
    normals: np.ndarray
    template: np.ndarray
    spacing: np.ndarray

    def __len__(self) -> int:
        return len(self.faces)

    def take(self, rows: np.ndarray) -> SurfacePoints:
        return SurfacePoints(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))

    def blend(self, anatomy: Anatomy, values: np.ndarray) -> np.ndarray:
        """Values of vertices [V, ...] interpolated at the points."""
        return np.einsum("pc,pc...->p...", self.barycentrics, values[anatomy.faces[self.faces]])


def scatter(
    anatomy: Anatomy, vertices: np.ndarray, spacing: np.ndarray, rng: np.random.Generator, oversample: float = 4.0
) -> SurfacePoints:
    """Poisson-disc samples: no two nearer than `spacing` [F] of their faces (metres; infinite leaves a face empty).

    Layers do not push each other away (a lid and the eye behind it): only points with like normals compete.
    """
    from scipy.spatial import cKDTree

    faces = anatomy.faces
    doubled = face_normals(vertices, faces)
    area = np.linalg.norm(doubled, axis=1) / 2
    expected = oversample * area / spacing**2
    counts = rng.poisson(expected)
    owner = np.repeat(np.arange(len(faces)), counts)
    root = np.sqrt(rng.random(len(owner)))
    second = rng.random(len(owner))
    bary = np.stack([1 - root, root * (1 - second), root * second], axis=1)
    points = np.einsum("pc,pca->pa", bary, vertices[faces[owner]])
    order = rng.permutation(len(owner))
    owner, bary, points = owner[order], bary[order], points[order]
    radius, normals = spacing[owner], unit(doubled)[owner]

    tree = cKDTree(points)
    near = tree.query_ball_point(points, radius)
    alive = np.ones(len(points), bool)
    chosen = []
    for i, neighbours in enumerate(near):
        if alive[i]:
            chosen.append(i)
            rivals = np.asarray(neighbours)
            alive[rivals[normals[rivals] @ normals[i] > 0.2]] = False
    chosen = np.array(chosen, int)
    # Random points leave gaps: a point that has to cover more of the surface alone is made larger.
    reach = np.zeros(len(chosen))
    if len(chosen):
        distance, nearest = cKDTree(points[chosen]).query(points)
        np.maximum.at(reach, nearest, distance)
    size = np.clip(1.3 * reach, 0.85 * radius[chosen], 1.5 * radius[chosen])
    return locate(anatomy, vertices, owner[chosen], bary[chosen], size)


def locate(
    anatomy: Anatomy, vertices: np.ndarray, faces: np.ndarray, barycentrics: np.ndarray, spacing: np.ndarray | float
) -> SurfacePoints:
    """The points with these faces and barycentric coordinates."""
    corners = anatomy.faces[faces]

    def at(values: np.ndarray) -> np.ndarray:
        return np.einsum("pc,pca->pa", barycentrics, values[corners])

    return SurfacePoints(
        faces=faces,
        barycentrics=barycentrics,
        positions=at(vertices),
        normals=unit(at(vertex_normals(vertices, anatomy.faces))),
        template=at(anatomy.template),
        spacing=np.broadcast_to(np.asarray(spacing, np.float64), faces.shape),
    )


@dataclasses.dataclass
class Splats:
    """G Gaussians around the neutral mesh, before they are made local to their faces (NumPy, metres).

    Attributes:
      means: [G, 3].
      axes: [G, 3, 3] orthonormal columns.
      scales: [G, 3] standard deviations along the axes.
      opacities: [G].
      colors: [G, 3].
      binding: [G] face.
      part: name of the part they belong to.
    """

    means: np.ndarray
    axes: np.ndarray
    scales: np.ndarray
    opacities: np.ndarray
    colors: np.ndarray
    binding: np.ndarray
    part: str

    def __len__(self) -> int:
        return len(self.means)


def discs(
    points: SurfacePoints, colors: np.ndarray, part: str, *, spread: float = 0.62, lift: float = 0.0, opacity=0.985
) -> Splats:
    """Flat Gaussians that tile the surface: `spread` standard deviations per spacing."""
    sigma = spread * points.spacing
    first = unit(np.cross(points.normals, np.where(np.abs(points.normals[:, :1]) > 0.9, [[0, 1.0, 0]], [[1.0, 0, 0]])))
    axes = np.stack([first, np.cross(points.normals, first), points.normals], axis=-1)
    return Splats(
        means=points.positions + lift * points.normals,
        axes=axes,
        scales=np.stack([sigma, sigma, 0.18 * sigma], axis=1),
        opacities=np.broadcast_to(opacity, sigma.shape).copy(),
        colors=np.clip(colors, 0.0, 1.0),
        binding=points.faces,
        part=part,
    )


class Collider:
    """The head's outer surface as points with normals; keeps hair and beards outside."""

    def __init__(self, anatomy: Anatomy, vertices: np.ndarray):
        from scipy.spatial import cKDTree

        # Three rounds of midpoints bring the coarse head's points as near to each other as the full head's.
        keep = anatomy.outside
        triangles = vertices[anatomy.faces[keep]]
        smooth = vertex_normals(vertices, anatomy.faces)[anatomy.faces[keep]]
        bary = np.array([[1, 1, 1], [4, 1, 1], [1, 4, 1], [1, 1, 4], [3, 3, 0], [0, 3, 3], [3, 0, 3]]) / [
            [3], [6], [6], [6], [6], [6], [6],
        ]  # fmt: skip
        self._points = np.einsum("kc,fca->fka", bary, triangles).reshape(-1, 3)
        normals = unit(np.einsum("kc,fca->fka", bary, smooth)).reshape(-1, 3)
        # The folds of an ear point everywhere: hair meets them as a plate that faces sideways.
        ears = np.repeat(anatomy.faces_of("ears")[keep], len(bary))
        normals[ears] = unit(np.stack([np.sign(self._points[:, 0]), 0 * normals[:, 1], 0 * normals[:, 2]], axis=1))[
            ears
        ]
        self._normals = normals
        self._tree = cKDTree(self._points)

    def nearest(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Signed distance [P] (negative inside) and outward normal [P, 3] of the surface nearest to points [P, 3]."""
        _, index = self._tree.query(points)
        normals = self._normals[index]
        offset = points - self._points[index]
        return np.einsum("pa,pa->p", offset, normals), normals

    def push_out(self, points: np.ndarray, clearance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Points [P, 3] at least `clearance` [P] away from the surface, and the normals there."""
        distance, normals = self.nearest(points)
        # Far below a surface is beyond its rim: what hangs past the end of the shoulders hangs freely.
        short = np.where(distance > -_DEEPEST, np.maximum(clearance - distance, 0), 0)
        return points + short[:, None] * normals, normals


# No step of a lock reaches deeper than this below the skin, metres.
_DEEPEST = 0.03
