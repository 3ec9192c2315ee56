"""The PyTorch reference's point encoder under the names and in the packing of published checkpoints (facts/
encoders_and_metrics.md 2)."""

from __future__ import annotations

import torch

from experiments.torch_reference.point_encoder import PointEncoder

_CROSS = {"norm1": "ln_1", "data_norm": "ln_2", "norm2": "ln_3", "query": "attn.c_q", "key_value": "attn.c_kv"}
_OWN = {"norm1": "ln_1", "norm2": "ln_2", "query_key_value": "attn.c_qkv"}
_BOTH = {"out": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
_TOP = {"queries": "query", "input": "input_proj", "norm": "ln_post"}


def published(encoder: PointEncoder) -> dict[str, torch.Tensor]:
    """Its state dict as the encoder of a checkpoint, without the prefix."""
    state = {}
    for name, value in encoder.state_dict().items():
        if name.endswith(("key_value.weight", "query_key_value.weight")):
            # Per head, not per kind: each head's outputs are its q, then its k, then its v.
            kinds, heads = (3 if "query_key_value" in name else 2), encoder.cross.heads
            value = value.unflatten(0, (kinds, heads, -1)).transpose(0, 1).flatten(0, 2)
        part, *rest = name.split(".")
        if part == "cross":
            state[".".join(["cross_attn", (_CROSS | _BOTH)[rest[0]], *rest[1:]])] = value
        elif part == "layers":
            state[".".join(["self_attn.resblocks", rest[0], (_OWN | _BOTH)[rest[1]], *rest[2:]])] = value
        else:
            state[".".join([_TOP[part], *rest])] = value
    return state


def checkpoint(encoder: PointEncoder, prefix: str = "model.shape_model.") -> dict[str, torch.Tensor]:
    """Its weights as a published file holds them: under a prefix, beside a decoder and a KL bottleneck."""
    width = encoder.queries.shape[1]
    state = {f"{prefix}encoder.{name}": value for name, value in published(encoder).items()}
    return state | {
        f"{prefix}pre_kl.weight": torch.zeros(128, width),
        f"{prefix}transformer.resblocks.0.ln_1.weight": torch.ones(width),
        "model.shape_projection": torch.zeros(width, width),
    }
