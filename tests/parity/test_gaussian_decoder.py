"""The Gaussian decoder: every attribute and the gradient of every parameter, JAX against PyTorch."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.models.gaussian_decoder import decode
from tests.models.test_gaussian_decoder import COLORED, CONFIG, FIELDS, random_inputs, random_params

torch = pytest.importorskip("torch")
from experiments.torch_reference.gaussian_decoder import GaussianDecoder  # noqa: E402
from experiments.torch_reference.layers import load_arrays  # noqa: E402
from tests.parity.compare import assert_close, assert_same_gradients  # noqa: E402


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("inputs", "cross"), [
    ("both", True), ("ar_only", False), ("position_only", False), ("none", False),
])  # fmt: skip
def test_attributes_and_gradients(rng, inputs, cross):
    assert_same(rng, dataclasses.replace(CONFIG, inputs=inputs, cross_attention=cross, dtype="float64"), [7, 4])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("inputs", ["both", "position_only"])
def test_colours_of_the_portrait(rng, inputs):
    """Every token of the context has its place there, so none of them is padding."""
    assert_same(rng, dataclasses.replace(COLORED, inputs=inputs, dtype="float64"), [7, 7])


def assert_same(rng, config, context_lengths) -> None:
    """Attributes, and their gradients by every parameter and input."""
    params = random_params(config, dtype=jnp.float64)
    arrays = [x.astype(np.float64) for x in random_inputs(rng, points=20, config=config)]
    lengths, context_lengths = np.array([20, 13]), np.array(context_lengths)
    real = np.arange(20) < lengths[:, None]
    sizes = {"means": 3, "quats": 4, "scales": 3, "opacities": 0, "colors": 3, "offsets": 3}
    # Scales are millimetres. What padding looks like has no meaning, only that it is not seen.
    weights = {
        name: (100 if name == "scales" else 1) * rng.normal(size=(2, 20, *[n][: n > 0])) * (real[..., None] if n else 1)
        for name, n in sizes.items()
    }

    def total(params, *arrays):
        points, hidden, context = arrays
        decoded = decode(params, config, points, hidden, lengths, context, context_lengths)
        found = {name: getattr(decoded.gaussians, name) for name in FIELDS} | {"offsets": decoded.offsets}
        return sum(jnp.sum(x * weights[name]) for name, x in found.items()), found

    (_, expected), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True))(params, *arrays)
    twin = GaussianDecoder(config)
    load_arrays(twin, jax.tree.map(np.asarray, params))
    points, hidden, context = (torch.tensor(x, requires_grad=True) for x in arrays)
    found = twin(points, hidden, torch.tensor(lengths), context, torch.tensor(context_lengths))._asdict()
    assert not found["opacities"][1, 13:].any()
    for name, value in found.items():
        assert_close(value[torch.tensor(real)], expected[name][real], name=name)
    sum((x * torch.tensor(weights[name])).sum() for name, x in found.items()).backward()
    for name, x, gradient in zip(
        ("points", "hidden", "context"), (points, hidden, context), gradients[1:], strict=True
    ):
        assert (x.grad is not None) == np.any(gradient), name
        if x.grad is not None:
            assert_close(x.grad, gradient, name=name)
    if config.inputs == "none":  # One Gaussian for all: nothing but the bias matters.
        assert twin.head.weight.grad.abs().max() == 0
        assert_close(twin.head.bias.grad, gradients[0]["head"]["bias"])
    else:
        assert_same_gradients(twin, gradients[0], load_arrays)


def test_it_starts_from_equal_gaussians(rng):
    points, hidden, context = map(torch.tensor, random_inputs(rng))
    found = GaussianDecoder(CONFIG)(points, hidden, None, context)
    assert torch.equal(found.means, points)
    torch.testing.assert_close(found.opacities, torch.full((2, 50), 0.1))
    torch.testing.assert_close(found.scales, torch.full((2, 50, 3), np.exp(-5.0), dtype=torch.float32))


@pytest.mark.parametrize("config", [CONFIG, COLORED], ids=["plain", "colours"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.03)])
def test_narrow_dtypes(rng, config, dtype, tolerance):
    config = dataclasses.replace(config, dtype=dtype)
    params = random_params(config)
    points, hidden, context = random_inputs(rng, config=config)
    expected = decode(params, config, points, hidden, None, context).gaussians
    twin = GaussianDecoder(config)
    load_arrays(twin, jax.tree.map(np.asarray, params))
    found = twin(torch.tensor(points), torch.tensor(hidden), None, torch.tensor(context))
    for name in FIELDS:
        assert_close(getattr(found, name), getattr(expected, name), tolerance, name)
