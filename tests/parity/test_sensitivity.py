"""Agreement means something: mistakes put into the torch twin are caught, and the first block named is theirs."""

from __future__ import annotations

import dataclasses
import types

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from experiments.torch_parity import condition, gaussian_decoder, point_transformer, stage_two  # noqa: E402
from experiments.torch_parity.rows import TOLERANCES, compare, first_diverging, table, worst_first  # noqa: E402
from experiments.torch_parity.suite import Suite  # noqa: E402
from experiments.torch_reference import flame as torch_flame  # noqa: E402
from experiments.torch_reference.point_transformer import PointTransformer  # noqa: E402
from pointillist_jax.configs import PATCH_COLORS, Config, DecoderConfig, EncoderConfig  # noqa: E402
from tests.models.tiny_ar import changed  # noqa: E402

pytestmark = pytest.mark.usefixtures("x64")
BOUNDS = TOLERANCES["float64"]
CONFIG = Config(
    model=changed(dtype="float64", window=12),
    decoder=DecoderConfig(feature_width=32, context_width=32, width=24, layers=1, heads=3, head_dim=8, mlp_width=40,
                          attention="xla", dtype="float64"),
)  # fmt: skip


@pytest.fixture(scope="module")
def suite():
    with jax.enable_x64(True):
        yield Suite(CONFIG, 0, BOUNDS, length=32, points=16, context=7)


def diverging(suite, twin):
    rows = point_transformer.block_rows(suite.transformer, twin, CONFIG.model, suite.batch, BOUNDS)
    found = first_diverging(rows)
    return found and found.name


def other_twin(suite, **options):
    """The same weights in a model of other options."""
    # Not a ModelConfig, which refuses some of them.
    twin = PointTransformer(types.SimpleNamespace(**{**vars(CONFIG.model), **options}))
    twin.load_state_dict(suite.twin().state_dict(), assign=True)
    return twin


def test_nothing_wrong_is_nothing_found(suite):
    assert diverging(suite, suite.twin()) is None


@pytest.mark.parametrize(("options", "block"), [
    ({"rope_theta": 1e5}, "rope"),
    ({"order": "self_first"}, "layers.0"),
    ({"window": 13}, "layers.0.self_attention"),
    ({"window": 11}, "layers.0.self_attention"),
], ids=["theta", "order", "window one too long", "window one too short"])  # fmt: skip
def test_wrong_options_are_named(suite, options, block):
    assert diverging(suite, other_twin(suite, **options)) == block


@pytest.mark.parametrize(("part", "block"), [
    ("layers.1.mlp.norm", "layers.1.mlp.norm"),
    ("final_norm", "final_norm"),
    ("context_norm", "context_norm"),
    ("layers.1.cross_attention.key_norm", "layers.1.cross_attention"),
])  # fmt: skip
def test_a_missing_scale_is_named(suite, part, block):
    twin = suite.twin()
    torch.nn.init.ones_(twin.get_submodule(part).weight)
    assert diverging(suite, twin) == block


def test_a_missing_softmax_scale_and_a_transposed_matrix_are_named(suite):
    twin = suite.twin()
    attention = twin.layers[1].self_attention
    attend = attention.attend
    attention.attend = lambda q, *rest, **options: attend(q * attention.head_dim**0.5, *rest, **options)
    assert diverging(suite, twin) == "layers.1.self_attention"
    twin = suite.twin()
    query = twin.layers[0].cross_attention.query
    query.weight = torch.nn.Parameter(query.weight.detach().T.contiguous())
    assert diverging(suite, twin) == "layers.0.cross_attention"


@pytest.fixture(scope="module")
def ours():
    """The options beyond the paper: one step per point, the loss of marginals, the portrait's colours."""
    encoder = EncoderConfig(image_size=14, num_points=16)
    model = changed(dtype="float64", window=4, layers=1, step="point", condition_loss=1.0, encoder=encoder)
    decoder = dataclasses.replace(CONFIG.decoder, cross_attention=True, context_colors=True, context_tokens=5,
                                  context_width=32 + PATCH_COLORS)  # fmt: skip
    with jax.enable_x64(True):
        yield Suite(Config(model=model, decoder=decoder), 0, BOUNDS, length=32, points=16, context=5)


@pytest.mark.parametrize(("part", "mistake", "block"), [
    ("image_encoder.layers.0.norm2", {"weight": 1.0}, "condition.image_encoder"),
    ("point_encoder.norm", {"weight": 1.0}, "condition.point_encoder"),
    ("parts_projection", {"bias": 0.0}, "condition.parts_projection"),
    ("marginals.norm", {"weight": 1.0}, "condition.marginals"),
])  # fmt: skip
def test_mistakes_in_the_condition_are_named(ours, part, mistake, block):
    params, model = ours.stage_one()
    for name, value in mistake.items():
        torch.nn.init.constant_(getattr(model.condition.get_submodule(part), name), value)
    rows = condition.block_rows(params, model, ours.config.model, ours.head, ours._conditioned(), BOUNDS)
    assert first_diverging(rows).name == block


def test_marginals_of_the_wrong_slots_are_named(ours, monkeypatch):
    params, model = ours.stage_one()
    forward = model.condition.marginals.forward
    given = params, model, ours.config.model, ours.head, ours._conditioned(), BOUNDS
    assert first_diverging(condition.block_rows(*given)) is None
    monkeypatch.setattr(model.condition.marginals, "forward", lambda context: forward(context)[::-1])
    assert first_diverging(condition.block_rows(*given)).name == "condition.marginals"


def test_mistakes_in_the_chain_of_heads_are_named(ours):
    twin = ours.twin()
    torch.nn.init.ones_(twin.slot_heads["z"].norm.weight)
    rows = point_transformer.block_rows(ours.transformer, twin, ours.config.model, ours.batch, BOUNDS)
    assert first_diverging(rows).name == "slot_heads.z"


def test_mistakes_in_copied_colours_are_named(ours):
    config, cloud = ours.config.decoder, ours._cloud()

    def diverging(change) -> str | None:
        twin = ours.decoder_twin()
        change(twin)
        found = first_diverging(gaussian_decoder.block_rows(ours.decoder, twin, config, cloud, BOUNDS))
        return found and found.name

    assert diverging(lambda twin: None) is None
    assert diverging(lambda twin: torch.nn.init.zeros_(twin.copy.places)) == "decoder.copy"
    assert diverging(lambda twin: torch.nn.init.zeros_(twin.portrait_mlp.up.bias)) == "decoder.portrait_mlp"


def test_a_transposed_joint_is_named(suite, monkeypatch):
    scene, rng = suite._scene(), np.random.default_rng(0)
    assert first_diverging(stage_two.block_rows(scene, rng, BOUNDS)) is None
    rodrigues = torch_flame.rodrigues

    def transposed(axis_angle):
        rotation = rodrigues(axis_angle).clone()
        rotation[..., 2, :, :] = rotation[..., 2, :, :].transpose(-1, -2).clone()  # The jaw's.
        return rotation

    monkeypatch.setattr(torch_flame, "rodrigues", transposed)
    assert first_diverging(stage_two.block_rows(scene, rng, BOUNDS)).name == "flame.canonical_vertices"


def test_rows_measure_what_they_say():
    row = compare("blocks", "a", np.array([1.0, -4.0]), torch.tensor([1.0, -3.0]), 0.1)
    assert (row.max_abs, row.max_rel, row.holds) == (1.0, 0.25, False)
    exact = compare("blocks", "b", np.zeros(3), np.zeros(3), 0.0)
    assert exact.holds
    assert not compare("blocks", "c", np.zeros(3), np.full(3, 1e-30), 1.0).holds
    nan = compare("blocks", "d", np.ones(3), np.full(3, np.nan), 1.0)
    assert not nan.holds
    assert [r.name for r in worst_first([exact, row, nan])] == ["d", "a", "b"]
    assert "BROKEN" in table([row])
    models = compare("models", "e", np.ones(1), np.zeros(1), 0.1)
    assert first_diverging([models, row]) is row
    assert first_diverging([exact]) is None
