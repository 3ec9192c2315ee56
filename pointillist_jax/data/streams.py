"""Batches over any random-access source: shuffled, shared out to processes, prefetched, resumable anywhere.

The stream is a pure function of its position: batch k holds the same records on every run, for every number of
processes and workers. So its state is one number, plus what it belongs to, and a checkpoint made with one process count
or worker count continues with another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from pointillist_jax.files import UserError
from pointillist_jax.interrupts import unheard_by_children

# Batches of a stream without end: Grain computes lengths in floating point, where larger ones are no longer exact.
_ENDLESS = 1 << 48


class Source(Protocol):
    """What batches are made of. Has to be picklable and to give NumPy only: workers run without JAX devices."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Record `index`: a nested dict of arrays, of the same shapes for every index."""

    def empty(self) -> dict[str, Any]:
        """A record that counts for nothing (`subject` -1), to fill up the last batch."""

    def fingerprint(self) -> dict[str, Any]:
        """What decides the records and their order, as JSON scalars; compared by name when a stream is resumed."""


@dataclasses.dataclass(frozen=True)
class Batches:
    """A stream of batches: `for batch in batches`. Every `iter()` starts at the beginning.

    Every epoch holds every record of the source exactly once, in an order of its own. A stream without end goes on into
    the next epoch in the middle of a batch, so nothing is dropped or repeated. A finite one fills its last batch with
    empty records (subject -1, mask all False), so that shapes stay static, every process gets as many batches, and no
    record is lost; `drop_remainder` leaves that batch out instead.

    Attributes:
      source: records.
      batch_size: rows of a batch over all processes; every process gets batch_size / process_count of them.
      seed: of the shuffling.
      shuffle: False keeps the source's order in every epoch.
      num_epochs: None for a stream without end.
      process_index, process_count: rows of a batch are cut in blocks, process p gets block p: together they are the
        batch that one process would get, in the same order.
      drop_remainder: see above; only matters when num_epochs is given.
      num_workers: prefetching processes beside this one; 0 prefetches in threads only. The batches are the same.
      num_threads: threads that assemble batches, per process or worker.
      prefetch: batches kept ready.
    """

    source: Source
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    num_epochs: int | None = None
    process_index: int = 0
    process_count: int = 1
    drop_remainder: bool = False
    num_workers: int = 0
    num_threads: int = 2
    prefetch: int = 4

    def __post_init__(self):
        if len(self.source) == 0:
            raise UserError("there is nothing to make batches of: the selection holds no record.")
        if self.batch_size < 1 or self.process_count < 1 or self.batch_size % self.process_count:
            raise UserError(
                f"batch_size={self.batch_size} must be a positive multiple of the {self.process_count} processes: it "
                "counts the rows of all of them."
            )
        if not 0 <= self.process_index < self.process_count:
            raise UserError(f"process_index={self.process_index} must lie in 0..{self.process_count - 1}.")
        if self.num_epochs is not None and self.num_epochs < 1:
            raise UserError(f"num_epochs={self.num_epochs} must be positive, or None for a stream without end.")
        if min(self.num_workers, self.num_threads, self.prefetch) < 0:
            raise UserError("num_workers, num_threads and prefetch must not be negative.")
        if not len(self) and self.num_epochs is not None:
            raise UserError(
                f"drop_remainder drops all {len(self.source)} records: batch_size={self.batch_size} is larger."
            )

    def __len__(self) -> int:
        """Number of batches; `sys.maxsize` for a stream without end."""
        if self.num_epochs is None:
            return sys.maxsize
        total = self.num_epochs * len(self.source)
        return total // self.batch_size if self.drop_remainder else -(-total // self.batch_size)

    @property
    def records_per_epoch(self) -> int:
        return len(self.source)

    def __iter__(self) -> BatchIterator:
        return BatchIterator(self)

    def dataset(self, start: int = 0) -> grain.IterDataset:
        """The Grain pipeline of this process from batch `start` on."""
        records = grain.MapDataset.source(self.source)
        if self.shuffle:
            # Grain's shuffle reseeds itself every epoch when it stands before repeat.
            records = records.seed(self.seed % 2**32).shuffle()
        records = records.repeat(self.num_epochs)
        share = _Share(records, self)
        local = share.batch(self.batch_size // self.process_count)
        batches = local.slice(slice(start, min(len(self), _ENDLESS)))
        # Grain's defaults keep 500 elements ready and would fill the memory with batches.
        threads = grain.ReadOptions(num_threads=self.num_threads, prefetch_buffer_size=self.prefetch)
        stream = batches.to_iter_dataset(threads)
        if self.num_workers:
            # Grain's workers read absl flags, which only scripts parse; notebooks and tests have none.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            per_worker = max(self.prefetch // self.num_workers, 1)
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(self.num_workers, per_worker))
        return stream

    def fingerprint(self) -> dict[str, Any]:
        """What a saved position belongs to. Processes, workers and the number of epochs may change in between."""
        how = {"batch_size": self.batch_size, "seed": self.seed, "shuffle": self.shuffle}
        return {**self.source.fingerprint(), **how}


class BatchIterator(grain.DatasetIterator):
    """Position in a `Batches`. A Grain iterator: `grain.checkpoint.CheckpointSave(iterator)` puts it in an Orbax item.

    Grain's handler names its file by process count. To resume with another number of processes, keep `get_state()` as
    JSON instead: it is a small dict, equal in every process.
    """

    def __init__(self, batches: Batches):
        super().__init__()
        self._batches = batches
        self._next = 0
        self._inner: Iterator | None = None
        self._fresh = True  # Since the reading began, no batch was taken.

    def __next__(self) -> dict[str, Any]:
        self._assert_not_closed()
        if self._next >= len(self._batches):
            self._stop()
            raise StopIteration
        self.start_prefetch()
        # Some workers start with the first batch.
        with self._starting_workers() if self._fresh else contextlib.nullcontext():
            batch = next(self._inner)
        self._fresh = False
        self._next += 1
        return batch

    @property
    def next_batch(self) -> int:
        """How many batches have been taken, since the stream's beginning."""
        return self._next

    def get_state(self) -> dict[str, Any]:
        """JSON: {"next_batch": …, "stream": what it belongs to}."""
        return {"next_batch": self._next, "stream": self._batches.fingerprint()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues where `get_state` was taken.

        Raises:
          UserError: the state belongs to another stream; the sentence names the difference.
        """
        try:
            position, saved = state["next_batch"], dict(state["stream"])
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{str(state)[:100]} is not a saved position of a data stream.") from None
        now = self._batches.fingerprint()
        for key in [*now, *saved]:
            if now.get(key) != saved.get(key):
                raise UserError(
                    f"the data stream was saved with {key}={saved.get(key)}, now it is {now.get(key)}: resume with "
                    "the same data and settings, or start anew."
                )
        if type(position) is not int or position < 0:
            raise UserError(f"next_batch={position!r} of the saved data stream must be a whole number.")
        self._stop()
        self._next = position

    def start_prefetch(self) -> None:
        """Begins reading ahead, if that has not begun."""
        if self._inner is None:
            self._inner = iter(self._batches.dataset(self._next))
            with self._starting_workers():
                self._inner.start_prefetch()

    def _starting_workers(self) -> contextlib.AbstractContextManager:
        return unheard_by_children() if self._batches.num_workers else contextlib.nullcontext()

    def close(self) -> None:
        """Ends threads and workers. The iterator cannot be used afterwards."""
        if not self._closed:
            self._stop()
        super().close()

    def _stop(self) -> None:
        if self._inner is not None:
            self._inner.close()
        self._inner, self._fresh = None, True


class _Share(grain.MapDataset):
    """One process's rows of every batch, in order; past the last record, empty ones."""

    def __init__(self, parent: grain.MapDataset, batches: Batches):
        super().__init__(parent)
        self._rows = batches.batch_size // batches.process_count
        self._first = batches.process_index * self._rows
        self._batch_size = batches.batch_size
        self._empty = batches.source.empty()
        self._length = min(len(batches), _ENDLESS) * self._rows

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, self._rows)
        record = batch * self._batch_size + self._first + row
        # A Grain dataset goes on into the next epoch when it is read past its end.
        return self._parent[record] if record < len(self._parent) else self._empty


def prefix_sums(counts: np.ndarray) -> np.ndarray:
    """[N + 1] int64: how many records come before each of N groups, and in all."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def locate(offsets: np.ndarray, index: int) -> tuple[int, int]:
    """(group, index within it) of a record, from `prefix_sums`; negative indices count from the end."""
    total = int(offsets[-1])
    if not -total <= index < total:
        raise IndexError(f"record {index} of {total}")
    index %= total
    group = int(np.searchsorted(offsets, index, side="right")) - 1
    return group, index - int(offsets[group])
