"""MMaDA (arXiv 2505.15809), its text: LLaDA's arithmetic and names under another class, image codes behind
the text's ids.
"""

from __future__ import annotations

from dataclasses import replace

from easyedit_mdm.models.families._registry import FAMILIES
from easyedit_mdm.models.families.llada import LLADA

FAMILIES.register("mmada")(
    replace(
        LLADA,
        name="mmada",
        architectures=("MMadaModelLM",),
        releases="MMaDA-8B (text)",
        verified=(
            "published code on a tiny checkpoint: logits to 1e-4, mmu_generate (LLaDA's) token for token; no"
            " images"
        ),
    )
)
