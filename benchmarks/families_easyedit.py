"""Each family through EasyEdit's own runner: three zsRE records, ROME_MDM, on the tiny random checkpoints of
the published code.

    python benchmarks/families_easyedit.py --data-dir DATA --easyedit CLONE --out build/families

runs `easyedit-mdm run CLONE/examples/run_zsre_llama2.py --alg ROME_MDM` once for each folder of
DATA/reference, in one process, and writes what came of it to benchmarks/families_easyedit.json, which
docs/families.md shows. The checkpoints have 192 tokens and no tokenizer: one is trained here, on the texts of
the zsRE file, anew in each run, so that figures differ a little between runs. A random model knows nothing,
so nothing is said about how well a family can be edited. What is seen is that the runner loads it, edits it,
and that the target becomes likelier.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from easyedit_mdm import load_hparams, load_model, make_edit
from easyedit_mdm.cli import main as easyedit_mdm
from easyedit_mdm.denoising import log_likelihood
from easyedit_mdm.errors import IncompatibleVersionError
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.prompts import encode, target_ids

RESULTS = Path(__file__).with_name("families_easyedit.json")
ZSRE = "zsre_mend_eval_portability_gpt4.json"
RECORDS = 3
RESERVED, TOKENS = 6, 180  # ids that checkpoints keep for themselves, at the bottom and from here on
# what the folders do not say; the layer is a mixture of experts, or dense, as the family has it
OPTIONS: dict[str, dict[str, Any]] = {
    "a2d_qwen3": {"mask_id": 190},
    "fast_dllm_v2": {"mask_id": 190},
    "llada_moe": {"mask_id": 190},
    "llada2_moe": {"mask_id": 190, "block": 4},
}

# where the common settings write no target of three
SETTINGS: dict[str, dict[str, Any]] = {
    "fast_dllm_v2": {"fact_token": "last"},
    "diffusion_gemma": {"v_num_grad_steps": 250},
}


def tokenizer_for(texts: list[str], words: list[str]) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer with fewer tokens than the checkpoints have, in which some words are one token
    each: random models of three layers learn to write no more.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<3>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = [f"<{number}>" for number in range(RESERVED)]
    trainer = trainers.BpeTrainer(vocab_size=TOKENS, special_tokens=special, limit_alphabet=90)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(word, lstrip=True, single_word=True) for word in words])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<3>", eos_token="<1>", pad_token="<0>"
    )


def prompts_of(record: Mapping[str, Any]) -> Iterator[str]:
    """Every prompt of a record with its answer."""
    yield f"{record['src']} {record['alt']}"
    yield f"{record['rephrase']} {record['alt']}"
    yield f"{record['loc']} {record['loc_ans']}"
    yield f"{record['portability']['New Question']} {record['portability']['New Answer']}"


def short_records(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records about unlike subjects whose targets are one word, those with the shortest prompts."""
    fitting = [
        record
        for record in records
        if record["subject"] in record["src"] and re.fullmatch(r"[A-Za-z]+", record["alt"])
    ]
    longest = sorted(fitting, key=lambda record: max(map(len, prompts_of(record))))
    subjects: dict[str, dict[str, Any]] = {}
    for record in longest:
        subjects.setdefault(record["subject"], record)
    return list(subjects.values())[:RECORDS]


def settings(folder: Path, name: str) -> dict[str, Any]:
    """A hyperparameter file for a tiny random model; none of its values was chosen by measurement."""
    return {
        "alg_name": "ROME_MDM", "model_name": str(folder), "device": "cpu", "layers": [1],
        "v_num_grad_steps": 80, "v_lr": 0.5, "v_weight_decay": 0.0, "clamp_norm_factor": 100.0,
        "optimise_through": "weights",
        "kl_factor": 0.0, "mom2_adjustment": False, "context_templates": ["{}"], "early_stop_loss": 0.05,
        "state_schedule": "enumerate", "max_states": 7, "seed": 0, **OPTIONS.get(name, {}),
        **SETTINGS.get(name, {}),
    }  # fmt: skip


def likelihoods(model: Adapter, hparams: Path, record: Mapping[str, Any]) -> tuple[float, float]:
    """log p(target | prompt) before and after the edit that the runner makes, made once more."""
    request = {"prompt": record["src"], "subject": record["subject"], "target_new": record["alt"]}
    prompt = torch.tensor(encode(model, record["src"]))
    given = [prompt], [target_ids(model, record["src"], record["alt"])]
    before = log_likelihood(model, *given)[0]
    edit = make_edit(model, request, load_hparams(hparams))
    edit.apply(model)
    after = log_likelihood(model, *given)[0]
    edit.revert(model)
    return before, after


def run(name: str, folder: Path, work: Path, script: Path, data: Path, tokenizer: Any) -> dict[str, Any]:
    """One family through the runner."""
    model = work / name / "model"
    shutil.copytree(folder, model, ignore=shutil.ignore_patterns("reference.safetensors"))
    for file in (model, *model.iterdir()):
        file.chmod(0o755 if file.is_dir() else 0o644)
    tokenizer.save_pretrained(model)
    hparams = work / name / "hparams.yaml"
    hparams.write_text(yaml.safe_dump(settings(model, name)))
    began = time.perf_counter()
    arguments = ["--alg", "ROME_MDM", "--hparams_dir", str(hparams), "--data_dir", str(data)]
    arguments += ["--ds_size", str(RECORDS), "--metrics_save_dir", str(work / name)]
    with contextlib.redirect_stdout(io.StringIO()):
        status = easyedit_mdm(["run", str(script), *arguments])
    if status:
        raise SystemExit(f"{name}: the runner ended with status {status}")
    seconds = time.perf_counter() - began
    records = json.loads((work / name / "ROME_MDM_results.json").read_text())
    given = json.loads((data / ZSRE).read_text())
    adapter = load_model(model, **OPTIONS.get(name, {}))
    pairs = [likelihoods(adapter, hparams, record) for record in given]
    return {
        "family": adapter.spec.name,
        "records": len(records),
        "written": sum(record["post"]["rewrite_acc"][0] == 1.0 for record in records),
        "tokens_before": [round(record["pre"]["rewrite_acc"][0], 3) for record in records],
        "tokens_after": [round(record["post"]["rewrite_acc"][0], 3) for record in records],
        "log_likelihood_before": [round(before, 2) for before, _ in pairs],
        "log_likelihood_after": [round(after, 2) for _, after in pairs],
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """All families, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with reference/ and zsre/")
    parser.add_argument("--easyedit", type=Path, required=True, help="a clone of EasyEdit")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and EasyEdit's files")
    parser.add_argument("--only", nargs="*", help="folders of reference/")
    arguments = parser.parse_args()
    records = json.loads((arguments.data_dir / "zsre" / ZSRE).read_text())
    chosen_records = short_records(records)
    tokenizer = tokenizer_for(
        [text for record in records[:300] for text in prompts_of(record)],
        sorted({record["alt"] for record in chosen_records}),
    )
    shutil.rmtree(arguments.out, ignore_errors=True)
    data = arguments.out / "data"
    data.mkdir(parents=True)
    (data / ZSRE).write_text(json.dumps(chosen_records))
    script = arguments.easyedit / "examples" / "run_zsre_llama2.py"
    folders = sorted(p.parent for p in (arguments.data_dir / "reference").glob("*/config.json"))
    chosen = [folder for folder in folders if not arguments.only or folder.name in arguments.only]
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for folder in tqdm(chosen, desc="families"):
        try:
            found[folder.name] = run(folder.name, folder, arguments.out, script, data, tokenizer)
        except IncompatibleVersionError as error:
            tqdm.write(f"{folder.name}: {error}")
            continue
        RESULTS.write_text(json.dumps(dict(sorted(found.items())), indent=2) + "\n")


if __name__ == "__main__":
    main()
