"""Windows: what they hold, that nothing is lost or doubled, and that streams resume and shard exactly."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointillist_jax.data.windows import WindowSource, split_subjects, window_batches
from pointillist_jax.files import UserError
from tests.data.stores import TOKENIZER, MemoryStore, write_store
from tests.data.stream_properties import check_orbax_resume, check_processes, check_resume, equal

POINTS = st.lists(st.integers(0, 40), min_size=1, max_size=5)
WINDOWS = st.integers(1, 16).map(lambda n: 4 * n)
SEEDS = st.integers(0, 2**31)


@given(POINTS, WINDOWS, SEEDS)
def test_every_token_is_a_target_once_and_where_it_belongs(points, window, seed):
    store = MemoryStore(np.random.default_rng(seed), points)
    source = WindowSource(store, window)
    read = {i: np.zeros(n, int) for i, n in enumerate(store.lengths)}
    predicted = {i: np.zeros(n, int) for i, n in enumerate(store.lengths)}
    for record in (source[i] for i in range(len(source))):
        x, i = store.tokens(int(record["subject"])), int(record["subject"])
        length, positions = int(record["length"]), record["positions"]
        start = positions[0]
        assert start % 4 == 0
        assert (np.diff(positions) == 1).all()
        # Content and order are the source's, up to where it ends; P behind it.
        np.testing.assert_array_equal(record["tokens"][:length], x[start : start + length])
        assert (record["tokens"][length:] == TOKENIZER.pad).all()
        assert length == min(window, len(x) - start)
        inside = positions + 1 < len(x)
        np.testing.assert_array_equal(record["targets"][inside], x[positions[inside] + 1])
        assert (record["targets"][~inside] == TOKENIZER.pad).all()
        read[i][positions[:length]] += 1
        predicted[i][positions[record["mask"]] + 1] += 1
        # S only at the true beginning, E only at the true end.
        assert (record["tokens"] == TOKENIZER.bos).sum() == (4 if start == 0 else 0)
        assert (record["tokens"] == TOKENIZER.eos).any() == (start + length == len(x))
    for i in range(len(points)):
        assert (read[i] == 1).all()
        assert (predicted[i][:4] == 0).all()  # S S S S are given.
        assert (predicted[i][4:] == 1).all()


@given(POINTS, WINDOWS, st.data(), SEEDS)
def test_any_stride_covers_everything_and_new_targets_only_counts_once(points, window, data, seed):
    stride = 4 * data.draw(st.integers(1, window // 4))
    store = MemoryStore(np.random.default_rng(seed), points)
    for new_only in (False, True):
        source = WindowSource(store, window, stride, new_targets_only=new_only)
        counts = [np.zeros(n, int) for n in store.lengths]
        for record in (source[i] for i in range(len(source))):
            assert int(record["positions"][0]) == stride * int(record["window"])
            counts[int(record["subject"])][record["positions"][record["mask"]] + 1] += 1
        for count in counts:
            assert (count[4:] == 1).all() if new_only else (count[4:] >= 1).all()
            assert (count[:4] == 0).all()


@pytest.mark.parametrize(("window", "stride"), [(6, None), (0, None), (8, 6), (8, 12), (8, 0), (-8, None)])
def test_windows_that_would_tear_points_apart_are_refused(rng, window, stride):
    with pytest.raises(UserError, match="multiples of 4"):
        WindowSource(MemoryStore(rng, [3]), window, stride)


@settings(max_examples=40)
@given(POINTS, WINDOWS, st.integers(1, 6), st.integers(1, 3), st.booleans(), SEEDS)
def test_processes_together_are_one_process(points, window, rows, processes, shuffle, seed):
    store = MemoryStore(np.random.default_rng(seed), points)
    how = {"window": window, "batch_size": rows * processes, "seed": seed, "shuffle": shuffle, "num_threads": 0}
    check_processes(functools.partial(window_batches, store, **how), processes)


@settings(max_examples=25)
@given(POINTS, WINDOWS, st.integers(1, 7), st.integers(1, 3), SEEDS)
def test_every_epoch_is_the_whole_source_once(points, window, batch_size, epochs, seed):
    store = MemoryStore(np.random.default_rng(seed), points)
    batches = window_batches(store, window=window, batch_size=batch_size, num_epochs=epochs, seed=seed, num_threads=0)
    taken = list(batches)
    rows = [(int(s), int(w)) for b in taken for s, w in zip(b["subject"], b["window"], strict=True)]
    n = batches.records_per_epoch
    everything = {(i, w) for i, length in enumerate(store.lengths) for w in range(-(-int(length) // window))}
    for epoch in range(epochs):
        assert sorted(rows[epoch * n : (epoch + 1) * n]) == sorted(everything)
    assert set(rows[epochs * n :]) <= {(-1, -1)}  # The last batch is filled up with records that count for nothing.
    assert len(rows) == len(batches) * batch_size
    assert not taken[-1]["mask"][taken[-1]["subject"] < 0].any()
    if epochs * n >= batch_size:
        dropped = window_batches(
            store, window=window, batch_size=batch_size, num_epochs=epochs, drop_remainder=True, num_threads=0
        )
        assert len(list(dropped)) == epochs * n // batch_size
        assert all((b["subject"] >= 0).all() for b in dropped)


def test_epochs_and_seeds_are_shuffled_differently_and_repeatably(rng):
    store = MemoryStore(rng, [100, 120, 90])
    n = len(WindowSource(store, 8))

    def order(seed: int, epochs: int = 2) -> list:
        batches = window_batches(store, window=8, batch_size=1, num_epochs=epochs, seed=seed, num_threads=0)
        return [(int(b["subject"][0]), int(b["window"][0])) for b in batches]

    first = order(0)
    assert first == order(0)
    assert first[:n] != first[n:]
    assert first[:n] != sorted(first[:n])
    # A seed is not the neighbouring seed's next epoch.
    assert first[n:] != order(1)[:n]
    assert order(1) != first


@settings(max_examples=20)
@given(POINTS, WINDOWS, st.integers(1, 5), st.integers(0, 30), st.sampled_from([0, 0, 0, 2]), SEEDS)
def test_resume_after_any_batch_is_the_uninterrupted_stream(points, window, batch_size, taken, threads, seed):
    store = MemoryStore(np.random.default_rng(seed), points)
    how = {"window": window, "batch_size": batch_size, "seed": seed, "num_threads": threads}
    check_resume(window_batches(store, condition=("portrait", "flame"), **how), taken)


@settings(max_examples=8)
@given(POINTS, WINDOWS, st.integers(1, 5), st.integers(0, 30), st.sampled_from([None, 2, 3]), SEEDS)
def test_resume_through_orbax_after_any_batch(tmp_path_factory, points, window, batch_size, taken, epochs, seed):
    """Also when that is the last batch, or when nothing was taken."""
    store = MemoryStore(np.random.default_rng(seed), points)
    batches = window_batches(store, window=window, batch_size=batch_size, seed=seed, num_epochs=epochs, num_threads=0)
    check_orbax_resume(tmp_path_factory.mktemp("orbax"), batches, min(taken, len(batches)))


def test_grains_own_check_of_checkpoints(rng):
    store = MemoryStore(rng, [20, 3, 0, 11])
    grain.experimental.assert_equal_output_after_checkpoint(
        window_batches(store, window=16, batch_size=3, num_epochs=2, condition=("flame",))
    )


def test_workers_give_the_same_stream_and_resume_through_orbax(rng, tmp_path):
    """A checkpoint made with two workers continues without, and the other way round."""
    store, _ = write_store(tmp_path / "store", rng, [50, 7, 31, 12])
    how = {"window": 16, "batch_size": 4, "condition": ("portrait",), "seed": 3, "num_epochs": 3}
    plain, workers = window_batches(store, **how), window_batches(store, num_workers=2, **how)
    stream = iter(workers)
    for batch in plain:
        equal(next(stream), batch)
    assert next(stream, None) is None
    stream.close()
    check_orbax_resume(tmp_path / "ahead", workers, 5, len(plain), plain)
    check_orbax_resume(tmp_path / "back", plain, 5, len(plain), workers)


def test_workers_do_not_hear_ctrl_c(rng, tmp_path):
    """A terminal sends it to them too; the training still needs their batches, to save where it is."""
    store, _ = write_store(tmp_path / "store", rng, [50, 7, 31, 12])
    stream = iter(window_batches(store, window=16, batch_size=2, condition=(), num_workers=2))
    next(stream)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
    for _ in range(20):
        next(stream)
    assert all(worker.is_alive() for worker in workers)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    stream.close()


def test_a_position_of_another_stream_is_refused_by_name(rng):
    store = MemoryStore(rng, [30, 10])
    how = {"window": 8, "batch_size": 2}
    state = iter(window_batches(store, **how)).get_state()
    for change, name in (
        ({"window": 16}, "window=8, now it is 16"),
        ({"batch_size": 4}, "batch_size=2, now it is 4"),
        ({"seed": 1}, "seed=0, now it is 1"),
        ({"subjects": ["person_0001"]}, "subjects=2, now it is 1"),
        ({"shuffle": False}, "shuffle=True, now it is False"),
        ({"stride": 4}, "stride=8, now it is 4"),
    ):
        with pytest.raises(UserError, match=name):
            iter(window_batches(store, **how | change)).set_state(state)
    other = MemoryStore(np.random.default_rng(1), [30, 11])
    with pytest.raises(UserError, match=r"records|data"):
        iter(window_batches(other, **how)).set_state(state)
    # Processes and workers are no part of it.
    iter(window_batches(store, **how, process_count=2, process_index=1, num_workers=1)).set_state(state)
    with pytest.raises(UserError, match="not a saved position"):
        iter(window_batches(store, **how)).set_state({"next": 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 3, "process_count": 2}, "multiple of the 2 processes"),
        ({"batch_size": 0}, "positive multiple"),
        ({"process_index": 1}, "process_index=1"),
        ({"num_epochs": 0}, "num_epochs=0"),
        ({"num_workers": -1}, "negative"),
        ({"num_epochs": 1, "batch_size": 64, "drop_remainder": True}, "drops all"),
        ({"subjects": []}, "nothing to make batches of"),
        ({"subjects": ["person_0000", "person_0000"]}, "twice"),
        ({"condition": ("picture",)}, "'picture'"),
    ],
)
def test_bad_settings_are_sentences(rng, change, message):
    with pytest.raises(UserError, match=message):
        window_batches(MemoryStore(rng, [9, 3]), **{"window": 8, "batch_size": 2} | change)


def test_conditions_belong_to_their_rows(rng, tmp_path):
    store, records = write_store(tmp_path, rng, [20, 9, 14])
    how = {"window": 12, "batch_size": 5, "num_epochs": 1, "condition": ("portrait", "flame")}
    for batch in window_batches(store, subjects=["person_0002", "person_0000"], **how):
        assert batch["condition"]["portrait"].dtype == np.uint8
        assert batch["tokens"].dtype == batch["targets"].dtype == batch["positions"].dtype == np.int32
        for row, subject in enumerate(batch["subject"].tolist()):
            if subject < 0:
                assert not batch["condition"]["portrait"][row].any()
                continue
            assert subject in (0, 2)
            np.testing.assert_array_equal(batch["condition"]["portrait"][row], records[subject].portrait)
            for name, value in records[subject].flame.items():
                np.testing.assert_array_equal(batch["condition"]["flame"][name][row], value)
    bare, _ = write_store(tmp_path / "bare", rng, [4], portrait=False)
    with pytest.raises(UserError, match=r"1 of 1 subjects .* have no portrait, e\.g\. 'person_0000'"):
        window_batches(bare, window=8, batch_size=1, condition=("portrait",))
    assert "flame" in next(iter(window_batches(bare, window=8, batch_size=1, condition=("flame",))))["condition"]


@given(st.integers(1, 60), st.data(), SEEDS)
def test_held_out_subjects(n, data, seed):
    names = [f"p{i}" for i in range(n)]
    held = data.draw(st.integers(0, n - 1))
    train, out = split_subjects(names, held, seed)
    assert len(out) == held
    assert sorted(train + out) == sorted(names)
    assert set(split_subjects(names[::-1], held, seed)[1]) == set(out)
    with pytest.raises(UserError, match="at least one"):
        split_subjects(names, n, seed)
