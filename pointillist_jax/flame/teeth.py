"""The 120 teeth vertices and 168 faces that GaussianAvatars adds to FLAME (facts/avatars_gsplat.md A.1).

Vertex and face order are those of existing fits, so that a binding index means the same triangle here as there.
"""

from __future__ import annotations

import numpy as np

# Lip-ring vertices of FLAME's topology, from the subject's right to left: the order fixes the order of the teeth.
UPPER_LIP = (1713, 1715, 1716, 1735, 1696, 1694, 1657, 3543, 2774, 2811, 2813, 2850, 2833, 2832, 2830)
LOWER_LIP = (1576, 1577, 1773, 1774, 1795, 1802, 1865, 3503, 2948, 2905, 2898, 2881, 2880, 2713, 2712)
NUM_TEETH_VERTICES, NUM_TEETH_FACES = 120, 168
FLAME_VERTICES, FLAME_FACES = 5023, 9976

# Blocks of 15 vertices: upper root, lower root, upper edge, lower edge, then the same four set back.
_IS_UPPER = np.repeat([True, False, True, False, True, True, False, False], 15)
# The four ways to cut a quad (a, a', b', b) into two triangles: which diagonal, and which side faces out.
# Corners are numbered a = 0, a' = 1, b = 2, b' = 3.
_OUT_AB = ((0, 3, 2), (0, 1, 3))
_OUT_BA = ((0, 1, 2), (1, 3, 2))
_IN_AB = ((0, 2, 3), (0, 3, 1))
_IN_BA = ((0, 2, 1), (1, 2, 3))
# Strips of 14 quads between the blocks that start at A and B, in face order: A, B, cut of the first seven quads, cut of
# the last seven (the diagonal is mirrored at the middle of the mouth).
_STRIPS = (
    (0, 30, _OUT_AB, _OUT_BA),  # upper front
    (60, 75, _IN_AB, _IN_BA),  # upper back
    (75, 30, _IN_BA, _IN_AB),  # upper bottom
    (45, 15, _OUT_BA, _OUT_AB),  # lower front
    (90, 105, _OUT_AB, _OUT_BA),  # lower back
    (105, 45, _OUT_BA, _OUT_AB),  # lower top
)


def teeth_vertices(v_template: np.ndarray) -> np.ndarray:
    """[5023, 3] template → [120, 3] teeth, in the template's unit and dtype."""
    upper, lower = v_template[list(UPPER_LIP)], v_template[list(LOWER_LIP)]
    gap = np.linalg.norm(upper - lower, axis=-1).mean()
    middle = (upper + lower) / 2
    middle[:, 1] = middle[:, 1].mean()
    middle[:, 2] -= 1.5 * gap

    def moved(ring: np.ndarray, y: float = 0.0, z: float = 0.0) -> np.ndarray:
        return ring + np.array([0.0, y * gap, z * gap], v_template.dtype)

    upper_edge = moved(middle, y=0.1)
    upper_root = moved(upper_edge, y=2)
    lower_edge = moved(middle, y=-0.1, z=-0.4)
    lower_root = moved(lower_edge, y=-2)
    front = [upper_root, lower_root, upper_edge, lower_edge]
    back = [moved(ring, z=-1) for ring in (upper_root, upper_edge, lower_root, lower_edge)]
    return np.concatenate(front + back)


def teeth_faces(first_vertex: int = FLAME_VERTICES) -> np.ndarray:
    """[168, 3] int32 triangles over the teeth vertices, which start at `first_vertex`."""
    faces = []
    for start_a, start_b, first_half, second_half in _STRIPS:
        for i in range(14):
            corners = np.array([start_a, start_a + 1, start_b, start_b + 1]) + i
            faces += [corners[list(triangle)] for triangle in (first_half if i < 7 else second_half)]
    return np.array(faces, np.int32) + first_vertex


def teeth_skin_weights(dtype: np.dtype) -> np.ndarray:
    """[120, 5]: upper teeth follow joint 1 (neck), lower teeth joint 2 (jaw)."""
    weights = np.zeros((NUM_TEETH_VERTICES, 5), dtype)
    weights[_IS_UPPER, 1] = 1
    weights[~_IS_UPPER, 2] = 1
    return weights


def teeth_shape_dirs(shape_dirs: np.ndarray) -> np.ndarray:
    """[5023, 3, S] → [120, 3, S]: every block moves as the mean of the two lip rings."""
    mean = (shape_dirs[list(UPPER_LIP)] + shape_dirs[list(LOWER_LIP)]) / 2
    return np.tile(mean, (8, 1, 1))
