"""PointEncoder against a torch twin through the checkpoint's layout, and the points that heads are sampled at."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.convert import load_torch_file, point_encoder_from_torch
from pointillist_jax.files import FileFormatError, UserError
from pointillist_jax.models.point_encoder import PointEncoder, fourier_features
from pointillist_jax.sharding import RULES
from tests.convert.torch_weights import randomize

torch = pytest.importorskip("torch")
from tests.models import torch_point_encoder as twin  # noqa: E402

SMALL = {"width": 128, "layers": 2, "heads": 2, "queries": 9}
PREFIXES = (
    "model.shape_model.",
    "conditioner.point_encoder.model.shape_model.",
    "point_encoder.model.shape_model.",
    "",
)


def oriented_points(rng, *shape: int) -> np.ndarray:
    normals = rng.normal(size=(*shape, 3))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    return np.concatenate([rng.uniform(-1, 1, (*shape, 3)), normals], axis=-1).astype(np.float32)


@pytest.fixture
def encoder(rng):
    made = twin.PointEncoder(**SMALL)
    randomize(made, rng)
    return made


@pytest.fixture
def state(encoder):
    """Of the encoder alone."""
    return {f"encoder.{name}": value for name, value in twin.published(encoder).items()}


def assert_same_tokens(model, params, encoder, points, atol: float) -> None:
    with torch.no_grad():
        expected = encoder(torch.from_numpy(points)).numpy()
    # TF32 would be the default on a GPU.
    with jax.default_matmul_precision("highest"):
        found = jax.jit(model.apply)({"params": params}, points)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(found, expected, atol=atol, rtol=0)


def test_it_equals_the_twin_through_every_layout(rng, tmp_path, encoder, state):
    params = point_encoder_from_torch(state)
    model = PointEncoder(**SMALL)
    assert_same_tokens(model, params, encoder, oriented_points(rng, 2, 50), 1e-5)
    for prefix in PREFIXES:
        torch.save({"state_dict": twin.checkpoint(encoder, prefix), "epoch": 1}, tmp_path / "shapevae.ckpt")
        again = point_encoder_from_torch(load_torch_file(tmp_path / "shapevae.ckpt"))
        assert jax.tree.all(jax.tree.map(np.array_equal, params, again)), prefix
    boxed = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 50, 6), jnp.float32))
    shapes = nn.unbox(boxed)["params"]
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, shapes)
    boxes = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert {axis for box in boxes for axis in box.names if axis} <= {name for name, _ in RULES}


def test_it_equals_the_twin_in_double_precision(rng, x64, encoder, state):
    params = point_encoder_from_torch(state, dtype=np.float64)
    points = oriented_points(rng, 1, 30).astype(np.float64)
    model = PointEncoder(**SMALL, dtype="float64", attention="xla")
    precise = twin.PointEncoder(**SMALL, dtype=torch.float64)
    precise.load_state_dict(encoder.state_dict())
    assert_same_tokens(model, params, precise.double(), points, 1e-11)


@pytest.mark.slow
def test_the_published_size_equals_the_twin(rng):
    encoder = twin.PointEncoder()
    randomize(encoder, rng)
    model = PointEncoder()
    params = point_encoder_from_torch(twin.checkpoint(encoder))
    assert round(sum(x.size for x in jax.tree.leaves(params)) / 1e6, 1) == 64.0
    assert_same_tokens(model, params, encoder, oriented_points(rng, 1, 4096), 1e-5)


def test_fourier_features_keep_the_frequencies_of_an_axis_together():
    features = fourier_features(jnp.asarray([[0.5, -0.25, 1.0, 7.0]]), 3)
    angles = [0.5, 1, 2, -0.25, -0.5, -1, 1, 2, 4]
    np.testing.assert_allclose(features[0], [0.5, -0.25, 1, *np.sin(angles), *np.cos(angles), 7], atol=1e-6)


def random_start(rng, **options):
    """A tiny model, random parameters and points."""
    model = PointEncoder(width=16, layers=2, heads=2, queries=4, attention="xla", **options)
    points = jnp.asarray(oriented_points(rng, 2, 20))
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), points))["params"]
    return model, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), x.dtype), shapes), points


def test_it_ignores_the_order_of_points_and_runs_in_bfloat16(rng):
    model, params, points = random_start(rng)
    run = jax.jit(model.apply)
    tokens = run({"params": params}, points)
    np.testing.assert_allclose(run({"params": params}, points[:, ::-1]), tokens, atol=1e-5)
    half = jax.jit(model.clone(dtype="bfloat16").apply)({"params": params}, points)
    assert half.dtype == jnp.float32
    assert 1e-5 < np.abs(half - tokens).max() < 0.1


@pytest.mark.slow
def test_the_gradient_reaches_every_parameter_and_recomputing_layers_changes_nothing(rng):
    model, params, points = random_start(rng)
    target = jnp.asarray(rng.normal(size=(2, 4, 16)), jnp.float32)

    def gradient(remat):
        run = model.clone(remat=remat).apply
        return jax.jit(jax.grad(lambda p: jnp.mean((run({"params": p}, points) - target) ** 2)))(params)

    for (path, one), two in zip(
        jax.tree_util.tree_leaves_with_path(gradient(False)), jax.tree.leaves(gradient(True)), strict=True
    ):
        assert float(jnp.abs(one).max()) > 0, jax.tree_util.keystr(path)
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_fresh_parameters_start_as_the_original_does():
    model = PointEncoder(width=256, layers=2, heads=4)
    params = nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 1, 6))))["params"]
    for path, size in {
        ("queries",): 0.02,
        ("input", "kernel"): (3 * 54) ** -0.5,
        ("cross", "key_value"): 0.25 / 16,
        ("layers", "up", "kernel"): 0.25 / 16,
    }.items():
        value = params
        for key in path:
            value = value[key]
        assert float(value.std()) == pytest.approx(size, rel=0.05), path
    assert not np.any(params["layers"]["down"]["bias"])


def test_every_wrong_key_is_named(state):
    broken = dict(state)
    del broken["encoder.ln_post.bias"]
    broken |= {"encoder.extra": torch.zeros(1), "encoder.input_proj.bias": torch.zeros(3)}
    sentence = r"lacks ln_post\.bias; has unexpected extra; holds input_proj\.bias of shape \(3,\) instead of \(128,\)"
    with pytest.raises(FileFormatError, match=sentence):
        point_encoder_from_torch(broken)
    with pytest.raises(FileFormatError, match=r"lacks self_attn\.resblocks\.2.* and 3 more"):
        point_encoder_from_torch(state, PointEncoder(**(SMALL | {"layers": 3})))
    state["encoder.query"][0, 0] = torch.nan
    with pytest.raises(FileFormatError, match=r"query of the point encoder.* holds 1 NaN"):
        point_encoder_from_torch(state)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"decoder.query": (4, 64)}, "0 tensors encoder.query"),
        ({"a.encoder.query": (4, 64), "b.encoder.query": (4, 64)}, "2 tensors encoder.query"),
        ({"encoder.query": (4, 64)}, "input_proj.weight of shape none"),
        ({"encoder.query": (0, 64), "encoder.input_proj.weight": (64, 54)}, r"query of shape \(0, 64\)"),
        ({"encoder.query": (4, 50), "encoder.input_proj.weight": (50, 54)}, "width of 50 .* pass `model`"),
        ({"encoder.query": (4, 64), "encoder.input_proj.weight": (64, 54)}, "lacks .* and .* more"),
    ],
)
def test_what_no_encoder_has_is_refused(state, message):
    with pytest.raises(UserError, match=message):
        point_encoder_from_torch({name: np.zeros(shape) for name, shape in state.items()})


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({}, (1, 10, 3), r"expected \[B, P, 6\]"),
        ({}, (10, 6), "batch axis"),
        ({}, (1, 0, 6), "expected"),
        ({"heads": 3}, (1, 10, 6), "multiple of heads 3"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(options, shape, message):
    with pytest.raises(UserError, match=message):
        PointEncoder(**(SMALL | options)).init(jax.random.key(0), jnp.zeros(shape))
