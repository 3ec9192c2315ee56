"""A pool as the scripts have it.

Without arguments it prints the process ids of its worker and its manager and waits to be killed. With a folder and a
number of seconds two workers write a file there, of which one takes that long to clean up, and the pool is left by
Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from experiments.common import manager, submit, worker_pool


class Slow:
    def __del__(self):
        time.sleep(600)


def write(path: Path, seconds: float) -> None:
    path.touch()
    try:
        Slow()  # What a signal raises is lost in a destructor.
        time.sleep(600)
    finally:
        time.sleep(seconds)
        path.unlink()


def wait() -> None:
    with manager() as shared, worker_pool(1) as pool:
        print(submit(pool, os.getpid).result(), shared._process.pid, flush=True)
        submit(pool, time.sleep, 600).result()


def leave(folder: Path, seconds: float) -> None:
    with worker_pool(2) as pool:
        for i in range(2):
            submit(pool, write, folder / str(i), i * seconds)
        while len(list(folder.iterdir())) < 2:
            time.sleep(0.01)
        raise KeyboardInterrupt


if __name__ == "__main__":
    leave(Path(sys.argv[1]), float(sys.argv[2])) if len(sys.argv) > 1 else wait()
