"""The tokenize script: fits in, a store out; kills, additions and refusals."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import jax
import numpy as np
import pytest

import experiments
from pointillist_jax.data.subjects import subject_record
from pointillist_jax.data.token_store import StoreSpec, open_store
from pointillist_jax.flame.param_files import save_flame_params
from pointillist_jax.gaussians import Gaussians, save_ply
from pointillist_jax.tokens import PointTokenizer
from tests.conftest import random_params
from tests.data.capture_files import write_capture
from tests.data.fit_files import MODEL, random_person, write_fit

ROOT = Path(experiments.__file__).parent.parent


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "experiments.tokenize", "--detail=coarse", *arguments]


def start(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=600)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    """Eight people; the first in GaussianAvatars' own layout, with two iterations."""
    root, rng = tmp_path_factory.mktemp("fits"), np.random.default_rng(23)
    write_fit(root / "person_0000" / "point_cloud" / "iteration_9", rng, 50)
    write_fit(root / "person_0000" / "point_cloud" / "iteration_10", rng, 333)
    for i in range(1, 8):
        write_fit(root / f"person_{i:04d}", rng, 1500 + i)
    params, rng = random_person(rng), np.random.default_rng(1)
    one = jax.tree.map(lambda x: x[:1] if x.ndim == 2 and len(x) == 3 else x, params)
    iio.imwrite(root / "person_0003" / "portrait.png", rng.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    save_flame_params(root / "person_0003" / "portrait_flame_param.npz", one, MODEL)
    write_capture(root.parent / "captures" / "person_0005", MODEL, rng)
    return root


@pytest.fixture(scope="module")
def finished(fits, tmp_path_factory):
    """The store an uninterrupted run makes of them, and what it printed."""
    workdir = tmp_path_factory.mktemp("store") / "tokens"
    done = start(f"--fits={fits}", f"--workdir={workdir}", "--config.data.subjects_per_shard=1")
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def test_a_store_of_fits(fits, finished):
    workdir, printed = finished
    for name in ("meta.json", "tokens-*.array_record", "lengths.json", "lengths.png", str(workdir)):
        assert name in printed
    assert "7 subjects have no portrait" in printed
    store = open_store(workdir)
    store.verify()
    assert store.num_points.tolist() == [333] + [1500 + i for i in range(1, 8)]
    assert store.has_portrait.tolist() == [i == 3 for i in range(8)]
    assert store.condition(3)["portrait"].shape == (112, 112, 3)
    lengths = json.loads((workdir / "lengths.json").read_text())
    assert lengths["lengths"] == dict(zip(store.subjects, store.lengths.tolist(), strict=True))
    assert sum(lengths["histogram"]["counts"]) == 8
    assert lengths["tokens"]["total"] == store.lengths.sum()
    assert iio.imread(workdir / "lengths.png").std() > 20


def test_killed_at_random_moments_it_ends_with_the_same_bytes(fits, finished, tmp_path):
    """SIGKILL before the first shard, or just as some shard appears, three times; then once to the end."""
    workdir, rng = tmp_path / "tokens", random.Random(time.time_ns())
    arguments = (f"--fits={fits}", f"--workdir={workdir}", "--config.data.subjects_per_shard=1", "--resume")
    killed = 0
    for target in (0, *sorted(rng.sample(range(1, 8), 2))):
        process = subprocess.Popen(command(*arguments), cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + (rng.uniform(0, 6) if target == 0 else 120)
        while process.poll() is None and time.monotonic() < deadline:
            # A temporary file counts too: then the kill falls into its writing.
            if target and len(list(workdir.glob("*tokens-*array_record"))) >= target:
                time.sleep(rng.uniform(0, 0.01))
                break
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if (workdir / "meta.json").is_file() and process.returncode:
            # What a kill left is a good store, only shorter.
            store = open_store(workdir, allow_incomplete=True)
            store.verify()
    assert killed >= 2
    done = start(*arguments)
    assert done.returncode == 0, done.stderr
    assert contents(workdir) == contents(finished[0])


def test_added_subjects_get_shards_of_their_own(fits, finished, tmp_path):
    """--append adds what is missing, the same as one build; portraits come from --captures; other settings refuse."""
    workdir, some = tmp_path / "tokens", tmp_path / "some"
    for name in ("person_0001", "person_0002"):
        shutil.copytree(fits / name, some / name)
    assert start(f"--fits={some}", f"--workdir={workdir}").returncode == 0
    before = {name: data for name, data in contents(workdir).items() if name.startswith("tokens-")}
    times = {name: (workdir / name).stat().st_mtime_ns for name in before}
    captures = fits.parent / "captures"
    done = start(
        f"--fits={fits}",
        f"--workdir={workdir}",
        "--append",
        f"--captures={captures}",
        "--subjects=person_0005,person_0002",
    )
    assert done.returncode == 0, done.stderr
    assert times == {name: (workdir / name).stat().st_mtime_ns for name in before}
    assert before == {name: data for name, data in contents(workdir).items() if name in before}
    store, whole = open_store(workdir), open_store(finished[0])
    assert store.subjects == ("person_0001", "person_0002", "person_0005")
    assert store.has_portrait.tolist() == [False, False, True]
    for i, name in enumerate(store.subjects):
        np.testing.assert_array_equal(store.tokens(i), whole.tokens(whole.index(name)))
    # Another person under a stored name is not passed over in silence.
    shutil.rmtree(some / "person_0001")
    write_fit(some / "person_0001", np.random.default_rng(5), 99)
    done = start(f"--fits={some}", f"--workdir={workdir}", "--append")
    assert done.returncode == 2
    assert "holds 'person_0001' from another fit" in done.stderr
    done = start(f"--fits={fits}", f"--workdir={workdir}", "--resume", "--config.data.bins=512")
    assert done.returncode == 2
    assert "was made with bins 1024, not 512" in done.stderr
    assert contents(workdir) == {**contents(workdir), **before}


def test_two_writers_of_one_store_are_refused(fits, tmp_path):
    lock = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    done = start(f"--fits={fits}", f"--workdir={tmp_path}", "--subjects=person_0001")
    os.close(lock)
    assert done.returncode == 2
    assert "another process is writing" in done.stderr


def test_the_report_of_a_fit_names_its_head(tmp_path):
    """`tokenize --fits=outputs/fits` as the README has it: no --detail, no list of people beside the fits."""
    folder = tmp_path / "fits" / "person_0000"
    write_fit(folder / "point_cloud" / "iteration_9", np.random.default_rng(7), 50)
    plain = [
        word for word in command(f"--fits={folder.parent}", f"--workdir={tmp_path / 'store'}") if "detail" not in word
    ]
    refused = subprocess.run(plain, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert refused.returncode == 2
    assert "static_offset is for" in refused.stderr
    (folder / "report.json").write_text(json.dumps({"head": {"source": MODEL.source, "sha256": MODEL.sha256}}))
    done = subprocess.run([*plain, "--resume"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert open_store(tmp_path / "store").spec.flame_source == MODEL.source


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--fits is missing"),
        (("--fits={fits}", "--workdir={store}"), "is not empty; give --resume to go on, --append to add"),
        (("--fits={fits}", "--workdir={fits}/none", "--bounds=1,2"), "must be six numbers"),
        (
            ("--fits={fits}", "--workdir={fits}/none", "--captures={store}"),
            "holds no folder named as a fit (person_0000",
        ),
        (("--fits={fits}", "--workdir={fits}/none", "--bounds=-.01,-.01,-.01,.01,.01,.01"), "lie outside the box"),
        (("--fits={fits}", "--workdir={fits}/none", "--subjects=zoe"), "no fit of 'zoe'"),
    ],
)
def test_refusals_are_one_sentence(fits, finished, arguments, message):
    before = contents(finished[0])
    done = start(*(a.format(fits=fits, store=finished[0]) for a in arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(finished[0]) == before
    shutil.rmtree(fits / "none", ignore_errors=True)


def test_a_fit_of_gaussian_avatars_size_is_tokenised_in_seconds(tmp_path, rng, flame_model):
    """86,127 Gaussians on FLAME with teeth (10,144 faces), SH degree 3. The aim is 2 s, which bench_data measures."""
    count, folder = 86_127, tmp_path / "306" / "point_cloud" / "iteration_600000"
    gaussians = Gaussians(
        means=rng.normal(0, 0.3, (count, 3)).astype(np.float32),
        quats=rng.normal(size=(count, 4)).astype(np.float32),
        scales=np.full((count, 3), 0.5),
        opacities=np.full(count, 0.5),
        sh=rng.normal(0, 0.1, (count, 16, 3)).astype(np.float32),
        binding=rng.integers(0, flame_model.num_faces, count),
    )
    save_ply(folder / "point_cloud.ply", gaussians)
    assert (folder / "point_cloud.ply").stat().st_size > 252 * count
    params = random_params(rng, flame_model)
    save_flame_params(folder / "flame_param.npz", params.replace(shape=0.01 * params.shape), flame_model)
    tokenizer = PointTokenizer(num_faces=flame_model.num_faces, lower=-3.0, upper=3.0)
    spec = StoreSpec(tokenizer, flame_model.sha256, out_of_bounds="clip")
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        record = subject_record("306", tmp_path / "306", flame_model, spec)
        seconds.append(time.perf_counter() - begin)
    assert len(record.tokens) == 4 * count + 8
    assert tokenizer.first_error(record.tokens) is None
    assert min(seconds) < 6
