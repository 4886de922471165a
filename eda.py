"""Easy data augmentation (Wei and Zou 2019, arXiv 1901.11196): four small edits of a text, and class balancing.

The edits work on the words of a text, split at white space. A word that an edit does not touch stays byte for byte.
Departures from the authors' code, which lower-cases a text and drops digits and punctuation first: texts stay as they
are; a synonym takes the place of the word without its punctuation; an inserted word may stand at the very end; a stop
word is neither replaced, nor inserted from, nor chosen as a synonym (WordNet has "not" for "non"); a word's own base
form ("film" for "films") is no synonym; one occurrence of a word is replaced, not all of them.

As a command it writes the augmented file, so that people can look at it:

    python eda.py IN.csv OUT.csv
"""

import io
import random
import re
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Protocol

from datasets import DataError, Example
from parameters import flags_of, parameter
from tasks import Task

Synonyms = Callable[[str], Sequence[str]]  # lower-case word -> its synonyms, in an order that never changes


@cache
def stop_words() -> frozenset[str]:
    """The words of data/eda_stop_words.txt."""
    lines = (Path(__file__).parent / "data" / "eda_stop_words.txt").read_text("utf-8").splitlines()
    return frozenset(word for line in lines if not line.startswith("#") for word in line.split())


# Letters with inner hyphens and apostrophes, between punctuation. Words with digits or in other scripts do not match.
_WORD = re.compile(r"([!-/:-@\[-`{-~‘’“”…–—¿¡]*)([A-Za-z]+(?:['’-][A-Za-z]+)*)([!-/:-@\[-`{-~‘’“”…–—¿¡]*)")


class EdaError(DataError):
    """A setting or an input cannot be used; the message is one line that says what was found and what is allowed."""


@dataclass(frozen=True, kw_only=True)
class EdaConfig:
    """How much is edited, and where synonyms come from. Raises EdaError for a value outside its limits."""

    alpha: float = parameter(0.1, "share of a text's words that an edit changes", "0 < x <= 1")
    deletion_prob: float = parameter(0.1, "probability of a word to be deleted", "0 < x < 1")
    wordnet: str = parameter(
        "", "directory of a WordNet database (default: nltk's, else the system's)", flag="wordnet", metavar="DIR"
    )

    def __post_init__(self) -> None:
        for name, flag in flags_of(EdaConfig, "eda_"):
            if problem := flag.problem(getattr(self, name)):
                raise EdaError(problem)

    def synonyms(self) -> "WordNet":
        """Raises EdaError if there is no WordNet."""
        return WordNet(Path(self.wordnet) if self.wordnet else None)


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
    if not any(map(_is_visible, kept)):
        visible = [word for word in words if _is_visible(word)]
        kept = [generator.choice(visible)] if visible else list(words)
    return kept


def _is_visible(word: str) -> bool:
    """Whether BERT's tokenizer surely finds something in the word: it drops control characters and accents."""
    return any(unicodedata.category(char)[0] in "LNPS" and char != "\ufffd" for char in word)


Edit = Callable[[Sequence[str], random.Random, int, float, Synonyms], list[str]]
EDITS: Mapping[str, Edit] = {  # n: edits; prob: of a deletion
    "replacement": lambda words, generator, n, prob, synonyms: synonym_replacement(words, generator, n, synonyms),
    "insertion": lambda words, generator, n, prob, synonyms: random_insertion(words, generator, n, synonyms),
    "swap": lambda words, generator, n, prob, synonyms: random_swap(words, generator, n),
    "deletion": lambda words, generator, n, prob, synonyms: random_deletion(words, generator, prob),
}


def edited_text(text: str, edit: Edit, generator: random.Random, config: EdaConfig, synonyms: Synonyms) -> str:
    """The text after one edit, its words joined by single spaces; the text itself where the edit changed no word."""
    words = text.split()
    edited = edit(words, generator, num_edits(config.alpha, len(words)), config.deletion_prob, synonyms)
    return text if edited == words else " ".join(edited)


def balance(labels: Sequence[int], generator: random.Random) -> list[int]:
    """Row numbers to augment, one entry a new row, so that every class becomes as frequent as the most common one.

    Class after class in ascending order. Within a class every row is used equally often before any is used again, in
    a new random order each round.
    """
    frequency, sources = Counter(labels), list[int]()
    for label in sorted(frequency):
        rows = [row for row, other in enumerate(labels) if other == label]
        for missing in range(max(frequency.values()) - len(rows), 0, -len(rows)):
            sources += generator.sample(rows, min(missing, len(rows)))
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


SYSTEM_WORDNETS = (Path("/usr/share/wordnet"), Path("/usr/local/WordNet-3.0/dict"))


class WordNet:
    """Synonyms from WordNet: `WordNet()("film")`. Found at creation, read at the first look-up, each word once."""

    def __init__(self, folder: Path | None = None) -> None:
        """folder: a WordNet dictionary directory; None: nltk's own data, else the system's WordNet.

        Raises EdaError if there is none.
        """
        self._root = _wordnet_root(folder)
        self._look_up = cache(self._lemmas)

    def __call__(self, word: str) -> tuple[str, ...]:
        """The other lemmas of all senses of the word, most frequent sense first; several words with spaces.

        Raises EdaError if WordNet cannot be read.
        """
        try:
            return self._look_up(word)
        except Exception as error:  # what nltk makes of damaged files is no one class of errors
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise EdaError(f"{self._root}: not readable as WordNet ({reason}), expected WordNet 3's files") from None

    def _lemmas(self, word: str) -> tuple[str, ...]:
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            own = {word, *(self._reader.morphy(word, part) for part in "nvar")}
            names = [lemma.name() for synset in self._reader.synsets(word) for lemma in synset.lemmas()]
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
    import nltk.data

    if folder is None:
        with suppress(LookupError):
            return nltk.data.find("corpora/wordnet/")  # the slash finds wordnet.zip, too
    for place in SYSTEM_WORDNETS if folder is None else (folder,):
        if (place / "data.noun").is_file():
            nltk.data.path.append(str(place.resolve()))  # nltk reads below registered directories only
            return nltk.data.FileSystemPathPointer(str(place.resolve()))
    raise EdaError(
        f"no WordNet found{f' in {folder}' if folder else ''}, expected one of: apt-get install wordnet-base; "
        "python -m nltk.downloader wordnet; --wordnet DIR with WordNet's dictionary files"
    )


class Augmentation(Protocol):
    """Makes training rows of training rows."""

    def __init__(self, parameters: Any) -> None: ...

    def added(self, task: Task, examples: Sequence[Example], seed: int) -> list[Example]:
        """New rows; the given ones are not among them. Raises DataError if there can be none."""
        ...


class Eda:
    """Easy data augmentation (Wei and Zou 2019): edited rows make rarer classes as frequent as the most common one."""

    Parameters = EdaConfig

    def __init__(self, parameters: EdaConfig) -> None:
        self.parameters = parameters

    def added(self, task: Task, examples: Sequence[Example], seed: int) -> list[Example]:
        if task.output.num_classes is None:
            return []
        rows, labels = [example.texts for example in examples], [int(example.label) for example in examples]
        new = augment_rows(rows, labels, self.parameters, seed, self.parameters.synonyms())
        return [Example(f"eda{number}", texts, float(label), 0) for number, (texts, label) in enumerate(new)]


AUGMENTATIONS: dict[str, type[Augmentation]] = {"eda": Eda}


if __name__ == "__main__":
    from reports.augmented_file import main

    sys.exit(main())
