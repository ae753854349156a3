"""Hyperparameter files: the shipped ones load, the faulty ones are told what is wrong."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
from pathlib import Path

import pytest

from easyedit_mdm import ROMEMDMHyperParams
from easyedit_mdm.api import load_hparams, load_model
from easyedit_mdm.common.fingerprints import model_fingerprint
from easyedit_mdm.editing import METHODS
from easyedit_mdm.editing.hparams import packaged_hparams, read_yaml
from easyedit_mdm.errors import CheckpointError, HyperParameterError, UnknownNameError
from easyedit_mdm.runs.methods import load_ours
from easyedit_mdm.twins import TWINS, twin_folder

SHIPPED = sorted(p for p in packaged_hparams().glob("*/*.yaml") if p.parent.name in METHODS)
GOOD = {"alg_name": "ROME_MDM", "model_name": "m", "layers": [1]}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_shipped_files(path):
    """Each file lies in its method's folder, loads, and says which model it is for."""
    loaded = METHODS[path.parent.name].hparams.from_hparams(path)
    assert loaded.alg_name == path.parent.name and loaded.model_name
    assert METHODS[path.parent.name].hparams.from_hparams(f"{path.parent.name}/{path.stem}") == loaded
    assert loaded.to_dict()["layers"] == loaded.layers


def test_what_ships():
    """One file for each model that the method is meant for."""
    names = {p.stem for p in SHIPPED if p.parent.name == "ROME_MDM"}
    assert {"llada-8b", "llada-8b-base", "llada-1.5", "dream-7b", "dream-7b-base", *TWINS} <= names
    for method in METHODS:
        assert {"llada-8b", "dream-7b", *TWINS} <= {p.stem for p in SHIPPED if p.parent.name == method}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"state_shedule": "cycle"}, HyperParameterError, "did you mean 'state_schedule'"),
        ({"state_schedule": "enumerat"}, UnknownNameError, "did you mean 'enumerate'"),
        ({"early_stop_on": "draw"}, HyperParameterError, "did you mean 'drawn'"),
        ({"key_average": "easyedit_"}, HyperParameterError, "did you mean 'easyedit'"),
        ({"kl_position": "end"}, HyperParameterError, "kl_position='end'"),
        ({"fact_token": "subject_end"}, HyperParameterError, "fact_token='subject_end'"),
        ({"layers": [1, 2]}, HyperParameterError, "one layer"),
        ({"v_lr": float("nan")}, HyperParameterError, "v_lr=nan"),
        ({"v_num_grad_steps": 0}, HyperParameterError, "at least 1"),
        ({"alg_name": "ROME"}, HyperParameterError, "alg_name is 'ROME', EasyEdit's own method"),
        ({"mom2_adjustment": True}, HyperParameterError, "mom2_dataset"),
        ({"v_lr": "high"}, HyperParameterError, "v_lr='high' is not of the kind float"),
        ({"fp16": True, "dtype": "bfloat16"}, HyperParameterError, "fp16 is on, but dtype='bfloat16'"),
        ({"seed": True}, HyperParameterError, "seed=True is not of the kind int"),
        ({"layers": ["1"]}, HyperParameterError, "layers=.'1'. is not of the kind"),
        ({"decode": {"steps": "4"}}, HyperParameterError, "decode setting steps='4' is not of the kind"),
        ({"context_templates": ["no hole"]}, HyperParameterError, "one {}"),
        ({"decode": {"ordre": "random"}}, HyperParameterError, "did you mean 'order'"),
        ({"decode": {"steps": 0}}, HyperParameterError, "steps=0"),
        ({"decode": {"order": "randm"}}, UnknownNameError, "did you mean 'random'"),
    ],
)
def test_bad_values(change, error, message):
    """Each names field and value."""
    with pytest.raises(error, match=message):
        ROMEMDMHyperParams.from_dict({**GOOD, **change})


def test_bad_files(tmp_path):
    """Missing fields, no mapping, no YAML, no file; code in YAML is not run."""
    path = tmp_path / "x.yaml"
    for text, message in (
        ("alg_name: ROME_MDM\nlayers: [1]\n", "model_name is missing"),
        ("- 1\n- 2\n", "must hold a mapping"),
        ("1: x\nalg_name: ROME_MDM\n", "the key 1 is int, not a word"),
        ("~: x\n", "the key None is NoneType"),
        ("a: [1\n", "not readable YAML"),
        ("model_name: !!python/object/apply:os.system ['true']\n", "not readable YAML"),
    ):
        path.write_text(text)
        with pytest.raises(HyperParameterError, match=message):
            ROMEMDMHyperParams.from_hparams(path)
    with pytest.raises(HyperParameterError, match="no hyperparameter file"):
        ROMEMDMHyperParams.from_hparams(tmp_path / "none")


def test_numbers_as_easyedit_reads_them(tmp_path):
    """`5e-1` without a dot is a number; `.yaml` may be left out."""
    (tmp_path / "x.yaml").write_text(
        "alg_name: ROME_MDM\nmodel_name: m\nlayers: [1]\nv_lr: 5e-1\ndecode: {temperature: 1e-1}\n"
    )
    loaded = ROMEMDMHyperParams.from_hparams(tmp_path / "x")
    assert loaded.v_lr == 0.5 and loaded.decode_config().temperature == 0.1
    assert (
        ROMEMDMHyperParams.from_hparams("hparams/ROME_MDM/llada-8b").model_name == "GSAI-ML/LLaDA-8B-Instruct"
    )


ROME_DEFAULTS = {
    "fact_token": "subject_last", "v_num_grad_steps": 25, "v_lr": 0.1, "v_loss_layer": None,
    "v_weight_decay": 0.5, "clamp_norm_factor": 0.75,
    "kl_factor": 0.0625, "mom2_adjustment": False, "context_template_length_params": [[5, 10], [10, 10]],
    "mom2_mask_ratio": 0,
    "mom2_eps": 1e-6, "state_schedule": "enumerate", "max_states": 31, "key_average": "single",
    "kl_position": "slot",
    "early_stop_loss": 0.05, "early_stop_on": "cycle", "optimise_through": "activation",
    "v_lr_schedule": "constant",
    "key_states": "full_mask", "max_rows": 256, "facts_per_batch": 64, "guard": None, "seed": 0,
    "max_length": 40,
}  # fmt: skip
BATCH_DEFAULTS = {
    **ROME_DEFAULTS, "mom2_adjustment": True, "mom2_update_weight": 15000,
    "context_template_length_params": [[10, 5]],
    "clamp_reference": "block", "batch_size": 1, "mom2_factor": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "defaults"),
    [
        ("ROME_MDM", ROME_DEFAULTS),
        ("R-ROME_MDM", ROME_DEFAULTS),
        ("MEMIT_MDM", BATCH_DEFAULTS),
        ("EMMET_MDM", {**BATCH_DEFAULTS, "emmet_lambda": 0.1}),
        (
            "AlphaEdit_MDM",
            {
                **BATCH_DEFAULTS,
                "mom2_update_weight": 0,
                "mom2_eps": 0.0,
                "nullspace_threshold": 2e-2,
                "L2": 1.0,
            },
        ),
    ],
)
def test_defaults(method, defaults):
    """As they were: runs of earlier versions are gone on with under what a header leaves out."""
    text = {"mom2_dataset": "twins"} if defaults["mom2_adjustment"] else {}
    found = (
        METHODS[method]
        .hparams.from_dict({"alg_name": method, "model_name": "m", "layers": [1], **text})
        .to_dict()
    )
    assert {name: found[name] for name in defaults} == defaults


def test_fields_are_easyedits():
    """Every field of EasyEdit's ROMEHyperParams that a ROME YAML holds can stand in ours, mom2 counts
    aside.
    """
    ours = {f.name for f in dataclasses.fields(ROMEMDMHyperParams)}
    theirs = (
        "layers fact_token v_num_grad_steps v_lr v_loss_layer v_weight_decay clamp_norm_factor kl_factor"
        " mom2_adjustment context_template_length_params rewrite_module_tmp layer_module_tmp mlp_module_tmp"
        " attn_module_tmp ln_f_module lm_head_module mom2_dataset alg_name device model_name stats_dir"
        " max_length model_parallel fp16"
    ).split()
    assert set(theirs) <= ours


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("v_lr: high", "line 4: hyperparameter v_lr='high' is not of the kind float"),
        ("v_lr: -1", "line 4: v_lr=-1.0 must be a finite number"),
        ("v_lr: 1" + "0" * 400, "line 4: hyperparameter v_lr=10"),
        (
            "state_shedule: cycle",
            "line 4: unknown hyperparameter 'state_shedule'; did you mean 'state_schedule'",
        ),
        ("state_schedule: cicle", "line 4: state_schedule='cicle'.*did you mean 'cycle'"),
        ("decode: {steps: x}", "line 4: decode setting steps='x'"),
        ("guard: {norm_ration: 1}", "line 4: unknown guard setting 'norm_ration'; did you mean 'norm_ratio'"),
        ("decode: &a [*a]", "alias .a is not read.*line 4"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b, *b]", "alias .a is not read.*line 5"),
    ],
)
def test_errors_name_file_and_line(tmp_path, line, message):
    """What is wrong in a file is told with its line; aliases, which make a few lines endless, are not
    followed.
    """
    (tmp_path / "x.yaml").write_text(f"alg_name: ROME_MDM\nmodel_name: m\nlayers: [1]\n{line}\n")
    with pytest.raises((HyperParameterError, UnknownNameError), match=message) as caught:
        ROMEMDMHyperParams.from_hparams(tmp_path / "x.yaml")
    assert str(tmp_path / "x.yaml") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("said", ["", "mom2_adjustment: false", "mom2_adjustment: true"])
def test_a_text_of_second_moments_is_not_ignored(tmp_path, said):
    """A text that would not be read is an error, unless the file says so, as EasyEdit's ROME files do."""
    file = tmp_path / "some.yaml"
    file.write_text(f"alg_name: ROME_MDM\nmodel_name: twin-llada\nlayers: [1]\nmom2_dataset: twins\n{said}\n")
    if said:
        assert load_hparams(file).mom2_adjustment is ("true" in said)
        return
    with pytest.raises(HyperParameterError, match="mom2_dataset='twins', but mom2_adjustment is not given"):
        load_hparams(file)
    with pytest.raises(HyperParameterError, match="mom2_adjustment is not given"):
        ROMEMDMHyperParams(alg_name="ROME_MDM", model_name="m", layers=[1], mom2_dataset="twins")
    file.write_text(file.read_text().replace("ROME_MDM", "MEMIT_MDM"))
    assert load_hparams(file).mom2_adjustment, "on by default"


@pytest.mark.parametrize("method", list(METHODS))
def test_one_function_loads_every_method(method):
    """`load_hparams` gives the class of the method that the file names, which copies and replaces as EasyEdit
    does.
    """
    loaded = load_hparams(f"{method}/twin-llada")
    assert type(loaded) is METHODS[method].hparams and loaded == type(loaded).from_hparams(
        f"{method}/twin-llada"
    )
    copied = copy.copy(loaded)
    copied.model_name = "other"
    assert loaded.model_name == "twin-llada" and dataclasses.replace(copied, seed=3).seed == 3
    with pytest.raises(HyperParameterError, match="layers"):
        dataclasses.replace(loaded, layers=[-1])


def test_the_wrong_class_says_which_is_right(tmp_path):
    """Another method's file; EasyEdit's own; a method that is nobody's; a misspelt name."""
    with pytest.raises(HyperParameterError, match="use MEMITMDMHyperParams, or load_hparams"):
        ROMEMDMHyperParams.from_hparams("MEMIT_MDM/twin-llada")
    with pytest.raises(
        HyperParameterError, match="line 2: alg_name is 'ROME', EasyEdit's own method.*bench.*BaseEditor"
    ):
        load_hparams("ROME/twin-llama")
    (tmp_path / "x.yaml").write_text("alg_name: ROMME_MDM\n")
    with pytest.raises(HyperParameterError, match="line 1: alg_name is 'ROMME_MDM'; did you mean 'ROME_MDM'"):
        load_hparams(tmp_path / "x.yaml")
    with pytest.raises(HyperParameterError, match="did you mean 'ROME_MDM/twin-llama'") as caught:
        load_hparams("ROME_MDM/twin-lama")
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize("method", list(METHODS))
def test_every_field_stands_in_one_group(method):
    """And is told of in that group's docstring, EasyEdit's module templates aside."""
    groups = [c for c in METHODS[method].hparams.__mro__ if dataclasses.is_dataclass(c)]
    told = []
    for group in groups:
        above = {
            f.name for c in group.__mro__[1:] if dataclasses.is_dataclass(c) for f in dataclasses.fields(c)
        }
        own = [f.name for f in dataclasses.fields(group) if f.name not in above]
        if group.__name__ != "ModuleHyperParams":
            assert not [name for name in own if name not in str(group.__doc__)]
        told += own
    assert sorted(told) == sorted(f.name for f in dataclasses.fields(METHODS[method].hparams))


@pytest.mark.parametrize(
    ("line", "dtype"), [("fp16: true", "float16"), ("dtype: bfloat16", "bfloat16"), ("seed: 0", "float32")]
)
def test_one_rule_for_the_dtype(tmp_path, line, dtype):
    """`bench` and `sweep` load a model in the dtype that its file asks for, by `dtype` or EasyEdit's
    `fp16`.
    """
    (tmp_path / "x.yaml").write_text(
        f"alg_name: ROME_MDM\nmodel_name: twin-llama\ndevice: cpu\nlayers: [1]\n{line}\n"
    )
    model, hparams = load_ours("ROME_MDM", tmp_path / "x.yaml")
    assert str(model.dtype) == f"torch.{dtype}" and hparams.load_dtype in (dtype, None)


@pytest.mark.parametrize("name", TWINS)
def test_twins_are_the_same_by_name_and_by_folder(name):
    """Float32 both ways; half precision is only how they are stored."""
    models = [load_model(name), load_model(twin_folder(name))]
    assert [str(m.dtype) for m in models] == ["torch.float32"] * 2
    assert len({model_fingerprint(m.native) for m in models}) == 1


@pytest.mark.parametrize(
    ("line", "asked", "dtype"), [("fp16: true", None, "float16"), ("fp16: true", "bfloat16", "bfloat16")]
)
def test_edit_follows_the_same_rule(tmp_path, monkeypatch, line, asked, dtype):
    """`easyedit-mdm edit` loads in the file's dtype, and in the one of `--dtype` where that is given."""
    from easyedit_mdm.cli import edits

    seen = {}

    def load(name, **options):
        seen.update(options)
        raise CheckpointError("not loaded")

    monkeypatch.setattr(edits, "load_model", load)
    (tmp_path / "x.yaml").write_text(f"alg_name: ROME_MDM\nmodel_name: twin-llama\nlayers: [1]\n{line}\n")
    fact = {"prompt": "Ann is", "subject": "Ann", "target_new": "old"}
    with pytest.raises(CheckpointError, match="not loaded"):
        edits.new_edit(tmp_path / "x.yaml", [fact], tmp_path / "e", dtype=asked)
    assert seen["dtype"] == dtype


@pytest.mark.parametrize("name", [[], {"a": 1}, 3, None])
def test_a_method_that_is_no_name(tmp_path, name):
    """One error that shows the value, whatever YAML put there."""
    file = tmp_path / "odd.yaml"
    file.write_text(json.dumps({**GOOD, "alg_name": name}))
    with pytest.raises(HyperParameterError, match="alg_name"):
        ROMEMDMHyperParams.from_hparams(file)


def test_files_for_real_text_are_the_best_that_were_tried(monkeypatch):
    """hparams/*/*-text.yaml and the table of docs/methods.md, from benchmarks/presets.json."""
    root = Path(__file__).parent.parent
    monkeypatch.syspath_prepend(root / "benchmarks")
    presets = importlib.import_module("presets")
    result = json.loads((root / "benchmarks" / "presets.json").read_text())
    page = (root / "docs" / "methods.md").read_text()
    assert f"<!-- presets -->\n{presets.table(result)}<!-- /presets -->" in page
    for name, tried in result.items():
        best, (method, model) = tried["text"][0], name.split("/")
        assert best["score"] == max(row["score"] for row in tried["text"])
        if best["name"] == "before":
            continue
        base = read_yaml(root / "hparams" / method / f"{model}.yaml")
        changes = {k: v for k, v in best["changes"].items() if k != "file"}
        assert read_yaml(root / "hparams" / method / f"{model}-text.yaml") == {**base, **changes}


def test_settings_of_an_earlier_version():
    """What they leave out is at its default, lists and mappings as well."""
    kind = METHODS["ROME_MDM"].hparams
    now = kind.as_now({"alg_name": "ROME_MDM", "v_lr": 0.3})
    assert now["v_lr"] == 0.3 and now["open_canvas"] == 0 and now["decode"] == {}
    assert now["context_template_length_params"] == [[5, 10], [10, 10]] and "layers" not in now
