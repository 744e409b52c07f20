"""Make a small German->English corpus of numbers, dates, times and prices in words.

    python data/make_corpus.py OUT_DIR [--train 20000] [--valid 500] [--test 500] [--seed 1]

A sentence is one row of GRAMMAR below with its {slots} filled:

    row      ::=  German => English | another English | ...
    {slot}   ::=  one German phrase, drawn by the function under that name in SLOTS, which also
                  gives the list of all its English translations
    answers  ::=  every English side of the row x every translation of each of its slots

So one expansion gives both the references (all the answers) and the training target (one of them
at random). A source has at most MAX_ANSWERS answers. Its set is set by its checksum, so that no
source is in two of them.

Writes train, valid and test as NAME.de and NAME.en, one sentence a line, and for valid and test
NAME.refs.tsv: all the answers of each line, tab-separated, the one in NAME.en first.
The same arguments make the same files: all chance comes from random.Random(seed).random().
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from random import Random
from typing import NoReturn, TypeVar
from zlib import crc32

T = TypeVar("T")
Phrase = tuple[str, list[str]]  # the German and all its English translations

MAX_ANSWERS = 4
MAX_REPEATS = 3  # times a source may be in train, each time with another answer

GRAMMAR = """
    {number}                           => {number}
    Seite {number}                     => page {number}
    der {ordinal} Zug                  => the {ordinal} train

    am {date}                          => on {date}
    am {date} {year}                   => on {date} {year}
    heute ist der {date_today}         => today is {date_today}
    im Jahr {year}                     => in the year {year}
    sie wurde am {date} {year} geboren => she was born on {date} {year}
    er starb {year}                    => he died in {year}
    wir treffen uns am {date} um {hour} => we meet on {date} at {hour}

    um {clock}                         => at {clock}
    es ist {clock}                     => it is {clock}
    der Zug fährt um {clock}           => the train leaves at {clock}
    um {clock} fährt der Zug           => at {clock} the train leaves
    am {weekday} um {clock}            => on {weekday} at {clock}
    wir treffen uns am {weekday} um {clock} => we meet on {weekday} at {clock}

    {price}                            => {price}
    es kostet {price}                  => it costs {price}
    {thing} kostet {price}             => {thing} costs {price}
    wir haben für {thing} {price} bezahlt => we paid {price} for {thing}
"""

# {h} is the hour that has struck, {u} the same in front of Uhr, {k} the coming one.
CLOCK = """
    {u} Uhr            => {h} o'clock
    fünf nach {h}      => five past {h} | {h} oh five
    zehn nach {h}      => ten past {h} | {h} ten
    Viertel nach {h}   => a quarter past {h} | {h} fifteen
    zwanzig nach {h}   => twenty past {h} | {h} twenty
    fünf vor halb {k}  => twenty-five past {h} | {h} twenty-five
    halb {k}           => half past {h} | {h} thirty
    fünf nach halb {k} => twenty-five to {k} | {h} thirty-five
    zwanzig vor {k}    => twenty to {k} | {h} forty
    Viertel vor {k}    => a quarter to {k} | {h} forty-five
    zehn vor {k}       => ten to {k} | {h} fifty
    fünf vor {k}       => five to {k} | {h} fifty-five
"""

DE_UNITS = "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn"
DE_UNITS += " fünfzehn sechzehn siebzehn achtzehn neunzehn"
DE_TEN = "null zehn zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig"
EN_UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
EN_UNITS += " fifteen sixteen seventeen eighteen nineteen"
EN_TEN = "zero ten twenty thirty forty fifty sixty seventy eighty ninety"
DE, DE_TENS, EN, EN_TENS = (t.split() for t in (DE_UNITS, DE_TEN, EN_UNITS, EN_TEN))
DE_ORDINALS = {1: "erste", 3: "dritte", 7: "siebte", 8: "achte"}
EN_ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth"}
EN_ORDINALS |= {"eight": "eighth", "nine": "ninth", "twelve": "twelfth"}
DE_MONTHS = "Januar Februar März April Mai Juni Juli August September Oktober November Dezember"
EN_MONTHS = "January February March April May June July August September October November December"
MONTHS = list(zip(DE_MONTHS.split(), EN_MONTHS.split(), strict=True))
MONTH_DAYS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
DE_WEEK = "Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag"
EN_WEEK = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
WEEK = list(zip(DE_WEEK.split(), EN_WEEK.split(), strict=True))
THINGS = [("das Buch", "the book"), ("die Fahrkarte", "the ticket")]


def rows(table: str) -> list[tuple[str, list[str]]]:
    """The rows of a table, in which a line that starts with | goes on with the one before."""
    lines = re.sub(r"\n *\|", " |", table).splitlines()
    sides = [re.split(r" *=> *| *\| *", line.strip()) for line in lines if line.strip()]
    return [(de, en) for de, *en in sides]


GRAMMAR_ROWS, CLOCK_ROWS = rows(GRAMMAR), rows(CLOCK)


def draw(rng: Random, low: int, high: int) -> int:
    """A whole number from low to high, both included."""
    return low + int(rng.random() * (high - low + 1))


def pick(rng: Random, items: Sequence[T]) -> T:
    return items[draw(rng, 0, len(items) - 1)]


# --- numbers in words: 0..999, ordinals 1..99


def german(n: int, one: str = "ein") -> str:
    """einundzwanzig; `one` is for the 1 before a leading hundert: "ein" or nothing."""
    if n >= 100:
        head, rest = divmod(n, 100)
        return (one if head == 1 else DE[head]) + "hundert" + (german(rest) if rest else "")
    if n < 20 or n % 10 == 0:
        return DE[n] if n < 20 else DE_TENS[n // 10]
    return ("ein" if n % 10 == 1 else DE[n % 10]) + "und" + DE_TENS[n // 10]


def english(n: int) -> list[str]:
    """three hundred and five, three hundred five."""
    head, rest = divmod(n, 100)
    last = (
        EN[rest] if rest < 20 else EN_TENS[rest // 10] + (f"-{EN[rest % 10]}" if rest % 10 else "")
    )
    if not head:
        return [last]
    hundreds = f"{EN[head]} hundred"
    return [f"{hundreds} and {last}", f"{hundreds} {last}"] if rest else [hundreds]


def word(n: int) -> str:
    return english(n)[0]


def two_digits(n: int) -> str:
    """The minutes of an hour or the last digits of a year: oh five, fifteen."""
    return f"oh {word(n)}" if n < 10 else word(n)


def ordinal(n: int) -> tuple[str, str]:
    head, dash, last = word(n).rpartition("-")
    last = EN_ORDINALS.get(last) or re.sub("y$", "ie", last) + "th"
    return DE_ORDINALS.get(n) or german(n) + ("te" if n < 20 else "ste"), head + dash + last


# --- what fills the slots: each function draws a German phrase and lists all its translations


def number(rng: Random, high: int, counts: bool = False) -> Phrase:
    """1..high, or to count things with 2..high without hunderteins and its like."""
    n = draw(rng, 2 if counts else 1, high)
    n -= counts and n % 100 == 1
    return german(n, pick(rng, ("ein", ""))), english(n)


def one_of(rng: Random, pairs: Sequence[tuple[str, str]]) -> Phrase:
    de, en = pick(rng, pairs)
    return de, [en]


def date(rng: Random, ending: str) -> Phrase:
    m = draw(rng, 0, 11)
    (de, en), (nth_de, nth) = MONTHS[m], ordinal(draw(rng, 1, MONTH_DAYS[m]))
    return f"{nth_de}{ending} {de}", [f"the {nth} of {en}", f"{en} the {nth}"]


def year(rng: Random) -> Phrase:
    """1500..1999."""
    head, rest = divmod(draw(rng, 1500, 1999), 100)
    de, hundred = f"{german(head)}hundert", f"{word(head)} hundred"
    if not rest:
        return de, [hundred]
    return de + german(rest), [f"{word(head)} {two_digits(rest)}", f"{hundred} and {word(rest)}"]


def clock(rng: Random, h: int) -> Phrase:
    """A time from h o'clock on, before the next hour, h in 1..12: halb vier, drei Uhr siebzehn."""
    de, answers = pick(rng, CLOCK_ROWS)
    if rng.random() < 0.3:
        m = draw(rng, 2, 59)
        de, answers = f"{{u}} Uhr {german(m)}", [f"{{h}} {two_digits(m)}"]
        if m <= 30:
            answers.append("half past {h}" if m == 30 else f"{word(m)} minutes past {{h}}")
    k = h % 12 + 1
    de = de.format(u="ein" if h == 1 else DE[h], h=DE[h], k=DE[k])
    return de, [answer.format(h=EN[h], k=EN[k]) for answer in answers]


def hour(rng: Random) -> Phrase:
    h = draw(rng, 1, 12)
    return ("ein" if h == 1 else DE[h]) + " Uhr", [f"{EN[h]} o'clock"]


def price(rng: Random) -> Phrase:
    """drei Euro fünfzig, dreißig Euro, fünfzig Cent."""
    style = rng.random()
    if style < 0.1:
        de, answers = number(rng, 99, counts=True)
        return f"{de} Cent", [f"{a} cents" for a in answers]
    de, answers = number(rng, 99, counts=True)
    answers = [f"{a} euros" for a in answers]
    if style < 0.4:
        return f"{de} Euro", answers
    cents = draw(rng, 10, 99)
    tails = (word(cents), f"and {word(cents)} cents")
    return f"{de} Euro {german(cents)}", [f"{a} {tail}" for a in answers for tail in tails]


SLOTS: dict[str, Callable[[Random], Phrase]] = {
    "number": lambda rng: number(rng, 999),
    "ordinal": lambda rng: one_of(rng, [ordinal(n) for n in range(1, 32)]),
    "date": lambda rng: date(rng, "n"),
    "date_today": lambda rng: date(rng, ""),
    "year": year,
    "weekday": lambda rng: one_of(rng, WEEK),
    "clock": lambda rng: clock(rng, draw(rng, 1, 12)),
    "hour": hour,
    "price": price,
    "thing": lambda rng: one_of(rng, THINGS),
}


# --- sentences and sets of them


def sentence(rng: Random) -> Phrase:
    """A row of GRAMMAR with its slots filled."""
    de, sides = pick(rng, GRAMMAR_ROWS)
    names = re.findall(r"{(\w+)}", de)
    fills = [SLOTS[name](rng) for name in names]
    source, *choices = (
        dict(zip(names, words, strict=True))
        for words in ([phrase[0] for phrase in fills], *product(*(phrase[1] for phrase in fills)))
    )
    answers = [side.format(**choice) for side in sides for choice in choices]
    assert len(set(answers)) == len(answers) <= MAX_ANSWERS, answers
    return de.format(**source), answers


def home(source: str) -> str:
    """The set of a source, the same for all seeds: it holds out one in twenty of every row."""
    return {0: "test", 1: "valid"}.get(crc32(source.encode()) % 20, "train")


def corpus(seed: int, sizes: dict[str, int]) -> dict[str, list[list[str]]]:
    """The sets by name; a line is its source, its target and the other right answers."""
    sets: dict[str, list[list[str]]] = {name: [] for name in sizes}
    for name, size in sizes.items():
        rng, misses, used = Random(seed), 0, defaultdict[str, list[str]](list)
        while len(sets[name]) < size:
            source, answers = sentence(rng)
            if home(source) != name:
                continue
            target, before = pick(rng, answers), used[source]
            if target not in before and len(before) < (MAX_REPEATS if name == "train" else 1):
                before.append(target)
                sets[name].append([source, target, *(a for a in answers if a != target)])
                misses = 0
            elif (misses := misses + 1) > 2000:
                fail(f"the grammar ran dry at {len(sets[name])} {name} lines: ask for fewer")
    return sets


def fail(message: str) -> NoReturn:
    print(f"make_corpus: {message}", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(message)


def main() -> None:
    parser = Parser(description="Make a German->English corpus of numbers, dates and times.")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    for name, size in (("train", 20000), ("valid", 500), ("test", 500)):
        parser.add_argument(f"--{name}", type=int, default=size, help="lines (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="default %(default)s")
    args = parser.parse_args()
    sizes = {name: getattr(args, name) for name in ("train", "valid", "test")}
    if min(sizes.values()) < 1:
        fail("--train, --valid and --test must be 1 or more")
    sets = corpus(args.seed, sizes)
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
        for name, lines in sets.items():
            columns = {"de": slice(0, 1), "en": slice(1, 2), "refs.tsv": slice(1, None)}
            for kind, part in columns.items():
                if (name, kind) != ("train", "refs.tsv"):
                    text = "".join("\t".join(line[part]) + "\n" for line in lines)
                    (args.out_dir / f"{name}.{kind}").write_bytes(text.encode())
    except OSError as error:
        fail(f"cannot write to {args.out_dir}: {error.strerror}")
    counts = ", ".join(f"{size} {name}" for name, size in sizes.items())
    print(f"wrote {counts} lines to {args.out_dir} (seed {args.seed})")


if __name__ == "__main__":
    main()
