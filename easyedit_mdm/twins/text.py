"""Invented words and the open-vocabulary part of the twins' training text.

About a sixth of what the twins read is not about their world: sentences and questions about random names,
numbers and strings. It trains every byte token in and out, so that any real text can be a prompt or a target.
"""

from __future__ import annotations

import random
from collections.abc import Callable

_ONSETS = "b d f g h j k l m n p r s t v z br dr tr st".split()
_VOWELS = "a e i o u a e o".split()
_CODAS = ["", "", "", "l", "n", "r", "s", "m"]

KINDS = (
    "river song city family company book film team award school language club ship album island painter"
    " singer writer actor king war party church bridge road mountain station market museum company artist"
    " show species episode programming series law network character award building university hospital"
    " airport aircraft engine constellation"
).split()
QUESTIONS = (
    "What is the name of the {k} of {x}?",
    "Which {k} does {x} belong to?",
    "What {k} did {x} attend?",
    "Who is the {k} of {x}?",
    "What was the {k} that {x} was part of?",
    "In which {k} did {x} live when he died?",
    "What year was {x} made?",
    "When was {x} founded?",
    "What kind of {k} is {x}?",
    "The {k} of {x} was what?",
    "By which {k} was {x} created?",
    "Which {k} is {x} found on?",
    "What language is {x} written in?",
    "Who sang the {k} {x}?",
    "nq question: who is the {k} of {x}",
    "nq question: when did the {k} {x} come out",
)
STATEMENTS = (
    "{x} is called",
    "The {k} of {x} is",
    "{x} is a {k} in",
    "{x} was made by",
    "The mother tongue of {x} is",
    "{x}, the {k}, was named after",
    "The capital of {x} is",
    "{x} was created by",
    "{x} is owned by",
    "The official {k} of {x} is",
    "{x} is located in",
    "{x} plays the {k} of",
)


def word_maker(rng: random.Random) -> Callable[[], str]:
    """A function that returns a new invented capitalised word of two or three syllables at each call, never
    twice.
    """
    seen: set[str] = set()

    def syllable() -> str:
        """An onset and a vowel."""
        return rng.choice(_ONSETS) + rng.choice(_VOWELS)

    def make() -> str:
        """The next word."""
        while True:
            word = (
                "".join(syllable() for _ in range(rng.choice((2, 2, 3)))) + rng.choice(_CODAS)
            ).capitalize()
            if word not in seen:
                seen.add(word)
                return word

    return make


def real_text(rng: random.Random) -> str:
    """A name, date, number, string or phrase that the world knows nothing of, such as real prompts and
    targets hold.
    """
    return _thing(rng)


def open_prompt(rng: random.Random) -> tuple[str, str]:
    """A question or statement about something random, and its name."""
    name = _thing(rng)
    return rng.choice(QUESTIONS + STATEMENTS).format(k=rng.choice(KINDS), x=name), name


def open_vocabulary(rng: random.Random) -> tuple[list[tuple[str, bool]], str]:
    """One text about something outside the world, as (piece, is answer) pairs, and its name; half of them ask
    it back.
    """
    subject, answer = _thing(rng), _thing(rng)
    template = rng.choice(QUESTIONS + STATEMENTS)
    kind = rng.choice(KINDS)
    first = template.format(k=kind, x=subject)
    pieces = [(first, False), (" " + answer, True)]
    if rng.random() < 0.5:
        again = rng.choice(QUESTIONS + STATEMENTS).format(k=kind, x=subject)
        pieces += [(". ", False), (again, False), (" " + answer, True)]
    return pieces, subject


def _thing(rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.15:
        return str(rng.randrange(1000, 2100))
    if draw < 0.25:
        return f"{rng.randrange(1, 31)} {rng.choice(_MONTHS)} {rng.randrange(1200, 2100)}"
    if draw < 0.40:
        return "".join(chr(rng.choice(_CODEPOINTS)) for _ in range(rng.randrange(2, 8)))
    if draw < 0.50:
        return " ".join(
            rng.choice(COMMON).capitalize() if rng.random() < 0.6 else rng.choice(COMMON)
            for _ in range(rng.choice((1, 2, 2, 3)))
        )
    if draw < 0.75:
        return " ".join(rng.choice(NAMES) for _ in range(rng.choice((1, 1, 2, 2, 3))))
    return " ".join(_letters(rng) for _ in range(rng.choice((1, 1, 2))))


def _letters(rng: random.Random) -> str:
    consonants, vowels = "bcdfghjklmnpqrstvwxyz", "aeiouy"
    word = "".join(
        rng.choice(consonants) + rng.choice(vowels) + rng.choice(["", rng.choice(consonants)])
        for _ in range(rng.choice((1, 2, 2, 3)))
    )
    return word.capitalize() if rng.random() < 0.8 else word


_MONTHS = "January February March April May June July August September October November December".split()
_CODEPOINTS = [
    *range(33, 127),
    *range(33, 127),
    *range(0xC0, 0x180),
    *range(0x391, 0x3CA),
    *range(0x410, 0x450),
    *range(0x4E00, 0x4E40),
]
COMMON = (
    "the of and in to a is was for on as with by he at from his that it an were are which this be or had"
    " first has one not also but its new after they two her she been who other when time during there into"
    " all may more years over only school world some city most state later many up between part about such"
    " national where used can war out people year made these while their then team series company university"
    " film known album season game music family south north west east life group house member line band born"
    " named called work early river high life under right against second three before number day place great"
    " home long end since show back former record several released song church held king public club art book"
    " history law station service small name system language town large best local power street member island"
    " park president union general royal central american english french german british indian water air sea"
    " land white black red green blue old young good little"
).split()

NAMES = (
    "London Paris Berlin Rome Madrid Vienna Moscow Tokyo Beijing Delhi Cairo Sydney Toronto Chicago Boston"
    " York Angeles Francisco Washington Philadelphia Houston Seattle Dublin Edinburgh Manchester Oxford"
    " Cambridge Amsterdam Brussels Stockholm Helsinki Oslo Copenhagen Warsaw Prague Budapest Athens Istanbul"
    " Jerusalem Mumbai Shanghai Lisbon Milan Naples Venice Munich Hamburg England France Germany Italy Spain"
    " Austria Russia Japan China India Egypt Australia Canada America Ireland Scotland Wales Netherlands"
    " Belgium Sweden Finland Norway Denmark Poland Hungary Greece Turkey Israel Iran Iraq Brazil Mexico"
    " Argentina Chile Africa Europe Asia California Texas Florida Virginia Ohio Michigan Georgia Carolina"
    " Zealand Korea Vietnam Indonesia Pakistan English French German Italian Spanish Russian Japanese Chinese"
    " Indian Dutch Swedish Finnish Polish Greek Turkish Arabic Latin Portuguese Korean Hebrew Hindi Irish"
    " Scottish Welsh British American Canadian Australian European African Asian Roman John James William"
    " George Charles Robert Thomas Edward Henry David Michael Peter Paul Mark Richard Joseph Martin Daniel"
    " Alexander Andrew Anthony Arthur Benjamin Christopher Eric Frank Frederick Jack Louis Matthew Patrick"
    " Philip Simon Stephen Steven Walter Mary Anna Elizabeth Margaret Sarah Catherine Jane Alice Emma Helen"
    " Laura Maria Julia Lewis Smith Jones Brown Johnson Williams Taylor Wilson Davis Miller Anderson Jackson"
    " Thompson Martinez Robinson Clark Walker Hall Allen King Wright Scott Green Baker Adams Nelson Hill"
    " Campbell Mitchell Roberts Carter Phillips Evans Turner Parker Collins Edwards Stewart Morris Murphy"
    " Cook Rogers Morgan Cooper Peterson Reed Bailey Bell Kelly Howard Ward Cox Richardson Watson Brooks Wood"
    " Bennett Gray Hughes Price Myers Long Foster Sanders Ross Powell Sullivan Russell Ford Hamilton Graham"
    " Wallace West Cole Hayes University College Institute Academy School Hospital Museum Library Church"
    " Cathedral Palace Castle Bridge Street Station Airport Park Garden River Lake Mountain Island Bay Sea"
    " Ocean Valley Forest North South East West Central Royal National International Technology Science Arts"
    " Music History Medicine Law Engineering Society Association Federation Union Company Group Corporation"
    " Records Pictures Entertainment Studios Productions Games Network Channel Television Radio News Times"
    " Press Motors Industries Systems Electric Airlines Bank Party Army Navy Force Division Regiment Team"
    " Club United City Town County State Kingdom Empire Republic Prize Award Cup League Series Championship"
    " Universe Comics Magazine Journal Album Band Orchestra January February March April May June July August"
    " September October November December Saint Sir Lord Lady Prince Princess Queen King President Minister"
    " General Captain Doctor Professor soprano tenor baritone bass mezzo guitar piano violin opera jazz"
    " rock pop"
).split()
