"""Checkpoints in the published layouts, with every parameter random: what converters and encoders are tested on."""

from __future__ import annotations

import re

import numpy as np

# Hugging Face's names in files → torch.hub's (facts/encoders_and_metrics.md 1.3).
_HUB_NAMES = (
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.", "blocks."),
    (r"attention\.output\.dense\.", "attn.proj."),
    (r"layer_scale([12])\.lambda1", r"ls\1.gamma"),
    (r"mlp\.weights_in\.", "mlp.w12."),
    (r"mlp\.weights_out\.", "mlp.w3."),
)


def randomize(module, rng: np.random.Generator) -> None:
    """Overwrites every parameter of a torch module, at sizes that keep activations near one.

    Fresh modules hold zeros and ones (biases, registers, layer scales) that would hide mistakes.
    """
    import torch

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            size = {1: 0.3, 2: parameter.shape[-1] ** -0.5}.get(parameter.ndim, 0.5)
            if "projection" in name and parameter.ndim == 4:
                size = np.prod(parameter.shape[1:]) ** -0.5
            values = rng.normal(0, size, parameter.shape)
            if re.search(r"(norm|ln_|lambda).*(weight|\d)$", name) and parameter.ndim == 1:
                values += 0.7
            parameter.copy_(torch.from_numpy(values))


def huggingface_dinov2(rng, *, width=64, layers=2, heads=4, registers=4, swiglu=False, patch=14, image_size=518):
    """A `transformers` DINOv2 with random parameters, in evaluation mode."""
    import transformers

    options = {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "patch_size": patch,
        "image_size": image_size, "use_swiglu_ffn": swiglu,
    }  # fmt: skip
    if registers:
        config = transformers.Dinov2WithRegistersConfig(num_register_tokens=registers, **options)
        model = transformers.Dinov2WithRegistersModel(config)
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**options))
    randomize(model, rng)
    return model.eval()


def huggingface_features(module, images: np.ndarray) -> dict[str, np.ndarray]:
    """[B, H, W, 3] → what DinoV2 returns, of the torch module."""
    import torch

    dtype = next(module.parameters()).dtype
    with torch.no_grad():
        tokens = module(torch.from_numpy(images.transpose(0, 3, 1, 2)).to(dtype)).last_hidden_state.numpy()
    first = 1 + getattr(module.config, "num_register_tokens", 0)
    return {"cls": tokens[:, 0], "patch_tokens": tokens[:, first:]}


def hub_state(file_state: dict) -> dict:
    """The tensors of a Hugging Face file under torch.hub's names."""
    state = {}
    for name, value in file_state.items():
        if re.search(r"\.(key|value)\.", name):
            continue
        if ".query." in name:
            parts = [file_state[name.replace(".query.", f".{part}.")] for part in ("query", "key", "value")]
            name = name.replace("attention.attention.query.", "attn.qkv.")
            value = np.concatenate(parts)
        for pattern, new in _HUB_NAMES:
            name = re.sub(pattern, new, name)
        state[name] = value
    return state
