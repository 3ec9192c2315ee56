"""What every stream of `streams.Batches` has to keep, for the tests of windows and of views."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp

from pointillist_jax.data.streams import Batches


def equal(a, b) -> None:
    """Asserts that two batches have the same bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert x.tobytes() == y.tobytes()


def check_processes(make: Callable[..., Batches], processes: int) -> None:
    """Batch k of all processes together is batch k of one, in the same order; also at the ragged end.

    `make` takes settings of `Batches`.
    """
    for epochs in (2, None):
        whole = make(num_epochs=epochs)
        parts = [make(num_epochs=epochs, process_index=p, process_count=processes) for p in range(processes)]
        assert {len(p) for p in parts} == {len(whole)}
        take = len(whole) if epochs else 5
        streams = [list(itertools.islice(p, take)) for p in parts]
        for k, batch in enumerate(itertools.islice(whole, take)):
            equal(batch, jax.tree.map(lambda *x: np.concatenate(x), *(stream[k] for stream in streams)))


def check_resume(batches: Batches, taken: int, more: int = 4, resuming: Batches | None = None) -> None:
    """What follows after `taken` batches, also if a fresh iterator is given the position as JSON."""
    iterator, resumed = iter(batches), iter(resuming or batches)
    list(itertools.islice(iterator, taken))
    state = json.loads(json.dumps(iterator.get_state()))
    uninterrupted = list(itertools.islice(iterator, more))
    next(resumed)
    resumed.set_state(state)
    _follows(resumed, uninterrupted)
    iterator.close()


def check_orbax_resume(
    folder: Path, batches: Batches, taken: int, more: int = 4, resuming: Batches | None = None
) -> None:
    """The same, the position being saved and restored by Orbax."""
    iterator, resumed = iter(batches), iter(resuming or batches)
    list(itertools.islice(iterator, taken))
    with ocp.CheckpointManager(folder) as manager:
        manager.save(taken, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        # Saving in the background must not see what is taken meanwhile.
        uninterrupted = list(itertools.islice(iterator, more))
        manager.wait_until_finished()
        manager.restore(taken, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(resumed)))
    _follows(resumed, uninterrupted)
    iterator.close()


def _follows(resumed, uninterrupted: list) -> None:
    have = list(itertools.islice(resumed, len(uninterrupted)))
    assert len(have) == len(uninterrupted)
    for a, b in zip(have, uninterrupted, strict=True):
        equal(a, b)
    resumed.close()
