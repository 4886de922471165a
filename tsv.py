"""Tab-separated files with a header line, as CS224N's are, read row by row with line numbers; and csv and JSON lines.

Cells may be quoted as csv does; a quoted cell may hold tabs and line ends.
"""

import codecs
import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

DELIMITERS = {".tsv": "\t", ".csv": ",", ".jsonl": ""}  # by the endings of files that say nothing else

Rows = Iterator[tuple[int, list[str]]]


def numbered_rows(path: Path, content: bytes, error: type[ValueError], delimiter: str = "\t") -> Rows:
    """(first line, cells) of each row of a file's content, the header first; blank lines are passed over.

    Raises `error` for what is not UTF-8, not csv, or has a quote that is never closed; path is for its message.
    """
    text, mark = _without_lone_returns(_decoded(path, content, error))
    csv.field_size_limit(1 << 30)
    # Python's splitlines would also break at control characters within a sentence: lines end at line feeds only.
    lines = (line + "\n" for line in text.removesuffix("\n").split("\n"))
    is_tabbed = delimiter == "\t"  # texts between commas hold commas: there, the csv module is strict about quotes
    reader = csv.reader(lines, delimiter=delimiter, strict=not is_tabbed)
    start = 1
    try:
        for cells in reader:
            if is_tabbed and has_swallowed_rows(cells):
                num_lines = max(len(cell.removesuffix("\n").split("\n")) for cell in cells)
                raise error(f"{path}:{start}: a quoted cell runs over {num_lines} lines, expected a closing quote")
            if cells:
                yield start, [cell.replace(mark, "\r") for cell in cells] if mark else cells
            start = reader.line_num + 1
    except csv.Error as problem:
        raise error(f"{path}:{reader.line_num}: {problem}") from None


def json_rows(path: Path, content: bytes, error: type[ValueError], columns: Sequence[str]) -> Rows:
    """The same of a file with a JSON object a line: the columns first, then their cells in each object.

    Numbers stand as they are written, true and false as 1 and 0, null as an empty cell.
    """
    yield 1, list(columns)
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # half of a pair of surrogates is no text
        except (ValueError, RecursionError) as problem:
            raise error(f"{path}:{number}: not readable as JSON ({problem})") from None
        if not isinstance(row, dict) or (missing := [name for name in columns if name not in row]):
            found = f"no {missing[0]!r}" if isinstance(row, dict) else f"found {type(row).__name__}"
            raise error(f"{path}:{number}: {found}, expected an object with {', '.join(columns)}")
        cells = [row[name] for name in columns]
        if wrong := [name for name, cell in zip(columns, cells, strict=True) if isinstance(cell, list | dict)]:
            raise error(f"{path}:{number}: {wrong[0]} is a {type(row[wrong[0]]).__name__}, expected a text or number")
        yield number, ["" if cell is None else str(int(cell) if isinstance(cell, bool) else cell) for cell in cells]


def _decoded(path: Path, content: bytes, error: type[ValueError]) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        found = f"byte 0x{content[problem.start]:02x}"
        raise error(f"{path}:{line}: {found} is not valid UTF-8, expected a UTF-8 file") from None


def _without_lone_returns(text: str) -> tuple[str, str]:
    """The text with another sign for each carriage return that ends no line, and that sign; "" where there is none.

    The csv module refuses a carriage return in a cell without quotes. In a file without any line feed they are the
    line ends.
    """
    if "\n" not in text:
        return text.replace("\r", "\n"), ""
    if not re.search(r"\r(?!\n)", text):
        return text, ""
    mark = next(sign for sign in map(chr, range(0xE000, 0xF900)) if sign not in text)
    return re.sub(r"\r(?!\n)", mark, text), mark


def has_swallowed_rows(cells: Sequence[str]) -> bool:
    """Whether an opening quote that was never closed has made one cell of the rows below it.

    Such a cell holds a line with at least as many tabs as stand before the cell itself; a text that happens to hold
    tabs and line ends hardly ever does.
    """
    return any(
        "\n" in cell and any(line.count("\t") >= max(1, column) for line in cell.split("\n")[1:])
        for column, cell in enumerate(cells)
    )
