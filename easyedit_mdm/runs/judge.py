"""Everything that is measured of one case, before and after its edit: a run file's `pre` and `post`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from easyedit_mdm.data.cases import BenchCase
from easyedit_mdm.denoising import DecodeConfig, Trajectory, decode
from easyedit_mdm.editing.request import encode, target_ids
from easyedit_mdm.evaluation import fluency, perplexity
from easyedit_mdm.evaluation.judgements import counterfact_scores
from easyedit_mdm.evaluation.ladder import decodings, given_k, ladder, remasked
from easyedit_mdm.evaluation.multi_step import Question, score_questions
from easyedit_mdm.evaluation.records import (
    VERSION,
    Denoising,
    Judgement,
    JudgeRecord,
    Place,
    Section,
    mirage_gap,
    scores,
)
from easyedit_mdm.models import Adapter


@dataclass(frozen=True)
class Judge:
    """What is measured, and how it is decoded.

    Attributes:
        decode: settings of the multi-step metric.
        rungs: the ladder of honesty, and success given k tokens.
        held_out: texts whose perplexity is taken; none if empty.
        fluency: n-gram entropy of 100 written tokens.
        decodings: of the ladder those rungs alone that are ways of decoding, and `remasked` (masked models).
    """

    decode: DecodeConfig = DecodeConfig()
    rungs: bool = True
    held_out: tuple[str, ...] = ()
    fluency: bool = True
    decodings: bool = False

    def settings(self) -> JudgeRecord:
        """What the results depend on, for headers and for keys of kept evaluations."""
        return {
            "version": VERSION, "decode": self.decode.record(), "rungs": self.rungs, "fluency": self.fluency,
            "held_out": list(self.held_out),
            **({"decodings": True} if self.decodings else {}),
        }  # fmt: skip

    def judge(self, adapter: Adapter, case: BenchCase) -> Judgement:
        """Measure one case with the model as it is now."""
        sections = score_questions(adapter, _questions(case), self.decode)
        result: Judgement = {
            "rewrite_acc": [score["token_acc"] for score in scores(sections["rewrite"])],
            "rephrase_acc": [score["token_acc"] for score in scores(sections.get("rephrase"))],
            "multi_step": sections,
            "first_wrong": first_wrong(adapter, case, self.decode),
        }
        if self.rungs:
            rungs = ladder(adapter, [case.prompt], [case.target_new], self.decode)[0]
            result |= {"ladder": rungs, "mirage_gap": mirage_gap(rungs)}
            if adapter.denoises:
                result["given_k"] = [*given_k(adapter, case.prompt, case.target_new, self.decode.seed)]
        elif self.decodings and adapter.denoises:
            asked = adapter, [case.prompt], [case.target_new], self.decode
            result["ladder"] = {**decodings(*asked)[0], "remasked": remasked(*asked)[0]}
        if case.target_true:
            result["counterfact"] = counterfact_scores(
                adapter,
                case.prompt,
                case.rephrase_prompts,
                case.neighborhood,
                case.target_new,
                case.target_true,
            )
        if self.fluency:
            result["fluency"] = fluency(adapter, case.prompt, seed=self.decode.seed)
        if self.held_out:
            result["perplexity"] = {**perplexity(adapter, self.held_out)}
        return result


def _questions(case: BenchCase) -> list[Question]:
    """All that is asked of a case; probes without an answer, which some files have, are left out."""
    new = case.target_new
    asked = [Question("rewrite", case.prompt, new, alone=True)]
    asked += [Question("rephrase", prompt, new) for prompt in case.rephrase_prompts]
    asked += [Question("same_subject", prompt, answer) for prompt, answer in case.same_subject]
    for section, parts in (("locality", case.locality), ("portability", case.portability)):
        asked += [Question(section, p, a, key) for key, pairs in parts.items() for p, a in pairs]
    # CounterFact+ (Hoelscher-Obermaier et al., 2023): the edit is said before a neighbour's prompt
    statement = f"{case.prompt} {new}."
    asked += [
        Question("with_statement", f"{statement} {p}", a, key)
        for key, pairs in case.locality.items()
        for p, a in pairs
    ]
    return [question for question in asked if question.answer.strip()]


def written(adapter: Adapter, case: BenchCase, config: DecodeConfig) -> tuple[Trajectory, torch.Tensor]:
    """How the case's prompt is continued over as many slots as the target has tokens, and the target."""
    target = target_ids(adapter, case.prompt, case.target_new)
    path = decode(adapter, [torch.tensor(encode(adapter, case.prompt.rstrip()))], [len(target)], config)[0]
    return path, target


def first_wrong(adapter: Adapter, case: BenchCase, config: DecodeConfig) -> Place | None:
    """Step and slot of the first token that was committed wrongly; None if there was none."""
    path, target = written(adapter, case, config)
    wrong = [(int(path.step[i]), i) for i in range(len(target)) if path.tokens[i] != target[i]]
    return {"step": min(wrong)[0], "slot": min(wrong)[1]} if wrong else None


def history(adapter: Adapter, case: BenchCase, config: DecodeConfig) -> Denoising:
    """The denoising of the case's prompt: token, step and confidence of every slot."""
    path, _ = written(adapter, case, config)
    tokens = [adapter.tokenizer.decode([t]) for t in path.tokens.tolist()]
    confidence = [round(c, 4) for c in path.confidence.tolist()]
    return {"tokens": tokens, "step": path.step.tolist(), "confidence": [*confidence]}


def kept(before: Judgement, after: Judgement) -> Judgement:
    """Share of the tokens that an edit left as they were: by section of locality, and of the subject."""
    then, now = before["multi_step"], after["multi_step"]
    shares = {key: _same(then["locality"][key], section) for key, section in now["locality"].items()}
    result: Judgement = {"locality_kept": shares}
    if "same_subject" in now:
        result["same_subject_kept"] = _same(then["same_subject"], now["same_subject"])
    return result


def _same(before: Section, after: Section) -> float:
    pairs = [(x["tokens"], y["tokens"]) for x, y in zip(scores(before), scores(after))]
    return sum(sum(a == b for a, b in zip(x, y)) / len(y) for x, y in pairs) / len(pairs)
