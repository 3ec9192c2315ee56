"""A synthetic person of known truth, photographed and fitted: what the README's figures promise, at half the size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import experiments
from tests.experiments.small_ar import environment

ROOT = Path(experiments.__file__).parent.parent
# A third of the default iterations, so that density control runs twice as often.
SCHEDULE = ("--config.fit.iterations=400", "--config.fit.densify_from=50", "--config.fit.densify_interval=50")


def script(cache: Path, name: str, *arguments: str) -> str:
    command = [sys.executable, "-m", f"experiments.{name}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(cache), capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_bearded_person_is_found_again_from_pictures(tmp_path):
    """Unseen cameras and expressions at 27 dB; density control is worth 1 dB, and goes to hair and beard."""
    small = ("--timesteps=6", "--size=64", "--portrait_size=64")
    # The third person of seed 0 has cropped hair and a full beard.
    script(tmp_path, "make_identities", f"--workdir={tmp_path}/people", "--num_identities=3", "--num_shards=3",
           "--shard=2", *small)  # fmt: skip
    card = json.loads((tmp_path / "people/person_0002/identity.json").read_text())
    assert (card["traits"]["hair_style"], card["traits"]["beard"]) == ("cropped", "full")
    said = script(tmp_path, "fit", f"--capture={tmp_path}/people/person_0002", f"--workdir={tmp_path}/fits",
                  "--compare_density", "--processes=2", *SCHEDULE)  # fmt: skip
    content = json.loads((tmp_path / "fits/person_0002/comparison.json").read_text())
    for split in ("val", "test"):
        scores = content["scores"][split]
        assert scores["with_density_control"]["psnr"] > 27, split
        assert scores["gain_db"] > 1, split
        assert f"{split} {scores['gain_db']:+.2f}" in said
    report = json.loads((tmp_path / "fits/person_0002/report.json").read_text())
    counts = content["gaussians"]
    assert counts["without"] < counts["with_density_control"] == report["gaussians"] <= report["config"]["max_points"]
    parts = content["parts"]
    for name in ("hair", "beard"):
        for key in ("gaussians", "added", "per_face", "added_per_cm2"):
            assert parts[name][key] > parts["cheek"][key], (name, key)
