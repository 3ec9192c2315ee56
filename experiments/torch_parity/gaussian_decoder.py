"""The Gaussian decoder, block by block, whole, and its gradients.

`models.gaussian_decoder` runs its layers in one function; a model with fewer layers, or whose last one has branches
that add nothing, shows what flows between the parts.

Letters: B batch, P points, S context, D width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from experiments.torch_parity.rows import Row, compare
from experiments.torch_parity.taps import run_with, tensors
from experiments.torch_reference import gaussian_decoder as torch_decoder
from experiments.torch_reference.gaussian_decoder import GaussianDecoder
from pointillist_jax.configs import PATCH_COLORS, DecoderConfig
from pointillist_jax.convert.reference import decoder_to_torch
from pointillist_jax.models import gaussian_decoder as jax_decoder
from pointillist_jax.models.layers import rms_norm

BRANCHES = {"cross_attention": "out", "self_attention": "out", "mlp": "down"}
FIELDS = ("means", "quats", "scales", "opacities", "colors", "offsets")


def random_inputs(rng: np.random.Generator, config: DecoderConfig, points: int, context: int, dtype: Any):
    """{"points" [B,P,3], "hidden" [B,P,4,E], "num_points" [B], "context" [B,S,C]} of two clouds, one of them padded."""
    tokens = rng.normal(size=(2, config.context_tokens or context, config.context_width))
    if config.context_colors:
        tokens[..., -PATCH_COLORS:] = rng.uniform(-1, 1, (*tokens.shape[:2], PATCH_COLORS))
    return {
        "points": rng.uniform(config.lower, config.upper, (2, points, 3)).astype(dtype),
        "hidden": rng.normal(size=(2, points, 4, config.feature_width)).astype(dtype),
        "num_points": np.array([points, points - points // 3], np.int32),
        "context": tokens.astype(dtype),
    }


def block_rows(
    params: Any, twin: GaussianDecoder, config: DecoderConfig, inputs: Mapping[str, Any], bounds: Mapping[str, float]
) -> list[Row]:
    """Parts on equal inputs ("blocks"), and the attributes of the running models ("models")."""
    given = tensors(dict(inputs))
    # What stands at padding means nothing.
    real = np.arange(inputs["points"].shape[1]) < inputs["num_points"][:, None]
    pick = lambda x: np.asarray(x.float() if torch.is_tensor(x) and x.dtype == torch.bfloat16 else x, np.float64)[real]  # noqa: E731
    forward = functools.partial(twin, *(given[name] for name in ("points", "hidden", "num_points", "context")))
    rows = []

    def row(name: str, expected, found) -> None:
        rows.append(compare("blocks", f"decoder.{name}", pick(expected), pick(found.detach()), bounds["blocks"]))

    states = [_trunk(*_shortened(params, config, n), inputs) for n in range(config.layers + 1)]
    if config.uses_positions:
        inside = jax_decoder.box_coordinates(config, jnp.asarray(inputs["points"]))
        row("box_coordinates", inside, torch_decoder.box_coordinates(config, given["points"]))
        # Of the same coordinates: the highest octave makes 400 roundings of one.
        encoded = jax_decoder.encode_octaves(inside, config.octaves)
        row("positional_encoding", encoded, torch_decoder.encode_octaves(tensors(inside), config.octaves))
        encoded = encoded.astype(config.dtype)
        found = run_with(twin, forward, {"position_mlp": tensors(encoded)})
        row("position_mlp", jax_decoder._mlp(params["position_mlp"], encoded), found["position_mlp"])
    if config.uses_features:
        flat = jnp.asarray(inputs["hidden"]).reshape(*inputs["points"].shape[:2], -1).astype(config.dtype)
        normed = rms_norm(flat, params["feature_norm"])
        found = run_with(twin, forward, {"feature_norm": tensors(flat), "feature_mlp": tensors(normed)})
        row("feature_norm", normed, found["feature_norm"])
        row("feature_mlp", jax_decoder._mlp(params["feature_mlp"], normed), found["feature_mlp"])
    if config.context_colors:
        colors = jnp.asarray(inputs["context"][..., -PATCH_COLORS:], config.dtype).reshape(2, 1, -1)
        found = run_with(twin, forward, {"portrait_mlp": tensors(colors)})["portrait_mlp"]
        expected = jax_decoder._mlp(params["portrait_mlp"], colors)
        rows.append(compare("blocks", "decoder.portrait_mlp", expected, found, bounds["blocks"]))
    if config.inputs != "none":
        # All that is added before the first layer.
        parts = ("input", "portrait_mlp") if config.context_colors else ("input",)
        row("input", states[0], sum(run_with(twin, forward, watched=parts).values()))
    for i in range(config.layers):
        names = [name for name in BRANCHES if name in params["layers"]]
        names.sort(key=("cross_attention", "self_attention", "mlp").index)
        x = states[i]
        for n, name in enumerate(names, 1):
            after = _trunk(*_shortened(params, config, i + 1, names[:n]), inputs)
            found = run_with(twin, forward, {f"layers.{i}.{name}": tensors(x)})
            row(f"layers.{i}.{name}", after, tensors(x) + found[f"layers.{i}.{name}"])
            x = after
        found = run_with(twin, forward, {f"layers.{i}": tensors(states[i])})
        row(f"layers.{i}", states[i + 1], found[f"layers.{i}"])
    if config.context_colors:
        normed = rms_norm(states[-1], params["head"]["norm"])
        copied = jax.jit(jax_decoder._copied_colors)(params, normed, inputs["context"])
        row("copy", copied, run_with(twin, forward, {"copy": tensors(normed)})["copy"])
    expected = _decode(params, config, inputs)
    with torch.no_grad():
        # Of the head and of the copied colours.
        handle = twin.head.norm.register_forward_pre_hook(lambda *_: (tensors(states[-1]),))
        attributes = forward()._asdict()
        handle.remove()
        chained = forward()._asdict()
    for name in FIELDS:
        row(f"attributes.{name}", expected[name], attributes[name])
        rows.append(compare("models", f"decoder {name}", pick(expected[name]), pick(chained[name]), bounds["models"]))
    return rows


def gradient_rows(
    params: Any, twin: GaussianDecoder, config: DecoderConfig, inputs: Mapping[str, Any], bounds: Mapping[str, float]
) -> list[Row]:
    """The gradient of a random sum of all attributes by every parameter."""
    rng = np.random.default_rng(0)
    expected = _decode(params, config, inputs)
    real = np.arange(inputs["points"].shape[1]) < inputs["num_points"][:, None]
    weights = {
        # Attributes differ a hundredfold in size; each is to count.
        name: rng.normal(size=x.shape) * real.reshape(real.shape + (1,) * (x.ndim - 2)) / (np.abs(x).max() + 1e-6)
        for name, x in ((n, np.asarray(expected[n], np.float64)) for n in FIELDS)
    }
    weights = {name: x.astype(np.asarray(expected[name]).dtype) for name, x in weights.items()}

    @jax.jit
    def gradients(params):
        return jax.grad(
            lambda p: sum(jnp.sum(x * weights[name]) for name, x in _decode(p, config, inputs).items())
        )(params)  # fmt: skip

    by_name = decoder_to_torch(gradients(params), config)
    given = tensors(dict(inputs))
    twin.zero_grad(set_to_none=True)
    found = twin(*(given[name] for name in ("points", "hidden", "num_points", "context")))._asdict()
    sum((found[name] * tensors(w)).sum() for name, w in weights.items()).backward()
    own = {name: p.grad for name, p in twin.named_parameters()}
    return [
        compare("gradients", f"decoder.{name}", value, own[name], bounds["gradients"])
        for name, value in by_name.items()
    ]


def _shortened(params: Any, config: DecoderConfig, layers: int, branches: list[str] | None = None):
    """The model of the first layers only; of the last one, if `branches` are named, only these add something."""
    stacked = jax.tree.map(lambda x: x[:layers], params["layers"])
    if branches is not None:
        for name in set(stacked) - set(branches):
            out = BRANCHES[name]
            stacked[name] = {**stacked[name], out: stacked[name][out].at[-1].set(0)}
    return {**params, "layers": stacked}, dataclasses.replace(config, layers=layers)


@functools.partial(jax.jit, static_argnums=1)
def _trunk(params, config: DecoderConfig, inputs):
    return jax_decoder._trunk(
        params, config, *(inputs[name] for name in ("points", "hidden", "num_points", "context")), None
    )


@functools.partial(jax.jit, static_argnums=1)
def _decode(params, config: DecoderConfig, inputs):
    gaussians, offsets = jax_decoder.decode(
        params, config, *(inputs[name] for name in ("points", "hidden", "num_points", "context"))
    )
    return {name: getattr(gaussians, name) for name in FIELDS[:-1]} | {"offsets": offsets}
