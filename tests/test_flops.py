"""The FLOP formulas against the facts and against XLA's own count of the same products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from pointillist_jax.configs import ModelConfig
from pointillist_jax.flops import (
    attention_flops,
    decoder_flops,
    device_peak,
    point_step_flops,
    training_flops,
    transformer_flops,
)
from pointillist_jax.models.ar import param_specs
from pointillist_jax.models.layers import init_params
from pointillist_jax.training.ar import training_window, window_loss

PAPER = {"layers": 24, "width": 1024, "heads": 8, "kv_heads": 8, "head_dim": 128, "ffw": 4096, "gated": False}


def test_the_paper_preset_costs_what_the_facts_say():
    """facts/jax.md: 4.5 GFLOP per token at T = 12,000 and S ≈ 1,900, 39 % of it self-attention."""
    parts = decoder_flops(12_000, 1_900, **PAPER, logits=0)
    assert training_flops(parts) / 12_000 == pytest.approx(4.5e9, rel=0.02)
    assert parts["self_attention"] / sum(parts.values()) == pytest.approx(0.39, abs=0.01)


def test_products_equal_xlas_count():
    t, s, d, n, h = 24, 40, 32, 4, 8

    def attend(q, k, v):
        weights = jnp.einsum("TNH,SNH->NTS", q, k)
        return jnp.einsum("NTS,SNH->TNH", weights, v)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((t, n, h), (s, n, h), (s, n, h))]
    count = jax.jit(attend).lower(*shapes).compile().cost_analysis()["flops"]
    assert attention_flops(t, s, n, h) == count
    ffw = decoder_flops(t, 0, layers=1, width=d, heads=n, kv_heads=n, head_dim=h, ffw=48, gated=False, logits=0)["ffw"]
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((t, d), (d, 48), (48, d))]
    assert ffw == jax.jit(lambda x, a, b: x @ a @ b).lower(*shapes).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("step", ["token", "point"])
def test_a_whole_model_equals_xlas_count(step):
    """Unrolled, with dense attention, whose masked half XLA counts too. What is no product adds a hundredth."""
    model = ModelConfig(
        num_faces=2048, width=512, layers=2, heads=8, mlp_width=1408, window=256, attention="xla",
        coord_tables="learned", step=step,
    )  # fmt: skip
    params = jax.eval_shape(lambda key: init_params(param_specs(model), key), jax.random.PRNGKey(0))
    integers = jax.ShapeDtypeStruct((1, training_window(model)["window"]), jnp.int32)
    batch = {"tokens": integers, "targets": integers, "positions": integers}
    batch["mask"] = jax.ShapeDtypeStruct(integers.shape, bool)
    context = jax.ShapeDtypeStruct((1, 82, 512), jnp.float32)
    forward = jax.jit(lambda params, batch, context: window_loss(params, model, batch, context).total)
    count = forward.lower(params, batch, context).cost_analysis()["flops"]
    parts = transformer_flops(model, 82)
    assert 1 < count / (sum(parts.values()) + parts["self_attention"]) < 1.02


def test_the_chain_of_a_point_step_equals_xlas_count():
    """The matrices of `models/point_step.py`, once per point: embedding of four tokens, then four slots of MLPs."""
    points, d, ffw = 24, 16, 40

    def chain(tokens, embedding, up, down):
        x = jnp.einsum("PsE,sED->PD", tokens, embedding)
        for slot in range(4):
            for layer in range(2):
                x = x @ up[slot, layer] @ down[slot, layer]
        return x

    shapes = [(points, 4, d), (4, d, d), (4, 2, d, ffw), (4, 2, ffw, d)]
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    count = jax.jit(chain).lower(*shapes).compile().cost_analysis()["flops"]
    parts = point_step_flops(points, width=d, ffw=ffw, gated=False, slot_layers=2)
    assert sum(parts.values()) == count
    gated = point_step_flops(points, width=d, ffw=ffw, gated=True, slot_layers=2)
    assert gated["slot_heads"] == 1.5 * parts["slot_heads"]


def test_grouped_queries_save_projections_only():
    whole = decoder_flops(100, 50, **PAPER, logits=7)
    grouped = decoder_flops(100, 50, **PAPER | {"kv_heads": 2}, logits=7)
    assert whole["self_attention"] == grouped["self_attention"]
    assert whole["projections"] - grouped["projections"] == 24 * 2 * (100 + 50) * 1024 * 2 * 6 * 128


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2.25e15),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        # Other devices whose names contain a known one's.
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GB200", None),
        ("NVIDIA A100X", None),
        ("cpu", None),
    ],
)
def test_peaks_are_known_or_none(kind, flops):
    peak = device_peak(kind)
    assert (peak and peak.flops) == flops
