"""Configs refuse what no model can be built from, naming the field, before anything is compiled or divided by it."""

from __future__ import annotations

import pytest

from pointillist_jax.configs import (
    DINOV2,
    PRESETS,
    DataConfig,
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    TrainConfig,
    config_from_json,
)
from pointillist_jax.files import UserError
from pointillist_jax.models.image_encoder import NAMES

SIZES = ("width", "heads", "head_dim", "mlp_width", "attention_block")


@pytest.mark.parametrize(
    ("kind", "path", "field", "values"),
    [
        *((ModelConfig, "model", name, (0, -2)) for name in (*SIZES, "layers", "bins", "num_faces")),
        *((DecoderConfig, "decoder", name, (0, -2)) for name in (*SIZES, "feature_width", "octaves")),
        (ModelConfig, "model", "slot_layers", (0, -1)),
        (ModelConfig, "model", "rope_theta", (0.0, float("nan"), float("inf"))),
        (DecoderConfig, "decoder", "layers", (-1,)),
        (EncoderConfig, "model.encoder", "image_size", (0, -14, 13, 100)),
        (EncoderConfig, "model.encoder", "num_points", (0, -1)),
        (EncoderConfig, "model.encoder", "image", ("'vitx14'",)),
        (EncoderConfig, "model.encoder", "points", ("'vits14'",)),
        (ModelConfig, "model", "attention", ("'flash'",)),
        (DecoderConfig, "decoder", "attention", ("'flash'",)),
        (DataConfig, "data", "space", ("'head'",)),
        *((TrainConfig, "train", name, (-0.1, 1.0, float("nan"))) for name in ("b1", "b2", "ema_decay")),
    ],
)
def test_sizes_that_cannot_be_are_refused_by_name(kind, path, field, values):
    for said in values:
        value = said.strip("'") if isinstance(said, str) else said
        with pytest.raises(UserError, match=rf"{path}\.{field}={said} must be"):
            kind(**{field: value})
        # As a checkpoint's meta: not written by this program, or damaged.
        with pytest.raises(UserError, match=rf"{path}\.{field}={said} must be"):
            config_from_json(kind, {field: value}, "meta")


def test_what_is_legal_at_the_edge():
    assert all(EncoderConfig(image=name) for name in ("tiny", *NAMES))
    assert set(NAMES) == set(DINOV2)
    assert TrainConfig(b1=0.0, b2=0.0).b2 == 0
    assert DecoderConfig(layers=0, max_points=0).layers == 0
    assert ModelConfig(width=1, layers=1, heads=1, head_dim=2, mlp_width=1, attention_block=1, slot_layers=1).width == 1
    assert EncoderConfig(image_size=14, num_points=1).num_points == 1
    assert {"tiny", "small", "paper"} <= set(PRESETS)
