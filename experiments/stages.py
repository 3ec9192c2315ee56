"""Jobs made of the project's own scripts: each stage's command is printed, run, and timed."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any


class Stages:
    """Numbered stages on the terminal, and how long each took.

    Attributes:
      seconds: title → seconds, of the stages that have ended.
    """

    def __init__(self, total: int):
        self._total, self._number = total, 0
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Prints `[2/9] title`; the block is the stage."""
        self._number += 1
        print(f"\n[{self._number}/{self._total}] {title}", flush=True)
        start = time.perf_counter()
        yield
        self.seconds[title] = time.perf_counter() - start


def run_script(name: str, *arguments: str) -> None:
    """Runs one of the project's scripts, as anyone would; ends with its exit code if it fails.

    Args:
      name: of the module in `experiments`.
    """
    print("  " + " ".join(["python -m", f"experiments.{name}", *arguments]), flush=True)
    done = subprocess.run([sys.executable, "-m", f"experiments.{name}", *arguments], stdout=subprocess.PIPE, text=True)
    # Every script ends by listing its files; the caller's list says it once.
    print(done.stdout.split("\ndone in")[0].rstrip("\n"), flush=True)
    if done.returncode:
        sys.exit(done.returncode)


def config_flags(settings: dict[str, Any]) -> list[str]:
    """{"train.steps": 4} → ["--config.train.steps=4"]."""
    return [f"--config.{name}={value}" for name, value in settings.items()]
