"""JAX against what the PyTorch reference computed once (`tests/parity/golden.py`); needs no torch."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from pointillist_jax.convert.reference import transformer_to_torch
from pointillist_jax.models.ar import hidden_states
from pointillist_jax.models.gaussian_decoder import decode
from tests.models.tiny_ar import loss
from tests.parity import golden

pytestmark = pytest.mark.usefixtures("x64")
TOLERANCE = 1e-10


@pytest.fixture(scope="module")
def kept():
    with np.load(golden.PATH) as file:
        return dict(file)


def assert_close(found, expected, name=""):
    scale = np.abs(expected).max()
    assert np.shape(found) == expected.shape
    assert scale > 0
    assert np.abs(np.asarray(found) - expected).max() <= TOLERANCE * scale, name


def test_point_transformer(kept):
    params, batch = golden.transformer_case()
    hidden = jax.jit(hidden_states, static_argnums=1)(params, golden.MODEL, batch["tokens"], batch["context"])
    assert_close(hidden, kept["hidden"])
    value, gradients = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, golden.MODEL, batch)
    assert_close(value, kept["loss"])
    by_name = transformer_to_torch(gradients, golden.MODEL)
    assert {f"gradient/{name}" for name in by_name} == {name for name in kept if name.startswith("gradient/")}
    for name, gradient in by_name.items():
        assert_close(golden.digest(gradient), kept[f"gradient/{name}"], name)


@pytest.mark.parametrize("kind", golden.DECODERS)
def test_gaussian_decoder(kept, kind):
    config = golden.DECODERS[kind]
    params, inputs = golden.decoder_case(config)
    gaussians, offsets = jax.jit(decode, static_argnums=1)(
        params, config, inputs["points"], inputs["hidden"], None, inputs["context"]
    )
    for name in ("means", "quats", "scales", "opacities", "colors"):
        assert_close(getattr(gaussians, name), kept[f"{kind}/{name}"], name)
    assert_close(offsets, kept[f"{kind}/offsets"])
