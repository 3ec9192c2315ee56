"""dinov2_from_torch: both published spellings and transformers' own, and that every wrong key is named."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.convert import dinov2_from_torch, load_torch_file
from pointillist_jax.files import FileFormatError, UserError
from pointillist_jax.models.image_encoder import DinoV2
from tests.convert.torch_weights import hub_state, huggingface_dinov2

torch = pytest.importorskip("torch")
SIZE = {"width": 16, "layers": 2, "image_size": 28}


@pytest.fixture(params=["gelu with registers", "swiglu without registers"])
def module(request, rng):
    swiglu = request.param.startswith("swiglu")
    return huggingface_dinov2(rng, heads=2, registers=0 if swiglu else 3, swiglu=swiglu, **SIZE)


@pytest.fixture
def hub(rng, tmp_path):
    """torch.hub's state dict of a random model with registers."""
    huggingface_dinov2(rng, heads=2, registers=3, **SIZE).save_pretrained(tmp_path)
    return hub_state(load_torch_file(tmp_path / "model.safetensors"))


def assert_same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def test_files_of_torch_hub_and_hugging_face_and_modules_give_the_same(module, tmp_path):
    params = dinov2_from_torch(module.state_dict())
    module.save_pretrained(tmp_path)
    published = load_torch_file(tmp_path / "model.safetensors")
    assert "encoder.layer.0.attention.attention.query.weight" in published
    assert_same(dinov2_from_torch(published), params)
    hub = hub_state(published)
    assert hub["blocks.1.attn.qkv.weight"].shape == (48, 16)
    torch.save({name: torch.from_numpy(value) for name, value in hub.items()}, tmp_path / "dinov2.pth")
    assert_same(dinov2_from_torch(load_torch_file(tmp_path / "dinov2.pth")), params)
    # They are the parameters that a model of this size has.
    config = module.config
    mlp = "swiglu" if config.use_swiglu_ffn else "gelu"
    model = DinoV2(**SIZE, heads=2, mlp=mlp, registers=getattr(config, "num_register_tokens", 0))
    images = jax.ShapeDtypeStruct((1, 28, 28, 3), jnp.float32)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), images))["params"]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)


def test_prefixes_chunks_and_other_networks_do_not_matter(hub):
    expected = dinov2_from_torch(hub)
    chunked = {name.replace("blocks.", "blocks.0."): value for name, value in hub.items()}
    teacher = {f"teacher.backbone.{name}": value for name, value in chunked.items()}
    teacher["teacher.dino_head.last_layer.weight"] = np.zeros((2, 2))
    assert_same(dinov2_from_torch(teacher), expected)
    assert_same(dinov2_from_torch({name: torch.from_numpy(x).double() for name, x in hub.items()}), expected)
    assert_same(dinov2_from_torch({name: x for name, x in hub.items() if name != "mask_token"}), expected)


def test_every_wrong_key_is_named(hub):
    with pytest.raises(
        FileFormatError, match=r"of width 16 with 2 layers lacks blocks\.1\.norm2\.bias, blocks\.1\.ls2"
    ):
        dinov2_from_torch({n: x for n, x in hub.items() if n not in ("blocks.1.norm2.bias", "blocks.1.ls2.gamma")})
    with pytest.raises(FileFormatError, match=r"has unexpected blocks\.0\.attn\.rope, head\.weight"):
        dinov2_from_torch({**hub, "head.weight": np.zeros(2), "blocks.0.attn.rope": np.zeros(2)})
    with pytest.raises(FileFormatError, match=r"holds norm\.weight of shape \(8,\) instead of \(16,\)"):
        dinov2_from_torch({**hub, "norm.weight": np.zeros(8)})
    broken = {**hub, "norm.weight": np.zeros(8), "extra": np.zeros(1)}
    del broken["norm.bias"]
    with pytest.raises(FileFormatError, match=r"lacks norm\.bias; has unexpected extra; holds norm\.weight of shape"):
        dinov2_from_torch(broken)
    with pytest.raises(FileFormatError, match=r"blocks\.0\.mlp\.fc1\.bias of DINOv2.* holds 1 NaN or infinite"):
        dinov2_from_torch({**hub, "blocks.0.mlp.fc1.bias": np.append(np.zeros(63), np.nan)})
    with pytest.raises(FileFormatError, match=r"pos_embed.*instead of \(1, 1370, 16\)"):
        dinov2_from_torch(hub, DinoV2(width=16, layers=2, heads=2, registers=3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos_embed": (1, 4, 16)}, "4 positions"),
        ({"pos_embed": (1, 5, 8)}, r"has shape \(1, 5, 8\) for pos_embed"),
        ({"cls_token": (16,)}, r"has shape \(16,\) for cls_token"),
        ({"patch_embed.proj.weight": (16, 3, 0, 0)}, "patch_embed"),
        ({"blocks.9999.norm1.weight": (16,)}, "10000 layers"),
        ({"student.cls_token": (1, 1, 16)}, "2 class tokens"),
    ],
)
def test_shapes_that_no_model_has_are_refused(hub, change, message):
    with pytest.raises(FileFormatError, match=message):
        dinov2_from_torch(hub | {name: np.zeros(shape, np.float32) for name, shape in change.items()})


def test_what_is_no_state_dict_is_refused(hub):
    with pytest.raises(UserError, match=r"not from a Linear.*load_torch_file"):
        dinov2_from_torch(torch.nn.Linear(1, 1))
    with pytest.raises(UserError, match="holds model, no tensor; pass the state dict inside it"):
        dinov2_from_torch({"model": hub})
    with pytest.raises(FileFormatError, match=r"0 class tokens .*found: conv1\.weight"):
        dinov2_from_torch({"conv1.weight": np.zeros(3)})
    with pytest.raises(FileFormatError, match="found: nothing"):
        dinov2_from_torch({})
