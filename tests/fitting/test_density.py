"""Density control against a twin that walks over Gaussians one by one, on random clouds."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointillist_jax.configs import FitConfig
from pointillist_jax.files import UserError
from pointillist_jax.fitting.density import Cloud, densify_and_prune, prune, prune_to_budget, reset_opacities


def random_cloud(rng: np.random.Generator, num: int, faces: int) -> Cloud:
    """Every face has a Gaussian, unless there are fewer Gaussians than faces."""
    binding = np.concatenate([np.arange(faces), rng.integers(faces, size=max(num - faces, 0))])[:num]
    params = {
        "means": rng.normal(size=(num, 3)),
        "f_dc": rng.normal(size=(num, 3)),
        "f_rest": rng.normal(size=(num, 3, 3)),
        "opacities": rng.normal(-3, 3, size=num),
        "scales": rng.normal(-1, 1, size=(num, 3)),
        "quats": rng.normal(size=(num, 4)),
    }
    params = {key: value.astype(np.float32) for key, value in params.items()}
    mu = {key: rng.normal(size=value.shape).astype(np.float32) for key, value in params.items()}
    nu = {key: rng.uniform(size=value.shape).astype(np.float32) for key, value in params.items()}
    return Cloud(params, mu, nu, rng.permutation(binding))


def literal_prune(binding: list[int], marked: list[bool]) -> list[int]:
    """Facts A.5: all marked ones of a face go, unless that would be all there are; then none of them goes."""
    keep = []
    for i, face in enumerate(binding):
        of_face = [j for j, other in enumerate(binding) if other == face]
        left = [j for j in of_face if not marked[j]]
        if not marked[i] or not left:
            keep.append(i)
    return keep


sizes = st.tuples(st.integers(1, 60), st.integers(1, 12), st.integers(0, 2**32 - 1))


@given(sizes, st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_prune_keeps_one_per_face(size, share):
    num, faces, seed = size
    rng = np.random.default_rng(seed)
    cloud = random_cloud(rng, num, faces)
    marked = rng.uniform(size=num) < share
    left, keep = prune(cloud, marked)
    expected = literal_prune(cloud.binding.tolist(), marked.tolist())
    np.testing.assert_array_equal(np.flatnonzero(keep), expected)
    assert set(left.binding) == set(cloud.binding)
    for tree in ("params", "mu", "nu"):
        for key, value in getattr(left, tree).items():
            np.testing.assert_array_equal(value, getattr(cloud, tree)[key][expected])


def literal_densify(cloud, gradients, radii, face_scales, extent, config, rng, prune_large):
    """(what each Gaussian of the result came from, its raw values), one Gaussian at a time."""
    rows = [{k: v[i] for k, v in cloud.params.items()} | {"face": cloud.binding[i]} for i in range(len(cloud))]
    origin, radius = [("old", i) for i in range(len(rows))], list(radii)
    clones, splits = [], []
    for i, row in enumerate(rows):
        world = max(np.exp(row["scales"])) * face_scales[row["face"]]
        if gradients[i] >= config.densify_grad:
            (splits if world > config.percent_dense * extent else clones).append(i)
    for i in clones:
        rows.append(dict(rows[i]))
        origin.append(("clone", i))
        radius.append(0)
    noise = rng.normal(size=(2 * len(splits), 3))
    for k in range(2):
        for at, i in enumerate(splits):
            row = dict(rows[i])
            std = np.exp(row["scales"]) * (face_scales[row["face"]] if config.split_std == "world" else 1)
            w, x, y, z = row["quats"] / np.linalg.norm(row["quats"])
            sample = noise[k * len(splits) + at] * std
            # v + 2 w (u × v) + 2 u × (u × v)
            u = np.array([x, y, z])
            row["means"] = row["means"] + sample + 2 * w * np.cross(u, sample) + 2 * np.cross(u, np.cross(u, sample))
            row["scales"] = np.log(np.exp(row["scales"]) / 1.6)
            rows.append(row)
            origin.append(("child", i))
            radius.append(0)
    rows, origin, radius = (
        [x for j, x in enumerate(values) if not (j < len(cloud) and j in splits)] for values in (rows, origin, radius)
    )
    marked = []
    for row, size in zip(rows, radius, strict=True):
        world = max(np.exp(row["scales"])) * face_scales[row["face"]]
        large = prune_large and (size > config.prune_radius or world > config.prune_scale * extent)
        marked.append(1 / (1 + np.exp(-row["opacities"])) < config.prune_opacity or large)
    keep = literal_prune([row["face"] for row in rows], marked)
    return [rows[i] for i in keep], [origin[i] for i in keep], (len(clones), len(splits), len(rows) - len(keep))


@given(sizes, st.sampled_from(["world", "local"]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_densify_and_prune_is_the_literal_rule(size, spread, prune_large):
    num, faces, seed = size
    rng = np.random.default_rng(seed)
    cloud = random_cloud(rng, num, faces)
    config = FitConfig(split_std=spread, prune_radius=5.0, prune_scale=0.02, percent_dense=0.004)
    gradients = rng.uniform(0, 4e-4, size=num).astype(np.float32)
    radii = rng.integers(0, 8, size=num).astype(np.float32)
    scales = rng.uniform(0.001, 0.03, size=faces).astype(np.float32)
    arguments = (cloud, gradients, radii, scales, 1.3, config)
    grown, changes = densify_and_prune(*arguments, np.random.default_rng(seed), prune_large=prune_large)
    rows, origin, counts = literal_densify(*arguments, np.random.default_rng(seed), prune_large)
    assert (changes.cloned, changes.split, changes.pruned) == counts
    assert len(grown) == len(rows) == num + changes.cloned + changes.split - changes.pruned
    np.testing.assert_array_equal(grown.binding, [row["face"] for row in rows])
    np.testing.assert_array_equal(grown.binding, [cloud.binding[i] for _, i in origin])
    for key, value in grown.params.items():
        np.testing.assert_allclose(value, [row[key] for row in rows], atol=2e-5, rtol=2e-5)
        assert value.dtype == np.float32
    old = np.array([kind == "old" for kind, _ in origin])
    at = np.array([i for _, i in origin])
    for tree in ("mu", "nu"):
        for key, value in getattr(grown, tree).items():
            np.testing.assert_array_equal(value[old], getattr(cloud, tree)[key][at[old]])
            assert not value[~old].any()
    assert set(grown.binding) == set(cloud.binding)


def test_room_takes_the_largest_gradients():
    rng = np.random.default_rng()
    cloud = random_cloud(rng, 40, 8)
    config = FitConfig(prune_opacity=0.0)
    gradients = rng.permutation(np.linspace(3e-4, 9e-4, 40)).astype(np.float32)
    for room in (0, 7, 39):
        grown, changes = densify_and_prune(
            cloud, gradients, np.zeros(40), np.ones(8), 1.0, config, np.random.default_rng(0), room=room
        )
        assert changes.cloned + changes.split == room == len(grown) - 40
        parents = np.sort(gradients)[40 - room :]
        doubled = np.bincount(grown.binding, minlength=8) - np.bincount(cloud.binding, minlength=8)
        expected = np.bincount(cloud.binding[np.isin(gradients, parents)], minlength=8)
        np.testing.assert_array_equal(doubled, expected)


@given(sizes, st.integers(0, 70))
@settings(max_examples=60, deadline=None)
def test_budget_is_exact_and_keeps_the_best(size, more):
    num, faces, seed = size
    rng = np.random.default_rng(seed)
    cloud = random_cloud(rng, num, faces)
    importance = rng.permutation(num).astype(float)
    used = len(set(cloud.binding))
    budget = used + more
    left = prune_to_budget(cloud, importance, budget)
    assert len(left) == min(num, budget)
    assert set(left.binding) == set(cloud.binding)
    kept = {tuple(row) for row in left.params["means"]}
    is_kept = np.array([tuple(row) in kept for row in cloud.params["means"]])
    for face in set(cloud.binding):
        of_face = np.flatnonzero(cloud.binding == face)
        assert is_kept[of_face[np.argmax(importance[of_face])]]
    if (~is_kept).any():
        # Whoever stayed with less importance than the best one gone is the last of a face.
        weaker = is_kept & (importance < importance[~is_kept].max())
        assert all(importance[i] == importance[cloud.binding == cloud.binding[i]].max() for i in np.flatnonzero(weaker))


def test_budget_below_the_faces_is_refused():
    cloud = random_cloud(np.random.default_rng(), 30, 10)
    with pytest.raises(UserError, match="max_points=9 is less than one Gaussian for each of the 10 faces"):
        prune_to_budget(cloud, np.arange(30.0), 9)


def test_reset_lowers_opacities_and_forgets_their_moments():
    cloud = random_cloud(np.random.default_rng(), 30, 10)
    reset = reset_opacities(cloud)
    before, after = (1 / (1 + np.exp(-c.params["opacities"].astype(float))) for c in (cloud, reset))
    np.testing.assert_allclose(after, np.minimum(before, 0.01), rtol=1e-5)
    assert not reset.mu["opacities"].any()
    assert not reset.nu["opacities"].any()
    for key in ("means", "scales"):
        np.testing.assert_array_equal(reset.params[key], cloud.params[key])
        np.testing.assert_array_equal(reset.mu[key], cloud.mu[key])


def test_unknown_spread_is_refused():
    cloud = random_cloud(np.random.default_rng(), 5, 2)
    config = dataclasses.replace(FitConfig(percent_dense=0.0), split_std="other")
    with pytest.raises(UserError, match="split_std='other'"):
        densify_and_prune(cloud, np.ones(5), np.zeros(5), np.ones(2), 1.0, config, np.random.default_rng())
