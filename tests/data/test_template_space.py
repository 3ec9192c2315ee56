"""Clouds around the mean head: there and back, and through the store."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pointillist_jax.data.fits import load_fit
from pointillist_jax.data.subjects import subject_record
from pointillist_jax.data.template_space import canonical_frames, place, placement, template_canonical
from pointillist_jax.files import UserError
from tests.conftest import random_params
from tests.data.fit_files import HEAD_SPEC, MODEL, write_fit


@pytest.fixture
def person(rng):
    return random_params(rng, MODEL).canonical(0.3)


def test_there_and_back(rng, person):
    points, binding = rng.normal(0, 0.1, (200, 3)), rng.integers(0, MODEL.num_faces, 200)
    mine, mean = canonical_frames(MODEL, person), canonical_frames(MODEL, template_canonical(MODEL, 0.3))
    there = place(points, binding, mean, mine)
    assert np.abs(there - points).max() > 1e-3  # They are other heads.
    np.testing.assert_allclose(place(there, binding, mine, mean), points, atol=2e-5)


def test_a_point_on_a_corner_stays_on_it(person):
    from pointillist_jax.flame import flame_vertices

    mean = template_canonical(MODEL, 0.3)
    corners = [np.asarray(flame_vertices(MODEL, p))[np.asarray(MODEL.faces)[:, 0]] for p in (mean, person)]
    centers = [np.asarray(canonical_frames(MODEL, p).center) for p in (mean, person)]
    on_person = placement(MODEL, person, "template", 0.3)
    every = np.arange(MODEL.num_faces)
    np.testing.assert_allclose(on_person(centers[0], every), centers[1], atol=1e-6)
    # Corners keep their direction from the centre in the face's frame; triangles change their shapes, so only nearly.
    error = np.linalg.norm(on_person(corners[0], every) - corners[1], axis=1)
    size = np.linalg.norm(corners[1] - centers[1], axis=1)
    assert np.median(error / size) < 0.7
    assert placement(MODEL, person, "identity", 0.3)(corners[0], every) is corners[0]


def test_a_store_in_template_space_gives_the_fit_back(tmp_path, rng):
    write_fit(tmp_path / "fit", rng, 300)
    spec = dataclasses.replace(HEAD_SPEC, space="template", out_of_bounds="clip")
    fit, t = load_fit(tmp_path / "fit", MODEL), spec.tokenizer
    canonical, world = fit.canonical(MODEL, jaw=0.3)
    points, binding = t.decode(subject_record("x", tmp_path / "fit", MODEL, spec).tokens)
    own, _ = t.decode(subject_record("x", tmp_path / "fit", MODEL, dataclasses.replace(spec, space="identity")).tokens)
    assert len(points) == len(own) == 300
    assert np.abs(np.sort(points, axis=0) - np.sort(own, axis=0)).max() > 1e-3
    back = placement(MODEL, canonical, "template", 0.3)(points, binding)
    # Each of them lies by one of the fit's points that is bound to its face, within a cell, which faces stretch.
    truth, of = np.asarray(world.means), np.asarray(fit.gaussians.binding)
    far = [np.abs(truth[of == b] - p).max(axis=1).min() for p, b in zip(back, binding, strict=True)]
    assert np.median(far) < t.cell.max()
    with pytest.raises(UserError, match=r"data\.space='other'"):
        dataclasses.replace(HEAD_SPEC, space="other")
