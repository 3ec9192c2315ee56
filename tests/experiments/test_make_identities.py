"""make_identities as a user starts it: what it writes, how it resumes, how it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

import experiments
from pointillist_jax.data.fits import find_fits, load_fit
from pointillist_jax.flame import open_head

ROOT = Path(experiments.__file__).parent.parent
SMALL = ("--config.identities.density=0.1", "--portrait_size=48", "--size=32", "--seed=3")


def command(workdir: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "experiments.make_identities", f"--workdir={workdir}", *SMALL, *more]


def start(workdir: Path, *more: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(workdir, *more), cwd=ROOT, capture_output=True, text=True, timeout=900)


def contents(workdir: Path) -> dict[str, str]:
    files = (p for p in sorted(workdir.rglob("*")) if p.is_file())
    return {str(p.relative_to(workdir)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_people_their_list_and_their_gallery(tmp_path):
    workdir = tmp_path / "people"
    done = start(workdir, "--num_identities=2", "--timesteps=0")
    assert done.returncode == 0, done.stderr
    assert str(workdir) in done.stdout
    listed = json.loads((workdir / "identities.json").read_text())
    model = open_head("coarse")
    assert (listed["head"]["source"], listed["head"]["sha256"]) == (model.source, model.sha256)
    fits = find_fits(workdir)
    assert list(listed["subjects"]) == list(fits) == ["person_0000", "person_0001"]
    for subject, folder in fits.items():
        fit = load_fit(folder, model)
        card = json.loads((workdir / subject / "identity.json").read_text())
        assert fit.gaussians.num_gaussians == card["num_gaussians"] == listed["subjects"][subject]["num_gaussians"]
        assert sum(card["counts"].values()) == card["num_gaussians"]
        labels = np.load(workdir / subject / "truth/labels.npz")
        assert labels["parts"].shape == (card["num_gaussians"],)
        assert labels["face_cheek"].shape == (model.num_faces,)
        assert iio.imread(workdir / subject / "portrait.png").shape == (48, 48, 3)
        assert (workdir / subject / "portrait_flame_param.npz").is_file()
        assert card["traits"]["hair_style"]
    gallery = iio.imread(workdir / "gallery.png")
    assert gallery.std() > 20
    # What is there already is not made again, and nothing is overwritten unasked.
    before = contents(workdir)
    refused = start(workdir, "--num_identities=2", "--timesteps=0")
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    assert "--overwrite" in refused.stderr
    other = start(workdir, "--num_identities=2", "--timesteps=0", "--resume", "--size=64")
    assert other.returncode == 2
    assert "size was 32" in other.stderr
    assert start(workdir, "--num_identities=2", "--timesteps=0", "--resume").returncode == 0
    assert contents(workdir) == before


@pytest.mark.slow
def test_killed_and_resumed_sharded_or_in_processes_gives_the_same_bytes(tmp_path):
    flags = ("--num_identities=3", "--timesteps=2")
    assert start(tmp_path / "plain", *flags).returncode == 0
    expected = contents(tmp_path / "plain")
    assert sum(name.endswith(".png") for name in expected) == 3 * (2 * 16 * 2 + 2) + 1

    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command(killed, *flags, "--processes=2"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    # Whatever it is doing when the first image of any person is being written.
    deadline = time.monotonic() + 600
    while not list(killed.glob(".person_*/images/*.png")) and not list(killed.glob("person_*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(list(killed.glob("person_*"))) < 3
    assert all((p / "identity.json").is_file() for p in killed.glob("person_*"))
    assert start(killed, *flags, "--processes=2", "--resume").returncode == 0
    assert contents(killed) == expected

    shards = tmp_path / "shards"
    for shard in (1, 0):
        done = start(shards, *flags, "--num_shards=2", f"--shard={shard}")
        assert done.returncode == 0, done.stderr
    assert contents(shards) == expected
