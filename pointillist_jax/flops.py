"""Analytic FLOPs of the models, and the peaks of known accelerators, for MFU (DESIGN §10).

Conventions, to be stated with every MFU (facts/jax.md): a multiply-add counts two; causal attention counts half;
rematerialised work is not counted; a training step is three forwards. Norms, rotary positions, softmax and embedding
look-ups are left out: they are no matrix products. XLA's own count covers them and counts the body of a scan once.
"""

from __future__ import annotations

import dataclasses
import re

from pointillist_jax.configs import ModelConfig


@dataclasses.dataclass(frozen=True)
class Peak:
    """Datasheet figures of one device: dense bf16 FLOP/s with float32 accumulation, and memory bytes/s."""

    flops: float
    bandwidth: float


# By whole words of `jax.Device.device_kind`, the most specific first: a GB200 is no B200.
PEAKS = {
    "B200": Peak(2.25e15, 8.0e12),
    "H200": Peak(989e12, 4.8e12),
    "H100 PCIe": Peak(756e12, 2.0e12),
    "H100 NVL": Peak(835e12, 3.9e12),
    "H100": Peak(989e12, 3.35e12),
    "H20": Peak(148e12, 4.0e12),
    "A100-SXM4-40GB": Peak(312e12, 1.555e12),
    "A100": Peak(312e12, 2.039e12),
    "L40S": Peak(362e12, 0.864e12),
    "TPU v6": Peak(918e12, 1.64e12),
    "TPU v6e": Peak(918e12, 1.64e12),
    "TPU v5 lite": Peak(197e12, 0.819e12),
    "TPU v5e": Peak(197e12, 0.819e12),
    "TPU v5": Peak(459e12, 2.765e12),
    "TPU v5p": Peak(459e12, 2.765e12),
    "TPU v4": Peak(275e12, 1.228e12),
}


def device_peak(device_kind: str) -> Peak | None:
    """The peak of a device by `jax.Device.device_kind`, or None: an MFU without a datasheet would be an invention."""

    def named(name: str) -> bool:
        return re.search(rf"(?<![a-z0-9]){re.escape(name)}(?![a-z0-9])", device_kind, re.IGNORECASE) is not None

    return next((peak for name, peak in PEAKS.items() if named(name)), None)


def attention_flops(queries: int, keys: int, heads: int, head_dim: int, *, causal: bool = False) -> float:
    """Scores and their product with the values, of one sequence."""
    return 4.0 * queries * keys * heads * head_dim * (0.5 if causal else 1.0)


def decoder_flops(
    tokens: int,
    context: int,
    *,
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    ffw: int,
    gated: bool,
    logits: float,
) -> dict[str, float]:
    """One forward of the point transformer over one window, by part (DESIGN §6).

    Args:
      tokens: T of the window. context: S of the condition.
      layers, width, heads, kv_heads, head_dim, ffw: of the model.
      gated: three matrices in the feed-forward network instead of two.
      logits: classes per token: the vocabulary, or with the slot-restricted loss its mean over the four slots.

    Returns:
      `self_attention`, `cross_attention` (products of queries, keys, values only), `projections`, `ffw`, `head`.
    """
    inner, inner_kv = heads * head_dim, kv_heads * head_dim
    own = 2.0 * tokens * width * (2 * inner + 2 * inner_kv)
    cross = 2.0 * tokens * width * 2 * inner + 2.0 * context * width * 2 * inner_kv
    return {
        "self_attention": layers * attention_flops(tokens, tokens, heads, head_dim, causal=True),
        "cross_attention": layers * attention_flops(tokens, context, heads, head_dim),
        "projections": layers * (own + cross),
        "ffw": layers * 2.0 * tokens * width * ffw * (3 if gated else 2),
        "head": 2.0 * tokens * width * logits,
    }


def transformer_flops(model: ModelConfig, context: int) -> dict[str, float]:
    """One forward of a configured transformer over one window, with `context` tokens of condition, by part."""
    slots = (3 * model.bins + model.num_faces) / 4
    logits = slots if model.loss_support == "slot" else model.tokenizer.vocab_size
    by_point, gated = model.step == "point", model.mlp == "gated"
    flops = decoder_flops(
        model.window,
        context,
        layers=model.layers,
        width=model.width,
        heads=model.heads,
        kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        ffw=model.mlp_width,
        gated=gated,
        logits=4 * logits if by_point else logits,
    )
    if by_point:
        flops |= point_step_flops(
            model.window, width=model.width, ffw=model.mlp_width, gated=gated, slot_layers=model.slot_layers
        )
    return flops


def point_step_flops(points: int, *, width: int, ffw: int, gated: bool, slot_layers: int) -> dict[str, float]:
    """What one step per point adds to `decoder_flops` (`models/point_step.py`), for a window of `points` steps.

    `decoder_flops` is then called with `tokens` = points and `logits` = the classes of all four slots together.
    """
    return {
        "point_embedding": 2.0 * points * 4 * width * width,
        "slot_heads": 2.0 * points * 4 * slot_layers * width * ffw * (3 if gated else 2),
    }


def training_flops(forward: dict[str, float]) -> float:
    """Forward and backward: the backward pass of a product is two products."""
    return 3.0 * sum(forward.values())
