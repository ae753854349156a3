"""Why an edit of many facts falls short, from the values and keys of a run of `rebase`, with no edit made.

    python benchmarks/thousand/bound.py --data-dir DATA_DIR --values runs/thousand/values

Into bound.json: the share of facts that their values write when they are put in as activations, which is the
most that any update that writes these values can reach. In each layer the rank of the facts' keys. And for
the keys of the facts that are never edited, the share of their squared length that lies in the span of the
edited ones.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from run import HERE, drawn, mean
from torch import Tensor

from easyedit_mdm import load_model
from easyedit_mdm.common.files import write_json
from easyedit_mdm.data.cases import BenchCase
from easyedit_mdm.editing import METHODS, EditRequest
from easyedit_mdm.editing.facts import Fact, tokenise
from easyedit_mdm.editing.solve.keys import key_columns
from easyedit_mdm.evaluation.multi_step import best_tokens
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.hooks import adding_at

ROWS = 50


@torch.no_grad()
def as_activations(model: Adapter, facts: list[Fact], deltas: list[Tensor], module: str) -> list[float]:
    """1.0 for each fact whose whole target is written while its value is added at the subject, else 0.0."""
    exact = []
    for start in range(0, len(facts), ROWS):
        part = facts[start : start + ROWS]
        rows = [torch.cat([fact.contexts[0].ids, fact.target]) for fact in part]
        at = torch.tensor([fact.contexts[0].fact_at for fact in part])
        with adding_at(model.module(module), at, torch.stack(deltas[start : start + ROWS])):
            best = best_tokens(
                model, rows, [len(f.contexts[0].ids) for f in part], [len(f.target) for f in part]
            )
        exact += [float(torch.equal(a, fact.target)) for a, fact in zip(best, part, strict=True)]
    return exact


def ranks(keys: Tensor) -> dict[str, float]:
    """Of keys scaled to length 1 (facts x inner): singular values above a hundredth and a thousandth of the
    largest.
    """
    values = torch.linalg.svdvals(keys / keys.norm(dim=1, keepdim=True))
    return {f"above_{share}": int((values > share * values[0]).sum()) for share in (0.01, 0.001)}


def spanned(keys: Tensor, others: Tensor) -> float:
    """The mean share of the squared length of the other keys that the facts' keys span."""
    base = torch.linalg.qr(keys.T)[0]
    unit = others / others.norm(dim=1, keepdim=True)
    return float(((unit @ base) ** 2).sum(1).mean())


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--values", required=True, help="the folder of a run of run.py")
    parser.add_argument("--hparams", default=str(HERE / "smollm2-memit.yaml"))
    parser.add_argument("--alg", default="MEMIT_MDM")
    parser.add_argument("--facts", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(HERE / "bound.json"))
    args = parser.parse_args()
    hparams = METHODS[args.alg].hparams.from_hparams(args.hparams)
    model = load_model(hparams.model_name, device=hparams.device)
    if model.denoises:
        raise SystemExit(f"{args.hparams}: {hparams.model_name} is a masked model; this reads one pass only")
    cases, alone = drawn(Path(args.data_dir), args.facts, args.seed)
    kept = [torch.load(file, weights_only=True) for file in sorted(Path(args.values).glob("values-*.pt"))]
    named = [fact for part in kept for fact in part["facts"]]
    if named != [[case.prompt, case.target_new] for case in cases]:
        raise SystemExit(f"{args.values} holds {len(named)} values, not those of these {len(cases)} facts")
    layer = json.loads(kept[0]["settings"])["layers"]
    if layer != hparams.layers[-1:]:
        raise SystemExit(f"{args.values} holds values of layer {layer}, {args.hparams} ends at another")
    deltas = [value["delta"] for part in kept for value in part["values"]]

    def tokenised(chosen: list[BenchCase]) -> list[Fact]:
        return [tokenise(model, EditRequest.of(case.request()), hparams) for case in chosen]

    facts, others = tokenised(cases), tokenised([case for case in alone if case.ground_truth])
    block = model.spec.paths.block.format(hparams.layers[-1])
    report = {"facts": len(facts), "as_activations": mean(as_activations(model, facts, deltas, block))}
    report["layers"] = {}
    for layer in hparams.layers:
        site = model.site(layer, hparams.rewrite_module_tmp)
        keys = key_columns(model, site, facts, hparams).keys.T.double()
        alone_keys = key_columns(model, site, others, hparams).keys.T.double()
        report["layers"][layer] = {
            "inner": keys.shape[1], **ranks(keys), "spanned_of_others": spanned(keys, alone_keys)
        }  # fmt: skip
        print(layer, json.dumps(report["layers"][layer]), flush=True)
    write_json(Path(args.out), report)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
