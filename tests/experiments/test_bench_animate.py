"""The benchmarks of animation and of stage two's step at their smallest."""

from __future__ import annotations

import json

import pytest

from tests.experiments.script_program import refusals, run_script


def figures(tmp_path, script: str, *arguments: str) -> dict:
    (done,) = run_script(tmp_path, script, arguments)
    assert done.code == 0, done.err
    return json.loads(done.out.strip().splitlines()[-1])


@pytest.mark.slow
def test_bench_animate_ends_in_one_json_line(tmp_path):
    found = figures(tmp_path, "bench_animate", "--gaussians=50,400", "--sizes=16,32", "--repeats=1", "--detail=coarse")
    assert found["bench"] == "animate"
    assert [(c["gaussians"], c["size"]) for c in found["cases"]] == [(50, 16), (50, 32), (400, 16), (400, 32)]
    for case in found["cases"]:
        assert min(case[f"{name}{clock}_ms"] for name in ("animate", "render", "both") for clock in ("", "_cpu")) > 0
        assert case["frames_per_s"] == pytest.approx(1e3 / case["both_ms"], rel=1e-2)
    assert list(found["animation"]) == ["50", "400"]
    for heads in found["animation"].values():
        assert [h["vertices"] for h in heads] == sorted(h["vertices"] for h in heads)
        assert all(h["animate_ms"] > 0 and h["head_ms"] > 0 for h in heads)
    assert {"versions", "machine"} <= set(found)


@pytest.mark.slow
def test_bench_stage_two_splits_the_step(tmp_path):
    small = [f"--config.decoder.{x}" for x in ("width=16", "layers=1", "heads=2", "head_dim=8", "mlp_width=16",
                                               "feature_width=8", "views=2")]  # fmt: skip
    found = figures(tmp_path, "bench_stage_two", "--points=64", "--sizes=16", "--subjects=2", "--repeats=1", *small)
    assert (found["bench"], found["subjects"], found["views"], found["lpips"]) == ("stage_two", 2, 2, False)
    (row,) = found["rows"]
    assert (row["points"], row["size"]) == (64, 16)
    for clock in ("ms", "cpu_ms"):
        for name in ("decode", "animate", "raster", "loss", "forward", "gradient", "step"):
            assert row[f"{name}_{clock}"] > 0
        assert row[f"backward_{clock}"] == pytest.approx(row[f"gradient_{clock}"] - row[f"forward_{clock}"], abs=2e-3)
        assert row[f"update_{clock}"] == pytest.approx(row[f"step_{clock}"] - row[f"gradient_{clock}"], abs=2e-3)


@pytest.mark.parametrize(("script", "flag"), [("bench_animate", "gaussians"), ("bench_stage_two", "points")])
def test_errors_are_sentences(tmp_path, script, flag):
    refusals(tmp_path, script, {
        f"--{flag}=0 must be whole numbers": [f"--{flag}=0"],
        f"--{flag}=1e4 must be whole numbers": [f"--{flag}=1e4"],
        "--sizes=64,-2 must be whole numbers": ["--sizes=64,-2"],
    })  # fmt: skip
