"""Why a batch of facts disturbs itself and everything else: keys, residuals and what reaches other tokens,
with no edit made.

    python benchmarks/batches/diagnose.py --model twin-llada --layers 1 3 4

For 64 validation facts and unit values that have nothing to do with each other, MEMIT's closed form at each
layer and lambda. One line a layer in `results/keys-MODEL.jsonl`; layers that are there are skipped. With
dW = sum_f delta_f r_f^T and ||delta_f|| = 1, what reaches a token with key k has the expected norm
sqrt(sum_f (r_f . k)^2).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from pool import pools
from torch import Tensor

from easyedit_mdm import load_model
from easyedit_mdm.editing import METHODS, EditRequest
from easyedit_mdm.editing.facts import Fact, tokenise
from easyedit_mdm.editing.methods.memit import least_squares
from easyedit_mdm.editing.solve.batch import System
from easyedit_mdm.editing.solve.keys import key_columns
from easyedit_mdm.editing.solve.sites import statistics
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.adapter import Site
from easyedit_mdm.models.geometry import right_padded
from easyedit_mdm.models.hooks import reading_input
from easyedit_mdm.twins.world import World

RESULTS = Path(__file__).parent / "results"
WEIGHTS = (1, 10, 100, 1000, 10000)


@torch.no_grad()
def keys_of(model: Adapter, site: Site, facts: Sequence[Fact]) -> dict[str, list[Tensor]]:
    """Keys of the bare prompts with nothing revealed, by kind of token: a list entry a fact."""
    slots = [model.behind(f.target, torch.zeros(len(f.target), dtype=torch.bool)) for f in facts]
    rows = [torch.cat([f.contexts[0].ids, tail]) for f, tail in zip(facts, slots)]
    ids, mask = right_padded(rows, model.ids.pad, model.device)
    canvas = torch.tensor([len(f.contexts[0].ids) for f in facts])
    with reading_input(model.module(site.name)) as seen:
        model.hidden_before(site.layer + 1, ids, mask, canvas=canvas)
    found: dict[str, list[Tensor]] = {"subject": [], "slots": [], "prompt": []}
    for fact, row, keys in zip(facts, rows, seen[0].double()):
        at, begin = fact.contexts[0].fact_at, len(fact.contexts[0].ids)
        found["subject"].append(keys[at : at + 1])
        found["slots"].append(keys[begin : len(row)])
        found["prompt"].append(torch.cat([keys[:at], keys[at + 1 : begin]]))
    return found


def rank(keys: Tensor) -> int:
    """Singular values above a hundredth of the largest, of keys scaled to length 1."""
    values = torch.linalg.svdvals(keys / keys.norm(dim=1, keepdim=True))
    return int((values > 1e-2 * values[0]).sum())


def reaching(keys: list[Tensor], rights: Tensor) -> float:
    """The expected norm of what reaches a token."""
    return float(torch.stack([(k @ rights.T).norm(dim=1).mean() for k in keys if len(k)]).mean())


def layer_figures(model: Adapter, layer: int, edited: list[Fact], others: list[Fact], hparams) -> dict:
    """Everything of one layer."""
    site = model.site(layer)
    moments, columns = statistics(model, [site], hparams)[0], key_columns(model, site, edited, hparams).keys
    own, other = keys_of(model, site, edited), keys_of(model, site, others)
    bare = torch.cat(own["subject"])
    figures = {
        "layer": layer,
        "effective_rank_of_C": moments.figures(hparams.mom2_eps)["effective_rank"],
        "rank_of_subject_keys": rank(torch.cat([*own["subject"], *other["subject"]])),
        "rank_of_all_keys": rank(
            torch.cat([k for part in (own, other) for some in part.values() for k in some])
        ),
        "bare_key_from_mean_key": float(((columns.T - bare).norm(dim=1) / columns.norm(dim=0)).mean()),
        "weights": [],
    }
    size = columns.shape[1]
    eye = torch.eye(size, dtype=torch.float64)
    for weight in WEIGHTS:
        system = System(site, columns, columns.new_zeros(1, size), moments)
        rights = least_squares(hparams.mom2_eps, weight)(system)[1]

        figures["weights"].append({
            "lambda": weight,
            "residual_at_mean_key": float((rights @ columns - eye).norm(dim=0).mean()),
            "residual_at_bare_key": float((rights @ bare.T - eye).norm(dim=0).mean()),
            "own_effect_at_bare_key": float((rights @ bare.T).diagonal().mean()),
            "reaches": {
                **{f"edited {kind}": reaching(own[kind], rights) for kind in ("slots", "prompt")},
                **{f"other {kind}": reaching(other[kind], rights) for kind in ("subject", "slots", "prompt")},
            },
        })  # fmt: skip
    return figures


def main() -> None:
    """Measure the layers that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="twin-llada")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 3, 4])
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / f"keys-{args.model}.jsonl"
    done = [json.loads(line)["layer"] for line in path.read_text().splitlines()] if path.exists() else []
    model, pool = load_model(args.model), pools(World.build())["validation"]
    hparams = METHODS["MEMIT_MDM"].hparams.from_hparams(f"MEMIT_MDM/{args.model}")
    edited = [tokenise(model, EditRequest.of(c.request()), hparams) for c in pool.cases]
    told = [{"prompt": f.prompt(), "subject": f.subject, "target_new": f.object} for f in pool.untouched]
    others = [tokenise(model, EditRequest.of(request), hparams) for request in told]
    for layer in [layer for layer in args.layers if layer not in done]:
        figures = layer_figures(model, layer, edited, others, hparams)
        RESULTS.mkdir(exist_ok=True)
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
