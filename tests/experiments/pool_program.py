"""A pool as the scripts have it; prints its worker's process id and waits to be killed."""

from __future__ import annotations

import os
import time

from experiments.common import submit, worker_pool

if __name__ == "__main__":
    with worker_pool(1) as pool:
        print(submit(pool, os.getpid).result(), flush=True)
        submit(pool, time.sleep, 600).result()
