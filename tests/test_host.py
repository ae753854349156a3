"""Through EasyEdit: PyPI's wheel in this process, the repository's head in one of its own."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from conftest import wheel_edits_batches

from easyedit_mdm import ROMEMDMHyperParams, load_model, score_prompts
from easyedit_mdm.common.fingerprints import parameter_hashes
from easyedit_mdm.denoising import DecodeConfig
from easyedit_mdm.editing import METHODS
from easyedit_mdm.editing.edit import carried
from easyedit_mdm.errors import HostNotFoundError, HyperParameterError, MissingPackageError, ModelError
from easyedit_mdm.evaluation import ngram_entropy
from easyedit_mdm.host import Host, find_easyedit, register
from easyedit_mdm.host.names import LoadedName
from easyedit_mdm.host.runner import MethodName
from easyedit_mdm.models import Adapter

HEAD = os.environ.get("HOST_FORM") == "head"
CAUSAL = {"token_acc", "exact", "first_commit", "teacher_forced", "text", "text_to_end", "n_tokens", "decode"}
SECTIONS = CAUSAL - {"teacher_forced"} | {"one_step", "one_step_exact"}


@pytest.fixture(scope="module")
def joined():
    """EasyEdit, joined: the head if this is its process, the wheel otherwise."""
    found = register()
    assert found.host.form == ("head" if HEAD else "wheel")
    return found


@pytest.fixture(autouse=True)
def in_scratch(tmp_path, monkeypatch):
    """EasyEdit writes ./logs."""
    monkeypatch.chdir(tmp_path)


def call(world, n: int = 1, length: int = 2) -> dict:
    """Arguments of `BaseEditor.edit` for n facts of the world."""
    import random

    rng = random.Random(1)
    facts = rng.sample([f for f in world.all_facts() if not f.relation.closed], n)
    neighbours = [world.neighbours(f, 2) for f in facts]
    return {
        "prompts": [f.prompt() for f in facts],
        "subject": [f.subject for f in facts],
        "target_new": [world.other_object(f, length, rng) for f in facts],
        "rephrase_prompts": [f.paraphrase() for f in facts],
        "locality_inputs": {
            "neighborhood": {
                "prompt": [[x.prompt() for x in ns] for ns in neighbours],
                "ground_truth": [[x.object for x in ns] for ns in neighbours],
            }
        },
        "portability_inputs": {
            "same": {"prompt": [f.prompt(1) for f in facts], "ground_truth": [f.object for f in facts]}
        },
    }


def editor_for(joined, model: str = "twin-llada", **changes):
    """A BaseEditor with ROME_MDM."""
    import dataclasses

    hparams = dataclasses.replace(ROMEMDMHyperParams.from_hparams(f"ROME_MDM/{model}"), **changes)
    return joined.editor_class.from_hparams(hparams)


def test_the_editor_is_a_subclass(joined):
    """A script that asks EasyEdit for its BaseEditor gets ours; BaseEditor's own methods are not replaced."""
    base = importlib.import_module("easyeditor.editors.editor").BaseEditor
    editor = base.from_hparams(ROMEMDMHyperParams.from_hparams("ROME_MDM/twin-llada"))
    assert type(editor) is joined.editor_class
    assert issubclass(joined.editor_class, base)
    assert joined.editor_class is not base
    for name, method in vars(base).items():
        if inspect.isfunction(method) and name != "__new__":
            assert method.__module__ == base.__module__, f"{name} was replaced"


def test_single_edit(joined, world):
    """The record has EasyEdit's keys and the multi-step section; the weights are restored; numbers have their
    own group.
    """
    editor = editor_for(joined)
    assert isinstance(editor.model, Adapter) and isinstance(editor.model_name, LoadedName)
    assert editor.model.dtype == torch.float32, "twins are stored in half precision and used in full"
    before = parameter_hashes(editor.model)
    metrics, model, weights = editor.edit(**call(world), keep_original_weight=True, verbose=False)
    (record,) = metrics
    assert record["post"]["rewrite_acc"] == [1.0] and record["pre"]["rewrite_acc"] != [1.0]
    assert model is editor.model and parameter_hashes(model) == before
    assert list(weights) == [editor.model.site(editor.hparams.layers[0]).weight]
    for phase in ("pre", "post"):
        steps = record[phase]["multi_step"]
        assert set(steps) == {"rewrite", "rephrase", "locality", "portability"}
        assert set(steps["rewrite"]) == SECTIONS == set(steps["portability"]["same"])
        assert [set(s) for s in steps["locality"]["neighborhood"]] == [SECTIONS] * 2
    assert steps["rewrite"]["n_tokens"] == 2 and steps["rewrite"]["decode"]["order"] == "low_confidence"
    assert len(record["post"]["locality"]["neighborhood_acc"]) == 2
    assert record["post"]["metric_meta"]["rewrite"]["comparable_group"].startswith("mdm.")
    if HEAD:
        assert record["post"]["metric_meta"]["locality.neighborhood"]["comparable_group"].startswith(
            "locality.mdm."
        )
    json.dumps(metrics)


@pytest.mark.end_to_end
def test_batch_of_requests_is_restored_each_time(joined, world):
    """Several requests: each is edited alone, as if it were the only one."""
    editor = editor_for(joined)
    before = parameter_hashes(editor.model)
    together, _, _ = editor.edit(**call(world, 2), keep_original_weight=True, verbose=False)
    assert parameter_hashes(editor.model) == before
    second = {k: v[1:] for k, v in call(world, 2).items() if isinstance(v, list)}
    alone, _, _ = editor.edit(**second, keep_original_weight=True, verbose=False)
    assert alone[0]["post"]["rewrite_acc"] == together[1]["post"]["rewrite_acc"]


def test_sequential_edits_stay(joined, world):
    """The head's sequential_edit=True and the wheel's keep_original_weight=False both leave all edits in the
    model.
    """
    editor = editor_for(joined)
    before = parameter_hashes(editor.model)
    arguments = {k: v for k, v in call(world, 2).items() if k in ("prompts", "subject", "target_new")}
    how = {"sequential_edit": True} if HEAD else {"keep_original_weight": False}
    metrics, model, weights = editor.edit(**arguments, **how, verbose=False)
    changed = [n for n, h in parameter_hashes(model).items() if h != before[n]]
    assert changed == [model.site(editor.hparams.layers[0]).weight]
    assert bool(weights) == HEAD  # the wheel gives nothing back in this mode
    assert [m["post"]["rewrite_acc"] for m in metrics] == [[1.0], [1.0]]


@pytest.mark.parametrize("model", ["twin-llada", "twin-llama"])
@pytest.mark.end_to_end
def test_fluency(joined, world, model):
    """EasyEdit's test_generation, its own for autoregressive models; without nltk and its data the record
    says whose words they are.
    """
    import importlib

    utils = importlib.import_module("easyeditor.evaluate.evaluate_utils")
    try:
        utils.nltk.word_tokenize("one word")
        ours = False
    except (MissingPackageError, LookupError):
        ours = True
        assert utils.n_gram_entropy(["a b a, c", "d"]) == pytest.approx(ngram_entropy("a b a, c") / 2)
    editor = editor_for(joined, model)
    arguments = {k: v for k, v in call(world).items() if k in ("prompts", "subject", "target_new")}
    metrics, _, _ = editor.edit(**arguments, test_generation=True, keep_original_weight=True, verbose=False)
    for phase in ("pre", "post"):
        found = metrics[0][phase]["fluency"]
        assert 0 < found.pop("ngram_entropy") < 10
        assert found == ({"words": "easyedit_mdm"} if ours and model == "twin-llama" else {})


def test_bad_requests_change_nothing(joined, world):
    """The error reaches the caller, and the model is as it was."""
    from easyedit_mdm.errors import RequestError

    editor = editor_for(joined)
    before = parameter_hashes(editor.model)
    arguments = {k: v for k, v in call(world).items() if k in ("prompts", "subject")}
    with pytest.raises(RequestError, match="not empty"):
        editor.edit(**arguments, target_new=[" "], keep_original_weight=True, verbose=False)
    assert parameter_hashes(editor.model) == before


def test_autoregressive_twin_with_both_romes(joined, world):
    """EasyEdit's own ROME on twin-llama, and ours: the same record, EasyEdit's metrics untouched, multi_step
    beside them.
    """
    import importlib

    theirs = importlib.import_module("easyeditor.models.rome.rome_main")
    theirs.CONTEXT_TEMPLATES_CACHE = ["{}"]
    layer = ROMEMDMHyperParams.from_hparams("ROME_MDM/twin-llama").layers
    own = importlib.import_module("easyeditor.models.rome.rome_hparams").ROMEHyperParams(
        layers=layer, fact_token="subject_last", v_num_grad_steps=30, v_lr=0.5, v_loss_layer=7,
        v_weight_decay=5e-4, clamp_norm_factor=4,
        kl_factor=0.0625, mom2_adjustment=False, context_template_length_params=[[5, 2]],
        rewrite_module_tmp="model.layers.{}.mlp.down_proj",
        layer_module_tmp="model.layers.{}", mlp_module_tmp="model.layers.{}.mlp",
        attn_module_tmp="model.layers.{}.self_attn",
        ln_f_module="model.norm", lm_head_module="lm_head", mom2_dataset="-", mom2_n_samples=1,
        mom2_dtype="float32", alg_name="ROME",
        device="cpu", model_name="twin-llama", stats_dir="-",
    )  # fmt: skip
    arguments = call(world, length=1)
    records = {}
    for name, editor in (
        ("ROME", joined.editor_class.from_hparams(own)),
        ("ROME_MDM", editor_for(joined, "twin-llama")),
    ):
        assert editor.tok.padding_side == "right" and editor.tok.pad_token_id is not None
        assert not isinstance(editor.model, Adapter)
        before = parameter_hashes(editor.model)
        metrics, _, _ = editor.edit(**arguments, keep_original_weight=True, verbose=False)
        assert parameter_hashes(editor.model) == before
        records[name] = metrics[0]["post"]
    theirs.CONTEXT_TEMPLATES_CACHE = None
    for record in records.values():
        assert np.mean(record["rewrite_acc"]) == 1.0
        assert (
            set(record["multi_step"]["rewrite"]) == CAUSAL
            and record["multi_step"]["rewrite"]["decode"]["order"] == "greedy"
        )
        assert (
            record.get("metric_meta", {}).get("rewrite", {}).get("comparable_group", "lm.").startswith("lm.")
        )


def batch_editor(joined, method: str, model: str = "twin-llada", **changes):
    """A BaseEditor with one of our methods, from the file that ships."""
    import dataclasses

    hparams = dataclasses.replace(METHODS[method].hparams.from_hparams(f"{method}/{model}"), **changes)
    return joined.editor_class.from_hparams(hparams)


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].batchable])
def test_batch_edit(joined, world, method):
    """EasyEdit's batch_edit: all facts of a batch in one update, scored, and the weights put back after
    it.
    """
    editor = batch_editor(joined, method, batch_size=3)
    before = parameter_hashes(editor.model)
    arguments = {k: v for k, v in call(world, 3).items() if k in ("prompts", "subject", "target_new")}
    metrics, _, weights = editor.batch_edit(**arguments, keep_original_weight=True, verbose=False)
    assert len(metrics) == 3 and parameter_hashes(editor.model) == before
    assert not carried(editor.model)
    rewritten = sum(sum(m["post"]["rewrite_acc"]) for m in metrics)
    if method != "IKE_MDM":  # the twins read no facts in their context
        assert rewritten >= sum(sum(m["pre"]["rewrite_acc"]) for m in metrics) + 1
    assert all("rewrite" in m["post"]["multi_step"] for m in metrics)


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_through_the_editor(joined, world, method):
    """`BaseEditor.edit` with each of our methods and its shipped file."""
    editor = batch_editor(joined, method)
    before = parameter_hashes(editor.model)
    arguments = {k: v for k, v in call(world).items() if k in ("prompts", "subject", "target_new")}
    (record,), _, _ = editor.edit(**arguments, keep_original_weight=True, verbose=False)
    assert record["pre"]["rewrite_acc"] == [0.0] and not carried(editor.model)
    if method == "IKE_MDM":  # the twins read no facts in their context: it is as if they stood in the prompt
        stands = f"{arguments['prompts'][0]} {arguments['target_new'][0]}.\n{arguments['prompts'][0]}"
        (said,) = score_prompts(editor.model, [stands], arguments["target_new"], DecodeConfig())
        assert record["post"]["multi_step"]["rewrite"]["text"] == said["text"]
    else:
        assert record["post"]["rewrite_acc"] == [1.0]
    assert parameter_hashes(editor.model) == before


def test_alphaedit_history_belongs_to_the_editor(joined, world):
    """Sequential edits of one editor know each other; another editor starts afresh; restored edits are
    forgotten.
    """
    editor, other = batch_editor(joined, "AlphaEdit_MDM"), batch_editor(joined, "AlphaEdit_MDM")
    arguments = {k: v for k, v in call(world, 2).items() if k in ("prompts", "subject", "target_new")}
    editor.edit(**arguments, keep_original_weight=True, verbose=False)
    history = editor.hparams.model_name.session.history
    assert len(history) == 1, "each edit was taken back before the next"
    editor.edit(
        **arguments, **({"sequential_edit": True} if HEAD else {"keep_original_weight": False}), verbose=False
    )
    assert editor.hparams.model_name.session.history is history
    assert len(history) == 2
    assert other.hparams.model_name.session is None


def test_easyedits_memit_on_our_statistics(joined, world, monkeypatch, tmp_path):
    """EasyEdit's own MEMIT edits the autoregressive twin with second moments of a shipped text, and downloads
    nothing.
    """
    if not HEAD and not wheel_edits_batches("llama"):
        pytest.skip("the wheel's MEMIT reads tuples, which these layers of transformers do not give")
    monkeypatch.setenv("EASYEDIT_MDM_CACHE", str(tmp_path / "cache"))
    editor = joined.editor_class.from_hparams(easyedit_hparams("MEMIT", "hparams/MEMIT/twin-llama.yaml"))
    arguments = {k: v for k, v in call(world).items() if k in ("prompts", "subject", "target_new")}
    (record,), _, _ = editor.edit(**arguments, keep_original_weight=True, verbose=False)
    assert record["pre"]["rewrite_acc"] == [0.0] and record["post"]["rewrite_acc"] == [1.0]
    assert list((tmp_path / "cache").glob("mom2-model.layers.*.safetensors"))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # its own hooks
@pytest.mark.skipif(not HEAD, reason="UltraEdit is in the repository only")
def test_easyedits_ultraedit_is_found_and_taken_back(joined, world, tmp_path):
    """Its class is called otherwise than its method, and it gives no weights back: they are kept for it."""
    from easyedit_mdm.host.methods import easyedits_method

    file = tmp_path / "ultra.yaml"
    file.write_text(yaml.safe_dump({
        "alg_name": "ULTRAEDIT", "model_name": "twin-llama", "class_name": "AutoModelForCausalLM",
        "tokenizer_class": "AutoTokenizer", "tokenizer_name": "twin-llama", "device": "cpu",
        "inner_params": ["model.layers.3.mlp.down_proj"], "dropout": 0.0, "no_grad_layers": None, "lr": 1e-3,
        "token": "mask", "batch_size": 1, "batch_size_once": 1, "editor_batch_size": 64, "silent": False,
        "half": False, "model_parallel": False, "results_dir": "results",
    }))  # fmt: skip
    model, _, edit = easyedits_method("ULTRAEDIT", file)
    before = {name: weight.clone() for name, weight in model.native.state_dict().items()}
    asked = call(world)
    undo = edit([{
        "prompt": asked["prompts"][0], "subject": asked["subject"][0], "target_new": asked["target_new"][0],
        "case_id": 0, "ground_truth": "",
    }])  # fmt: skip
    changed = [n for n, weight in model.native.state_dict().items() if not torch.equal(weight, before[n])]
    assert changed == ["model.layers.3.mlp.down_proj.weight"]
    undo()
    assert all(torch.equal(weight, before[n]) for n, weight in model.native.state_dict().items())


def test_a_method_that_gives_no_weights_back_says_so():
    """Its edit would stay in the model in silence."""
    from easyedit_mdm.errors import EditError
    from easyedit_mdm.host.methods import _put_back

    with pytest.raises(EditError, match="EasyEdit's GRACE gives no weights back"):
        _put_back(torch.nn.Linear(2, 2), {}, "GRACE")


def easyedit_hparams(method: str, file: str):
    """EasyEdit's own hyperparameters from a file that ships with the package."""
    import importlib

    from easyedit_mdm.editing.hparams import find_hparams

    return getattr(importlib.import_module("easyeditor"), f"{method}HyperParams").from_hparams(
        str(find_hparams(file))
    )


@pytest.mark.skipif(not HEAD, reason="UnKE is in the repository only")
def test_easyedits_unke(joined, world):
    """EasyEdit's own UnKE writes a fact into an autoregressive twin. Its causal mask is ours where
    transformers has none (5.24).
    """
    import importlib

    unke = importlib.import_module("easyeditor.models.unke.unke_main")
    adapter = load_model("twin-qwen", dtype="float32")
    model, tok = adapter.native, adapter.tokenizer
    tok.padding_side, tok.pad_token_id = "right", adapter.ids.pad
    hparams = importlib.import_module("easyeditor.models.unke.unke_hparams").unkeHyperParams(
        model_name="Qwen2.5-7B-Instruct", layers=[3], layer_selection="all", fact_token="last", lr=2e-3,
        v_num_grad_steps=30, v_lr=0.5,
        v_loss_layer=adapter.layers - 1, v_weight_decay=0.0, clamp_norm_factor=4.0, optim_num_step=60,
        ex_data_num=1, rewrite_module_tmp="-",
        layer_module_tmp="model.layers.{}", mlp_module_tmp="-", attn_module_tmp="-", ln_f_module="model.norm",
        lm_head_module="lm_head",
    )  # fmt: skip
    wanted = call(world, length=1)
    prompt, near = wanted["prompts"][0], wanted["locality_inputs"]["neighborhood"]["prompt"][0][0]
    target = " " + wanted["target_new"][0].strip()

    def probability() -> float:
        with torch.no_grad():
            last = model(**tok(prompt, return_tensors="pt")).logits[0, -1]
        return last.softmax(-1)[tok(target, add_special_tokens=False)["input_ids"][0]].item()

    before = probability()
    originals = unke.apply_unke_to_model(
        model, tok, hparams, [{"question": prompt, "answer": target}], [near]
    )
    assert before < 0.1 and probability() > 0.9
    assert all(name.startswith("model.layers.3.") for name in originals)


def test_easyedits_rome_refuses_masked_models(joined):
    """A next-token loss means nothing for a masked model: say so instead of computing it."""
    import importlib

    rome = importlib.import_module("easyeditor.models.rome.rome_hparams").ROMEHyperParams
    fields = dict.fromkeys(rome.__dataclass_fields__, 0)
    with pytest.raises(ModelError, match="masked diffusion model"):
        joined.editor_class.from_hparams(rome(**{**fields, "alg_name": "ROME", "model_name": "twin-llada"}))


def test_perplexity_is_refused(joined, world):
    """EasyEdit's perplexity metrics score next tokens."""
    from easyedit_mdm.denoising import DecodeConfig
    from easyedit_mdm.host.evaluation import edit_quality

    with pytest.raises(HyperParameterError, match="token_em"):
        edit_quality(
            load_model("twin-llada"), {"prompt": "x", "target_new": "y"}, DecodeConfig(), eval_metric="ppl"
        )


def test_rome_yaml_dispatch(joined):
    """ROMEHyperParams.from_hparams on one of our files gives our hyperparameters."""
    import importlib

    rome = importlib.import_module("easyeditor.models.rome.rome_hparams").ROMEHyperParams
    from easyedit_mdm.editing.hparams import packaged_hparams

    assert isinstance(
        rome.from_hparams(str(packaged_hparams() / "ROME_MDM" / "twin-llada.yaml")), ROMEMDMHyperParams
    )


RUNNER = """
import argparse, json, random, os
from easyeditor import ROMEHyperParams, BaseEditor
import sentence_transformers
parser = argparse.ArgumentParser()
parser.add_argument('--editing_method', required=True, type=str)
parser.add_argument('--hparams_dir', required=True, type=str)
parser.add_argument('--metrics_save_dir', default='./output', type=str)
args = parser.parse_args()
if args.editing_method == 'ROME':
    chosen = ROMEHyperParams
else:
    raise NotImplementedError
hparams = chosen.from_hparams(args.hparams_dir)
json.dump({'method': args.editing_method, 'draw': random.random(), 'class': type(hparams).__name__},
          open(os.path.join(args.metrics_save_dir, f'{args.editing_method}_results.json'), 'w'))
"""


SEVERAL = """
import contextlib, io, json, sys
from easyedit_mdm.cli import main
for command in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = main(command)
    print("done", json.dumps([status, said.getvalue()]))
"""


def cli(*commands: list[str], cwd: Path, path: Path | None = None) -> list[tuple[int, str]]:
    """Exit status and stderr of each command line, in one process (run-time type checks, on in this one, draw
    from `random`).
    """
    done = python(SEVERAL, cwd, path, json.dumps(commands))
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        tuple(json.loads(line.removeprefix("done ")))
        for line in done.stdout.splitlines()
        if line.startswith("done ")
    ]


def python(code: str, cwd: Path, path: Path | None = None, *arguments: str) -> subprocess.CompletedProcess:
    """Code in a process of its own, with a folder on its path."""
    paths = [str(path)] * (path is not None) + [os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_runner(tmp_path):
    """A script that knows only EasyEdit's names: both spellings, the file's name, the seed, the folder that
    is not there yet.
    """
    import random

    (tmp_path / "run.py").write_text(RUNNER)
    flags = {"alg": "--alg=ROME_MDM", "method": "--editing_method=ROME_MDM"}
    hparams = ["--hparams_dir", "hparams/ROME_MDM/twin-llada.yaml"]
    wanted = [(name, seed) for name in flags for seed in (42, 7)]
    commands = [
        [
            "run",
            *(["--seed", str(seed)] * (seed != 42)),
            "run.py",
            flags[name],
            *hparams,
            "--metrics_save_dir",
            f"new/{name}-{seed}",
        ]
        for name, seed in wanted
    ]
    refused = [["run", "run.py", "--alg", name, *hparams] for name in ("ROMME_MDM", "MEMIT_MDM")]
    (tmp_path / "opens.py").write_text("open('nowhere/data.json')\n")
    *ran, wrong, other, missing = cli(*commands, *refused, ["run", "opens.py"], cwd=tmp_path)
    for (name, seed), (status, said) in zip(wanted, ran, strict=True):
        assert status == 0, said
        result = json.loads((tmp_path / "new" / f"{name}-{seed}" / "ROME_MDM_results.json").read_text())
        assert result == {
            "method": "ROME_MDM",
            "draw": random.Random(seed).random(),
            "class": "ROMEMDMHyperParams",
        }
    assert wrong[0] == 2 and "did you mean 'ROME_MDM'" in wrong[1]
    assert other[0] == 2 and "a file of ROME_MDM, but MEMIT_MDM was asked for" in other[1]
    assert missing[0] == 2 and "opens.py wants nowhere/data.json, which does not exist" in missing[1]
    assert "Traceback" not in missing[1]


@pytest.mark.end_to_end
def test_hook(tmp_path):
    """Plain `python run.py --editing_method=ROME_MDM` with the hook's folder on PYTHONPATH."""
    (tmp_path / "run.py").write_text(RUNNER)
    (tmp_path / "out").mkdir()
    folder = subprocess.run(
        [sys.executable, "-m", "easyedit_mdm.cli", "hook"], capture_output=True, text=True, check=True
    ).stdout.strip()
    hparams = Path(__file__).parent.parent / "hparams" / "ROME_MDM" / "twin-llada.yaml"
    command = [
        sys.executable,
        "run.py",
        "--editing_method=ROME_MDM",
        "--hparams_dir",
        str(hparams),
        "--metrics_save_dir",
        "out",
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    import random

    result = json.loads((tmp_path / "out" / "ROME_MDM_results.json").read_text())
    assert result["method"] == "ROME_MDM" and result["draw"] == random.Random(42).random()


def test_method_names():
    """Equal to what they stand for and to themselves, printed as themselves."""
    name = MethodName("ROME_MDM", "ROME")
    assert (
        name == "ROME"
        and name == "ROME_MDM"
        and name == "MEMIT"
        and name != "AlphaEdit"
        and f"{name}" == "ROME_MDM"
    )
    assert {"ROME": 1}[name] == 1


def test_import_leaves_no_trace(tmp_path):
    """Seeds, environment, logging, warnings, import system, other packages: as before; EasyEdit holds the
    only stand-ins.
    """
    probe = """
import builtins, gc, os, sys, random, logging, warnings
import numpy, torch, transformers
from transformers import modeling_utils, pytorch_utils
import easyedit_mdm.host
from easyedit_mdm.host.standins import _Answer, _StandInType
state = lambda: (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
                 dict(os.environ),
                 list(logging.root.handlers), logging.root.level, list(warnings.filters),
                 list(sys.meta_path), builtins.__import__)
random.seed(5); before = state(), set(vars(modeling_utils)), set(vars(pytorch_utils))
easyedit_mdm.host.import_easyedit()
assert (state(), set(vars(modeling_utils)), set(vars(pytorch_utils))) == before
holders = {n.split(".")[0] for n, m in list(sys.modules.items())
           for v in [m, *vars(m).values()] if isinstance(v, (_Answer, _StandInType))}
assert holders == {"easyeditor"}, holders
"""
    done = python(probe, tmp_path)
    assert done.returncode == 0, done.stderr


FUTURE = """
import sys, types, transformers
from transformers.utils.import_utils import _LazyModule

def hiding(usual):
    def get(self, name):
        if name in {gone!r} and types.ModuleType.__getattribute__(self, "__name__") == "transformers":
            raise AttributeError(name)
        return usual(self, name)
    return get

for name in {gone!r}:
    getattr(transformers, name)  # there today
# of the class: transformers may put another module in its own place
for way in ("__getattribute__", "__getattr__"):
    setattr(_LazyModule, way, hiding(getattr(_LazyModule, way)))

class Gone:
    def find_spec(self, name, path=None, target=None):
        if name in {modules!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

for name in {modules!r}:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Gone())
"""


@pytest.fixture
def future(tmp_path):
    """Factory of a folder that, on the path, takes names and modules from transformers before anything else
    runs.
    """

    def make(gone: list[str], modules: list[str] | None = None) -> Path:
        folder = tmp_path / "future"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(FUTURE.format(gone=gone, modules=modules or []))
        return folder

    return make


@pytest.mark.end_to_end
def test_a_transformers_to_come(tmp_path, future):
    """A class and a module that EasyEdit imports are gone: it is imported and edits; what is gone names
    itself when it is used.
    """
    probe = """
import dataclasses, importlib, pytest
from easyedit_mdm import ROMEMDMHyperParams
from easyedit_mdm.errors import MissingPackageError
from easyedit_mdm.host import register
joined = register()
module = importlib.import_module("easyeditor.editors.editor")
former = importlib.import_module("easyeditor.trainer.blip2_models.Qformer")
for used in (module.T5Tokenizer.from_pretrained, former.ModelOutput):
    with pytest.raises(MissingPackageError, match='has it no more: pip install "transformers<'):
        used("twin-llama")
editor = joined.editor_class.from_hparams(ROMEMDMHyperParams.from_hparams("ROME_MDM/twin-llada"))
arguments = {"prompts": ["The river is"], "subject": ["river"], "target_new": ["blue"]}
(record,), _, _ = editor.edit(**arguments, keep_original_weight=True, verbose=False)
print("written", record["pre"]["rewrite_acc"], record["post"]["rewrite_acc"])
"""
    done = python(probe, tmp_path, future(["T5Tokenizer", "GPT2TokenizerFast"], ["transformers.file_utils"]))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "written [0.0] [1.0]" in done.stdout


def test_without_what_the_editor_needs(tmp_path, future):
    """EasyEdit is there and BaseEditor cannot work: one line with module, place, versions and cure, from
    every command.
    """
    (tmp_path / "run.py").write_text(RUNNER)
    commands = [["run", "run.py", "--alg", "ROME_MDM"], ["doctor", "--json", "doctor.json"]]
    ran, examined = cli(*commands, cwd=tmp_path, path=future(["AutoModelForCausalLM"]))
    (finding,) = [
        f
        for f in json.loads((tmp_path / "doctor.json").read_text())["findings"]
        if f["subject"] == "EasyEdit"
    ]
    assert ran[0] == 2 and ran[1].startswith("easyedit-mdm: EasyEdit at ")
    assert examined[0] == 0 and finding["state"] == "limited"
    installed = transformers.__version__
    for said in (ran[1].strip(), finding["found"]):
        assert (
            "\n" not in said
            and str(find_easyedit().root) in said
            and "was found and cannot be imported" in said
        )
        assert re.search(r"easyeditor/(editors|util)/\w+\.py, line \d+: ImportError: ", said)
        assert "cannot import name 'AutoModelForCausalLM' from 'transformers'" in said
        assert f"transformers {installed}. " in said and f'pip install "transformers<{installed}"' in said


BROKEN = [  # file, what stands in it, and what must be said
    ("editors/editor.py", "from ..util import nothing_there", ["A file of its own is missing"]),
    ("editors/editor.py", "def broken(:", ["easyeditor/editors/editor.py, line 1: SyntaxError"]),
    ("editors/editor.py", "import torch\ntorch.never_there",
        ["easyeditor/editors/editor.py, line 2: AttributeError", "torch 2."]),
    (
        "editors/editor.py", "from nowhere import wrap\n@wrap\ndef f(): pass",
        ["editor.py, line 2: MissingPackageError: nowhere.wrap was used", "nowhere is not installed. ",
            "missing: pip install nowhere"],
    ),
    ("__init__.py", "raise RuntimeError('two\\nlines')",
        ["easyeditor/__init__.py, line 1: RuntimeError: two lines. transformers "]),
    ("util/alg_dict.py", "import numpy.nowhere", ["No module named 'numpy.nowhere'. numpy ",
        'pip install "numpy<']),
]  # fmt: skip


def test_a_broken_easyedit(tmp_path):
    """Whatever its import raises is told in one line; nothing of it stays imported, and the path is as
    before.
    """
    for number, (file, source, _) in enumerate(BROKEN):
        for name in (
            "__init__.py",
            "editors/__init__.py",
            "editors/editor.py",
            "util/__init__.py",
            "util/alg_dict.py",
        ):
            path = tmp_path / str(number) / "easyeditor" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source if name == file else "")
    probe = """
import sys
from easyedit_mdm.errors import HostImportError
from easyedit_mdm.host import import_easyedit
for number in sys.argv[1:]:
    path = list(sys.path)
    try:
        import_easyedit(number)
    except HostImportError as error:
        print("said", error)
    assert sys.path == path and not [n for n in sys.modules if n.startswith("easyeditor")]
"""
    done = python(probe, tmp_path, None, *map(str, range(len(BROKEN))))
    assert done.returncode == 0, done.stderr
    for number, ((_, _, expected), said) in enumerate(zip(BROKEN, done.stdout.splitlines(), strict=True)):
        assert all(words in said for words in expected), said
        assert f"said EasyEdit at {tmp_path / str(number)} (PyPI's wheel) was found" in said


def test_where_easyedit_is_looked_for(tmp_path, monkeypatch):
    """Already imported comes first; then the folder given; a folder without EasyEdit, or none at all, says
    how to get it.
    """
    monkeypatch.setitem(sys.modules, "easyeditor", None)
    with pytest.raises(HostNotFoundError, match="holds no easyeditor.*Two ways"):
        find_easyedit(tmp_path)
    (tmp_path / "easyeditor" / "editors").mkdir(parents=True)
    (tmp_path / "easyeditor" / "editors" / "editor.py").write_text("")
    assert find_easyedit(tmp_path).source == "home"
    monkeypatch.setenv("EASYEDIT_HOME", str(tmp_path))
    assert find_easyedit().form == "wheel"
    monkeypatch.delenv("EASYEDIT_HOME")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "env"))
    with pytest.raises(
        HostNotFoundError,
        match=f"pip install --no-deps --target {tmp_path}/env/share/easyedit_mdm easyeditor==",
    ):
        find_easyedit()
    (tmp_path / "env" / "share").mkdir(parents=True)
    (tmp_path / "env" / "share" / "easyedit_mdm").mkdir()
    (tmp_path / "easyeditor").rename(tmp_path / "env" / "share" / "easyedit_mdm" / "easyeditor")
    assert find_easyedit() == Host(tmp_path / "env" / "share" / "easyedit_mdm", "wheel", "own folder")


@pytest.mark.easyedit_head
@pytest.mark.end_to_end
def test_all_of_this_on_the_head(easyedit_home):
    """This file once more, in a process that imports the clone."""
    if HEAD:
        pytest.skip("this is that process")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-m",
        "not easyedit_head",
        __file__,
    ]
    environment = {**os.environ, "HOST_FORM": "head", "EASYEDIT_HOME": str(easyedit_home)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.easyedit_head
@pytest.mark.data
@pytest.mark.end_to_end
def test_easyedits_zsre_runner(easyedit_home, data_dir, tmp_path):
    """examples/run_zsre_llama2.py, untouched, on ten real zsRE records: four fifths of their targets' tokens
    and more are written.
    """
    command = [
        sys.executable, "-m", "easyedit_mdm.cli", "run",
        str(easyedit_home / "examples" / "run_zsre_llama2.py"), "--alg", "ROME_MDM",
        "--hparams_dir", "hparams/ROME_MDM/twin-llada.yaml", "--data_dir", str(data_dir / "zsre"),
        "--ds_size", "10",
        "--metrics_save_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    records = json.loads((tmp_path / "out" / "ROME_MDM_results.json").read_text())
    assert len(records) == 10
    assert sum(r["post"]["rewrite_acc"][0] for r in records) / 10 >= 0.8
    for record in records:
        assert set(record["post"]["multi_step"]["rewrite"]) == SECTIONS
        assert record["post"]["rewrite_acc"] >= record["pre"]["rewrite_acc"]
        assert set(record["post"]["locality"]) == {
            "neighborhood_acc",
            "neighborhood_output",
        }, "as EasyEdit writes them"


@pytest.mark.easyedit_head
@pytest.mark.end_to_end
def test_easyedits_knowedit_runner(easyedit_home, world, tmp_path):
    """examples/run_knowedit_llama2.py, untouched, gets to its last line: the means over all sections, without
    nltk.
    """
    wanted = call(world, 2, length=1)
    near, same = wanted["locality_inputs"]["neighborhood"], wanted["portability_inputs"]["same"]

    def probes(prompts: list[str], answers: list[str]) -> list[dict]:
        """As KnowEdit's files have them: an answer is a list of lists of aliases."""
        return [
            {"prompt": prompt, "ground_truth": [[answer]]}
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    records = [
        {
            "subject": wanted["subject"][i],
            "prompt": wanted["prompts"][i],
            "target_new": wanted["target_new"][i],
            "portability": {"Reasoning": probes([same["prompt"][i]], [wanted["target_new"][i]])},
            "locality": {"Relation_Specificity": probes(near["prompt"][i], near["ground_truth"][i])},
        }
        for i in range(2)
    ]
    (tmp_path / "facts.json").write_text(json.dumps(records))
    script = str(easyedit_home / "examples" / "run_knowedit_llama2.py")
    command = [
        "run", script, "--alg", "ROME_MDM", "--hparams_dir", "hparams/ROME_MDM/twin-llama.yaml", "--data_dir",
        "facts.json", "--datatype", "zsre",
        "--metrics_save_dir", "out",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "easyedit_mdm.cli", *command], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    saved = json.loads((tmp_path / "out" / "ROME_MDM_zsre_twin-llama_results.json").read_text())
    means = {
        name: float(value)
        for name, value in re.findall(r"^(Edit_Succ|Overall_\w+|Fluency): *([\d.]+)$", done.stdout, re.M)
    }
    locality = [r["post"]["locality"]["Relation_Specificity_acc"] for r in saved]
    assert set(means) == {"Edit_Succ", "Overall_portability", "Overall_locality", "Fluency"}
    assert means["Edit_Succ"] == 100.0 and means["Overall_locality"] == pytest.approx(
        100 * np.mean([np.mean(x) for x in locality])
    )
    for record in saved:
        assert len(record["post"]["locality_output"]["Relation_Specificity"]) == 2
        assert set(record["post"]["locality"]) == {"Relation_Specificity_acc"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda(joined, world):
    """The same edit on a GPU."""
    editor = editor_for(joined, device=0)
    assert editor.model.device.type == "cuda"
    metrics, _, _ = editor.edit(**call(world), keep_original_weight=True, verbose=False)
    assert metrics[0]["post"]["rewrite_acc"] == [1.0]
