"""Pictures to numbers: each metric's unit, what a missing network or face does, what cross-reenactment leaves out."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from skimage.metrics import peak_signal_noise_ratio

from pointillist_jax.evaluation.scores import METRICS, PER_PICTURE, Face, Networks, compare, look, mean_scores

POINTS = np.random.default_rng(0).uniform(0.2, 0.8, (478, 2))


def landmarks(picture):
    """A face that moves right by the picture's mean red and turns by its mean green; none in dark pictures."""
    red, green, _ = picture.reshape(-1, 3).mean(axis=0) / 255
    if red < 0.1:
        return None
    return Face(POINTS + np.array([red, 0.0]), Rotation.from_euler("xyz", [0, green, 0]).as_matrix())


NETWORKS = Networks(
    inception=lambda pictures: pictures.reshape(len(pictures), -1)[:, :7] / 255.0,
    landmarks=landmarks,
    pose=lambda pictures: np.stack(
        [Rotation.from_euler("xyz", [p[..., 2].mean() / 255, 0, 0]).as_matrix() for p in pictures]
    ),
    clip=lambda pictures: pictures.reshape(len(pictures), -1, 3).mean(axis=1),
)


def plain(*colors):
    return np.stack([np.full((18, 20, 3), np.array(color), np.float32) for color in colors])


def test_units():
    truth = look(plain((0.4, 0.2, 0.2)), NETWORKS)
    seen = look(plain((0.6, 0.4, 0.4)), NETWORKS)
    found = compare(seen, truth, NETWORKS, portrait=np.array([1.0, 0, 0]))
    assert found["akd"] == pytest.approx(1e3 * 0.2)
    assert found["akd_px"] == pytest.approx(512 * 0.2)
    assert found["apd_mp_deg"] == pytest.approx(np.degrees(0.2))
    assert found["apd_mp_mrad"] == pytest.approx(200 / 3)
    assert found["apd_deg"] == pytest.approx(np.degrees(0.2))
    assert found["apd_mrad"] == pytest.approx(200 / 3)
    assert found["clip"] == pytest.approx(0.6 / np.sqrt(0.6**2 + 2 * 0.4**2))
    expected = peak_signal_noise_ratio(truth.pictures[0], seen.pictures[0], data_range=1)
    assert found["psnr"] == pytest.approx(expected, rel=1e-4)
    assert set(found) == set(PER_PICTURE) - {"lpips"}
    np.testing.assert_allclose(seen.features, np.resize([0.6, 0.4, 0.4], 7)[None])


def test_a_picture_without_a_face_has_no_distance_and_equal_pictures_a_finite_psnr():
    truth = look(plain((0.4, 0.2, 0.2), (0.4, 0.2, 0.2)), NETWORKS)
    seen = look(plain((0.05, 0.2, 0.2), (0.4, 0.2, 0.2)), NETWORKS)
    found = compare(seen, truth, NETWORKS)
    assert np.isnan(found["akd"][0])
    assert np.isnan(found["apd_mp_deg"][0])
    assert found["akd"][1] == 0
    assert found["psnr"][1] == 100
    assert "clip" not in found
    assert mean_scores({"akd": [None, 2.0, 4.0], "apd": [None, None]}) == {"akd": 3.0, "apd": None}


def test_what_is_available():
    nothing = Networks()
    assert nothing.available("self") == ("psnr", "ssim")
    assert nothing.available("cross") == ()
    assert NETWORKS.available("self") == tuple(name for name in METRICS if name != "lpips")
    assert NETWORKS.available("cross") == tuple(n for n in METRICS if n not in ("psnr", "ssim", "lpips"))
    truth = look(plain((0.4, 0.2, 0.2)), NETWORKS)
    assert not {"psnr", "ssim"} & set(compare(truth, truth, NETWORKS, pixels=False))
    bare = look(plain((0.4, 0.2, 0.2)), nothing)
    assert set(compare(bare, bare, nothing)) == {"psnr", "ssim"}
