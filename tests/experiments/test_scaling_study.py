"""Scaling studies at their smallest: measured, predicted, and by size."""

from __future__ import annotations

import csv
import json

import pytest

from experiments import scaling_report
from experiments.scaling_worker import Row
from pointillist_jax.configs import preset
from pointillist_jax.files import FileFormatError
from pointillist_jax.scaling.meshes import meshes_of, powers
from pointillist_jax.sharding import mesh_sizes
from tests.experiments.small_ar import command, write_people
from tests.experiments.test_scripts import start

MODEL = ("layers=1", "width=32", "heads=2", "head_dim=16", "mlp_width=48", "window=32", "bins=32", "num_faces=40")
DECODER = ("width=16", "layers=1", "heads=2", "head_dim=8", "mlp_width=24", "views=1")
SMALL = [f"--config.model.{x}" for x in MODEL] + [f"--config.decoder.{x}" for x in DECODER]


def study(*arguments: str):
    done = start(*command("scaling_study", *arguments)[1:])
    assert done.returncode == 0, done.stderr[-2000:]
    return next(json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"bench"'))


@pytest.mark.slow
def test_both_stages_are_measured_and_resumed(tmp_path):
    arguments = ("--mode=measure", "--simulate=2", "--stages=one,two", "--steps=2", f"--workdir={tmp_path}", *SMALL)
    found = study(*arguments, "--meshes=data:1;data:2")
    assert (found["rows_measured"], found["rows_failed"]) == (6, 0)
    rows = scaling_report.read_rows(tmp_path / "rows.jsonl")
    # Weak and strong: one device takes one window, or the two that two devices share.
    assert [(row["stage"], row["mesh"], row["batch"]) for row in rows] == [
        (stage, mesh, batch)
        for stage in ("one", "two")
        for mesh, batch in (("data:1", 1), ("data:1", 2), ("data:2", 2))
    ]


def test_predictions_of_devices_that_are_not_there(tmp_path):
    arguments = ("--mode=predict", "--compiler=cpu", "--device_counts=1,2", "--hardware=A100,H20",
                 f"--workdir={tmp_path}", *SMALL)  # fmt: skip
    found = study(*arguments)
    rows = scaling_report.read_rows(tmp_path / "rows.jsonl")
    assert found["rows_compiled"] == len(rows) == 5
    assert found["rows_failed"] == 0
    assert found["recommended"]["A100"]["2"] in {row["mesh"] for row in rows}
    report = (tmp_path / "report.md").read_text()
    for heading in ("## Recommended meshes", "## A100: predicted, not measured", "## H20: predicted, not measured"):
        assert heading in report
    with (tmp_path / "rows.csv").open() as file:
        assert [row["mesh"] for row in csv.DictReader(file)] == [row["mesh"] for row in rows]
    # Half of the rows are gone, as after a kill: the others are not made again.
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    kept = [line.replace('"compile_s": ', '"compile_s": 1000') for line in lines[:-1]]
    (tmp_path / "rows.jsonl").write_text("\n".join(kept) + "\n")
    study(*arguments, "--resume")
    again = scaling_report.read_rows(tmp_path / "rows.jsonl")
    assert [row["compile_s"] >= 1000 for row in again] == [True] * (len(rows) - 1) + [False]
    same = ("argument_bytes", "temporary_bytes", "collectives")
    assert [again[-1][name] for name in same] == [rows[-1][name] for name in same]


@pytest.mark.slow
def test_sizes_are_trained_alike(tmp_path):
    write_people(tmp_path / "store", 4)
    small = [f"--config.model.{x}" for x in ("head_dim=8", "window=32", "attention=xla", "mlp_width=64", "width=32")]
    small += [f"--config.model.encoder.{x}" for x in ("image_size=14", "num_points=16")]
    options = [*small, "--config.train.steps=4", "--config.train.batch_size=1"]
    found = study(
        "--mode=size", f"--store={tmp_path}/store", "--sizes=8x1,16x1,24x2", f"--workdir={tmp_path}/out", *options
    )
    assert set(found["sizes"]) == {"8x1", "16x1", "24x2"}
    rows = json.loads((tmp_path / "out/report.json").read_text())["rows"]
    assert [row["steps"] for row in rows] == [4] * 3
    assert rows[0]["flops"] < rows[1]["flops"] < rows[2]["flops"]
    assert len({row["tokens"] for row in rows}) == 1


def test_meshes_divide_the_model():
    config = preset("paper")
    for count in (1, 8, 16, 64, 256, 512):
        meshes = meshes_of(count, config, "one")
        assert f"data:{count}" in meshes
        for mesh in meshes:
            sizes = mesh_sizes(mesh, count)
            assert config.model.heads % (sizes["tensor"] * sizes["context"]) == 0
    assert meshes_of(8, config, "two") == ["data:8", "data:1,fsdp:8"]
    assert powers(6) == [1, 2, 4, 6]
    assert powers(8) == [1, 2, 4, 8]


def test_a_row_is_known_by_all_that_it_depends_on():
    row = Row("one", "data:1", 1, 1, 0, "cpu", {"model": {"width": 8}})
    others = (
        Row("one", "data:1", 1, 1, 0, "cpu", {"model": {"width": 16}}),
        Row("one", "data:1", 1, 1, 5, "cpu", {"model": {"width": 8}}),
        Row("one", "data:1", 1, 2, 0, "cpu", {"model": {"width": 8}}),
    )
    assert row.key not in {other.key for other in others}
    assert row.key == Row("one", "data:1", 1, 1, 0, "cpu", {"model": {"width": 8}}).key


def test_damaged_rows_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"key": "a"}\n{"mesh"\n')
    with pytest.raises(FileFormatError, match="is damaged"):
        scaling_report.read_rows(tmp_path / "rows.jsonl")
    assert scaling_report.read_rows(tmp_path / "none.jsonl") == []
