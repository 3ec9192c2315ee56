"""README.md and docs/: commands parse, the pipeline runs, links lead somewhere, imports work, quotes are right.

Everything follows what the documents say: see `tests/markdown.py` for how blocks are marked.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import pytest

from pointillist_jax.flame import open_head
from pointillist_jax.flame.param_files import save_flame_params
from tests.experiments.small_ar import environment
from tests.flags_program import flag_problems
from tests.markdown import DOCUMENTS, ROOT, Command, anchors, blocks, commands, inline_commands, links

README = ROOT / "README.md"
IDS = [path.name for path in DOCUMENTS]

_DRAWING = ["--max_points=32"]
_PICTURES = ["--size=48", "--frames=3"]
# What makes each script of the README's pipeline small; later flags replace earlier ones. Four people, two of
# them held out: what cross-reenactment needs.
SMALL: dict[str, list[str]] = {
    "make_identities": ["--num_identities=4", "--timesteps=2", "--size=32", "--portrait_size=112",
                        "--config.identities.density=0.12"],
    "fit": ["--config.fit.iterations=2", "--noconfig.fit.densify"],
    "tokenize": [],
    "train_ar": ["--config.data.held_out=2", "--config.data.stride=0", "--config.model.window=64",
                 "--config.model.layers=1", "--config.train.steps=2"],
    "generate": _DRAWING,
    "extract_features": [],
    "train_decoder": ["--config.decoder.layers=1", "--config.decoder.train.steps=2", "--config.decoder.eval_views=1"],
    "reconstruct": _DRAWING,
    "animate": _PICTURES,
    "evaluate": [*_DRAWING, "--views=2"],
    "export": [],
}  # fmt: skip

# Command lines that the parser of these tests has to refuse.
WRONG = [("fit", ["--nope=1"]), ("animate", ["--fps=0"]), ("train_ar", ["--config=huge"]), ("fit", ["extra"]),
         ("train_ar", ["--config.model.window=30"]), ("train_ar", ["--config.train.steps=many"])]  # fmt: skip


def all_commands() -> list[Command]:
    found: list[Command] = []
    for path in DOCUMENTS:
        for block in blocks(path, "bash"):
            found += commands(block.text, block.where)
        found += inline_commands(path)
    return found


def test_modules_that_commands_run_exist():
    found = all_commands()
    assert len(found) > 10
    missing = [c for c in found if c.script is not None and not (ROOT / "experiments" / f"{c.script}.py").is_file()]
    missing += [c for c in found if c.script is None and importlib.util.find_spec(c.module) is None]
    assert not missing


@pytest.fixture(scope="module")
def parsed() -> dict[str, str | None]:
    """What is wrong with every command, those of the pipeline also with their small flags, and with WRONG."""
    lines = {f"{c.where}: {c.script} {i}": (c.script, c.arguments) for i, c in enumerate(all_commands()) if c.script}
    lines |= {f"small {c.script} {i}": (c.script, small_arguments(c)) for i, c in enumerate(pipeline())}
    lines |= {f"wrong {i}": line for i, line in enumerate(WRONG)}
    return dict(zip(lines, flag_problems(list(lines.values())), strict=True))


def test_flags_of_commands_are_defined_and_accept_their_values(parsed):
    assert not {where: said for where, said in parsed.items() if said and not where.startswith("wrong")}


def test_wrong_flags_are_found(parsed):
    assert all(parsed[f"wrong {i}"] for i in range(len(WRONG)))


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_links_and_pictures_exist(path):
    for target in links(path):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        assert ROOT in there.parents, target
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_imports_of_python_blocks_work(path):
    for block in blocks(path, "python"):
        tree = ast.parse(block.text, block.where)
        imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        exec(compile(ast.Module(imports, []), block.where, "exec"), {})


def test_the_set_up_block_is_what_ci_runs():
    """.ci/run takes these two lines: the main job, then the tests."""
    (block,) = [block for block in blocks(README) if block.info == "bash setup"]
    main_job, tests = block.text.splitlines()
    assert "experiments.quickstart" in main_job
    assert "pytest" in tests


def test_quoted_messages_are_those_of_the_program():
    """```error blocks of docs/troubleshooting.md are messages, or parts of one, with `…` for what is filled in."""
    quotes = [" ".join(block.text.split()) for block in blocks(ROOT / "docs" / "troubleshooting.md", "error")]
    assert len(quotes) >= 20
    assert len(set(quotes)) == len(quotes)
    messages = {re.sub("…+", "…", " ".join(text.split())) for text in message_templates()}
    assert not [quote for quote in quotes if not any(quote in message for message in messages)]


def message_templates() -> list[str]:
    """All texts of the program, pieces joined as Python joins them, with `…` for what is filled in."""
    found = []
    for folder in ("pointillist_jax", "renderer_bridge", "experiments"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(x.value if isinstance(x, ast.Constant) else "…" for x in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


@pytest.mark.slow
def test_the_pipeline_of_the_readme_runs(tmp_path):
    """Every command of the ```bash pipeline blocks, in their order, in an empty folder, each at its smallest."""
    lines = pipeline()
    assert lines, "README.md has no block marked ```bash pipeline"
    assert {"make_identities", "train_ar", "train_decoder", "reconstruct", "animate"} <= {c.script for c in lines}
    make_photograph(tmp_path)
    for command in lines:
        run_small(tmp_path, command)


def pipeline() -> list[Command]:
    """The commands of the README's ```bash pipeline blocks."""
    found = [block for block in blocks(README) if block.info == "bash pipeline"]
    return [command for block in found for command in commands(block.text, block.where)]


def small_arguments(command: Command) -> list[str]:
    """A command's arguments, and those that make it small."""
    assert command.script in SMALL, f"{command.where}: give tests/test_docs.py small flags for {command.script}"
    small = list(SMALL[command.script])
    if command.script == "export" and any(f"--format={kind}" in command.arguments for kind in ("html", "ply_sequence")):
        small.append("--frames=3")
    return [*command.arguments, *small]


def make_photograph(folder: Path) -> None:
    """me.jpg and flame_param.npz, as a user would bring them."""
    from skimage import data as pictures

    iio.imwrite(folder / "me.jpg", pictures.astronaut()[:300, 60:360])
    head = open_head("coarse")
    save_flame_params(folder / "flame_param.npz", head.neutral_params((1,)), head)


def run_small(folder: Path, command: Command) -> None:
    """Runs it in `folder`; it has to succeed and to leave what --workdir or --output name."""
    line = [sys.executable, "-m", command.module, *small_arguments(command)]
    surroundings = environment(folder, quick=True) | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(line, cwd=folder, env=surroundings, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"{' '.join(line[1:])}\n{done.stderr[-3000:]}"
    for argument in command.arguments:
        name, _, value = argument.partition("=")
        if name in ("--workdir", "--output"):
            written = folder / value
            assert written.is_file() or any(written.iterdir()), argument
