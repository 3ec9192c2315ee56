"""Parses command lines of the scripts without running them, all in one process: importing JAX is most of the time.

    python -m tests.flags_program '[["animate", ["--avatar=a", "--fps=0"]], …]'

The last line is JSON: what is wrong with each command line, or null.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from pointillist_jax.files import UserError
from tests.markdown import ROOT


def flag_problems(lines: Sequence[tuple[str, Sequence[str]]]) -> list[str | None]:
    """What each (script, arguments) would be refused for before it looks at any file; None if nothing."""
    text = json.dumps([[script, list(arguments)] for script, arguments in lines])
    command = [sys.executable, "-m", "tests.flags_program", text]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def problem(script: str, arguments: Sequence[str]) -> str | None:
    module = fresh_import(script)
    try:
        rest = flags.FLAGS([script, *arguments])[1:]
        for value in vars(module).values():
            # What `define_config` gave: the config's own checks.
            if getattr(value, "__qualname__", "").startswith("define_config."):
                value()
    except (flags.Error, UserError) as error:
        return str(error)
    return f"unexpected argument {rest[0]!r}" if rest else None


def fresh_import(script: str) -> Any:
    """The script's module, alone with its flags: scripts define flags of the same names."""
    for name in [name for name in sys.modules if name.startswith("experiments.")]:
        del sys.modules[name]
    defined = {name: list(theirs) for name, theirs in flags.FLAGS.flags_by_module_dict().items()}
    for name, theirs in defined.items():
        if name.startswith("experiments."):
            for flag in theirs:
                delattr(flags.FLAGS, flag.name)
    flags.FLAGS.unparse_flags()
    return importlib.import_module(f"experiments.{script}")


def main() -> None:
    print(json.dumps([problem(script, arguments) for script, arguments in json.loads(sys.argv[1])]))


if __name__ == "__main__":
    main()
