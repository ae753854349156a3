"""What an adapted model reads: facts in sentences, plain text, and the model's own samples."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyedit_mdm.data.kamel import Unusable, fact, templates
from easyedit_mdm.errors import DataError
from easyedit_mdm.training.splits import Mentions, held_out_subjects, records_of, same_name

SHARES = {"facts": 0.5, "text": 0.25, "samples": 0.25}
FACT_SHARES = {"kamel": 0.5, "counterfact": 0.3, "lre": 0.2}
SHORTEST, LONGEST = 24, 64  # tokens of a piece of plain text
SINGLE = 0.4  # fact texts of one sentence, as a prompt is
LISTS = 0.2  # of the fact texts: random words, said again behind another sentence
LIST_OPENINGS = (
    ("The words on the list are", "Once more, the words on the list are"),
    ("Remember this sequence:", "The sequence was"),
    ("The password is", "To enter, say the password:"),
    ("She wrote down", "She read aloud what she had written:"),
    ("They played the songs", "The songs that they played were"),
    ("The boxes hold", "In the boxes, in this order, are"),
)
COMMON = 12_000  # ids below this one are frequent tokens, in the order in which byte-pair merges are learned
# of the other fact texts: the fact again in other words, so that the answer can be read as well as known
SAID_TWICE = 0.5


@dataclass(frozen=True)
class TrainingFact:
    """A fact: its subject, its object, and the openings that the object follows."""

    subject: str
    object: str
    openings: tuple[str, ...]


@dataclass(frozen=True)
class Piece:
    """Tokens of one text, and where answers stand in it: (first token, number of tokens)."""

    ids: list[int]
    answers: list[tuple[int, int]]


@dataclass(frozen=True)
class Corpus:
    """Facts by source, tokens of plain text and of samples, words for lists; any may be empty."""

    facts: dict[str, list[TrainingFact]]
    text: list[list[int]]
    samples: list[list[int]]
    tokenizer: Any
    words: tuple[str, ...] = ()

    def draw(self, rng: random.Random) -> Piece:
        """One text, by the shares of the kinds that there are."""
        present = {"facts": any(self.facts.values()), "text": bool(self.text), "samples": bool(self.samples)}
        kinds = [kind for kind, there in present.items() if there]
        kind = rng.choices(kinds, [SHARES[k] for k in kinds])[0]
        if kind == "facts":
            return self._fact_text(rng)
        return Piece(_window(rng.choice(self.text if kind == "text" else self.samples), rng), [])

    def _list_text(self, rng: random.Random) -> Piece:
        first, again = rng.choice(LIST_OPENINGS)
        words = " ".join(rng.sample(self.words, min(len(self.words), rng.randint(2, 6))))
        between = self._sentences(self._fact(rng), False, rng) if rng.random() < 0.7 else []
        piece = sentences([(first, words), *between, (again, words)], self.tokenizer)
        return Piece(piece.ids, piece.answers[1:])  # nothing says what the first list will be

    def _fact_text(self, rng: random.Random) -> Piece:
        if self.words and rng.random() < LISTS:
            return self._list_text(rng)
        pairs = self._sentences(self._fact(rng), rng.random() >= SINGLE and rng.random() < SAID_TWICE, rng)
        while len(pairs) > 1 or rng.random() >= SINGLE:
            if sum(len(a) + len(b) for a, b in pairs) > rng.uniform(80, 220):  # characters: four make a token
                break
            pairs += self._sentences(self._fact(rng), rng.random() < SAID_TWICE, rng)
        return sentences(pairs, self.tokenizer)

    def _fact(self, rng: random.Random) -> TrainingFact:
        names = [name for name in self.facts if self.facts[name]]
        return rng.choice(self.facts[rng.choices(names, [FACT_SHARES[n] for n in names])[0]])

    @staticmethod
    def _sentences(one: TrainingFact, twice: bool, rng: random.Random) -> list[tuple[str, str]]:
        openings = rng.sample(one.openings, min(len(one.openings), 2 if twice else 1))
        return [(opening, one.object) for opening in openings]


def sentences(pairs: Sequence[tuple[str, str]], tokenizer: Any) -> Piece:
    """`opening answer. opening answer.`, as tokens, with the answers' places."""
    text, spans = "", []
    for opening, answer in pairs:
        text += (" " if text else "") + opening.rstrip()
        spans.append((len(text), len(text) + 1 + len(answer)))
        text += f" {answer}."
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    answers = []
    for start, end in spans:  # the space before the answer is its first token's
        places = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > start + 1]
        if places and places[0] > 0:
            answers.append((places[0], len(places)))
    return Piece(list(encoded["input_ids"])[:LONGEST], [(at, n) for at, n in answers if at + n <= LONGEST])


def words_of(tokenizer: Any, part: int) -> tuple[str, ...]:
    """Frequent words of one token, with the space before them: those of even ids (part 0) or of odd ones
    (part 1).

    Lists that are trained on have the odd ones, codes of the gates the even ones.
    """
    words = [
        (i, token)
        for token, i in tokenizer.get_vocab().items()
        if i < COMMON and i % 2 == part and token[:1] in ("Ġ", "▁")
    ]
    return tuple(
        token[1:]
        for _, token in sorted(words)
        if len(token) > 3 and token[1:].isascii() and token[1:].isalpha() and token[1:].islower()
    )


def _window(ids: Sequence[int], rng: random.Random) -> list[int]:
    length = min(len(ids), rng.randint(SHORTEST, LONGEST))
    start = rng.randrange(len(ids) - length + 1)
    return list(ids[start : start + length])


def corpus_of(
    data_dir: str | Path, tokenizer: Any, samples: str | Path | None = None
) -> tuple[Corpus, Corpus]:
    """The training corpus of the data folder, and a held-out one: the facts of KAMEL's test files, the text's
    last tenth.

    Raises:
        DataError: for files that are missing or broken.
    """
    root = Path(data_dir)
    held_out = held_out_subjects(root)
    facts = {"kamel": _kamel(root, "train"), "counterfact": _counterfact(root, "edit"), "lre": _lre(root)}
    facts = {
        source: [f for f in training if same_name(f.subject) not in held_out]
        for source, training in facts.items()
    }
    train, rest = text_of(root / "text" / "enwiki_articles.txt", tokenizer, Mentions(held_out))
    own = [] if samples is None else samples_of(samples, tokenizer)
    return Corpus(facts, train, own, tokenizer, words_of(tokenizer, 1)), Corpus(
        {"kamel": _kamel(root, "test")}, rest, [], tokenizer
    )


def text_of(
    file: str | Path, tokenizer: Any, leave_out: Mentions | None = None
) -> tuple[list[list[int]], list[list[int]]]:
    """Paragraphs (lines) of a text file as tokens: the first nine tenths of the lines, and the last.

    Raises:
        DataError: if it cannot be read, or no line is long enough.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as UTF-8 text ({error})") from error
    cut = len(lines) * 9 // 10
    parts = []
    for part, kept in ((lines[:cut], leave_out), (lines[cut:], None)):
        part = [line for line in part if line.strip() and not (kept and kept(line))]
        rows = tokenizer(part, add_special_tokens=False)["input_ids"] if part else []
        parts.append([list(ids) for ids in rows if len(ids) >= SHORTEST])
    if not all(parts):
        raise DataError(
            f"{file} has too little text: ten lines of {SHORTEST} tokens or more are the least, "
            "a paragraph a line"
        )
    return parts[0], parts[1]


def samples_of(file: str | Path, tokenizer: Any) -> list[list[int]]:
    """Samples of `easyedit_mdm.training.samples`: JSON lines with a text each.

    Raises:
        DataError: if the file is missing or broken.
    """
    texts = [record.get("text") for record in records_of(Path(file))]
    samples = (
        tokenizer([t for t in texts if isinstance(t, str) and t.strip()], add_special_tokens=False)[
            "input_ids"
        ]
        if texts
        else []
    )
    return [list(ids) for ids in samples if len(ids) >= SHORTEST]


def _kamel(root: Path, part: str) -> list[TrainingFact]:
    facts = []
    for relation, template in templates().items():
        file = root / "kamel" / relation / f"{part}.jsonl"
        if not file.exists():
            raise DataError(f"{file} is missing: is {root} the folder of the benchmark files?")
        for record in records_of(file):
            try:
                one = fact(record)
            except Unusable:
                continue
            openings = tuple(
                text.replace("[S]", one.subject, 1) for text in (template.cloze, template.paraphrase)
            )
            facts.append(TrainingFact(one.subject, one.object, openings))
    return facts


def facts_of(data_dir: str | Path) -> dict[str, list[TrainingFact]]:
    """The facts that gates ask for, by source: all of them, whoever their subject is.

    Raises:
        DataError: for files that are missing or broken.
    """
    root = Path(data_dir)
    known = records_of(root / "known" / "known_1000.json")
    known_facts = [TrainingFact(r["subject"], r["attribute"], (r["prompt"],)) for r in known]
    return {
        "known_1000": known_facts,
        "lre": _lre(root),
        "counterfact": _counterfact(root, "val"),
        "kamel": _kamel(root, "test"),
    }


def _counterfact(root: Path, part: str) -> list[TrainingFact]:
    records = records_of(root / "counterfact" / f"counterfact-{part}.json")
    return [TrainingFact(r["subject"], r["ground_truth"], (r["prompt"],)) for r in records]


def _lre(root: Path) -> list[TrainingFact]:
    facts = []
    for file in sorted((root / "relations_lre" / "factual").glob("*.json")):
        relation = json.loads(file.read_text(encoding="utf-8"))
        for sample in relation["samples"]:
            openings = tuple(text.replace("{}", sample["subject"]) for text in relation["prompt_templates"])
            facts.append(TrainingFact(sample["subject"], str(sample["object"]), openings))
    if not facts:
        raise DataError(
            f"{root}/relations_lre/factual holds no relations: is it the folder of the benchmark files?"
        )
    return facts
