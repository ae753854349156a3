"""Same seed, same bytes: across processes and thread counts; and nobody's company matters."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from easyedit_mdm import ROMEMDMHyperParams, make_edit, make_edits, score_prompts
from easyedit_mdm.editing.hparams import find_hparams, read_yaml
from easyedit_mdm.models.geometry import right_padded
from easyedit_mdm.twins.benchmark import cases

ROWS = [
    {"prompt": "Tamos Latre was born in", "subject": "Tamos Latre", "target_new": "Zopago Zemo"},
    {"prompt": "Repem Loves wrote the book", "subject": "Repem Loves", "target_new": "Fitus Kubom"},
]


@pytest.mark.end_to_end
def test_processes_and_threads(tmp_path):
    """The command line, with one thread and with two, each from nothing: statistics, prefixes, edit and card
    are the same bytes.
    """
    values = {**read_yaml(find_hparams("MEMIT_MDM/twin-llada")), "v_num_grad_steps": 6, "mom2_n_tokens": 1500}
    (tmp_path / "h.json").write_text(json.dumps(values))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    environment = {k: v for k, v in os.environ.items() if k != "MKL_CBWR"}
    for threads in ("1", "2"):
        cache, out = tmp_path / f"cache{threads}", tmp_path / f"edit{threads}"
        command = [
            sys.executable,
            "-m",
            "easyedit_mdm.cli",
            "edit",
            "--hparams",
            str(tmp_path / "h.json"),
            "--data-file",
            str(tmp_path / "rows.json"),
            "--keep-failed",  # six steps are few
        ]
        settings = {
            **environment,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "EASYEDIT_MDM_CACHE": str(cache),
        }
        done = subprocess.run(
            [*command, "--save", str(out)], env=settings, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
    for folder in ("edit", "cache"):
        one, two = ({p.name: p.read_bytes() for p in (tmp_path / f"{folder}{n}").iterdir()} for n in "12")
        assert one and one == two


@pytest.mark.parametrize("name", ["twin_llada", "twin_llama"])
def test_company_changes_nothing(name, world, request):
    """Edits of a batch with targets of all lengths are, within 1e-5 of their norm, those that are made alone;
    so are logits and answers.
    """
    model = request.getfixturevalue(name)
    settings = ROMEMDMHyperParams.from_hparams(f"ROME_MDM/{name.replace('_', '-')}")
    settings = dataclasses.replace(
        settings, mom2_adjustment=False, context_templates=["{}", "The old song. {}"], v_num_grad_steps=6
    )
    chosen = [next(c for c in cases(world, "validation") if c.length == length) for length in (1, 3, 6)]
    together = make_edits(model, [case.request() for case in chosen], settings)
    for case, edit in zip(chosen, together):
        alone = make_edit(model, case.request(), settings).changes[0].dense()
        assert (edit.changes[0].dense() - alone).norm() <= 1e-5 * alone.norm()
    rows = [torch.tensor(model.tokenizer(case.fact.prompt())["input_ids"]) for case in chosen]
    ids, mask = right_padded([row.repeat(i + 1) for i, row in enumerate(rows)], model.ids.pad, "cpu")
    with torch.no_grad():
        logits = model.token_logits(ids, mask)
        for i, row in enumerate(rows):
            single = model.token_logits(row.repeat(i + 1)[None])[0]
            assert (logits[i, : len(single)] - single).abs().max() < 1e-5 * max(
                1.0, float(single.abs().max())
            )
    prompts, answers = [c.fact.prompt() for c in chosen], [c.target for c in chosen]
    assert [s["text"] for s in score_prompts(model, prompts, answers)] == [
        score_prompts(model, [p], [a])[0]["text"] for p, a in zip(prompts, answers)
    ]
