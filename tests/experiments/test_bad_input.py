"""Every script, given what is wrong: one sentence, exit code 2, nothing half-written (`bad_inputs.SCRIPTS`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.experiments.bad_inputs import SCRIPTS, cases, filled, spoiled, wrong_path
from tests.experiments.forked import Ended, scripts

FULL = "make space, or write to another disk"
_CLOSED = "RuntimeError: Event loop is closed"


def test_every_script_has_its_cases():
    assert set(SCRIPTS) == set(scripts())


def without_tensorstore_race(err: str) -> str:
    """Threads of TensorStore that end after Orbax has closed its event loop print so, past every exception handler: now
    and then, when a checkpoint is damaged. Nobody who calls Orbax can prevent it."""
    if _CLOSED not in err:
        return err
    closed = "RuntimeError('Event loop is closed')"
    printed = ("Traceback (most recent call last):", "self._check_closed()", f"raise {closed}", _CLOSED)
    lines = err.splitlines(keepends=True)
    return "".join(x for x in lines if x.strip() not in printed and "asyncio/base_events.py" not in x)


def refused(ended: Ended, *said: str, allowed: tuple[str, ...] = ()) -> None:
    """Asserts that a run ended as it should: one sentence that holds `said`, and no files but those allowed."""
    assert ended.code == 2, (ended.code, ended.err[-3000:])
    err = without_tensorstore_race(ended.err)
    assert "Traceback" not in ended.out + err, err[-3000:]
    # A progress bar returns to the beginning of its line; what follows the sentence is its list, indented.
    lines = err.replace("\r", "\n").splitlines()
    (first,) = (i for i, line in enumerate(lines) if "error: " in line)
    assert lines[first].startswith("error: "), lines[first]
    assert all(line.startswith("  ") for line in lines[first + 1 :]), lines[first:]
    sentence = "\n".join(lines[first:])
    assert all(word in sentence for word in said), sentence
    assert set(ended.files) <= set(allowed), ended.files


def arguments(script: str, root: Path, output: Path | None) -> list[str]:
    given = SCRIPTS[script]
    return [*filled(given.good, root), *([f"--{given.output[0]}={output}"] if given.output else [])]


@pytest.mark.parametrize(("script", "kind", "what"), list(cases()))
def test_bad_input_is_one_sentence(script, kind, what, forks, good_root, tmp_path):
    given, out, root = SCRIPTS[script], tmp_path / "out", good_root
    output = out / given.output[1] if given.output else None
    good = arguments(script, root, output)
    paths = {flag: Path(path) for flag, _, path in (flag.removeprefix("--").partition("=") for flag in good)}
    if kind == "flags":
        more, said = what
        refused(forks.run(script, *good, *filled(more.split(), root), where=out), said)
    elif kind == "input":
        flag, way = what
        _, *others = given.inputs[flag]
        path = wrong_path(way, paths.get(flag, root / "me.npz"), tmp_path)
        dropped = tuple(f"--{name}=" for name in given.without.get(flag, ()))
        kept = [argument for argument in good if not (dropped and argument.startswith(dropped))]
        ended = forks.run(script, *kept, *filled(others, root), f"--{flag}={path}", where=out)
        refused(ended, str(path))
    else:
        flag, glob, way = what
        copy, path = spoiled(paths[flag], glob, way, tmp_path)
        ended = forks.run(script, *good, f"--{flag}={copy}", where=out)
        # A missing file may be told by the folder that lacks it, and one of Orbax's by its run.
        refused(ended, str(copy) if way in ("gone", "a folder") or "checkpoints" in glob else path.name)


# Of the writers, those that write before they have compiled a training.
QUICK = ("tokenize", "extract_features", "animate", "export")
WRITERS = [name for name, script in SCRIPTS.items() if script.output]


@pytest.mark.parametrize("way", ["in its place", "below a file", "read-only"])
@pytest.mark.parametrize("script", WRITERS)
def test_outputs_that_cannot_be_written_are_one_sentence(script, way, forks, good_root, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    output = out / SCRIPTS[script].output[1]
    if way == "in its place" and output.suffix:
        output.mkdir()
    elif way == "in its place":
        output.write_text("I was here first.\n")
    elif way == "below a file":
        output.write_text("I am no folder.\n")
        output = output / output.name
    else:
        out.chmod(0o555)
    there = {str(path) for path in out.rglob("*") if path.is_file()}
    ended = forks.run(script, *arguments(script, good_root, output), where=out, obey_permissions=True)
    out.chmod(0o755)
    refused(ended, str(out), allowed=tuple(there))
    assert {str(path) for path in out.rglob("*") if path.is_file()} == there


@pytest.mark.parametrize(
    ("script", "space"),
    [
        pytest.param(name, space, marks=() if name in QUICK else pytest.mark.slow)
        for name in WRITERS
        for space in SCRIPTS[name].spaces
    ],
)
def test_a_full_disk_is_one_sentence_and_leaves_whole_files(script, space, forks, good_root, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    ended = forks.run(script, *arguments(script, good_root, out / SCRIPTS[script].output[1]), where=out, space=space)
    assert ended.full
    assert not ended.broken
    refused(ended, str(out), FULL, allowed=tuple(ended.files))
    assert not [path for path in ended.files if ".tmp-" in path or "checkpoint-tmp" in path]
