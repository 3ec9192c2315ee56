"""Michelangelo's published weights → parameters of `models.PointEncoder` (facts/encoders_and_metrics.md 2.2, 2.3)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pointillist_jax.convert.state_dicts import Tensors, check_state, require_mapping, stack
from pointillist_jax.files import FileFormatError, UserError
from pointillist_jax.models.point_encoder import PointEncoder

_MAX_LAYERS, _HEAD_DIM = 256, 64


def point_encoder_from_torch(
    state_dict: Mapping[str, Any], model: PointEncoder | None = None, *, dtype: Any = np.float32
) -> dict[str, Any]:
    """Parameters of a PointEncoder from a PyTorch state dict.

    Args:
      state_dict: name → torch tensor or array. Whatever stands before `encoder.query` is taken for a prefix
        (`model.shape_model.` in Michelangelo's own file, `conditioner.point_encoder.model.shape_model.` in BPT's), and
        what lies beside the encoder (decoder, KL, CLIP) is left out.
      model: what the weights are for. By default any size is read as it is, with heads of 64.
      dtype: of the result.

    Returns:
      What `model.apply({"params": …}, points)` takes, on JAX's default device.

    Raises:
      FileFormatError: no such encoder, or names every key that is missing, unexpected or of another shape; NaN.
      UserError: not a state dict, or a width that is no multiple of 64 without `model`.
    """
    state = _encoder_names(require_mapping(state_dict, "the point encoder"))
    model = _infer(state) if model is None else model
    N, D = model.heads, model.width
    what = f"the point encoder of width {D} with {model.layers} layers"
    check_state(what, state, _expected(model))
    read = Tensors(what, state, dtype)

    def unpacked(key: str, kinds: int) -> np.ndarray:
        """[N · kinds · H, D]: head by head, and q, k, v inside each head → [D, kinds, N, H]."""
        return read(key).reshape(N, kinds, D // N, D).transpose(3, 1, 0, 2)

    def shared(at: str, norms: tuple[str, str]) -> dict[str, Any]:
        return {
            "norm1": read.norm(f"{at}{norms[0]}"),
            "out": read.linear(f"{at}attn.c_proj"),
            "norm2": read.norm(f"{at}{norms[1]}"),
            "up": read.linear(f"{at}mlp.c_fc"),
            "down": read.linear(f"{at}mlp.c_proj"),
        }

    def layer(i: int) -> dict[str, Any]:
        at = f"self_attn.resblocks.{i}."
        return {**shared(at, ("ln_1", "ln_2")), "query_key_value": unpacked(f"{at}attn.c_qkv.weight", 3)}

    cross = {
        **shared("cross_attn.", ("ln_1", "ln_3")),
        "data_norm": read.norm("cross_attn.ln_2"),
        "query": unpacked("cross_attn.attn.c_q.weight", 1)[:, 0],
        "key_value": unpacked("cross_attn.attn.c_kv.weight", 2),
    }
    params = {
        "queries": read("query"),
        "input": read.linear("input_proj"),
        "cross": cross,
        "layers": stack(model.layers, layer),
        "norm": read.norm("ln_post"),
    }
    return jax.tree.map(jnp.asarray, params)


def _encoder_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder's tensors alone, named as in `facts` 2.3 without `encoder.`."""
    found = [name for name in state if re.search(r"(^|\.)encoder\.query$", name)] or [n for n in state if n == "query"]
    # A file may hold several encoders with learned queries; Michelangelo's lies in its shape model.
    shape_models = [name for name in found if "shape_model." in name]
    found = shape_models or found
    if len(found) != 1:
        shown = ", ".join(name[:60] for name in list(state)[:6]) or "nothing"
        raise FileFormatError(
            f"the state dict has {len(found)} tensors encoder.query where Michelangelo's point encoder has one (it "
            f"begins with {shown}); is it a checkpoint of another model?"
        )
    prefix = found[0].removesuffix("query")
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _infer(state: Mapping[str, Any]) -> PointEncoder:
    query = tuple(state["query"].shape)
    inputs = tuple(state["input_proj.weight"].shape) if "input_proj.weight" in state else ()
    if len(query) != 2 or min(query) < 1 or len(inputs) != 2 or inputs[1] < 12 or inputs[1] % 6:
        raise FileFormatError(
            f"the point encoder has query of shape {query} and input_proj.weight of shape {inputs or 'none'}, expected "
            "(queries, width) and (width, 6 + 6 · frequencies); is it a checkpoint of another model?"
        )
    if query[1] % _HEAD_DIM:
        raise UserError(
            f"a width of {query[1]} has no heads of {_HEAD_DIM}: pass `model`, which says how many there are."
        )
    pattern = r"self_attn\.resblocks\.(\d{1,4})\.ln_1\.weight"
    layers = 1 + max((int(m[1]) for name in state if (m := re.fullmatch(pattern, name))), default=0)
    if layers > _MAX_LAYERS:
        raise FileFormatError(f"the point encoder has {layers} layers, expected at most {_MAX_LAYERS}.")
    return PointEncoder(
        width=query[1],
        layers=layers,
        heads=query[1] // _HEAD_DIM,
        queries=query[0],
        frequencies=inputs[1] // 6 - 1,
    )


def _expected(model: PointEncoder) -> dict[str, tuple[int, ...]]:
    D = model.width
    expected: dict[str, tuple[int, ...]] = {"query": (model.queries, D)}

    def affine(name: str, size_out: int, *inputs: int) -> None:
        expected[f"{name}.weight"], expected[f"{name}.bias"] = (size_out, *inputs), (size_out,)

    def block(at: str, norms: tuple[str, ...]) -> None:
        for name in norms:
            affine(at + name, D)
        affine(f"{at}attn.c_proj", D, D)
        affine(f"{at}mlp.c_fc", 4 * D, D)
        affine(f"{at}mlp.c_proj", D, 4 * D)

    affine("input_proj", D, 3 + 6 * model.frequencies + model.features)
    block("cross_attn.", ("ln_1", "ln_2", "ln_3"))
    expected["cross_attn.attn.c_q.weight"] = (D, D)
    expected["cross_attn.attn.c_kv.weight"] = (2 * D, D)
    for i in range(model.layers):
        block(f"self_attn.resblocks.{i}.", ("ln_1", "ln_2"))
        expected[f"self_attn.resblocks.{i}.attn.c_qkv.weight"] = (3 * D, D)
    affine("ln_post", D)
    return expected
