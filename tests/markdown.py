"""README.md and docs/*.md as what can be tested: fenced blocks, commands in them, links, headings.

A block's info string says what becomes of it: ```bash setup is run by .ci/run, ```bash pipeline by the slow test of
`tests/test_docs.py`, any other ```bash is parsed only; ```python blocks are parsed and their imports made.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import experiments

ROOT = Path(experiments.__file__).parent.parent
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_ENDS_A_COMMAND = frozenset({";", "&", "&&", "|", "||", "done", "\n"})


class Block(NamedTuple):
    """A fenced block: document, first line's number, info string ("bash pipeline") and text."""

    path: Path
    line: int
    info: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.path.name}:{self.line}"


class Command(NamedTuple):
    """`python -m <module> <arguments>` and where it stands."""

    where: str
    module: str
    arguments: tuple[str, ...]

    @property
    def script(self) -> str | None:
        """X of `experiments.X`, else None."""
        package, _, name = self.module.partition(".")
        return name if package == "experiments" else None


def blocks(path: Path, language: str = "") -> list[Block]:
    """The fenced blocks of a document, of one language if given."""
    found: list[Block] = []
    info, start, lines = None, 0, []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fence = re.fullmatch(r"\s*```(.*)", line)
        if fence is None:
            lines.append(line)
        elif info is None:
            info, start, lines = fence[1].strip(), number + 1, []
        else:
            found.append(Block(path, start, info, "\n".join(lines)))
            info = None
    assert info is None, f"{path.name}: the block of line {start} has no end"
    return [block for block in found if not language or block.info.split()[:1] == [language]]


def prose(path: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^\s*```.*?^\s*```[^\n]*$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(text: str, where: str) -> Iterator[Command]:
    """Every `-m module arguments` of a shell text. Comments are left out, variables of the shell stand for 1."""
    text = re.sub(r"\\\n\s*", " ", text)
    for line in text.splitlines():
        line = re.sub(r"\$\{?\w+\}?", "1", line)
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words = [*lexer, "\n"]
        for i, word in enumerate(words):
            if word != "-m" or i == 0 or not re.fullmatch(r"(.*/)?python3?", words[i - 1]):
                continue
            end = next(j for j in range(i + 1, len(words)) if words[j] in _ENDS_A_COMMAND)
            yield Command(where, words[i + 1], tuple(words[i + 2 : end]))


def inline_commands(path: Path) -> Iterator[Command]:
    """`python -m …` in the running text and its tables; arguments with an ellipsis are left out, `<name>`s too."""
    for span in re.findall(r"`(python -m [^`<]+)`", prose(path)):
        for command in commands(" ".join(span.split()), f"{path.name}: {span[:60]}"):
            kept = tuple(argument for argument in command.arguments if "…" not in argument)
            yield command._replace(arguments=kept)


def links(path: Path) -> list[str]:
    """Targets of links and pictures, Markdown's and HTML's."""
    text = re.sub(r"`[^`\n]*`", "", prose(path))
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", text)


def anchors(path: Path) -> set[str]:
    """What GitHub calls the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
