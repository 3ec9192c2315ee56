"""One absl script per job: `python -m experiments.<name>` from the repository's root (DESIGN §12)."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

INTERRUPTED = 130  # 128 + SIGINT, as shells count


def leave_at_interrupt(said: str = "") -> None:
    """Ctrl-C ends the process at once from here on, without a traceback; for moments when nothing is to be saved."""

    def leave(number: int, frame: Any) -> None:
        os.write(2, said.encode())
        os._exit(INTERRUPTED)

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # In the background of a shell.
        signal.signal(signal.SIGINT, leave)


# While `python -m` looks for one of these scripts, its place in argv is still "-m": a script is being started, and
# importing takes seconds. Its `common.run` takes the signal over.
if sys.argv[:1] == ["-m"]:
    leave_at_interrupt("stopped by Ctrl-C.\n")
