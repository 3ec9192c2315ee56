"""The baselines of `experiments.evaluate`: training people's fits, loaded once and rendered like everybody."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from pointillist_jax.data.fits import RiggedFit, find_fits, fit_folder, load_fit
from pointillist_jax.data.token_store import TokenStore
from pointillist_jax.evaluation.baselines import (
    BASELINES,
    mean_gaussians,
    mean_identity,
    portrait_distances,
    random_people,
    shape_distances,
)
from pointillist_jax.files import UserError, file_sha256
from pointillist_jax.flame import FlameModel, FlameParams
from pointillist_jax.playback import AvatarRenderer, RiggedPerson

# Renders N views: (params [N, …], viewmats [N, 4, 4], Ks [N, 3, 3]) → [N, H, W, 3].
Render = Callable[[FlameParams, np.ndarray, np.ndarray], np.ndarray]


class Guesses:
    """Baselines (`evaluation.baselines.BASELINES`) of any subject. What they need is loaded when it is first needed."""

    def __init__(
        self,
        head: FlameModel,
        store: TokenStore,
        fits: str | None,
        training: Sequence[str],
        names: Sequence[str],
        *,
        mean_of: int,
        seed: int,
        jaw: float,
    ):
        """Args:
          store: has the people's portraits and shapes. fits: folder of the fits it was made from.
          training: who may be used. names: of the baselines.
          mean_of: people in a mean picture, drawn with `seed`; 0 for all.
          jaw: of canonical meshes, radians.

        Raises:
          UserError: no fits of training people there, or others than the store was made from.
        """
        self._head, self._store, self._names, self._jaw = head, store, tuple(names), jaw
        self._folders = {} if not names else find_fits(fits)
        self.people = tuple(name for name in training if name in self._folders)
        if names and not self.people:
            raise UserError(f"--fits={fits} holds no fit of a training person ({', '.join(training[:3])} …).")
        for name in self.people:  # All before anybody is drawn or scored.
            if file_sha256(fit_folder(self._folders[name]) / "point_cloud.ply") != store.fit_sha256[store.index(name)]:
                raise UserError(
                    f"{self._folders[name]} is another fit of {name} than {store.path} was made from: name that one."
                )
        self._averaged = random_people(self.people, mean_of, seed)
        self._fit = functools.lru_cache(maxsize=max(32, len(self._averaged) + 4))(self._load)
        self._with_portrait = [name for name in self.people if store.has_portrait[store.index(name)]]
        if any(BASELINES[name].content == "nearest" for name in names) and not self._with_portrait:
            raise UserError(f"no training person of {store.path} has a portrait: leave the baseline nearest out.")
        # Who was nearest to whom, for the report: subject's → baseline → name.
        self.notes: dict[str, Any] = {}
        if names:
            self.notes = {"training people": len(training), "with a fit": len(self.people),
                          "people in mean_image": len(self._averaged)}  # fmt: skip

    @property
    def num(self) -> int:
        """Of baselines."""
        return len(self._names)

    def of(self, identity: FlameParams, portrait: np.ndarray, renderer: AvatarRenderer) -> dict[str, Render]:
        """Baseline → how it shows a subject.

        Args:
          identity: the subject's tracked shape, for those that may use it.
          portrait: uint8 [side, side, 3].
          renderer: of the pictures' size, whose programs are shared.
        """
        found = {}
        for name in self._names:
            baseline = BASELINES[name]
            own = identity if baseline.on_shape else None
            if baseline.content == "mean_image":
                found[name] = functools.partial(self._mean_image, own, renderer)
            else:
                person = (
                    self._mean if baseline.content == "mean" else self._nearest(baseline.content, identity, portrait)
                )
                found[name] = renderer.with_person(placed(person, own)).frames
        return found

    @functools.cached_property
    def _mean(self) -> RiggedPerson:
        fits = tqdm(self.people, desc="mean head", unit="person", leave=False)
        gaussians = mean_gaussians((self._fit(name).gaussians for name in fits), self._head)
        return RiggedPerson(gaussians, mean_identity(self._identities, self._head))

    def _nearest(self, content: str, identity: FlameParams, portrait: np.ndarray) -> RiggedPerson:
        if content == "nearest":
            distances = portrait_distances(portrait, self._portraits)
            fit = self._fit(self._with_portrait[int(np.argmin(distances))])
        else:
            distances = shape_distances(identity, self._identities, self._head, self._jaw)
            fit = self._fit(self.people[int(np.argmin(distances))])
        return RiggedPerson(fit.gaussians, fit.identity)

    def _mean_image(
        self, own: FlameParams | None, renderer: AvatarRenderer, params: FlameParams, viewmats, Ks
    ) -> np.ndarray:
        total = 0.0
        for name in self._averaged:
            fit = self._fit(name)
            person = placed(RiggedPerson(fit.gaussians, fit.identity), own)
            total = total + renderer.with_person(person).frames(params, viewmats, Ks).astype(np.float64)
        return np.float32(total / len(self._averaged))

    def _load(self, name: str) -> RiggedFit:
        return load_fit(self._folders[name], self._head)

    @functools.cached_property
    def _portraits(self) -> list[np.ndarray]:
        return [self._store.condition(self._store.index(name))["portrait"] for name in self._with_portrait]

    @functools.cached_property
    def _identities(self) -> list[Mapping[str, np.ndarray]]:
        return [self._store.identity(self._store.index(name)) for name in self.people]


def placed(person: RiggedPerson, own: FlameParams | None) -> RiggedPerson:
    """The same Gaussians on somebody's own shape, if one is given."""
    if own is None:
        return person
    return person.replace(identity=person.identity.replace(shape=own.shape, static_offset=own.static_offset))
