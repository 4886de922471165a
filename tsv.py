"""Tab-separated files with a header line, as CS224N's are, read row by row with line numbers.

Cells may be quoted as csv does; a quoted cell may hold tabs and line ends.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path


def numbered_rows(path: Path, content: bytes, error: type[ValueError]) -> Iterator[tuple[int, list[str]]]:
    """(first line, cells) of each row of a file's content, the header first; blank lines are passed over.

    Raises `error` for what is not UTF-8, not csv, or has a quote that is never closed; path is for its message.
    """
    text, mark = _without_lone_returns(_decoded(path, content, error))
    csv.field_size_limit(1 << 30)
    # Python's splitlines would also break at control characters within a sentence: lines end at line feeds only.
    reader = csv.reader((line + "\n" for line in text.removesuffix("\n").split("\n")), delimiter="\t")
    start = 1
    try:
        for cells in reader:
            if has_swallowed_rows(cells):
                num_lines = max(cell.count("\n") for cell in cells)
                raise error(f"{path}:{start}: a quoted cell runs over {num_lines} lines, expected a closing quote")
            if cells:
                yield start, [cell.replace(mark, "\r") for cell in cells] if mark else cells
            start = reader.line_num + 1
    except csv.Error as problem:
        raise error(f"{path}:{reader.line_num}: {problem}") from None


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
