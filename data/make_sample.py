"""Writes the sample data set: nine small files in CS224N's format, so that a first run needs no download.

    python data/make_sample.py [--out DIR] [--seed N]

Every row is drawn from the tables in data/sample_tables: reviews.toml for sentiment, questions.toml for paraphrase,
statements.toml for similarity, words.toml for what several of them are about. Words alone do not give the answer: what
decides is negation, order, direction or who did what to whom.

How to read the tables:
    *word           an entry that starts with a star appears in dev and test only, never in train
    a=b             two names of one thing; either may be used, and using the other one changes no meaning
    {this|that}     inside a template: one of these, at random, with the same meaning
    {name}          inside a template: a slot, filled from the table of that name
"""

import argparse
import random
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

FOLDER = Path(__file__).parent
Entry = TypeVar("Entry")
Table = Mapping[str, Any]  # as it stands in a file of sample_tables, which says what its keys mean


def read_tables(name: str) -> Table:
    """The tables of a kind of row: "reviews", "questions" or "statements"."""
    words, tables = (tomllib.loads((FOLDER / f"sample_tables/{n}.toml").read_text("utf-8")) for n in ("words", name))
    return {"words": words, **tables}


@dataclass(frozen=True)
class Draw:
    """Random choices for one file, all from `Random.random`, whose values Python promises to keep between versions.

    unseen: opens the starred entries, so that dev and test hold words train lacks.
    """

    rng: random.Random
    tables: Table
    unseen: bool

    def chance(self, prob: float) -> bool:
        return self.rng.random() < prob

    def pick(self, entries: Sequence[Entry]) -> Entry:
        return entries[int(self.rng.random() * len(entries))]

    def group(self, name: str) -> Table:
        """One of the domains, topics or scenes."""
        return self.pick([group for group in self.tables[name] if self.unseen or not group.get("unseen")])

    def allowed(self, entries: str | Sequence[str]) -> list[str]:
        """The entries of a table, or of the table of that name in words.toml, that this file may hold."""
        found = self.tables["words"][entries] if isinstance(entries, str) else entries
        return [entry.removeprefix("*") for entry in found if self.unseen or not entry.startswith("*")]

    def one(self, entries: str | Sequence[str], besides: Sequence[str] = ()) -> str:
        """One allowed entry that is not among `besides`."""
        return self.pick([entry for entry in self.allowed(entries) if entry not in besides])

    def each(self, tables: Mapping[str, str | Sequence[str]]) -> dict[str, str]:
        """One allowed entry of each table, none of them twice."""
        found: dict[str, str] = {}
        for name, entries in tables.items():
            found[name] = self.one(entries, besides=list(found.values()))
        return found

    def named(self, entries: Mapping[str, str]) -> dict[str, str]:
        """One name of the thing in place of all its names."""
        return {key: self.one(entry.split("=")) for key, entry in entries.items()}

    def weighted(self, weights: Mapping[str, float]) -> str:
        """A key of `weights`, drawn in proportion to its value."""
        return self.rng.choices(list(weights), list(weights.values()))[0]

    def fill(self, template: str, slots: Mapping[str, str | Sequence[str]]) -> str:
        """The template with every {this|that} and every slot filled, with text or from a table, no entry twice."""
        used: list[str] = []

        def choose(match: re.Match[str]) -> str:
            if "|" in match[1]:
                return self.pick(str(match[1]).split("|"))
            slot = slots[match[1]]
            used.append(slot if isinstance(slot, str) else self.one(slot, besides=used))
            return used[-1]

        return re.sub(r"\{([^{}]+)\}", choose, template)


def polish(text: str) -> str:
    """The text with 'a' or 'an' as the next word asks, no stray spaces, and a capital where a sentence starts."""
    text = re.sub(r"\s+(?=[ .,])", "", text).strip()
    text = re.sub(r"\b(a) (?=(?!one\b|uni|use|euro)[aeiou]|hour|honest)", r"\1n ", text, flags=re.IGNORECASE)
    return re.sub(r"(^|[.!?] )([a-z])", lambda match: match[1] + match[2].upper(), text)


# -------------------------------------------------------------------------------------- sentiment of a review, 0 to 4


def review_slots(draw: Draw, domain: Table) -> dict[str, Any]:
    """The slots of one clause: two aspects with matching verb forms, and the words that suit the first of them.

    An aspect is a noun, its good words and its bad words: 'the acting: convincing, heartfelt / wooden, stiff'.
    """
    first, grades = draw.one(domain["aspects"]), draw.tables["grades"]
    noun, good, bad = re.split(": | / ", first)
    other = draw.one(domain["aspects"], besides=[first]).split(":")[0]
    singular, plural = ("is", "are") if draw.chance(0.4) else ("was", "were")
    verb, other_verb = (plural if re.search("[^s]s$", name) else singular for name in (noun, other))
    own = {"good": grades["good"] + good.split(", ") * 2, "poor": grades["poor"] + bad.split(", ") * 2}
    own |= {"is": verb, "are": other_verb, "was": singular, "aspect": noun, "other": other}
    own |= {"item": draw.one(domain["items"]), "maker": domain["maker"], "earlier": domain["earlier"]}
    return {**grades, **own}


def clause(draw: Draw, domain: Table, kind: str, label: str) -> str:
    """A clause of the given class about an aspect, about the whole, or ("verdict", "frame") free in form."""
    if kind == "verdict":
        return draw.one(domain["verdicts"][label])
    template = draw.one(draw.tables["frames"][label] if kind == "frame" else draw.tables["subjects"][kind])
    if kind != "frame":
        template = template.replace("{predicate}", draw.one(draw.tables["predicates"][label]))
    grades = {} if kind == "aspect" else draw.tables["grades"]  # the words of an aspect need not suit the whole
    return draw.fill(template, review_slots(draw, domain) | grades)


def two_clauses(draw: Draw, domain: Table, joins: Sequence[str], labels: Sequence[str]) -> str:
    """Clauses of the given classes: the first about an aspect, the second about another one or about the whole."""
    nouns = [entry.split(":")[0] for entry in draw.allowed(domain["aspects"])]
    first = clause(draw, domain, "aspect", labels[0])
    second = clause(draw, domain, draw.pick(("aspect", "whole", "verdict")), labels[1])
    while any(noun in first and noun in second for noun in nouns) or first.split()[-2:] == second.split()[-2:]:
        second = clause(draw, domain, "aspect", labels[1])
    return draw.fill(draw.one(joins), {"first": first, "second": second})


def review(draw: Draw) -> tuple[str, str]:
    """A core, at times an opening phrase, at times a sentence that says nothing about quality. Text and class."""
    domain, kind = draw.group("domains"), draw.weighted(draw.tables["kind_shares"])
    label = draw.pick("01234")
    if kind in ("contrast", "agreement"):
        first, second, label = draw.pick(draw.tables["contrasts"]) if kind == "contrast" else (label,) * 3
        text = two_clauses(draw, domain, draw.tables["joins"][kind], (first, second))
    else:
        text = clause(draw, domain, kind, label)
    if kind != "frame" and draw.chance(0.2):
        text = f"{draw.one(draw.tables['openers'])}, {text}"
    if draw.chance(0.75 if kind == "verdict" else 0.2):
        context = draw.one(domain["contexts"])
        text = f"{context}. {text}" if context.startswith("it ") or draw.chance(0.5) else f"{text}. {context}"
    return polish(f"{text}."), label


def sentiment_row(draw: Draw) -> tuple[str, ...]:
    """A review of 6 to 25 words and its class as an annotator gave it. The class is drawn first, the review to fit."""
    wanted = draw.weighted(draw.tables["class_shares"])
    while (found := review(draw))[1] != wanted or not 6 <= len(found[0].split()) <= 25:
        pass
    label = found[1]
    if draw.chance(draw.tables["slip_share"]):
        label = str(int(label) + (1 if label == "0" or (label < "4" and draw.chance(0.5)) else -1))
    return found[0], label


# ------------------------------------------------------------------------------------------ paraphrase of two questions


@dataclass(frozen=True)
class Question:
    """One question of a topic: which of an intent's wordings, about what (slot -> entry, all its names)."""

    topic: Table
    intent: Sequence[str]
    wording: int
    values: Mapping[str, str]

    def text(self, draw: Draw) -> str:
        return polish(draw.fill(draw.allowed(self.intent)[self.wording], draw.named(self.values)))

    def exchanged(self) -> "Question":
        return replace(self, values={**self.values, "x": self.values["y"], "y": self.values["x"]})


def any_question(draw: Draw) -> Question:
    topic = draw.group("topics")
    intent, values = draw.pick(topic["intents"]), draw.each(topic["slots"])
    return Question(topic, intent, draw.pick(range(len(draw.allowed(intent)))), values)


def reworded(draw: Draw, question: Question) -> Question:
    """Another wording of the same question; where order is free, x and y may also change places."""
    ranks = range(len(draw.allowed(question.intent)))
    found = replace(question, wording=draw.pick([rank for rank in ranks if rank != question.wording]))
    return found.exchanged() if question.topic.get("order") == "free" and draw.chance(0.5) else found


def same(draw: Draw, question: Question) -> Question:
    """The same question, reworded or only touched up: another {this|that} or name, x and y exchanged where they may."""
    if draw.weighted(draw.tables["same_kinds"]) == "reworded":
        return reworded(draw, question)
    return question.exchanged() if question.topic.get("order") == "free" else question


def different(draw: Draw, question: Question) -> Question:
    kind, topic = draw.weighted(draw.tables["different_kinds"]), question.topic
    if kind == "other_topic":
        while (found := any_question(draw)).topic is topic:
            pass
        return found
    if kind == "other_intent":  # about the same thing, in a wording that nearly always resembles the first one
        intent = draw.pick([intent for intent in topic["intents"] if intent is not question.intent])
        ranks = range(len(draw.allowed(intent)))
        wording = question.wording if question.wording in ranks and draw.chance(0.9) else draw.pick(ranks)
        return replace(question, intent=intent, wording=wording)
    if kind == "exchanged" and topic.get("order") == "matters":
        found, touched_up_share = question.exchanged(), 0.75
    else:  # "changed": the same intent about another place, number or thing; often in the same wording
        slot = draw.pick(list(question.values))
        value = draw.one(topic["slots"][slot], besides=list(question.values.values()))
        found, touched_up_share = replace(question, values={**question.values, slot: value}), 0.45
    return found if draw.chance(touched_up_share) else reworded(draw, found)


def paraphrase_row(draw: Draw) -> tuple[str, ...]:
    """Two questions that differ in their text, and 1.0 if they were marked as asking the same thing, else 0.0."""
    is_same = draw.chance(draw.tables["paraphrase_share"])
    first = second = ""
    while first == second:
        question = any_question(draw)
        other = (same if is_same else different)(draw, question)
        first, second = question.text(draw), other.text(draw)
    label = is_same != draw.chance(draw.tables["slip_share"])
    return first, second, "1.0" if label else "0.0"


# ------------------------------------------------------------------------------- similarity of two statements, 0 to 5
# A statement is an event: facts such as the agent, the action, the place. Two are as similar as their share of common
# facts, whatever the words and the order in which those are told.

Facts = dict[str, str]  # fact -> its entry in the table of the scene, all names of the thing included
Event = tuple[Table, Facts]  # a scene, and those of its facts that are told


def any_event(draw: Draw) -> Event:
    """Who did what to whom is always told, the details at times."""
    scene = draw.group("scenes")
    facts = draw.each(scene["core"])
    for fact, words in scene["numbers"].items():
        facts[fact] = "a" if fact == "agent_count" and not draw.chance(0.3) else draw.one(words, besides=["a"])
    for fact, words in scene["details"].items():
        if draw.chance(draw.tables["detail_probs"][fact]):
            facts[fact] = draw.one(words)
    return scene, facts


def with_other_facts(draw: Draw, event: Event, tables: Table, changes: int) -> Event:
    """The event with some facts of these tables changed, or left out where they are details."""
    scene, facts = event
    for fact in draw.each({f"change {i}": list(tables) for i in range(changes)}).values():
        facts = facts | {fact: draw.one(tables[fact], besides=list(facts.values()))}
        if fact in scene["details"] and draw.chance(0.4):
            del facts[fact]
    return scene, facts


def pair_of_events(draw: Draw) -> tuple[Event, Event]:
    first, kind = any_event(draw), draw.weighted(draw.tables["pair_kinds"])
    if kind == "unrelated":
        return first, any_event(draw)
    scene, facts = first
    if kind == "reversed" and scene.get("reversible"):
        # A single agent of no particular looks can take the place of the patient.
        plain = {fact: "a" if fact == "agent_count" else facts[fact] for fact in facts if fact != "agent_look"}
        return (scene, plain), (scene, plain | {"agent": facts["patient"], "patient": facts["agent"]})
    details = scene["details"] | scene["numbers"]
    if kind in ("same", "detail"):
        return first, with_other_facts(draw, first, details, 0 if kind == "same" else draw.pick((1, 2)))
    changes = {"one": 1, "reversed": 1, "two": 2, "setting": 3}[kind]
    second = with_other_facts(draw, first, scene["core"], changes)
    return first, with_other_facts(draw, second, details, 1) if draw.chance(0.3) and kind != "setting" else second


def common_share(first: Facts, second: Facts, tables: Table) -> float:
    """The weight of the facts that two events share, over that of all their facts; a fact told once counts half."""
    weights: dict[str, float] = {fact: tables["fact_weights"][fact] for fact in first | second}
    common = 0.0
    for fact, weight in weights.items():
        owner = tables["owners"].get(fact, fact)
        if first.get(owner) == second.get(owner):
            common += weight / 2 if (fact in first) != (fact in second) else weight * (first[fact] == second[fact])
    return common / sum(weights.values())


def statement(draw: Draw, event: Event) -> str:
    """The event told in one sentence: one name for each thing, one of the tellings that its facts allow."""

    def s_form(word: str) -> str:
        """The plural of a noun, or the form of a verb that goes with he or she."""
        return next(re.sub(old, new, word) for old, new in draw.tables["s_forms"] if re.search(old, word))

    scene, named = event[0], draw.named(event[1])
    verb, agent, patient = named["action"].split(), named["agent"], named["patient"]
    count, number = named.get("agent_count", ""), named.get("patient_count", "")
    many = count not in ("", "a")
    slots = {"place": "", "time": "", **named, "doing": verb[1], "did": verb[2], "done": verb[-1]}
    slots["who"] = f"{count} {named.get('agent_look', '')} {s_form(agent) if many else agent}"
    slots["whom"] = f"{number} {s_form(patient)}" if number else f"a {patient}" if count else patient
    slots["does"], slots["is"] = (verb[0], "are") if many else (s_form(verb[0]), "is")
    slots["was"] = "were" if number else "was"
    absent = tuple(f"{{{fact}}}" for fact in ("place", "time") if fact not in named)
    tellings = draw.allowed(draw.tables["tellings"][scene["told_as"]])
    telling = draw.pick([telling for telling in tellings if not telling.startswith(absent)])
    return polish(draw.fill(telling, slots) + ".")


def similarity_row(draw: Draw) -> tuple[str, ...]:
    """Two statements that differ in their text, and their similarity as raters put it: 0.0 to 5.0 in steps of 0.2."""
    first = second = ""
    while first == second:
        events = pair_of_events(draw)
        first, second = (statement(draw, event) for event in events)
    bell = sum(draw.rng.random() for _ in range(3)) - 1.5  # mean 0, standard deviation 0.5
    score = 5 * common_share(events[0][1], events[1][1], draw.tables) + draw.tables["noise"] * bell
    return first, second, f"{min(max(round(score * 5), 0), 25) / 5:.1f}"


def write_split(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The rows with their numbers and a header. Test files carry no label."""
    num_cells = 1 + len(columns) - ("test" in path.name)
    has_two_indices = path.name == "ids-sst-test-student.csv"  # the real file does: readers must go by column names
    lines = [["0", "", *("id", *columns)[:num_cells]]]
    lines += [[str(i + 1), f"{i:.1f}" if has_two_indices else str(i), *row[:num_cells]] for i, row in enumerate(rows)]
    text = "".join("\t".join(cells if has_two_indices else cells[1:]) + "\n" for cells in lines)
    path.write_text(text, "utf-8", newline="\n")


def write_sample(out: Path, seed: int) -> None:
    """The nine files. No texts stand in two rows of a task, in whichever order."""
    out.mkdir(parents=True, exist_ok=True)
    for name, draw_row in (("reviews", sentiment_row), ("questions", paraphrase_row), ("statements", similarity_row)):
        tables = read_tables(name)
        stem, taken = tables["file_stem"], set[frozenset[str]]()
        for split, num_rows in tables["num_rows"].items():
            draw = Draw(random.Random(f"{seed} {stem} {split}"), tables, unseen=split != "train")
            rows: list[list[str]] = []
            while len(rows) < num_rows:
                *texts, label = draw_row(draw)
                if frozenset(texts) not in taken:
                    taken.add(frozenset(texts))
                    rows.append(["".join(draw.pick("0123456789abcdef") for _ in range(25)), *texts, label])
            write_split(out / f"{stem}-{split}.csv", tables["columns"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the sample data set: nine files in CS224N's format.")
    parser.add_argument("--out", type=Path, default=FOLDER / "sample", help="folder for the files")
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives the same files, byte by byte")
    given = parser.parse_args()
    if given.out.resolve() != (FOLDER / "sample").resolve() and (taken := sorted(given.out.glob("*.csv"))):
        parser.error(f"--out {given.out}: {taken[0].name} is there already, expected a folder without csv files")
    write_sample(given.out, given.seed)


if __name__ == "__main__":
    main()
