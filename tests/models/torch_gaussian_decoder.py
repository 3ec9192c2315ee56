"""The Gaussian decoder in plain PyTorch, from DESIGN §7 alone: the oracle. One cloud at a time, no padding."""

from __future__ import annotations

import math

import torch
from torch.nn import functional


def decode(params: dict, config, points, hidden, context=None):
    """points [P, 3], hidden [P, 4, E], context [S, C] → dict of attributes [P, …]. `params`: nested dict of tensors."""
    gelu = lambda x: functional.gelu(x, approximate="tanh")  # noqa: E731
    norm = lambda x, scale: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * scale  # noqa: E731
    linear = lambda x, p: x @ p["kernel"] + p["bias"]  # noqa: E731
    mlp = lambda x, p: linear(gelu(linear(x, p["up"])), p["down"])  # noqa: E731

    def attend(p, y, source):
        q = torch.einsum("pd,dnh->nph", y, p["query"])
        k, v = (torch.einsum("sd,dnh->nsh", source, p[name]) for name in ("key", "value"))
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), dim=-1)
        return torch.einsum("nph,nhd->pd", weights @ v, p["out"])

    parts = []
    if config.inputs in ("both", "position_only"):
        lower, upper = (torch.tensor(x, dtype=points.dtype) for x in (config.lower, config.upper))
        u = (points - (lower + upper) / 2) / ((upper - lower) / 2)
        angles = torch.stack([math.pi * 2**k * u for k in range(config.octaves)], dim=-1).flatten(1)
        parts.append(mlp(torch.cat([u, angles.sin(), angles.cos()], dim=-1), params["position_mlp"]))
    if config.inputs in ("both", "ar_only"):
        parts.append(mlp(norm(hidden.flatten(1), params["feature_norm"]), params["feature_mlp"]))
    x = linear(torch.cat(parts, dim=-1), params["input"])
    for i in range(config.layers):
        layer = {name: {k: v[i] for k, v in p.items()} for name, p in params["layers"].items()}
        if config.cross_attention:
            p = layer["cross_attention"]
            x = x + attend(p, norm(x, p["norm"]), norm(context, params["context_norm"]))
        p = layer["self_attention"]
        y = norm(x, p["norm"])
        x = x + attend(p, y, y)
        p = layer["mlp"]
        y = norm(x, p["norm"])
        x = x + (gelu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]
    head = params["head"]
    colors, opacities, scales, quats, offsets = torch.split(
        norm(x, head["norm"]) @ head["kernel"] + head["bias"], [3, 1, 3, 4, 3], dim=-1
    )
    offsets = config.max_offset * torch.tanh(offsets)
    initial = math.log(config.initial_opacity / (1 - config.initial_opacity))
    return {
        "means": points + offsets,
        "quats": functional.normalize(quats + torch.tensor([1.0, 0, 0, 0], dtype=points.dtype), dim=-1),
        "scales": torch.exp(scales + config.initial_log_scale).clamp(1e-5, config.max_scale),
        "opacities": torch.sigmoid(opacities[:, 0] + initial),
        "colors": torch.sigmoid(colors),
    }
