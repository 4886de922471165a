"""One document as text, markdown and a page: nothing lost, nothing that a text could break out of."""

from dataclasses import dataclass
from html.parser import HTMLParser

import pytest

from reports.document import NO_BREAK, WIDTH, Section, Table, to_html, to_text


@dataclass
class Picture:
    source: str
    caption: str
    alt: str


NASTY = '<b>bold</b> & "quoted" | pipe \\ back\nnew\x1b[31mline'
TABLE = Table(("run", "n", "score", "text"), (("a", "1", "0.50", NASTY), ("bb", "12", "-", "short")), {(0, 2)})
SECTIONS = [Section("Title <1>", ("A <p> paragraph\nof two lines", TABLE, Picture("data:x", "caption <x>", 'an "x"')))]


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


def test_text_has_aligned_columns_a_star_at_marked_cells_and_nothing_that_a_terminal_would_obey() -> None:
    table = Table(("run", "score"), (("a", "0.5"), ("longer", "10.25")), {(1, 1)})
    assert to_text([Section("T", ("words", table))]).splitlines() == [
        "T", "=", "", "words", "", "run      score", "------  ------", "a          0.5", "longer  *10.25"
    ]  # fmt: skip
    shown = to_text(SECTIONS)
    assert "\x1b" not in shown and "<b>bold</b>" in shown and "caption" not in shown


def test_large_numbers_keep_their_commas() -> None:
    table = Table(("class", "rows"), (("one of 2,000", "1,400"), ("2,000", "12")))
    assert to_text([Section("T", (table,))]).splitlines()[3:] == [
        "class          rows", "------------  -----", "one of 2,000  1,400", "2,000            12"
    ]  # fmt: skip


def test_long_texts_go_on_below_their_own_column() -> None:
    words = "word " * 60
    lines = to_text([Section("T", (words, Table(("n", "text"), (("1", words), ("22", "x")))))]).splitlines()
    assert all(len(line) <= WIDTH for line in lines)
    assert lines[-4].startswith(" 1  word word") and lines[-3].startswith("    word")
    assert " ".join(lines[-4:-1]).split() == ["1", *words.split()]


def test_tables_and_texts_fit_the_terminal_and_numbers_are_never_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    words, cells = (
        "word " * 30,
        ("a setting of some length", "0.5 to 0.6", f"runs of{NO_BREAK}it, seed-0,{NO_BREAK}seed-1, seed-2", "0.123"),
    )
    section = Section("T", (words, Table(("setting", "score", "runs", "p"), (cells, cells))))
    for columns in (60, 80, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = to_text([section]).splitlines()
        assert all(len(line) <= columns for line in lines)
        shown = "\n".join(lines)
        assert shown.count("0.5 to 0.6") == shown.count("0.123") == shown.count("seed-0, seed-1") == 2
        assert shown.count("of it") == 2 and NO_BREAK not in shown
    assert sum(line.startswith("a setting of some length ") for line in lines) == 2


def test_markdown_has_one_line_a_row_and_escapes_what_would_end_a_cell() -> None:
    lines = to_text(SECTIONS, is_markdown=True).splitlines()
    header, rule, *rows = [line for line in lines if line.startswith("|")]
    assert lines[0] == "## Title <1>" and header.split() == ["|", "run", "|", "n", "|", "score", "|", "text", "|"]
    assert set(rule) <= set("|-:") and len(rows) == 2
    assert r"\<b\>bold\</b\> & " in rows[0] and r"\| pipe \\ back new" in rows[0] and "| **0.50** |" in rows[0]


def test_a_page_needs_nothing_from_elsewhere_its_texts_are_texts_and_its_pictures_have_their_words() -> None:
    text = to_html("A & B", SECTIONS)
    page = Page(text)
    assert not {tag for tag, *_ in page.elements} & {"script", "link", "iframe"}
    assert not any(word in text for word in ("url(", "@import", "http"))
    links = [of["href"] for tag, of, _ in page.elements if tag == "a"]
    assert links == [f"#{of['id']}" for tag, of, _ in page.elements if tag == "details" and "open" in of] == ["#s1"]
    assert "<title>A &amp; B</title>" in text and text.startswith("<!DOCTYPE html>")
    assert "b" not in [tag for tag, *_ in page.elements]
    assert NASTY in page.cells and page.cells[:4] == list(TABLE.columns)
    (picture,) = [attributes for tag, attributes, _ in page.elements if tag == "img"]
    assert picture == {"src": "data:x", "alt": 'an "x"'} and "<figcaption>caption &lt;x&gt;</figcaption>" in text
    around = [around[-1] for tag, _, around in page.elements if tag in ("table", "img")]
    assert around == [("div", "box"), ("figure", "box")] and ".box { overflow-x: auto" in text  # wide ones scroll


NUMBERS = ["0.5", "-0.1 to +0.2", "<0.001", "-", "", "0.5 ± 0.1"]


@pytest.mark.parametrize(("cell", "is_number"), [*((cell, True) for cell in NUMBERS), ("f1", False), ("-x", False)])
def test_numbers_stand_right(cell: str, is_number: bool) -> None:
    page = Page(to_html("t", [Section("s", (Table(("c",), ((cell,),)),))]))
    classes = [attributes.get("class") for tag, attributes, _ in page.elements if tag == "td"]
    assert [str(of).strip() for of in classes] == ["number" if is_number else ""]
