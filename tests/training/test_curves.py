"""Both stages on every kind of mesh of 8 devices: the losses of one device over 20 steps, accumulating and not."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys

import numpy as np
import pytest

from tests.training import ar_runs, decoder_scene
from tests.training.ar_runs import command, finish, start
from tests.training.curves_program import CONFIG

pytestmark = pytest.mark.slow
MESHES = {
    "ar": ["data:8", "fsdp:8", "data:2,tensor:4", "data:4,context:2", "data:1,tensor:4,context:2",
           "data:2,fsdp:2,tensor:2", "data:1,fsdp:2,tensor:2,context:2"],
    # Devices that differ on tensor or context only would render the same.
    "decoder": ["data:8", "fsdp:8", "data:4,fsdp:2", "data:2,fsdp:4"],
}  # fmt: skip


def write_ar_people(path):
    store = ar_runs.write_people(path)
    ar_runs.write_features(store, dataclasses.replace(ar_runs.CONFIG, model=CONFIG))


@pytest.mark.parametrize("stage", list(MESHES))
def test_twenty_steps_are_the_same_on_every_mesh(stage, tmp_path):
    {"ar": write_ar_people, "decoder": decoder_scene.write_people}[stage](tmp_path / "people")
    wanted = [("one", 1), *itertools.product(MESHES[stage], (1, 2))]  # Without accumulation, and with.
    program = [sys.executable, "-m", "tests.training.curves_program", stage, str(tmp_path / "people")]
    said = finish(start([*program, json.dumps(wanted)], tmp_path / "cache", devices=8))
    single, *others = json.loads(said.splitlines()[-1])
    assert len(single) == 20
    assert single[-1] < single[0]
    worst = {
        pair: float(np.max(np.abs(np.divide(losses, single) - 1)))
        for pair, losses in zip(wanted[1:], others, strict=True)
    }
    assert max(worst.values()) < 1e-5, worst


def test_micro_batches_on_two_devices_with_encoders_that_train(tmp_path):
    """Through the script: a head model and portraits inside what is mapped over the devices."""
    ar_runs.write_people(tmp_path / "people")
    model = dataclasses.replace(
        ar_runs.CONFIG.model, encoder=dataclasses.replace(ar_runs.CONFIG.model.encoder, frozen=False)
    )
    config = dataclasses.replace(ar_runs.CONFIG, model=model)
    curves = []
    for parts in (1, 2):
        run = ar_runs.changed(config, accumulate=parts)
        finish(start(command(tmp_path / "people", tmp_path / str(parts), run, "--mesh=data:2"), tmp_path, devices=2))
        curves.append(list(ar_runs.losses(tmp_path / str(parts)).values()))
    assert len(curves[0]) == 4
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)
