"""A small document, sections of paragraphs, tables and pictures, as text, markdown, csv or one HTML page."""

import base64
import csv
import html
import io
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

WIDTH = 120  # columns of text


@dataclass(frozen=True)
class Table:
    """Cells as text. marked: (row, column) of cells that stand out. Texts to be read may stand in the last column."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True)
class Picture:
    """A PNG file's content. Shown on pages only."""

    name: str
    png: bytes


@dataclass(frozen=True)
class Section:
    """A title over paragraphs, tables and pictures."""

    title: str
    blocks: tuple[str | Table | Picture, ...]


def to_text(sections: Sequence[Section]) -> str:
    """For a terminal: columns aligned, marked cells with a star."""
    lines: list[str] = []
    for section in sections:
        lines += [section.title, "-" * len(section.title)]
        for block in section.blocks:
            if not isinstance(block, Picture):
                lines += [*(_table_lines(block) if isinstance(block, Table) else _wrapped(block)), ""]
    return "\n".join(lines).rstrip() + "\n"


def _wrapped(text: str) -> list[str]:
    return [part for line in text.split("\n") for part in textwrap.wrap(line, WIDTH) or [""]]


def _table_lines(table: Table) -> Iterator[str]:
    cells = [
        [_printable(cell) + ("*" if (i, j) in table.marked else "") for j, cell in enumerate(row)]
        for i, row in enumerate(table.rows)
    ]
    starred = {j for _, j in table.marked}
    cells = [[c if c.endswith("*") or j not in starred else c + " " for j, c in enumerate(row)] for row in cells]
    widths = [max(len(row[j]) for row in [list(table.columns), *cells]) for j in range(len(table.columns))]
    left = [not all(_is_number(row[j]) for row in cells) for j in range(len(widths))]
    indent = sum(widths[:-1]) + 2 * (len(widths) - 1)
    for row in [list(table.columns), *cells]:
        padded = [
            cell.ljust(w) if is_left else cell.rjust(w) for cell, w, is_left in zip(row, widths, left, strict=True)
        ]
        line = "  ".join(padded).rstrip()
        if len(line) > WIDTH and indent < WIDTH // 2 and left[-1]:
            start = "  ".join(padded[:-1]) + "  "
            yield from textwrap.wrap(row[-1], WIDTH, initial_indent=start, subsequent_indent=" " * indent)
        else:
            yield line


def _is_number(cell: str) -> bool:
    return not cell.strip(" -") or cell.strip().lstrip("<+-")[:1].isdigit()


def _printable(text: str) -> str:
    """The text without line ends and control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text)


def to_markdown(sections: Sequence[Section]) -> str:
    """Tables as GitHub's markdown has them, marked cells bold."""
    lines: list[str] = []
    for section in sections:
        lines += [f"## {section.title}", ""]
        for block in section.blocks:
            if isinstance(block, Table):
                rows = [
                    [f"**{_escaped(c)}**" if (i, j) in block.marked else _escaped(c) for j, c in enumerate(row)]
                    for i, row in enumerate(block.rows)
                ]
                body = [list(block.columns), ["---"] * len(block.columns), *rows]
                lines += [*("| " + " | ".join(row) + " |" for row in body), ""]
            elif isinstance(block, str):
                lines += [*(line + "  " for line in block.split("\n")), ""]
    return "\n".join(lines).rstrip() + "\n"


def _escaped(cell: str) -> str:
    return "".join("\\" + c if c in "\\|*_`<>[]#" else c for c in _printable(cell))


def to_csv(table: Table) -> str:
    """One table as comma-separated values, nothing marked."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([table.columns, *table.rows])
    return file.getvalue()


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1248px; margin: 0 auto;
       padding: 0 16px 48px; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin: 2em 0 .6em; border-bottom: 1px solid #ccc; }
p { max-width: 75ch; overflow-wrap: anywhere; }
.box { overflow-x: auto; margin: 0 0 1.2em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9em; }
th, td { padding: .3em .5em; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }
th { white-space: nowrap; border-bottom: 2px solid #888; }
td { white-space: nowrap; } td:first-child { white-space: normal; min-width: 9em; }
td.text { white-space: normal; min-width: 16em; } .number { text-align: right; }
.marked { font-weight: 700; background: #e6f1f8; }
img { max-width: 100%; min-width: min(520px, 160vw); height: auto; }
figure { margin: 0 0 1em; } figcaption { font-size: .85em; color: #555; }
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def to_html(title: str, sections: Sequence[Section]) -> str:
    """One page that needs nothing else: styles and pictures are in it. Wide tables scroll within their box."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        parts += [_html_block(block) for block in section.blocks]
    body = "\n".join(parts)
    return PAGE.format(title=html.escape(title), style=STYLE, body=body)


def _html_block(block: str | Table | Picture) -> str:
    if isinstance(block, str):
        return f"<p>{html.escape(block).replace(chr(10), '<br>')}</p>"
    if isinstance(block, Picture):
        name, data = html.escape(block.name, quote=True), base64.b64encode(block.png).decode()
        image = f'<img src="data:image/png;base64,{data}" alt="{name}">'
        return f'<figure class="box">{image}<figcaption>{name}</figcaption></figure>'
    numeric = {j for j in range(len(block.columns)) if all(_is_number(row[j]) for row in block.rows)}
    rows = ["".join(f"<th{_classes(j in numeric)}>{html.escape(c)}</th>" for j, c in enumerate(block.columns))]
    for i, row in enumerate(block.rows):
        rows.append(
            "".join(
                f"<td{_classes(j in numeric, (i, j) in block.marked, len(c) > 60)}>{html.escape(c)}</td>"
                for j, c in enumerate(row)
            )
        )
    return f'<div class="box"><table>{"".join(f"<tr>{row}</tr>" for row in rows)}</table></div>'


def _classes(is_number: bool, is_marked: bool = False, is_long: bool = False) -> str:
    names = [n for n, is_on in (("number", is_number), ("marked", is_marked), ("text", is_long)) if is_on]
    return f' class="{" ".join(names)}"' if names else ""
