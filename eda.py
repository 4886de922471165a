"""Easy data augmentation (Wei and Zou 2019, arXiv 1901.11196): four small edits of a text, and class balancing.

The edits work on the words of a text, split at white space. A word that an edit does not touch stays byte for byte.
Departures from the authors' code, which lower-cases a text and drops digits and punctuation first: texts stay as they
are; a synonym takes the place of the word without its punctuation; an inserted word may stand at the very end; a stop
word is neither replaced, nor inserted from, nor chosen as a synonym (WordNet has "not" for "non"); a word's own base
form ("film" for "films") is no synonym; one occurrence of a word is replaced, not all of them.

As a command it writes the augmented file, so that people can look at it:

    python eda.py IN.csv OUT.csv
"""

import argparse
import csv
import io
import math
import os
import random
import re
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NoReturn

from tsv import numbered_rows

Synonyms = Callable[[str], Sequence[str]]  # lower-case word -> its synonyms, in an order that never changes


@cache
def stop_words() -> frozenset[str]:
    """The words of data/eda_stop_words.txt."""
    lines = (Path(__file__).parent / "data" / "eda_stop_words.txt").read_text("utf-8").splitlines()
    return frozenset(word for line in lines if not line.startswith("#") for word in line.split())


# Letters with inner hyphens and apostrophes, between punctuation. Words with digits or in other scripts do not match.
_WORD = re.compile(r"([!-/:-@\[-`{-~‘’“”…–—¿¡]*)([A-Za-z]+(?:['’-][A-Za-z]+)*)([!-/:-@\[-`{-~‘’“”…–—¿¡]*)")


class EdaError(ValueError):
    """A setting or an input cannot be used; the message is one line that says what was found and what is allowed."""


@dataclass(frozen=True, kw_only=True)
class EdaConfig:
    """How much is edited: alpha_* as a share of the words of a text, deletion_prob for each word."""

    alpha_replacement: float = 0.1
    alpha_insertion: float = 0.1
    alpha_swap: float = 0.1
    deletion_prob: float = 0.1

    def __post_init__(self) -> None:
        for alpha in (self.alpha_replacement, self.alpha_insertion, self.alpha_swap):
            if not 0 < alpha <= 1:
                raise EdaError(f"--eda_alpha {alpha}: expected a number above 0 and at most 1")
        if not 0 < self.deletion_prob < 1:
            raise EdaError(f"--eda_deletion_prob {self.deletion_prob}: expected a number above 0 and below 1")


# -------------------------------------------------------------------------------------------------------- edits


def num_edits(alpha: float, num_words: int) -> int:
    """Words that one edit changes in a text of so many words."""
    return max(1, int(alpha * num_words))


def _parts(word: str) -> tuple[str, ...]:
    """Punctuation, letters, punctuation; ("", "", "") for numbers, punctuation alone and other scripts."""
    match = _WORD.fullmatch(word)
    return match.groups() if match else ("", "", "")


def word_synonyms(word: str, synonyms: Synonyms) -> list[str]:
    """Synonyms of a word as it stands in a text; none for stop words and where `_parts` finds no letters."""
    core = _parts(word)[1].lower().replace("’", "'")
    if not core or core in stop_words():
        return []
    return [synonym for synonym in synonyms(core) if synonym.lower() != core and synonym.lower() not in stop_words()]


def synonym_replacement(words: Sequence[str], generator: random.Random, n: int, synonyms: Synonyms) -> list[str]:
    """Up to n words, drawn at random among those with synonyms, give way to a random synonym each.

    It keeps their punctuation and capital. A synonym of several words stands in one entry, with spaces.
    """
    edited = list(words)
    places = list(range(len(words)))
    generator.shuffle(places)
    for place in places:
        choices = word_synonyms(words[place], synonyms) if n else []
        if choices:
            synonym = generator.choice(choices)
            before, core, after = _parts(words[place])
            edited[place] = before + (synonym[:1].upper() + synonym[1:] if core[0].isupper() else synonym) + after
            n -= 1
    return edited


def random_insertion(words: Sequence[str], generator: random.Random, n: int, synonyms: Synonyms) -> list[str]:
    """n times, a random synonym of a random word of the text is inserted at a random place."""
    choices = [found for word in words if (found := word_synonyms(word, synonyms))]
    edited = list(words)
    for _ in range(n if choices else 0):
        synonym = generator.choice(generator.choice(choices))
        edited.insert(generator.randint(0, len(edited)), synonym)
    return edited


def random_swap(words: Sequence[str], generator: random.Random, n: int) -> list[str]:
    """n times, two words at random places change places."""
    edited = list(words)
    for _ in range(n if len(words) > 1 else 0):
        i, j = generator.sample(range(len(edited)), 2)
        edited[i], edited[j] = edited[j], edited[i]
    return edited


def random_deletion(words: Sequence[str], generator: random.Random, prob: float) -> list[str]:
    """Each word goes with this probability.

    Where nothing visible would be left, one visible word stays; a text without any is left alone.
    """
    kept = [word for word in words if generator.random() >= prob]
    if any(map(_is_visible, kept)):
        return kept
    visible = [word for word in words if _is_visible(word)]
    return [generator.choice(visible)] if visible else list(words)


def _is_visible(word: str) -> bool:
    """Whether BERT's tokenizer surely finds something in the word: it drops control characters and accents."""
    return any(unicodedata.category(char)[0] in "LNPS" and char != "\ufffd" for char in word)


Edit = Callable[[Sequence[str], random.Random, EdaConfig, Synonyms], list[str]]

EDITS: Mapping[str, Edit] = {
    "replacement": lambda words, generator, config, synonyms: synonym_replacement(
        words, generator, num_edits(config.alpha_replacement, len(words)), synonyms
    ),
    "insertion": lambda words, generator, config, synonyms: random_insertion(
        words, generator, num_edits(config.alpha_insertion, len(words)), synonyms
    ),
    "swap": lambda words, generator, config, _: random_swap(words, generator, num_edits(config.alpha_swap, len(words))),
    "deletion": lambda words, generator, config, _: random_deletion(words, generator, config.deletion_prob),
}


def edited_text(text: str, edit: Edit, generator: random.Random, config: EdaConfig, synonyms: Synonyms) -> str:
    """The text after one edit, its words joined by single spaces; the text itself where the edit changed no word."""
    words = text.split()
    edited = edit(words, generator, config, synonyms)
    return text if edited == words else " ".join(edited)


# ---------------------------------------------------------------------------------------------------- balancing


def balance(labels: Sequence[int], generator: random.Random) -> list[int]:
    """Row numbers to augment, one entry a new row, so that every class becomes as frequent as the most common one.

    Class after class in ascending order. Within a class every row is used equally often before any is used again, in
    a new random order each round.
    """
    frequency = Counter(labels)
    sources: list[int] = []
    for label in sorted(frequency):
        rows = [row for row, other in enumerate(labels) if other == label]
        missing = max(frequency.values()) - len(rows)
        while missing > 0:
            sources += generator.sample(rows, min(missing, len(rows)))
            missing -= len(rows)
    return sources


def edited_rows(
    rows: Sequence[tuple[str, ...]], labels: Sequence[int], config: EdaConfig, seed: int, synonyms: Synonyms
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(number of the source row, texts) of the new rows that balance the classes."""
    generator = random.Random(seed)
    for source in balance(labels, generator):
        edit = EDITS[generator.choice(list(EDITS))]
        yield source, tuple(edited_text(text, edit, generator, config, synonyms) for text in rows[source])


def augment_rows(
    rows: Sequence[tuple[str, ...]], labels: Sequence[int], config: EdaConfig, seed: int, synonyms: Synonyms
) -> list[tuple[tuple[str, ...], int]]:
    """The new (texts, label) rows that fill rarer classes up to the most common one; the given rows are not in it.

    Each new row is a given row after one edit, drawn at random among the four and applied to each text on its own.
    """
    return [(texts, labels[source]) for source, texts in edited_rows(rows, labels, config, seed, synonyms)]


# ------------------------------------------------------------------------------------------------------ WordNet

SYSTEM_WORDNETS = (Path("/usr/share/wordnet"), Path("/usr/local/WordNet-3.0/dict"))
WORDNET_FILES = tuple(
    name for part in ("noun", "verb", "adj", "adv") for name in (f"data.{part}", f"index.{part}", f"{part}.exc")
)


class WordNet:
    """Synonyms from WordNet: `WordNet()("film")`. Found at creation, read at the first look-up, each word once."""

    def __init__(self, folder: Path | None = None) -> None:
        """folder: a WordNet dictionary directory; None: nltk's own data, else the system's WordNet.

        Raises EdaError if there is none.
        """
        self._root = _wordnet_root(folder)
        self._found: dict[str, tuple[str, ...]] = {}

    def __call__(self, word: str) -> tuple[str, ...]:
        """The other lemmas of all senses of the word, most frequent sense first; several words with spaces.

        Raises EdaError if WordNet cannot be read.
        """
        if word not in self._found:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    self._found[word] = self._look_up(word)
            except Exception as error:  # what nltk makes of damaged files is no one class of errors
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                message = f"{self._root}: not readable as WordNet ({reason}), expected WordNet 3's files"
                raise EdaError(message) from None
        return self._found[word]

    def _look_up(self, word: str) -> tuple[str, ...]:
        own = {word, *(self._reader.morphy(word, part) for part in "nvar")}
        names = (lemma.name() for synset in self._reader.synsets(word) for lemma in synset.lemmas())
        return tuple(dict.fromkeys(name.replace("_", " ") for name in names if name.lower() not in own))

    @cached_property
    def _reader(self) -> Any:
        from nltk.corpus.reader.wordnet import WordNetCorpusReader

        class Reader(WordNetCorpusReader):  # type: ignore[misc,unused-ignore]
            """nltk's reader, content with the files that synonyms need."""

            def open(self, file: str) -> Any:
                """lexnames, the names of WordNet's 45 source files, is left out by Debian; no synonym needs them."""
                if file == "lexnames":
                    return io.StringIO("".join(f"{i:02d}\tunknown\t0\n" for i in range(45)))
                return super().open(file)

            def map_wn(self, version: str = "wordnet") -> None:
                """No map to another WordNet's numbers, which other languages need and which reads index.sense."""

        return Reader(self._root, None)


def _wordnet_root(folder: Path | None) -> Any:
    """Where WordNet stands, as nltk's path pointer."""
    try:
        import nltk.data
    except ImportError:
        raise EdaError("synonyms need the package nltk: pip install nltk") from None
    if folder is None:
        try:
            return nltk.data.find("corpora/wordnet/")  # the slash finds wordnet.zip, too
        except LookupError:
            folder = next((path for path in SYSTEM_WORDNETS if (path / "data.noun").is_file()), None)
    if folder is None:
        raise EdaError(
            "no WordNet found, expected one of: apt-get install wordnet-base; python -m nltk.downloader wordnet; "
            "--wordnet DIR with WordNet's dictionary files"
        )
    missing = next((name for name in WORDNET_FILES if not (folder / name).is_file()), None)
    if missing:
        raise EdaError(f"--wordnet {folder}: no {missing} there, expected WordNet's dictionary files")
    root = str(folder.resolve())
    if root not in nltk.data.path:  # nltk reads below registered directories only
        nltk.data.path.append(root)
    return nltk.data.FileSystemPathPointer(root)


# ------------------------------------------------------------------------------------------------------ command

LABELS: Mapping[str, tuple[Sequence[int], str]] = {
    "sentiment": (range(5), "a whole number from 0 to 4"),
    "is_duplicate": (range(2), "0 or 1"),
}


@dataclass(frozen=True)
class Table:
    """A CS224N file: its bytes, and its rows as (line in the file, cells)."""

    path: Path
    content: bytes
    header: list[str]
    rows: list[tuple[int, list[str]]]

    @property
    def names(self) -> str:
        """The named columns, for messages."""
        return ", ".join(repr(column) for column in self.header if column) or "none"

    def column(self, name: str) -> int:
        """Where a column stands. Raises EdaError if it is not there."""
        if name not in self.header:
            raise EdaError(f"{self.path}:1: no column {name!r}, found {self.names}")
        return self.header.index(name)


def read_table(path: Path) -> Table:
    """A tab-separated file with a header line. Raises EdaError for anything that is wrong."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EdaError(f"{path}: {error.strerror or error}") from None
    numbered = numbered_rows(path, content, EdaError)
    header = [name.strip() for name in next(numbered, (1, []))[1]]
    rows = list(numbered)
    if not rows:
        raise EdaError(f"{path}: no rows, expected a header line and rows")
    for line, cells in rows:
        if len(cells) != len(header):
            raise EdaError(f"{path}:{line}: {len(cells)} columns, expected {len(header)} as in the header")
    return Table(path, content, header, rows)


def label_column(table: Table, name: str) -> str:
    """The column of the classes. name: "auto" finds the one that CS224N's files have."""
    if name == "similarity" or (name == "auto" and "similarity" in table.header):
        raise EdaError(
            f"{table.path}:1: similarity is a number on a scale, not a class, so there is nothing to balance; "
            "expected a column 'sentiment' or 'is_duplicate'"
        )
    present = [column for column in LABELS if column in table.header]
    if name == "auto" and len(present) != 1:
        raise EdaError(
            f"{table.path}:1: found the columns {table.names}, expected 'sentiment' or 'is_duplicate' "
            "(--label_column names another)"
        )
    return present[0] if name == "auto" else name


def row_labels(table: Table, column: str) -> dict[int, int]:
    """Row number -> class, for the rows that have one."""
    allowed, in_words = LABELS.get(column, (None, "a whole number"))
    place, labels = table.column(column), dict[int, int]()
    for row, (line, cells) in enumerate(table.rows):
        if cell := cells[place].strip():
            try:
                label = float(cell)
            except ValueError:
                label = math.nan
            if not label.is_integer() or (allowed is not None and label not in allowed):
                raise EdaError(f"{table.path}:{line}: {column} is {cell!r}, expected {in_words}")
            labels[row] = int(label)
    if not labels:
        raise EdaError(f"{table.path}: no row has a label in the column {column!r}")
    return labels


def new_lines(table: Table, new_rows: Sequence[tuple[int, tuple[str, ...]]], text_columns: Sequence[int]) -> str:
    """The new rows as lines of the file, with ids and numbers that it does not have.

    new_rows: (number of the source row in the table, texts). Raises EdaError if the rows are not numbered.
    """
    newline = "\r\n" if table.content.split(b"\n", 1)[0].endswith(b"\r") else "\n"
    id_column, is_numbered, lines = table.column("id"), table.header[0] == "", []
    for line, cells in table.rows:
        if is_numbered and not re.fullmatch(r"[0-9]{1,18}", cells[0]):
            raise EdaError(f"{table.path}:{line}: the unnamed first column is {cells[0]!r}, expected a whole number")
    next_number = max(int(cells[0]) for _, cells in table.rows) + 1 if is_numbered else 0
    ids, copies = {cells[id_column] for _, cells in table.rows}, Counter[str]()
    for number, (source, texts) in enumerate(new_rows, next_number):
        cells = list(table.rows[source][1])
        original = cells[id_column]
        while cells[id_column] in ids:
            copies[original] += 1
            cells[id_column] = f"{original}-eda{copies[original]}"
        ids.add(cells[id_column])
        for column, text in zip(text_columns, texts, strict=True):
            cells[column] = text
        if is_numbered:
            cells[0] = str(number)
        stream = io.StringIO()
        csv.writer(stream, delimiter="\t").writerow(cells)  # with its own line end, so that it quotes both \r and \n
        lines.append(stream.getvalue().removesuffix("\r\n") + newline)
    return "".join(lines)


def check_is_new(path: Path) -> None:
    """Raises EdaError where a file cannot be written without replacing another."""
    if os.path.lexists(path):
        raise EdaError(f"{path}: exists already, expected the name of a new file")
    if not path.parent.is_dir():
        raise EdaError(f"{path}: no directory {path.parent}")


def write_new_file(path: Path, content: bytes) -> None:
    """Writes beside the path and renames, so that the file is there whole or not at all. Never replaces a file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            beside.write_bytes(content)
            check_is_new(path)
            beside.rename(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise EdaError(f"{path}: {error.strerror or error}, nothing was written") from None


def augment_file(
    source: Path, target: Path, column: str, config: EdaConfig, seed: int, wordnet: Path | None
) -> list[str]:
    """Writes `target`: the bytes of `source`, then the new rows. Returns what to tell the user, in lines."""
    check_is_new(target)
    table = read_table(source)
    column = label_column(table, column)
    names = ("sentence",) if "sentence" in table.header else ("sentence1", "sentence2")
    text_columns = [table.column(name) for name in names]
    labels = row_labels(table, column)
    numbers = list(labels)
    texts = [tuple(table.rows[row][1][i] for i in text_columns) for row in numbers]
    new = edited_rows(texts, list(labels.values()), config, seed, WordNet(wordnet))
    new_rows = [(numbers[row], edited) for row, edited in new]
    end = b"" if table.content.endswith(b"\n") else b"\n"
    write_new_file(target, table.content + end + new_lines(table, new_rows, text_columns).encode())

    skipped = [str(line) for row, (line, _) in enumerate(table.rows) if row not in labels]
    before, added = Counter(labels.values()), Counter(labels[row] for row, _ in new_rows)
    return [
        *([f"{source}: {len(skipped)} without a label, only copied: line {', '.join(skipped)}"] if skipped else []),
        *(f"{column} {x}: {before[x]:,} rows + {added[x]:,} new = {before[x] + added[x]:,}" for x in sorted(before)),
        f"{target}: {len(table.rows):,} rows + {len(new_rows):,} new, seed {seed}",
    ]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists what is allowed)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code: 0, 2 for an input that cannot be used, 130 when interrupted."""
    parser = _Parser(
        prog="eda.py",
        description="Write a CS224N training file with augmented rows appended, so that its classes are equal in "
        "number. Synonyms come from WordNet.",
    )
    add, default = parser.add_argument, "(default: %(default)s)"
    add("source", metavar="IN.csv", type=Path, help="tab-separated file with sentiment or is_duplicate")
    add("target", metavar="OUT.csv", type=Path, help="new file; an existing one is never replaced")
    add("--label_column", metavar="NAME", default="auto", help=f"column of the classes {default}")
    add("--eda_alpha", metavar="SHARE", type=float, default=0.1, help=f"share of the words edited {default}")
    add("--eda_deletion_prob", metavar="P", type=float, default=0.1, help=f"chance that a word goes {default}")
    add("--seed", metavar="N", type=int, default=0, help=f"the same seed writes the same bytes {default}")
    add("--wordnet", metavar="DIR", type=Path, help="WordNet's dictionary files (default: nltk's, else the system's)")
    args = parser.parse_args(arguments)
    try:
        if args.seed < 0:
            raise EdaError(f"--seed {args.seed}: expected a whole number from 0 up")
        alpha = args.eda_alpha
        config = EdaConfig(
            alpha_replacement=alpha, alpha_insertion=alpha, alpha_swap=alpha, deletion_prob=args.eda_deletion_prob
        )
        for line in augment_file(args.source, args.target, args.label_column, config, args.seed, args.wordnet):
            print(line)
    except EdaError as error:
        print(f"eda.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("eda.py: interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
