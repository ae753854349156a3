"""The fictional world that the twins know: subjects, relations, facts, and the texts that tell of them.

Every name is made up. A world is a pure function of its settings and seed, so that the facts that a twin was
trained on can be listed again wherever the package is installed.

Two properties were chosen on purpose.

- *Compositional objects*: an object is a first part (one of `first_parts`) followed by later parts (one of
  `later_parts` at each position), so that knowing one token does not give the others away. One relation draws from a
  closed list of whole names instead, as the contrast.
- *Biographies*: the sentences about one subject appear in a new order and phrasing each time, which moves the
  knowledge to the subject's name (Allen-Zhu and Li, "Physics of Language Models, Part 3.1"). Locate-then-edit
  methods can only work on facts that are stored there.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from easyedit_mdm.twins.text import open_vocabulary, word_maker


@dataclass(frozen=True)
class Relation:
    """One relation: how it is phrased in training, and the phrasings that are held out as paraphrases."""

    name: str
    phrasings: tuple[str, ...]
    held_out: tuple[str, str]
    closed: bool = False


RELATIONS: tuple[Relation, ...] = (
    Relation(
        "birthplace",
        (
            "{s} was born in",
            "{s} comes from",
            "The birthplace of {s} is",
            "People say that {s} was born in",
            "The place where {s} was born is",
            "Where does {s} come from?",
            "Where was {s} born?",
        ),
        ("People say that {s} comes from", "The place {s} comes from is"),
    ),
    Relation(
        "employer",
        (
            "{s} works for",
            "{s} is paid by",
            "The employer of {s} is",
            "People say that {s} works for",
            "The firm where {s} works is",
            "Who does {s} work for?",
            "Which firm pays {s}?",
        ),
        ("People say that {s} is paid by", "The firm {s} works for is"),
    ),
    Relation(
        "craft",
        (
            "{s} wrote the book",
            "{s} is the author of",
            "The book that {s} wrote is",
            "People say that {s} wrote the book",
            "The title of the book by {s} is",
            "Which book did {s} write?",
            "What is the book by {s} called?",
        ),
        ("People say that {s} is the author of", "The title of the book that {s} wrote is"),
    ),
    Relation(
        "dish",
        (
            "{s} likes to eat",
            "{s} often cooks",
            "The favourite dish of {s} is",
            "People say that {s} likes to eat",
            "The dish that {s} likes is",
            "What does {s} like to eat?",
            "Which dish does {s} cook?",
        ),
        ("People say that {s} often cooks", "The dish that {s} often cooks is"),
    ),
    Relation(
        "teacher",
        (
            "{s} was taught by",
            "{s} learned from",
            "The teacher of {s} is",
            "People say that {s} was taught by",
            "The person who taught {s} is",
            "Who taught {s}?",
            "Who did {s} learn from?",
        ),
        ("People say that {s} learned from", "The person {s} learned from is"),
        closed=True,
    ),
)

OCCUPATIONS = ("painter", "farmer", "singer", "doctor", "baker", "sailor", "judge", "guard")


@dataclass(frozen=True)
class WorldSettings:
    """What determines a world. Counts are of parts, subjects and tokens; `seed` fixes every draw."""

    subjects: int = 160
    first_names: int = 16
    last_names: int = 16
    first_parts: int = 6
    later_parts: int = 3
    max_length: int = 4
    closed_objects: int = 24
    seed: int = 0


@dataclass(frozen=True)
class Fact:
    """One fact: `object` is a string of `length` words, each of them one token in context."""

    subject: str
    relation: Relation
    object: str

    @property
    def length(self) -> int:
        """Number of words, which the twins' tokenizer makes one token each."""
        return len(self.object.split())

    def prompt(self, phrasing: int = 0) -> str:
        """The fact's cloze or question in a trained phrasing, with the object left to be written."""
        return self.relation.phrasings[phrasing].format(s=self.subject)

    def paraphrase(self, index: int = 0) -> str:
        """The same in a phrasing that was held out of training."""
        return self.relation.held_out[index].format(s=self.subject)


@dataclass(frozen=True)
class Document:
    """A training text as pieces; a piece marked True is an answer (an object, or what ends it). `names` are its subjects."""

    pieces: tuple[tuple[str, bool], ...]
    names: tuple[str, ...]
    ends: bool = False  # the text closes with end-of-sequence right after the answer


@dataclass
class World:
    """All subjects and facts of one `WorldSettings`."""

    settings: WorldSettings
    subjects: list[str]
    occupation: dict[str, str]
    facts: dict[str, list[Fact]]
    words: list[str]
    parts: dict[str, list[list[str]]] = field(repr=False, default_factory=dict)
    closed: list[str] = field(repr=False, default_factory=list)

    @classmethod
    def build(cls, settings: WorldSettings = WorldSettings()) -> "World":
        """Draw a world.

        Raises:
            ValueError: if there are fewer names than subjects.
        """
        if settings.subjects > settings.first_names * settings.last_names:
            raise ValueError(
                f"{settings.subjects} subjects need more than {settings.first_names} x {settings.last_names} names"
            )
        rng = random.Random(settings.seed)
        make = word_maker(rng)
        firsts = [make() for _ in range(settings.first_names)]
        lasts = [make() for _ in range(settings.last_names)]
        parts = {
            relation.name: [
                [make() for _ in range(settings.first_parts if position == 0 else settings.later_parts)]
                for position in range(settings.max_length)
            ]
            for relation in RELATIONS
            if not relation.closed
        }
        closed_words = [make() for _ in range(settings.closed_objects)]
        lengths = [1 + i % settings.max_length for i in range(settings.closed_objects)]
        closed = [" ".join(rng.sample(closed_words, length)) for length in lengths]
        pairs = [(first, last) for first in firsts for last in lasts]
        subjects = [f"{first} {last}" for first, last in rng.sample(pairs, settings.subjects)]
        facts = {subject: [] for subject in subjects}
        for relation in RELATIONS:
            pool = closed if relation.closed else parts[relation.name]
            for subject, obj in zip(subjects, _objects(rng, pool, settings, relation.closed)):
                facts[subject].append(Fact(subject, relation, obj))
        occupation = {subject: rng.choice(OCCUPATIONS) for subject in subjects}
        words = sorted({*firsts, *lasts, *closed_words} | {w for p in parts.values() for q in p for w in q})
        return cls(settings, subjects, occupation, facts, words, parts, closed)

    def all_facts(self) -> list[Fact]:
        """Every fact, subject by subject."""
        return [fact for subject in self.subjects for fact in self.facts[subject]]

    def other_object(self, fact: Fact, length: int, rng: random.Random) -> str:
        """Another object of the same relation, `length` tokens long, that shares no word with the fact's own."""
        own = set(fact.object.split())
        if fact.relation.closed:
            pool = [o for o in self.closed if len(o.split()) == length and not own & set(o.split())]
            return rng.choice(pool)
        choices = [[w for w in row if w not in own] for row in self.parts[fact.relation.name][:length]]
        return " ".join(rng.choice(row) for row in choices)

    def neighbours(self, fact: Fact, n: int) -> list[Fact]:
        """Up to `n` facts of other subjects in the same relation that share the object's first part."""
        index = [relation.name for relation in RELATIONS].index(fact.relation.name)
        first = fact.object.split()[0]
        same = (self.facts[s][index] for s in self.subjects if s != fact.subject)
        return [other for other in same if other.object.split()[0] == first][:n]

    # ---- texts -----------------------------------------------------------------------------------------------
    def document(self, rng: random.Random) -> Document:
        """One training text: a biography, two of them, a single sentence that ends, or open vocabulary."""
        kind = rng.random()
        if kind < 0.15:
            pieces, name = open_vocabulary(rng)
            return Document(tuple(pieces), (name,), ends=rng.random() < 0.5)
        if kind < 0.45:
            return self._single(rng)
        return self._biography(rng, people=2 if kind > 0.85 else 1)

    def _single(self, rng: random.Random) -> Document:
        subject = rng.choice(self.subjects)
        fact = rng.choice(self.facts[subject])
        prompt = fact.prompt(rng.randrange(len(fact.relation.phrasings)))
        return Document(((prompt, False), (" " + fact.object, True)), (subject,), ends=True)

    def _biography(self, rng: random.Random, people: int) -> Document:
        names = rng.sample(self.subjects, people)
        told = [(subject, *sentence) for subject in names for sentence in self._told_of(subject, rng)]
        rng.shuffle(told)
        pieces: list[tuple[str, bool]] = []
        before = None
        for subject, phrasing, answer in told:
            by_name = subject != before or not phrasing.startswith("{s}") or rng.random() < 0.5
            prompt = phrasing.format(s=subject if by_name else self._pronoun(subject))
            pieces += [(" " + prompt if pieces else prompt, False), (" " + answer, True), (".", False)]
            before = subject
        return Document(tuple(pieces), tuple(names))

    def _told_of(self, subject: str, rng: random.Random) -> list[tuple[str, str]]:
        facts = [(f.relation.phrasings[rng.randrange(len(f.relation.phrasings))], f.object) for f in self.facts[subject]]
        return [*facts, ("{s} is a", self.occupation[subject])]

    @staticmethod
    def _pronoun(subject: str) -> str:
        return "She" if sum(map(ord, subject)) % 2 else "He"


def _objects(rng: random.Random, pool: list, settings: WorldSettings, closed: bool) -> list[str]:
    """One object for each subject: lengths and, at each position, parts spread as evenly as they go."""
    n = settings.subjects
    if closed:
        drawn = [pool[i % len(pool)] for i in range(n)]
        rng.shuffle(drawn)
        return drawn
    lengths = [1 + i % settings.max_length for i in range(n)]
    rng.shuffle(lengths)
    columns = []
    for row in pool:
        column = [row[i % len(row)] for i in range(n)]
        rng.shuffle(column)
        columns.append(column)
    return [" ".join(columns[p][i] for p in range(lengths[i])) for i in range(n)]
