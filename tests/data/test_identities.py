"""Synthetic people: reproducible, well-formed, different from each other, and with everything in its place."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from pointillist_jax.configs import IdentityConfig
from pointillist_jax.data.identities import (
    BEARDS,
    HAIR_STYLES,
    portrait_params,
    random_motion,
    sample_identity,
    study,
)
from pointillist_jax.data.identities.anatomy import identity_vertices
from pointillist_jax.data.identities.surface import Collider
from pointillist_jax.flame import face_frames, flame_vertices, local_to_global, open_head

# A third of the Gaussians: what is tested does not depend on how many there are.
CONFIG = IdentityConfig(density=0.2)
CUBE_CENTER, CUBE_SIDE = np.array([0.0, 0.0, -0.04]), 0.6


@pytest.fixture(scope="module")
def model():
    return open_head("coarse")


@pytest.fixture(scope="module")
def anatomy(model):
    return study(model)


@pytest.fixture(scope="module")
def by_style(model, anatomy):
    """One person per hair style, each with another beard and glasses; the same face for all."""
    seed = 1234
    return {
        style: sample_identity(
            model, seed, CONFIG, anatomy=anatomy, hair_style=style, beard=BEARDS[i % len(BEARDS)], glasses="thin"
        )
        for i, style in enumerate(HAIR_STYLES)
    }


def posed(model, person, params):
    return local_to_global(person.gaussians, face_frames(flame_vertices(model, params), model.faces))


def part(person, *names: str) -> np.ndarray:
    return np.isin(person.parts, [person.part_names.index(name) for name in names])


def test_a_seed_gives_the_same_bytes_and_another_seed_another_person(model, anatomy, rng):
    seed = int(rng.integers(1 << 30))
    first = sample_identity(model, seed, CONFIG, anatomy=anatomy)
    again = sample_identity(model, seed, CONFIG)
    other = sample_identity(model, seed + 1, CONFIG, anatomy=anatomy)
    for a, b in zip(jax.tree.leaves(first.gaussians), jax.tree.leaves(again.gaussians), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert first.traits == again.traits
    assert first.traits != other.traits
    assert not np.array_equal(first.params.shape, other.params.shape)


def test_gaussians_are_well_formed(model, by_style):
    for person in by_style.values():
        g, num = person.gaussians, person.gaussians.num_gaussians
        assert person.parts.shape == (num,)
        assert sum(person.counts().values()) == num
        for value in (g.means, g.quats, g.scales, g.opacities, g.colors):
            assert value.shape[0] == num
            assert np.isfinite(value).all()
        np.testing.assert_allclose(np.linalg.norm(g.quats, axis=1), 1, atol=1e-5)
        assert np.min(g.scales) > 0
        assert 0 < np.min(g.opacities) <= np.max(g.opacities) < 1
        assert 0 <= np.min(g.colors) <= np.max(g.colors) <= 1
        assert g.binding.dtype == np.int32
        assert 0 <= np.min(g.binding) <= np.max(g.binding) < model.num_faces


def test_canonical_points_lie_in_the_token_cube(model, anatomy, by_style, rng):
    people = list(by_style.values()) + [
        sample_identity(model, int(rng.integers(1 << 30)), CONFIG, anatomy=anatomy, hair_style="long") for _ in range(3)
    ]
    for person in people:
        means = np.asarray(posed(model, person, person.canonical).means)
        assert np.abs(means - CUBE_CENTER).max() < CUBE_SIDE / 2
        np.testing.assert_allclose(person.canonical.jaw_pose, [CONFIG.canonical_jaw, 0, 0], rtol=1e-6)


def test_the_number_of_gaussians_tells_people_apart(model, anatomy, rng):
    seed = int(rng.integers(1 << 30))

    def count(hair_style, beard, density):
        config = dataclasses.replace(CONFIG, density=density)
        person = sample_identity(model, seed, config, anatomy=anatomy, hair_style=hair_style, beard=beard)
        return person.gaussians.num_gaussians

    assert 2 * count("bald", "none", 0.2) < count("long", "full", 0.2)
    assert 2.5 * count("bald", "none", 0.1) < count("bald", "none", 0.4) < 5 * count("bald", "none", 0.1)


def test_parts_appear_as_the_traits_say(by_style):
    for person in by_style.values():
        traits, counts = person.traits, person.counts()
        assert (counts["hair"] == 0) == (traits.hair_style == "bald")
        assert (counts["beard"] == 0) == (traits.beard == "none")
        for name in ("skin", "eyes", "mouth", "teeth", "brow", "lash", "clothing", "glasses"):
            assert counts[name] > 10, name
        assert person.face_flags["hair"].any() == (traits.hair_style != "bald")
        assert person.face_flags["beard"].any() == (traits.beard != "none")
        assert person.face_flags["cheek"].any()
        assert not (person.face_flags["cheek"] & person.face_flags["beard"]).any()


def test_skin_lies_on_its_own_faces_and_hair_grows_from_hairy_ones(model, by_style):
    for person in by_style.values():
        vertices = np.asarray(flame_vertices(model, person.params))
        corners = vertices[np.asarray(model.faces)]
        world = posed(model, person, person.params)
        own = corners[np.asarray(person.gaussians.binding)]
        size = np.linalg.norm(own - own.mean(axis=1, keepdims=True), axis=2).max(axis=1)
        away = np.linalg.norm(np.asarray(world.means) - own.mean(axis=1), axis=1)
        assert (away / size)[part(person, "skin", "teeth", "mouth")].max() < 1.01
        hair = np.asarray(person.gaussians.binding)[part(person, "hair")]
        if person.traits.hair_style == "cropped":  # Short hair stands on its own face.
            assert person.face_flags["hair"][hair].mean() > 0.9
        beard = np.asarray(person.gaussians.binding)[part(person, "beard")]
        if len(beard):
            assert person.face_flags["beard"][beard].mean() > 0.8


def test_hair_and_beards_stay_outside_the_head(model, anatomy, by_style):
    for person in by_style.values():
        collider = Collider(anatomy, identity_vertices(model, np.asarray(person.params.shape)))
        means = np.asarray(posed(model, person, person.params).means, np.float64)
        for name in ("hair", "beard", "glasses"):
            points = means[part(person, name)]
            # Beyond the end of the bust there is no inside.
            points = points[points[:, 1] > -0.10]
            if len(points):
                distance, _ = collider.nearest(points)
                assert np.mean(distance < -0.004) < 0.02, (person.traits.hair_style, name)


def test_no_hair_hangs_before_eyes_and_mouth(model, by_style):
    for person in by_style.values():
        joints = np.asarray(model.joint_regressor @ flame_vertices(model, person.params))
        hair = np.asarray(posed(model, person, person.params).means)[part(person, "hair")]
        middle = joints[3:5].mean(axis=0)
        before = (np.abs(hair[:, 0]) < 0.04) & (hair[:, 1] < middle[1] + 0.01) & (hair[:, 2] > 0.0)
        before &= hair[:, 1] > middle[1] - 0.10
        assert before.sum() <= 0.002 * max(len(hair), 1), person.traits.hair_style


def test_hair_is_rigid_while_the_face_moves_and_a_beard_follows_the_jaw(model, by_style):
    neutral = {style: posed(model, p, p.params).means for style, p in by_style.items()}
    open_mouth = {
        style: posed(model, p, p.params.replace(jaw_pose=p.params.jaw_pose.at[0].set(0.3))).means
        for style, p in by_style.items()
    }
    for style, person in by_style.items():
        moved = np.linalg.norm(np.asarray(open_mouth[style] - neutral[style]), axis=1)
        if person.traits.hair_style in ("long", "bun", "ponytail"):
            assert moved[part(person, "hair")].max() < 2e-3
        if person.traits.beard in ("goatee", "full"):
            assert np.percentile(moved[part(person, "beard")], 90) > 0.01
        assert moved[part(person, "glasses")].max() < 2e-3
    # Glasses keep their form whatever the face does.
    person = by_style["bald"]
    grimace = person.params.replace(expr=np.ones_like(person.params.expr) * 0.5)
    before, after = (
        np.asarray(posed(model, person, p).means)[part(person, "glasses")] for p in (person.params, grimace)
    )
    np.testing.assert_allclose(
        np.linalg.norm(before - before[:1], axis=1), np.linalg.norm(after - after[:1], axis=1), atol=2e-3
    )


def test_people_fit_a_head_without_named_regions(model, rng):
    plain = model.replace(
        face_regions=np.zeros(model.num_faces, np.int32),
        region_names=("head",),
        expr_names=tuple(f"expr_{i:02d}" for i in range(len(model.expr_names))),
    )
    seed = int(rng.integers(1 << 30))
    person = sample_identity(plain, seed, CONFIG, hair_style="short", beard="full")
    counts = person.counts()
    assert min(counts[name] for name in ("skin", "eyes", "hair", "brow", "beard", "clothing")) > 10
    assert np.isfinite(person.gaussians.means).all()
    motion = random_motion(plain, np.asarray(person.params.shape), 7, rng)
    assert np.abs(motion.expr).max() > 0.1


def test_motion_starts_neutral_stays_plausible_and_repeats(model):
    shape = np.zeros(model.shape_dirs.shape[-1])
    first = random_motion(model, shape, 23, np.random.default_rng(5))
    again = random_motion(model, shape, 23, np.random.default_rng(5))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    for name in ("expr", "rotation", "neck_pose", "jaw_pose", "eyes_pose"):
        value = np.asarray(getattr(first, name))
        assert value.shape[0] == 23
        assert not value[0].any()
        assert value.any()
    assert first.expr.min() >= 0
    assert first.expr.max() <= 1
    assert np.abs(first.neck_pose).max() <= 0.56
    assert 0 <= np.min(first.jaw_pose) <= np.max(first.jaw_pose) <= 0.36
    np.testing.assert_allclose(np.mean(first.translation, axis=0), 0, atol=1e-6)
    # A still life has the blinks in it: within one round of faces both eyes close once.
    long = random_motion(model, shape, 60, np.random.default_rng(5))
    assert np.asarray(long.expr)[:, model.expr_names.index("eye-left-closure")].max() > 0.6
    portrait = portrait_params(model, shape, np.random.default_rng(5))
    assert portrait.expr.ndim == 1
    assert np.abs(portrait.neck_pose).max() < 0.3
