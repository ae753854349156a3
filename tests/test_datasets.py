"""Benchmark data: every format and every reason for skipping on small files, counts on the real ones."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from easyedit_mdm.data.cases import DATASETS, BenchCase, Loaded, load_cases
from easyedit_mdm.data.kamel import Counterfact, Template, Unusable, counterfacts, lengths, templates
from easyedit_mdm.editing.request import EditRequest
from easyedit_mdm.errors import DataError, UnknownNameError

REQUEST = {
    "prompt": "The capital of Peru is",
    "subject": "Peru",
    "target_new": "Oslo",
    "ground_truth": "Lima",
}
ZSRE = {
    "subject": "Ann", "src": "Where was Ann born?", "pred": "Rome", "rephrase": "What is Ann's birthplace?",
    "alt": "Bonn", "answers": ["Rome",
    "Roma"],
    "loc": "nq question: who sang it", "loc_ans": "Bob", "cond": "",
    "portability": {"New Question": "In which country was Ann born?",
    "New Answer": "Germany"},
}  # fmt: skip
COUNTERFACT = {
    "case_id": 7, **REQUEST, "rephrase_prompt": "Peru is governed from",
    "locality_prompt": "The capital of Chile is",
    "locality_ground_truth": "Santiago",
}  # fmt: skip
ROME = {
    "case_id": 34,
    "requested_rewrite": {
        "prompt": "{} was employed in", "subject": "Ann", "target_new": {"str": "Bonn", "id": "Q1"},
        "target_true": {"str": "Rome", "id": "Q2"},
    },
    "paraphrase_prompts": ["Ann worked in", "Ann had work in"], "neighborhood_prompts": ["Bob worked in",
        "Eve worked in"],
}  # fmt: skip
FORMATS = {"zsre": ZSRE, "counterfact": COUNTERFACT, "requests": REQUEST}


class Words:
    """A tokenizer of words, after a first token of its own; a word that ends in a hyphen is one token with
    the next.
    """

    def __call__(self, texts: str | list[str], add_special_tokens: bool = True) -> dict[str, Any]:
        if isinstance(texts, str):
            return {"input_ids": self._ids(texts, add_special_tokens)}
        return {"input_ids": [self._ids(text, add_special_tokens) for text in texts]}

    def _ids(self, text: str, special: bool) -> list[int]:
        return [0] * special + [1 + hash(word) % 10_000_000 for word in text.replace("- ", "-").split()]


def write(folder: Path, *records: Any) -> Path:
    """A JSON list."""
    path = folder / "records.json"
    path.write_text(json.dumps(list(records)), encoding="utf-8")
    return path


def reasons(loaded: Loaded) -> list[str]:
    """Why records were skipped."""
    return [skipped.reason for skipped in loaded.skipped]


def label(chosen: str, *names: str) -> dict[str, Any]:
    """An object as KAMEL's test files give it."""
    return {"rdf": chosen, "alternative": list(names), "chosen": chosen}


def line(subject: str, *objects: Any) -> dict[str, Any]:
    """A line of KAMEL's test files."""
    objects = tuple(label(o) if isinstance(o, str) else o for o in objects)
    return {
        "index": [1],
        "sub_label": subject,
        "obj_uri": [f"Q{i}" for i in range(len(objects))],
        "obj_label": list(objects),
    }


def kamel_folder(folder: Path, split: str = "test", **relations: list[dict[str, Any]]) -> Path:
    """A folder of benchmark data that holds only KAMEL."""
    for relation, records in relations.items():
        path = folder / "kamel" / relation / f"{split}.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text(
            "\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n", encoding="utf-8"
        )
    return folder


# ---- formats -----------------------------------------------------------------------------------------------


def test_zsre(tmp_path):
    loaded = load_cases("zsre", data_file=write(tmp_path, ZSRE, {**ZSRE, "portability": None, "alt": "Ulm"}))
    case = loaded.cases[0]
    assert (case.case_id, case.prompt, case.subject, case.target_new, case.ground_truth) == (
        0,
        "Where was Ann born?",
        "Ann",
        "Bonn",
        "Rome",
    )
    assert case.rephrase_prompts == ("What is Ann's birthplace?",)
    assert case.locality == {"neighborhood": (("nq question: who sang it", "Bob"),)}
    assert case.portability == {"one_hop": (("In which country was Ann born?", "Germany"),)}
    assert loaded.cases[1].portability == {} and not loaded.skipped


def test_counterfact_in_both_schemas(tmp_path):
    """One file may even hold both: the record says which it is."""
    edit, rome = load_cases("counterfact", data_file=write(tmp_path, COUNTERFACT, ROME)).cases
    assert (edit.case_id, edit.ground_truth, edit.target_true, edit.neighborhood) == (7, "Lima", "", ())
    assert (
        edit.locality == {"neighborhood": (("The capital of Chile is", "Santiago"),)}
        and edit.portability == {}
    )
    assert (rome.case_id, rome.prompt, rome.target_new, rome.ground_truth, rome.target_true) == (
        34,
        "Ann was employed in",
        "Bonn",
        "Rome",
        "Rome",
    )
    assert rome.rephrase_prompts == ("Ann worked in", "Ann had work in") and rome.neighborhood == (
        "Bob worked in",
        "Eve worked in",
    )
    assert rome.locality == {"neighborhood": (("Bob worked in", "Rome"), ("Eve worked in", "Rome"))}
    assert rome.request() == {"prompt": "Ann was employed in", "subject": "Ann", "target_new": "Bonn"}


def test_counterfact_default_files(tmp_path):
    """EasyEdit's split where there is one, else ROME's."""
    (tmp_path / "counterfact").mkdir()
    (tmp_path / "counterfact/counterfact_rome_700.json").write_text(json.dumps([ROME]))
    loaded = load_cases("counterfact", tmp_path)
    assert loaded.cases[0].case_id == 34 and list(loaded.files) == ["counterfact/counterfact_rome_700.json"]
    (tmp_path / "counterfact/counterfact-edit.json").write_text(json.dumps([COUNTERFACT]))
    loaded = load_cases("counterfact", tmp_path)
    assert loaded.cases[0].case_id == 7 and [len(h) for h in loaded.files.values()] == [64]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Lima", "Lima"),
        (["Lima", "Ciudad"], "Lima"),
        ([["Lima", "LIM"], ["x"]], "Lima"),
        ([[], ["Lima"]], "Lima"),
        ([[]], ""),
        ([], ""),
        ("", ""),
    ],
)
def test_first_alias(tmp_path, given, expected):
    record = {
        **REQUEST,
        "ground_truth": given,
        "portability": {"Reasoning": [{"prompt": "It lies in", "ground_truth": given}]},
    }
    for name in ("knowedit", "knowedit_counterfact", "requests"):
        (case,) = load_cases(name, data_file=write(tmp_path, record)).cases
        assert case.ground_truth == expected and case.portability == {
            "Reasoning": (("It lies in", expected),)
        }


def test_requests_in_both_shapes(tmp_path):
    """Sections as EasyEdit's `edit` takes them (texts or lists in parallel), and as KnowEdit has them (a list
    of probes).
    """
    one = {
        **REQUEST,
        "prompt": "{} has the capital",
        "rephrase_prompt": ["In Peru, the capital is"],
        "case_id": "mine",
    }
    one |= {
        "locality": {"near": {"prompt": ["a", "b"], "ground_truth": ["1", ["2", "3"]]}},
        "portability": {"hop": {"prompt": "c", "ground_truth": "4"}},
    }
    two = {
        **REQUEST,
        "rephrase_prompt": "x",
        "locality": {"a": [{"prompt": "p"}, {"prompt": "q", "ground_truth": [["r", "s"]]}], "b": []},
    }
    first, second = load_cases("requests", data_file=write(tmp_path, one, two)).cases
    assert (
        first.case_id == "mine"
        and first.prompt == "Peru has the capital"
        and first.rephrase_prompts == ("In Peru, the capital is",)
    )
    assert first.locality == {"near": (("a", "1"), ("b", "2"))} and first.portability == {
        "hop": (("c", "4"),)
    }
    assert second.locality == {"a": (("p", ""), ("q", "r")), "b": ()} and second.rephrase_prompts == ("x",)
    bare = {key: REQUEST[key] for key in ("prompt", "subject", "target_new")}
    (third,) = load_cases("requests", data_file=write(tmp_path, bare)).cases
    assert third == BenchCase(0, **bare, ground_truth="", rephrase_prompts=(), locality={}, portability={})


@pytest.mark.parametrize(
    ("name", "split_size"), [("twins", 960), ("twins_validation", 320), ("twins_closed", 320)]
)
def test_twins(name, split_size):
    loaded = load_cases(name)
    assert len(loaded.cases) + len(loaded.skipped) == split_size and loaded.cases and not loaded.files
    for case in loaded.cases:
        assert case.subject in case.prompt and len(case.rephrase_prompts) == 2 and len(case.same_subject) == 4
        assert case.target_new != case.ground_truth and all(
            case.subject in prompt for prompt, _ in case.same_subject
        )
        assert all(case.subject not in prompt for prompt, _ in case.locality["neighborhood"])


# ---- what cannot be used -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("requests", {"target_new": ""}, "target_new is empty"),
        ("requests", {"target_new": "  "}, "target_new is empty"),
        ("requests", {"target_new": None}, "target_new is missing"),
        ("requests", {"target_new": 5}, "target_new is not text but int"),
        ("requests", {"target_new": "\ud800"}, "target_new is not valid Unicode"),
        ("requests", {"prompt": ""}, "prompt is empty"),
        ("requests", {"subject": ["Peru"]}, "subject is not text but list"),
        ("requests", {"subject": "Chile"}, "the subject is not in the prompt"),
        ("requests", {"subject": "peru"}, "the subject is not in the prompt"),
        ("requests", {"prompt": "{} and {}"}, "'{}' marks"),
        ("requests", {"subject": "{}"}, "'{}' marks"),
        ("requests", {"ground_truth": {"a": 1}}, "ground_truth is not text but dict"),
        ("requests", {"ground_truth": [[["deep"]]]}, "ground_truth is not text but list"),
        ("requests", {"rephrase_prompt": [""]}, "rephrase_prompt is empty"),
        ("requests", {"locality": "near"}, "locality is not an object but str"),
        ("requests", {"portability": {"hop": "x"}}, "portability.hop is not an object but str"),
        ("requests", {"portability": {"hop": {"ground_truth": "x"}}}, "portability.hop.prompt is missing"),
        (
            "requests",
            {"locality": {"near": {"prompt": ["a", "b"], "ground_truth": ["1"]}}},
            "locality.near has not as many answers as prompts",
        ),
        (
            "requests",
            {"locality": {"near": {"prompt": ["a"], "ground_truth": "1"}}},
            "locality.near has not as many answers as prompts",
        ),
        (
            "requests",
            {"locality": {"near": {"prompt": "a", "ground_truth": 1}}},
            "locality.near.ground_truth is not text but int",
        ),
        ("zsre", {"alt": None}, "target_new is missing"),
        ("zsre", {"rephrase": None}, "rephrase is missing"),
        ("zsre", {"answers": None}, "answers is missing"),
        ("zsre", {"loc": 3}, "loc is not text but int"),
        ("zsre", {"portability": []}, "portability is not an object but list"),
        ("zsre", {"portability": {"New Answer": "x"}}, "New Question is missing"),
        ("counterfact", {"locality_prompt": None}, "locality_prompt is missing"),
        ("counterfact", {"ground_truth": None}, "ground_truth is missing"),
        ("counterfact", {"requested_rewrite": []}, "requested_rewrite has no target_new"),
        (
            "counterfact",
            {**ROME, "requested_rewrite": {**ROME["requested_rewrite"], "target_new": {"id": "Q1"}}},
            "target_new is missing",
        ),
        (
            "counterfact",
            {**ROME, "requested_rewrite": {**ROME["requested_rewrite"], "target_true": "Rome"}},
            "requested_rewrite has no target_new",
        ),
        (
            "counterfact",
            {**ROME, "requested_rewrite": {**ROME["requested_rewrite"], "prompt": "He was employed in"}},
            "the subject is not in the prompt",
        ),
    ],
)
def test_reasons_for_skipping(tmp_path, name, change, reason):
    """The bad record is listed with its reason, the good one before it is kept."""
    good = FORMATS[name]
    loaded = load_cases(
        name,
        data_file=write(
            tmp_path, good, {**good, "case_id": "bad", **{k: v for k, v in change.items() if k != "case_id"}}
        ),
    )
    assert len(loaded.cases) == 1 and [skipped.record for skipped in loaded.skipped] == ["bad"]
    assert loaded.skipped[0].reason.startswith(reason)


def test_duplicates_and_other_records(tmp_path):
    """Same prompt and target: once. Same prompt, other target: both. A target equal to the ground truth is
    fine.
    """
    loaded = load_cases(
        "requests",
        data_file=write(tmp_path, REQUEST, REQUEST, {**REQUEST, "target_new": "Lima"}, "text", None, {}),
    )
    assert [case.case_id for case in loaded.cases] == [0, 2] and [
        skipped.record for skipped in loaded.skipped
    ] == [1, 3, 4, 5]
    assert reasons(loaded) == [
        "the same prompt and target as an earlier record", "the record is not an object but str",
        "the record is not an object but NoneType", "prompt is missing",
    ]  # fmt: skip


def test_limit_draws_by_seed_and_keeps_order(tmp_path):
    path = write(tmp_path, *({**REQUEST, "target_new": f"Oslo {i}"} for i in range(50)), {})
    ids = {
        seed: [case.case_id for case in load_cases("requests", data_file=path, limit=10, seed=seed).cases]
        for seed in (0, 1)
    }
    assert (
        ids[0] == sorted(random.Random(0).sample(range(50), 10))
        and ids[0] != ids[1]
        and ids[1] == sorted(ids[1])
    )
    for limit in (None, 50, 99):
        loaded = load_cases("requests", data_file=path, limit=limit, seed=3)
        assert [case.case_id for case in loaded.cases] == list(range(50)) and len(loaded.skipped) == 1
    with pytest.raises(DataError, match="limit is 0"):
        load_cases("requests", data_file=path, limit=0)


# ---- files that cannot be read -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[\n{"prompt": }]', "line 2, column 12: not JSON"),
        (b"", "line 1, column 1: not JSON"),
        (b'{"prompt": "x"}', "holds dict, not a list"),
        (b'["\xff"]', "byte 2: not UTF-8"),
        (b"[" * 200_000, "cannot be read"),
        (b"[" + b"9" * 5000 + b"]", "cannot be read"),
    ],
)
def test_broken_files(tmp_path, data, message):
    path = tmp_path / "broken.json"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message) as error:
        load_cases("requests", data_file=path)
    assert "broken.json" in str(error.value)


def test_byte_order_mark(tmp_path):
    path = write(tmp_path, REQUEST)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(load_cases("requests", data_file=path).cases) == 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("zsre", {}, "name it with --data-dir"),
        ("zsre", {"data_dir": "{tmp}/none"}, "is not a folder"),
        ("zsre", {"data_dir": "{tmp}"}, "has no zsre/zsre_mend_eval_portability_gpt4.json"),
        (
            "counterfact",
            {"data_dir": "{tmp}"},
            "counterfact-edit.json nor counterfact/counterfact_rome_700.json",
        ),
        ("zsre", {"data_file": "{tmp}/none.json"}, "none.json cannot be read"),
        ("zsre", {"data_file": "{tmp}"}, "cannot be read"),
        ("requests", {"data_dir": "{tmp}"}, "pass it as data_file"),
        ("twins", {"data_file": "{tmp}/x.json"}, "made, not read"),
        ("kamel", {"data_file": "{tmp}/x.json"}, "not read from one file"),
        ("kamel", {"data_dir": "{tmp}"}, "pass the model's tokenizer"),
        ("kamel", {"data_dir": "{tmp}", "tokenizer": Words()}, "has no relations"),
        ("kamel", {"tokenizer": Words()}, "name it with --data-dir"),
    ],
)
def test_missing_files_say_what_to_do(tmp_path, name, options, message):
    options = {
        key: value.format(tmp=tmp_path) if isinstance(value, str) else value for key, value in options.items()
    }
    with pytest.raises(DataError, match=message):
        load_cases(name, **options)


@pytest.mark.parametrize(
    ("name", "file", "record"),
    [
        ("zsre", "zsre/zsre_mend_eval_portability_gpt4.json", ZSRE),
        ("counterfact", "counterfact/counterfact-edit.json", COUNTERFACT),
        ("counterfact", "counterfact/counterfact_rome_700.json", ROME),
        ("knowedit", "knowedit/ZsRE-test-all.json", REQUEST),
        ("knowedit_counterfact", "knowedit/wiki_counterfact_test_cf.json", REQUEST),
        ("kamel", "kamel/P19/test.jsonl", None),
    ],
)
def test_the_folder_or_the_one_above_it(tmp_path, monkeypatch, name, file, record):
    """`data_dir` may be the data set's own folder: same cases, same names of files; a folder `zsre` may also
    hold another `zsre`.
    """
    path = tmp_path / "data" / file
    path.parent.mkdir(parents=True)
    if record is None:
        path.write_text(
            "\n".join(json.dumps(line(name, town)) for name, town in (("Ann", "Rome"), ("Bob", "Bonn")))
        )
    else:
        path.write_text(json.dumps([record]))
    own = tmp_path / "data" / Path(file).parts[0]
    above = load_cases(name, tmp_path / "data", tokenizer=Words())
    assert above.cases and file in above.files
    assert load_cases(name, own, tokenizer=Words()) == above
    monkeypatch.chdir(own)
    assert load_cases(name, ".", tokenizer=Words()) == above
    (tmp_path / "data").rename(tmp_path / Path(file).parts[0])
    assert load_cases(name, tmp_path / Path(file).parts[0], tokenizer=Words()) == above


def test_the_folder_that_was_given_is_named(tmp_path):
    """Where neither has the file."""
    (tmp_path / "zsre").mkdir()
    with pytest.raises(DataError, match="zsre' has no zsre/zsre_mend"):
        load_cases("zsre", tmp_path / "zsre")


def test_unknown_name():
    with pytest.raises(UnknownNameError, match="unknown data set 'counterfacts'; did you mean 'counterfact'"):
        load_cases("counterfacts")


# ---- KAMEL -------------------------------------------------------------------------------------------------

BORN = Template("[S] was born in", "The place of birth of [S] is")


def test_targets_have_the_length_and_not_the_name():
    """Of the objects of one word, only those that are not another name of the true one."""
    records = [
        line("Ann", label("Rome", "ROMA")),
        line("Bob", "roma"),
        line("Eve", "Bonn"),
        line("Kim", "New York"),
        line("Lee", "Los Angeles"),
    ]
    ann, bob, eve, kim, lee = counterfacts(records, BORN, Words(), "0")
    assert ann == Counterfact("Ann", "Ann was born in", "The place of birth of Ann is", "Rome", "Bonn")
    assert bob.target_new == "Bonn" and eve.target_new in ("Rome", "roma")
    assert kim.target_new == "Los Angeles" and lee.target_new == "New York"


def test_no_target_that_is_true_of_the_subject_elsewhere():
    """Two lines about one subject: neither object is a counterfactual for it."""
    first, second, third = counterfacts(
        [line("Ann", "Rome"), line("Ann", "Bonn"), line("Bob", "Oslo")], BORN, Words(), "0"
    )
    assert first.target_new == second.target_new == "Oslo" and third.target_new in ("Rome", "Bonn")


def test_targets_are_drawn_by_seed():
    records = [line(f"S{i}", f"O{i}") for i in range(30)]
    drawn = {seed: [one.target_new for one in counterfacts(records, BORN, Words(), seed)] for seed in "ab"}
    assert (
        drawn["a"] == [one.target_new for one in counterfacts(records, BORN, Words(), "a")]
        and drawn["a"] != drawn["b"]
    )
    assert len(set(drawn["a"])) > 10


def test_lengths_in_context():
    """After its prompt; alone, where the prompt's own tokens change."""
    words = Words()
    assert lengths(words, ["He was born in", "He was born in "], ["New York", " Rome "]) == [2, 1]
    assert lengths(words, ["It is a semi-", "It is semi-"], ["final", "final match"]) == [1, 2]
    assert lengths(words, [], []) == []


def test_each_fact_is_measured_after_its_own_prompt(monkeypatch):
    """An object that has another length after another subject is passed over."""
    records = [line("Ann", "Rome"), line("Bob", "Bonn"), line("Eve", "Oslo")]
    ids = Words._ids
    monkeypatch.setattr(
        Words,
        "_ids",
        lambda self, text, special: (
            ids(self, text, special) + [9] * (text in ("Bob was born in Rome", "Eve was born in Bonn"))
        ),
    )
    for seed in range(5):
        ann, bob, eve = counterfacts(records, BORN, Words(), str(seed))
        assert ann.target_new in ("Bonn", "Oslo") and bob.target_new == "Oslo" and eve.target_new == "Rome"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (line("Ann", "Rome", "Bonn"), "the fact has several answers"),
        ({**line("Ann", "Rome"), "obj_uri": ["Q1", "Q2"]}, "the fact has several answers"),
        ({**line("Ann", "Rome"), "obj_uri": None}, "obj_uri is missing"),
        (line("Ann"), "obj_label is empty"),
        ({**line("Ann"), "obj_label": "Rome"}, "obj_label is not a list but str"),
        (
            {**line("Ann"), "obj_label": [3], "obj_uri": ["Q"]},
            "obj_label is not a list of objects but of int",
        ),
        (line("", "Rome"), "sub_label is empty"),
        (line("Ann", {**label("x"), "chosen": None}), "chosen is missing"),
        (line("Ann", {**label("x"), "rdf": 3}), "rdf is not text but int"),
        (line("Ann", {**label("x"), "alternative": "y"}), "alternative is not a list of texts"),
        ([], "the record is not an object but list"),
        (line("Ann", "One Two Three"), "no other object of the relation has as many tokens"),
    ],
)
def test_facts_that_cannot_be_used(record, reason):
    good, bad, other = counterfacts([line("Bob", "Bonn"), record, line("Eve", "Oslo")], BORN, Words(), "0")
    assert isinstance(bad, Unusable) and str(bad) == reason
    assert good.target_new == "Oslo" and other.target_new == "Bonn"


def test_kamel_from_files(tmp_path):
    """Relations in order of number, those without prompts once, lines by number; numbers have no rdf; train
    files have plain texts.
    """
    births = [
        line("Ann\u2028B", "Rome"),
        line("Bob {}", "Bonn"),
        line("Eve", "Oslo"),
        line("Kim", "Rome", "Oslo"),
    ]
    years = [line("Ann", {**label("1990"), "rdf": None}), line("Bob", {**label("1991"), "rdf": None})]
    loaded = load_cases(
        "kamel", kamel_folder(tmp_path, P569=years, P19=births, P99999=births), tokenizer=Words()
    )
    assert [case.case_id for case in loaded.cases] == ["P19/1", "P19/3", "P569/1", "P569/2"]
    assert [(s.record, s.reason[:12]) for s in loaded.skipped] == [
        ("P19/2", "'{}' marks t"),
        ("P19/4", "the fact has"),
        ("P99999", "the relation"),
    ]
    assert list(loaded.files) == ["kamel_templates.yaml", "kamel/P19/test.jsonl", "kamel/P569/test.jsonl"]
    case = loaded.cases[2]
    assert (case.prompt, case.target_new, case.ground_truth) == ("Ann was born in the year", "1991", "1990")
    assert case.rephrase_prompts == ("The year of birth of Ann is",) and case.locality == {}
    plain = [
        {"index": [1], "sub_label": name, "obj_label": [place]}
        for name, place in (("Ann", "Rome"), ("Bob", "Bonn"))
    ]
    assert [
        c.target_new
        for c in load_cases(
            "kamel_train", kamel_folder(tmp_path / "t", "train", P19=plain), tokenizer=Words()
        ).cases
    ] == [
        "Bonn",
        "Rome",
    ]


def test_kamel_broken_line(tmp_path):
    path = kamel_folder(tmp_path, P19=[line("Ann", "Rome")]) / "kamel/P19/test.jsonl"
    path.write_text(path.read_text() + "\n{'x'\n")
    with pytest.raises(DataError, match=r"P19.test.jsonl, line 3, column 2: not JSON"):
        load_cases("kamel", tmp_path, tokenizer=Words())
    path.unlink()
    with pytest.raises(DataError, match="test.jsonl cannot be read"):
        load_cases("kamel", tmp_path, tokenizer=Words())


def test_templates():
    """Each holds the subject once and ends right before the object; the two differ."""
    known = templates()
    assert len(known) >= 40
    for relation, prompts in known.items():
        assert relation[0] == "P" and relation[1:].isdecimal() and prompts.cloze != prompts.paraphrase
        for prompt in (prompts.cloze, prompts.paraphrase):
            assert (
                prompt.count("[S]") == 1
                and prompt == prompt.strip()
                and prompt[-1].isalpha()
                and not prompt.endswith("[S]")
            ), prompt


# ---- anything at all ---------------------------------------------------------------------------------------


def spoiled(value: Any, rng: random.Random) -> Any:
    """The value with one thing in it, however deep, put in the place of another."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        copy: Any = value.copy()
        place = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
        if rng.random() < 0.1:
            del copy[place]
        else:
            copy[place] = spoiled(copy[place], rng)
        return copy
    return rng.choice(
        [
            None,
            0,
            1.5,
            True,
            "",
            " ",
            "{}",
            "\ud83d",
            "\u2028",
            "Peru",
            [],
            {},
            [None],
            [[]],
            {"": None},
            {"prompt": [[]]},
            ["a", 1],
        ]
    )


@pytest.mark.parametrize("name", ["zsre", "counterfact", "requests", "knowedit", "kamel"])
def test_spoiled_records_are_kept_or_listed(tmp_path, name):
    """No record is lost, none makes an error, and what is kept can be edited."""
    rng = random.Random(name)
    whole = {
        **REQUEST,
        "rephrase_prompt": ["x"],
        "locality": {"a": [{"prompt": "p", "ground_truth": [["q"]]}]},
    }
    whole |= {"portability": {"b": {"prompt": ["r"], "ground_truth": ["s"]}}}
    start = {
        "zsre": [ZSRE],
        "counterfact": [COUNTERFACT, ROME],
        "requests": [whole],
        "knowedit": [whole],
        "kamel": [line("Ann", label("Rome", "Roma"))],
    }[name]
    records = []
    for _ in range(400):
        record = rng.choice(start)
        for _ in range(rng.randint(1, 3)):
            record = spoiled(record, rng)
        records.append(record)
    if name == "kamel":
        texts = [json.dumps(record) for record in [*records, line("Bob", "Bonn"), line("Eve", "Oslo")]]
        path = kamel_folder(tmp_path, P19=[]) / "kamel/P19/test.jsonl"
        path.write_text("\n".join(texts))
        loaded, total = load_cases(name, tmp_path, tokenizer=Words()), len(texts)
    else:
        loaded, total = load_cases(name, data_file=write(tmp_path, *records)), len(records)
    assert len(loaded.cases) + len(loaded.skipped) == total and loaded.cases and all(reasons(loaded))
    for case in loaded.cases:
        request = EditRequest.of(case.request())
        assert (request.prompt, request.target_new) == (case.prompt, case.target_new)


# ---- the real files ----------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "cases", "skipped"),
    [("zsre", 1037, 0), ("counterfact", 9996, 4), ("knowedit", 1293, 11), ("knowedit_counterfact", 885, 0)],
)
def test_real_files(data_dir, name, cases, skipped):
    loaded = load_cases(name, data_dir)
    (file,) = loaded.files
    assert (len(loaded.cases), len(loaded.skipped)) == (cases, skipped)
    assert cases + skipped == len(json.loads((data_dir / file).read_text(encoding="utf-8")))
    assert all(case.subject in case.prompt and case.target_new.strip() for case in loaded.cases)
    assert set(reasons(loaded)) <= {
        "the same prompt and target as an earlier record",
        "the subject is not in the prompt",
    }


@pytest.mark.data
def test_real_rome_schema(data_dir):
    loaded = load_cases("counterfact", data_file=data_dir / "counterfact/counterfact_rome_700.json")
    assert len(loaded.cases) == 700 and not loaded.skipped
    assert all(
        case.neighborhood and case.rephrase_prompts and case.target_true == case.ground_truth
        for case in loaded.cases
    )


@pytest.mark.data
def test_real_kamel(data_dir, tokenizer, tmp_path):
    """Every line of a relation with prompts is a case or skipped, and every target is as long as the object
    it replaces.
    """
    known = list(templates())
    assert all((data_dir / "kamel" / relation / "test.jsonl").is_file() for relation in known)
    (tmp_path / "kamel").mkdir()
    for relation in [*known[::2], "P22", "P150"]:  # half of them, for time's sake, and two without prompts
        (tmp_path / "kamel" / relation).symlink_to(data_dir / "kamel" / relation)
    loaded = load_cases("kamel", tmp_path, tokenizer=tokenizer)
    assert {str(case.case_id).split("/")[0] for case in loaded.cases} == set(known[::2]) and len(
        known[::2]
    ) >= 40
    assert [skipped.record for skipped in loaded.skipped if "/" not in str(skipped.record)] == ["P22", "P150"]
    assert len(loaded.cases) + len(loaded.skipped) == 200 * len(known[::2]) + 2
    assert all(
        case.subject in case.prompt and case.subject in case.rephrase_prompts[0] for case in loaded.cases
    )
    assert all(case.target_new.casefold() != case.ground_truth.casefold() for case in loaded.cases)
    some = loaded.cases[::10]
    prompts = [case.prompt for case in some]
    new = lengths(tokenizer, prompts, [case.target_new for case in some])
    assert new == lengths(tokenizer, prompts, [case.ground_truth for case in some]) and {1, 2, 3, 4} <= set(
        new
    )


def test_every_data_set_is_tested():
    known = {
        "zsre",
        "counterfact",
        "knowedit",
        "knowedit_counterfact",
        "requests",
        "kamel",
        "kamel_train",
        "twins",
        "twins_validation",
        "twins_closed",
    }
    assert set(DATASETS) == known


def test_a_misspelt_key_is_told_of(tmp_path, caplog):
    """Own records: a key that is nearly one of ours is named; another is left alone."""
    file = tmp_path / "mine.json"
    fact = {"prompt": "Ann was born in", "subject": "Ann", "target_new": "Rome"}
    file.write_text(json.dumps([{**fact, "rephrase": "The birthplace of Ann is", "note": "mine"}]))
    assert len(load_cases("requests", data_file=file).cases) == 1
    assert (
        "'rephrase' is not read; did you mean 'rephrase_prompt'?" in caplog.text and "note" not in caplog.text
    )
