"""A small document, sections of paragraphs, tables and pictures, as text, markdown, csv or one HTML page."""

import base64
import csv
import io
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

WIDTH = 120  # columns of text
TEMPLATE = "page.html.jinja"


@dataclass(frozen=True)
class Table:
    """Cells as text. marked: (row, column) of cells that stand out. Texts to be read may stand in the last column."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: frozenset[tuple[int, int]] = frozenset()

    @property
    def numeric(self) -> frozenset[int]:
        """The columns that hold nothing but numbers and gaps, which stand right."""
        return frozenset(j for j in range(len(self.columns)) if all(_is_number(row[j]) for row in self.rows))

    def layout(self, style: str, cells: Sequence[Sequence[str]], last_width: int | None = None) -> str:
        widths = [*[None] * (len(self.columns) - 1), last_width]
        align = ["right" if j in self.numeric else "left" for j in range(len(self.columns))]
        align = align if cells else []
        return str(tabulate(cells, self.columns, style, disable_numparse=True, colalign=align, maxcolwidths=widths))


@dataclass(frozen=True)
class Picture:
    """A PNG file's content, with a caption below it and its content in words. Shown on pages only."""

    caption: str
    alt: str
    png: bytes

    @property
    def source(self) -> str:
        """The picture as an address that a page can hold."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclass(frozen=True)
class Section:
    """A title over paragraphs, tables and pictures."""

    title: str
    blocks: tuple[str | Table | Picture, ...]


def to_text(sections: Sequence[Section]) -> str:
    """For a terminal: columns aligned, a star before marked cells."""
    return "\n\n".join(part for section in sections for part in _text_parts(section)) + "\n"


def _text_parts(section: Section) -> Iterator[str]:
    yield f"{_printable(section.title)}\n{'=' * len(section.title)}"
    for block in section.blocks:
        if isinstance(block, Table):
            yield _text_table(block)
        elif isinstance(block, str):
            yield "\n".join(textwrap.fill(_printable(line), WIDTH) for line in block.split("\n"))


def _text_table(table: Table) -> str:
    cells = [
        [("*" if (i, j) in table.marked else "") + _printable(c) for j, c in enumerate(r)]
        for i, r in enumerate(table.rows)
    ]
    others = sum(2 + max(len(row[j]) for row in [table.columns, *cells]) for j in range(len(table.columns) - 1))
    shown = table.layout("simple", cells, WIDTH - others if others < WIDTH // 2 else None)
    return "\n".join(line.rstrip() for line in shown.split("\n"))


def _is_number(cell: str) -> bool:
    return not cell.strip(" -") or cell.strip().lstrip("<+-")[:1].isdigit()


def _printable(text: str) -> str:
    """The text without line ends and control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text)


def to_markdown(sections: Sequence[Section]) -> str:
    """Tables as GitHub's markdown has them, marked cells bold."""
    parts = []
    for section in sections:
        parts.append(f"## {_printable(section.title)}")
        for block in section.blocks:
            if isinstance(block, Table):
                bold = [
                    [f"**{_escaped(c)}**" if (i, j) in block.marked else _escaped(c) for j, c in enumerate(row)]
                    for i, row in enumerate(block.rows)
                ]
                parts.append(block.layout("github", bold))
            elif isinstance(block, str):
                parts.append(block.replace("\n", "  \n"))
    return "\n\n".join(parts) + "\n"


def _escaped(cell: str) -> str:
    return "".join("\\" + c if c in "\\|*_`<>[]#" else c for c in _printable(cell))


def to_csv(table: Table) -> str:
    """One table as comma-separated values, nothing marked."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([table.columns, *table.rows])
    return file.getvalue()


def to_html(title: str, sections: Sequence[Section]) -> str:
    """One page that needs nothing else: styles and pictures are in it. Wide tables scroll within their box."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(TEMPLATE).render(title=title, sections=sections)
