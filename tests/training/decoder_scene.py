"""Stage two at its smallest: two ball heads (tests/fitting/scenes.py), their captures, and random features of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from pointillist_jax.configs import Config, DecoderConfig, TrainConfig
from pointillist_jax.data.captures import load_capture
from pointillist_jax.data.point_features import (
    FeatureSet,
    FeatureSpec,
    PointFeatures,
    save_point_features,
    write_feature_meta,
)
from pointillist_jax.data.token_store import StoreSpec
from pointillist_jax.tokens import PointTokenizer
from tests.fitting.scenes import ball_head, write_person

WIDTH, NAMES = 6, ("ann", "bob")
CONFIG = Config(
    decoder=DecoderConfig(
        width=16, layers=1, heads=2, head_dim=8, mlp_width=24, attention="xla", views=2, eval_views=2,
        train=TrainConfig(steps=30, batch_size=2, learning_rate=1e-2, warmup_steps=1, weight_decay=0.0, b2=0.999,
                          log_every=1, eval_every=15, checkpoint_every=5),
    ),
)  # fmt: skip


def write_people(root: Path, captures: bool = True) -> None:
    """`features/` and, which takes a renderer, `captures/<name>/`."""
    head = ball_head()
    tokenizer = PointTokenizer(head.num_faces)
    spec = FeatureSpec(StoreSpec(tokenizer, "ball", "ball"), WIDTH, "teacher_forced", {"step": 1}, {}, NAMES[1:])
    write_feature_meta(root / "features", spec, NAMES)
    for seed, name in enumerate(NAMES):
        if captures:
            write_person(root / "captures" / name, seed)
        rng = np.random.default_rng(seed)
        points = rng.normal(size=(70 + 5 * seed, 3))
        points *= 0.1 / np.linalg.norm(points, axis=1, keepdims=True)
        tokens = tokenizer.encode(points, rng.integers(0, head.num_faces, len(points)))
        xyz, binding = tokenizer.decode(tokens)
        hidden = rng.normal(size=(len(points), 4, WIDTH))
        save_point_features(
            root / "features" / f"{name}.npz", PointFeatures(tokens, np.asarray(xyz), np.asarray(binding), hidden)
        )


def open_people(root: Path):
    """(head, features, captures)."""
    head = dataclasses.replace(ball_head(), sha256="ball")
    captures = [load_capture(root / "captures" / name, head) for name in NAMES]
    return head, FeatureSet(root / "features", flame_sha256="ball"), captures
