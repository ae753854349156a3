"""Hostile and broken files: whatever a parser is given, it returns something or raises an error of this
package.

None may take more than a second of processor time, or raise the peak of the memory by more than 1 GB. The
short form runs in CI. The long one (EASYEDIT_MDM_LONG=1) tries EASYEDIT_MDM_FUZZ inputs a parser (100,000 by
default), drawn from EASYEDIT_MDM_FUZZ_SEED and the numbers after it. It says how many it has tried and the
worst of them.
"""

from __future__ import annotations

import ast
import copy
import gc
import json
import os
import shutil
import struct
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bounds import bounded, peak_memory
from conftest import write_checkpoint
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from easyedit_mdm import Edit
from easyedit_mdm.data.cases import load_cases
from easyedit_mdm.editing import METHODS, LowRank
from easyedit_mdm.editing.edit.attached import Codebook, Context, ResidualMemory
from easyedit_mdm.editing.edit.files import CARD, TENSORS, file_sha256
from easyedit_mdm.editing.edit.folders import adopt_edits, write_edited
from easyedit_mdm.editing.edit.side_memory import SideMemory
from easyedit_mdm.editing.hparams import find_hparams, read_yaml
from easyedit_mdm.errors import EasyEditMDMError
from easyedit_mdm.evaluation.records import read_run
from easyedit_mdm.models import load_adapter
from easyedit_mdm.models.adapter import Site
from easyedit_mdm.report.summaries import summary
from easyedit_mdm.runs.run import _prepare
from easyedit_mdm.statistics import SecondMoments, collecting, read, text_source
from easyedit_mdm.statistics.store import write

SHORT = 60
LONG = int(os.environ.get("EASYEDIT_MDM_FUZZ", "100000"))
SEED = int(os.environ.get("EASYEDIT_MDM_FUZZ_SEED", "20260606"))
PART = 10_000  # inputs drawn from one seed
TRIED: dict[str, int] = {}
SLOWEST: dict[str, float] = {}  # seconds of processor time of one input

# ---- what is tried -----------------------------------------------------------------------------------------

ODD = [
    "", " ", "\x00", "\ud800", "{}", "[S]", "../../etc/passwd", "/dev/zero", "1e999", "nan", "0" * 60,
    "ROME_MDM", "a" * 5000, "🦊",
    -1, 0, 1, 2**31, 2**63,
    10**30, -(10**30), 1e308, float("inf"), float("nan"), True, None, [], {}, [[]], [None], {"": {}},
]  # fmt: skip
LEAVES = st.one_of(st.sampled_from(ODD), st.integers(), st.floats(), st.text(max_size=12), st.booleans())
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The way to every entry of nested lists and dicts."""
    inside = (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value))
        if isinstance(value, list)
        else []
    )
    return [path, *(place for key, item in inside for place in places(item, (*path, key)))]


@st.composite
def spoiled(draw: Any, valid: Any) -> Any:
    """A valid record with one to three entries replaced, removed, or put under another name."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(places(value)))
        if not place:
            value = copy.deepcopy(draw(VALUES)) if draw(st.integers(0, 9)) == 0 else value
            continue
        parent = value
        for key in place[:-1]:
            parent = parent[key]
        what = draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
        old = parent.pop(place[-1]) if what != "replace" else parent[place[-1]]
        if what == "replace":
            parent[place[-1]] = copy.deepcopy(draw(VALUES))
        elif what == "rename" and isinstance(parent, dict):
            parent[draw(st.text(max_size=8))] = old
    return value


@st.composite
def torn(draw: Any, valid: bytes) -> bytes:
    """The bytes of a valid file, cut off, with bytes changed, put in or doubled; or any bytes."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        what = draw(st.sampled_from(["cut", "change", "insert", "double", "any"]))
        if what == "cut":
            del data[at:]
        elif what == "change" and data:
            data[at] = draw(st.integers(0, 255))
        elif what == "insert":
            data[at:at] = draw(st.binary(max_size=9))
        elif what == "double":
            data[at:at] = data[at : at + draw(st.integers(1, 40))]
        elif draw(st.integers(0, 9)) == 0:
            return draw(st.binary(max_size=200))
    return bytes(data)


def dumped(value: Any) -> bytes:
    """JSON as Python writes it: NaN, infinities and half surrogates too."""
    return json.dumps(value).encode("utf-8")


@st.composite
def tensor_file(draw: Any, names: list[str]) -> bytes:
    """A safetensors file of right names with wrong shapes, kinds, NaNs, claims of size, or a header that
    lies.
    """
    tensors = {}
    for name in names:
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        kind = draw(
            st.sampled_from(
                [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8]
            )
        )
        value = torch.ones(shape).to(kind)
        if value.is_floating_point() and draw(st.booleans()) and value.numel():
            value.view(-1)[0] = draw(st.sampled_from([float("nan"), float("inf"), 1e30]))
        if draw(st.integers(0, 5)):
            tensors[name if draw(st.integers(0, 8)) else name + "x"] = value
    data = save(
        tensors, metadata={"settings": json.dumps(draw(VALUES)), "progress": json.dumps(draw(VALUES))}
    )
    if draw(st.booleans()):
        return data
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header = draw(spoiled(header))
    if isinstance(header, dict) and draw(st.booleans()):
        header["huge"] = {
            "dtype": "F64",
            "shape": [2**40, draw(st.integers(0, 2**40))],
            "data_offsets": [0, draw(st.sampled_from([8, 2**62, 2**64 - 1]))],
        }
    text = dumped(header)
    claimed = draw(st.sampled_from([len(text), len(text), 2**63 - 1, 2**64 - 1, 0]))
    return struct.pack("<Q", claimed) + text + data[8 + length :]


# ---- the parsers -------------------------------------------------------------------------------------------


class Target:
    """One parser: the strategies that spoil its input, how it is run, and valid inputs.

    `run` returns what was read, something true, or raises an error of this package.
    """

    def __init__(self, inputs: st.SearchStrategy, run: Callable[[Any], Any], *valid: Any):
        self.inputs, self.run, self.valid = inputs, run, valid


def first_of(*parsers: Callable[[], Any]) -> Any:
    """What the first parser that can reads; all are tried.

    Raises:
        EasyEditMDMError: if none can; the last one's.
    """
    found, errors = [], []
    for parser in parsers:
        try:
            found.append(parser())
        except EasyEditMDMError as error:
            assert str(error).strip(), "an error without a message"
            errors.append(error)
    if not found:
        raise errors[-1]
    return found[0]


def hparams_target(folder: Path) -> Target:
    """Hyperparameter files of every method, as YAML."""
    valid = {name: read_yaml(find_hparams(f"{name}/twin-llada")) for name in METHODS}
    shipped = find_hparams("ROME_MDM/twin-llada").read_bytes()
    bombs = [
             b"a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n"
             b"d: [*c,*c,*c,*c,*c,*c,*c,*c,*c]\n",
             b"a: &a [*a]\n",
             b"a: !!python/object/apply:os.system [ls]\n", b"a: 2001-13-45\n",
             b"layers: " + b"[" * 3000, b"seed: " + b"9" * 5000,
             b"? [1]\n: 2\n"]  # fmt: skip
    nested = [spoiled({**v, "decode": {"steps": 4}, "guard": {"norm_ratio": 3}}) for v in valid.values()]
    written = [
        values.map(lambda x: yaml.dump(x, allow_unicode=True).encode("utf-8", "surrogatepass"))
        for values in nested
    ]
    inputs = st.one_of(*written, torn(shipped), st.sampled_from(bombs))

    def run(data: bytes) -> Any:
        (folder / "h.yaml").write_bytes(data)
        return first_of(
            *(
                partial(METHODS[name].hparams.from_hparams, folder / "h.yaml")
                for name in ("ROME_MDM", "AlphaEdit_MDM")
            )
        )

    return Target(inputs, run, shipped, find_hparams("AlphaEdit_MDM/twin-llada").read_bytes())


def edit_target(folder: Path) -> Target:
    """Edit folders, with changes of weights and without: the card, the tensors, and (half the time) a hash
    that fits, so that what lies behind it is reached.
    """
    one = torch.ones(1, 3)
    attached = [
        ResidualMemory("a", {"keys": one, "residuals": one}, {"ridge": 1.0, "alpha": 1.0, "top_q": 1.0}),
        Codebook("a", {"keys": one, "values": one, "target": torch.tensor([1])}, {"radius": 1.0}),
        SideMemory("a", {"delta": one}, {"threshold": 1.0, "density": 0.5, "merge": "ties"}),
        Context("", {name: torch.tensor([1]) for name in Context.TENSORS}),
    ]
    changes = [
        LowRank("a.weight", torch.ones(4, 1), torch.ones(1, 3)),
        LowRank("b.weight", torch.ones(2, 2), torch.ones(2, 2), True),
    ]
    fact = {"prompt": "a b", "subject": "a", "target_new": "c"}
    base = {"name": "m", "fingerprint": "0" * 64, "dtype": "float32", "weights": {}}
    shutil.rmtree(folder / "e", ignore_errors=True)
    Edit(
        changes,
        {
            "base": base,
            "facts": [fact],
            "norms": {"a.weight": {"norm_ratio": 1.0}},
            "guard": {"on": False},
            "hyperparameters": {},
        },
        attached,
    ).save(folder / "e")
    card, tensors = json.loads((folder / "e" / CARD).read_text()), (folder / "e" / TENSORS).read_bytes()
    names = [f"{c.name}|{key}" for c in changes for key in c.tensors]
    names += [f"attached {i}|{key}" for i, part in enumerate(attached) for key in part.TENSORS]
    inputs = st.tuples(
        st.one_of(spoiled(card).map(dumped), torn(dumped(card)), st.just(dumped(card))),
        st.one_of(torn(tensors), tensor_file(names), st.just(tensors)),
        st.booleans(),
    )

    def run(parts: tuple[bytes, bytes, bool]) -> Edit:
        (folder / "e" / TENSORS).write_bytes(parts[1])
        data = (
            parts[0].replace(card["tensors"]["sha256"].encode(), file_sha256(folder / "e" / TENSORS).encode())
            if parts[2]
            else parts[0]
        )
        (folder / "e" / CARD).write_bytes(data)
        edit = Edit.load(folder / "e")
        edit.diff()
        for part in edit.attached:
            if not isinstance(part, Context):
                type(part).joined([part])
        return Edit.compose([edit, edit], force=True)

    return Target(inputs, run, (dumped(card), tensors, False), (dumped({**card, "note": 1}), tensors, True))


def run_file_target(folder: Path) -> Target:
    """Run files: read for a report, and gone on with."""
    header = {
        "header": True,
        "label": "x",
        "version": "1",
        "model": {"name": "m", "fingerprint": "0"},
        "hparams": {"a": 1},
        "decode": {},
        "judge": {},
        "dataset": {"name": "d"},
    }
    score = {
        "exact": True,
        "token_acc": 1.0,
        "first_commit": True,
        "n_tokens": 2,
        "text": "x",
        "tokens": [1, 2],
    }
    case = {"case_id": 0, "subject": "s", "prompt": "p", "target_new": "t", "n_tokens": 2,
        "edit": {"forwards": 3}, "time": {"edit_seconds": 1.0},
            "pre": {"multi_step": {"rewrite": score}}, "post": {"multi_step": {"rewrite": score},
                "mirage_gap": 0.5}}  # fmt: skip
    lines = [header, case, {**case, "case_id": 1}]

    def text(records: Any) -> bytes:
        return (
            b"\n".join(dumped(r) for r in records) + b"\n" if isinstance(records, list) else dumped(records)
        )

    def run(data: bytes) -> Any:
        path = folder / "run.jsonl"
        path.write_bytes(data)
        gone_on_with = first_of(lambda: _prepare(path, header, resume=True), lambda: -1)
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            told = summary(read_run(path), seed=0, resamples=2)
        assert gone_on_with < 0 or told["cases"] == gone_on_with or not data.endswith(b"\n")
        return told["cases"]

    return Target(st.one_of(spoiled(lines).map(text), torn(text(lines))), run, text(lines))


def data_target(name: str, records: Any, tokenizer: Any = None) -> Callable[[Path], Target]:
    """One of the readers of benchmark data."""

    def make(folder: Path) -> Target:
        if name == "kamel":
            place = folder / "kamel" / "P19"
            place.mkdir(parents=True, exist_ok=True)
            valid = b"\n".join(dumped(r) for r in records)
            inputs = st.one_of(
                spoiled(records).map(
                    lambda rs: b"\n".join(map(dumped, rs)) if isinstance(rs, list) else dumped(rs)
                ),
                torn(valid),
            )

            def run(data: bytes) -> Any:
                (place / "test.jsonl").write_bytes(data)
                loaded = load_cases("kamel", data_dir=folder, tokenizer=tokenizer, limit=3)
                return [*loaded.cases, *loaded.skipped]

            return Target(inputs, run, valid)

        def run_file(data: bytes) -> Any:
            (folder / "data.json").write_bytes(data)
            loaded = load_cases(name, data_file=folder / "data.json", limit=3)
            return [*loaded.cases, *loaded.skipped]

        return Target(
            st.one_of(spoiled(records).map(dumped), torn(dumped(records))), run_file, dumped(records)
        )

    return make


def statistics_target(folder: Path) -> Target:
    """Files of second moments, and checkpoints of unfinished collections."""
    write(
        folder / "m.safetensors",
        SecondMoments(torch.eye(3, dtype=torch.float64), 10, {"model": "0" * 64, "tokens_seen": 10}),
    )
    whole = (folder / "m.safetensors").read_bytes()
    site = Site(0, "s", False)
    collecting._save(
        folder / "c.safetensors", collecting._Sums({"s": [torch.eye(3, dtype=torch.float64)] * 2}, 1, 2, 3)
    )
    part = (folder / "c.safetensors").read_bytes()

    def run(data: bytes) -> Any:
        path = folder / "x.safetensors"
        path.write_bytes(data)
        return first_of(lambda: collecting._load(path, [site]), lambda: read(path, "0" * 64))

    return Target(
        st.one_of(torn(whole), torn(part), tensor_file(["moment"]), tensor_file(["s|0", "s|1"])),
        run,
        whole,
        part,
    )


def text_target(folder: Path) -> Target:
    """JSON lines of text."""
    valid = b'{"text": "a b"}\n{"text": "c"}\n'

    def run(data: bytes) -> Any:
        (folder / "t.txt").write_bytes(data)
        first_of(lambda: list(text_source(folder / "t.txt").documents()), lambda: [])
        (folder / "t.jsonl").write_bytes(data)
        return list(text_source(folder / "t.jsonl").documents())

    return Target(st.one_of(torn(valid), spoiled([{"text": "a"}]).map(dumped)), run, valid)


def model_target(folder: Path) -> Target:
    """Model folders: configuration, index, and weights."""
    base = folder / "model"
    write_checkpoint(base, "llada", 40)
    config = json.loads((base / "config.json").read_text())
    weights = (base / "model.safetensors").read_bytes()
    index = {
        "metadata": {},
        "weight_map": {"model.transformer.wte.weight": "model.safetensors", "x": "../../../etc/passwd"},
    }
    inputs = st.tuples(
        st.one_of(spoiled(config).map(dumped), torn(dumped(config)), st.just(dumped(config))),
        st.one_of(
            torn(weights), tensor_file(["model.transformer.wte.weight"]), st.just(weights), st.just(weights)
        ),
        st.one_of(st.none(), st.none(), spoiled(index).map(dumped), torn(dumped(index))),
    )

    def run(parts: tuple[bytes, bytes, bytes | None]) -> Any:
        (base / "config.json").write_bytes(parts[0])
        (base / "model.safetensors").write_bytes(parts[1])
        (base / "model.safetensors.index.json").unlink(missing_ok=True)
        if parts[2] is not None:
            (base / "model.safetensors.index.json").write_bytes(parts[2])
        return load_adapter(base)

    one_shard = {"weight_map": dict.fromkeys(load(weights), "model.safetensors")}
    return Target(inputs, run, (dumped(config), weights, None), (dumped(config), weights, dumped(one_shard)))


def applied_target(folder: Path) -> Target:
    """The record of edits in a model folder."""
    write_checkpoint(folder / "base", "llada", 40)
    adapter = load_adapter(folder / "base")
    weight = adapter.site(1).weight
    edit = Edit([LowRank(weight, torch.ones(32, 1), torch.ones(1, 48))], {"facts": []}).seal(adapter)
    edit.apply(adapter)
    write_edited(adapter, folder / "edited")
    place = folder / "edited" / "edits" / "001"
    told, originals = (
        json.loads((folder / "edited" / "applied.json").read_text()),
        (place / "originals.safetensors").read_bytes(),
    )
    carrying = [load_adapter(folder / "edited")]
    inputs = st.tuples(
        st.one_of(spoiled(told).map(dumped), torn(dumped(told))),
        st.one_of(tensor_file([weight]), st.just(originals)),
    )

    def run(parts: tuple[bytes, bytes]) -> Any:
        (folder / "edited" / "applied.json").write_bytes(parts[0])
        (place / "originals.safetensors").write_bytes(parts[1])
        edits = adopt_edits(carrying[0])
        carrying[0] = load_adapter(folder / "edited")  # the other one knows its edits now
        return edits

    return Target(inputs, run, (dumped(told), originals))


ZSRE = [{"src": "Where is A?", "subject": "A", "alt": "B", "answers": ["C"], "rephrase": "A is where?",
    "loc": "Who?", "loc_ans": "D",
         "portability": {"New Question": "x?", "New Answer": "y"}}]  # fmt: skip
EASYEDIT_CF = {"case_id": 1, "prompt": "A is in", "subject": "A", "target_new": "B", "ground_truth": "C",
    "rephrase_prompt": "A lies in",
    "locality_prompt": "D is in",
               "locality_ground_truth": "E"}  # fmt: skip
ROME_CF = {"case_id": 2, "requested_rewrite": {"prompt": "{} is in", "subject": "A",
    "target_new": {"str": "B"}, "target_true": {"str": "C"}},
           "paraphrase_prompts": ["A lies in"], "neighborhood_prompts": ["D is in"]}  # fmt: skip
KNOWEDIT = [{"prompt": "A is in", "subject": "A", "target_new": "B", "ground_truth": ["C"],
    "rephrase_prompt": "x",
    "locality": {"near": [{"prompt": "D", "ground_truth": [["E"]]}]},
             "portability": {"hop": {"prompt": ["F"], "ground_truth": ["G"]}}}]  # fmt: skip
KAMEL = [
    {"sub_label": f"S{i}", "obj_uri": [f"Q{i}"], "obj_label": [{"chosen": o, "rdf": o, "alternative": []}]}
    for i, o in enumerate(("Paris", "Rome", "Oslo"))
]

TARGETS: dict[str, Callable[[Path], Target]] = {
    "hyperparameters": hparams_target, "edit": edit_target, "run file": run_file_target,
    "zsre": data_target("zsre", ZSRE),
    "counterfact": data_target("counterfact", [EASYEDIT_CF, ROME_CF]), "knowedit": data_target("knowedit",
        KNOWEDIT),
    "requests": data_target("requests", KNOWEDIT), "statistics": statistics_target, "text": text_target,
    "model folder": model_target,
    "applied.json": applied_target,
}  # fmt: skip


def fuzz(name: str, target: Target, examples: int) -> None:
    """Try so many inputs; only errors of this package may come out.

    In parts, each with a seed of its own: what hypothesis remembers of a part grows, and takes time.
    """
    for part, first in enumerate(range(0, examples, PART)):
        fuzz_part(name, target, min(PART, examples - first), SEED + part)
        gc.collect()


def fuzz_part(name: str, target: Target, examples: int, number: int) -> None:
    """`fuzz`, with this seed."""

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @seed(number)
    @given(target.inputs)
    def inputs(value: Any) -> None:
        TRIED[name] = TRIED.get(name, 0) + 1
        began = time.process_time()
        with bounded():
            try:
                target.run(value)
            except EasyEditMDMError as error:
                assert str(error).strip(), "an error without a message"
        SLOWEST[name] = max(SLOWEST.get(name, 0.0), time.process_time() - began)

    inputs()


@pytest.mark.parametrize("name", [*TARGETS, "kamel"])
def test_short(tmp_path, name, tokenizer):
    """Valid input is read, before and after a few spoiled ones for each parser."""
    make = data_target("kamel", KAMEL, tokenizer) if name == "kamel" else TARGETS[name]
    target = make(tmp_path)
    assert target.valid and all(target.run(value) for value in target.valid)
    TRIED[name] = 0
    fuzz(name, target, SHORT)
    assert TRIED[name] >= SHORT and all(target.run(value) for value in target.valid)


@pytest.mark.long
@pytest.mark.parametrize("name", [*TARGETS, "kamel"])
def test_long(tmp_path, name, tokenizer, capsys):
    """Many, and how many."""
    TRIED[name] = 0
    make = data_target("kamel", KAMEL, tokenizer) if name == "kamel" else TARGETS[name]
    target = make(tmp_path)
    assert all(target.run(value) for value in target.valid)  # imports what is imported at first use
    fuzz(name, target, LONG)
    with capsys.disabled():
        worst = f"the slowest took {SLOWEST[name]:.2f} s, the peak is at {peak_memory() >> 20} MiB"
        print(f"\n{name}: {TRIED[name]} inputs tried with seed {SEED}; {worst}")
    assert TRIED[name] >= LONG


# ---- nothing of a file is ever run -------------------------------------------------------------------------


def test_no_pickle_and_no_remote_code(tmp_path, monkeypatch, tokenizer):
    """Pickled weights are not opened, code beside the weights is not imported, YAML tags make no objects."""
    write_checkpoint(tmp_path / "m", "llada", len(tokenizer))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    auto = {
        "auto_map": {
            "AutoModel": "modeling_x.X",
            "AutoConfig": "modeling_x.X",
            "AutoTokenizer": ["modeling_x.X", None],
        },
        "tokenizer_class": "X",
    }
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, **auto}))
    tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "tokenizer_config.json").write_text(
        json.dumps({**json.loads((tmp_path / "m" / "tokenizer_config.json").read_text()), **auto})
    )
    (tmp_path / "m" / "modeling_x.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for name in ("load", "Unpickler"):
        monkeypatch.setattr(f"pickle.{name}", lambda *a, **k: pytest.fail("pickle was used"))
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was used"))
    assert load_adapter(tmp_path / "m").masked and not (tmp_path / "ran").exists()
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(EasyEditMDMError, match="pickled .bin weights are not read"):
        load_adapter(tmp_path / "m")
    (tmp_path / "h.yaml").write_text(
        "alg_name: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path"
        f" [{tmp_path / 'ran'}]]\n"
    )
    with pytest.raises(EasyEditMDMError, match="not readable YAML"):
        METHODS["ROME_MDM"].hparams.from_hparams(tmp_path / "h.yaml")
    assert not (tmp_path / "ran").exists()


def test_the_source_asks_for_none():
    """No part of the package mentions what runs foreign code."""
    import easyedit_mdm

    words = ("import pickle", "torch.load(", "yaml.load(", "eval(input", "exec(")
    for path in Path(easyedit_mdm.__file__).parent.rglob("*.py"):
        code = path.read_text(encoding="utf-8")
        assert not any(word in code for word in words), path
        given = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.keyword)]
        assert "trust_remote_code" not in {keyword.arg for keyword in given}, path
