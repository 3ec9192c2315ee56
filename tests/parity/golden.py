"""Golden arrays: what the PyTorch reference computed in float64, so that JAX is checked where there is no torch.

    python -m tests.parity.golden        writes tests/parity/golden.npz anew

Weights and inputs come from NumPy's generators, whose streams do not change; only results are kept.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pointillist_jax.configs import PATCH_COLORS, DecoderConfig
from pointillist_jax.convert.reference import decoder_to_torch, transformer_to_torch
from pointillist_jax.models import ar, gaussian_decoder
from pointillist_jax.models.layers import init_params
from tests.models.tiny_ar import changed, random_batch

PATH = Path(__file__).with_name("golden.npz")
MODEL = changed(dtype="float64", window=12)
DECODER = DecoderConfig(feature_width=10, context_width=9, width=24, layers=2, heads=3, head_dim=8, mlp_width=40,
                        attention="xla", cross_attention=True, dtype="float64")  # fmt: skip

# The same with the portrait's colours in the context.
COLORED = dataclasses.replace(DECODER, context_colors=True, context_width=9 + PATCH_COLORS, context_tokens=7)
DECODERS = {"decoder": DECODER, "colored": COLORED}


def parameters(specs: Any, seed: int) -> Any:
    """Random ones of about the size of initial ones, in the order of their paths."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(specs, jax.random.PRNGKey(0)))
    return jax.tree.map(lambda x: rng.normal(0.0, 0.15, x.shape), shapes)


def transformer_case() -> tuple[Any, dict[str, np.ndarray]]:
    """(parameters, window)."""
    rng = np.random.default_rng(1)
    batch = random_batch(rng, MODEL)
    context = rng.normal(size=batch["context"].shape)
    return parameters(ar.param_specs(MODEL), 2), {**batch, "context": context}


def decoder_case(config: DecoderConfig) -> tuple[Any, dict[str, np.ndarray]]:
    """(parameters, inputs)."""
    rng = np.random.default_rng(3)
    inputs = {
        "points": rng.uniform(config.lower, config.upper, (1, 20, 3)),
        "hidden": rng.normal(size=(1, 20, 4, config.feature_width)),
        "context": rng.normal(size=(1, 7, config.context_width)),
    }
    return parameters(gaussian_decoder.param_specs(config), 4), inputs


def main() -> None:
    import torch

    from experiments.torch_parity.taps import load_arrays, tensors
    from experiments.torch_reference.gaussian_decoder import GaussianDecoder
    from experiments.torch_reference.point_transformer import PointTransformer

    params, batch = transformer_case()
    twin, given = load_arrays(PointTransformer(MODEL), transformer_to_torch(params, MODEL)), tensors(batch)
    loss = twin.loss(given["tokens"], given["targets"], given["context"])
    loss.backward()
    with torch.no_grad():
        arrays = {"hidden": twin(given["tokens"], given["context"]).numpy(), "loss": loss.detach().numpy()}
    # A sum with weights of its own stands for every gradient.
    arrays |= {f"gradient/{name}": digest(p.grad.numpy()) for name, p in twin.named_parameters()}
    for kind, config in DECODERS.items():
        params, inputs = decoder_case(config)
        decoder = load_arrays(GaussianDecoder(config), decoder_to_torch(params, config))
        given = tensors(inputs)
        with torch.no_grad():
            found = decoder(given["points"], given["hidden"], None, given["context"])
        arrays |= {f"{kind}/{name}": value.numpy() for name, value in found._asdict().items()}
    np.savez_compressed(PATH, **arrays)
    print(f"{PATH}: {len(arrays)} arrays, {PATH.stat().st_size / 1024:.0f} KiB")


def digest(gradient: np.ndarray) -> np.ndarray:
    """Three weighted sums and the largest size: where an entry changes, they do."""
    rng = np.random.default_rng(gradient.size)
    sums = rng.normal(size=(3, gradient.size)) @ gradient.reshape(-1)
    return np.append(sums, np.abs(gradient).max())


if __name__ == "__main__":
    main()
