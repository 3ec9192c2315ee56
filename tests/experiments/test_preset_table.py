"""The table of what presets need: against arithmetic by hand, and the document that shows it."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from experiments import preset_table
from experiments.preset_table import decode_bytes, needs_of, residual_bytes, size, size_table, time_table
from pointillist_jax.configs import PRESETS
from pointillist_jax.flops import PEAKS
from pointillist_jax.models.ar import param_specs
from pointillist_jax.models.layers import count_parameters, init_params
from tests.experiments.small_ar import CONFIG, ROOT
from tests.experiments.test_scripts import start

TABLE = ROOT / "docs" / "gpu_and_clusters.md"


@pytest.fixture(scope="module")
def small():
    return needs_of(CONFIG)


def test_parameters_are_those_of_the_model(small):
    params = init_params(param_specs(CONFIG.model), jax.random.PRNGKey(0))
    assert (
        count_parameters(param_specs(CONFIG.model)) == sum(x.size for x in jax.tree.leaves(params)) == small.transformer
    )
    assert small.encoders == 0  # Trained along, so they are part of the condition.
    assert needs_of(dataclasses.replace(CONFIG, model=_frozen(CONFIG.model))).encoders > 0


def _frozen(model):
    return dataclasses.replace(model, encoder=dataclasses.replace(model.encoder, frozen=True))


def test_bytes_for_the_backward_pass_grow_with_windows_and_shrink_with_remat():
    model = CONFIG.model
    each = residual_bytes(model, 2) - residual_bytes(model, 1)
    assert residual_bytes(model, 4) - residual_bytes(model, 2) == 2 * each
    full = dataclasses.replace(model, remat="full")
    assert 0 < residual_bytes(full, 2) - residual_bytes(full, 1) < each


def test_bytes_of_generation_by_hand():
    model = dataclasses.replace(CONFIG.model, dtype="bfloat16")
    context = 1 + 1 + 17  # cls, one patch, the queries of the tiny point encoder.
    cached = model.layers * (model.window + context) * 2 * model.heads * model.head_dim
    assert decode_bytes(model) == 2 * (count_parameters(param_specs(model)) + cached)


def test_hours_by_hand(small):
    assert small.hours(1e9) == pytest.approx(small.steps * small.batch * small.window_flops / 3.6e12)
    row = time_table({"tiny": small}, ["H100"], 0.5).splitlines()[-1]
    assert row.startswith("| H100, 50% of peak | 989 TFLOP/s |")
    rate = float(row.split("|")[3].replace(",", ""))
    assert rate == pytest.approx(small.tokens * 0.5 * PEAKS["H100"].flops / small.window_flops, rel=0.05)
    assert size(3 * 2**30) == "3 GiB"


def test_the_document_shows_these_numbers(monkeypatch):
    """Every cell but the one that takes time: what is kept for the backward pass."""
    monkeypatch.setattr(preset_table, "residual_bytes", lambda model, windows: 0)
    shown = {row.split("|")[1]: row.split("|") for row in TABLE.read_text().splitlines() if row.startswith("| `")}
    for row in size_table({name: needs_of(config) for name, config in PRESETS.items()}).splitlines()[2:]:
        cells = row.split("|")
        kept = cells.index(" 0 MiB ")
        assert cells[:kept] == shown[cells[1]][:kept]
        assert cells[kept + 1 :] == shown[cells[1]][kept + 1 :]


@pytest.mark.slow
def test_the_script_prints_the_tables_of_the_document():
    done = start("-m", "experiments.preset_table")
    assert done.returncode == 0, done.stderr
    text = TABLE.read_text()
    for row in done.stdout.strip().splitlines():
        assert row in text, row


def test_errors_are_sentences():
    for argument, said in (("--devices=Abacus", "'Abacus' is none of"), ("--presets=huge", "no preset 'huge'")):
        done = start("-m", "experiments.preset_table", argument)
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr
