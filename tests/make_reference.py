"""Make tests/data/reference: tiny checkpoints in the hub's key names, with what the native classes compute
with them today.

    python tests/make_reference.py

A later version of the code must compute the same; the published modelling code's own outputs are in the
benchmark data.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
from conftest import write_checkpoint

from easyedit_mdm import load_model

OUT = Path(__file__).parent / "data" / "reference"
ORDERS = {"llada": ("low_confidence", "left_to_right"), "dream": ("maskgit_plus", "topk_margin", "entropy")}


def main() -> None:
    """Write both families."""
    for family, orders in ORDERS.items():
        folder = OUT / family
        write_checkpoint(folder, family, vocabulary=64, seed=20261121)
        model = load_model(folder)
        generator = torch.Generator().manual_seed(5)
        ids = torch.randint(2, 64, (2, 12), generator=generator)
        ids[:, -4:] = model.ids.mask
        with torch.no_grad():
            tensors = {"input_ids": ids, "logits": model(ids).logits}
        for order in orders:
            for steps in (3, 6) if order != "left_to_right" else (6,):
                tensors[f"generated_{order}_steps{steps}"] = model.generate(
                    ids[:1, :8], max_new_tokens=6, steps=steps, order=order
                )
        save_file(tensors, folder / "reference.safetensors")


if __name__ == "__main__":
    main()
