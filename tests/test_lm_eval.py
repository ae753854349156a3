"""lm-evaluation-harness itself, on local tasks and without network: `make lm-eval-test`."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from easyedit_mdm import Session, load_hparams, load_model
from easyedit_mdm.cli import main
from easyedit_mdm.twins.world import World

if find_spec("lm_eval") is None:
    pytest.skip("lm-evaluation-harness is not here: make lm-eval-test", allow_module_level=True)

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
{rest}"""
CHOICE = """output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list:
  - metric: acc
"""
WRITE = """output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 2
filter_list:
  - name: strip
    filter:
      - function: remove_whitespace
      - function: take_first
metric_list:
  - metric: exact_match
"""
TEXT = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three tasks about four facts that the twin knows; one of them is then edited into another."""
    home = tmp_path_factory.mktemp("tasks")
    facts = [f for f in World.build().all_facts() if f.length == 2 and not f.relation.closed][:4]
    records = {
        "choice": [{"prompt": f.prompt(), "choices": [f.object.strip(), "Zoter Zemo"]} for f in facts],
        "write": [{"prompt": f.prompt(), "answer": f.object.strip()} for f in facts],
        "text": [{"text": f"{f.prompt()} {f.object.strip()}. " * 2} for f in facts],
    }
    for (name, lines), rest in zip(records.items(), (CHOICE, WRITE, TEXT)):
        data = home / f"{name}.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        (home / f"{name}.yaml").write_text(TASK.format(name=f"local_{name}", data=data, rest=rest))
    model = load_model("twin-llada")
    request = {"prompt": facts[0].prompt(), "subject": facts[0].subject, "target_new": "Zoter Zemo"}
    with Session(model, load_hparams("ROME_MDM/twin-llada")) as session:
        session.edit([request])[0].save(home / "edit", model)
    return home


def test_damage(folder, tmp_path, capsys):
    """The edited fact is lost in each task, the other three stay; the table and both files say so."""
    out, tasks = tmp_path / "out", "local_choice,local_write,local_text"
    command = ["damage", "twin-llada", "--edits", str(folder / "edit"), "--include-path", str(folder)]
    assert main([*command, "--tasks", tasks, "--samples", "16", "--out", str(out)]) == 0
    told = json.loads((out / "damage.json").read_text())
    rows = {(row["task"], row["metric"]): row for row in told["rows"]}
    for task, metric in (("local_choice", "acc"), ("local_write", "exact_match")):
        row = rows[task, metric]
        assert (row["before"], row["after"], row["n"]) == (1.0, 0.75, 4)
        assert row["difference"]["mean"] == pytest.approx(-0.25)
    text = rows["local_text", "word_perplexity"]
    assert text["after"] > text["before"] and text["difference"] is None
    counted = told["before"]["likelihoods"]
    assert counted["exact"] == 8 and counted["estimated"] == 4 and counted["mean_standard_error"] > 0
    assert "| local_choice | acc | 4 | 1.000 | 0.750 | -0.250 |" in (out / "damage.md").read_text()
    assert "local_write" in capsys.readouterr().out
    assert main([*command, "--tasks", "no_such_task"]) == 2
    assert "knows no task no_such_task" in capsys.readouterr().err


def test_the_harness_own_command_line(folder, tmp_path, capsys):
    """`lm-eval run --model easyedit_mdm` with edits; a wrong model argument is one line."""
    arguments = ["lm-eval", "run", "--model", "easyedit_mdm", "--include_path", str(folder), "--tasks"]
    where = f"pretrained=twin-llada,edits={folder / 'edit'}"
    out = ["--output_path", str(tmp_path / "out")]
    assert main([*arguments, "local_choice", "--model_args", where, *out]) == 0
    (found,) = (tmp_path / "out").rglob("results*.json")
    results = json.loads(found.read_text())
    assert results["results"]["local_choice"]["acc,none"] == 0.75
    assert len(results["config"]["edits"]) == 1
    assert main([*arguments, "local_choice", "--model_args", "pretrained=twin-llada,edit=x"]) == 2
    assert "unknown edit; did you mean" in capsys.readouterr().err.splitlines()[-1]


def test_the_other_models_of_the_harness_stay():
    """Registering ours first leaves its own there."""
    import easyedit_mdm.harness.model

    import lm_eval.models  # isort: skip
    from lm_eval.api.registry import get_model

    assert get_model("easyedit_mdm") is easyedit_mdm.harness.model.EditedLM
    assert get_model("dummy").__name__ == "DummyLM" and lm_eval.models
