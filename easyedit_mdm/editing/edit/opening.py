"""How others open what `export` writes: a README.md inside the folder, and the same in a line each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyedit_mdm.common.files import write_text
from easyedit_mdm.editing.edit.stack import PlainEdit
from easyedit_mdm.models import Adapter

README, BASE_README = "README.md", "README-base.md"
# families that dLLM (github.com/ZHZisZZ/dllm) has a class for, by its dllm/utils/models.py
_IN_DLLM = ("llada", "llada-moe", "llada2", "dream", "a2d-qwen3", "bert", "modernbert")
_HERE = "from easyedit_mdm import load_model\n\nmodel = load_model({folder!r})"


@dataclass(frozen=True)
class Way:
    """One way to open a folder.

    Attributes:
        name: with what.
        code: Python lines, `{folder!r}` standing for the folder; empty where it cannot be opened.
        note: what else there is to say.
    """

    name: str
    code: str
    note: str

    def line(self, folder: str | Path) -> str:
        """What the command line says of it."""
        *_, last = ["", *self.code.splitlines()]
        return f"{self.name}: {last.format(folder=str(folder)).partition(' = ')[2] or self.note}"


def ways_to_open(adapter: Adapter, config: Mapping[str, Any], folder: Path) -> list[Way]:
    """How a model folder in the hub's own format is opened: here, with transformers, and in dLLM.

    Args:
        config: its `config.json`.
        folder: the files of the folder, whose model code is looked for.
    """
    ways = [Way("easyedit_mdm", _HERE, "No code of the folder is run.")]
    ways.append(_transformers(adapter, config, folder))
    if adapter.masked:
        ways.append(_dllm(adapter))
    return ways


def _transformers(adapter: Adapter, config: Mapping[str, Any], folder: Path) -> Way:
    spec = adapter.spec
    if spec.noised:
        return _loaded(f"{spec.native}{spec.ending}", "", "A class of transformers' own.")
    if not adapter.masked or spec.bidirectional:
        return _loaded(f"AutoModel{spec.ending or 'ForCausalLM'}", "", "A class of transformers' own.")
    named = config.get("auto_map")
    remote = (
        {k: str(v) for k, v in named.items() if k.startswith("AutoModel")} if isinstance(named, dict) else {}
    )
    if not remote:
        note = (
            "transformers has no class for it, and its config.json names no code (auto_map). A causal class"
            " would not see the tokens on the right"
        )
        return Way("transformers", "", note)
    auto, code = next(iter(remote.items()))
    file = f"{code.rpartition('--')[2].split('.')[0]}.py"
    if "--" in code or (folder / file).exists():
        note = (
            f"This runs {file}, the model's own code: read it first. Such code was mostly written for"
            " transformers 4."
        )
        return _loaded(auto, ", trust_remote_code=True", note)
    releases = f" ({spec.releases})" if spec.releases else ""
    note = f"copy {file} and its *.py neighbours from the base model{releases} into the folder, then {auto}"
    return Way("transformers", "", f"{note}.from_pretrained(FOLDER, trust_remote_code=True)")


def _loaded(auto: str, more: str, note: str) -> Way:
    lines = (
        f"from transformers import {auto}, AutoTokenizer",
        "",
        "tokenizer = AutoTokenizer.from_pretrained({folder!r})",
        f"model = {auto}.from_pretrained({{folder!r}}{more})",
    )
    return Way("transformers", "\n".join(lines), note)


def _dllm(adapter: Adapter) -> Way:
    if adapter.spec.name not in _IN_DLLM:
        return Way("dLLM", "", f"it has no class for the family {adapter.spec.name}")
    lines = (
        "import dllm",
        "",
        "tokenizer = dllm.utils.get_tokenizer(model_name_or_path={folder!r})",
        "model = dllm.utils.get_model(model_name_or_path={folder!r})",
    )
    return Way("dLLM", "\n".join(lines), "Read in dLLM's source, not run.")


def write_readme(folder: Path, edits: Sequence[PlainEdit], ways: Sequence[Way], base: str) -> None:
    """The README.md of a merged model; the base model's own becomes README-base.md."""
    if (folder / README).exists() and not (folder / BASE_README).exists():
        (folder / README).rename(folder / BASE_README)
    parts = [
        f"# {base}, edited\n",
        "The weights of this folder hold the edit. Files and names are those of the base model.\n",
        _facts(edits),
        "## Open it\nRun these lines in this folder, or put its path in place of the dot.\n",
    ]
    for way in ways:
        note = f"{way.note[0].upper()}{way.note[1:]}"
        block = f"```python\n{way.code.format(folder='.')}\n```\n" if way.code else ""
        parts.append(f"With **{way.name}**:\n\n{block}\n{note.rstrip('.')}.\n")
    write_text(folder / README, "\n".join(parts))


def write_adapter_readme(folder: Path, edit: PlainEdit) -> None:
    """The README.md of a LoRA adapter."""
    base = edit.card.get("base", {})
    name, dtype = str(base.get("name")), str(base.get("dtype") or "float32")
    call = f"load_model({json.dumps(name)}, dtype={json.dumps(dtype)})"
    lines = ["from peft import PeftModel", "", "from easyedit_mdm import load_model", "", f"model = {call}"]
    lines.append('PeftModel.from_pretrained(model.native, ".")  # changes the modules inside `model`')
    if base.get("paradigm") == "causal":
        more = "`AutoModelForCausalLM.from_pretrained(BASE)` of transformers does as well as `model.native`."
    else:
        more = (
            "A masked model has to go through `load_model`: its native class is a causal one, and only the"
            " adapter around it sees the tokens on the right. For the hub's own code use `easyedit-mdm export"
            " --merged`."
        )
    parts = [
        f"# A LoRA adapter for {name}\n",
        _facts([edit]),
        "## Open it\nRun these lines in this folder, or put its path in place of the dot.\n",
        "```python\n" + "\n".join(lines) + "\n```\n",
        more,
        f"\npeft does not check the base model: its fingerprint is {base.get('fingerprint')}.\n",
    ]
    write_text(folder / README, "\n".join(parts))


def _facts(edits: Sequence[PlainEdit]) -> str:
    """The facts, as JSON: nothing in them can end the block or be taken for markup."""
    keys = ("prompt", "subject", "target_new")
    facts = [{key: fact.get(key) for key in keys} for edit in edits for fact in edit.card.get("facts", [])]
    lines = "\n".join(json.dumps(fact) for fact in facts)
    ids = ", ".join(str(edit.card.get("id")) for edit in edits)
    return f"## The facts\nEdits: {ids}.\n\n```json\n{lines}\n```\n"
