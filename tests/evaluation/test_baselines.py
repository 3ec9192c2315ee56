"""Guesses made of training people: means by hand, nearest ones that are known, who is drawn."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from pointillist_jax.evaluation import baselines
from pointillist_jax.files import UserError
from pointillist_jax.flame import flame_vertices
from pointillist_jax.gaussians import SH_C0, Gaussians
from tests.fitting.scenes import ball_head

HEAD = ball_head()


def person(rng, binding) -> Gaussians:
    num = len(binding)
    return Gaussians(
        means=jnp.asarray(rng.normal(size=(num, 3)), jnp.float32),
        quats=jnp.asarray(Rotation.random(num, random_state=rng.integers(99)).as_quat(scalar_first=True), jnp.float32),
        scales=jnp.asarray(rng.uniform(0.2, 1, (num, 3)), jnp.float32),
        opacities=jnp.asarray(rng.uniform(0.2, 0.9, num), jnp.float32),
        colors=jnp.asarray(rng.uniform(size=(num, 3)), jnp.float32),
        binding=jnp.asarray(binding, jnp.int32),
    )


def covariance(gaussians: Gaussians, i: int) -> np.ndarray:
    turn = Rotation.from_quat(np.asarray(gaussians.quats[i]), scalar_first=True).as_matrix()
    return turn @ np.diag(np.asarray(gaussians.scales[i], float) ** 2) @ turn.T


def test_the_mean_of_one_person_with_one_gaussian_a_face_is_that_person(rng):
    one = person(rng, [5, 0, 3])
    mean = baselines.mean_gaussians([one, one], HEAD)
    np.testing.assert_array_equal(mean.binding, [0, 3, 5])
    for i, j in enumerate((1, 2, 0)):
        for name in ("means", "opacities", "colors"):
            np.testing.assert_allclose(getattr(mean, name)[i], getattr(one, name)[j], atol=1e-6)
        np.testing.assert_allclose(covariance(mean, i), covariance(one, j), atol=1e-6)


def test_people_count_by_what_they_hide(rng):
    a, b = person(rng, [2, 2, 7]), person(rng, [2])
    mean = baselines.mean_gaussians([a, b], HEAD)
    np.testing.assert_array_equal(mean.binding, [2, 7])
    first, second, third = (float(o) for o in a.opacities)
    hides = 1 - (1 - first) * (1 - second), float(b.opacities[0])
    of_a = (first * a.means[0] + second * a.means[1]) / (first + second)
    np.testing.assert_allclose(mean.means[0], (hides[0] * of_a + hides[1] * b.means[0]) / sum(hides), atol=1e-5)
    own = (first * covariance(a, 0) + second * covariance(a, 1)) / (first + second)
    expected = (hides[0] * own + hides[1] * covariance(b, 0)) / sum(hides)
    np.testing.assert_allclose(covariance(mean, 0), expected, atol=1e-5)
    # Where only one of two people has something, it is half as opaque, and looks as it does there.
    np.testing.assert_allclose(mean.opacities, [sum(hides) / 2, third / 2], atol=1e-5)
    np.testing.assert_allclose(mean.colors[1], a.colors[2], atol=1e-6)


def test_spherical_harmonics_count_by_their_constant_part(rng):
    plain = person(rng, [1, 4])
    sh = rng.normal(size=(2, 4, 3))
    sh[:, 0] = (np.asarray(plain.colors) - 0.5) / SH_C0
    mean = baselines.mean_gaussians([plain.replace(colors=None, sh=jnp.asarray(sh, jnp.float32))], HEAD)
    np.testing.assert_allclose(mean.colors, plain.colors, atol=1e-5)
    with pytest.raises(UserError, match="at least one training person"):
        baselines.mean_gaussians([], HEAD)


def test_the_mean_identity_counts_missing_offsets_as_zero(rng):
    num = HEAD.shape_dirs.shape[-1]
    shapes, offset = rng.normal(size=(3, num)), rng.normal(size=(HEAD.num_vertices, 3))
    identities = [{"shape": shapes[0]}, {"shape": shapes[1], "static_offset": offset}, {"shape": shapes[2]}]
    mean = baselines.mean_identity(identities, HEAD)
    np.testing.assert_allclose(mean.shape, shapes.mean(0), atol=1e-6)
    np.testing.assert_allclose(mean.static_offset, offset / 3, atol=1e-6)
    assert baselines.mean_identity(identities[::2], HEAD).static_offset is None


def test_the_nearest_portrait_is_of_who_looks_alike_at_any_size(rng):
    faces = rng.integers(0, 256, (4, 8, 8, 3)).repeat(14, axis=1).repeat(14, axis=2).astype(np.uint8)
    noisy = np.clip(faces[2].astype(int) + rng.integers(-40, 40, faces[2].shape), 0, 255).astype(np.uint8)
    small = noisy[::2, ::2]
    distances = baselines.portrait_distances(small, list(faces))
    assert np.argmin(distances) == 2
    assert distances[2] < 0.2 * np.delete(distances, 2).min()
    assert baselines.portrait_distances(faces[0], [faces[0]])[0] == 0


def test_shapes_are_compared_by_where_vertices_lie(rng):
    num = HEAD.shape_dirs.shape[-1]
    mine = HEAD.neutral_params().replace(shape=jnp.asarray(rng.normal(size=num), jnp.float32))
    others = [{"shape": rng.normal(size=num).astype(np.float32)} for _ in range(3)]
    found = baselines.shape_distances(mine, [*others, {"shape": np.asarray(mine.shape)}], HEAD, 0.3)
    for distance, other in zip(found, others, strict=False):
        theirs = HEAD.neutral_params().replace(shape=jnp.asarray(other["shape"]))
        a, b = (np.asarray(flame_vertices(HEAD, p.canonical(0.3)), float) for p in (mine, theirs))
        assert distance == pytest.approx(np.sqrt(np.mean(np.sum((a - b) ** 2, axis=1))), rel=1e-4)
    assert found[3] == 0


def test_random_people_are_the_same_for_a_seed():
    names = [f"p{i}" for i in range(30)]
    chosen = baselines.random_people(names, 8, 3)
    assert chosen == baselines.random_people(names, 8, 3) != baselines.random_people(names, 8, 4)
    assert len(set(chosen)) == 8
    assert chosen == sorted(chosen, key=names.index)
    assert baselines.random_people(names, 0, 3) == baselines.random_people(names, 99, 3) == names
