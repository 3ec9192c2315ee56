"""Ctrl-C and child processes: a terminal sends it to all of them, but only the first may answer."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker


@contextlib.contextmanager
def unheard_by_children() -> Iterator[None]:
    """Processes that are started in the block never hear Ctrl-C, not even while they start.

    They inherit the blocked signal. Here it waits until the block ends. Else workers print tracebacks of their own, and
    a training has no data any more when it wants to save.
    """
    # Started by the first worker, it would unblock the signal.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
