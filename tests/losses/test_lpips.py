"""LPIPS against the package's formula in torch with the same random VGG16; gradients by finite differences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.convert import lpips_from_torch
from pointillist_jax.files import FileFormatError, UserError
from pointillist_jax.losses import lpips
from pointillist_jax.losses.lpips import SLICES, linear_weights


def random_vgg(rng) -> dict[str, np.ndarray]:
    """A state dict as torchvision's, with a piece of its classifier, sized so that features neither die nor explode."""
    state = {"classifier.0.weight": np.zeros((2, 2), np.float32)}
    for index, size_in, size_out in (c for s in SLICES for c in s):
        deviation = (2 / (9 * size_in)) ** 0.5
        state[f"features.{index}.weight"] = rng.normal(0, deviation, (size_out, size_in, 3, 3)).astype(np.float32)
        state[f"features.{index}.bias"] = rng.normal(0, 0.1, size_out).astype(np.float32)
    return state


def by_torch(torch, state, image, target):
    """The formula of the `lpips` package, inputs [N, 3, H, W] in [-1, 1]."""
    conv = torch.nn.functional.conv2d
    shift, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))

    def features(x):
        x = (x - shift) / scale
        for index in range(30):
            if index in (4, 9, 16, 23):
                x = torch.nn.functional.max_pool2d(x, 2)
            elif f"features.{index}.weight" in state:
                weight, bias = (torch.tensor(state[f"features.{index}.{k}"]) for k in ("weight", "bias"))
                x = torch.relu(conv(x, weight.to(x.dtype), bias.to(x.dtype), padding=1))
            if index in (3, 8, 15, 22, 29):
                yield x / (torch.sqrt((x**2).sum(1, keepdim=True)) + 1e-10)

    parts = zip(features(image), features(target), linear_weights(), strict=True)
    return sum(conv((a - b) ** 2, torch.tensor(w).view(1, -1, 1, 1).to(a.dtype)).mean((1, 2, 3)) for a, b, w in parts)


def test_equals_the_packages_formula(rng):
    torch = pytest.importorskip("torch")
    state = random_vgg(rng)
    image, target = (rng.uniform(size=(2, 37, 50, 3)).astype(np.float32) for _ in range(2))
    a, b = (torch.tensor(2 * x - 1).permute(0, 3, 1, 2) for x in (image, target))
    a.requires_grad_()
    expected = by_torch(torch, state, a, b)
    expected.sum().backward()
    params = lpips_from_torch(state)
    (_, found), gradient = jax.jit(
        jax.value_and_grad(lambda x: (lambda d: (d.sum(), d))(lpips(x, target, params)), has_aux=True)
    )(image)
    assert expected.min() > 0.05
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-5)
    theirs = 2 * a.grad.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(gradient, theirs, atol=1e-4 * np.abs(theirs).max())
    # The package's own names are read too, and leading axes are a batch.
    slices = {c[0]: i + 1 for i, s in enumerate(SLICES) for c in s}
    renamed = {
        f"net.slice{slices[int(n.split('.')[1])]}.{n.split('.', 1)[1]}": v
        for n, v in state.items()
        if n.startswith("features")
    }
    renamed["lin0.model.1.weight"] = np.zeros((1, 64, 1, 1), np.float32)
    jax.tree.map(np.testing.assert_array_equal, lpips_from_torch(renamed), params)


def test_gradient_by_finite_differences_and_at_features_of_zero(rng):
    with jax.enable_x64(True):
        # A VGG of which nothing but the first slice is left, and that one at width 4: the rest is the same code.
        def convolution(size_in, size_out):
            kernel = rng.normal(0, (2 / 9 / size_in) ** 0.5, (3, 3, size_in, size_out))
            return {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(rng.normal(0, 0.1, size_out))}

        sizes = ((3, 4), (4, 4)), ((4, 5),), ((5, 6),)
        params = {
            "convolutions": tuple(tuple(convolution(*c) for c in s) for s in sizes),
            "linear": tuple(jnp.asarray(rng.uniform(size=s[-1][1])) for s in sizes),
        }
        image, target, direction = (jnp.asarray(rng.uniform(size=(17, 16, 3))) for _ in range(3))
        value = jax.jit(lambda x: lpips(x, target, params))
        along = jnp.vdot(jax.jit(jax.grad(value))(image), direction)
        step = 1e-6
        difference = (value(image + step * direction) - value(image - step * direction)) / (2 * step)
        assert abs(float(along - difference)) < 1e-6 * (1 + abs(float(along)))

        gradient = jax.jit(jax.value_and_grad(lambda x, params: lpips(x, target, params)))
        dead = jax.tree.map(jnp.copy, params)
        dead["convolutions"][2][0]["bias"] -= 1e3
        assert np.isfinite(gradient(image, dead)[1]).all()
        assert abs(float(gradient(target, params)[0])) < 1e-20


def test_linear_weights_are_the_published_ones():
    sums = [float(w.sum()) for w in linear_weights()]
    np.testing.assert_allclose(sums, [6.92599, 8.85833, 17.51501, 51.52132, 47.03486], rtol=1e-5)
    assert min(w.min() for w in linear_weights()) > 0


def test_refusals(rng):
    state = random_vgg(rng)
    with pytest.raises(FileFormatError, match=r"lacks features\.28\.bias; has unexpected other"):
        lpips_from_torch({k: v for k, v in state.items() if k != "features.28.bias"} | {"other": np.zeros(1)})
    with pytest.raises(FileFormatError, match=r"features\.0\.bias of VGG16 .* holds 1 NaN"):
        lpips_from_torch(state | {"features.0.bias": np.full(64, [np.nan] + [0.0] * 63)})
    x = jnp.zeros((15, 40, 3))
    for a, b in ((x, x), (jnp.zeros((20, 20, 3)), jnp.zeros((20, 21, 3))), (jnp.zeros((20, 20, 1)),) * 2):
        with pytest.raises(UserError, match="at least 16 pixels"):
            lpips(a, b, {})
