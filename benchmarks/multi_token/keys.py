"""How far the key of the edited place moves while the target is revealed, layer by layer.

    python benchmarks/multi_token/keys.py --model twin-llada            (-> results/keys-twin-llada.jsonl)

A rank-one update solved for the key with nothing revealed, k(empty), adds delta * (u . k(S)) / (u . k(empty))
in a state S, where u = (C + ridge)^-1 k(empty). So two numbers a state: the cosine of k(S) and k(empty), and
that `delivered` share of delta; 1 means that the edit arrives whole. Validation split, bare prompt, the right
tokens revealed, all states (16 drawn ones for eight tokens).
"""

from __future__ import annotations

import argparse
import json

import torch
from study import RESULTS, settings
from tqdm import tqdm

from easyedit_mdm import load_model
from easyedit_mdm.common.files import write_text
from easyedit_mdm.common.fingerprints import model_fingerprint
from easyedit_mdm.denoising import schedule
from easyedit_mdm.editing import EditRequest
from easyedit_mdm.editing.facts import fact_generator, tokenise
from easyedit_mdm.editing.hparams import ROMEMDMHyperParams
from easyedit_mdm.editing.solve.keys import SiteRows, read_site
from easyedit_mdm.models import Adapter
from easyedit_mdm.statistics import SecondMoments, moments_for
from easyedit_mdm.twins.benchmark import Case, cases
from easyedit_mdm.twins.world import World

LENGTHS = (2, 4, 8)


def lines(
    model: Adapter, case: Case, moments: dict[int, SecondMoments], hparams: ROMEMDMHyperParams
) -> list[dict]:
    """One line a layer."""
    fact = tokenise(model, EditRequest.of(case.request()), hparams)
    states = (
        schedule("enumerate", case.length, hparams.max_states)
        .draw(0, fact_generator(fact, hparams.seed))
        .revealed
    )
    tails = [model.hidden.around(fact.target, revealed) for revealed in states]
    rows = SiteRows.of((fact.contexts[0], tail) for tail in tails)
    found = []
    for layer, moment in moments.items():
        keys, _ = read_site(model, model.site(layer), rows, hparams.max_rows)
        keys = keys.double().cpu()
        toward = moment.solve(keys[0], hparams.mom2_eps)
        found.append(
            {
                "subject": case.fact.subject,
                "n_tokens": case.length,
                "layer": layer,
                "revealed": states[1:].sum(1).tolist(),
                "cos": [round(float(c), 5) for c in torch.cosine_similarity(keys[1:], keys[:1])],
                "delivered": [round(float(d), 5) for d in (keys[1:] @ toward) / (keys[0] @ toward)],
            }
        )
    return found


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--facts", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, world = load_model(args.model), World.build()
    if not model.masked:
        raise SystemExit(f"{args.model} is autoregressive: its keys do not depend on what comes later")
    hparams = settings("ROME_MDM", args.model)
    layers = range(model.layers)
    moments = dict(
        zip(
            layers,
            moments_for(
                model, [model.site(layer) for layer in layers], hparams.mom2_dataset, hparams.mom2_n_tokens
            ),
        )
    )
    chosen = [
        c for c in cases(world, "validation")[: args.facts * world.settings.max_length] if c.length in LENGTHS
    ]
    header = {
        "command": "keys",
        "model": args.model,
        "fingerprint": model_fingerprint(model.native),
        "split": "validation",
        "eps": hparams.mom2_eps,
    }
    rows = [line for case in tqdm(chosen, unit="case") for line in lines(model, case, moments, hparams)]
    write_text(
        RESULTS / f"keys-{args.model}.jsonl", "".join(json.dumps(row) + "\n" for row in [header, *rows])
    )


if __name__ == "__main__":
    main()
