"""One document as text, markdown, csv and a page: nothing lost, nothing that a text could break out of."""

import base64
import csv
import io
from html.parser import HTMLParser

import pytest

from reports.document import WIDTH, Picture, Section, Table, to_csv, to_html, to_markdown, to_text

NASTY = '<b>bold</b> & "quoted" | pipe \\ back\nnew\x1b[31mline'
TABLE = Table(
    ("run", "n", "score", "text"), (("a", "1", "0.50", NASTY), ("bb", "12", "-", "short")), frozenset({(0, 2)})
)
SECTIONS = [
    Section("Title <1>", ("A <p> paragraph\nof two lines", TABLE, Picture("caption <x>", 'seen "x"', b"\x89PNG123")))
]


class Page(HTMLParser):
    """Elements with the elements around them, attributes, and the text in cells."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[tuple[str, dict[str, str | None]]] = []
        self.elements: list[tuple[str, dict[str, str | None], list[tuple[str, str | None]]]] = []
        self.cells: list[str] = []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), [(name, of.get("class")) for name, of in self.stack]))
        if tag not in self.VOID:
            self.stack.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1][0] in ("td", "th"):
            self.cells[-1] += data


def test_text_has_aligned_columns_and_a_star_at_marked_cells() -> None:
    table = Table(("run", "score"), (("a", "0.5"), ("longer", "10.25")), frozenset({(1, 1)}))
    assert to_text([Section("T", ("words", table))]).splitlines() == [
        "T", "=", "", "words", "", "run       score", "------  -------", "a           0.5", "longer   *10.25"
    ]  # fmt: skip


def test_text_holds_no_character_that_a_terminal_would_obey() -> None:
    shown = to_text(SECTIONS)
    assert "\x1b" not in shown and "<b>bold</b>" in shown
    assert "caption" not in shown


def test_long_texts_go_on_below_their_own_column() -> None:
    words = "word " * 60
    lines = to_text([Section("T", (Table(("n", "text"), (("1", words), ("22", "x"))),))]).splitlines()
    assert all(len(line) <= WIDTH for line in lines)
    assert lines[5].startswith("  1  word word") and lines[6].startswith("     word")
    assert " ".join(lines[5:8]).split() == ["1", *words.split()]
    assert all(len(line) <= WIDTH for line in to_text([Section("T", (words,))]).splitlines())


def test_markdown_has_one_line_a_row_and_escapes_what_would_end_a_cell() -> None:
    lines = to_markdown(SECTIONS).splitlines()
    assert lines[0] == "## Title <1>"
    rows = [line for line in lines if line.startswith("|")]
    assert (
        rows[0].split() == ["|", "run", "|", "n", "|", "score", "|", "text", "|"]
        and set(rows[1]) == set("|-")
        and len(rows) == 4
    )
    assert r"\<b\>bold\</b\> & " in rows[2] and r"\| pipe \\ back new" in rows[2] and "| **0.50** |" in rows[2]


def test_csv_comes_back_as_it_was() -> None:
    assert list(csv.reader(io.StringIO(to_csv(TABLE)))) == [list(TABLE.columns), *map(list, TABLE.rows)]


def test_a_page_needs_nothing_from_elsewhere() -> None:
    page = to_html("A & B", SECTIONS)
    elements = Page(page).elements
    sources = [attributes["src"] for _, attributes, _ in elements if "src" in attributes]
    assert len(sources) == 1 and str(sources[0]).startswith("data:image/png;base64,")
    assert not {tag for tag, *_ in elements} & {"script", "link", "iframe"}
    assert not any("href" in attributes for _, attributes, _ in elements)
    assert "url(" not in page and "@import" not in page and "http" not in page
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in [e[:2] for e in elements]
    assert "<title>A &amp; B</title>" in page and page.startswith("<!DOCTYPE html>")


def test_texts_on_a_page_are_texts() -> None:
    page = Page(to_html("t", SECTIONS))
    assert "b" not in [tag for tag, *_ in page.elements]
    assert NASTY in page.cells and page.cells[:4] == list(TABLE.columns)


def test_tables_and_pictures_scroll_within_a_box_of_their_own() -> None:
    page = to_html("t", SECTIONS)
    found = [around[-1] for tag, _, around in Page(page).elements if tag in ("table", "img")]
    assert found == [("div", "box"), ("figure", "box")]
    assert ".box { overflow-x: auto" in page


def test_pictures_are_on_the_page_whole_with_their_words() -> None:
    page = to_html("t", SECTIONS)
    (picture,) = [attributes for tag, attributes, _ in Page(page).elements if tag == "img"]
    assert base64.b64decode(str(picture["src"]).partition(",")[2]) == b"\x89PNG123"
    assert picture["alt"] == 'seen "x"' and "<figcaption>caption &lt;x&gt;</figcaption>" in page


NUMBERS = ["0.5", "-0.1 to +0.2", "<0.001", "-", "", "0.5 ± 0.1"]


@pytest.mark.parametrize(("cell", "is_number"), [*((cell, True) for cell in NUMBERS), ("f1", False), ("-x", False)])
def test_numbers_stand_right(cell: str, is_number: bool) -> None:
    page = Page(to_html("t", [Section("s", (Table(("c",), ((cell,),)),))]))
    classes = [attributes.get("class") for tag, attributes, _ in page.elements if tag == "td"]
    assert [str(of).strip() for of in classes] == ["number" if is_number else ""]
