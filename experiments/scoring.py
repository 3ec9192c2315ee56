"""Renders and scores one person after another for `experiments.evaluate`: what lies below <workdir>/scores/.

Of every person and protocol `scores/<protocol>/<name>.json` (a value for each view, method and metric) and `.npz`
(Inception's features, a few pictures) are written as soon as they are there; they are what tables are made of, and
nobody who has them is scored again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from experiments.evaluation_report import azimuths, write_pictures
from experiments.guesses import Guesses
from pointillist_jax.evaluation.protocols import Views
from pointillist_jax.evaluation.scores import Networks, Seen, compare, look
from pointillist_jax.files import atomic_path, write_npz
from pointillist_jax.flame import FlameModel, FlameParams
from pointillist_jax.gaussians import load_avatar
from pointillist_jax.playback import AvatarRenderer

# Pictures that are rendered and scored at once: what bounds memory.
_AT_ONCE = 16


class Subject(NamedTuple):
    """Somebody who is evaluated. bundles: method → avatar bundle; identity: tracked shape; portrait: uint8 [S, S, 3];
    views: of the own capture, all but the portrait."""

    name: str
    bundles: Mapping[str, Path]
    identity: FlameParams
    portrait: np.ndarray
    views: Views


class Found(NamedTuple):
    """Of one person. scores: method → metric → a value for each view, None where there is no face; features: method or
    "truth" → Inception's [N, D], if there is Inception; shown: method or "truth" → a few pictures [V, H, W, 3]."""

    scores: dict[str, dict[str, list]]
    features: dict[str, np.ndarray]
    shown: dict[str, np.ndarray]


class Scorer:
    """Scores people; renderers and their programs are shared by all of one picture size."""

    def __init__(self, head: FlameModel, guesses: Guesses, networks: Networks, workdir: Path):
        self._head, self._guesses, self._networks, self._workdir = head, guesses, networks, workdir
        self._renderers: dict[tuple[int, int], AvatarRenderer] = {}

    def run(self, subjects: Sequence[Subject], drivers: Mapping[str, Mapping[str, str]]) -> None:
        """Scores who is not scored yet.

        Args:
          drivers: protocol → subject → whose motion and photographs.
        """
        people = {subject.name: subject for subject in subjects}
        todo = [
            (protocol, people[name], people[driver])
            for protocol, pairs in drivers.items()
            for name, driver in pairs.items()
            if not (self._workdir / "scores" / protocol / f"{name}.json").is_file()
        ]
        methods = len(subjects[0].bundles) + self._guesses.num
        with tqdm(total=sum(len(d.views) for _, _, d in todo) * methods, desc="score", unit="picture") as bar:
            for protocol, subject, driver in todo:
                bar.set_postfix_str(f"{subject.name}, {protocol}", refresh=False)
                found = self._score(subject, driver.views, protocol == "self", bar.update)
                self._write(protocol, subject, driver, found)

    def _score(self, subject: Subject, views: Views, pixels: bool, progress: Callable[[int], object]) -> Found:
        """Scores of every method on one person's views."""
        embedding = None
        if self._networks.clip is not None:
            embedding = np.asarray(self._networks.clip(subject.portrait[None]))[0]
        methods = self._methods(subject, views.size)
        scores: dict[str, dict[str, list]] = {method: {} for method in methods}
        features: dict[str, list[np.ndarray]] = {}
        shown: dict[str, list[np.ndarray]] = {}
        show = set(shown_views(views))
        for first in range(0, len(views), _AT_ONCE):
            num = min(_AT_ONCE, len(views) - first)
            # The last group is filled up with its last view, so that one program scores all.
            group = views.subset(np.minimum(np.arange(first, first + min(_AT_ONCE, len(views))), len(views) - 1))
            keep = [i for i in range(num) if first + i in show]
            truth = look(group.photographs(), self._networks)
            _collect(truth, num, keep, "truth", features, shown)
            params, viewmats, Ks = group.params, group.viewmats, group.Ks
            for method, render in methods.items():
                seen = look(render(params, viewmats, Ks), self._networks)
                found = compare(seen, truth, self._networks, portrait=embedding, pixels=pixels)
                for metric, values in found.items():
                    rounded = [None if np.isnan(v) else round(float(v), 6) for v in values[:num]]
                    scores[method].setdefault(metric, []).extend(rounded)
                _collect(seen, num, keep, method, features, shown)
                progress(num)
        return Found(
            scores,
            {method: np.concatenate(rows) for method, rows in features.items()},
            {method: np.stack(rows) for method, rows in shown.items()},
        )

    def _methods(self, subject: Subject, size: tuple[int, int]) -> dict[str, Callable]:
        avatars = {method: load_avatar(bundle) for method, bundle in subject.bundles.items()}
        if size not in self._renderers:
            self._renderers[size] = AvatarRenderer(next(iter(avatars.values())), self._head, *size)
        renderer = self._renderers[size]
        methods = {method: renderer.with_person(avatar).frames for method, avatar in avatars.items()}
        return methods | self._guesses.of(subject.identity, subject.portrait, renderer)

    def _write(self, protocol: str, subject: Subject, driver: Subject, found: Found) -> None:
        """A person's arrays, sheet and scores. The scores come last: they say that the rest is there."""
        folder, name, views = self._workdir / "scores" / protocol, subject.name, driver.views
        rows = shown_views(views)
        few = views.subset(rows)
        arrays = {f"features_{method}": np.float32(values) for method, values in found.features.items()}
        arrays |= {f"shown_{m}": np.uint8(np.round(255 * np.clip(x, 0, 1))) for m, x in found.shown.items()}
        arrays |= {"shown_portrait": subject.portrait, "frontal": np.array(np.argmin(np.abs(azimuths(few))))}
        write_npz(folder / f"{name}.npz", arrays)
        labels = {
            method: [f"{row['psnr'][i]:.1f} dB" if "psnr" in row else "" for i in rows]
            for method, row in found.scores.items()
        }
        shown = {**found.shown, "portrait": subject.portrait}
        write_pictures(self._workdir / "pictures" / protocol / f"{name}.png", few, shown, labels)
        card = {"subject": name, "driver": driver.name, "size": list(views.size), "views": views.describe()}
        with atomic_path(folder / f"{name}.json") as temporary:
            temporary.write_text(json.dumps({**card, "scores": found.scores}) + "\n")


def shown_views(views: Views, columns: int = 6) -> list[int]:
    """A few of the views for a sheet: cameras from one side to the other."""
    order = np.argsort(azimuths(views), kind="stable")
    return sorted(set(order[np.linspace(0, len(order) - 1, min(columns, len(order))).astype(int)].tolist()))


def _collect(seen: Seen, num: int, keep: Sequence[int], method: str, features: dict, shown: dict) -> None:
    """Adds what is kept of a group's pictures: features of all, pictures of a few."""
    if seen.features is not None:
        features.setdefault(method, []).append(seen.features[:num])
    shown.setdefault(method, []).extend(seen.pictures[i] for i in keep)
