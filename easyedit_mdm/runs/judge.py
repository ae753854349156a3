"""Everything that is measured of one case, before and after its edit: the values of a run file's `pre` and `post`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from easyedit_mdm.data.cases import BenchCase
from easyedit_mdm.denoising import DecodeConfig, Trajectory, decode
from easyedit_mdm.editing.request import encode, target_ids
from easyedit_mdm.evaluation import fluency, perplexity, score_prompts
from easyedit_mdm.evaluation.judgements import counterfact_scores
from easyedit_mdm.evaluation.ladder import given_k, ladder, mirage_gap
from easyedit_mdm.models import Adapter

VERSION = 1  # of what is measured; part of the key of evaluations that are kept


@dataclass(frozen=True)
class Judge:
    """What is measured, and how it is decoded.

    Attributes:
        decode: settings of the multi-step metric.
        rungs: the ladder of honesty, and success given k tokens.
        held_out: texts whose perplexity is taken; none if empty.
        fluency: n-gram entropy of 100 written tokens.
    """

    decode: DecodeConfig = DecodeConfig()
    rungs: bool = True
    held_out: tuple[str, ...] = ()
    fluency: bool = True

    def settings(self) -> dict[str, Any]:
        """What the results depend on, for headers and for keys of kept evaluations."""
        return {"version": VERSION, "decode": self.decode.record(), "rungs": self.rungs, "fluency": self.fluency, "held_out": list(self.held_out)}

    def judge(self, adapter: Adapter, case: BenchCase) -> dict[str, Any]:
        """Measure one case with the model as it is now."""
        scores = _scored(adapter, case, self.decode)
        result: dict[str, Any] = {
            "rewrite_acc": [scores["rewrite"]["token_acc"]],
            "rephrase_acc": [s["token_acc"] for s in scores["rephrase"]],
            "multi_step": scores,
            "first_wrong": first_wrong(adapter, case, self.decode),
        }
        if self.rungs:
            rungs = ladder(adapter, [case.prompt], [case.target_new], self.decode)[0]
            result |= {"ladder": rungs, "mirage_gap": mirage_gap(rungs)}
            if adapter.masked:
                result["given_k"] = given_k(adapter, case.prompt, case.target_new, self.decode.seed)
        if case.target_true:
            result["counterfact"] = {
                name: counterfact_scores(
                    adapter, case.prompt, case.rephrase_prompts, case.neighborhood, case.target_new, case.target_true, normalised
                )
                for name, normalised in (("sum", False), ("per_token", True))
            }
        if self.fluency:
            result["fluency"] = fluency(adapter, case.prompt, seed=self.decode.seed)
        if self.held_out:
            result["perplexity"] = perplexity(adapter, self.held_out)
        return result


def _scored(adapter: Adapter, case: BenchCase, config: DecodeConfig) -> dict[str, Any]:
    """All prompts of a case, decoded in one batch."""
    asked: list[tuple[str, str, str, str]] = [("rewrite", "", case.prompt, case.target_new)]
    asked += [("rephrase", "", p, case.target_new) for p in case.rephrase_prompts]
    asked += [("same_subject", "", p, a) for p, a in case.same_subject]
    for kind, sections in (("locality", case.locality), ("portability", case.portability)):
        asked += [(kind, section, p, a) for section, pairs in sections.items() for p, a in pairs]
    statement = f"{case.prompt} {case.target_new}."  # CounterFact+ (Hoelscher-Obermaier et al., 2023): said before a neighbour's prompt
    asked += [("with_statement", section, f"{statement} {p}", a) for section, pairs in case.locality.items() for p, a in pairs]
    asked = [a for a in asked if a[3].strip()]  # some files have probes without an answer: nothing to score
    out: dict[str, Any] = {"rephrase": [], "same_subject": [], "locality": {}, "portability": {}, "with_statement": {}}
    for (kind, section, _, _), score in zip(asked, score_prompts(adapter, [a[2] for a in asked], [a[3] for a in asked], config)):
        if kind == "rewrite":
            out[kind] = score
        elif section:
            out[kind].setdefault(section, []).append(score)
        else:
            out[kind].append(score)
    return out


def written(adapter: Adapter, case: BenchCase, config: DecodeConfig) -> tuple[Trajectory, torch.Tensor]:
    """How the case's prompt is continued over as many slots as the target has tokens, and the target."""
    target = target_ids(adapter, case.prompt, case.target_new)
    path = decode(adapter, [torch.tensor(encode(adapter, case.prompt.rstrip()))], [len(target)], config)[0]
    return path, target


def first_wrong(adapter: Adapter, case: BenchCase, config: DecodeConfig) -> dict[str, int] | None:
    """Step and slot of the first token that was committed wrongly; None if there was none."""
    path, target = written(adapter, case, config)
    wrong = [(int(path.step[i]), i) for i in range(len(target)) if path.tokens[i] != target[i]]
    return {"step": min(wrong)[0], "slot": min(wrong)[1]} if wrong else None


def history(adapter: Adapter, case: BenchCase, config: DecodeConfig) -> dict[str, list]:
    """The denoising of the case's prompt: token, step and confidence of every slot."""
    path, _ = written(adapter, case, config)
    tokens = [adapter.tokenizer.decode([t]) for t in path.tokens.tolist()]
    return {"tokens": tokens, "step": path.step.tolist(), "confidence": [round(c, 4) for c in path.confidence.tolist()]}


def kept(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Share of the tokens that an edit left as they were: by section of locality, and for the subject's other facts."""
    then, now = before["multi_step"], after["multi_step"]
    result: dict[str, Any] = {"locality_kept": {s: _same(then["locality"][s], now["locality"][s]) for s in now["locality"]}}
    if now["same_subject"]:
        result["same_subject_kept"] = _same(then["same_subject"], now["same_subject"])
    return result


def _same(before: Sequence[dict], after: Sequence[dict]) -> float:
    shares = [sum(a == b for a, b in zip(x["tokens"], y["tokens"])) / len(y["tokens"]) for x, y in zip(before, after)]
    return sum(shares) / len(shares)
