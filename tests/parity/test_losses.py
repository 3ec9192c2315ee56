"""L1, SSIM and LPIPS with their gradients, and the regulariser, JAX against PyTorch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.convert import lpips_from_torch
from pointillist_jax.losses import l1, lpips, ssim
from pointillist_jax.losses.lpips import linear_weights
from tests.losses.test_lpips import random_vgg

torch = pytest.importorskip("torch")
from experiments.torch_reference import losses as twin  # noqa: E402
from tests.parity.compare import assert_close  # noqa: E402

pytestmark = pytest.mark.usefixtures("x64")


def assert_same_loss(rng, ours, theirs, shape) -> None:
    """Values and gradients of both images, each image with its own weight."""
    image, target, weight = rng.uniform(size=shape), rng.uniform(size=shape), rng.normal(size=shape[:-3])

    def total(image, target):
        found = ours(image, target)
        return jnp.sum(found * weight), found

    (_, expected), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(image, target)
    tensors = [torch.tensor(x, requires_grad=True) for x in (image, target)]
    found = theirs(*tensors)
    assert_close(found, expected)
    (found * torch.tensor(weight)).sum().backward()
    for tensor, gradient in zip(tensors, gradients, strict=True):
        assert_close(tensor.grad, gradient)


@pytest.mark.parametrize("name", ["l1", "ssim"])
def test_photometric(rng, name):
    assert_same_loss(rng, {"l1": l1, "ssim": ssim}[name], getattr(twin, name), (2, 3, 14, 23, 3))


def test_lpips(rng):
    vgg = random_vgg(rng)
    params = lpips_from_torch(vgg)
    assert_same_loss(rng, lambda a, b: lpips(a, b, params), twin.Lpips(vgg, linear_weights()), (2, 1, 17, 20, 3))


def test_lpips_of_black_features_has_a_gradient(rng):
    vgg = {name: -np.abs(value) for name, value in random_vgg(rng).items()}
    image = torch.full((1, 16, 16, 3), 0.9, requires_grad=True)
    found = twin.Lpips(vgg, linear_weights())(image, torch.ones(1, 16, 16, 3))
    found.sum().backward()
    assert torch.isfinite(image.grad).all()


def test_regularizer(rng):
    offsets, number = rng.normal(size=(2, 9, 3)), np.array([9, 4])
    offsets[1, 4:] = 0
    expected = [(offsets[i, :n] ** 2).sum(-1).mean() for i, n in enumerate(number)]
    assert_close(twin.regularizer(torch.tensor(offsets), torch.tensor(number)), expected)
    assert_close(twin.regularizer(torch.tensor(offsets[:1])), expected[:1])
