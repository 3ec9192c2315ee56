"""Tables and pictures of `experiments.evaluate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.media import write_image
from experiments.pictures import contact_sheet
from experiments.trained_decoder import VARIANTS
from pointillist_jax.evaluation.baselines import BASELINES
from pointillist_jax.evaluation.metrics import frechet_distance
from pointillist_jax.evaluation.protocols import Views
from pointillist_jax.evaluation.scores import METRICS, Networks, mean_scores
from pointillist_jax.files import atomic_path, read_json

_CELL = 140  # Pixels at least: the longest name of a baseline must fit beneath.
# Columns of the overview: one view of everybody.
_OVERVIEW = ("truth", "ours", *VARIANTS, "mean_image", "mean_on_shape", "nearest", "nearest_on_shape")


def write_pictures(path: Path, views: Views, shown: dict[str, np.ndarray], scores: dict[str, list[str]]) -> None:
    """A person's sheet: a row for each method, a column for each view, the portrait at the left.

    Args:
      views: that are shown, V.
      shown: method → [V, H, W, 3]; "portrait" → [side, side, 3] and "truth" among them.
      scores: method → V labels.
    """
    height, width = shown["truth"].shape[1:3]
    zoom = -(-_CELL // width)
    order = np.argsort(azimuths(views), kind="stable")
    images, labels = [], []
    for method in (m for m in shown if m != "portrait"):
        first = resized(shown["portrait"], width, height) if method == "truth" else np.ones((height, width, 3))
        rows = [first, *(shown[method][i] for i in order)]
        images += [np.float32(image).repeat(zoom, 0).repeat(zoom, 1) for image in rows]
        if method == "truth":
            where = views.describe()
            labels += ["portrait", *(f"c{where[i]['camera']} t{where[i]['timestep']}" for i in order)]
        else:
            labels += [method, *(scores[method][i] for i in order)]
    write_image(path, contact_sheet(images, labels, 1 + len(order)))


def azimuths(views: Views) -> np.ndarray:
    """[N] radians that each camera stands to the subject's left."""
    viewmats = views.viewmats
    centres = -np.einsum("nba,nb->na", viewmats[:, :3, :3], viewmats[:, :3, 3])
    return np.arctan2(centres[:, 0], centres[:, 2])


def resized(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """uint8 [h, w, 3] → float [height, width, 3], the largest that fits, on white."""
    from PIL import Image

    scale = min(width / image.shape[1], height / image.shape[0])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    sheet = Image.new("RGB", (width, height), (255, 255, 255))
    sheet.paste(
        Image.fromarray(image).resize(size, Image.Resampling.LANCZOS), ((width - size[0]) // 2, (height - size[1]) // 2)
    )
    return np.asarray(sheet, np.float32) / 255


def write_report(
    workdir: Path,
    subjects: Sequence[str],
    protocols: Sequence[str],
    networks: Networks,
    missing: dict[str, str],
    notes: dict[str, Any],
) -> dict[str, Any]:
    """Gathers the scores of everybody into table.md, results.json and overviews; returns what results.json holds."""
    results: dict[str, Any] = {"subjects": list(subjects), "baselines": notes, "protocols": {}, "not_available": {}}
    for name, metric in METRICS.items():
        if metric.needs and getattr(networks, metric.needs) is None:
            results["not_available"][name] = missing[metric.needs]
    for protocol in protocols:
        cards = [read_json(workdir / "scores" / protocol / f"{n}.json", "a person's scores") for n in subjects]
        results["protocols"][protocol] = gather(workdir, protocol, cards, networks)
        write_overview(workdir, protocol, subjects)
    with atomic_path(workdir / "results.json") as path:
        path.write_text(json.dumps(results, indent=1) + "\n")
    with atomic_path(workdir / "table.md") as path:
        path.write_text(markdown(results) + "\n")
    return results


def gather(workdir: Path, protocol: str, cards: Sequence[dict[str, Any]], networks: Networks) -> dict[str, Any]:
    """Means over people of means over their views: every person counts alike."""
    methods = list(cards[0]["scores"])
    per_person = {m: [mean_scores(card["scores"][m]) for card in cards] for m in methods}
    names = networks.available(protocol)
    table, spread, wins = {}, {}, {}
    for method in methods:
        rows = per_person[method]
        columns = {n: [row[n] for row in rows if row.get(n) is not None] for n in names if n != "fid"}
        table[method] = {n: round(float(np.mean(v)), 6) if v else None for n, v in columns.items()}
        spread[method] = {n: round(float(np.std(v)), 6) for n, v in columns.items() if v}
        if method != methods[0]:
            wins[method] = {n: _wins(per_person[methods[0]], rows, n) for n in columns}
    out = {
        "people": len(cards),
        "pictures": sum(len(card["views"]) for card in cards),
        "drivers": {card["subject"]: card["driver"] for card in cards},
        "size": cards[0]["size"],
        "scores": table,
        "std_over_people": spread,
        "first_is_better": wins,
        "per_person": {m: {c["subject"]: row for c, row in zip(cards, per_person[m], strict=True)} for m in methods},
    }
    if "akd" in names:
        found = {m: sum(v is not None for c in cards for v in c["scores"][m]["akd"]) for m in methods}
        out["faces_found_in_both"] = found
    if "fid" in names:
        features = [dict(np.load(_arrays(workdir, protocol, c["subject"]))) for c in cards]
        pooled = {m: np.concatenate([f[f"features_{m}"] for f in features]) for m in ["truth", *methods]}
        for method in methods:
            enough = len(pooled["truth"]) > 1
            table[method]["fid"] = round(frechet_distance(pooled[method], pooled["truth"]), 4) if enough else None
        out["fid"] = {"pictures": len(pooled["truth"]), "resize": networks.inception.resize, "background": "white"}
    return out


def _wins(first: list[dict], other: list[dict], name: str) -> list[int]:
    """[people for whom the first method is better, people that both have a value of]."""
    sign = 1 if METRICS[name].better == "higher" else -1
    pairs = [(a[name], b[name]) for a, b in zip(first, other, strict=True) if None not in (a.get(name), b.get(name))]
    return [sum(sign * a > sign * b for a, b in pairs), len(pairs)]


def _arrays(workdir: Path, protocol: str, name: str) -> Path:
    return workdir / "scores" / protocol / f"{name}.npz"


def write_overview(workdir: Path, protocol: str, subjects: Sequence[str], most: int = 24) -> None:
    """`pictures/overview_<protocol>.png`: of everybody the portrait and the most frontal view by each method."""
    images, labels = [], []
    for name in subjects[:most]:
        with np.load(_arrays(workdir, protocol, name)) as arrays:
            frontal = int(arrays["frontal"].item())
            methods = [m for m in _OVERVIEW if f"shown_{m}" in arrays.files]
            rows = {m: arrays[f"shown_{m}"][frontal].astype(np.float32) / 255 for m in methods}
            height, width = rows["truth"].shape[:2]
            zoom = -(-_CELL // width)
            for label, image in {name: resized(arrays["shown_portrait"], width, height), **rows}.items():
                images.append(np.float32(image).repeat(zoom, 0).repeat(zoom, 1))
                labels.append(label)
    if len({image.shape for image in images}) == 1:  # Captures of other sizes cannot share a sheet.
        path = workdir / "pictures" / f"overview_{protocol}.png"
        write_image(path, contact_sheet(images, labels, 1 + len(methods)))


TITLES = {"self": "Self-reenactment", "cross": "Cross-reenactment"}


def markdown(results: dict[str, Any]) -> str:
    """The tables with definitions, units, numbers of people and pictures, and what is not available."""
    lines = ["# Evaluation", ""]
    for protocol, found in results["protocols"].items():
        lines += _protocol_lines(protocol, found)
    used = [n for found in results["protocols"].values() for n in next(iter(found["scores"].values()))]
    lines += ["## What the columns are", ""]
    lines += [
        f"* **{METRICS[n].title}** ({METRICS[n].better} is better): {METRICS[n].what}." for n in dict.fromkeys(used)
    ]
    for name, what in results["not_available"].items():
        lines.append(f"* **{METRICS[name].title}**: not available: {what}.")
    lines += ["", "Each number is the mean over people of the mean over their pictures. AKD and APD have no published "
              "definition in the paper: these are ours and are not comparable to its table.", ""]  # fmt: skip
    if guesses := [m for m in next(iter(results["protocols"].values()))["scores"] if m in BASELINES]:
        lines += ["## What the baselines are", ""]
        lines += [f"* **{m}**: {BASELINES[m].what}." for m in guesses]
        lines += ["", "; ".join(f"{key}: {value}" for key, value in results["baselines"].items()) + "."]
    return "\n".join(lines)


def _protocol_lines(protocol: str, found: dict[str, Any]) -> list[str]:
    names = [n for n in METRICS if n in next(iter(found["scores"].values()))]
    first = next(iter(found["scores"]))
    compared = [n for n in ("psnr", "ssim") if n in names]
    heads = [METRICS[n].title for n in names]
    if compared and len(found["scores"]) > 1:
        heads.append(f"people for whom {first} is better ({', '.join(METRICS[n].title.split()[0] for n in compared)})")
    width, height = found["size"]
    lines = [f"## {TITLES[protocol]}", "", f"{found['people']} held-out people, {found['pictures']} pictures of "
             f"{width} × {height} on white. {_driving(protocol)}", ""]  # fmt: skip
    if not names:
        return [*lines, "None of its metrics is available; what to supply stands below.", ""]
    lines += ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for method, row in found["scores"].items():
        cells = [_cell(row[n], METRICS[n].digits) for n in names]
        if len(heads) > len(names):
            wins = found["first_is_better"].get(method)
            cells.append("" if wins is None else ", ".join("{} of {}".format(*wins[n]) for n in compared))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    if "faces_found_in_both" in found:
        counts = ", ".join(f"{m} {n}" for m, n in found["faces_found_in_both"].items())
        lines += ["", f"Pictures in which a face was found, in the photograph too, of {found['pictures']}: {counts}."]
    if "fid" in found:
        f = found["fid"]
        lines += ["", f"FID of {f['pictures']} pictures against {f['pictures']} photographs, {f['resize']}, on "
                  f"{f['background']}; below 2,048 pictures it is biased upwards."]  # fmt: skip
    return [*lines, ""]


def _driving(protocol: str) -> str:
    if protocol == "self":
        return "Each is driven by the own capture and compared with its photographs, all but the portrait."
    return "Each is driven by the next person's capture (results.json: drivers); AKD and APD compare with the driver."


def _cell(value: float | None, digits: int) -> str:
    return "no face" if value is None else f"{value:.{digits}f}"


def print_tables(results: dict[str, Any]) -> None:
    """The tables for a terminal."""
    for protocol, found in results["protocols"].items():
        names = [n for n in METRICS if n in next(iter(found["scores"].values()))]
        print(f"\n{TITLES[protocol]}, {found['people']} held-out people, {found['pictures']} pictures:")
        if not names:
            print("  none of its metrics is available:")
            continue
        print(f"  {'':<22}" + "".join(f"{METRICS[n].title:>16}" for n in names))
        for method, row in found["scores"].items():
            print(f"  {method:<22}" + "".join(f"{_cell(row[n], METRICS[n].digits):>16}" for n in names))
    for name, what in results["not_available"].items():
        print(f"  {METRICS[name].title}: not available: {what}")
