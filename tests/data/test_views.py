"""Views: rows carry what the capture says, and the stream has the same guarantees as the windows."""

from __future__ import annotations

import dataclasses
import functools

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointillist_jax.data.captures import load_capture
from pointillist_jax.data.views import ViewSource, view_batches
from pointillist_jax.files import UserError
from pointillist_jax.flame import open_head
from tests.data.capture_files import write_capture
from tests.data.stream_properties import check_orbax_resume, check_processes, check_resume, equal

MODEL = open_head("coarse")
SEEDS = st.integers(0, 2**31)


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


@st.composite
def captures_of_some_views(draw, captures):
    """One to three people, each with views of its own: any cameras at any timesteps; perhaps one, perhaps none."""
    people = draw(st.lists(st.sampled_from(range(len(captures))), min_size=1, max_size=3))
    chosen = []
    for i, number in enumerate(people):
        split = captures[number].split("train")
        rows = draw(st.lists(st.integers(0, len(split) - 1), min_size=int(i == 0), unique=True))
        per_view = ("viewmats", "Ks", "sizes", "timesteps", "camera_indices", "file_sizes")
        fields = {name: getattr(split, name)[np.array(rows, int)] for name in per_view}
        fields |= {name: tuple(getattr(split, name)[n] for n in rows) for name in ("image_paths", "mask_paths")}
        views = dataclasses.replace(split, **fields)
        chosen.append(dataclasses.replace(captures[number], subject=f"p{i}", splits={"train": views}))
    return chosen


def triples(batches) -> list[tuple[int, int, int]]:
    """(subject, timestep, camera) of every row, in order."""
    names = ("subject", "timestep", "camera")
    return [row for b in batches for row in zip(*(b[name].tolist() for name in names), strict=True)]


@settings(max_examples=40)
@given(st.data(), st.integers(1, 7), st.integers(1, 3), st.booleans(), SEEDS)
def test_every_view_is_seen_once_an_epoch(captures, data, batch_size, epochs, shuffle, seed):
    some = data.draw(captures_of_some_views(captures))
    everything = [
        (i, int(t), int(c))
        for i, capture in enumerate(some)
        for t, c in zip(capture.split("train").timesteps, capture.split("train").camera_indices, strict=True)
    ]
    batches = view_batches(some, batch_size=batch_size, num_epochs=epochs, shuffle=shuffle, seed=seed, num_threads=0)
    rows, n = triples(batches), batches.records_per_epoch
    for epoch in range(epochs):
        order = rows[epoch * n : (epoch + 1) * n]
        assert sorted(order) == sorted(everything)
        assert shuffle or order == everything
    assert len(rows) == len(batches) * batch_size
    assert set(rows[epochs * n :]) <= {(-1, -1, -1)}
    assert rows == triples(batches)


def test_epochs_and_seeds_are_shuffled_differently(captures):
    first, second = (triples(view_batches(captures, batch_size=1, num_epochs=2, seed=seed)) for seed in (0, 1))
    assert sorted(first[:10]) == sorted(first[10:])
    assert len({tuple(first[:10]), tuple(first[10:]), tuple(second[:10]), tuple(second[10:])}) == 4


@settings(max_examples=30)
@given(st.data(), st.integers(1, 4), st.integers(1, 3), st.booleans(), SEEDS)
def test_processes_together_are_one_process(captures, data, rows, processes, shuffle, seed):
    some = data.draw(captures_of_some_views(captures))
    how = {"batch_size": rows * processes, "shuffle": shuffle, "seed": seed, "num_threads": 0}
    check_processes(functools.partial(view_batches, some, **how), processes)


@settings(max_examples=20)
@given(st.data(), st.integers(1, 5), st.integers(0, 30), st.sampled_from([0, 0, 0, 2]), SEEDS)
def test_resume_after_any_batch_is_the_uninterrupted_stream(captures, data, batch_size, taken, threads, seed):
    some = data.draw(captures_of_some_views(captures))
    check_resume(view_batches(some, batch_size=batch_size, seed=seed, num_threads=threads), taken)


@settings(max_examples=8)
@given(st.data(), st.integers(1, 5), st.integers(0, 12), st.sampled_from([None, 2, 3]), SEEDS)
def test_resume_through_orbax_after_any_batch(captures, tmp_path_factory, data, batch_size, taken, epochs, seed):
    some = data.draw(captures_of_some_views(captures))
    batches = view_batches(some, batch_size=batch_size, num_epochs=epochs, seed=seed, num_threads=0)
    check_orbax_resume(tmp_path_factory.mktemp("orbax"), batches, min(taken, len(batches)))


def test_grains_own_check_of_checkpoints(captures):
    grain.experimental.assert_equal_output_after_checkpoint(view_batches(captures, batch_size=4, num_epochs=2))


@pytest.mark.slow
def test_workers_decode_the_same_views_and_resume(captures, tmp_path):
    """A checkpoint made with two workers continues without, and the other way round."""
    how = {"batch_size": 4, "seed": 3, "num_epochs": 3}
    plain, workers = view_batches(captures, **how), view_batches(captures, num_workers=2, **how)
    stream = iter(workers)
    for batch in plain:
        equal(next(stream), batch)
    assert next(stream, None) is None
    stream.close()
    for taken in (0, 3, len(plain)):
        check_orbax_resume(tmp_path / f"ahead_{taken}", workers, taken, len(plain), plain)
        check_orbax_resume(tmp_path / f"back_{taken}", plain, taken, len(plain), workers)


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
