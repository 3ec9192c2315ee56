"""Views: rows carry what the capture says, and the stream has the same guarantees as the windows."""

from __future__ import annotations

import itertools

import grain
import jax
import numpy as np
import pytest

from pointillist_jax.data.captures import load_capture
from pointillist_jax.data.views import ViewSource, view_batches
from pointillist_jax.files import UserError
from pointillist_jax.flame import open_head
from tests.data.capture_files import write_capture

MODEL = open_head("coarse")


@pytest.fixture(scope="module")
def captures(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("captures"), np.random.default_rng(11)
    write_capture(root / "ann", MODEL, rng, timesteps=4)
    flat = {"shape": rng.normal(size=MODEL.shape_dirs.shape[-1]).astype(np.float32)}
    write_capture(root / "bob", MODEL, rng, timesteps=3, identity=flat)
    return [load_capture(root / name, MODEL, resize=(12, 10)) for name in ("ann", "bob")]


def test_rows_are_the_captures(captures):
    source = ViewSource(captures)
    assert len(source) == 6 + 4
    seen = set()
    for batch in view_batches(captures, batch_size=4, num_epochs=1, seed=2):
        assert batch["image"].shape == (4, 10, 12, 3)
        for row, subject in enumerate(batch["subject"].tolist()):
            if subject < 0:
                assert not batch["mask"][row].any()
                continue
            capture, t, c = captures[subject], int(batch["timestep"][row]), int(batch["camera"][row])
            split = capture.split("train")
            n = int(np.flatnonzero((split.timesteps == t) & (split.camera_indices == c))[0])
            np.testing.assert_array_equal(batch["image"][row], split.image_uint8(n))
            np.testing.assert_allclose(batch["mask"][row] / 255, split.mask(n), atol=1e-6)
            np.testing.assert_array_equal(batch["viewmats"][row], split.viewmats[n])
            np.testing.assert_array_equal(batch["Ks"][row], split.Ks[n])
            np.testing.assert_array_equal(batch["flame"]["expr"][row], capture.params.expr[t])
            np.testing.assert_array_equal(batch["flame"]["shape"][row], capture.params.shape)
            offset = capture.params.static_offset
            want = np.zeros((MODEL.num_vertices, 3)) if offset is None else offset
            np.testing.assert_array_equal(batch["flame"]["static_offset"][row], want)
            assert (subject, t, c) not in seen
            seen.add((subject, t, c))
    assert len(seen) == 10


def test_shards_and_resume(captures):
    grain.experimental.assert_equal_output_after_checkpoint(view_batches(captures, batch_size=4, num_epochs=2))
    how = {"batch_size": 6, "seed": 1, "num_epochs": 2}
    whole = view_batches(captures, **how)
    parts = [list(view_batches(captures, process_index=p, process_count=3, **how)) for p in range(3)]
    for k, batch in enumerate(whole):
        joined = jax.tree.map(lambda *x: np.concatenate(x), *(part[k] for part in parts))
        jax.tree.map(np.testing.assert_array_equal, joined, batch)


@pytest.mark.slow
def test_workers_decode_the_same_views(captures):
    how = {"batch_size": 4, "seed": 3}
    workers = iter(view_batches(captures, num_workers=2, **how))
    for batch in itertools.islice(view_batches(captures, **how), 6):
        jax.tree.map(np.testing.assert_array_equal, next(workers), batch)
    workers.close()


def test_refusals(captures, tmp_path, rng):
    write_capture(tmp_path / "cyd", MODEL, rng)
    with pytest.raises(UserError, match=r"one size, but there are .*\(20, 16\), \(24, 18\).*resize="):
        ViewSource([load_capture(tmp_path / "cyd", MODEL)], "test")
    with pytest.raises(UserError, match="same subject name"):
        ViewSource([captures[0], captures[0]])
    with pytest.raises(UserError, match="at least one capture"):
        ViewSource([])
    with pytest.raises(UserError, match="now it is test"):
        iter(view_batches(captures, batch_size=2, split="test")).set_state(
            iter(view_batches(captures, batch_size=2)).get_state()
        )
