"""Stage one end to end on a small store: learning, bitwise resume, evaluation, what is refused."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from absl import flags

from pointillist_jax.configs import Config, DataConfig, EncoderConfig, ModelConfig, TrainConfig
from pointillist_jax.data.token_store import FLAME_FIELDS, StoreSpec, StoreWriter, SubjectRecord, open_store
from pointillist_jax.flame import open_head
from pointillist_jax.tokens import PointTokenizer
from pointillist_jax.training import ar
from pointillist_jax.training.metric_log import read_metrics

CONFIG = Config(
    model=ModelConfig(
        width=32, layers=1, heads=2, head_dim=16, mlp_width=64, window=64, scan_layers=True,
        encoder=EncoderConfig(image_size=14, num_points=16),
    ),
    data=DataConfig(held_out=2, portrait_size=14),
    train=TrainConfig(steps=12, batch_size=4, learning_rate=5e-3, warmup_steps=2, log_every=1, eval_every=0,
                      checkpoint_every=6),
)  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Six people whose clouds are ellipsoids of their own, with portraits of their own grey."""
    rng, head = np.random.default_rng(0), open_head("coarse")
    tokenizer = PointTokenizer(num_faces=head.num_faces)
    path = tmp_path_factory.mktemp("store")
    neutral = head.neutral_params()
    records = []
    for i in range(6):
        points = rng.normal(size=(40, 3))
        points *= (0.1 + 0.02 * i) / np.linalg.norm(points, axis=1, keepdims=True)
        binding = rng.integers(0, 20, 40)
        flame = {key: np.asarray(getattr(neutral, key)) for key in FLAME_FIELDS}
        records.append(
            SubjectRecord(
                name=f"p{i}", tokens=tokenizer.encode(points, binding), shape=flame["shape"],
                portrait=np.full((14, 14, 3), 40 * i, np.uint8), flame=flame, fit_sha256=str(i),
            )
        )  # fmt: skip
    writer = StoreWriter(path, StoreSpec(tokenizer, head.sha256, head.source, portrait_size=14))
    writer.write_shard(records)
    writer.finish()
    return open_store(path)


@pytest.fixture(scope="module")
def train(store):
    # The script's flags belong to its own command line; here only its function is used.
    flags.FLAGS.unparse_flags()
    from experiments.train_ar import summarize, train_ar

    config = dataclasses.replace(CONFIG, model=CONFIG.model.for_tokenizer(store.tokenizer))

    def run(workdir, steps: int, mesh: str = ""):
        settings = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
        state, stopped, held_out = train_ar(store, open_head("coarse"), settings, workdir, mesh=mesh, bar=False)
        assert stopped is None
        return state, summarize(workdir, store, settings, held_out)

    return run


@pytest.mark.slow
def test_resumed_equals_uninterrupted_bitwise_and_learns(train, tmp_path):
    whole, summary = train(tmp_path / "whole", 12)
    train(tmp_path / "parts", 6)
    state, _ = train(tmp_path / "parts", 12)
    jax.tree.map(np.testing.assert_array_equal, state, whole)
    curves = [[line["loss"] for line in read_metrics(tmp_path / d) if "loss" in line] for d in ("whole", "parts")]
    assert curves[0] == curves[1]
    assert curves[0][-1] < curves[0][0] - 0.5
    assert len(summary["held_out"]) == 2
    assert set(summary) >= {"unigram", "mean_head", "model", "conditions_exchanged"}
    assert summary["model"]["loss"] != summary["conditions_exchanged"]["loss"]
    assert (tmp_path / "whole" / "curve.png").stat().st_size > 5000
    card = summary["model"]
    assert card["loss"] == pytest.approx(np.mean([card[f"loss_{s}"] for s in "xyzb"]), abs=0.05)


def test_exchanged_conditions_belong_to_the_next_subject(store):
    change = ar.shuffled_conditions(store, ("p1", "p4"))
    batch = {"subject": np.array([1, 4, -1]), "condition": {"portrait": np.zeros((3, 14, 14, 3), np.uint8)}}
    greys = change(batch)["condition"]["portrait"][:, 0, 0, 0]
    assert greys.tolist()[:2] == [160, 40]
