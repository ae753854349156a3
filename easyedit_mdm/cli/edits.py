"""What `easyedit-mdm edit`, `apply`, `revert`, `diff`, `compose`, `verify` and `export` do; docs/edits.md
tells it from outside.

Nothing that exists is overwritten: every command that writes a model or an edit writes a new folder, whole or
not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from easyedit_mdm.api import load_hparams, load_model
from easyedit_mdm.cli.arguments import free
from easyedit_mdm.common.files import write_json
from easyedit_mdm.common.fingerprints import model_fingerprint, tensor_sha256
from easyedit_mdm.common.locks import only_writer
from easyedit_mdm.common.ranks import ALONE, launched
from easyedit_mdm.common.weights import Weights
from easyedit_mdm.denoising import DecodeConfig, decode
from easyedit_mdm.editing import METHODS, Edit, EditRequest, MethodHyperParams
from easyedit_mdm.editing.edit import Attached
from easyedit_mdm.editing.edit.compose import compose, conflicts
from easyedit_mdm.editing.edit.export import write_merged
from easyedit_mdm.editing.edit.folders import adopt_edits, source_of, write_edited
from easyedit_mdm.editing.request import check_requests, encode
from easyedit_mdm.editing.solve.chunks import CHUNK
from easyedit_mdm.errors import DataError, EditError, HyperParameterError, RequestError
from easyedit_mdm.evaluation import score_prompts
from easyedit_mdm.evaluation.records import Score
from easyedit_mdm.models import Adapter
from easyedit_mdm.session import Session

EFFECT_TOKENS = 8


@dataclass(frozen=True)
class GuardOptions:
    """What the command line says of the collapse guard: off, or on and (`force`) only telling."""

    on: bool = True
    force: bool = False
    text: str | None = None


@dataclass(frozen=True)
class Chunked:
    """That an edit is made in chunks, as `easyedit_mdm.editing.solve.chunks` does.

    Attributes:
        folder: for the values.
        size: facts a chunk.
        only: make the values, and no edit.
    """

    folder: str | Path
    size: int = CHUNK
    only: bool = False


def new_edit(
    hparams_file: str | Path,
    requests: Sequence[Mapping[str, Any] | EditRequest],
    out: str | Path,
    model: str | None = None,
    guard: GuardOptions = GuardOptions(),
    device: str | None = None,
    dtype: str | None = None,
    keep_failed: bool = False,
    chunked: Chunked | None = None,
    check: int | None = None,
) -> bool:
    """Make an edit, show what the model says before and after it, and save it. The model itself is nowhere
    changed.

    Several requests for a method that takes one at a time are edited one after another, and composed.

    Args:
        out: the edit's folder; must not exist yet.
        model: instead of the one that the file names.
        keep_failed: save the edit even if the model does not write all of its facts.
        chunked: make it in chunks. Of processes that a launcher started together the first makes the edit,
            and all make values.
        check: facts whose answers are looked at, from the first one on; all of them by default.

    Returns:
        whether it was saved: unless `keep_failed`, every fact looked at has to be written then. True, too, of
        a process that was to make values only.

    Raises:
        CollapseError: if the guard stops it; nothing is saved then.
        FileError: if `out` exists, or another process is making it; that one is named.
        EasyEditMDMError: see `docs/errors.md`.
    """
    free(out)
    hparams = _hparams(hparams_file, model, guard)
    asked = [EditRequest.of(request) for request in requests]
    check_requests(asked)
    ranks = launched() if chunked else ALONE
    where, options = _device(device, hparams), {"mask_id": hparams.mask_id, "block": hparams.block}
    adapter = load_model(
        hparams.model_name, device=ranks.device(where), dtype=dtype or hparams.load_dtype, **options
    )
    if chunked is not None and (chunked.only or not ranks.first):
        METHODS[hparams.alg_name].make_values(adapter, asked, hparams, chunked.folder, chunked.size)
        Console().print(f"{escape(str(chunked.folder))}: all values are made", highlight=False)
        return True
    with only_writer(out):
        edit = _make(adapter, asked, hparams, guard, chunked)
        edit.card["metrics"] = _metrics(adapter, edit, asked[:check], hparams.decode_config())
        edit.seal(adapter, str(hparams.model_name))
        failures = failed_facts(edit, hparams)
        saved = keep_failed or not failures
        if saved:
            edit.save(out)
    _print_edit(edit, Path(out) if saved else None, failures)
    return saved


def _metrics(
    adapter: Adapter, edit: Edit, requests: Sequence[EditRequest], config: DecodeConfig
) -> dict[str, Any]:
    """What the model says before and with an edit; it is left as it was."""
    before = _say(adapter, requests, config)
    edit.apply(adapter)
    try:
        after = _say(adapter, requests, config)
    finally:
        edit.revert(adapter)
    facts = [_pair(b, a) for b, a in zip(before, after)]
    return {"before": _shares(before), "after": _shares(after), "facts": facts}


def failed_facts(edit: Edit, hparams: MethodHyperParams) -> list[str]:
    """A line for each fact that the edited model does not write: how its optimisation ended, and what to
    try.
    """
    lines = []
    several = "; or edit fewer facts together" if len(edit.card["facts"]) > 1 else ""
    for fact, row in zip(edit.card["facts"], edit.card["metrics"]["facts"]):
        if not row["exact"]:
            loss = (fact.get("losses") or [float("nan")])[-1]
            ended = f"its loss was {loss:.3g} after {fact.get('steps', 0)} steps"
            what = f"not written: {fact['prompt']!r} -> {fact['target_new']!r}; {ended}"
            lines.append(f"{what}. {hparams.advice(loss)}{several}")
    return lines


def apply_edit(
    folder: str | Path, out: str | Path, model: str | None = None, device: str | None = None
) -> None:
    """Write the base model with an edit in it (and those that it carries already) as a new model folder that
    `revert` can take back.

    Raises:
        EditError: for another base model, with both fingerprints; if the model carries this edit.
        FileError: if `out` exists, or cannot be written.
    """
    free(out)
    edit = Edit.load(folder)
    adapter, carried = _open(edit, model, device)
    if any(other.card["id"] == edit.card["id"] for other in carried):
        raise EditError(f"{model} carries this edit ({edit.card['id']}) already")
    edit.apply(adapter)
    write_edited(adapter, out)
    Console().print(
        f"{escape(str(out))}: {escape(adapter.name)} with {len(carried) + 1} edit(s); easyedit-mdm revert"
        " takes it back",
        highlight=False,
    )


def revert_edit(folder: str | Path, model: str | Path, out: str | Path, device: str | None = None) -> None:
    """Write the model of a folder that `apply` wrote, without an edit, as a new folder; bit for bit what it
    was before the edit.

    Raises:
        EditError: if the model does not carry the edit, later edits stand on it, or its weights have been
            changed since.
        FileError: if `out` exists, or cannot be written.
    """
    free(out)
    edit = Edit.load(folder)
    adapter, carried = _open(edit, str(model), device)
    mine = [other for other in carried if other.card["id"] == edit.card["id"]]
    if not mine:
        known = ", ".join(other.card["id"] for other in carried) or "no edits"
        raise EditError(
            f"{model} does not carry edit {edit.card['id']}, but {known}: give a folder that easyedit-mdm"
            " apply wrote"
        )
    mine[0].revert(adapter)
    left = [other for other in carried if other is not mine[0]]
    wanted, now = edit.card["base"]["fingerprint"], model_fingerprint(adapter.native)
    if not left and wanted != now:
        raise EditError(
            f"without the edit the model has fingerprint {now}, not its base's {wanted}: {model} was changed"
            " otherwise. Nothing written"
        )
    write_edited(adapter, out)
    what = (
        f"still with {len(left)} edit(s)"
        if left
        else f"the base model, bit for bit (fingerprint {now[:12]}...)"
    )
    Console().print(f"{escape(str(out))}: {what}", highlight=False)


def compose_edits(folders: Sequence[str | Path], out: str | Path, force: bool = False) -> Edit:
    """Write several edits as one; says where they are at odds.

    Raises:
        EditError: for edits of different base models, or contradictions, unless forced.
    """
    free(out)
    edits = [Edit.load(folder) for folder in folders]
    one = compose(edits, force)
    one.save(out)
    console = Console()
    for conflict in conflicts(edits):
        names = f"{folders[conflict.first]} and {folders[conflict.second]}"
        console.print(
            f"[yellow]{conflict.kind}[/] of {escape(names)} at {escape(conflict.what)}:"
            f" {escape(conflict.detail)}",
            highlight=False,
        )
    console.print(
        f"{escape(str(out))}: {len(edits)} edits, {len(one.card['facts'])} facts, {len(one.changes)} weights",
        highlight=False,
    )
    return one


def diff_edit(
    folder: str | Path, prompts: Sequence[str] = (), prompts_file: str | Path | None = None,
    model: str | None = None,
    device: str | None = None, file: str | Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Which weights an edit changes, how much, and what a model says after some prompts without and with it.

    Args:
        prompts_file: a text file, a prompt a line.
        file: where to write the report as JSON.

    Returns:
        `weights` (see `weight_figures`), `attached` where the edit adds something that is no change of a
            weight, and `effect`: for each prompt `canvas` (tokens that are written:
        after a
            prompt of the edit's own facts the target's, else 8), `before`, `after`, and `kl`, the divergence
        KL(after || before) of the first token's distribution.

    Raises:
        DataError: if the file of prompts cannot be read.
        EditError: for another base model.
    """
    edit, asked = Edit.load(folder), [*prompts, *_lines(prompts_file)]
    report: dict[str, Any] = {"id": edit.card["id"], "weights": edit.diff(), "effect": []}
    if edit.attached:
        report["attached"] = [_described(one) for one in edit.attached]
    if asked:
        adapter, carried = _open(edit, model, device)
        edit = next((other for other in carried if other.card["id"] == edit.card["id"]), edit)
        report["effect"] = effect(adapter, edit, asked)
    if file is not None:
        write_json(file, report)
    _print_diff(report)
    return report


def _described(one: Attached) -> dict[str, Any]:
    """What an attachment is, and how large."""
    shapes = {name: list(value.shape) for name, value in one.tensors.items()}
    return {"kind": one.KIND, "module": one.module, "shapes": shapes, "settings": dict(one.settings)}


def effect(adapter: Adapter, edit: Edit, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """What a model says after prompts without and with an edit; the model is left as it was.

    Raises:
        EditError: if the edit does not fit, or other edits stand on it.
    """
    was, canvases = edit.is_applied(adapter), [_canvas(edit, prompt) for prompt in prompts]
    sides = {was: _first_tokens(adapter, prompts, canvases)}
    (edit.revert if was else edit.apply)(adapter)
    try:
        sides[not was] = _first_tokens(adapter, prompts, canvases)
    finally:
        (edit.apply if was else edit.revert)(adapter)
    rows = []
    for prompt, canvas, (before, p), (after, q) in zip(prompts, canvases, sides[False], sides[True]):
        kl = float((q.exp() * (q - p)).sum())
        rows.append({"prompt": prompt, "canvas": canvas.canvas, "before": before, "after": after, "kl": kl})
    return rows


def verify_edit(
    folder: str | Path, model: str | None = None, device: str | None = None, file: str | Path | None = None
) -> dict[str, Any]:
    """Whether the files of an edit belong together and are whole, and whether a model still holds it.

    Args:
        model: the model that should hold it; by default the base model that `edit.json` names, with the edit
            put into it.

    Returns:
        `holds`, `files`, `weights` (each `edited`, `base`, or `other`: changed since), `attached` (whether
        the model does what the edit adds; of edits without weights), and `facts` with what the model says.

    Raises:
        EditError: if the files are broken.
    """
    edit = Edit.load(folder)
    if model is None or "edited" not in edit.card:
        adapter, _ = _open(edit, None, device)
        edit.card.setdefault(
            "edited", edit.edited_hashes(adapter)
        )  # a composed edit has not met its base model before
    if model is None:
        edit.apply(adapter)
    else:
        adapter = load_model(
            model, dtype=edit.card["base"].get("dtype"), device=device or _any_device(), **_said(edit)
        )
    report = verified(edit, adapter)
    if file is not None:
        write_json(file, report)
    _print_verified(report, model or f"{edit.card['base'].get('name')} with the edit put in")
    return report


def verified(edit: Edit, adapter: Adapter) -> dict[str, Any]:
    """Whether a model holds an edit: its weights by hash, its facts by decoding.

    A fact counts if it was right when the edit was saved; where that was not noted, every fact counts.
    """
    weights = _states(edit, adapter)
    stored_facts = edit.card.get("facts", [])
    requests = [EditRequest.of(fact) for fact in stored_facts]
    scores = _say(adapter, requests, _decode_config(edit)) if requests else []
    noted = edit.card.get("metrics", {}).get("facts")
    promised = (
        [bool(f.get("exact")) for f in noted]
        if isinstance(noted, list) and len(noted) == len(stored_facts)
        else [True] * len(stored_facts)
    )
    facts = [
        {
            "prompt": f["prompt"],
            "target_new": f["target_new"],
            "text": s["text"],
            "exact": s["exact"],
            "was_exact": p,
        }
        for f, s, p in zip(stored_facts, scores, promised)
    ]
    there = not edit.attached or edit.is_applied(adapter)
    written = all(f["exact"] for f in facts if f["was_exact"])
    return {
        "holds": written and there and set(weights.values()) <= {"edited"},
        "id": edit.card.get("id"),
        "files": "whole, and of one edit",
        "weights": weights,
        **({"attached": "in the model" if there else "not in the model"} if edit.attached else {}),
        "facts": facts,
    }


def export_edit(
    folder: str | Path,
    peft: str | Path | None = None,
    merged: str | Path | None = None,
    model: str | None = None,
    device: str | None = None,
) -> None:
    """Write an edit as a LoRA adapter for peft, or as a model folder in the hub's own format, or both.

    Raises:
        HyperParameterError: if neither is asked for.
        EditError: for another base model, or a weight that LoRA cannot change.
    """
    if peft is None and merged is None:
        raise HyperParameterError("nothing to export: give --peft FOLDER, --merged FOLDER, or both")
    free(peft, merged)
    edit = Edit.load(folder)
    if merged is not None:
        adapter, carried = _open(edit, model, device)
        if not any(other.card["id"] == edit.card["id"] for other in carried):
            edit.apply(adapter)
        ways = write_merged(adapter, source_of(adapter), merged)
        lines = [f"{merged}: {adapter.name} with the edit, in the hub's format; open it with"]
        lines += [f"  {way.line(merged)}" for way in ways]
        Console().print(escape("\n".join([*lines, f"{merged}/README.md says more"])), highlight=False)
    if peft is not None:
        edit.to_peft(peft)
        Console().print(
            f"{escape(str(peft))}: a LoRA adapter for {escape(str(edit.card['base'].get('name')))};"
            f" {escape(str(peft))}/README.md says how to open it",
            highlight=False,
        )


# ---- parts -------------------------------------------------------------------------------------------------


def _hparams(file: str | Path, model: str | None, guard: GuardOptions) -> MethodHyperParams:
    hparams = load_hparams(file)
    text = {} if guard.text is None else {"text": guard.text}
    return replace(
        hparams,
        model_name=model or hparams.model_name,
        guard={**(hparams.guard or {}), **text} if guard.on else None,
    )


def _make(
    adapter: Adapter,
    requests: Sequence[EditRequest],
    hparams: MethodHyperParams,
    options: GuardOptions,
    chunked: Chunked | None = None,
) -> Edit:
    """The edit of all requests, through the guard if it is on; the model is left as it was."""
    with Session(adapter, hparams, force=options.force) as session:
        if chunked is None:
            made = session.edit(requests)
        else:
            one = session.method.edit_in_chunks(adapter, requests, hparams, chunked.folder, chunked.size)
            session.apply(one)
            made = [one]
    if len(made) == 1:
        return made[0]
    one = compose(made, force=True)
    verdicts = [edit.card["guard"]["verdict"] for edit in made if edit.card["guard"]["on"]]
    one.card["guard"] = {"on": bool(verdicts)}
    if verdicts:
        forced = "kept by force" in verdicts
        one.card["guard"]["verdict"] = "kept by force" if forced else verdicts[0]
    return one


def _open(edit: Edit, model: str | None, device: str | None) -> tuple[Adapter, list[Edit]]:
    """The model of an edit, in the dtype that the edit was made in, and the edits that its folder says it
    carries.
    """
    base = edit.card["base"]
    adapter = load_model(
        model or str(base.get("name")), dtype=base.get("dtype"), device=device or _any_device(), **_said(edit)
    )
    return adapter, adopt_edits(adapter)


def _said(edit: Edit) -> dict[str, int]:
    """What an edit's hyperparameters said about its model that the checkpoint does not."""
    settings = edit.card.get("hyperparameters", {})
    return {name: settings[name] for name in ("mask_id", "block") if isinstance(settings.get(name), int)}


def _any_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _device(device: str | None, hparams: MethodHyperParams) -> str:
    return device or (str(hparams.device) if hparams.device is not None else _any_device())


def _decode_config(edit: Edit) -> DecodeConfig:
    settings = edit.card.get("hyperparameters", {}).get("decode") or {}
    try:
        return DecodeConfig(**settings)
    except TypeError as error:
        raise EditError(
            f"edit.json: hyperparameters.decode is {settings!r}, which are no decode settings ({error}); get"
            " the edit again"
        ) from error


def _say(adapter: Adapter, requests: Sequence[EditRequest], config: DecodeConfig) -> list[Score]:
    return score_prompts(adapter, [r.prompt for r in requests], [r.target_new for r in requests], config)


def _shares(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "n": len(scores),
        **{key: sum(float(s[key]) for s in scores) / len(scores) for key in ("exact", "token_acc")},
    }


def _pair(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    texts = {"before": before["text"], "after": after["text"], "canvas": after["decode"]["canvas"]}
    return {**texts, "exact": after["exact"], "was_exact_before": before["exact"]}


def _states(edit: Edit, adapter: Adapter) -> dict[str, str]:
    """Of each weight whether it is as the edit left it, as the base had it, or neither."""
    weights = Weights(adapter.native, every=True)
    edited, base = edit.card.get("edited", {}), edit.card["base"].get("weights") or {}
    states: dict[str, str] = {}
    for change in edit.changes:
        now = tensor_sha256(weights[change.name]) if change.name in weights else None
        known: dict[str | None, str] = {
            **dict.fromkeys([base.get(change.name)], "base"),
            **dict.fromkeys(edited.values(), "edited"),
        }
        states[change.name] = "other" if now is None else known.get(now, "other")
    return states


def _canvas(edit: Edit, prompt: str) -> DecodeConfig:
    """How to write after a prompt: after one of the edit's own as when it was made, after others on a short
    canvas.
    """
    own = next((f for f in edit.card.get("facts", []) if f.get("prompt") == prompt), None)
    if own is None or not isinstance(own.get("n_tokens"), int):
        return DecodeConfig(canvas=EFFECT_TOKENS)
    config = _decode_config(edit)
    return replace(config, canvas=config.canvas or own["n_tokens"])


@torch.no_grad()
def _first_tokens(
    adapter: Adapter, prompts: Sequence[str], configs: Sequence[DecodeConfig]
) -> list[tuple[str, torch.Tensor]]:
    """What is written after each prompt, and the log-probabilities of its first token."""
    rows = []
    for prompt, config in zip(prompts, configs):
        ids, canvas = torch.tensor(encode(adapter, prompt.rstrip())), config.canvas or EFFECT_TOKENS
        if not len(ids) or len(ids) + canvas > adapter.max_positions:
            raise RequestError(
                f"prompt {prompt!r} has {len(ids)} tokens: it needs at least one, and {canvas} places"
                " after it"
            )
        path = decode(adapter, [ids], [canvas], config)[0]
        row = torch.cat([ids, adapter.hidden.slots(canvas)])[None].to(adapter.device)
        at = torch.tensor([[len(ids)]], device=row.device)
        logits = adapter.token_logits(row, at=at, canvas=at[:, 0])[0, 0, : adapter.vocabulary]
        text = adapter.tokenizer.decode(path.tokens.tolist(), skip_special_tokens=True).strip()
        rows.append((text, logits.double().log_softmax(-1).cpu()))
    return rows


def _lines(file: str | Path | None) -> list[str]:
    if file is None:
        return []
    try:
        return [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file} cannot be read ({error}): give a UTF-8 text file with a prompt a line"
        ) from error


# ---- what is shown -----------------------------------------------------------------------------------------


def _print_edit(edit: Edit, folder: Path | None, failures: Sequence[str]) -> None:
    console, metrics, guard = Console(), edit.card["metrics"], edit.card["guard"]
    table = Table(title=f"{edit.card['method']} on {edit.card['base']['name']}")
    for column in ("prompt", "target", "canvas", "before", "after", ""):
        table.add_column(column, overflow="fold")
    for fact, row in zip(edit.card["facts"], metrics["facts"]):
        cells = (fact["prompt"], fact["target_new"], row["canvas"], row["before"], row["after"])
        table.add_row(*(escape(str(v)) for v in cells), "[green]✓" if row["exact"] else "[red]✗")
    console.print(table)
    figures = ", ".join(f"{k} {v:.3g}" for k, v in guard.get("figures", {}).items() if v is not None)
    verdict = (
        f"guard: {guard['verdict']}" if guard["on"] else f"guard: off ({guard.get('why', 'not asked for')})"
    )
    console.print(escape(f"{verdict}{f'; {figures}' if figures else ''}"), highlight=False)
    for line in failures:
        console.print(escape(line), highlight=False, style="red")
    if folder is None:
        console.print("nothing saved; --keep-failed saves the edit all the same", highlight=False)
    else:
        console.print(f"{escape(str(folder))} written (edit {edit.card['id']})", highlight=False)


def _place(weight: str) -> tuple[str, str]:
    """The number of the layer that a parameter's name holds, and its name within the layer."""
    parts = weight.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ("", weight) if number is None else (parts[number], ".".join(parts[number + 1 :]))


def _print_diff(report: dict[str, Any]) -> None:
    console, table = (
        Console(),
        Table(title=f"edit {report['id']}", box=SIMPLE_HEAD, pad_edge=False, padding=0),
    )
    for column in ("layer", "weight", "shape", "rank", "||dW||", "spectral", "/ ||W||"):
        table.add_column(column, justify="left" if column == "weight" else "right", overflow="fold")
    for row in report["weights"]:
        ratio = "" if row["norm_ratio"] is None else f"{row['norm_ratio']:.3g}"
        norms = f"{row['norm']:.3g}", f"{row['spectral']:.3g}", ratio
        rank = f"{row['rank']} ({row['kind']})" if row["kind"] != "low rank" else str(row["rank"])
        table.add_row(*_place(row["weight"]), "x".join(map(str, row["shape"])), rank, *norms)
    if report["weights"]:
        console.print(table)
    for one in report.get("attached", []):
        shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in one["shapes"].items())
        place = escape(one["module"]) or "before every prompt"
        console.print(f"{one['kind']}, {place}: {shapes}", highlight=False)
    if report["effect"]:
        table = Table(title="what the model says")
        for column in ("prompt", "canvas", "without the edit", "with it", "KL"):
            table.add_column(column, overflow="fold")
        for row in report["effect"]:
            before, after = escape(row["before"]), escape(row["after"])
            table.add_row(escape(row["prompt"]), str(row["canvas"]), before, after, f"{row['kl']:.3g}")
        console.print(table)


def _print_verified(report: dict[str, Any], model: str) -> None:
    console = Console()
    console.print(f"files: {report['files']} (edit {report['id']})", highlight=False)
    for name, state in report["weights"].items():
        console.print(f"{name}: {state}", highlight=False)
    if "attached" in report:
        console.print(f"what it adds to the forward pass: {report['attached']}", highlight=False)
    for fact in report["facts"]:
        mark = (
            "[green]✓[/]"
            if fact["exact"]
            else "[red]✗[/]"
            if fact["was_exact"]
            else "– (was not written when it was saved)"
        )
        console.print(
            f"{mark} {escape(fact['prompt'])} … {escape(fact['text'])} (wanted:"
            f" {escape(fact['target_new'])})",
            highlight=False,
        )
    console.print(
        f"{escape(model)} {'holds the edit' if report['holds'] else '[bold red]does not hold the edit[/]'}",
        highlight=False,
    )
