"""Image and point encoders and the context made of them, with all gradients, JAX against PyTorch."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.configs import EncoderConfig
from pointillist_jax.models.condition import condition_specs, encode_condition, encode_features, encoder_specs
from pointillist_jax.models.image_encoder import DinoV2, dinov2_param_specs
from pointillist_jax.models.layers import init_params
from pointillist_jax.models.point_encoder import PointEncoder, point_encoder_param_specs
from tests.models.tiny_ar import changed
from tests.parity.heads import params_of, random_head

torch = pytest.importorskip("torch")
from experiments.torch_reference import condition, flame, image_encoder, point_encoder  # noqa: E402
from experiments.torch_reference.layers import load_arrays  # noqa: E402
from tests.parity.compare import assert_close, assert_same_gradients, to_torch  # noqa: E402

pytestmark = pytest.mark.usefixtures("x64")


def random_weights(rng, specs):
    """Every parameter random: what starts as zeros and ones would hide the rest."""
    params = init_params(specs, jax.random.PRNGKey(0), jnp.float64)
    return jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape), params)


def assert_same(rng, ours, params, theirs, x) -> None:
    """The output of one array, its gradient, and those of all parameters. `ours`: (params, x) → array."""
    load_arrays(theirs, jax.tree.map(np.asarray, params))
    tensor = torch.tensor(x, requires_grad=True)
    found = theirs(tensor)
    bar = rng.normal(size=tuple(found.shape))

    def total(params, x):
        out = ours(params, x)
        return jnp.sum(out * bar), out

    (_, expected), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(params, x)
    assert_close(found, expected)
    (found * torch.tensor(bar)).sum().backward()
    assert_close(tensor.grad, gradients[1])
    assert_same_gradients(theirs, gradients[0], load_arrays)


@pytest.mark.parametrize(("options", "size"), [
    ({}, (56, 56)),
    ({"registers": 3, "mlp": "swiglu"}, (70, 28)),
    ({"interpolation": "hub"}, (42, 70)),
    ({"interpolation": "transformers"}, (42, 70)),
], ids=["plain", "registers", "hub", "transformers"])  # fmt: skip
def test_image_encoder(rng, options, size):
    model = DinoV2(width=24, layers=2, heads=2, image_size=56, dtype="float64", attention="xla", **options)
    options = {name: value for name, value in options.items() if name != "mlp"} | {"swiglu": "mlp" in options}
    theirs = image_encoder.ImageEncoder(24, 2, 2, image_size=56, dtype=torch.float64, **options)

    def ours(params, images):
        found = model.apply({"params": params}, images)
        return jnp.concatenate([found["cls"][:, None], found["patch_tokens"]], axis=1)

    assert_same(rng, ours, random_weights(rng, dinov2_param_specs(model)), theirs, rng.normal(size=(2, *size, 3)))


def test_published_sizes():
    """Without allocating any: the same number of parameters under each name."""
    for name in ("vits14", "vitb14_reg", "vitg14", "vitg14_reg"):
        model = DinoV2.from_name(name)
        with torch.device("meta"):
            theirs = image_encoder.ImageEncoder.named(name, 518)
        assert theirs.interpolation == model.interpolation
        specs = jax.tree.leaves(dinov2_param_specs(model), is_leaf=lambda x: hasattr(x, "init"))
        assert sum(p.numel() for p in theirs.parameters()) == sum(int(np.prod(x.shape)) for x in specs)


def test_point_encoder(rng):
    sizes = {"width": 24, "layers": 2, "heads": 2, "queries": 5, "frequencies": 3}
    model = PointEncoder(**sizes, dtype="float64", attention="xla")
    theirs = point_encoder.PointEncoder(**sizes, dtype=torch.float64)
    params = random_weights(rng, point_encoder_param_specs(model))
    x = rng.normal(size=(2, 30, 6))
    assert_same(rng, lambda params, x: model.apply({"params": params}, x), params, theirs, x)


@pytest.mark.parametrize("portrait_size", [28, 61])
def test_condition(rng, portrait_size):
    config = changed(dtype="float64", encoder=EncoderConfig(image_size=28, num_points=40))
    head = random_head(rng)
    given = {
        "portrait": rng.integers(0, 256, (2, portrait_size, portrait_size, 3)).astype(np.uint8),
        "flame": params_of(rng, head, 2),
    }
    params = random_weights(rng, condition_specs(config))
    theirs = condition.Condition(config, flame.make_head(vars(head)))
    load_arrays(theirs, jax.tree.map(np.asarray, params))
    expected = encode_condition(params, config, head, given)
    assert_close(theirs(to_torch(given)), expected)
    # Stored features of frozen encoders, which stay float32.
    frozen = changed(dtype="float64", encoder=dataclasses.replace(config.encoder, frozen=True))
    narrow = jax.tree.map(lambda x: x.astype(jnp.float32), random_weights(rng, encoder_specs(config)))
    features = encode_features(narrow, frozen, head, **given)
    encoders = condition.Encoders(frozen)
    load_arrays(encoders, jax.tree.map(np.asarray, narrow))
    as_torch = to_torch(given)
    found = encoders.encode(flame.make_head(vars(head)), as_torch["portrait"], as_torch["flame"])
    for name, value in found.items():
        assert_close(value, features[name], 1e-5, name)
    projections = {name: value for name, value in params.items() if name.endswith("projection")}
    theirs = condition.Condition(frozen)
    load_arrays(theirs, jax.tree.map(np.asarray, projections))
    expected = encode_condition(projections, frozen, head, {"features": features})
    assert_close(theirs({"features": to_torch(features)}), expected)
