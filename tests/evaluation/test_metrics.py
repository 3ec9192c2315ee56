"""The arithmetic of metrics against other formulas for the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.spatial.transform import Rotation

from pointillist_jax.evaluation import metrics
from pointillist_jax.files import UserError


@pytest.mark.parametrize(("many", "few", "width"), [(60, 40, 8), (12, 30, 20), (9, 7, 40)])
def test_frechet_distance_is_the_one_with_a_matrix_square_root(rng, many, few, width):
    a = rng.normal(size=(many, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)
    b = rng.normal(size=(few, width)) * rng.uniform(0.5, 2, width)
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    # Where there are fewer pictures than features the square root exists in the limit of a little noise.
    noise = 0 if min(many, few) > width else 1e-9
    root = np.real(sqrtm(covariances[0] @ covariances[1] + noise * np.eye(width)))
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + sum(np.trace(c) for c in covariances) - 2 * np.trace(root)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6 if not noise else 1e-3)


def test_frechet_distance_of_equal_and_of_shifted_sets(rng):
    a = rng.normal(size=(30, 50))
    assert metrics.frechet_distance(a, a[::-1]) == pytest.approx(0, abs=1e-10)
    assert metrics.frechet_distance(a, a + 0.5) == pytest.approx(50 * 0.25, rel=1e-12)
    assert metrics.frechet_distance(a, a[:, ::-1]) > 1
    with pytest.raises(UserError, match="two or more"):
        metrics.frechet_distance(a[:1], a)


def test_keypoint_distance_is_in_the_landmarks_unit(rng):
    points = rng.uniform(size=(4, 478, 2))
    np.testing.assert_allclose(metrics.keypoint_distance(points, points + np.array([0.03, 0.04])), 0.05)
    moved = points.copy()
    moved[:, 0] += [3.0, 4.0]
    np.testing.assert_allclose(metrics.keypoint_distance(points, moved), 5 / 478)


def test_angles_between_rotations(rng):
    a, b = Rotation.random(50, random_state=1), Rotation.random(50, random_state=2)
    expected = (a.inv() * b).magnitude()
    np.testing.assert_allclose(metrics.geodesic_angle(a.as_matrix(), b.as_matrix()), expected, atol=1e-12)
    # Tiny angles keep their digits, which an arc cosine loses.
    tiny = Rotation.from_rotvec([0, 1e-9, 0]) * a
    np.testing.assert_allclose(metrics.geodesic_angle(a.as_matrix(), tiny.as_matrix()), 1e-9, rtol=1e-5)
    half_turn = np.diag([1.0, -1.0, -1.0])
    assert metrics.geodesic_angle(np.eye(3), half_turn) == pytest.approx(np.pi)


def test_euler_angles_are_6drepnets_and_differ_the_short_way_round(rng):
    angles = rng.uniform(-1.4, 1.4, (30, 3))
    # Pitch about x, then yaw about y, then roll about z, all about fixed axes.
    matrices = Rotation.from_euler("xyz", angles).as_matrix()
    np.testing.assert_allclose(metrics.euler_angles(matrices), angles, atol=1e-12)
    other = Rotation.from_euler("xyz", angles + np.array([0.1, -0.1, 0.04])).as_matrix()
    np.testing.assert_allclose(metrics.euler_distance(matrices, other), 0.08, atol=1e-12)
    a, b = (Rotation.from_euler("xyz", [0, 0, roll]).as_matrix() for roll in (3.1, -3.1))
    assert metrics.euler_distance(a, b) == pytest.approx((2 * np.pi - 6.2) / 3)


def test_cosine_ignores_length(rng):
    a, b = rng.normal(size=(2, 7, 16))
    expected = [np.dot(x, y) / np.sqrt(np.dot(x, x) * np.dot(y, y)) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(metrics.cosine(3 * a, 0.2 * b), expected)
    np.testing.assert_allclose(metrics.cosine(a, a[:1]), [*metrics.cosine(a, np.tile(a[:1], (7, 1)))])
