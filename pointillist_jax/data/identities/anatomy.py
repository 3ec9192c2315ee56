"""What all people on one head model share: regions, landmarks, occlusion and how far each face stretches.

Places on a head are named in *template coordinates*: the model's mean face, moved and scaled so that its eyes lie where
the open head's do (metres; x to the subject's left, y up, z to the viewer). Lines chosen by eye, such as a hairline,
are functions of them, so they fit every identity and, roughly, every head model in FLAME's layout.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from pointillist_jax.flame import FlameModel, flame_vertices

# Where the open head's eyes are: the middle between them and half their distance.
_EYES_MIDDLE, _EYE_OFFSET = np.array([0.0, 0.025, 0.034]), 0.029
# The expressions that unfold skin; a head without names (FLAME) stretches by its jaw alone.
_UNFOLDING = (
    ("eye-left-closure", "eye-right-closure"),
    ("eye-left-slit", "eye-right-slit"),
    ("mouth-corner-puller",),
    ("mouth-upward-retraction",),
    ("mouth-part-later",),
    ("mouth-depression-retraction",),
    ("eyebrows-left-up", "eyebrows-right-up"),
)
# Triangles of these turn with the skull alone: a lock of hair or a pair of glasses bound to them stays rigid.
_RIGID_MILLIMETRES = 0.25
_INSIDE = ("mouth_inside", "sockets", "teeth", "tongue", "eyes", "iris", "pupil")


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """Letters: V vertices, F faces.

    Attributes:
      model: the head.
      faces: [F, 3].
      template: [V, 3] template coordinates of the mean face, mouth closed.
      unit: metres per template metre.
      regions: name → [V] in [0, 1], soft at the borders.
      face_regions: name → [F] bool.
      outside: [F] bool, skin that light reaches.
      light: [V] in [0, 1], sky light that arrives, ambient occlusion included.
      stretch: [F] ≥ 1, the largest growth of a face's area over the poses that unfold skin.
      rigid: [F] bool, faces that move with the skull as one.
      rim: [F] bool, faces at the lower end of the mesh.
    """

    model: FlameModel
    faces: np.ndarray
    template: np.ndarray
    unit: float
    regions: dict[str, np.ndarray]
    face_regions: dict[str, np.ndarray]
    outside: np.ndarray
    light: np.ndarray
    stretch: np.ndarray
    rigid: np.ndarray
    rim: np.ndarray

    def region(self, name: str) -> np.ndarray:
        """[V] soft membership; zeros for a region the model does not have."""
        return self.regions.get(name, np.zeros(len(self.template)))

    def faces_of(self, *names: str) -> np.ndarray:
        """[F] bool."""
        none = np.zeros(len(self.faces), bool)
        return np.any([self.face_regions.get(name, none) for name in names], axis=0)


def study(model: FlameModel) -> Anatomy:
    """Measures a head model once; a second or two. Pass the result to `sample_identity` for every person."""
    neutral = model.neutral_params()
    vertices = np.asarray(flame_vertices(model, neutral), np.float64)
    faces = np.asarray(model.faces)
    eyes = (np.asarray(model.joint_regressor, np.float64) @ vertices)[3:5]
    unit = max(np.linalg.norm(eyes[0] - eyes[1]) / 2, 1e-6) / _EYE_OFFSET
    template = (vertices - eyes.mean(axis=0)) / unit + _EYES_MIDDLE

    face_regions = {
        name: np.asarray(model.face_regions) == i for i, name in enumerate(model.region_names) if name != "head"
    }
    if "eyes" not in face_regions:
        weights = np.asarray(model.skin_weights)[faces].mean(axis=1)
        face_regions["eyes"] = weights[:, 3:5].sum(axis=1) > 0.5
    inside = np.any([face_regions[name] for name in _INSIDE if name in face_regions], axis=0)

    poses = [neutral.replace(jaw_pose=neutral.jaw_pose.at[0].set(0.3))]
    for names in _UNFOLDING:
        if all(name in model.expr_names for name in names):
            index = np.array([model.expr_names.index(name) for name in names])
            poses.append(neutral.replace(expr=neutral.expr.at[index].set(1.0)))
    posed = [np.asarray(flame_vertices(model, pose), np.float64) for pose in poses]
    area = np.linalg.norm(face_normals(vertices, faces), axis=1)
    areas = [np.linalg.norm(face_normals(v, faces), axis=1) for v in posed]
    stretch = np.clip(np.max([area, *areas], axis=0) / np.maximum(area, 1e-12), 1.0, 8.0)

    directions = np.abs(np.asarray(model.expr_dirs)).sum(axis=1).max(axis=1)
    skull = np.asarray(model.skin_weights)[:, 1] > 0.999
    still = skull & (directions < 1e-3 * _RIGID_MILLIMETRES)
    return Anatomy(
        model=model,
        faces=faces,
        template=template,
        unit=float(unit),
        regions={name: _soft(faces, mask, len(vertices)) for name, mask in face_regions.items()},
        face_regions=face_regions,
        outside=~inside,
        light=_sky_light(vertices, faces, ~inside),
        stretch=stretch,
        rigid=still[faces].all(axis=1) & ~inside,
        rim=_rim(faces, len(vertices)) & ~inside,
    )


def identity_vertices(model: FlameModel, shape: np.ndarray) -> np.ndarray:
    """[V, 3] float64 of an identity, neutral and with its mouth closed."""
    params = model.neutral_params().replace(shape=jnp.asarray(shape, jnp.float32))
    return np.asarray(flame_vertices(model, params), np.float64)


def face_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """[F, 3] outward, as long as twice the area."""
    p, q, r = (vertices[faces[:, k]] for k in range(3))
    return np.cross(q - p, r - p)


def vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """[V, 3] unit, weighted by area."""
    face = face_normals(vertices, faces)
    total = np.stack([np.bincount(faces.T.ravel(), np.tile(n, 3), len(vertices)) for n in face.T], axis=1)
    return unit(total)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def smoothstep(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 at `low`, 1 at `high` (which may be the smaller), smooth between."""
    t = np.clip((x - low) / (high - low), 0.0, 1.0)
    return t * t * (3 - 2 * t)


def azimuth(points: np.ndarray) -> np.ndarray:
    """Degrees around the head's vertical axis in template coordinates: 0 in front, ±90 at the ears, ±180 behind."""
    return np.degrees(np.arctan2(points[..., 0], points[..., 2] + 0.035))


def _rim(faces: np.ndarray, num_vertices: int) -> np.ndarray:
    """[F] faces with a vertex on an open edge."""
    pairs = np.sort(np.concatenate([faces[:, [i, (i + 1) % 3]] for i in range(3)]), axis=1)
    edges, uses = np.unique(pairs, axis=0, return_counts=True)
    open_vertices = np.zeros(num_vertices, bool)
    open_vertices[edges[uses == 1]] = True
    return open_vertices[faces].any(axis=1)


def _soft(faces: np.ndarray, mask: np.ndarray, num_vertices: int) -> np.ndarray:
    """Share of a vertex's faces that belong to the region."""
    corner = faces.T.ravel()
    count = np.bincount(corner, minlength=num_vertices)
    return np.bincount(corner, np.tile(mask.astype(np.float64), 3), num_vertices) / np.maximum(count, 1)


def _sky_light(vertices: np.ndarray, faces: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """[V] in [0, 1]: how much of a soft sky, brightest above and in front, each vertex sees.

    Faces are taken as discs that shade each other (Bunnell 2005); only those that face a vertex block its light.
    What lies inside the mouth and the sockets is left in the dark.
    """
    normals = vertex_normals(vertices, faces)
    area2 = face_normals(vertices, faces)
    areas, centers = np.linalg.norm(area2, axis=1) / 2, vertices[faces].mean(axis=1)
    face = unit(area2)
    # Thousands of tiny faces in the ears add nothing but time.
    heavy = outside & (areas > 0.05 * np.median(areas))
    areas, centers, face = areas[heavy], centers[heavy], face[heavy]
    seen = np.unique(faces[outside])
    light = np.full(len(vertices), 0.3)
    for start in range(0, len(seen), 512):
        rows = seen[start : start + 512]
        offset = (centers[None] - vertices[rows][:, None]).astype(np.float32)
        square = np.einsum("vfa,vfa->vf", offset, offset) + 1e-8
        inverse = 1 / np.sqrt(square)
        receive = np.maximum(np.einsum("vfa,va->vf", offset, normals[rows].astype(np.float32)) * inverse, 0)
        emit = np.maximum(-np.einsum("vfa,fa->vf", offset, face.astype(np.float32)) * inverse, 0)
        sky = 0.6 + 0.4 * (offset @ _SKY.astype(np.float32)) * inverse
        solid = receive * emit * areas.astype(np.float32) / (np.pi * square + areas.astype(np.float32))
        light[rows] = 0.5 + 0.35 * normals[rows] @ _SKY - np.einsum("vf,vf->v", solid, sky)
    return np.clip(light, 0.0, 1.0) / 0.85


_SKY = np.array([0.10, 0.72, 0.68]) / np.linalg.norm([0.10, 0.72, 0.68])
