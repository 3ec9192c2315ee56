"""Weights to the PyTorch reference and back: every bit, every parameter by name."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.configs import DecoderConfig, EncoderConfig, ModelConfig, config_from_json
from pointillist_jax.convert import load_torch_file, reference
from pointillist_jax.files import FileFormatError
from pointillist_jax.models.ar import param_specs as ar_specs
from pointillist_jax.models.condition import condition_specs
from pointillist_jax.models.gaussian_decoder import param_specs as decoder_specs
from pointillist_jax.models.layers import init_params
from tests.models.tiny_ar import changed

MODEL = changed(encoder=EncoderConfig(image_size=14, num_points=16))
OPTIONS = (
    {"step": "point"},
    {"mlp": "plain", "qk_norm": False, "slot_embedding": False, "coord_tables": "learned", "tied_head": False},
    {"encoder": EncoderConfig(image_size=14, frozen=True)},
    {"step": "point", "condition_loss": 1.0},
)
DECODER = DecoderConfig(feature_width=10, context_width=9, width=12, layers=2, heads=3, head_dim=4, mlp_width=20,
                        cross_attention=True)  # fmt: skip


def randomized(specs, seed: int = 0, dtype=np.float32):
    """Every parameter random, also those that start at zero or one."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(specs, jax.random.PRNGKey(0)))
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(dtype), shapes)


def random_ar(config: ModelConfig):
    return randomized({"transformer": ar_specs(config), "condition": condition_specs(config)})


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("options", [{}, *OPTIONS])
def test_ar_goes_there_and_back(options):
    config = dataclasses.replace(MODEL, **options)
    params = random_ar(config)
    state = reference.ar_to_torch(params, config)
    assert sum(x.size for x in state.values()) == sum(x.size for x in jax.tree.leaves(params))
    assert_same_bits(reference.ar_from_torch(state, config), params)
    alone = reference.transformer_to_torch(params["transformer"], config)
    assert {f"transformer.{name}" for name in alone} == {name for name in state if name.startswith("transformer.")}
    assert_same_bits(reference.transformer_from_torch(alone, config), params["transformer"])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_decoder_goes_there_and_back(dtype):
    params = randomized(decoder_specs(DECODER), dtype=dtype)
    state = reference.decoder_to_torch(params, DECODER)
    assert_same_bits(reference.decoder_from_torch(state, DECODER), params)
    others = [{"inputs": inputs, "cross_attention": False} for inputs in ("none", "position_only")]
    for options in (*others, {"context_colors": True, "context_width": 21, "context_tokens": 5}):
        config = dataclasses.replace(DECODER, **options)
        params = randomized(decoder_specs(config), dtype=dtype)
        assert_same_bits(reference.decoder_from_torch(reference.decoder_to_torch(params, config), config), params)


def test_matrices_are_transposed_as_torch_wants_them(rng):
    """Products, heads, points and patches mean the same on both sides."""
    config = dataclasses.replace(MODEL, step="point")
    params, state = random_ar(config), reference.ar_to_torch(random_ar(config), config)
    layer = jax.tree.map(lambda x: x[1], params["transformer"]["layers"]["self_attention"])
    y = rng.normal(size=(3, config.width))
    key = y @ state["transformer.layers.1.self_attention.key.weight"].T
    np.testing.assert_allclose(key.reshape(3, 2, 8), np.einsum("td,dnh->tnh", y, layer["key"]))
    heads = rng.normal(size=(3, 4, 8))
    out = heads.reshape(3, -1) @ state["transformer.layers.1.self_attention.out.weight"].T
    np.testing.assert_allclose(out, np.einsum("tnh,nhd->td", heads, layer["out"]))
    four = rng.normal(size=(3, 4, config.width))
    point = four.reshape(3, -1) @ state["transformer.point_embedding.weight"].T
    np.testing.assert_allclose(point, np.einsum("tse,sed->td", four, params["transformer"]["point_embedding"]))
    torch = pytest.importorskip("torch")
    images, kernel = rng.normal(size=(1, 14, 14, 3)), params["condition"]["image_encoder"]["patch_kernel"]
    patches = torch.nn.functional.conv2d(
        torch.tensor(images.transpose(0, 3, 1, 2)),
        torch.tensor(state["condition.image_encoder.patch.weight"]).double(),
        stride=14,
    )
    np.testing.assert_allclose(patches[..., 0, 0], np.einsum("bhwc,hwcd->bd", images, kernel))


def test_what_does_not_fit_is_named():
    params = random_ar(MODEL)
    state = reference.ar_to_torch(params, MODEL)
    name = "transformer.layers.1.mlp.up.weight"
    with pytest.raises(FileFormatError, match=rf"the AR model lacks {name}"):
        reference.ar_from_torch({k: v for k, v in state.items() if k != name}, MODEL)
    with pytest.raises(FileFormatError, match="has unexpected extra"):
        reference.ar_from_torch({**state, "extra": np.zeros(3, np.float32)}, MODEL)
    with pytest.raises(FileFormatError, match=rf"{name} of shape \(32, 48\) instead of \(48, 32\)"):
        reference.ar_from_torch({**state, name: state[name].T}, MODEL)
    with pytest.raises(FileFormatError, match=f"{name} of the AR model holds 1536 NaN"):
        reference.ar_from_torch({**state, name: np.full((48, 32), np.nan)}, MODEL)
    head = {k: v for k, v in params["transformer"].items() if k != "final_norm"}
    with pytest.raises(FileFormatError, match="the parameter tree of the AR model lacks transformer/final_norm"):
        reference.ar_to_torch({**params, "transformer": head}, MODEL)
    with pytest.raises(FileFormatError, match="has unexpected transformer/coord_fourier, transformer/coord_rows"):
        reference.ar_to_torch(params, dataclasses.replace(MODEL, coord_tables="learned"))


def test_files_hold_the_config(tmp_path):
    pytest.importorskip("safetensors")
    params = random_ar(MODEL)
    path = tmp_path / "ar.safetensors"
    state = reference.ar_to_torch(params, MODEL)
    reference.save_reference(path, state, {"kind": "ar", "config": {"model": dataclasses.asdict(MODEL)}})
    content = reference.load_metadata(path)
    assert config_from_json(ModelConfig, content["config"]["model"], str(path)) == MODEL
    assert_same_bits(reference.ar_from_torch(load_torch_file(path), MODEL), params)
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    assert_same_bits(reference.ar_from_torch(tensors, MODEL), params)
    save_file(tensors, path)
    with pytest.raises(FileFormatError, match="keep the metadata"):
        reference.load_metadata(path)
    half = reference.ar_from_torch({k: v.to(torch.bfloat16) for k, v in tensors.items()}, MODEL)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(half))
    save_file(tensors, path, {"pointillist_jax": json.dumps({"version": 99})})
    with pytest.raises(FileFormatError, match="version 1"):
        reference.load_metadata(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FileFormatError, match="damaged"):
        reference.load_metadata(path)
