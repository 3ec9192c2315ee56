"""The comparison with torch as a user starts it, at its smallest."""

from __future__ import annotations

import csv
import json

import pytest

from tests.experiments.test_scripts import start

pytest.importorskip("torch")
SMALL = ("model.width=32", "model.layers=1", "model.head_dim=16", "model.mlp_width=48", "model.bins=32",
         "model.num_faces=40", "model.window=16", "decoder.width=24", "decoder.layers=1", "decoder.head_dim=8",
         "decoder.mlp_width=24", "model.encoder.image_size=28", "model.encoder.num_points=64")  # fmt: skip


def compare(*arguments: str):
    small = [f"--config.{option}" for option in SMALL]
    return start("-m", "experiments.compare_torch", *small, "--length=16", "--points=12", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["tiny", "laptop"])
def test_everything_agrees_in_float64(tmp_path, preset):
    """`laptop` has one step per point, the loss of marginals, and the portrait's colours."""
    done = compare(
        f"--config={preset}", "--dtype=float64", "--steps=2", "--steps_two=2", "--tokens=40", f"--workdir={tmp_path}"
    )
    assert done.returncode == 0, done.stderr + done.stdout
    content = json.loads((tmp_path / "rows.json").read_text())
    assert {row["section"] for row in content["rows"]} == {"blocks", "models", "gradients", "steps", "sampling"}
    assert all(row["holds"] for row in content["rows"])
    names = {row["name"] for row in content["rows"] if row["section"] == "blocks"}
    assert {"condition.image_encoder", "condition.point_encoder", "rasterizer.image", "losses.ssim"} < names
    assert (preset == "laptop") == ({"condition.marginals", "slot_heads.b", "decoder.copy"} < names)
    assert {len(points) for points in content["drift"].values()} == {2}
    with open(tmp_path / "rows.csv") as file:
        assert len(list(csv.DictReader(file))) == len(content["rows"])
    assert (tmp_path / "drift.png").is_file()


def test_errors_are_sentences(tmp_path):
    done = compare("--what=blocks,nothing", f"--workdir={tmp_path}")
    assert done.returncode == 2
    assert "'nothing' is none of blocks" in done.stderr
