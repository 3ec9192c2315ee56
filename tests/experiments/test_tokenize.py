"""The tokenize script: fits in, a store out; kills, additions and refusals."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
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
    assert re.search(r"  8 subjects tokenised, \d+\.\d\d s each\n", printed)
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


@pytest.fixture
def old(fits, finished, tmp_path):
    """A finished store with features of frozen encoders, and a file of the user's."""
    shutil.copytree(finished[0], tmp_path / "tokens")
    (tmp_path / "tokens/features/kind").mkdir(parents=True)
    (tmp_path / "tokens/notes.txt").write_text("mine\n")
    return tmp_path / "tokens"


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_overwriting_keeps_the_old_store_until_the_new_one_is_complete(fits, old, forks):
    before, again = files(old), ("tokenize", "--detail=coarse", f"--workdir={old}", "--overwrite")
    # Found by headers; then by the points themselves, when shards have been written; then by Ctrl-C.
    bad = old.parent / "bad"
    shutil.copytree(fits / "person_0001", bad / "a")
    write_fit(bad / "b", np.random.default_rng(3), 50, spread=30.0)
    shutil.copytree(fits / "person_0002", bad / "c")
    (bad / "c/flame_param.npz").write_bytes(b"")
    for subjects, said in (("a,c", "flame_param.npz"), ("a,b", "lie outside the box")):
        ended = forks.run(*again, f"--fits={bad}", f"--subjects={subjects}", "--config.data.subjects_per_shard=1")
        assert ended.code == 2
        assert said in ended.err
        assert {name: data for name, data in files(old).items() if ".tokens.new" not in name} == before
        assert open_store(old).num_points.tolist()[0] == 333
    seen = {"signal": "SIGINT", "exists": [str(old), ".tokens.new/tokens-00002*"]}
    one = ("--config.data.subjects_per_shard=1", "--config.data.bins=256")
    ended = forks.run(*again, f"--fits={fits}", *one, interrupt=seen)
    if ended.code:  # It may have been quicker.
        assert ended.code == 130
        assert open_store(old).spec.tokenizer.bins == 1024
        appended = forks.run(*again[:3], "--append", f"--fits={fits}", "--subjects=person_0000")
        assert "holds what an --overwrite was making: finish it with --resume" in appended.err
        ended = forks.run(*again[:3], "--resume", f"--fits={fits}", *one)
    assert ended.code == 0, ended.err
    store = open_store(old)
    store.verify()
    assert store.spec.tokenizer.bins == 256
    names = {
        "notes.txt",
        "meta.json",
        "lengths.json",
        "lengths.png",
        *(f"tokens-{i:05d}.array_record" for i in range(8)),
    }
    assert {path.name for path in old.iterdir()} == names


@pytest.mark.parametrize("moved", range(3))
def test_a_kill_while_the_new_store_takes_the_old_ones_place(fits, finished, old, forks, moved):
    """`--resume` ends it, wherever it was; a shard that the new store does not have is gone then."""
    shutil.copy(old / "tokens-00007.array_record", old / "tokens-00008.array_record")
    (old / ".tokens.new").mkdir()
    for name in ("meta.json", *(f"tokens-{i:05d}.array_record" for i in range(8))):
        shutil.copy(finished[0] / name, old / ".tokens.new" / name)
    (old / "tokens-00001.array_record").write_bytes(b"of the old store")
    for i in range(4 * moved):
        os.replace(old / f".tokens.new/tokens-{i:05d}.array_record", old / f"tokens-{i:05d}.array_record")
    ended = forks.run("tokenize", "--detail=coarse", f"--fits={fits}", f"--workdir={old}", "--resume")
    assert ended.code == 0, ended.err
    assert files(old) == files(finished[0]) | {"notes.txt": b"mine\n"}


def test_all_bad_subjects_are_named_at_once(fits, tmp_path, forks):
    """Those that headers tell before anything is written; then those that their points tell. The rest is resumed."""
    root, rng = tmp_path / "fits", np.random.default_rng(3)
    for name in ("a", "b", "c", "d", "e"):
        write_fit(root / name, rng, 60, spread=30.0 if name in "bd" else 1.0)
    good = (root / "e/point_cloud.ply").read_bytes()
    (root / "e/point_cloud.ply").write_bytes(good[:-9])
    (root / "c/portrait.png").write_bytes(b"")
    run = ("tokenize", "--detail=coarse", f"--fits={root}", f"--workdir={tmp_path}/tokens", "--resume")
    one = "--config.data.subjects_per_shard=1"
    ended = forks.run(*run, one)
    assert ended.code == 2
    assert "2 of 5 subjects cannot be tokenised" in ended.err
    assert re.search(r"\n  c: .*lies alone.*\n  e: .*is truncated.*\n$", ended.err)
    assert not list((tmp_path / "tokens").iterdir())
    (root / "e/point_cloud.ply").write_bytes(good)
    (root / "c/portrait.png").unlink()
    ended = forks.run(*run, one)
    assert ended.code == 2
    assert re.search(
        r"2 of 5 .*\n  b: \d+ of 60 points lie outside .*\n  d: \d+ of 60 points lie outside .*\n$", ended.err
    )
    assert open_store(tmp_path / "tokens", allow_incomplete=True).subjects == ("a",)
    ended = forks.run(*run, one, "--subjects=a,c,e")
    assert ended.code == 0, ended.err
    assert open_store(tmp_path / "tokens").subjects == ("a", "c", "e")


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
    """86,127 Gaussians on FLAME with teeth (10,144 faces), SH degree 3: below 2 s, in the best of some tries."""
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
    while len(seconds) < 8 and min(seconds, default=2) >= 2:
        begin = time.perf_counter()
        record = subject_record("306", tmp_path / "306", flame_model, spec)
        seconds.append(time.perf_counter() - begin)
    assert len(record.tokens) == 4 * count + 8
    assert tokenizer.first_error(record.tokens) is None
    assert min(seconds) < 2
