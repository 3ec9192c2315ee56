"""Runs one script several times in one process, each time as a command line would: starting JAX is most of a refusal.

    python -m tests.experiments.script_program animate '[["--avatar=nowhere"], …]'

The last line is JSON: [{"code": 2, "out": "…", "err": "…"}, …].
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from absl.testing import flagsaver

from experiments.common import run
from tests.experiments.small_ar import ROOT, environment


class Ended(NamedTuple):
    """How one run ended: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


def run_script(cache: Path, script: str, *runs: Sequence[str]) -> list[Ended]:
    """How each of the runs of `experiments.<script>` with these arguments ended. `cache`: of compiled programs."""
    command = [sys.executable, "-m", "tests.experiments.script_program", script, json.dumps([list(r) for r in runs])]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(cache, quick=True), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [Ended(**one) for one in json.loads(done.stdout.splitlines()[-1])]


def refusals(cache: Path, script: str, cases: dict[str, Sequence[str]]) -> None:
    """Asserts that each case's arguments end in exit code 2 and one sentence that holds the case's key."""
    for message, ended in zip(cases, run_script(cache, script, *cases.values()), strict=True):
        assert ended.code == 2, (message, ended)
        said = ended.err.splitlines()[-1]  # Behind a progress bar, perhaps.
        assert said.startswith("error: "), ended.err
        assert message in said, ended.err
        assert "Traceback" not in ended.err


def main() -> None:
    name, found = sys.argv[1], []
    module = importlib.import_module(f"experiments.{name}")
    for arguments in json.loads(sys.argv[2]):
        out, err, code = io.StringIO(), io.StringIO(), 0
        with flagsaver.flagsaver(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            sys.argv = [os.path.abspath(name), *arguments]
            try:
                run(module.main)
            except SystemExit as end:
                code = end.code or 0
            except Exception:
                code = 1
                traceback.print_exc()
        found.append({"code": code, "out": out.getvalue(), "err": err.getvalue()})
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
