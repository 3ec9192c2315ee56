"""DinoV2 against `transformers`' own models with random weights, and what it refuses."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.convert import dinov2_from_torch
from pointillist_jax.files import UserError
from pointillist_jax.models.image_encoder import NAMES, DinoV2, interpolation_matrix, normalize_images
from pointillist_jax.sharding import RULES, make_mesh, shardings_for
from tests.convert.torch_weights import huggingface_dinov2, huggingface_features

TINY = {"width": 32, "layers": 2, "heads": 2}


def assert_same_features(model, module, images, atol: float, dtype=np.float32):
    params = dinov2_from_torch(module.state_dict(), model, dtype=dtype)
    # TF32 would be the default on a GPU.
    with jax.default_matmul_precision("highest"):
        found = jax.jit(model.apply)({"params": params}, images)
    expected = huggingface_features(module, images)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert np.std(value) > 0.1
        np.testing.assert_allclose(found[name], value, atol=atol, rtol=0, err_msg=name)


@pytest.mark.parametrize(
    ("size", "registers", "swiglu"),
    [
        ((224, 224), 4, False),
        ((518, 518), 4, False),
        ((70, 154), 4, True),
        ((518, 518), 0, False),
        ((84, 42), 0, False),
    ],
)
def test_it_equals_transformers(rng, size, registers, swiglu):
    module = huggingface_dinov2(rng, **TINY, registers=registers, swiglu=swiglu)
    interpolation, mlp = "antialias" if registers else "transformers", "swiglu" if swiglu else "gelu"
    model = DinoV2(**TINY, registers=registers, mlp=mlp, interpolation=interpolation)
    assert_same_features(model, module, rng.normal(size=(1, *size, 3)).astype(np.float32), 2e-5)


def test_it_equals_transformers_in_double_precision(rng, x64):
    module = huggingface_dinov2(rng, **TINY, image_size=84).double()
    model = DinoV2(**TINY, registers=4, image_size=84, dtype="float64")
    assert_same_features(model, module, rng.normal(size=(1, 84, 84, 3)), 1e-10, np.float64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("vitb14_reg", [(224, 224), (518, 518), (322, 238)]),
        ("vitl14_reg", [(224, 224), (518, 518), (238, 322)]),
        ("vits14", [(518, 518)]),
    ],
)
def test_published_sizes_equal_transformers(rng, name, sizes):
    model = DinoV2.from_name(name)
    size = {"width": model.width, "layers": model.layers, "heads": model.heads, "registers": model.registers}
    module = huggingface_dinov2(rng, **size)
    for height, width in sizes:
        assert_same_features(model, module, rng.normal(size=(1, height, width, 3)).astype(np.float32), 1e-4)


@pytest.mark.parametrize("size", [5, 16, 36, 37, 40, 61])
def test_positions_are_resized_as_torch_resizes_them(rng, size):
    import torch

    grid = rng.normal(size=(37, 37))
    table = torch.from_numpy(grid)[None, None]
    for rule, options in {
        "antialias": {"size": (size, size), "antialias": True},
        "transformers": {"size": (size, size)},
        "hub": {"scale_factor": ((size + 0.1) / 37, (size + 0.1) / 37)},
    }.items():
        expected = torch.nn.functional.interpolate(table, mode="bicubic", **options)[0, 0].numpy()
        weights = interpolation_matrix(size, 37, rule)
        # Torch makes some of its weights in float32.
        np.testing.assert_allclose(weights @ grid @ weights.T, expected, atol=1e-5, err_msg=rule)


def test_the_rules_of_torch_hub_and_transformers_differ_off_the_trained_size():
    assert np.abs(interpolation_matrix(16, 37, "hub") - interpolation_matrix(16, 37, "transformers")).max() > 1e-2
    np.testing.assert_allclose(interpolation_matrix(37, 37, "transformers"), np.eye(37), atol=1e-12)


def test_names_give_the_published_sizes():
    assert NAMES == ("vits14", "vits14_reg", "vitb14", "vitb14_reg", "vitl14", "vitl14_reg", "vitg14", "vitg14_reg")
    images = jax.ShapeDtypeStruct((1, 28, 28, 3), jnp.float32)
    for name, millions in {"vits14": 22, "vitb14_reg": 87, "vitl14_reg": 304, "dinov2_vitg14": 1136}.items():
        model = DinoV2.from_name(name)
        shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), images))
        number = sum(np.prod(x.shape, dtype=int) for x in jax.tree.leaves(shapes))
        assert round(number / 1e6) == millions, name
        assert ("register_tokens" in shapes["params"]) == name.endswith("_reg")
        assert model.interpolation == ("antialias" if name.endswith("_reg") else "hub")
    assert DinoV2.from_name("vits14", interpolation="transformers").interpolation == "transformers"


def test_it_can_be_trained_and_run_in_bfloat16(rng):
    """The gradient reaches every parameter and is the loss's slope, with layers recomputed; bf16 stays near float32."""
    images = jnp.asarray(rng.normal(size=(2, 28, 42, 3)), jnp.float32)
    model = DinoV2(width=16, layers=2, heads=2, registers=2, image_size=28, attention="xla", remat=True)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), images))["params"]
    params, direction = (
        jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), x.dtype), shapes) for _ in range(2)
    )
    target = jnp.asarray(rng.normal(size=(2, 32)), jnp.float32)

    def features(params, **options):
        out = model.clone(**options).apply({"params": params}, images)
        return jnp.concatenate([out["patch_tokens"].mean(1), out["cls"]], axis=-1)

    loss = jax.jit(lambda p: (jnp.sum((features(p) - target) ** 2), features(p)))
    grads = jax.jit(jax.grad(lambda p: jnp.sum((features(p) - target) ** 2)))(params)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert float(jnp.abs(grad).max()) > 0, jax.tree_util.keystr(path)
    step = 1e-3
    ahead, behind = (loss(jax.tree.map(lambda p, d, s=s: p + s * d, params, direction))[0] for s in (step, -step))
    slope = sum(float(jnp.vdot(g, d)) for g, d in zip(*map(jax.tree.leaves, (grads, direction)), strict=True))
    assert (float(ahead) - float(behind)) / (2 * step) == pytest.approx(slope, rel=2e-2)
    half = jax.jit(lambda p: features(p, dtype="bfloat16"))(params)
    assert half.dtype == jnp.float32
    assert 1e-5 < np.abs(half - loss(params)[1]).max() < 0.1


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_every_parameter_names_axes_of_the_rules(mlp):
    model = DinoV2(**TINY, registers=4, mlp=mlp)
    images = jax.ShapeDtypeStruct((1, 28, 28, 3), jnp.float32)
    boxed = jax.eval_shape(model.init, jax.random.key(0), images)
    boxes = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert all(isinstance(box, nn.LogicallyPartitioned) for box in boxes)
    assert {axis for box in boxes for axis in box.names if axis} <= {name for name, _ in RULES}
    shardings = shardings_for(boxed, make_mesh("", jax.devices()[:1]))["params"]
    assert shardings["layers"]["mlp"]["up"]["kernel"].spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")


def test_images_are_normalised_as_the_training_photographs():
    white = np.asarray(normalize_images(jnp.ones((1, 1, 3))))
    np.testing.assert_allclose(white[0, 0], [2.2489, 2.4286, 2.64], atol=1e-4)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({}, (1, 100, 98, 3), "100 × 98 pixels.*multiples of 14; resize to 98 × 98"),
        ({}, (1, 0, 14, 3), "multiples of 14"),
        ({}, (1, 3, 28, 28), "expected.*RGB last"),
        ({}, (28, 28, 3), "batch axis"),
        ({"heads": 5}, (1, 28, 28, 3), "heads"),
        ({"mlp": "relu"}, (1, 28, 28, 3), "'relu'"),
        ({"interpolation": "bilinear"}, (1, 28, 28, 3), "'bilinear'"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(options, shape, message):
    with pytest.raises(UserError, match=message):
        DinoV2(**(TINY | options)).init(jax.random.key(0), jnp.zeros(shape))


def test_an_unknown_name_is_refused():
    with pytest.raises(UserError, match=r"no DINOv2 model 'vith14'; there are vits14, vits14_reg"):
        DinoV2.from_name("vith14")
