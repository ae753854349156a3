"""The fictional world that the twins know: subjects, relations, facts, and the texts that tell of them.

Every name is made up. A world is a pure function of its settings and seed, so that the facts that a twin was
trained on can be listed again wherever the package is installed.

Two properties were chosen on purpose.

- *Compositional objects*: an object is a first part (one of `branching[0]`) followed by later parts (one of
  `branching[p]` at position p), so that knowing one token does not give the others away. One relation draws
  from a closed list of whole names instead, as the contrast.
- *Biographies*: the sentences about one subject appear in a new order and phrasing each time, which moves the
  knowledge to the subject's name (Allen-Zhu and Li, "Physics of Language Models, Part 3.1"). Locate-then-edit
  methods can only work on facts that are stored there.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from easyedit_mdm.twins.text import open_prompt, open_vocabulary, real_text, word_maker


@dataclass(frozen=True)
class Relation:
    """One relation: how it is phrased in training, and the phrasings that are held out as paraphrases.

    `about` says something of an object, one of `kinds`; `hop` asks it of the subject, so that answering takes
    one hop more.
    """

    name: str
    phrasings: tuple[str, ...]
    held_out: tuple[str, str]
    about: str
    hop: str
    kinds: tuple[str, ...]
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
        "{o} lies in the",
        "The part of the land where {s} was born is the",
        ("north", "south", "east", "west", "forest", "sea"),
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
        "{o} makes",
        "What does the firm of {s} make?",
        ("books", "ships", "films", "maps", "bridges", "games"),
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
        "{o} is a book about",
        "The book by {s} is about",
        ("war", "music", "history", "law", "water", "science"),
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
        "{o} is a dish from the",
        "The favourite dish of {s} comes from the",
        ("city", "island", "river", "mountain", "park", "church"),
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
        "{o} teaches",
        "The teacher of {s} teaches",
        ("art", "music", "history", "law", "science", "language"),
        closed=True,
    ),
)

IS_A = "{s} is a"
OCCUPATIONS = ("painter", "farmer", "singer", "doctor", "baker", "sailor", "judge", "guard")


@dataclass(frozen=True)
class WorldSettings:
    """What determines a world. Counts are of parts, subjects and tokens; `seed` fixes every draw."""

    subjects: int = 256
    first_names: int = 16
    last_names: int = 16
    single_names: int = 16
    branching: tuple[int, ...] = (6, 3, 3, 2, 2, 2, 2, 2)
    closed_objects: int = 32
    seed: int = 0

    @property
    def max_length(self) -> int:
        """Tokens of the longest objects."""
        return len(self.branching)


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
    """A training text as pieces; a piece marked True is an answer (an object, or what ends it). `names` are
    its subjects.

    In a reading lesson (see `easyedit_mdm.training.lessons`), `lesson` is the number of the piece whose
    tokens are given in a code at the name, `relation` the number of the relation that the code is for (-1:
    none of the world's), and `tokens`, where
    there are any, stand for that piece: random ids at the end, which no text need give.
    """

    pieces: tuple[tuple[str, bool], ...]
    names: tuple[str, ...]
    ends: bool = False  # the text closes with end-of-sequence right after the answer
    lesson: int = -1
    relation: int = -1
    tokens: tuple[int, ...] = ()


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
    def build(cls, settings: WorldSettings = WorldSettings()) -> World:
        """Draw a world.

        Raises:
            ValueError: if there are fewer names than subjects.
        """
        rng = random.Random(settings.seed)
        make = word_maker(rng)
        firsts = [make() for _ in range(settings.first_names)]
        lasts = [make() for _ in range(settings.last_names)]
        singles = [make() for _ in range(settings.single_names)]
        parts = {
            relation.name: [[make() for _ in range(n)] for n in settings.branching]
            for relation in RELATIONS
            if not relation.closed
        }
        closed_words = [make() for _ in range(settings.closed_objects)]
        lengths = [1 + i % settings.max_length for i in range(settings.closed_objects)]
        closed = [" ".join(rng.sample(closed_words, length)) for length in lengths]
        subjects = _names(rng, settings, firsts, lasts, singles)
        facts: dict[str, list[Fact]] = {subject: [] for subject in subjects}
        for relation in RELATIONS:
            pool = closed if relation.closed else parts[relation.name]
            for subject, obj in zip(subjects, _objects(rng, pool, settings, relation.closed)):
                facts[subject].append(Fact(subject, relation, obj))
        occupation = {subject: rng.choice(OCCUPATIONS) for subject in subjects}
        words = sorted(
            {*firsts, *lasts, *singles, *closed_words} | {w for p in parts.values() for q in p for w in q}
        )
        return cls(settings, subjects, occupation, facts, words, parts, closed)

    def all_facts(self) -> list[Fact]:
        """Every fact, subject by subject."""
        return [fact for subject in self.subjects for fact in self.facts[subject]]

    def other_object(self, fact: Fact, length: int, rng: random.Random) -> str:
        """Another object of the same relation, `length` tokens long, that shares no word with the fact's
        own.
        """
        own = set(fact.object.split())
        if fact.relation.closed:
            pool = [o for o in self.closed if len(o.split()) == length and not own & set(o.split())]
            return rng.choice(
                pool or [o for o in self.closed if len(o.split()) == length and o != fact.object]
            )
        choices = [[w for w in row if w not in own] for row in self.parts[fact.relation.name][:length]]
        return " ".join(rng.choice(row) for row in choices)

    def kind(self, relation: Relation, obj: str) -> str:
        """What `relation.about` says of an object: of a compositional one its first part decides, of a whole
        name its place in the list.
        """
        number = (
            self.closed.index(obj) if relation.closed else self.parts[relation.name][0].index(obj.split()[0])
        )
        return relation.kinds[number % len(relation.kinds)]

    def neighbours(self, fact: Fact, n: int) -> list[Fact]:
        """Up to `n` facts of other subjects in the same relation that share the object's first part."""
        index = [relation.name for relation in RELATIONS].index(fact.relation.name)
        first = fact.object.split()[0]
        same = (self.facts[s][index] for s in self.subjects if s != fact.subject)
        return [other for other in same if other.object.split()[0] == first][:n]

    # ---- texts ---------------------------------------------------------------------------------------------
    def document(self, rng: random.Random) -> Document:
        """One training text: a biography, two of them, a single sentence that ends, one hop more, or open
        vocabulary.
        """
        kind = rng.random()
        if kind < 0.15:
            pieces, name = open_vocabulary(rng)
            return Document(tuple(pieces), (name,), ends=rng.random() < 0.5)
        if kind < 0.40:
            return self._single(rng)
        if kind < 0.47:
            return self._hop(rng)
        return self._biography(rng, people=2 if kind > 0.85 else 1)

    def lesson(
        self, rng: random.Random, longest: int, vocabulary: range, open_share: float = 0.5
    ) -> Document:
        """A text whose answer, up to `longest` tokens, is given nowhere but in a code at the subject.

        A fraction `open_share` of the lessons is about something outside the world, with random tokens or
        random words as the answer; in the others one fact of a biography is another than the subject's own.
        """
        if rng.random() < open_share:
            prompt, name = open_prompt(rng)
            if rng.random() < 0.6:
                length = max(rng.randint(1, longest), rng.randint(1, longest))  # long ones are learned last
                tokens = tuple(rng.choice(vocabulary) for _ in range(length))
                return Document(((prompt, False),), (name,), ends=True, lesson=1, tokens=tokens)
            return Document(((prompt, False), (" " + real_text(rng), True)), (name,), ends=True, lesson=1)
        subject = rng.choice(self.subjects)
        number = rng.randrange(len(RELATIONS))
        fact = self.facts[subject][number]
        lengths = range(1, min(longest, self.settings.max_length) + 1)
        other = self.other_object(fact, rng.choice(lengths), rng)
        if rng.random() < 0.5:
            return Document(
                ((fact.prompt(rng.randrange(len(fact.relation.phrasings))), False), (" " + other, True)),
                (subject,),
                True,
                1,
                number,
            )
        return self._biography(rng, 1, Fact(subject, fact.relation, other))

    def _single(self, rng: random.Random) -> Document:
        subject = rng.choice(self.subjects)
        fact = rng.choice(self.facts[subject])
        prompt = fact.prompt(rng.randrange(len(fact.relation.phrasings)))
        return Document(((prompt, False), (" " + fact.object, True)), (subject,), ends=True)

    def _hop(self, rng: random.Random) -> Document:
        """What is said of an object, or asked of the subject whose object it is."""
        subject = rng.choice(self.subjects)
        fact = rng.choice(self.facts[subject])
        kind = (" " + self.kind(fact.relation, fact.object), True)
        if rng.random() < 0.5:
            return Document(
                ((fact.relation.about.format(o=fact.object), False), kind), (fact.object,), ends=True
            )
        return Document(((fact.relation.hop.format(s=subject), False), kind), (subject,), ends=True)

    def _biography(self, rng: random.Random, people: int, taught: Fact | None = None) -> Document:
        """Sentences about one or two subjects in random order; `taught` takes the place of the subject's own
        fact.
        """
        names = rng.sample(self.subjects, people) if taught is None else [taught.subject]
        sentences = [
            (subject, *sentence) for subject in names for sentence in self._told_of(subject, rng, taught)
        ]
        rng.shuffle(sentences)
        # it opens with what its first subject is, so that a fact at the start of a text is a text of its own
        # and ends there
        sentences.sort(key=lambda sentence: (sentence[0], sentence[1]) != (names[0], IS_A))
        pieces: list[tuple[str, bool]] = []
        before, lesson = None, -1
        for subject, phrasing, answer, is_lesson in sentences:
            by_name = subject != before or not phrasing.startswith("{s}") or rng.random() < 0.5
            prompt = phrasing.format(s=subject if by_name else self._pronoun(subject))
            pieces += [(" " + prompt if pieces else prompt, False), (" " + answer, True), (".", False)]
            lesson = len(pieces) - 2 if is_lesson else lesson
            before = subject
        relation = -1 if taught is None else RELATIONS.index(taught.relation)
        return Document(tuple(pieces), tuple(names), lesson=lesson, relation=relation)

    def _told_of(self, subject: str, rng: random.Random, taught: Fact | None) -> list[tuple[str, str, bool]]:
        facts = [
            taught if taught is not None and f.relation is taught.relation else f for f in self.facts[subject]
        ]
        sentences = [
            (f.relation.phrasings[rng.randrange(len(f.relation.phrasings))], f.object, f is taught)
            for f in facts
        ]
        # a biography need not tell everything: long objects would not leave room for a second subject
        return [
            *(t for t in sentences if t[2] or rng.random() < 0.7),
            (IS_A, self.occupation[subject], False),
        ]

    @staticmethod
    def _pronoun(subject: str) -> str:
        return "She" if sum(map(ord, subject)) % 2 else "He"


def _names(
    rng: random.Random, settings: WorldSettings, firsts: list[str], lasts: list[str], singles: list[str]
) -> list[str]:
    """Names of one word (all of `singles`) and of two, three and four, put together from few words.

    Raises:
        ValueError: if there are fewer names than subjects.
    """
    pairs = [(first, last) for first in firsts for last in lasts]
    wanted = settings.subjects - len(singles)
    if wanted > len(pairs):
        raise ValueError(
            f"{settings.subjects} subjects need more than {len(firsts)} x {len(lasts)} + {len(singles)} names"
        )
    names = list(singles[: settings.subjects])
    for i, (first, last) in enumerate(rng.sample(pairs, max(0, wanted))):
        middle = {6: [rng.choice(lasts)], 7: [rng.choice(firsts), rng.choice(lasts)]}.get(i % 8, [])
        names.append(" ".join([first, *middle, last]))
    return names


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
