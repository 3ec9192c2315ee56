"""`experiments.fit` that kills itself by SIGKILL at a chosen moment, for `Forks.run`: a process group of its own.

Moments are counted in file events (a file opened, renamed or deleted, a folder made), told apart by what the fit is
doing: whatever the machine's speed, a moment drawn from them may lie in the midst of a save.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
from collections import Counter
from pathlib import Path

from absl import flags

from experiments import fit

EVENTS = flags.DEFINE_string("events", None, "JSON file for the number of events of every stage.")
STAGE = flags.DEFINE_string("kill_stage", None, "One of STAGES.")
NUMBER = flags.DEFINE_integer("kill_number", 1, "Which of its events.")
AFTER = flags.DEFINE_float("kill_after", 0, "Seconds after it.")
WHOM = flags.DEFINE_enum("kill_whom", "group", ["group", "main", "child"], "Who dies.")

# In the order of a run; "begin" and "end" are one event each. What is read is a capture, mostly.
STAGES = ("begin", "read", "checkpoint", "point_cloud", "report", "comparison", "end")
_WATCHED = ("open", "os.rename", "os.remove", "os.mkdir")


def main() -> None:
    counts: Counter[str] = Counter()
    workdir, captures = str(fit.WORKDIR.value), str(fit.CAPTURE.value)
    timer = threading.Timer(AFTER.value, kill)
    timer.daemon = True

    def note(stage: str) -> None:
        counts[stage] += 1
        if (stage, counts[stage]) == (STAGE.value, NUMBER.value):
            timer.start() if AFTER.value else kill()

    def watch(event: str, arguments: tuple) -> None:
        path = str(arguments[0]) if event in _WATCHED else ""
        if path.startswith(workdir):
            # The last of the names that say what is written: point_cloud/iteration_30/flame_param.npz.
            stage = re.search("checkpoint|point_cloud|report|timing|comparison", path.removeprefix(workdir))
            note({"timing": "report"}.get(stage[0], stage[0]) if stage else "read")
        elif path.startswith(captures):
            note("read")

    sys.addaudithook(watch)
    note("begin")
    fit.main()
    note("end")
    if timer.is_alive():
        timer.join()
    if EVENTS.value:
        Path(EVENTS.value).write_text(json.dumps(counts))


def kill() -> None:
    match WHOM.value:
        case "group":
            os.killpg(0, signal.SIGKILL)
        case "main":
            os.kill(os.getpid(), signal.SIGKILL)
        case "child":
            # A worker, or what brings their news to the progress bar.
            if children := multiprocessing.active_children():
                random.Random(AFTER.value).choice(children).kill()
