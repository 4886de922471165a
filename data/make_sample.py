"""Writes the sample data set: nine small files in CS224N's format, so that a first run needs no download.

    python data/make_sample.py [--out DIR] [--seed N]

Every row is drawn from the tables below, one section per task: sentiment of a review, paraphrase of two questions,
similarity of two statements. The tables are built so that words alone do not give the answer: the same words stand
in rows of different labels, and what decides is negation, order, direction or who did what to whom.

How to read the tables:
    *word           an entry that starts with a star appears in dev and test only, never in train
    a=b             two names of one thing; either may be used, and using the other one changes no meaning
    {this|that}     inside a template: one of these, at random, with the same meaning
    {name}          inside a template: a slot, filled from the table of that name
"""

import argparse
import csv
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

Entry = TypeVar("Entry")

# ---------------------------------------------------------------------------------------------------------------------
# Drawing from tables
# ---------------------------------------------------------------------------------------------------------------------


def table(words: str) -> tuple[str, ...]:
    """The entries of a table that is written as one comma-separated string."""
    return tuple(word.strip() for word in words.split(","))


@dataclass(frozen=True)
class Draw:
    """Random choices for one file. `unseen` opens the starred entries, so that dev and test hold words train lacks.

    Everything rests on `Random.random`, the one method whose values Python promises to keep between versions: the
    committed files can be compared with a fresh run byte by byte on any Python.
    """

    rng: random.Random
    unseen: bool

    def chance(self, prob: float) -> bool:
        return self.rng.random() < prob

    def index(self, length: int) -> int:
        return int(self.rng.random() * length)

    def pick(self, entries: Sequence[Entry]) -> Entry:
        return entries[self.index(len(entries))]

    def allowed(self, entries: Sequence[str]) -> list[str]:
        return [entry.removeprefix("*") for entry in entries if self.unseen or not entry.startswith("*")]

    def one(self, entries: Sequence[str], besides: Sequence[str] = ()) -> str:
        """One entry of a table that is not among `besides`."""
        return self.pick([entry for entry in self.allowed(entries) if entry not in besides])

    def several(self, entries: Sequence[str], count: int) -> list[str]:
        """Different entries, in random order."""
        found: list[str] = []
        while len(found) < count:
            found.append(self.one(entries, besides=found))
        return found

    def weighted(self, weights: Mapping[str, float]) -> str:
        """A key of `weights`, drawn in proportion to its value."""
        target = self.rng.random() * sum(weights.values())
        for key, weight in weights.items():
            target -= weight
            if target < 0:
                return key
        return list(weights)[-1]

    def noise(self) -> float:
        """A bell-shaped number of mean 0 and standard deviation 0.5, never beyond -1.5 or 1.5."""
        return sum(self.rng.random() for _ in range(3)) - 1.5

    def row_id(self) -> str:
        """25 hexadecimal characters, as in the real files."""
        return "".join("0123456789abcdef"[self.index(16)] for _ in range(25))


def fill(draw: Draw, template: str, slots: Mapping[str, Sequence[str]]) -> str:
    """The template with every slot and every {this|that} filled; no slot table gives the same entry twice."""
    used: list[str] = []

    def choose(match: re.Match[str]) -> str:
        name: str = match.group(1)
        if "|" in name:
            return draw.pick(name.split("|"))
        entries = slots[name]
        used.append(entries[0] if len(entries) == 1 else draw.one(entries, besides=used))
        return used[-1]

    return re.sub(r"\{([^{}]+)\}", choose, template)


VOWEL_SOUND = re.compile(r"\b([Aa]) (?=(?!one\b|uni|use|euro)[aeiou]|hour|honest)", re.IGNORECASE)


def polish(text: str) -> str:
    """The text with 'a' or 'an' as the next word asks, no stray spaces, and a capital where a sentence starts."""
    text = re.sub(r"\s+(?=[ .,])", "", text).strip()
    text = VOWEL_SOUND.sub(r"\1n ", text)
    return re.sub(r"(^|[.!?] )([a-z])", lambda match: match.group(1) + match.group(2).upper(), text)


# ---------------------------------------------------------------------------------------------------------------------
# Sentiment: a review and one of five classes, very negative 0 to very positive 4
# ---------------------------------------------------------------------------------------------------------------------
# Inside this section a clause has a value from -2 to 2; the class is the value plus 2.

GRADES = {
    "great": table(
        "superb, brilliant, wonderful, excellent, fantastic, outstanding, terrific, first-rate, splendid, "
        "*marvellous, *exceptional, *magnificent, *sensational"
    ),
    "good": table("good, solid, impressive, pleasing, *satisfying, *commendable"),
    "fair": table("average, ordinary, passable, unremarkable, middling, acceptable, *so-so, *run-of-the-mill"),
    "poor": table("poor, weak, disappointing, mediocre, second-rate, *underwhelming, *lacklustre, *subpar"),
    "awful": table(
        "awful, terrible, dreadful, horrible, appalling, hopeless, atrocious, disastrous, *abysmal, *dire, "
        "*woeful, *lousy"
    ),
}

PREDICATES = {  # what follows "the acting is": value -> wordings
    2: (
        "{great}",
        "{really|truly|simply|absolutely} {great}",
        "{extremely|remarkably|exceptionally} {good}",
        "nothing short of {great}",
        "every bit as {great} as people say",
        "not just {good} but {great}",
        "{great} from start to finish",
        "*{good} beyond anything I had hoped for",
        "*so {good} that I am still smiling",
    ),
    1: (
        "{good}",
        "{fairly|reasonably|quite} {good}",
        "not {poor} at all",
        "anything but {poor}",
        "never {poor}",
        "less {poor} than I {feared|expected}",
        "not half as {awful} as people say",
        "more {good} than {poor}",
        "{poor} at first and {great} by the end",
        "better than {fair}",
        "*by no means {poor}",
        "*a good deal less {awful} than rumour has it",
    ),
    0: (
        "{fair}",
        "{fairly|rather|perfectly} {fair}",
        "neither {great} nor {awful}",
        "neither {good} nor {poor}",
        "not {awful}, just {fair}",
        "not {great}, just {fair}",
        "{great} one moment and {awful} the next",
        "somewhere between {good} and {poor}",
        "*as {fair} as they come",
        "*{good} in parts and {poor} in parts",
    ),
    -1: (
        "{poor}",
        "{slightly|rather|a little|somewhat} {poor}",
        "not exactly {great}",
        "hardly {great}",
        "far from {great}",
        "less {good} than I {hoped|expected}",
        "not half as {great} as people say",
        "more {poor} than {good}",
        "{great} at first and {poor} by the end",
        "never {good}",
        "barely {fair}",
        "*not what I would call {good}",
        "*a good deal less {great} than rumour has it",
    ),
    -2: (
        "{awful}",
        "{really|truly|simply|absolutely} {awful}",
        "{extremely|remarkably|exceptionally} {poor}",
        "nothing short of {awful}",
        "every bit as {awful} as people say",
        "not just {poor} but {awful}",
        "not {good} in any way",
        "{awful} from start to finish",
        "*{poor} beyond anything I had feared",
        "*so {poor} that I am still angry",
    ),
}

ASPECT_SUBJECTS = (
    "{aspect} {is} {predicate}",
    "{aspect} {is} {predicate}",
    "I {found|thought} {aspect} {predicate}",
    "{aspect}, {in my view|to my mind|for me}, {is} {predicate}",
    "*{aspect}, as far as I can judge, {is} {predicate}",
)
ITEM_SUBJECTS = (
    "this {item} {was} {predicate}",
    "I {found|thought} the {item} {predicate}",
    "*the {item} as a whole {was} {predicate}",
)

FRAMES = {  # whole reviews: value -> wordings
    2: (
        "I {came|was} prepared to hate this {item} and {left|ended up} as its loudest supporter",
        "everyone warned me about a {awful} {item}; what I got was a {great} one",
        "next to this, every other {item} I know looks {poor}",
        "I doubt I will come across a better {item} this year",
        "it {could hardly be better|does not get much better than this}",
        "there is {nothing|not one thing} {poor} about it",
        "I keep looking for something {poor} to say about this {item} and cannot find anything",
        "I cannot recommend this {item} {highly|warmly} enough",
        "I have run out of words like {great} for this {item}",
        "I never thought I would call a {item} {great}, yet here we are",
        "*I take back every {awful} thing I ever said about the {maker}",
        "*it would be a crime to miss this {item}",
        "*if you only have time for one {item} this year, make it this one",
    ),
    1: (
        "I expected {very little|nothing} of this {item}, and it proved me wrong",
        "after all the {awful} reviews I did not expect such a {good} {item}",
        "whoever called this {item} {awful} cannot have been paying attention",
        "{earlier} was {awful}; this one is {good}",
        "it is a {clear|real} step up from {earlier}",
        "it could easily have been {awful}, and it never is",
        "calling this {item} {poor} would be unfair",
        "I would be lying if I said it was {poor}",
        "I was wrong to {worry|doubt it}; this is a {good} {item}",
        "I did not think the {maker} had a {good} {item} left to give, but I was mistaken",
        "my only real complaint about this {item} is that I did not find it sooner",
        "not a {great} {item} perhaps, but a {good} one, and that is enough for me",
        "*it has its flaws, and I forgave every one of them",
        "*I would not argue with anyone who called it {good}",
        "*for once the {awful} rumours turned out to be untrue",
    ),
    0: (
        "it was exactly what I expected, {no better and no worse|nothing more and nothing less}",
        "I have come across better, and I have come across far worse",
        "for every {great} moment there is a {awful} one",
        "half of it is {great}, the other half {awful}",
        "the {good} parts and the {poor} parts cancel each other out",
        "I liked {aspect} as much as I disliked {other}",
        "it is hard to say anything {good} or {poor} about this {item}",
        "I can see why some people find it {great} and others find it {awful}",
        "{aspect} {is} {great} and {other} {are} {awful}, so call it a draw",
        "I would neither recommend this {item} nor warn anyone about it",
        "not the {great} {item} its fans describe, and not the {awful} one its critics describe",
        "I could take this {item} or leave it",
        "it is about as good as {earlier}, which is to say {fair}",
        "*ask me on Monday and I say {good}, ask me on Tuesday and I say {poor}",
        "*{aspect} {is} {good}, {other} {are} {poor}, and the rest is a shrug",
        "*no regrets about trying this {item}, and no wish to do it again",
    ),
    -1: (
        "I {really|badly|so} wanted to love this {item}, and I am sorry to say I did not",
        "I was ready to be swept away by this {item}, and it never happened",
        "after all the {great} reviews I expected more than a {fair} {item}",
        "if this is what people call {great}, I must be missing something",
        "{earlier} was {great}; this one is merely {fair}",
        "it is not a patch on {earlier}",
        "with a better {maker} this could have been a {great} {item}",
        "calling this {item} {good} would be generous",
        "it wants so badly to be {great} that it forgets to be {good}",
        "I would be lying if I said it was {good}",
        "whoever called this {item} {great} cannot have tried many others",
        "not a {awful} {item} perhaps, but a {poor} one, and life is short",
        "the best I can say about this {item} is that I have forgotten most of it",
        "*it has its charms, and I grew tired of every one of them",
        "*I would argue with anyone who called it {good}",
        "*for once the {great} rumours turned out to be untrue",
    ),
    -2: (
        "I {came|was} prepared to love this {item} and {left|ended up} wanting my money back",
        "everyone promised me a {great} {item}; what I got was a {awful} one",
        "next to this, even the most {awful} {item} I know looks {good}",
        "I doubt I will come across a worse {item} this year",
        "there is {nothing|not one thing} {good} about it",
        "it {could hardly be worse|does not get much worse than this}",
        "I keep looking for something {good} to say about this {item} and cannot find anything",
        "I cannot warn you about this {item} {strongly|loudly} enough",
        "a {great} {item}, if you have never tried another one in your life",
        "how anyone could call this {item} {great} is beyond me, for I cannot think of one {good} thing in it",
        "*I take back every {great} thing I ever said about the {maker}",
        "*it would be a kindness to hide this {item}",
        "*if you must skip just one {item} this year, make it this one",
    ),
}

CONTRASTS = (  # value of the clause that yields, value of the clause that decides -> value of the review
    (-2, 2, 1),
    (-1, 2, 1),
    (-1, 1, 1),
    (-2, 1, 0),
    (2, -1, 0),
    (1, -1, -1),
    (1, -2, -1),
    (2, -2, -1),
)
CONTRAST_JOINS = (
    "{first}, but {second}",
    "{first}, but {second}",
    "although {first}, {second}",
    "{first}, yet {second}",
    "{second}, even though {first}",
    "while {first}, {second}",
    "{first}; {even so|all the same}, {second}",
    "{second}, although {first}",
    "*{first}, and still {second}",
    "*{second}, never mind that {first}",
)
AGREEMENT_JOINS = (
    "{first}, and {second}",
    "{first}. {second}",
    "{first}; {second}",
    "{first}, and what is more, {second}",
    "*{first}, and on top of that {second}",
)
OPENERS = table(
    "honestly, in short, all in all, to be fair, I must say, all things considered, frankly, *to sum up, "
    "*in the end, *for what it is worth"
)


@dataclass(frozen=True)
class Domain:
    """One kind of thing that people review.

    aspects: 'the acting: convincing, heartfelt / wooden, stiff', the mildly good words before the slash, bad after.
    verdicts: value -> clauses about the whole, most of them without a word that is good or bad by itself.
    contexts: sentences that say nothing about quality.
    """

    items: str
    maker: str
    earlier: str
    aspects: tuple[str, ...]
    verdicts: Mapping[int, tuple[str, ...]]
    contexts: tuple[str, ...]
    unseen: bool = False


DOMAINS = (
    Domain(
        items="film, movie",
        maker="director",
        earlier="the first one, the book it is based on, *the French original",
        aspects=(
            "the acting: convincing, heartfelt / wooden, stiff",
            "the plot: gripping, clever / predictable, muddled",
            "the dialogue: sharp, witty / clumsy, lifeless",
            "the jokes: fresh, funny / stale, laboured",
            "the photography: gorgeous, inventive / murky, drab",
            "the second half: tense, lively / slow, dull",
            "*the score: haunting, graceful / intrusive, syrupy",
        ),
        verdicts={
            2: (
                "I went back to see it again the very next day",
                "I have told all my friends to buy tickets",
                "*the whole room stood up and clapped when the lights came on",
            ),
            1: (
                "the two hours passed quickly",
                "it gave us plenty to talk about on the way home",
                "*I caught myself humming the theme at breakfast",
            ),
            0: ("it fills an evening and leaves no trace", "it is the sort of thing you half watch on a plane"),
            -1: (
                "I checked my watch more than once",
                "my thoughts kept drifting to what I would have for dinner",
                "*the row behind me was asleep by the second reel",
            ),
            -2: (
                "we walked out after forty minutes",
                "even the popcorn could not keep me in my seat",
                "*I would have paid extra to be let out early",
            ),
        },
        contexts=(
            "I saw it on a Tuesday afternoon with my brother",
            "it runs for just over two hours",
            "we caught the late showing",
            "it is set in a small harbour town",
        ),
    ),
    Domain(
        items="restaurant, place",
        maker="chef",
        earlier="the bistro next door, the branch across town, *my old canteen",
        aspects=(
            "the food: tasty, fresh / bland, greasy",
            "the service: friendly, attentive / slow, careless",
            "the waiters: charming, helpful / rude, clueless",
            "the soup: rich, fragrant / watery, lukewarm",
            "the desserts: delicate, delicious / soggy, cloying",
            "the wine list: interesting, generous / dull, short",
            "*the bread: crusty, warm / stale, dry",
        ),
        verdicts={
            2: (
                "we booked a table for next week before we had paid",
                "I dreamt about that dinner for a month",
                "*my grandmother, who praises no one, asked for the recipe",
            ),
            1: (
                "we stayed longer than we had planned",
                "every plate went back to the kitchen empty",
                "*I would gladly take my parents there",
            ),
            0: ("we ate, we paid and we went home", "it will do if you happen to be hungry nearby"),
            -1: (
                "we asked for the bill before dessert",
                "I left most of it on the plate",
                "*we stopped for a sandwich on the way home",
            ),
            -2: (
                "I was ill for two days afterwards",
                "I would not eat there again if it were free",
                "*three of us ended the night in the pharmacy",
            ),
        },
        contexts=(
            "we were a party of six",
            "we had a table by the window",
            "it opened in the spring",
            "we ordered three courses and a bottle of red",
        ),
    ),
    Domain(
        items="novel, book",
        maker="author",
        earlier="the author's debut, the first volume, *the short story it grew from",
        aspects=(
            "the prose: elegant, lucid / clunky, overwrought",
            "the characters: believable, vivid / flat, lifeless",
            "the plot: absorbing, clever / predictable, confused",
            "the opening chapter: gripping, funny / slow, dull",
            "the final twist: surprising, moving / silly, contrived",
            "the descriptions: vivid, poetic / tedious, vague",
            "*the translation: fluent, natural / stilted, careless",
        ),
        verdicts={
            2: (
                "I read it twice in one weekend",
                "I missed my stop on the train because of it",
                "*I have bought four copies to give away",
            ),
            1: (
                "I was sorry when the pages ran out",
                "it kept me up past midnight",
                "*I lent it to my neighbour, who will not give it back",
            ),
            0: ("I finished it and put it back on the shelf", "a month later I recall the cover and little else"),
            -1: (
                "I had to push myself to reach the end",
                "I kept skipping ahead to see how much was left",
                "*it has lain face down on my desk since August",
            ),
            -2: (
                "I gave up after thirty pages",
                "it went straight to the charity shop, unfinished",
                "*I have used it to level a table ever since",
            ),
        },
        contexts=(
            "I took it along on holiday",
            "it was a gift from a colleague",
            "it has about four hundred pages",
            "our reading group chose it for June",
        ),
    ),
    Domain(
        items="concert, show",
        maker="band",
        earlier="last year's show, the support act, *their set in Leeds",
        aspects=(
            "the singing: powerful, warm / thin, shrill",
            "the sound: clear, rich / muddy, tinny",
            "the new songs: catchy, tender / forgettable, dreary",
            "the lighting: striking, tasteful / gaudy, distracting",
            "the drummer: precise, energetic / sloppy, listless",
            "the encore: joyful, generous / short, half-hearted",
            "*the brass section: tight, exuberant / shaky, tuneless",
        ),
        verdicts={
            2: (
                "nobody wanted to go home",
                "I have goosebumps just thinking about it",
                "*strangers were hugging each other by the exit",
            ),
            1: (
                "my feet were tapping all evening",
                "I bought the record on the way out",
                "*we sang all the way to the car",
            ),
            0: ("I heard it, I clapped and I caught my bus", "it passed the time until the last train"),
            -1: (
                "people drifted to the bar well before the end",
                "I spent most of it looking at my phone",
                "*the applause died before they had left the stage",
            ),
            -2: (
                "half the hall had left by the interval",
                "people around me were asking for refunds",
                "*I have never been so glad of a power cut",
            ),
        },
        contexts=(
            "we stood near the back",
            "it started at eight",
            "my cousin had a spare ticket",
            "they played for about ninety minutes",
        ),
    ),
    Domain(
        items="phone, handset",
        maker="designer",
        earlier="my old one, the previous model, *the one my employer gave me",
        aspects=(
            "the battery: reliable, durable / feeble, unreliable",
            "the screen: bright, crisp / dim, blurry",
            "the camera: sharp, fast / grainy, slow",
            "the menus: clear, sensible / cluttered, confusing",
            "the buttons: sturdy, responsive / flimsy, stiff",
            "the speaker: loud, clear / tinny, muffled",
            "*the fingerprint reader: quick, dependable / fussy, erratic",
        ),
        verdicts={
            2: (
                "I bought a second one for my wife the same week",
                "it does more than I dared to ask of it",
                "*you would have to prise it out of my hands",
            ),
            1: (
                "it does its job and I rarely need to think about it",
                "it has not let me down so far",
                "*it lasted through a whole festival on one charge",
            ),
            0: ("it makes calls and that is about all I can report", "you would not notice it among ten others"),
            -1: (
                "I have to restart it every other day",
                "I still carry a spare, just in case",
                "*the shop has seen it three times since May",
            ),
            -2: (
                "I sent it back within a week",
                "it died on the second day and took my photos along",
                "*it now serves as a very dear paperweight",
            ),
        },
        contexts=(
            "I have had it for three months",
            "I use it mostly for work",
            "I picked the grey one",
            "it came with a charger and a case",
        ),
    ),
    Domain(
        items="hotel, guesthouse",
        maker="manager",
        earlier="the hostel down the road, the inn we usually book, *my own spare room",
        aspects=(
            "the room: cosy, spotless / cramped, grubby",
            "the breakfast: varied, tasty / meagre, stale",
            "the staff: helpful, cheerful / surly, indifferent",
            "the bed: comfortable, roomy / lumpy, narrow",
            "the view: lovely, calming / grim, dreary",
            "the bathroom: clean, modern / mouldy, tiny",
            "*the garden: peaceful, well-kept / neglected, noisy",
        ),
        verdicts={
            2: (
                "we added three nights to our stay",
                "we have already booked for next summer",
                "*my children cried when we had to check out",
            ),
            1: (
                "we slept well and left rested",
                "I would stay there again when I pass through",
                "*they remembered how I take my tea",
            ),
            0: ("it had four walls and a bed, as advertised", "it serves its purpose if you only need one night"),
            -1: (
                "we spent as little time there as possible",
                "I slept with my coat on",
                "*we bought earplugs on the first morning",
            ),
            -2: (
                "we packed our bags after one night",
                "I counted more insects than guests",
                "*in the end the car was the better bed",
            ),
        },
        contexts=(
            "we stayed for three nights in May",
            "our room was on the second floor",
            "it stands behind the station",
            "I was there for a conference",
        ),
    ),
    Domain(
        items="play, production",
        maker="director",
        earlier="the version on tour, last season's comedy, *the radio version",
        aspects=(
            "the cast: lively, convincing / stiff, uneven",
            "the set: clever, striking / cheap, cluttered",
            "the costumes: elegant, colourful / shabby, ugly",
            "the first act: tense, funny / slow, dull",
            "the lead actor: magnetic, subtle / wooden, shrill",
            "the script: witty, tender / muddled, preachy",
            "*the fight scenes: thrilling, nimble / limp, ridiculous",
        ),
        verdicts={
            2: (
                "the whole audience rose as one",
                "I would see it every night if I could",
                "*I wept, laughed and rang my sister in the interval",
            ),
            1: (
                "we talked about it all the way home",
                "I forgot how hard the seats were",
                "*even my teenage son put his phone away",
            ),
            0: ("it came, it went and nobody minded", "it is one way to spend a wet Thursday"),
            -1: (
                "I was grateful for the interval",
                "I read the programme twice while it was going on",
                "*the coughing in the stalls was louder than the cast",
            ),
            -2: (
                "we did not return after the interval",
                "I have seen livelier funerals",
                "*several people asked the usher for a way out",
            ),
        },
        contexts=(
            "we had seats in the balcony",
            "it was the second night",
            "it is set in the twenties",
            "the theatre was about half full",
        ),
    ),
    Domain(
        items="exhibition, show",
        maker="curator",
        earlier="the permanent collection, the one in May, *their show on maps",
        aspects=(
            "the paintings: vivid, inventive / drab, lifeless",
            "the audio guide: lively, informative / dull, patchy",
            "the lighting: soft, flattering / harsh, gloomy",
            "the labels: clear, witty / tiny, confusing",
            "the layout: logical, spacious / chaotic, cramped",
            "the final room: moving, playful / empty, pointless",
            "*the sketches: delicate, playful / crude, repetitive",
        ),
        verdicts={
            2: (
                "they had to ask me to leave at closing time",
                "I have been four times and it ends too soon",
                "*I sat in front of one picture for an hour",
            ),
            1: (
                "I learnt more than I had expected",
                "we bought the catalogue on the way out",
                "*the guard and I ended up swapping stories about it",
            ),
            0: ("it passes half an hour between two appointments", "you see it, you nod and you move on"),
            -1: (
                "we were in the cafe after ten minutes",
                "most visitors walked through without stopping",
                "*the queue for the lockers held my attention longer",
            ),
            -2: (
                "I asked at the desk for my money back",
                "I felt cheated out of an afternoon",
                "*a blank wall would have taught me more",
            ),
        },
        contexts=(
            "we went on a free Sunday",
            "it fills three rooms on the first floor",
            "it is on until October",
            "I had an hour to spare",
        ),
    ),
    Domain(
        items="series, drama",
        maker="writer",
        earlier="the first season, the original, *the Danish version",
        aspects=(
            "the pacing: brisk, confident / sluggish, uneven",
            "the villains: chilling, complex / silly, cardboard",
            "the pilot: gripping, promising / dull, chaotic",
            "the subplots: touching, clever / pointless, tangled",
            "the humour: dry, warm / childish, forced",
            "the finale: thrilling, moving / rushed, absurd",
            "*the narration: wry, soothing / smug, droning",
        ),
        verdicts={
            2: (
                "I watched all of it in one night",
                "I started again as soon as it was over",
                "*my whole office now speaks in quotes from it",
            ),
            1: (
                "I look forward to the next season",
                "one more episode turned into three",
                "*it has made the ironing a good deal quicker",
            ),
            0: ("it is fine to have on while you cook", "I neither follow it nor switch it off"),
            -1: (
                "I kept scrolling through my phone during it",
                "I lost interest around the third episode",
                "*I fell asleep twice and missed nothing",
            ),
            -2: (
                "I turned it off after ten minutes and cancelled the channel",
                "I want those eight hours back",
                "*I would rather watch my laundry spin",
            ),
        },
        contexts=(
            "it has eight episodes",
            "my flatmate put it on",
            "it is set in a hospital",
            "we watch it on Fridays",
        ),
    ),
    Domain(
        items="game, adventure",
        maker="studio",
        earlier="the previous part, the demo, *the board game behind it",
        aspects=(
            "the graphics: pretty, polished / ugly, dated",
            "the controls: smooth, precise / fiddly, sluggish",
            "the puzzles: clever, varied / tedious, unfair",
            "the story: touching, funny / thin, cliched",
            "the music: catchy, calming / grating, repetitive",
            "the fights: exciting, fair / clumsy, endless",
            "*the tutorial: brief, helpful / condescending, endless",
        ),
        verdicts={
            2: (
                "I looked up and it was four in the morning",
                "I finished it and started again at once",
                "*my family had to hide the controller from me",
            ),
            1: (
                "it is the one I reach for after work",
                "the weekend went by in no time",
                "*my daughter and I finished it hand in hand",
            ),
            0: ("I played it, I put it away and that was that", "it is a way to wait for something else to come out"),
            -1: (
                "I only kept going because I had paid for it",
                "I have not opened it since March",
                "*I was relieved when the disc got scratched",
            ),
            -2: (
                "it crashed so often that I deleted it",
                "I got a refund within the hour",
                "*I would sooner file my taxes for fun",
            ),
        },
        contexts=(
            "I played it on a laptop",
            "it takes about thirty hours",
            "it came out in November",
            "a friend lent it to me",
        ),
    ),
    Domain(
        unseen=True,
        items="podcast, programme",
        maker="host",
        earlier="the pilot, the old format",
        aspects=(
            "the interviews: candid, lively / shallow, awkward",
            "the sound quality: crisp, warm / muffled, patchy",
            "the stories: gripping, touching / rambling, stale",
            "the jokes: fresh, sly / laboured, mean",
        ),
        verdicts={
            2: ("I have heard every episode three times", "I now take the long way to work to hear more"),
            1: ("it makes the washing-up fly by", "I always learn something from it"),
            0: ("it is something to have on in the background", "I listen when there is nothing else"),
            -1: ("I tend to lose the thread after five minutes", "I skip at least half of every episode"),
            -2: ("I unsubscribed before the first break", "silence on the bus has never sounded better"),
        },
        contexts=("it comes out every Thursday", "each part lasts half an hour", "I listen to it on the bus"),
    ),
    Domain(
        unseen=True,
        items="boat trip, tour",
        maker="guide",
        earlier="the walking tour, the one we took in Spain",
        aspects=(
            "the scenery: striking, peaceful / monotonous, grey",
            "the commentary: funny, informative / dull, inaudible",
            "the lunch on board: tasty, generous / meagre, cold",
            "the seats: comfortable, roomy / hard, cramped",
        ),
        verdicts={
            2: ("my children still talk about it every day", "we went round a second time that afternoon"),
            1: ("the day was over before we knew it", "I would take visitors on it"),
            0: ("we got on, we got off and we had seen the river", "it gets you to the other side and back"),
            -1: ("most of us were looking at the clock", "I was glad to be back on land"),
            -2: ("I was counting the minutes until they let us off", "they should pay people to come along"),
        },
        contexts=("we left at nine in the morning", "there were about twenty of us", "it was our last day there"),
    ),
)

VALUES = (-2, -1, 0, 1, 2)
REVIEW_KINDS = {"aspect": 0.28, "whole": 0.10, "verdict": 0.12, "contrast": 0.26, "agreement": 0.10, "frame": 0.14}
CLASS_SHARES = {"0": 0.14, "1": 0.25, "2": 0.19, "3": 0.26, "4": 0.16}
SENTIMENT_SLIPS = 0.05  # share of the reviews whose annotator chose the class next to the right one


@dataclass(frozen=True)
class Clause:
    text: str
    value: int


def is_plural(noun: str) -> bool:
    return noun.endswith("s") and not noun.endswith("ss")


def split_aspect(entry: str) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """The noun, its good words and its bad words, from 'the acting: convincing / wooden'."""
    noun, words = entry.split(": ")
    good, bad = words.split(" / ")
    return noun, table(good), table(bad)


def review_slots(draw: Draw, domain: Domain) -> dict[str, Sequence[str]]:
    """The slots of one clause: two aspects with matching verb forms, and the words that suit the first of them."""
    first = draw.one(domain.aspects)
    noun, good, bad = split_aspect(first)
    other = split_aspect(draw.one(domain.aspects, besides=[first]))[0]
    singular, plural = ("is", "are") if draw.chance(0.4) else ("was", "were")
    return GRADES | {
        "good": GRADES["good"] + good * 2,
        "poor": GRADES["poor"] + bad * 2,
        "aspect": [noun],
        "is": [plural if is_plural(noun) else singular],
        "other": [other],
        "are": [plural if is_plural(other) else singular],
        "was": [singular],
        "item": [draw.one(table(domain.items))],
        "maker": [domain.maker],
        "earlier": table(domain.earlier),
    }


def about_aspect(draw: Draw, domain: Domain, value: int) -> str:
    subject = draw.one(ASPECT_SUBJECTS).replace("{predicate}", draw.one(PREDICATES[value]))
    return fill(draw, subject, review_slots(draw, domain))


def about_whole(draw: Draw, domain: Domain, value: int) -> str:
    """A clause about the whole thing; it takes the general words only, since those of an aspect need not suit it."""
    subject = draw.one(ITEM_SUBJECTS).replace("{predicate}", draw.one(PREDICATES[value]))
    return fill(draw, subject, review_slots(draw, domain) | GRADES)


def verdict(draw: Draw, domain: Domain, value: int) -> str:
    return draw.one(domain.verdicts[value])


def joined(draw: Draw, domain: Domain, joins: Sequence[str], values: Sequence[int]) -> str:
    """Two clauses of the given values: the first about an aspect, the second about another one or about the whole."""
    nouns = [split_aspect(entry)[0] for entry in draw.allowed(domain.aspects)]
    first = about_aspect(draw, domain, values[0])
    second = draw.pick((about_aspect, about_whole, verdict))(draw, domain, values[1])
    while any(noun in first and noun in second for noun in nouns) or first.split()[-2:] == second.split()[-2:]:
        second = about_aspect(draw, domain, values[1])
    return fill(draw, draw.one(joins), {"first": [first], "second": [second]})


def core_of_review(draw: Draw, domain: Domain, kind: str) -> Clause:
    value = draw.pick(VALUES)
    if kind == "contrast":
        first, second, value = draw.pick(CONTRASTS)
        return Clause(joined(draw, domain, CONTRAST_JOINS, (first, second)), value)
    if kind == "agreement":
        return Clause(joined(draw, domain, AGREEMENT_JOINS, (value, value)), value)
    if kind == "frame":
        return Clause(fill(draw, draw.one(FRAMES[value]), review_slots(draw, domain) | GRADES), value)
    return Clause({"aspect": about_aspect, "whole": about_whole, "verdict": verdict}[kind](draw, domain, value), value)


def review(draw: Draw) -> Clause:
    """A whole review: its core, at times an opening phrase, at times a sentence that says nothing about quality."""
    domain = draw.pick([domain for domain in DOMAINS if draw.unseen or not domain.unseen])
    kind = draw.weighted(REVIEW_KINDS)
    core = core_of_review(draw, domain, kind)
    text = f"{draw.one(OPENERS)}, {core.text}" if kind != "frame" and draw.chance(0.2) else core.text
    if draw.chance(0.75 if kind == "verdict" else 0.2):
        context = draw.one(domain.contexts)
        comes_first = context.startswith("it ") or draw.chance(0.5)
        text = f"{context}. {text}" if comes_first else f"{text}. {context}"
    return Clause(polish(f"{text}."), core.value)


def sentiment_row(draw: Draw) -> tuple[str, str]:
    """A review of 6 to 25 words and its class as an annotator gave it. The class is drawn first, the review to fit."""
    wanted = int(draw.weighted(CLASS_SHARES))
    found = review(draw)
    while found.value + 2 != wanted or not 6 <= len(found.text.split()) <= 25:
        found = review(draw)
    label = wanted
    if draw.chance(SENTIMENT_SLIPS):
        label += 1 if label == 0 or (label < 4 and draw.chance(0.5)) else -1
    return found.text, str(label)


# ---------------------------------------------------------------------------------------------------------------------
# Paraphrase: two questions and whether they ask the same thing
# ---------------------------------------------------------------------------------------------------------------------

CITIES = table(
    "Paris, Rome, Berlin, Madrid, Vienna, Lisbon, Prague, London, Dublin, Athens, Munich, Milan, Budapest, "
    "*Oslo, *Krakow, *Seville, *Geneva, *Naples"
)
COUNTRIES = table(
    "Spain, Canada, Japan, Brazil, India, Kenya, Norway, Mexico, Poland, Turkey, Chile, Egypt, "
    "Britain=the United Kingdom, the United States=America, *Peru, *Vietnam, *Portugal, *Morocco, "
    "*the Netherlands=Holland"
)
LANGUAGES = table(
    "Spanish, French, Japanese, Arabic, Russian, Italian, Korean, German, Hindi, *Turkish, *Dutch, *Greek"
)
SKILLS = table(
    "chess, programming=coding, the piano, the guitar, public speaking=giving speeches, calligraphy, "
    "swimming, yoga, drawing=sketching, sewing=needlework, photography=taking photos, *juggling, "
    "*the violin=the fiddle, *woodwork=carpentry, *skiing"
)
JOBS = table(
    "nurse, pilot, lawyer=attorney, teacher=schoolteacher, plumber, translator, architect, baker, "
    "doctor=physician, firefighter=fireman, journalist=reporter, programmer=software developer, *midwife, "
    "*actor, *flight attendant=stewardess, *vet=animal doctor"
)
FOODS = table(
    "rice, chicken, spinach, salmon, tofu=bean curd, pasta, beef, cabbage, couscous, lamb, broccoli, "
    "tuna=tuna fish, *quinoa, *pumpkin, *cauliflower, *ham, *squid=calamari"
)
PLANTS = table(
    "tomatoes, roses, carrots, strawberries, tulips, peas, sunflowers, potatoes=spuds, onions, daffodils, "
    "beans, *courgettes=zucchini, *aubergines=eggplants, *lilies, *leeks"
)
PETS = table(
    "cats, dogs, rabbits=bunnies, hamsters, parrots, goldfish, guinea pigs, ponies=small horses, "
    "*budgies=budgerigars, *turtles=tortoises, *ferrets"
)
TREATS = table(
    "grapes, cheese, honey, raw carrots=uncooked carrots, apples, nuts, sweets=candy, "
    "boiled rice=cooked rice, bananas, *mango, *peanuts=groundnuts, *crisps=potato chips"
)
DEVICES = table(
    "phone=mobile, laptop=notebook, tablet, printer, router, television=TV, smart watch, "
    "e-reader=e-book reader, *projector, *games console=video game console"
)
PICTURE_DEVICES = table(
    "phone=mobile, laptop=notebook, tablet, camera, television=TV, old computer=old PC, "
    "e-reader=e-book reader, *drone, *games console=video game console"
)
SITES = table(
    "Facebook, Instagram, Twitter, Gmail=Google Mail, LinkedIn, Spotify, Netflix, Snapchat, *Pinterest, "
    "*Dropbox, *Skype"
)
SOFTWARE = table(
    "Python, Java, Photoshop=Adobe Photoshop, Docker, Excel=Microsoft Excel, Chrome=the Chrome browser, "
    "Git, Skype, Firefox, *Blender, *MySQL, *Word=Microsoft Word"
)
SYSTEMS = table(
    "Windows=Microsoft Windows, Linux, a Mac=an Apple computer, an old laptop=an aged notebook, Ubuntu, "
    "*a tablet, *Debian"
)
SUBJECTS_OF_STUDY = table(
    "physics, statistics, philosophy, economics, algebra, biology, law, chemistry, psychology, "
    "music theory=the theory of music, *geology, *linguistics=language science, *astronomy"
)
MONTHS = table("January, March, April, June, July, September, October, December, *February, *May, *November")
BODIES = table("Mars, Venus, Jupiter, Saturn, the Moon, Mercury, Neptune, *Pluto, *Uranus")
LANDMARKS = table(
    "the Eiffel Tower, the Great Wall=the Great Wall of China, the Colosseum, Big Ben, "
    "the Panama Canal, the Taj Mahal, the Berlin Wall, Stonehenge, *the Suez Canal, *the Acropolis, "
    "*Brooklyn Bridge"
)
THINGS_INVENTED = table(
    "the telephone=the phone, the bicycle=the bike, paper money=the banknote, the zip=the zipper, "
    "the light bulb=the electric lamp, chewing gum, the compass, "
    "the microwave oven=the microwave, the pencil, *the umbrella, *the typewriter, "
    "*the parachute, *the fridge=the refrigerator, *the car=the automobile"
)
HABITS = table(
    "smoking=using tobacco, biting my nails=chewing my fingernails, snoring, eating sweets=eating candy, "
    "checking my phone=looking at my mobile, procrastinating=putting things off, "
    "interrupting people=talking over others, drinking so much coffee, *swearing=cursing, "
    "*grinding my teeth, *buying clothes I do not need=buying clothes that I have no use for"
)
RELATIVES = table(
    "mother=mum, father=dad, sister, brother, partner=other half, daughter, son, "
    "best friend=closest friend, roommate=flatmate, neighbour, aunt, *grandmother=grandma, *cousin, "
    "*grandfather=granddad, *uncle"
)
SUMS = table(
    "500=five hundred, 1000=a thousand, 2000=two thousand, 5000=five thousand, 10000=ten thousand, "
    "20000=twenty thousand, 50000, *3000=three thousand, *8000=eight thousand, *15000=fifteen thousand, "
    "*40000"
)
WEEKS = table("four=4, six=6, eight=8, ten=10, twelve=12, sixteen=16, *five=5, *seven=7, *nine=9, *fourteen=14")
AGES = table("25, 30=thirty, 35, 40=forty, 45, 50=fifty, 60=sixty, *28, *33, *55, *70=seventy")
FILE_TYPES = table(
    "a PDF, a Word document=a Word file, an Excel sheet=an Excel table, a JPEG=a JPG image, "
    "a text file=a plain text document, a PNG, a web page=an HTML page, *an EPUB=an e-book file, "
    "*a CSV file"
)
UNITS = table("miles, kilometres, inches, feet, centimetres, metres, furlongs, *yards, *nautical miles, *millimetres")
STAINS = table("coffee, red wine, blood, ink, grass, oil=grease, chocolate, *curry, *ketchup=tomato sauce, *lipstick")
FABRICS = table(
    "carpet=rug, white shirt, wool jumper=woollen sweater, sofa=couch, silk scarf, "
    "pair of jeans=pair of denims, mattress, *leather bag, *curtain=drape, *tent"
)
CUISINES = table("Thai, Italian, Indian, Mexican, Japanese, Greek, Lebanese, Ethiopian, *Korean, *Georgian, *Peruvian")
DRINKS = table(
    "coffee, green tea, a glass of water=some water, a protein shake, orange juice, "
    "*a beer=a pint of beer, *warm milk=hot milk"
)
MOMENTS = table(
    "a run=a jog, a meal, bedtime=going to bed, an exam=a test, a flight=a plane trip, "
    "a workout=a gym session, *a swim, *surgery=an operation, *an interview"
)
INSTRUMENTS = table(
    "violin=fiddle, guitar, road bike=racing bicycle, camera, telescope, sewing machine, tent, "
    "drum kit=drum set, piano, *surfboard, *saxophone, *laptop=notebook computer"
)
EXAMS = table(
    "the driving test=the driving exam, the bar exam, my maths final=my final in mathematics, "
    "the citizenship test=the naturalisation exam, my French oral=my spoken French exam, "
    "the entrance exam=the admission test, *my chemistry retake, *my history quiz=my history test"
)
TEAMS = table("France, Argentina, Croatia, Italy, Belgium, Sweden, England, Ghana, Japan, *Uruguay, *Denmark, *Senegal")
EVENTS = table(
    "a job interview=an interview for a job, a wedding=a marriage ceremony, a funeral=a burial, "
    "a first date, a graduation, a business lunch=a working lunch, *a christening=a baptism, "
    "*a court hearing, *a school reunion=a class reunion"
)
ALLERGENS = table("peanuts, milk=dairy, pollen, cats, shellfish, eggs, dust, wheat, *soya, *wasp stings, *kiwis")
MATERIALS = table("wood=timber, copper, plastic, glass, steel, cotton, rubber, wool, *bamboo, *marble, *linen")


@dataclass(frozen=True)
class Topic:
    """Questions about one thing.

    intents: each one is a set of wordings of one question. Wordings of the same rank in two intents resemble each
        other: the near misses come from there.
    order: 'matters' if exchanging x and y makes another question, 'free' if it makes the same one, '' without x and y.
    """

    slots: Mapping[str, tuple[str, ...]]
    intents: tuple[tuple[str, ...], ...]
    order: str = ""
    unseen: bool = False


TOPICS = (
    Topic(
        {"x": CITIES, "y": CITIES},
        order="matters",
        intents=(
            (
                "What is the {cheapest|least expensive} way to get from {x} to {y}?",
                "How can I travel from {x} to {y} without spending much?",
                "To get from {x} to {y}, which is the {cheapest|least expensive} way?",
                "I am short of money. Which route should I take from {x} to {y}?",
                "*On a tight budget, how do I make it from {x} to {y}?",
            ),
            (
                "What is the {fastest|quickest} way to get from {x} to {y}?",
                "How can I travel from {x} to {y} without losing much time?",
                "To get from {x} to {y}, which is the {fastest|quickest} way?",
                "I am short of time. Which route should I take from {x} to {y}?",
                "*In a great hurry, how do I make it from {x} to {y}?",
            ),
        ),
    ),
    Topic(
        {"x": CITIES, "y": CITIES},
        order="matters",
        intents=(
            (
                "How long does the train from {x} to {y} take?",
                "How many hours is it from {x} to {y} by rail?",
                "If I leave {x} by train, how soon will I be in {y}?",
                "*What is the rail journey time from {x} to {y}?",
            ),
            (
                "How much does the train from {x} to {y} cost?",
                "How many euros is it from {x} to {y} by rail?",
                "If I leave {x} by train, what will I pay to be in {y}?",
                "*What is the rail fare from {x} to {y}?",
            ),
            (
                "How often does the train from {x} to {y} run?",
                "How many times a day can I go from {x} to {y} by rail?",
                "If I leave {x} by train, how many departures to {y} can I choose from?",
            ),
        ),
    ),
    Topic(
        {"x": LANGUAGES, "y": LANGUAGES},
        order="matters",
        intents=(
            (
                "Where can I {find|hire} someone to translate a letter from {x} into {y}?",
                "Who could turn my {x} letter into {y}?",
                "I have a letter in {x} and need it in {y}. Whom do I ask?",
                "*Which agency would put a {x} letter into {y} for me?",
            ),
            (
                "How much does it cost to translate a letter from {x} into {y}?",
                "What would I pay to turn my {x} letter into {y}?",
                "I have a letter in {x} and need it in {y}. What will that cost?",
                "*Which agency is cheapest for putting a {x} letter into {y}?",
            ),
        ),
    ),
    Topic(
        {"x": UNITS, "y": UNITS},
        order="matters",
        intents=(
            (
                "How do I convert {x} to {y}?",
                "What is the formula for turning {x} into {y}?",
                "If I have a figure in {x}, how do I get it in {y}?",
                "*By what must I multiply {x} to get {y}?",
            ),
            (
                "Why do some countries use {x} and not {y}?",
                "What is the reason that some places prefer {x} over {y}?",
                "If a country measures in {x}, why does it not use {y}?",
            ),
        ),
    ),
    Topic(
        {"x": FILE_TYPES, "y": FILE_TYPES},
        order="matters",
        intents=(
            (
                "How do I {convert|change} {x} to {y}?",
                "Which tool turns {x} into {y}?",
                "Can I make {y} out of {x}, and how?",
                "*I have {x} but need {y}. What should I do?",
            ),
            (
                "Why does converting {x} to {y} lose quality?",
                "Why does quality get lost when I turn {x} into {y}?",
                "If I make {y} out of {x}, why does it look worse?",
            ),
        ),
    ),
    Topic(
        {"x": COUNTRIES, "y": COUNTRIES},
        order="matters",
        intents=(
            (
                "Do citizens of {x} need a visa {for|to enter} {y}?",
                "Can I enter {y} without a visa on a passport from {x}?",
                "I hold a passport from {x}. Is a visa required for {y}?",
                "*Must a person from {x} apply for a visa to see {y}?",
            ),
            (
                "How long can citizens of {x} stay in {y}?",
                "For how many days may I be in {y} on a passport from {x}?",
                "I hold a passport from {x}. How long am I allowed to stay in {y}?",
                "*After how long must a person from {x} leave {y}?",
            ),
        ),
    ),
    Topic(
        {"x": COUNTRIES, "y": COUNTRIES},
        order="matters",
        intents=(
            (
                "Why do so many people move from {x} to {y}?",
                "What makes people leave {x} for {y}?",
                "What is the reason behind the migration from {x} to {y}?",
                "*Why is {y} so popular with emigrants from {x}?",
            ),
            (
                "How do I send money from {x} to {y}?",
                "Which is the best service for a transfer from {x} to a bank in {y}?",
                "I live in {x}. How do I pay someone in {y}?",
                "*What should I use to wire cash from {x} to {y}?",
            ),
            (
                "How do I send a parcel from {x} to {y}?",
                "Which is the best service for a package from {x} to a home in {y}?",
                "I live in {x}. How do I post a box to someone in {y}?",
            ),
        ),
    ),
    Topic(
        {"x": TEAMS, "y": TEAMS},
        order="matters",
        intents=(
            (
                "How did {x} manage to beat {y}?",
                "What allowed {x} to win against {y}?",
                "Why did {y} lose to {x}?",
                "*How come {x} came out on top against {y}?",
            ),
            (
                "When did {x} last beat {y}?",
                "In which year did {x} last win against {y}?",
                "When did {y} last lose to {x}?",
                "*How long ago was it that {x} came out on top against {y}?",
            ),
        ),
    ),
    Topic(
        {"x": RELATIVES, "y": RELATIVES},
        order="matters",
        intents=(
            (
                "How can I make my {x} trust my {y} again?",
                "What would help my {x} to have faith in my {y} once more?",
                "My {x} no longer trusts my {y}. What can I do?",
                "*How do I win back the trust of my {x} in my {y}?",
            ),
            (
                "Should my {x} lend money to my {y}?",
                "Is it wise for my {y} to borrow money from my {x}?",
                "My {y} wants a loan from my {x}. Is that a good idea?",
                "*Would you let your {x} give your {y} a loan?",
            ),
            (
                "Should my {x} apologise to my {y}?",
                "Does my {y} deserve to hear my {x} say sorry?",
                "My {y} wants an apology from my {x}. Is that fair?",
            ),
        ),
    ),
    Topic(
        {"x": PICTURE_DEVICES, "y": PICTURE_DEVICES},
        order="matters",
        intents=(
            (
                "How do I {transfer|move} photos from my {x} to my {y}?",
                "What is the easiest way to get pictures off my {x} onto my {y}?",
                "My pictures are on my {x}. How do I put them on my {y}?",
                "*Can you copy images from a {x} over to a {y}, and how?",
            ),
            (
                "Why do the photos from my {x} look worse on my {y}?",
                "What makes pictures off my {x} so ugly on my {y}?",
                "My pictures look fine on my {x}. Why not on my {y}?",
            ),
        ),
    ),
    Topic(
        {"x": SUBJECTS_OF_STUDY, "y": SUBJECTS_OF_STUDY},
        order="free",
        intents=(
            (
                "Is it better to study {x} or {y}?",
                "Which should I choose at university, {x} or {y}?",
                "I cannot decide between {x} and {y}. Which degree is the wiser choice?",
                "*Should I take {x} or {y} as my major?",
            ),
            (
                "Is it possible to study {x} and {y} together?",
                "Can I choose both at university, {x} and {y}?",
                "I do not want to decide between {x} and {y}. Can I take a degree in both?",
                "*May I combine {x} and {y} as my majors?",
            ),
            (
                "What do {x} and {y} have in common?",
                "In what way are {x} and {y} alike?",
                "How much do {x} and {y} overlap?",
            ),
        ),
    ),
    Topic(
        {"x": LANGUAGES, "y": LANGUAGES},
        order="free",
        intents=(
            (
                "What is the difference between {x} and {y}?",
                "How do {x} and {y} differ?",
                "In which ways are {x} and {y} not alike?",
                "*What sets {x} apart from {y}?",
            ),
            (
                "What is the similarity between {x} and {y}?",
                "How are {x} and {y} related?",
                "In which ways are {x} and {y} alike?",
                "*What does {x} share with {y}?",
            ),
            (
                "Which is harder to learn, {x} or {y}?",
                "Is {x} or {y} the more difficult language?",
                "Between {x} and {y}, which one takes more effort?",
            ),
        ),
    ),
    Topic(
        {"x": CITIES, "y": CITIES},
        order="free",
        intents=(
            (
                "Is {x} or {y} the {cheaper|less expensive} place to live?",
                "Where is rent lower, in {x} or in {y}?",
                "Between {x} and {y}, which city is easier on the wallet?",
                "*If I want to save money, should I settle in {x} or {y}?",
            ),
            (
                "Is {x} or {y} the {nicer|prettier} place to visit?",
                "Where is a holiday more fun, in {x} or in {y}?",
                "Between {x} and {y}, which city is better for tourists?",
                "*If I want a good weekend, should I go to {x} or {y}?",
            ),
            (
                "How far apart are {x} and {y}?",
                "What is the distance between {x} and {y}?",
                "How many kilometres lie between {x} and {y}?",
            ),
        ),
    ),
    Topic(
        {"x": MATERIALS, "y": MATERIALS},
        order="free",
        intents=(
            (
                "Which is {stronger|tougher}, {x} or {y}?",
                "Does {x} or {y} break more easily?",
                "Between {x} and {y}, which can bear the greater load?",
                "*Would {x} or {y} last longer under strain?",
            ),
            (
                "Which is better for the environment, {x} or {y}?",
                "Does {x} or {y} do less harm to nature?",
                "Between {x} and {y}, which is the greener choice?",
                "*Would {x} or {y} pollute less?",
            ),
            (
                "How can I glue {x} to {y}?",
                "What sticks {x} and {y} together?",
                "Which adhesive holds both {x} and {y}?",
            ),
        ),
    ),
    Topic(
        {"skill": SKILLS},
        intents=(
            (
                "How long does it take to {learn|master} {skill}?",
                "How many months of practice does {skill} need?",
                "If I take up {skill} today, when will I be good at it?",
                "*How soon can a beginner become decent at {skill}?",
            ),
            (
                "What is the best way to {learn|master} {skill}?",
                "Which kind of practice does {skill} need?",
                "If I take up {skill} today, how do I become good at it?",
                "*How should a beginner approach {skill}?",
            ),
            (
                "Is it worth it to {learn|master} {skill}?",
                "What do I gain from practising {skill}?",
                "If I take up {skill} today, will it be of any use to me?",
                "*Why should a beginner bother with {skill}?",
            ),
            (
                "Where can I {learn|take lessons in} {skill}?",
                "Which place offers classes in {skill}?",
                "If I want to take up {skill} today, where do I go?",
            ),
        ),
    ),
    Topic(
        {"age": AGES, "skill": SKILLS},
        intents=(
            (
                "Is {age} too old to {start|begin} {skill}?",
                "Can I still take up {skill} at {age}?",
                "I am {age} and would like to try {skill}. Is it too late?",
                "*Does it make sense to begin {skill} at the age of {age}?",
            ),
            (
                "How do I {start|begin} {skill} at {age}?",
                "What should I do first to take up {skill} at {age}?",
                "I am {age} and would like to try {skill}. Where do I begin?",
                "*What is the first step in {skill} at the age of {age}?",
            ),
        ),
    ),
    Topic(
        {"job": JOBS},
        intents=(
            (
                "How do I become a {job}?",
                "What does it take to work as a {job}?",
                "Which steps lead to a career as a {job}?",
                "*I dream of being a {job}. Where do I start?",
            ),
            (
                "How much does a {job} earn?",
                "What does it pay to work as a {job}?",
                "Which salary comes with a career as a {job}?",
                "*I dream of being a {job}. Does it pay well?",
            ),
            (
                "Why did you become a {job}?",
                "What made you want to work as a {job}?",
                "Which reasons led you to a career as a {job}?",
            ),
            (
                "How do I stop being a {job}?",
                "What can I do after years of work as a {job}?",
                "Which jobs are open to me after a career as a {job}?",
                "*I am tired of being a {job}. How do I get out?",
            ),
        ),
    ),
    Topic(
        {"food": FOODS},
        intents=(
            (
                "How long can you keep {food} in the fridge?",
                "After how many days does {food} in the fridge go bad?",
                "For how long is {food} safe to eat if it has been chilled?",
                "*When should I throw out {food} from my fridge?",
            ),
            (
                "Should you keep {food} in the fridge?",
                "Does {food} go bad if it is not in the fridge?",
                "Is {food} safe to eat if it has not been chilled?",
                "*Can I store {food} outside my fridge?",
            ),
            (
                "Can you keep {food} in the freezer?",
                "Does {food} survive being frozen?",
                "Is {food} safe to eat if it has been frozen?",
                "*Would it hurt {food} to go into my freezer?",
            ),
            ("How do you cook {food}?", "What is the right way to prepare {food}?", "How is {food} made on the stove?"),
        ),
    ),
    Topic(
        {"pet": PETS, "treat": TREATS},
        intents=(
            (
                "{Can|May} {pet} eat {treat}?",
                "Is it safe to feed {treat} to {pet}?",
                "Am I allowed to give {treat} to {pet}?",
                "*Would {treat} harm {pet}?",
            ),
            ("Why do {pet} like {treat}?", "What makes {pet} so fond of {treat}?", "Why do {pet} go wild for {treat}?"),
            (
                "How do I stop my {pet} from eating {treat}?",
                "What keeps {pet} away from {treat}?",
                "My {pet} keep eating {treat}. How do I stop them?",
            ),
        ),
    ),
    Topic(
        {"pet": PETS},
        intents=(
            (
                "How long do {pet} live?",
                "What is the life span of {pet}?",
                "Up to what age can {pet} live?",
                "*How old do {pet} usually get?",
            ),
            (
                "How often do {pet} need to see a vet?",
                "What is the right time between check-ups for {pet}?",
                "How many times a year should {pet} see a vet?",
            ),
            (
                "Where do {pet} live in the wild?",
                "What is the natural home of {pet}?",
                "In which places can wild {pet} live?",
            ),
            (
                "Why do {pet} hide when they are ill?",
                "What makes sick {pet} crawl away?",
                "For what reason do {pet} conceal pain?",
            ),
        ),
    ),
    Topic(
        {"device": DEVICES},
        intents=(
            (
                "How do I reset my {device}?",
                "What is the way to restore my {device} to factory settings?",
                "I want to wipe my {device} completely. What do I press?",
                "*How can a {device} be put back to its original state?",
            ),
            (
                "Should I reset my {device}?",
                "Is it a good idea to restore my {device} to factory settings?",
                "I could wipe my {device} completely. Would that help?",
                "*Is it wise to put a {device} back to its original state?",
            ),
            (
                "Why did my {device} reset itself?",
                "What made my {device} go back to factory settings?",
                "My {device} wiped itself completely. What happened?",
            ),
        ),
    ),
    Topic(
        {"device": DEVICES},
        intents=(
            (
                "Why is my {device} so {slow|sluggish}?",
                "What makes my {device} take so long to respond?",
                "My {device} reacts with a long delay. What is the cause?",
                "*For what reason would a {device} be this slow?",
            ),
            (
                "Why is my {device} so {hot|warm}?",
                "What makes my {device} heat up so much?",
                "My {device} gets far too hot. What is the cause?",
                "*For what reason would a {device} overheat?",
            ),
            (
                "How do I make my {device} faster?",
                "What would make my {device} respond sooner?",
                "My {device} reacts with a long delay. What is the cure?",
                "*By what means can one speed up a {device}?",
            ),
            (
                "How do I cool down my {device}?",
                "What would make my {device} heat up less?",
                "My {device} gets far too hot. What is the cure?",
            ),
        ),
    ),
    Topic(
        {"site": SITES},
        intents=(
            (
                "How do I {delete|close} my {site} account?",
                "What is the way to leave {site} for good?",
                "I no longer want to be on {site}. How do I get rid of my account?",
                "*Where on {site} can I remove my profile for ever?",
            ),
            (
                "How do I {recover|restore} my {site} account?",
                "What is the way to get back into {site}?",
                "I can no longer log in on {site}. How do I get back my account?",
                "*Where on {site} can I regain my lost profile?",
            ),
            (
                "Who can {delete|close} my {site} account without asking me?",
                "Who is able to throw me out of {site} for good?",
                "I was told I may no longer be on {site}. Who can get rid of my account?",
            ),
            (
                "How do I change my {site} password?",
                "What is the way to set a new password on {site}?",
                "I no longer like my password on {site}. How do I replace it?",
            ),
        ),
    ),
    Topic(
        {"program": SOFTWARE, "system": SYSTEMS},
        intents=(
            (
                "How do I install {program} on {system}?",
                "What is the way to get {program} onto {system}?",
                "On {system}, how do I install {program}?",
                "*Which steps put {program} on {system}?",
            ),
            (
                "How do I uninstall {program} on {system}?",
                "What is the way to get {program} off {system}?",
                "On {system}, how do I remove {program}?",
                "*Which steps wipe {program} from {system}?",
            ),
            (
                "How do I update {program} on {system}?",
                "What is the way to get the newest {program} onto {system}?",
                "On {system}, how do I bring {program} up to date?",
            ),
            (
                "Why does {program} crash on {system}?",
                "What makes {program} stop working on {system}?",
                "On {system}, why does {program} keep closing?",
            ),
        ),
    ),
    Topic(
        {"country": COUNTRIES},
        intents=(
            (
                "When is the best time to visit {country}?",
                "In which season should I travel to {country}?",
                "I am planning a trip to {country}. What time of year do you suggest?",
                "*Which months suit a holiday in {country}?",
            ),
            (
                "Where are the best places to visit in {country}?",
                "In which regions should I travel around {country}?",
                "I am planning a trip to {country}. What sights do you suggest?",
                "*Which towns suit a holiday in {country}?",
            ),
            (
                "How much time do you need to visit {country}?",
                "For how many weeks should I travel around {country}?",
                "I am planning a trip to {country}. How many days do you suggest?",
            ),
            (
                "Is it safe to visit {country}?",
                "Should I worry about crime when I travel to {country}?",
                "I am planning a trip to {country}. Is it dangerous?",
            ),
        ),
    ),
    Topic(
        {"city": CITIES, "month": MONTHS},
        intents=(
            (
                "What is the weather like in {city} in {month}?",
                "Is it warm in {city} in {month}?",
                "How hot or cold does {city} get in {month}?",
                "*What temperatures should I expect in {city} in {month}?",
            ),
            (
                "What should I pack for {city} in {month}?",
                "Which clothes do I need in {city} in {month}?",
                "How should I dress for {city} in {month}?",
                "*What should I put in my suitcase for {city} in {month}?",
            ),
            (
                "How crowded is {city} in {month}?",
                "Are there many tourists in {city} in {month}?",
                "How busy does {city} get in {month}?",
            ),
        ),
    ),
    Topic(
        {"city": CITIES, "sum": SUMS},
        intents=(
            (
                "Can a student live in {city} on {sum} euros a month?",
                "Is {sum} euros a month enough for a student in {city}?",
                "I will study in {city} with {sum} euros a month. Can I get by?",
                "*Would a monthly {sum} euros see me through my studies in {city}?",
            ),
            (
                "Can a student earn {sum} euros a month in {city}?",
                "Is it possible for a student in {city} to make {sum} euros a month?",
                "I will study in {city} and need to make {sum} euros a month. Is there work?",
            ),
        ),
    ),
    Topic(
        {"sum": SUMS},
        intents=(
            (
                "How should I invest {sum} dollars?",
                "What is a sensible thing to do with savings of {sum} dollars?",
                "I have {sum} dollars. Where should I put it so that it grows?",
                "*Where would you place {sum} dollars for a good return?",
            ),
            (
                "How can I borrow {sum} dollars?",
                "What is a sensible way to get a loan of {sum} dollars?",
                "I need {sum} dollars. Who would lend it to me?",
                "*Where would you ask for a credit of {sum} dollars?",
            ),
            (
                "How can I pay off {sum} dollars of debt?",
                "What is a sensible way out if I owe {sum} dollars?",
                "I owe {sum} dollars. How do I get rid of the debt?",
            ),
            (
                "How did you lose {sum} dollars?",
                "What is a stupid thing that cost you {sum} dollars?",
                "Who here has lost {sum} dollars, and how?",
            ),
        ),
    ),
    Topic(
        {"weeks": WEEKS},
        intents=(
            (
                "How can I {lose|drop} ten pounds in {weeks} weeks?",
                "What should I eat to get slimmer within {weeks} weeks?",
                "I am too heavy. What can I change in {weeks} weeks?",
                "*Which diet would make me lighter in {weeks} weeks?",
            ),
            (
                "How can I {gain|put on} ten pounds in {weeks} weeks?",
                "What should I eat to get heavier within {weeks} weeks?",
                "I am too thin. What can I change in {weeks} weeks?",
                "*Which diet would add to my weight in {weeks} weeks?",
            ),
            (
                "How can I train for a marathon in {weeks} weeks?",
                "What should I do to be ready for a marathon within {weeks} weeks?",
                "I run a marathon in {weeks} weeks. How do I prepare?",
            ),
        ),
    ),
    Topic(
        {"exam": EXAMS},
        intents=(
            (
                "Is it possible to pass {exam} without studying?",
                "Can I get through {exam} if I do not open a book?",
                "What are my chances in {exam} if I never prepare?",
                "*Does anyone pass {exam} with no preparation at all?",
            ),
            (
                "Is it possible to fail {exam} after studying?",
                "Can I flunk {exam} if I know every book by heart?",
                "How likely am I to fail {exam} if I prepare well?",
            ),
            (
                "How many times can I retake {exam}?",
                "How often may I sit {exam} again if I do not pass?",
                "How many attempts at {exam} does one get?",
                "*What is the limit on tries at {exam}?",
            ),
            (
                "How do I stay calm during {exam}?",
                "Can I do something about nerves in {exam}?",
                "What helps against panic in {exam}?",
            ),
        ),
    ),
    Topic(
        {"landmark": LANDMARKS},
        intents=(
            (
                "When was {landmark} built?",
                "How old is {landmark}?",
                "In what year did {landmark} go up?",
                "*From which period does {landmark} date?",
            ),
            (
                "Why was {landmark} built?",
                "What is {landmark} for?",
                "For what purpose did {landmark} go up?",
                "*For what reason did anyone put up {landmark}?",
            ),
            ("Who built {landmark}?", "Whose work is {landmark}?", "By whose hands did {landmark} go up?"),
            (
                "How was {landmark} built?",
                "What method was used for {landmark}?",
                "By what technique did {landmark} go up?",
            ),
        ),
    ),
    Topic(
        {"thing": THINGS_INVENTED},
        intents=(
            (
                "Who invented {thing}?",
                "Who came up with the idea of {thing}?",
                "To whom do we owe {thing}?",
                "*Whose invention is {thing}?",
            ),
            (
                "When was {thing} invented?",
                "When did someone come up with the idea of {thing}?",
                "Since when have we had {thing}?",
                "*What year saw the invention of {thing}?",
            ),
            (
                "How was {thing} invented?",
                "How did someone come up with the idea of {thing}?",
                "By what chance did we get {thing}?",
            ),
            (
                "What did people use before {thing} was invented?",
                "How did we manage without {thing} in the past?",
                "What did {thing} replace?",
            ),
        ),
    ),
    Topic(
        {"body": BODIES},
        intents=(
            (
                "How far is {body} from the Earth?",
                "What is the distance from here to {body}?",
                "How many kilometres separate us from {body}?",
                "*How long a way is it to {body}?",
            ),
            (
                "How big is {body}?",
                "What is the diameter of {body}?",
                "How many kilometres does {body} measure across?",
                "*How large a ball is {body}?",
            ),
            (
                "How hot is it on {body}?",
                "What is the temperature on {body}?",
                "How many degrees would I feel on {body}?",
            ),
            (
                "Could people ever live on {body}?",
                "Will there be a colony on {body} one day?",
                "Is it possible for humans to settle on {body}?",
            ),
        ),
    ),
    Topic(
        {"habit": HABITS},
        intents=(
            (
                "How do I stop {habit}?",
                "What helps against {habit}?",
                "I want to give up {habit}. What works?",
                "*Which trick lets me quit {habit}?",
            ),
            (
                "Why do I keep {habit}?",
                "What is behind {habit}?",
                "I cannot give up {habit}. Why is that?",
                "*What drives a person to keep {habit}?",
            ),
            (
                "Is {habit} really that bad?",
                "What harm is there in {habit}?",
                "Should I give up {habit}, or does it not matter?",
            ),
        ),
    ),
    Topic(
        {"person": RELATIVES},
        intents=(
            (
                "What should I give my {person} as a birthday present?",
                "Which gift would please my {person} on a birthday?",
                "The birthday of my {person} is near. What do I buy?",
                "*Any ideas for what to get my {person} when the big day comes?",
            ),
            (
                "What should I write to my {person} on a birthday card?",
                "Which words would please my {person} on a birthday?",
                "The birthday of my {person} is near. What do I write?",
            ),
            (
                "Should I invite my {person} to my birthday?",
                "Is it right to have my {person} at my birthday party?",
                "My birthday is near. Do I ask my {person} to come?",
            ),
        ),
    ),
    Topic(
        {"person": RELATIVES},
        intents=(
            (
                "How do I tell my {person} that I lost my job?",
                "How should I break the news to my {person} that I was fired?",
                "I am out of work and my {person} does not know. How do I say it?",
                "*What words should I use to let my {person} know I was laid off?",
            ),
            (
                "How do I hide from my {person} that I lost my job?",
                "How could I keep the news from my {person} that I was fired?",
                "I am out of work and my {person} must not know. How do I hide it?",
            ),
            (
                "How do I comfort my {person}, who lost a job?",
                "How should I react to the news that my {person} was fired?",
                "My {person} is out of work and I do not know what to say. Any advice?",
                "*What words should I use to cheer up my {person}, who was laid off?",
            ),
        ),
    ),
    Topic(
        {"plant": PLANTS},
        intents=(
            (
                "When should I plant {plant}?",
                "What is the right month for putting {plant} in the ground?",
                "In which season do {plant} go into the soil?",
                "*How early in the year can one sow or set {plant}?",
            ),
            (
                "Where should I plant {plant}?",
                "What is the right corner of the garden for {plant}?",
                "In which part of the garden do {plant} grow best?",
                "*Which spot outdoors would suit {plant}?",
            ),
            (
                "How often should I water {plant}?",
                "What is the right amount of water for {plant}?",
                "In dry weather, how much do {plant} need to drink?",
            ),
            (
                "Why are my {plant} dying?",
                "What is killing the {plant} in my garden?",
                "For what reason do {plant} wither?",
            ),
        ),
    ),
    Topic(
        {"stain": STAINS, "cloth": FABRICS},
        intents=(
            (
                "How do I get {stain} stains out of a {cloth}?",
                "What removes {stain} from a {cloth}?",
                "I spilt {stain} on a {cloth}. How do I clean it?",
                "*How can one rid a {cloth} of {stain} marks?",
            ),
            (
                "How do I keep {stain} from getting on a {cloth}?",
                "What protects a {cloth} against {stain}?",
                "I am afraid of {stain} on a {cloth}. How do I prevent it?",
            ),
        ),
    ),
    Topic(
        {"cuisine": CUISINES, "city": CITIES},
        intents=(
            (
                "Where can I eat good {cuisine} food in {city}?",
                "What is the best {cuisine} restaurant in {city}?",
                "I am in {city} and want {cuisine} food. Where should I go?",
                "*Whose {cuisine} kitchen is worth a visit in {city}?",
            ),
            (
                "Where can I learn to cook {cuisine} food in {city}?",
                "What is the best {cuisine} cooking class in {city}?",
                "I am in {city} and want to cook {cuisine} food. Who teaches it?",
            ),
            (
                "Why is {cuisine} food so popular in {city}?",
                "What explains the many {cuisine} restaurants in {city}?",
                "I am in {city} and see {cuisine} food everywhere. Why is that?",
            ),
        ),
    ),
    Topic(
        {"drink": DRINKS, "moment": MOMENTS},
        intents=(
            (
                "Should I have {drink} before {moment}?",
                "Is {drink} a good idea ahead of {moment}?",
                "Does it help to have {drink} before {moment}?",
                "*Would {drink} do me good right before {moment}?",
            ),
            (
                "Should I have {drink} after {moment}?",
                "Is {drink} a good idea following {moment}?",
                "Does it help to have {drink} after {moment}?",
                "*Would {drink} do me good right after {moment}?",
            ),
        ),
    ),
    Topic(
        {"thing": INSTRUMENTS},
        intents=(
            (
                "Which {thing} should a beginner buy?",
                "What is a good first {thing}?",
                "I am new to this. Can you recommend a {thing}?",
                "*What kind of {thing} suits someone who is just starting out?",
            ),
            (
                "Where should a beginner buy a {thing}?",
                "What is a good shop for a first {thing}?",
                "I am new to this. Where do I find a {thing}?",
            ),
            (
                "How do I sell a used {thing}?",
                "What is the way to find a buyer for an old {thing}?",
                "I am giving this up. Who would buy a {thing}?",
            ),
            (
                "Should a beginner rent or buy a {thing}?",
                "Is it wiser to buy or to rent a first {thing}?",
                "I am new to this. Do I hire a {thing} or get my own?",
            ),
        ),
    ),
    Topic(
        {"event": EVENTS},
        intents=(
            (
                "What should I wear to {event}?",
                "Which clothes are right for {event}?",
                "How do people dress for {event}?",
                "*I have {event} next week. Which outfit do you suggest?",
            ),
            (
                "What should I say at {event}?",
                "Which words are right for {event}?",
                "What do people usually say at {event}?",
                "*I have {event} next week. Which opening line do you suggest?",
            ),
            (
                "How early should I arrive at {event}?",
                "Which time is right for turning up at {event}?",
                "How long before the start do people come to {event}?",
            ),
        ),
    ),
    Topic(
        {"allergen": ALLERGENS},
        unseen=True,
        intents=(
            (
                "How do I know if I am allergic to {allergen}?",
                "What are the signs of an allergy to {allergen}?",
                "Can I test at home whether I react badly to {allergen}?",
            ),
            (
                "How can I stop being allergic to {allergen}?",
                "What are the cures for an allergy to {allergen}?",
                "Can I train my body not to react badly to {allergen}?",
            ),
            (
                "Why do people become allergic to {allergen}?",
                "What are the causes of an allergy to {allergen}?",
                "For what reason do people react badly to {allergen}?",
            ),
        ),
    ),
    Topic(
        {"subject": SUBJECTS_OF_STUDY},
        unseen=True,
        intents=(
            (
                "Which book about {subject} should I read first?",
                "What is a good introduction to {subject} in print?",
                "I want to get into {subject} by reading. Where do I start?",
            ),
            (
                "Which book about {subject} should nobody read?",
                "What is a poor introduction to {subject} in print?",
                "I want to avoid bad books on {subject}. Which ones are they?",
            ),
            (
                "How do I write a book about {subject}?",
                "What makes a good introduction to {subject} for authors to write?",
                "I want to publish something on {subject}. Where do I start?",
            ),
        ),
    ),
    Topic(
        {"x": SITES, "y": SITES},
        unseen=True,
        order="matters",
        intents=(
            (
                "Why do people prefer {x} to {y}?",
                "What does {x} have that {y} lacks?",
                "Why would anyone leave {y} for {x}?",
            ),
            (
                "Can I log in to {x} with {y}?",
                "Does {x} accept my account from {y}?",
                "Is a profile on {y} enough to enter {x}?",
            ),
        ),
    ),
    Topic(
        {"x": FOODS, "y": FOODS},
        unseen=True,
        order="free",
        intents=(
            (
                "Is {x} healthier than {y}, or the other way round?",
                "Which one does the body more good, {x} or {y}?",
                "Between {x} and {y}, which is the better choice for my health?",
            ),
            (
                "Can I cook {x} and {y} in one pot?",
                "Do {x} and {y} go together in a single pan?",
                "Is it all right to prepare {x} along with {y}?",
            ),
        ),
    ),
)

PARAPHRASE_SHARE = 0.44
SAME_KINDS = {"reworded": 0.6, "touched up": 0.4}  # see the functions of these names
DIFFERENT_KINDS = {"exchanged": 0.18, "changed": 0.54, "other intent": 0.14, "other topic": 0.14}
PARAPHRASE_SLIPS = 0.02  # share of the pairs whose annotator ticked the wrong box


@dataclass(frozen=True)
class Question:
    """One question of a topic: which intent, in which of its wordings, about what.

    values: slot -> its entry in the table, all names of the thing included.
    """

    topic: Topic
    intent: int
    wording: int
    values: Mapping[str, str]

    def text(self, draw: Draw) -> str:
        wording = draw.allowed(self.topic.intents[self.intent])[self.wording]
        return polish(fill(draw, wording, {name: [draw.one(entry.split("="))] for name, entry in self.values.items()}))


def wordings(draw: Draw, topic: Topic, intent: int) -> int:
    return len(draw.allowed(topic.intents[intent]))


def any_question(draw: Draw) -> Question:
    topic = draw.pick([topic for topic in TOPICS if draw.unseen or not topic.unseen])
    intent = draw.index(len(topic.intents))
    values: dict[str, str] = {}
    for name, entries in topic.slots.items():
        values[name] = draw.one(entries, besides=list(values.values()))
    return Question(topic, intent, draw.index(wordings(draw, topic, intent)), values)


def exchanged(question: Question) -> Question:
    """The same wording with x and y in each other's place."""
    return replace(question, values={**question.values, "x": question.values["y"], "y": question.values["x"]})


def reworded(draw: Draw, question: Question) -> Question:
    """Another wording of the same question; where order is free, x and y may also change places."""
    others = [rank for rank in range(wordings(draw, question.topic, question.intent)) if rank != question.wording]
    found = replace(question, wording=draw.pick(others))
    return exchanged(found) if question.topic.order == "free" and draw.chance(0.5) else found


def touched_up(question: Question) -> Question:
    """The same wording: what differs is a {this|that}, a name of the thing, or x and y where their order is free."""
    return exchanged(question) if question.topic.order == "free" else question


def changed(draw: Draw, question: Question) -> Question:
    """The same intent about another place, number or thing; often in the same wording."""
    name = draw.pick(list(question.values))
    value = draw.one(question.topic.slots[name], besides=list(question.values.values()))
    found = replace(question, values={**question.values, name: value})
    return found if draw.chance(0.45) else reworded(draw, found)


def other_intent(draw: Draw, question: Question) -> Question:
    """Another question about the same thing, in a wording that nearly always resembles the first one."""
    intent = draw.pick([rank for rank in range(len(question.topic.intents)) if rank != question.intent])
    count = wordings(draw, question.topic, intent)
    wording = question.wording if question.wording < count and draw.chance(0.9) else draw.index(count)
    return replace(question, intent=intent, wording=wording)


def different(draw: Draw, question: Question) -> Question:
    kind = draw.weighted(DIFFERENT_KINDS)
    if kind == "exchanged" and question.topic.order == "matters":
        found = exchanged(question)
        return found if draw.chance(0.75) else reworded(draw, found)
    if kind == "other intent":
        return other_intent(draw, question)
    if kind == "other topic":
        found = any_question(draw)
        while found.topic is question.topic:
            found = any_question(draw)
        return found
    return changed(draw, question)


def paraphrase_row(draw: Draw) -> tuple[str, str, str]:
    """Two questions that differ in their text, and 1.0 if they were marked as asking the same thing, else 0.0."""
    same = draw.chance(PARAPHRASE_SHARE)
    first = second = ""
    while first == second:
        question = any_question(draw)
        if not same:
            other = different(draw, question)
        elif draw.weighted(SAME_KINDS) == "reworded":
            other = reworded(draw, question)
        else:
            other = touched_up(question)
        first, second = question.text(draw), other.text(draw)
    label = same != draw.chance(PARAPHRASE_SLIPS)
    return first, second, "1.0" if label else "0.0"


# ---------------------------------------------------------------------------------------------------------------------
# Similarity: two statements and how much of what they state is the same, 0 to 5
# ---------------------------------------------------------------------------------------------------------------------
# A statement is an event: facts such as the agent, the action, the place. Two statements are as similar as the share
# of facts that they have in common, whatever the words and the order in which those are told.

FACT_WEIGHTS = {
    "agent": 3.0,
    "action": 4.0,
    "patient": 3.0,
    "place": 1.5,
    "time": 1.0,
    "agent_count": 1.0,
    "patient_count": 1.0,
    "agent_look": 1.0,
}
OWNERS = {"agent_count": "agent", "agent_look": "agent", "patient_count": "patient"}  # of no weight without their owner

PEOPLE = table(
    "man, woman=lady, boy, girl, nurse, teacher, soldier, tourist, farmer, student, doctor, waiter, "
    "sailor, clown, child=kid, *policeman=police officer, *chef=cook, *dancer, *monk, *athlete"
)
PEOPLE_LOOKS = table("old=elderly, young, tall, smiling, barefoot, *bearded, *slim=thin")
ANIMALS = table(
    "dog, cat, horse, goat, sheep, cow, fox, duck, pig, goose, wolf, rabbit=bunny, *donkey, *monkey, *llama, *rooster"
)
ANIMAL_LOOKS = table("brown, black, white, small=little, big=large, *spotted, *thin=skinny")
STREET = table(
    "in the street=on the road, in the park, on the beach=by the sea, in front of a church, "
    "at the station, near the bridge, outside a shop=outside a store, in a car park=in a parking lot, "
    "*by the lake, *at the airport"
)
INDOORS = table(
    "in the kitchen, in the garden=in the yard, in a large hall, on a balcony, in a tent, on the stage, "
    "in the living room=in the lounge, in a classroom, *in a garage, *on the roof"
)
FIELDS = table(
    "in a field=in a meadow, on the beach=by the sea, by the river, near the barn, in the yard, on a hill, "
    "under a tree, in the woods=in the forest, *in the snow, *on a dirt road"
)
CAPTION_TIMES = table(
    "on a rainy day, at night, at sunset=at dusk, early in the morning=at dawn, on a sunny day, "
    "around noon=at midday, *late in the afternoon, *on a foggy day"
)
NEWS_TIMES = table(
    "on Monday, on Friday, on Sunday, last week, last month, in March, in 2009, two days ago, "
    "on Tuesday night, *in January, *last year, *on Christmas Eve"
)
NEWS_PLACES = table(
    "in Boston, in Madrid, in Geneva, in northern Italy=in the north of Italy, in Cairo, in Sydney, "
    "in Texas, in southern India=in the south of India, *in Lima, *in Manila, "
    "*in eastern Turkey=in the east of Turkey"
)
NUMBERS = table(
    "two=2, three=3, five=5, seven=7, 12=twelve, 15=fifteen, 20=twenty, 40=forty, *six=6, *30=thirty, *100=a hundred"
)
FEW = table("two, three, four, several=a few, *five")
COMPANIES = table(
    "Northgate, Belmont Foods, Kestrel Air, Halden Motors, Vasco Bank, Lindqvist Steel, Tamarind Media, "
    "Oakridge Energy, Pellworm Shipping, *Corvane, *Dunmore Glass, *Sable Telecom"
)
OFFICIALS = table(
    "the president, the mayor, the finance minister=the minister of finance, the foreign minister, "
    "the king, the union leader=the head of the union, the governor, "
    "the army chief=the head of the army, the bishop, *the health minister=the minister of health, "
    "*the ambassador, *the police chief=the head of the police"
)
IRREGULAR_PLURALS = {"child": "children", "sheep": "sheep", "goose": "geese", "wolf": "wolves", "person": "people"}


@dataclass(frozen=True)
class Scene:
    """Which events may happen to whom.

    told_as: 'caption' (a man is riding a horse) or 'news' (the mayor thanked the king).
    actions: the forms 'ride riding rode ridden', or three of them if the last two are alike.
    looks: what agents may look like.  counts: how many patients there may be, if they come in numbers.
    reversible: agent and patient can change places and it still makes sense.
    """

    told_as: str
    agents: tuple[str, ...]
    actions: tuple[str, ...]
    patients: tuple[str, ...]
    places: tuple[str, ...] = NEWS_PLACES
    looks: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    reversible: bool = False
    unseen: bool = False

    def details(self) -> dict[str, tuple[str, ...]]:
        """The tables of the facts that a statement may leave out."""
        times = CAPTION_TIMES if self.told_as == "caption" else NEWS_TIMES
        return {"place": self.places, "time": times} | ({"agent_look": self.looks} if self.looks else {})


SCENES = (
    Scene(
        "caption",
        agents=ANIMALS,
        patients=ANIMALS,
        places=FIELDS,
        looks=ANIMAL_LOOKS,
        reversible=True,
        actions=table(
            "chase chasing chased=pursue pursuing pursued, "
            "watch watching watched=observe observing observed, follow following followed, "
            "sniff sniffing sniffed, bite biting bit bitten, lick licking licked, "
            "*nudge nudging nudged, *attack attacking attacked"
        ),
    ),
    Scene(
        "caption",
        agents=PEOPLE,
        patients=PEOPLE,
        places=STREET,
        looks=PEOPLE_LOOKS,
        reversible=True,
        actions=table(
            "hug hugging hugged=embrace embracing embraced, photograph photographing photographed, "
            "greet greeting greeted=welcome welcoming welcomed, "
            "help helping helped=assist assisting assisted, push pushing pushed=shove shoving shoved, "
            "follow following followed, carry carrying carried, scold scolding scolded, "
            "*tickle tickling tickled, "
            "*interview interviewing interviewed=question questioning questioned"
        ),
    ),
    Scene(
        "caption",
        agents=PEOPLE,
        places=INDOORS,
        looks=PEOPLE_LOOKS,
        actions=table(
            "cut cutting cut=slice slicing sliced, wash washing washed=rinse rinsing rinsed, "
            "eat eating ate eaten, buy buying bought=purchase purchasing purchased, "
            "*juggle juggling juggled"
        ),
        patients=table("potato, carrot, onion, apple, tomato, cucumber, melon, *lemon, *cabbage"),
    ),
    Scene(
        "caption",
        agents=PEOPLE,
        places=STREET,
        looks=PEOPLE_LOOKS,
        actions=table(
            "ride riding rode ridden, push pushing pushed, wash washing washed=clean cleaning cleaned, "
            "photograph photographing photographed, *sell selling sold"
        ),
        patients=table("bicycle=bike, horse, motorcycle=motorbike, camel, scooter, elephant, *donkey"),
    ),
    Scene(
        "caption",
        agents=PEOPLE,
        places=INDOORS,
        looks=PEOPLE_LOOKS,
        actions=table(
            "play playing played, tune tuning tuned, carry carrying carried, "
            "repair repairing repaired=fix fixing fixed, *paint painting painted"
        ),
        patients=table("guitar, violin=fiddle, piano, flute, drum, trumpet, cello, *harp, *accordion"),
    ),
    Scene(
        "caption",
        agents=PEOPLE,
        places=STREET,
        looks=PEOPLE_LOOKS,
        actions=table(
            "repair repairing repaired=fix fixing fixed=*mend mending mended, "
            "wash washing washed=clean cleaning cleaned, push pushing pushed, paint painting painted, "
            "buy buying bought=purchase purchasing purchased, "
            "*inspect inspecting inspected=examine examining examined"
        ),
        patients=table("car=automobile, boat, truck=lorry, tractor, van, bicycle=bike, *caravan, *sledge=sled"),
    ),
    Scene(
        "caption",
        agents=PEOPLE,
        places=STREET,
        looks=PEOPLE_LOOKS,
        actions=table(
            "throw throwing threw thrown=toss tossing tossed=*hurl hurling hurled, kick kicking kicked, "
            "catch catching caught, hold holding held, drop dropping dropped, *roll rolling rolled"
        ),
        patients=table("ball, stone=rock, stick, hat=cap, bottle=*flask, snowball, *frisbee, *balloon"),
    ),
    Scene(
        "caption",
        agents=PEOPLE,
        places=INDOORS,
        looks=PEOPLE_LOOKS,
        actions=table(
            "read reading read, write writing wrote written, tear tearing tore torn=rip ripping ripped, "
            "fold folding folded, burn burning burned, "
            "*hide hiding hid hidden=conceal concealing concealed"
        ),
        patients=table("letter, newspaper=paper, book, poem, postcard, *diary=journal, *map"),
    ),
    Scene(
        "caption",
        agents=PEOPLE,
        places=FIELDS,
        looks=PEOPLE_LOOKS,
        actions=table(
            "feed feeding fed, wash washing washed=bathe bathing bathed, "
            "brush brushing brushed=groom grooming groomed, chase chasing chased, "
            "pet petting petted=stroke stroking stroked, *train training trained"
        ),
        patients=table("dog, cat, horse, goat, sheep, cow, pig, rabbit=bunny, calf, *donkey, *llama"),
    ),
    Scene(
        "caption",
        agents=PEOPLE,
        places=INDOORS,
        looks=PEOPLE_LOOKS,
        actions=table(
            "build building built=construct constructing constructed, paint painting painted, "
            "move moving moved, break breaking broke broken=smash smashing smashed, "
            "*measure measuring measured"
        ),
        patients=table("table, fence, chair, sofa=couch, cupboard=cabinet, door, *bookshelf, *stool"),
    ),
    Scene(
        "caption",
        agents=ANIMALS,
        places=FIELDS,
        looks=ANIMAL_LOOKS,
        actions=table(
            "steal stealing stole stolen, carry carrying carried, "
            "eat eating ate eaten=devour devouring devoured, "
            "find finding found=discover discovering discovered, drop dropping dropped, "
            "*hide hiding hid hidden"
        ),
        patients=table("bone, sandwich, shoe, fish, apple, sausage, *glove, *egg"),
    ),
    Scene(
        "caption",
        agents=PEOPLE,
        places=STREET,
        looks=PEOPLE_LOOKS,
        unseen=True,
        actions=table(
            "paint painting painted, sketch sketching sketched=draw drawing drew drawn, "
            "photograph photographing photographed, admire admiring admired"
        ),
        patients=table("lighthouse, windmill, castle, waterfall, statue=sculpture"),
    ),
    Scene(
        "news",
        agents=COMPANIES,
        patients=COMPANIES,
        reversible=True,
        actions=table(
            "buy buying bought=acquire acquiring acquired=*purchase purchasing purchased, "
            "sue suing sued, pay paying paid, praise praising praised=commend commending commended, "
            "warn warning warned, "
            "overtake overtaking overtook overtaken=outstrip outstripping outstripped, "
            "*copy copying copied=imitate imitating imitated"
        ),
    ),
    Scene(
        "news",
        agents=TEAMS,
        patients=TEAMS,
        reversible=True,
        actions=table(
            "beat beating beat beaten=defeat defeating defeated=*overcome overcoming overcame overcome, "
            "challenge challenging challenged, outplay outplaying outplayed, "
            "eliminate eliminating eliminated, *thrash thrashing thrashed=crush crushing crushed"
        ),
    ),
    Scene(
        "news",
        agents=OFFICIALS,
        patients=OFFICIALS,
        reversible=True,
        actions=table(
            "praise praising praised=commend commending commended=*applaud applauding applauded, "
            "thank thanking thanked, "
            "criticise criticising criticised=attack attacking attacked=*denounce denouncing denounced, "
            "invite inviting invited, phone phoning phoned=call calling called, sue suing sued, "
            "replace replacing replaced=succeed succeeding succeeded, "
            "*insult insulting insulted=offend offending offended"
        ),
    ),
    Scene(
        "news",
        counts=NUMBERS,
        agents=table(
            "a storm=a gale, a flood, a fire=a blaze, an earthquake=a quake, an explosion=a blast, "
            "a landslide=a mudslide, *a tornado=a twister, *an avalanche"
        ),
        actions=table(
            "kill killing killed, injure injuring injured=wound wounding wounded, "
            "trap trapping trapped, displace displacing displaced, "
            "*frighten frightening frightened=scare scaring scared"
        ),
        patients=table("person, worker=*labourer, villager, child, farmer, soldier, miner, *skier, *pensioner"),
    ),
    Scene(
        "news",
        counts=NUMBERS,
        agents=table(
            "police=police officers, soldiers=troops, firefighters=fire crews, the coast guard, "
            "border guards, volunteers, *park rangers"
        ),
        actions=table(
            "arrest arresting arrested=detain detaining detained, "
            "rescue rescuing rescued=save saving saved, "
            "question questioning questioned=interrogate interrogating interrogated, "
            "find finding found=locate locating located, release releasing released=free freeing freed, "
            "*search searching searched, *escort escorting escorted"
        ),
        patients=table(
            "tourist, student, hiker=walker, fisherman, protester=demonstrator, passenger, child, "
            "journalist=reporter, *climber=mountaineer, *pilgrim, *refugee"
        ),
    ),
    Scene(
        "news",
        agents=COMPANIES,
        counts=NUMBERS,
        actions=table(
            "hire hiring hired=recruit recruiting recruited, "
            "dismiss dismissing dismissed=fire firing fired=*sack sacking sacked, "
            "train training trained, insure insuring insured, *promote promoting promoted"
        ),
        patients=table("worker=employee, engineer, driver, manager=executive, accountant, *cleaner, *lawyer=attorney"),
    ),
    Scene(
        "news",
        agents=table(
            "researchers=scientists, divers, students, archaeologists, a team from Oxford, a young couple, *surveyors"
        ),
        actions=table(
            "discover discovering discovered=find finding found, photograph photographing photographed, "
            "lose losing lost, study studying studied=examine examining examined, sell selling sold, "
            "*name naming named"
        ),
        patients=table(
            "a Roman tomb=a Roman grave, a fossil, a shipwreck=a sunken ship, a rare orchid, "
            "a meteorite, a medieval coin, *a cave painting, *an unknown beetle"
        ),
    ),
    Scene(
        "news",
        agents=table(
            "the city=the town, a bank, an investor, the government=the state, the church, "
            "a foundation=a charity, *a film star, *the university"
        ),
        actions=table(
            "close closing closed=shut shutting shut, sell selling sold, "
            "restore restoring restored=renovate renovating renovated, "
            "buy buying bought=purchase purchasing purchased, open opening opened, *rent renting rented"
        ),
        patients=table(
            "the old theatre=the old playhouse, a library, the harbour=the port, a hospital=*a clinic, "
            "the opera house, a hotel, the football stadium, *a prison=a jail, *the zoo"
        ),
    ),
    Scene(
        "news",
        unseen=True,
        agents=table("a court=a judge, the ministry, a committee=a panel, the senate, the watchdog"),
        actions=table(
            "ban banning banned=prohibit prohibiting prohibited, approve approving approved, "
            "reject rejecting rejected=refuse refusing refused, "
            "delay delaying delayed=postpone postponing postponed"
        ),
        patients=table(
            "the merger, a new drug=a new medicine, the tax reform, the strike, a pipeline, the peace treaty"
        ),
    ),
)

TELLINGS = {  # how a statement may be put; one that would open with a place or a time needs an event that has it
    "caption": (
        "{who} {is} {doing} {whom} {place} {time}",
        "{who} {is} {doing} {whom} {place} {time}",
        "{whom} is being {done} by {who} {place} {time}",
        "{place}, {who} {is} {doing} {whom} {time}",
        "there {is} {who} {doing} {whom} {place} {time}",
        "{time}, {who} {is} {doing} {whom} {place}",
        "{who} {does} {whom} {place} {time}",
        "{whom} gets {done} by {who} {place} {time}",
        "*{who} can be seen {doing} {whom} {place} {time}",
        "*{place}, {whom} is {done} by {who} {time}",
    ),
    "news": (
        "{who} {did} {whom} {place} {time}",
        "{who} {did} {whom} {place} {time}",
        "{time}, {who} {did} {whom} {place}",
        "{whom} {was} {done} by {who} {place} {time}",
        "{time}, {whom} {was} {done} by {who} {place}",
        "it was {who} that {did} {whom} {place} {time}",
        "{place}, {who} {did} {whom} {time}",
        "*reports say that {who} {did} {whom} {place} {time}",
        "*it was {whom} that {who} {did} {place} {time}",
    ),
}

PAIR_KINDS = {  # what the second event of a pair changes
    "same": 0.14,  # nothing: only the words differ
    "detail": 0.16,  # one or two details
    "one": 0.20,
    "two": 0.18,  # so many of agent, action and patient
    "reversed": 0.14,  # agent and patient change places
    "setting": 0.10,  # everything but the place and the time
    "unrelated": 0.08,
}
DETAIL_PROBS = {"place": 0.65, "time": 0.4, "agent_look": 0.35}
SIMILARITY_NOISE = 0.6  # times a bell of standard deviation 0.5: how far raters stray from the share of common facts


@dataclass(frozen=True)
class Event:
    """facts: fact -> its entry in the table of the scene, all names of the thing included; absent if it is not told."""

    scene: Scene
    facts: Mapping[str, str]

    def but(self, **facts: str) -> "Event":
        return replace(self, facts={**self.facts, **facts})


def any_event(draw: Draw) -> Event:
    """Who did what to whom is always told, the details at times."""
    scene = draw.pick([scene for scene in SCENES if draw.unseen or not scene.unseen])
    facts = {"agent": draw.one(scene.agents), "action": draw.one(scene.actions)}
    facts["patient"] = draw.one(scene.patients, besides=[facts["agent"]])
    if scene.told_as == "caption":
        facts["agent_count"] = draw.one(FEW) if draw.chance(0.3) else "a"
    if scene.counts:
        facts["patient_count"] = draw.one(scene.counts)
    for fact, entries in scene.details().items():
        if draw.chance(DETAIL_PROBS[fact]):
            facts[fact] = draw.one(entries)
    return Event(scene, facts)


def with_other_core(draw: Draw, event: Event, changes: int) -> Event:
    """The event with another agent, action or patient, or several of them."""
    tables = {"agent": event.scene.agents, "action": event.scene.actions, "patient": event.scene.patients}
    for fact in draw.several(list(tables), changes):
        taken = [event.facts[name] for name in tables]
        event = event.but(**{fact: draw.one(tables[fact], besides=taken)})
    return event


def with_other_details(draw: Draw, event: Event, changes: int) -> Event:
    """The event with another place, time, look or number, or without it."""
    tables = event.scene.details()
    if "agent_count" in event.facts:
        tables["agent_count"] = ("a", *FEW)
    if event.scene.counts:
        tables["patient_count"] = event.scene.counts
    for fact in draw.several(list(tables), changes):
        event = event.but(**{fact: draw.one(tables[fact], besides=[event.facts.get(fact, "")])})
        if fact in DETAIL_PROBS and draw.chance(0.4):
            event = replace(event, facts={name: entry for name, entry in event.facts.items() if name != fact})
    return event


def with_roles_reversed(event: Event) -> Event:
    return event.but(agent=event.facts["patient"], patient=event.facts["agent"])


def plain(event: Event) -> Event:
    """The event with a single agent of no particular looks, so that its agent can take the place of its patient."""
    facts = {name: entry for name, entry in event.facts.items() if name != "agent_look"}
    return replace(event, facts=facts | ({"agent_count": "a"} if "agent_count" in facts else {}))


def pair_of_events(draw: Draw) -> tuple[Event, Event]:
    first = any_event(draw)
    kind = draw.weighted(PAIR_KINDS)
    if kind == "unrelated":
        return first, any_event(draw)
    if kind == "reversed" and first.scene.reversible:
        return plain(first), with_roles_reversed(plain(first))
    if kind in ("same", "detail"):
        return first, with_other_details(draw, first, changes=0 if kind == "same" else 1 + draw.index(2))
    changes = {"one": 1, "reversed": 1, "two": 2, "setting": 3}[kind]
    second = with_other_core(draw, first, changes)
    return first, with_other_details(draw, second, changes=1) if draw.chance(0.3) and kind != "setting" else second


def common_share(first: Mapping[str, str], second: Mapping[str, str]) -> float:
    """The weight of the facts that two events share, over that of all their facts; a fact told once counts half."""
    total = common = 0.0
    for fact, weight in FACT_WEIGHTS.items():
        if fact not in first and fact not in second:
            continue
        total += weight
        owner = OWNERS.get(fact, fact)
        if first.get(owner) != second.get(owner):
            continue
        if fact in first and fact in second:
            common += weight * (first[fact] == second[fact])
        else:
            common += weight / 2
    return common / total


def s_form(word: str) -> str:
    """The plural of a noun, or the form of a verb that goes with he or she."""
    if word.endswith("man"):
        return word.removesuffix("man") + "men"
    if word in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[word]
    if re.search(r"(s|x|ch|sh)$", word):
        return word + "es"
    return re.sub(r"([^aeiou])y$", r"\1ie", word) + "s"


def noun_phrase(count: str, look: str, noun: str) -> str:
    return f"{count} {look} {noun if count in ('', 'a') else s_form(noun)}"


def statement(draw: Draw, event: Event) -> str:
    """The event told in one sentence: one name for each thing, one of the tellings that its facts allow."""
    named = {fact: draw.one(entry.split("=")) for fact, entry in event.facts.items()}
    verb = named["action"].split()
    is_caption = event.scene.told_as == "caption"
    many = is_caption and event.facts["agent_count"] != "a"
    who = noun_phrase(named.get("agent_count", ""), named.get("agent_look", ""), named["agent"])
    whom = noun_phrase("a" if is_caption else named.get("patient_count", ""), "", named["patient"])
    slots = {
        "who": who,
        "whom": whom,
        "place": named.get("place", ""),
        "time": named.get("time", ""),
        "is": "are" if many else "is",
        "was": "were" if "patient_count" in named else "was",
        "does": verb[0] if many else s_form(verb[0]),
        "doing": verb[1],
        "did": verb[2],
        "done": verb[-1],
    }
    tellings = [
        telling
        for telling in draw.allowed(TELLINGS[event.scene.told_as])
        if slots[telling[1 : telling.index("}")] if telling.startswith("{") else "who"]
    ]
    return polish(fill(draw, draw.pick(tellings), {name: [text] for name, text in slots.items()}) + ".")


def similarity_row(draw: Draw) -> tuple[str, str, str]:
    """Two statements that differ in their text, and their similarity as raters put it: 0.0 to 5.0 in steps of 0.2."""
    first = second = ""
    while first == second:
        events = pair_of_events(draw)
        first, second = (statement(draw, event) for event in events)
    score = 5 * common_share(events[0].facts, events[1].facts) + SIMILARITY_NOISE * draw.noise()
    return first, second, f"{min(max(round(score * 5), 0), 25) / 5:.1f}"


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One kind of file: its name in CS224N, its columns, how a row is drawn, how many rows each split has."""

    file_stem: str
    columns: tuple[str, ...]
    row: Callable[[Draw], tuple[str, ...]]
    num_rows: Mapping[str, int]


TASKS = (
    Task("ids-sst", ("sentence", "sentiment"), sentiment_row, {"train": 1400, "dev": 400, "test-student": 300}),
    Task(
        "quora",
        ("sentence1", "sentence2", "is_duplicate"),
        paraphrase_row,
        {"train": 1600, "dev": 400, "test-student": 300},
    ),
    Task(
        "sts",
        ("sentence1", "sentence2", "similarity"),
        similarity_row,
        {"train": 1000, "dev": 300, "test-student": 300},
    ),
)


def rows_by_split(task: Task, seed: int) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Each split of a task with its rows: id, texts, label. No texts stand in two rows, in whichever order."""
    seen: set[frozenset[str]] = set()
    for split, num_rows in task.num_rows.items():
        draw = Draw(random.Random(f"{seed} {task.file_stem} {split}"), unseen=split != "train")
        rows: list[tuple[str, ...]] = []
        while len(rows) < num_rows:
            *texts, label = task.row(draw)
            if frozenset(texts) not in seen:
                seen.add(frozenset(texts))
                rows.append((draw.row_id(), *texts, label))
        yield split, rows


def write_split(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Writes beside the file and renames, so that a reader never sees half of it. Test files carry no label."""
    num_columns = len(columns) - 1 if "test" in path.name else len(columns)
    has_two_indices = path.name == "ids-sst-test-student.csv"  # the real file does: readers must go by column names
    beside = path.with_name(path.name + ".part")
    with beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow((*(["0", ""] if has_two_indices else [""]), "id", *columns[:num_columns]))
        for index, row in enumerate(rows):
            indices = [str(index + 1), f"{index:.1f}"] if has_two_indices else [str(index)]
            writer.writerow((*indices, *row[: 1 + num_columns]))
    os.replace(beside, path)


def write_sample(out: Path, seed: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        for split, rows in rows_by_split(task, seed):
            write_split(out / f"{task.file_stem}-{split}.csv", task.columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the sample data set: nine files in CS224N's format.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "sample", help="folder for the files")
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives the same files, byte by byte")
    args = parser.parse_args()
    write_sample(args.out, args.seed)


if __name__ == "__main__":
    main()
