"""A report as one HTML page: pictures and videos lie inside it, so that it can be sent to somebody as it is."""

from __future__ import annotations

import base64
import dataclasses
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from pointillist_jax.files import atomic_path

_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".mp4": "video/mp4"}
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .3rem; }
.lead { opacity: .75; margin-top: .2rem; }
figure { display: inline-block; margin: .5rem 1rem .5rem 0; vertical-align: top; max-width: 100%; }
img, video { max-width: 100%; height: auto; border-radius: 6px; background: #edf0f2; }
figcaption { font-size: .85rem; opacity: .75; max-width: 40rem; }
table { border-collapse: collapse; margin: .5rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; border-bottom: 1px solid #8884; }
td.number, th.number { text-align: right; }
.note { border-left: 4px solid #d08a2e; padding: .3rem .8rem; background: #d08a2e1a; border-radius: 0 6px 6px 0; }
code { font-size: .9em; }
"""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text under a head; columns of numbers stand to the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page, in this order.

    Attributes:
      title: its heading.
      text: paragraphs.
      note: what a reader must know before believing the figures; stands out.
      figures: (file, caption) of PNG, JPEG or MP4.
      tables: below the pictures.
      links: file beside the page → what it is.
    """

    title: str
    text: Sequence[str] = ()
    note: str = ""
    figures: Sequence[tuple[Path, str]] = ()
    tables: Sequence[Table] = ()
    links: Mapping[str, str] = dataclasses.field(default_factory=dict)


def write_report(path: Path, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Writes the page. `lead`: one sentence below the title."""
    body = [f"<h1>{_text(title)}</h1>", f'<p class="lead">{_text(lead)}</p>']
    for section in sections:
        body += _section(section)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _section(section: Section) -> list[str]:
    lines = [f"<section><h2>{_text(section.title)}</h2>", *(f"<p>{_text(p)}</p>" for p in section.text)]
    if section.note:
        lines.append(f'<p class="note">{_text(section.note)}</p>')
    lines += [_figure(path, caption) for path, caption in section.figures]
    lines += [_table(table) for table in section.tables]
    if section.links:
        items = (f'<li><a href="{_text(name)}">{_text(name)}</a>: {_text(what)}</li>' for name, what in
                 section.links.items())  # fmt: skip
        lines.append(f"<ul>{''.join(items)}</ul>")
    return [*lines, "</section>"]


def _figure(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    source = f"data:{_TYPES[path.suffix]};base64,{data}"
    if path.suffix == ".mp4":
        shown = f'<video src="{source}" autoplay loop muted playsinline controls></video>'
    else:
        shown = f'<img src="{source}" alt="{_text(caption)}">'
    return f"<figure>{shown}<figcaption>{_text(caption)}</figcaption></figure>"


def _table(table: Table) -> str:
    numeric = [all(_is_number(row[i]) for row in table.rows) for i in range(len(table.head))]

    def cells(kind: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{kind}{' class=number' if n else ''}>{_text(x)}</{kind}>" for x, n in zip(row, numeric, strict=True)
        )

    rows = "".join(f"<tr>{cells('td', row)}</tr>" for row in table.rows)
    return f"<table><thead><tr>{cells('th', table.head)}</tr></thead><tbody>{rows}</tbody></table>"


def _is_number(text: str) -> bool:
    return text[:1].isdigit() or text[:1] in "-–"


def _text(text: str) -> str:
    return html.escape(str(text))
