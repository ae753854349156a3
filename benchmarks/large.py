"""A model of 2 GB, whole and spread over memory and disk: the same edit, and the memory that each takes.

    python benchmarks/large.py --out benchmarks/large.json          # 3 GB of disk, minutes
    python benchmarks/large.py --table

The model is random: of LLaDA's kind, float32, width 1,536, 16 layers. ROME_MDM at layer 12, without second
moments, three steps. *memory* is the whole model in memory; *disk* leaves all layers but the edited one and
those above it in the checkpoint; *automatic* lets accelerate decide under `max_memory` of half the model
(`device_map="auto"`): it keeps the first layers, so one of those is edited. Each is a process of its own.
The peak is the largest resident size less what the libraries take before the model is there. *predicted* is
what `doctor` says for the same rows: weights in memory and the activations of a pass; where layers above the
edit are read from the disk, two of them besides (one runs, one is being read).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from easyedit_mdm import load_hparams, load_model, make_edit
from easyedit_mdm.common.files import read_json, write_json
from easyedit_mdm.editing import METHODS
from easyedit_mdm.editing.facts import tokenise
from easyedit_mdm.editing.request import EditRequest
from easyedit_mdm.errors import DataError
from easyedit_mdm.models.sizes import model_size
from easyedit_mdm.twins import twin_folder

HERE = Path(__file__).parent
WIDTH, INNER, LAYERS = 1536, 4096, 16
LATE, EARLY = 12, 2  # edited layers
WAYS = (("memory", LATE), ("disk", LATE), ("memory", EARLY), ("automatic", EARLY))
FACT = {"prompt": "Tamos Latre was born in", "subject": "Tamos Latre", "target_new": "Zopago Zemo"}


def write_model(folder: Path) -> None:
    """The random model, in the format of `easyedit-mdm adapt --merged`."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(twin_folder("twin-llada"))
    mask = tokenizer.mask_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=12, num_key_value_heads=12, max_position_embeddings=512, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    torch.default_generator.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="500MB")
    tokenizer.save_pretrained(folder)
    file = folder / "config.json"
    values = json.loads(file.read_text())
    values |= {
        "architectures": ["LlamaForMaskedDiffusion"],
        "mask_token_id": mask,
        "masked_diffusion": {"attention": "full", "block_size": None, "edges": "canvas", "context": "blocks",
                             "logit_shift": False},
    }  # fmt: skip
    file.write_text(json.dumps(values, indent=1))


def places(way: str, folder: Path) -> dict[str, Any]:
    """What `load_model` is told."""
    if way == "memory":
        return {"device": "cpu"}
    if way == "automatic":
        return {"device_map": "auto", "max_memory": {"cpu": model_size(folder).weights("float32") // 2}}
    below = {f"model.layers.{i}": "disk" for i in range(LATE)}
    above = {f"model.layers.{i}": "cpu" for i in range(LATE, LAYERS)}
    ends = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    return {"device_map": {**below, **above, **ends}}


def work(folder: Path, way: str, layer: int, out: Path) -> None:
    """One edit, measured."""
    torch.set_num_threads(1)
    warm_up()
    before = peak()
    adapter = load_model(folder, dtype="float32", **places(way, folder))
    kept = [p for p in adapter.parameters() if not p.is_meta]
    blocks = [adapter.module(adapter.spec.paths.block.format(i)) for i in range(LAYERS)]
    above = [b for b in blocks[layer + 1 :] if any(p.is_meta for p in b.parameters())]
    read = [sum(p.numel() for p in block.parameters()) for block in above]
    hparams = METHODS["ROME_MDM"].hparams(
        alg_name="ROME_MDM", model_name=str(folder), layers=[layer], v_num_grad_steps=3, v_lr=0.1,
        mom2_adjustment=False, context_templates=["{}", "Now. {}"], state_schedule="spread", max_states=4,
    )  # fmt: skip
    (change,) = make_edit(adapter, FACT, hparams).changes
    size = model_size(folder)
    upper = replace(size, layers=LAYERS - layer)
    fact = tokenise(adapter, EditRequest.of(FACT), hparams)
    length = max(len(p.ids) for p in fact.contexts) + len(fact.target)
    rows = len(fact.contexts) * 3 + 1
    write_json(out, {
        "way": way,
        "layer": layer,
        "weights_mb": round(sum(p.numel() for p in kept) * 4 / 2**20),
        "model_mb": round(size.weights("float32") / 2**20),
        "read_mb": round(2 * max([0, *read]) * 4 / 2**20),
        "activations_mb": round(upper.activations("float32", rows, length, len(fact.target)) / 2**20),
        "peak_mb": round(peak() - before),
        "sha256": hashlib.sha256(change.dense().numpy().tobytes()).hexdigest(),
    })  # fmt: skip


def warm_up() -> None:
    """An edit of a twin that is spread as well: the libraries are in memory afterwards."""
    import accelerate  # noqa: F401

    twin = load_model("twin-llada", device_map={"": "cpu"})
    hparams = load_hparams("ROME_MDM/twin-llada")
    make_edit(twin, FACT, replace(hparams, mom2_adjustment=False, v_num_grad_steps=1))


def peak() -> float:
    """Largest resident size so far, MB (Linux; `getrusage` would count what the parent had)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measured(folder: Path) -> list[dict[str, Any]]:
    """Every way."""
    rows = []
    for way, layer in WAYS:
        out = folder / f"{way}-{layer}.json"
        command = [sys.executable, __file__, "--work", str(folder), "--way", way, "--layer", str(layer)]
        command += ["--out", str(out)]
        if subprocess.run(command, check=False).returncode:
            raise DataError(f"{way} failed: its message is above")
        rows.append(read_json(out, DataError, "figures"))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """All rows."""
    names = (
        "edited layer",
        "weights in memory, MB",
        "predicted, MB",
        "peak, MB",
        "peak / predicted",
        "same edit",
    )
    lines = ["| | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for row in rows:
        predicted = row["weights_mb"] + row["read_mb"] + row["activations_mb"]
        twins = [other for other in rows if other["layer"] == row["layer"] and other["way"] != row["way"]]
        same = "to the bit" if twins and all(t["sha256"] == row["sha256"] for t in twins) else "-"
        cells = (
            row["layer"],
            row["weights_mb"],
            predicted,
            row["peak_mb"],
            f"{row['peak_mb'] / predicted:.2f}",
            same,
        )
        lines.append(f"| {row['way']} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, or print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "large.json")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--layer", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work is not None:
        return work(asked.work, asked.way, asked.layer, asked.out)
    if not asked.table:
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made) / "model"
            write_model(folder)
            write_json(asked.out, measured(folder), indent=1)
    print(table(json.loads(asked.out.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
