"""L1, SSIM and PSNR against literal NumPy, torch's convolution, known values and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.files import UserError
from pointillist_jax.losses import l1, psnr, ssim

WINDOW = [0.00102838, 0.00759876, 0.03600077, 0.10936069, 0.21300554, 0.26601173]  # facts 4, then mirrored


def images(shape=(3, 33, 21, 3), seed=None):
    rng = np.random.default_rng(seed)
    target = rng.uniform(size=shape).astype(np.float32)
    return np.clip(target + rng.normal(0, 0.2, shape), 0, 1).astype(np.float32), target


def literal_ssim(x, y, padding):
    """One image, pixel by pixel in float64."""
    window = np.outer(WINDOW + WINDOW[-2::-1], WINDOW + WINDOW[-2::-1])
    if padding == "same":
        x, y = (np.pad(v.astype(np.float64), [(5, 5), (5, 5), (0, 0)]) for v in (x, y))
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11].astype(np.float64), y[i : i + 11, j : j + 11].astype(np.float64)

            def mean(v):
                return np.einsum("ij,ijc->c", window, v)

            ma, mb = mean(a), mean(b)
            va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
            values.append((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    return np.mean(values)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_ssim_is_the_definition(padding):
    x, y = images()
    expected = [literal_ssim(a, b, padding) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(ssim(x, y, padding=padding), expected, atol=1e-5)


def test_ssim_is_torchs_convolution():
    torch = pytest.importorskip("torch")
    x, y = images((2, 40, 52, 3))
    window = torch.tensor(np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2), dtype=torch.float32)
    window = (window / window.sum())[:, None] @ (window / window.sum())[None]
    kernel = window.expand(3, 1, 11, 11)

    def blur(v):
        return torch.nn.functional.conv2d(v, kernel, padding=5, groups=3)

    def by_torch(a, b):
        ma, mb = blur(a), blur(b)
        va, vb, cov = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
        return ((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))).mean()

    a, b = (torch.tensor(v).permute(0, 3, 1, 2) for v in (x, y))
    a.requires_grad_()
    value = by_torch(a, b)
    value.backward()
    ours, gradient = jax.value_and_grad(lambda v: ssim(v, y).mean())(jnp.asarray(x))
    assert abs(float(ours) - value.item()) < 1e-5
    expected = a.grad.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(gradient, expected, atol=1e-5 * np.abs(expected).max() + 1e-8)


def test_valid_ssim_is_scikit_images():
    metrics = pytest.importorskip("skimage.metrics")
    x, y = images((2, 40, 52, 3))
    how = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    for i in range(2):
        # Its mean over the part without borders.
        expected = metrics.structural_similarity(x[i], y[i], channel_axis=-1, **how)
        assert abs(float(ssim(x[i], y[i], padding="valid")) - expected) < 1e-5


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_gradients_by_finite_differences(padding):
    x, y = images((14, 13, 3))
    direction = np.random.default_rng().normal(size=x.shape)
    with jax.enable_x64(True):
        x, y, direction = (jnp.asarray(v, jnp.float64) for v in (x, y, direction))
        for loss in (lambda v: ssim(v, y, padding=padding), lambda v: psnr(v, y)):
            along = jnp.vdot(jax.grad(loss)(x), direction)
            step = 1e-5
            difference = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
            assert abs(float(along - difference)) < 1e-7 * (1 + abs(float(along)))


def test_known_values():
    x, y = images()
    np.testing.assert_allclose(ssim(x, x), 1.0, atol=1e-6)
    np.testing.assert_allclose(l1(x, y), np.abs(x - y).mean((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(psnr(x, y), -10 * np.log10(((x - y) ** 2).mean((1, 2, 3))), rtol=1e-5)
    assert np.isinf(psnr(x, x)).all()


def test_constant_images_leave_the_luminance_term():
    """In float64: in float32 the variances of flat images are rounding errors, 1e-7 beside C2 = 9e-4."""
    a, b = np.full((20, 20, 3), 0.25), np.full((20, 20, 3), 0.75)
    expected = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
    with jax.enable_x64(True):
        value = ssim(jnp.asarray(a, jnp.float64), jnp.asarray(b, jnp.float64), padding="valid")
        np.testing.assert_allclose(value, expected, atol=1e-12)
    np.testing.assert_allclose(ssim(a, b, padding="valid"), expected, atol=1e-3)


def test_bad_input_is_a_sentence():
    x, y = images((12, 12, 3))
    with pytest.raises(UserError, match="cannot be compared"):
        l1(x, y[:-1])
    with pytest.raises(UserError, match="at least 11"):
        ssim(x[:8], y[:8], padding="valid")
    with pytest.raises(UserError, match='"same" or "valid"'):
        ssim(x, y, padding="reflect")
    with pytest.raises(UserError, match="float32"):
        ssim(jnp.asarray(x, jnp.bfloat16), jnp.asarray(y, jnp.bfloat16))
