"""The other end of `fork_program`: scripts run in tenths of a second each, also where disks are full or read-only."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.experiments.fork_program import mount_small_disk
from tests.experiments.small_ar import ROOT, environment

# Compilation is most of the time; what is tested does not depend on its optimisations.


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
      code: exit code.
      out, err: what it printed.
      files: that lay below `where` when it ended, hidden ones too.
      broken: those of them that are not whole.
      full: how the disk was made small: "tmpfs", "limit", or "".
      timed_out: it was killed after the time limit.
      seconds_after_signal: that it went on after `interrupt`.
    """

    code: int
    out: str
    err: str
    files: list[str]
    broken: list[str]
    full: str
    timed_out: bool
    seconds_after_signal: float | None


class Forks:
    """Use as a context manager.

    Args:
      cache: folder for compiled programs.
      devices: simulated ones, of each run.
      disk: a folder, and the bytes of the small disk that all runs then find there, if this process may mount one. See
        `view`.
    """

    def __init__(self, cache: Path, devices: int = 1, disk: tuple[Path, int] | None = None):
        surroundings = environment(cache, quick=True)
        surroundings["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.experiments.fork_program"],
            cwd=ROOT,
            env=surroundings,
            preexec_fn=disk and functools.partial(mount_small_disk, str(disk[0]), disk[1]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Forks:
        return self

    def view(self, path: Path) -> Path:
        """Where this process sees what lies at `path` for the runs."""
        return Path(f"/proc/{self._process.pid}/root{path}")

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.communicate()

    def run(
        self,
        script: str,
        *arguments: str,
        where: Path | None = None,
        space: int | None = None,
        limit: int | None = None,
        obey_permissions: bool = False,
        interrupt: dict[str, Any] | None = None,
        timeout: float = 300,
    ) -> Ended:
        """Runs `experiments.<script>`, or a module whose name has a point, with these arguments.

        Args:
          where: its output folder, for `Ended.files` and `space`.
          space: bytes that can be written below `where`, which must exist then.
          limit: bytes that any file may have.
          obey_permissions: root too must not write into read-only folders.
          interrupt: {"signal": "SIGINT", "seen": a pattern in its output} or {…, "exists": [folder, glob]}: sent to the
            script's process group then, as a terminal does, or "after" so many seconds.
        """
        request = {
            "script": script if "." in script else f"experiments.{script}",
            "arguments": list(arguments),
            "where": None if where is None else str(where),
            "space": space,
            "limit": limit,
            "obey_permissions": obey_permissions,
            "interrupt": interrupt,
            "timeout": timeout,
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))


def scripts() -> list[str]:
    """Names of all scripts: what can be started as `python -m experiments.<name>`."""
    return sorted(p.stem for p in (ROOT / "experiments").glob("*.py") if "run(main)" in p.read_text().splitlines()[-1])
