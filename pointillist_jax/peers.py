"""A job of several processes ends as one: when a process is lost, the others say so and stop (DESIGN §10).

Alone, JAX lets the others wait for minutes, and then aborts them with the stack of its C++. Here every process says
once a second that it lives, in the job's key-value store, and looks whether the others do. What none of them can see is
the death of process 0, which holds that store: JAX aborts at once when its connection breaks. So the connection goes
through a relay, which notices first and keeps JAX's end open.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
from jax._src import distributed

LOST = 75  # EX_TEMPFAIL of sysexits.h: start it again

_PERIOD, _GRACE = 1.0, 5.0
_BEATS, _DONE, _FAILED = "pointillist/beats", "done", "failed"
_AGAIN = "start all processes again with --resume"


def join_job(coordinator: str | None, num_processes: int | None, process_id: int | None, lost_after: float) -> None:
    """`jax.distributed.initialize`, and from then on this process ends when another one is lost.

    It then says so in one sentence on stderr, and its exit code is `LOST`: at once when process 0 has ended, after
    `lost_after` seconds without a sign of life of another one, and within seconds when one stops with an error.

    Args:
      coordinator: "host:port", or None where JAX finds everything itself. Then it aborts when process 0 has ended.
    """
    relay = None
    if coordinator is not None and process_id != 0:
        relay = _start_relay(coordinator)
        coordinator = relay.stdout.readline().decode().strip()
    # JAX's own limit, which aborts, has to be the later one.
    jax.distributed.initialize(
        coordinator, num_processes, process_id, heartbeat_timeout_seconds=max(100, int(2 * lost_after))
    )
    state = distributed.global_state
    watch = _Watch(state.client, state.process_id, state.num_processes, lost_after)
    if relay is not None:
        threading.Thread(target=watch.coordinator_ended, args=(relay,), daemon=True).start()
    watches.append(watch)
    atexit.register(watch.leave)  # Before JAX's own, which waits for the others.
    threading.Thread(target=watch.run, daemon=True).start()


def fail(code: int) -> None:
    """To be called before this process exits with an error: the others are told, and JAX does not wait for them."""
    for watch in watches:
        watch.fail(code)


def wait_for_verdict() -> None:
    """To be called when something has failed that fails when another process is lost. Returns if none is."""
    for watch in watches:
        time.sleep(watch.lost_after + 3 * _PERIOD)


class _Watch:
    """The signs of life of the processes of this job."""

    def __init__(self, client, me: int, count: int, lost_after: float):
        self.lost_after = lost_after
        self._client, self._me, self._others = client, me, [i for i in range(count) if i != me]
        self._code: int | None = None
        self._leaving, self._verdict = False, threading.Lock()

    def run(self) -> None:
        seen = {i: ("", time.monotonic()) for i in self._others}
        for beat in itertools.count():
            told = self._told() if not self._leaving and self._tell(str(beat)) else None
            if told is None:
                return
            now = time.monotonic()
            for i in self._others:
                value = told.get(i, "")
                if value != seen[i][0] or value == _DONE:
                    seen[i] = value, now
                if value == _FAILED:
                    # Often all have the same reason: each may still give it.
                    self._end(f"process {i} of this job has stopped with an error, see there; {_AGAIN}.", _GRACE)
                if value.startswith("lost "):
                    self._end(_lost(value.removeprefix("lost ")))
                if now - seen[i][1] > self.lost_after:
                    self._tell(f"lost {i}")
                    # Process 0 holds what the others are to read.
                    self._end(_lost(i), 0 if self._me else 2 * _PERIOD)
            time.sleep(_PERIOD)

    def coordinator_ended(self, relay: subprocess.Popen) -> None:
        """Waits until the relay says so. At the end of a job process 0 may be the first to go."""
        relay.stdout.readline()
        if self._leaving:
            time.sleep(2 * _GRACE)
        self._end(f"process 0 of this job has ended; {_AGAIN}.")

    def fail(self, code: int) -> None:
        self._code = code

    def leave(self) -> None:
        """When Python exits."""
        if self._code is None and hasattr(sys, "last_value"):  # A traceback was printed.
            self._code = 1
        self._leaving = True
        self._tell(_DONE if self._code is None else _FAILED)
        if self._code is not None:
            if not self._me:
                time.sleep(2 * _PERIOD)
            _exit(self._code)

    def _tell(self, value: str) -> bool:
        try:
            self._client.key_value_set(f"{_BEATS}/{self._me}", value, allow_overwrite=True)
        except jax.errors.JaxRuntimeError:  # The job is over.
            return False
        return True

    def _told(self) -> dict[int, str] | None:
        try:
            return {int(name.rpartition("/")[2]): value for name, value in self._client.key_value_dir_get(_BEATS)}
        except jax.errors.JaxRuntimeError:
            return None

    def _end(self, sentence: str, grace: float = 0) -> None:
        with self._verdict:  # Whoever is second waits until the process is gone.
            time.sleep(grace)
            if self._leaving and self._code is not None:
                time.sleep(2 * _GRACE)  # `leave` is at it.
            with contextlib.suppress(OSError):
                os.write(2, f"\nerror: {sentence}\n".encode())
            _exit(LOST)


watches: list[_Watch] = []  # Of this process: one, if it has joined a job.


def _lost(process: int | str) -> str:
    return f"process {process} of this job has ended, or does not answer any more; {_AGAIN}."


def _exit(code: int) -> None:
    """Ends the process as it is: the main thread may wait in a collective for somebody who never comes."""
    for child in multiprocessing.active_children():
        child.terminate()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _start_relay(target: str) -> subprocess.Popen:
    """`relay.py` in a process of its own: JAX holds Python's lock in some calls to the coordinator."""
    command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("relay.py")), target]
    # Ctrl-C is for this process; the relay ends with it, when its stdin does.
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
