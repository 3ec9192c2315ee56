"""Published DINOv2 weights → parameters of `models.DinoV2` (facts/encoders_and_metrics.md 1.3).

Three spellings of the same tensors are read: torch.hub's files, Hugging Face's files, and the state dict of a module of
transformers 5, which spells some of them differently from its own files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pointillist_jax.convert.state_dicts import Tensors, check_state, require_mapping, stack
from pointillist_jax.files import FileFormatError
from pointillist_jax.models.image_encoder import DinoV2, swiglu_width

_MAX_LAYERS, _MAX_SIDE = 256, 1024  # Nothing published comes near; keeps hostile shapes from costing memory.

# Ours → theirs. Several names: tensors joined on their first axis. {} is the layer.
_HUB = {
    "cls_token": ("cls_token",),
    "register_tokens": ("register_tokens",),
    "mask_token": ("mask_token",),
    "position_embedding": ("pos_embed",),
    "patch": ("patch_embed.proj",),
    "norm": ("norm",),
    "norm1": ("blocks.{}.norm1",),
    "norm2": ("blocks.{}.norm2",),
    "qkv": ("blocks.{}.attn.qkv",),
    "out": ("blocks.{}.attn.proj",),
    "scale1": ("blocks.{}.ls1.gamma",),
    "scale2": ("blocks.{}.ls2.gamma",),
    "gelu_up": ("blocks.{}.mlp.fc1",),
    "gelu_down": ("blocks.{}.mlp.fc2",),
    "swiglu_up": ("blocks.{}.mlp.w12",),
    "swiglu_down": ("blocks.{}.mlp.w3",),
}
_LAYER = "encoder.layer.{}."
_HUGGING_FACE = {
    "cls_token": ("embeddings.cls_token",),
    "register_tokens": ("embeddings.register_tokens",),
    "mask_token": ("embeddings.mask_token",),
    "position_embedding": ("embeddings.position_embeddings",),
    "patch": ("embeddings.patch_embeddings.projection",),
    "norm": ("layernorm",),
    "norm1": (_LAYER + "norm1",),
    "norm2": (_LAYER + "norm2",),
    "qkv": tuple(_LAYER + f"attention.attention.{part}" for part in ("query", "key", "value")),
    "out": (_LAYER + "attention.output.dense",),
    "scale1": (_LAYER + "layer_scale1.lambda1",),
    "scale2": (_LAYER + "layer_scale2.lambda1",),
    "gelu_up": (_LAYER + "mlp.fc1",),
    "gelu_down": (_LAYER + "mlp.fc2",),
    "swiglu_up": (_LAYER + "mlp.weights_in",),
    "swiglu_down": (_LAYER + "mlp.weights_out",),
}
_TRANSFORMERS_5 = {
    **_HUGGING_FACE,
    "qkv": tuple(_LAYER + f"attention.{part}_proj" for part in "qkv"),
    "out": (_LAYER + "attention.o_proj",),
    "swiglu_up": (_LAYER + "mlp.gate_proj", _LAYER + "mlp.up_proj"),
    "swiglu_down": (_LAYER + "mlp.down_proj",),
}


def dinov2_from_torch(
    state_dict: Mapping[str, Any], model: DinoV2 | None = None, *, dtype: Any = np.float32
) -> dict[str, Any]:
    """Parameters of a DinoV2 from a PyTorch state dict.

    Args:
      state_dict: name → torch tensor or array, as `load_torch_file` or a module's `state_dict()` gives it. A prefix
        before all names (`dinov2.`, `teacher.backbone.`) is taken off, with the other networks under other prefixes;
        blocks in chunks (`blocks.0.5.`) are read too; the mask token is left out.
      model: what the weights are for. By default any size is read as it is.
      dtype: of the result.

    Returns:
      What `model.apply({"params": …}, images)` takes, on JAX's default device.

    Raises:
      FileFormatError: not DINOv2, or names every key that is missing, unexpected or of another shape; NaN.
      UserError: not a state dict.
    """
    state = _plain_names(require_mapping(state_dict, "DINOv2"))
    names = _spelling(state)
    model = _infer(state, names) if model is None else model
    what = f"DINOv2 of width {model.width} with {model.layers} layers"
    check_state(what, state, _expected(model, names), names["mask_token"])
    read = Tensors(what, state, dtype)

    def layer(i: int) -> dict[str, Any]:
        at = {name: [key.format(i) for key in keys] for name, keys in names.items()}
        qkv, up = read.linear(*at["qkv"]), read.linear(*at[f"{model.mlp}_up"])
        mlp = {"up": up, "down": read.linear(*at[f"{model.mlp}_down"])}
        if model.mlp == "swiglu":
            # The first half of the fused matrix goes through SiLU.
            for n, half in enumerate(("gate", "up")):
                mlp[half] = {key: np.split(value, 2, axis=-1)[n] for key, value in up.items()}
        return {
            "norm1": read.norm(*at["norm1"]),
            "attention": {
                "qkv_kernel": qkv["kernel"].reshape(model.width, 3, model.width),
                "qkv_bias": qkv["bias"].reshape(3, model.width),
                "out": read.linear(*at["out"]),
            },
            "scale1": read(*at["scale1"]),
            "norm2": read.norm(*at["norm2"]),
            "mlp": mlp,
            "scale2": read(*at["scale2"]),
        }

    (patch,) = names["patch"]
    params = {
        "patch_kernel": read(f"{patch}.weight").transpose(2, 3, 1, 0),
        "patch_bias": read(f"{patch}.bias"),
        "cls_token": read(*names["cls_token"])[0],
        "position_embedding": read(*names["position_embedding"])[0],
        "layers": stack(model.layers, layer),
        "norm": read.norm(*names["norm"]),
    }
    if model.registers:
        params["register_tokens"] = read(*names["register_tokens"])[0]
    return jax.tree.map(jnp.asarray, params)


def _plain_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """Without the prefix in front of the class token's name, and without chunks."""
    found = [name for name in state if re.search(r"(^|\.)cls_token$", name)]
    if len(found) != 1:
        shown = ", ".join(name[:60] for name in (found or list(state))[:6]) or "nothing"
        raise FileFormatError(
            f"the state dict has {len(found)} class tokens where DINOv2 has one (found: {shown}); is it a checkpoint "
            "of another model, or of several?"
        )
    prefix = found[0].removesuffix("cls_token").removesuffix("embeddings.")
    plain = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name): value for name, value in plain.items()}


def _spelling(state: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    if "cls_token" in state:
        return _HUB
    new = any(re.match(r"encoder\.layer\.\d+\.attention\.q_proj\.", name) for name in state)
    return _TRANSFORMERS_5 if new else _HUGGING_FACE


def _infer(state: Mapping[str, Any], names: Mapping[str, tuple[str, ...]]) -> DinoV2:
    """The model that a state dict is of. The number of heads does not matter for its parameters."""

    def shape(key: str, *pattern: int | None) -> tuple[int, ...]:
        found = tuple(state[key].shape) if key in state else None
        fits = found is not None and len(found) == len(pattern) and min(found) > 0
        if not fits or any(want not in (None, have) for want, have in zip(pattern, found, strict=True)):
            problem = "lacks" if found is None else f"has shape {found} for"
            raise FileFormatError(f"the state dict of DINOv2 {problem} {key}; is it a checkpoint of another model?")
        return found

    width = shape(*names["cls_token"], 1, 1, None)[2]
    side = shape(f"{names['patch'][0]}.weight", width, 3, None, None)[2]
    rows = shape(*names["position_embedding"], 1, None, width)[1]
    grid = math.isqrt(rows - 1)
    registers = names["register_tokens"][0]
    # Layers are counted by a name that each one has.
    pattern = re.escape(names["norm1"][0]).replace(r"\{\}", r"(\d{1,4})") + r"\.weight"
    layers = 1 + max((int(m[1]) for name in state if (m := re.fullmatch(pattern, name))), default=0)
    if 1 + grid * grid != rows or not 0 < grid <= _MAX_SIDE or side > _MAX_SIDE or layers > _MAX_LAYERS:
        raise FileFormatError(
            f"the state dict of DINOv2 has {rows} positions, {layers} layers and patches of {side} pixels; positions "
            f"must be one more than a square, layers at most {_MAX_LAYERS}: is it a checkpoint of another model?"
        )
    fused = [key.format(0) + ".weight" for key in names["swiglu_up"]]
    return DinoV2(
        width=width,
        layers=layers,
        heads=1,
        mlp="swiglu" if any(key in state for key in fused) else "gelu",
        patch=side,
        registers=shape(registers, 1, None, width)[1] if registers in state else 0,
        image_size=grid * side,
    )


def _expected(model: DinoV2, names: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a checkpoint in one spelling."""
    D, p, grid = model.width, model.patch, model.image_size // model.patch
    F = swiglu_width(D) if model.mlp == "swiglu" else 4 * D
    expected: dict[str, tuple[int, ...]] = {}

    def plain(name: str, *shape: int, layer: int = 0) -> None:
        expected[names[name][0].format(layer)] = shape

    def affine(name: str, size_out: int, *inputs: int, layer: int = 0) -> None:
        size_out //= len(names[name])
        for key in names[name]:
            expected[f"{key.format(layer)}.weight"] = (size_out, *inputs)
            expected[f"{key.format(layer)}.bias"] = (size_out,)

    plain("cls_token", 1, 1, D)
    plain("position_embedding", 1, 1 + grid * grid, D)
    affine("patch", D, 3, p, p)
    affine("norm", D)
    if model.registers:
        plain("register_tokens", 1, model.registers, D)
    for i in range(model.layers):
        affine("norm1", D, layer=i)
        affine("norm2", D, layer=i)
        affine("qkv", 3 * D, D, layer=i)
        affine("out", D, D, layer=i)
        plain("scale1", D, layer=i)
        plain("scale2", D, layer=i)
        affine(f"{model.mlp}_up", 2 * F if model.mlp == "swiglu" else F, D, layer=i)
        affine(f"{model.mlp}_down", D, F, layer=i)
    return expected
