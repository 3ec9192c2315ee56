"""What a run may change when it goes on: equal shapes do not make two models one."""

from __future__ import annotations

import dataclasses
import json

import pytest

from pointillist_jax.configs import Config, DecoderConfig, EncoderConfig, ModelConfig, TrainConfig
from pointillist_jax.files import UserError
from pointillist_jax.training.same_model import check_same_model

CONFIG = Config(model=ModelConfig(width=32, encoder=EncoderConfig(num_points=16)), decoder=DecoderConfig(octaves=4))


def meta(config: Config) -> dict:
    """As it comes out of a checkpoint."""
    return json.loads(json.dumps({"config": dataclasses.asdict(config)}))


def changed(part: str, **fields) -> Config:
    return dataclasses.replace(CONFIG, **{part: dataclasses.replace(getattr(CONFIG, part), **fields)})


@pytest.mark.parametrize("part", ["model", "decoder"])
def test_the_same_run_goes_on_in_silence(part):
    assert check_same_model(meta(CONFIG), CONFIG, part, "run") == ""


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        (
            "model",
            {"order": "self_first"},
            r"model.order=cross_first \(now self_first\).*--config.model.order=cross_first",
        ),
        (
            "model",
            {"rope_theta": 10.0},
            r"model.rope_theta=1000000.0 \(now 10.0\).*--config.model.rope_theta=1000000.0",
        ),
        ("model", {"loss_support": "vocab"}, r"loss_support=slot \(now vocab\).*--config.model.loss_support=slot"),
        (
            "model",
            {"qk_norm": False},
            r"qk_norm=true \(now false\): resume with --config.model.qk_norm=true, or .*--over",
        ),
        ("model", {"dtype": "bfloat16"}, "--config.model.dtype=float32"),
        ("model", {"encoder": EncoderConfig(num_points=17)}, r"model.encoder.num_points=16 \(now 17\)"),
        ("model", {"bins": 512}, r"model.bins=1024 \(now 512\): resume with the data it was trained on"),
        ("decoder", {"inputs": "none"}, r"decoder.inputs=both \(now none\).*--config.decoder.inputs=both"),
        ("decoder", {"max_offset": 0.2}, r"decoder.max_offset=0.1 \(now 0.2\)"),
        ("decoder", {"upper": (1.0, 2.0, 3.0)}, r"decoder.upper=.* \(now 1.0,2.0,3.0\): resume with the data"),
    ],
)
def test_another_function_is_refused_with_both_values_and_the_fix(part, fields, message):
    with pytest.raises(UserError, match=message):
        check_same_model(meta(CONFIG), changed(part, **fields), part, "run")
    # The other part is not this run's.
    check_same_model(meta(CONFIG), changed(part, **fields), {"model": "decoder", "decoder": "model"}[part], "run")


@pytest.mark.parametrize("part", ["model", "decoder"])
def test_how_it_is_computed_may_change(part):
    fields = {"attention": "xla", "attention_block": 16, "remat": "full"}
    fields |= {"scan_layers": True} if part == "model" else {"eval_views": 1, "max_points": 512}
    assert check_same_model(meta(CONFIG), changed(part, **fields), part, "run") == ""


def test_changed_training_is_said():
    train = dataclasses.replace(CONFIG.train, steps=7, learning_rate=0.5)
    said = check_same_model(meta(CONFIG), dataclasses.replace(CONFIG, train=train), "model", "run")
    assert said == "train.steps 50000 → 7, train.learning_rate 0.0001 → 0.5"
    assert check_same_model(meta(CONFIG), dataclasses.replace(CONFIG, train=train), "decoder", "run") == ""
    settings = dataclasses.replace(CONFIG.decoder.train, clip_norm=2.0)
    said = check_same_model(meta(CONFIG), changed("decoder", train=settings), "decoder", "run")
    assert said == "decoder.train.clip_norm 1.0 → 2.0"


def test_an_average_cannot_begin_in_the_middle():
    with_average = dataclasses.replace(CONFIG, train=TrainConfig(ema_decay=0.5))
    with pytest.raises(UserError, match=r"train.ema_decay=0.0 \(now 0.5\).*--config.train.ema_decay=0,"):
        check_same_model(meta(CONFIG), with_average, "model", "run")
    assert check_same_model(meta(with_average), CONFIG, "model", "run") == "train.ema_decay 0.5 → 0.0"


@pytest.mark.parametrize("content", [{}, {"config": None}, {"config": {"model": 3}}])
def test_a_meta_without_a_config_is_refused(content):
    with pytest.raises(UserError, match="holds no ModelConfig"):
        check_same_model(content, CONFIG, "model", "run")
