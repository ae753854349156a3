"""Demonstrations for in-context editing, chosen from a pool by sentence embeddings (Liu et al., 2022; IKE,
Zheng et al., arXiv 2305.12740).

A pool is a file of facts. Each gives up to three texts: the fact asked for in its own words, in other words,
and a neighbour that it leaves alone. The `k` texts nearest to the new fact, by cosine, are shown, the nearest
first. Texts, order and number are EasyEdit's. The embeddings come from the package sentence-transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from easyedit_mdm.errors import HyperParameterError, MissingPackageError

# EasyEdit's names of a record's fields, and those of zsRE's own files
_NAMES = {
    "prompt": ("prompt", "src"),
    "target_new": ("target_new", "alt"),
    "rephrase": ("rephrase_prompt", "rephrase"),
    "neighbour": ("locality_prompt", "loc"),
    "answer": ("locality_ground_truth", "loc_ans"),
}


def said(template: str, fact: Mapping[str, str]) -> str:
    """A template with `{prompt}` and `{target}` filled in, as they are."""
    return template.replace("{prompt}", fact["prompt"]).replace("{target}", fact["target_new"])


def pool_texts(file: str, fact: str, lead: str) -> list[str]:
    """All texts of a pool, spaces as they are. A record whose target is empty has none: zsRE has some, and
    EasyEdit passes over them.

    Args:
        file: a JSON list of records with `prompt` and `target_new`, and, if they have them,
            `rephrase_prompt`, `locality_prompt` and `locality_ground_truth` (in zsRE's files `src`, `alt`,
            `rephrase`, `loc`, `loc_ans`).
        fact, lead: IKE_MDM's.

    Raises:
        HyperParameterError: if the file cannot be read, or a record lacks its fact.
    """
    try:
        records = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise HyperParameterError(
            f"demonstration_pool={file!r} cannot be read as JSON ({problem}): give a list of records"
        ) from problem
    if not isinstance(records, list) or not records:
        raise HyperParameterError(f"demonstration_pool={file!r} holds no list of records")
    found = []
    for number, record in enumerate(records):
        one = _fields(record) if isinstance(record, dict) else {}
        if isinstance(record, dict) and "" in (record.get("target_new"), record.get("alt")):
            continue
        if "prompt" not in one or "target_new" not in one:
            raise HyperParameterError(
                f"demonstration_pool={file!r}, record {number}: it needs a prompt and a target_new that are"
                " text"
            )
        new = said(fact, one) + lead
        found.append(f"{new}{one['prompt']} {one['target_new']}\n\n")
        if "rephrase" in one:
            found.append(f"{new}{one['rephrase']} {one['target_new']}\n\n")
        if "neighbour" in one and "answer" in one:
            found.append(f"{new}{one['neighbour']} {one['answer']}\n\n")
    return found


def _fields(record: Mapping[str, Any]) -> dict[str, str]:
    """What a record says, by our names; of several wordings the first."""
    found = {}
    for name, theirs in _NAMES.items():
        value = next((record[key] for key in theirs if record.get(key)), None)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, str) and value.strip():
            found[name] = value
    return found


def nearest(
    queries: Sequence[str], file: str, model_name: str, k: int, fact: str, lead: str, device: str
) -> list[str]:
    """The `k` texts of a pool that lie nearest to any of the queries, the nearest first.

    Args:
        queries: what is edited, one text a fact.
        file, fact, lead: as for `pool_texts`.
        model_name: a model of sentence-transformers: a folder, or a name on the Hub.
        device: where it runs.

    Raises:
        HyperParameterError: for a pool or a sentence model that cannot be read.
        MissingPackageError: if sentence-transformers is not installed.
    """
    texts = pool_texts(file, fact, lead)
    pool = _pool(tuple(texts), model_name, device)
    like = (_embedded(queries, model_name, device) @ pool.T).max(0).values
    order = like.argsort(descending=True, stable=True)[:k]
    return [texts[int(i)] for i in order]


@lru_cache(maxsize=2)
def _pool(texts: tuple[str, ...], model_name: str, device: str) -> Float[Tensor, "texts width"]:
    return _embedded(texts, model_name, device)


def _embedded(texts: Sequence[str], model_name: str, device: str) -> Float[Tensor, "texts width"]:
    """Texts as vectors of length one."""
    made = _sentence_model(model_name, device).encode(
        list(texts), show_progress_bar=False, convert_to_tensor=True
    )
    return torch.nn.functional.normalize(made.float().cpu(), dim=1)


@lru_cache(maxsize=1)
def _sentence_model(name: str, device: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as problem:
        raise MissingPackageError(
            "sentence_model_name needs the package sentence-transformers: pip install"
            " 'sentence-transformers>=5,<7'"
        ) from problem
    try:
        return SentenceTransformer(name, device=device)
    except (OSError, ValueError, KeyError) as problem:
        raise HyperParameterError(
            f"sentence_model_name={name!r} cannot be loaded ({problem}): give a folder, or a name on the Hub"
        ) from problem
