"""The newest checkpoint with every kind of its files damaged in every way: never a wrong number is trained on."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.training import toy

pytestmark = pytest.mark.slow

# One checkpoint more after the damaged one's predecessor, of few steps: what is made again costs time.
CONFIG = dataclasses.replace(toy.CONFIG, steps=6, checkpoint_every=3, eval_every=0)
DAMAGE = {
    "truncated": lambda content: content[: len(content) // 2],
    "flipped in the middle": lambda content: flipped(content, len(content) // 2),
    "flipped near the end": lambda content: flipped(content, max(len(content) - 5, 0)),
    "removed": None,
}


def flipped(content: bytes, place: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1 << 4
    return bytes(changed)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, toy.run(workdir, CONFIG)[0]


def kinds(checkpoint: Path) -> dict[str, Path]:
    """One file of every kind: the largest of those that differ in their hashed names alone."""
    found: dict[str, Path] = {}
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file()):
        name = path.relative_to(checkpoint)
        kind = str(name.parent / "*") if name.parent.name == "d" else str(name)
        if kind not in found or path.stat().st_size > found[kind].stat().st_size:
            found[kind] = path
    return found


def test_no_damage_is_ever_trained_on(whole, tmp_path, caplog, record_property):
    caplog.set_level(logging.WARNING)
    files = kinds(whole[0] / "checkpoints" / "6")
    # What has to be read to go on, and what is of no use to this run.
    assert {"meta/metadata", "data/metadata", "sums/metadata", "params/d/*", "state/d/*"} <= set(files)
    damaged = fallen_back = 0
    for kind, path in files.items():
        for how, change in DAMAGE.items():
            run = tmp_path / "run"
            shutil.copytree(whole[0], run)
            target = run / "checkpoints" / path.relative_to(whole[0] / "checkpoints")
            target.unlink() if change is None else target.write_bytes(change(path.read_bytes()))
            caplog.clear()
            state, _ = toy.run(run, CONFIG)
            jax.tree.map(np.testing.assert_array_equal, state, whole[1])
            said = "checkpoint 6 of" in caplog.text and "is skipped" in caplog.text
            assert said == ("the run goes on from step 3" in caplog.text), (kind, how, caplog.text)
            if kind.endswith("/metadata") or (kind.count("/") == 2 and "ocdbt" not in kind and kind.endswith("d/*")):
                assert said, (kind, how)
            damaged += 1
            fallen_back += said
            shutil.rmtree(run)
    assert damaged == len(files) * len(DAMAGE)
    record_property("endurance.corruptions", damaged)
    record_property("endurance.corruptions_skipped_for_an_older_checkpoint", fallen_back)
