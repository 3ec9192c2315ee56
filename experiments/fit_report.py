"""What `experiments.fit` shows of finished fits: sheets of truth beside fit, tables, density control against none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.pictures import contact_sheet

_SHEET_VIEWS = 4  # of each split
_LABEL_WIDTH = 200  # pixels
_RUNS = ("with_density_control", "without")  # In comparison.json.


def sheet(result, data, scores: dict[str, Any], look: dict[str, Any]) -> np.ndarray:
    """Truth and fit side by side: of every split, views spread from the worst to the best PSNR.

    Args:
      result: FitResult.
      data: FitData it was fitted to.
      scores: of `fitting.evaluate`.
      look: `sh_degree`, `background` and `capacity` of `fitting.render_views`.

    Returns:
      float32 [H, W, 3] in [0, 1].
    """
    pairs, labels = [], []
    for name, views in data.splits.items():
        values = np.array([row["psnr"] for row in scores[name]["per_view"]])
        for n in _spread(values):
            fitted = _render(result.state, result.scene, views, n, look)
            pairs.append((views.image(n, look["background"]), fitted))
            labels.append(f"{name}: camera {views.camera_indices[n]}, t {views.timesteps[n]}, {values[n]:.1f} dB")
    pictures = _of_one_size([picture for pair in pairs for picture in pair], 2)
    rows = [np.concatenate(pictures[i : i + 2], axis=1) for i in range(0, len(pictures), 2)]
    return contact_sheet(rows, labels, min(_SHEET_VIEWS, len(rows)))


def comparison(dense: dict[str, Any], fixed: dict[str, Any]) -> dict[str, Any]:
    """comparison.json of two reports of one subject, with density control and without.

    Parts of the head have the counts with density control; `added` is how many more these are than without it.
    """
    scores = {}
    for name, split in dense["scores"].items():
        runs = dict(zip(_RUNS, (split, fixed["scores"][name]), strict=True))
        means = {run: {key: values[key] for key in ("psnr", "ssim", "l1")} for run, values in runs.items()}
        gain = means[_RUNS[0]]["psnr"] - means[_RUNS[1]]["psnr"]
        scores[name] = {"views": split["views"], **means, "gain_db": round(gain, 5)}
    parts = {}
    for name, part in dense["parts"].items():
        without = fixed["parts"][name]["gaussians"]
        added = part["gaussians"] - without
        parts[name] = {
            **{key: part[key] for key in ("gaussians", "faces", "area_cm2", "per_face", "per_cm2")},
            "without": without,
            "added": added,
            "added_per_cm2": round(added / max(part["area_cm2"], 1e-9), 3),
        }
    return {
        "subject": dense["subject"],
        "iterations": dense["iterations"],
        "gaussians": dict(zip(_RUNS, (dense["gaussians"], fixed["gaussians"]), strict=True)),
        "scores": scores,
        "parts": parts,
    }


def comparison_sheet(data, model, fits: Sequence, reports: Sequence[dict[str, Any]]) -> np.ndarray:
    """Truth, with density control, without: of every held-out split, views from the least to the largest gain.

    Args:
      data: FitData.
      model: its head.
      fits: RiggedFit with density control and without.
      reports: their report.json.

    Returns:
      float32 [H, W, 3] in [0, 1], two views in a row.
    """
    from pointillist_jax.fitting.evaluate import measure_capacity
    from pointillist_jax.fitting.state import bucket_size, state_of
    from pointillist_jax.fitting.step import make_scene

    config = reports[0]["config"]
    look = {key: config[key] for key in ("sh_degree", "background")}
    # One bucket and one capacity: both are rendered by one program.
    bucket = bucket_size(max(fit.gaussians.num_gaussians for fit in fits))
    pairs = [(state_of(fit.gaussians, bucket), make_scene(model, fit.params, False)) for fit in fits]
    pictures, labels = [], []
    for name in [name for name in data.splits if name != "train"] or ["train"]:
        views = data.splits[name]
        capacity = max(measure_capacity(*pair, views) for pair in pairs)
        values = np.array([[row["psnr"] for row in report["views"][name]] for report in reports])
        for n in _spread(values[0] - values[1]):
            pictures.append(views.image(n, look["background"]))
            pictures += [_render(*pair, views, n, {**look, "capacity": capacity}) for pair in pairs]
            labels.append(f"truth, {name}: camera {views.camera_indices[n]}, t {views.timesteps[n]}")
            labels += [f"with density control, {values[0, n]:.1f} dB", f"without, {values[1, n]:.1f} dB"]
    return contact_sheet(_of_one_size(pictures), labels, min(6, len(pictures)))


def print_table(reports: dict[str, dict[str, Any]]) -> None:
    """Gaussians and scores of every fit, by its name."""
    splits, width = ("train", "val", "test"), 2 + max(18, *map(len, reports))
    print("\n" + f"{'subject':<{width}}{'Gaussians':>10}  " + "".join(f"{s + ' PSNR / SSIM':>20}" for s in splits))
    for name, report in reports.items():
        cells = [
            f"{report['scores'][s]['psnr']:.2f} / {report['scores'][s]['ssim']:.4f}" if s in report["scores"] else "-"
            for s in splits
        ]
        print(f"{name:<{width}}{report['gaussians']:>10}  " + "".join(f"{cell:>20}" for cell in cells))


def print_comparisons(comparisons: dict[str, dict[str, Any]]) -> None:
    """What density control gained, and where it put its Gaussians: hair, beard and cheeks, or else all parts."""
    print("\ndensity control against none")
    for name, content in comparisons.items():
        gains = ", ".join(f"{split} {scores['gain_db']:+.2f}" for split, scores in content["scores"].items())
        print(f"{name}: PSNR {gains} dB")
        columns = {"Gaussians": "gaussians", "per face": "per_face", "added": "added", "added per cm²": "added_per_cm2"}
        print(f"  {'part':<14}" + "".join(f"{title:>15}" for title in columns))
        parts = content["parts"]
        for part in [p for p in ("hair", "beard", "cheek") if p in parts] or parts:
            print(f"  {part:<14}" + "".join(f"{_number(parts[part][key]):>15}" for key in columns.values()))


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


def _spread(values: np.ndarray) -> list[int]:
    """Places of a few values, from the least to the largest."""
    ranks = np.linspace(0, len(values) - 1, min(_SHEET_VIEWS, len(values))).astype(int)
    return np.argsort(values, kind="stable")[ranks].tolist()


def _of_one_size(pictures: list[np.ndarray], together: int = 1) -> list[np.ndarray]:
    """Padded to the largest, and small ones enlarged so that `together` of them have room for a label."""
    height, width = (max(picture.shape[i] for picture in pictures) for i in (0, 1))
    factor = -(-_LABEL_WIDTH // (together * width))
    padded = [
        np.pad(p, [(0, height - p.shape[0]), (0, width - p.shape[1]), (0, 0)], constant_values=1) for p in pictures
    ]
    return [p.repeat(factor, axis=0).repeat(factor, axis=1) for p in padded]


def _render(state, scene, views, n: int, look: dict[str, Any]) -> np.ndarray:
    from pointillist_jax.fitting import render_views

    return next(render_views(state, scene, _Only(views, n), **look))


class _Only:
    """One view of many."""

    def __init__(self, views, n: int):
        for key in ("viewmats", "Ks", "sizes", "timesteps", "camera_indices"):
            setattr(self, key, getattr(views, key)[n : n + 1])

    def __len__(self) -> int:
        return 1
