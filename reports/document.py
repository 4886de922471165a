"""A small document, sections of paragraphs, tables and pictures, as text, markdown or one HTML page."""

import shutil
import textwrap
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tabulate

WIDTH = 120  # columns of text at most
NO_BREAK = "\N{NO-BREAK SPACE}"  # in cells, between words that stay on one line
LONGEST_WORD = 30  # that is not broken where a column gets narrow
tabulate.MIN_PADDING = 0  # a title needs no more room than its letters


def text_width() -> int:
    """Columns of the terminal, where there is one."""
    return min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)


def filled(line: str, indent: int = 0) -> str:
    """The line in as many as the terminal needs, those below the first indented; no word or path is broken."""
    way: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(line, text_width(), subsequent_indent=" " * indent, **way)


@dataclass(frozen=True)
class Table:
    """Cells as text. marked: (row, column) of cells that stand out."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: Set[tuple[int, int]] = frozenset()

    @property
    def numeric(self) -> set[int]:
        """The columns that hold nothing but numbers and gaps, which stand right."""
        return {j for j in range(len(self.columns)) if all(_is_number(row[j]) for row in self.rows)}

    def layout(self, is_markdown: bool) -> str:
        """For a terminal with a star before marked cells, or as GitHub's markdown with marked cells bold."""
        show, mark = (_escaped, "**{}**") if is_markdown else (_printable, "*{}")
        cells = [[show(cell) for cell in row] for row in self.rows]
        for i, j in self.marked:
            cells[i][j] = mark.format(cells[i][j])
        widths = [max(map(len, column)) for column in zip(self.columns, *cells, strict=True)]
        texts = [j for j in range(len(widths)) if j not in self.numeric and not is_markdown]
        words = [max(map(len, " ".join(column).split(" "))) for column in zip(self.columns, *cells, strict=True)]
        while sum(widths) + 2 * (len(widths) - 1) > text_width():  # the widest texts go on below themselves
            wide = [j for j in texts if widths[j] > min(words[j], LONGEST_WORD)]
            if not wide:
                break
            widths[max(wide, key=widths.__getitem__)] -= 1
        align = ["right" if j in self.numeric else "left" for j in range(len(self.columns))]
        layout: dict[str, Any] = {"tablefmt": "github" if is_markdown else "simple", "disable_numparse": True}
        titles = list(self.columns)
        if not is_markdown:  # (tabulate's own way to break lines fails at a cell like 2,000)
            fill = partial(textwrap.fill, break_on_hyphens=False)
            titles, *cells = ([*map(fill, row, widths)] for row in (titles, *cells))
        shown = tabulate.tabulate(cells, titles, **layout, colalign=align)
        return "\n".join(line.rstrip() for line in shown.replace(NO_BREAK, " ").split("\n"))


@dataclass(frozen=True)
class Section:
    """A title over blocks: paragraphs, tables, and on pages pictures with a `source`, a `caption` and an `alt`."""

    title: str
    blocks: Sequence[object]


def to_text(sections: Sequence[Section], is_markdown: bool = False) -> str:
    """For a terminal, or as markdown."""
    parts = []
    for section in sections:
        title = _printable(section.title)
        parts.append(f"## {title}" if is_markdown else f"{title}\n{'=' * len(title)}")
        for block in section.blocks:
            if isinstance(block, Table):
                parts.append(block.layout(is_markdown))
            elif isinstance(block, str):
                lines = map(_printable, block.split("\n"))
                parts.append("  \n".join(lines) if is_markdown else "\n".join(map(filled, lines)))
    return "\n\n".join(parts) + "\n"


def _is_number(cell: str) -> bool:
    return not cell.strip(" -") or cell.strip().lstrip("<+-")[:1].isdigit()


def _printable(text: str) -> str:
    """The text without line ends and control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() or c == NO_BREAK else " " for c in text)


def _escaped(cell: str) -> str:
    return "".join("\\" + c if c in "\\|*_`<>[]#" else c for c in _printable(cell))


def to_html(title: str, sections: Sequence[Section]) -> str:
    """One page that needs nothing else: styles and pictures are in it. Wide tables scroll within their box."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder, strict = FileSystemLoader(Path(__file__).parent), StrictUndefined
    environment = Environment(loader=folder, autoescape=True, undefined=strict, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("page.html.jinja").render(title=title, sections=sections)
