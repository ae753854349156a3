"""The tables of results.md, each from the committed files alone. No line is wider than 110 columns.

N steps: exactly N masks, N steps, the most confident slot first. One step: all N masks committed at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import yaml
from evidence import (
    FAMILIES,
    LENGTHS,
    MASKED,
    METHODS,
    MODELS,
    Keep,
    Line,
    Runs,
    difference,
    estimate,
    longer,
    mean,
    of_length,
    paired,
    plain_number,
    several,
    table,
    told,
    value,
    verdict,
    whole,
)  # fmt: skip
from study import ABLATIONS, APART, BEAT, FROZEN, HERE, SHARED

from easyedit_mdm.report.summaries import bootstrap_mean

BENCHMARKS = HERE.parent
CAP = SHARED["v_num_grad_steps"] - 1
STOP = SHARED["early_stop_loss"]
BOTH = ("exact", "one_step_exact")
LONG_PLAIN = "full_mask, steps x 4"


@dataclass(frozen=True)
class Pair:
    """One masked twin with one method, and the autoregressive twin that is its reference."""

    causal: str
    masked: str
    method: str

    def __str__(self) -> str:
        return f"`{self.masked}` {self.method}"

    @property
    def layer(self) -> int:
        """The layer that both arms of the test edit."""
        chosen = yaml.safe_load(FROZEN.read_text())[self.masked][self.method]
        layers = {chosen[arm]["layers"][-1] for arm in ("plain", "aware")}
        (layer,) = layers
        return int(layer)


PAIRS = tuple(Pair(causal, masked, method) for causal, masked in FAMILIES for method in METHODS)


def only(n: int) -> Keep:
    """One length."""
    return lambda length: length == n


def rows_by_length(cells: Callable[[str, Keep], list[str]]) -> list[list[str]]:
    """A row for each length, and one for N = 2..8."""
    keeps: list[tuple[str, Keep]] = [(str(n), only(n)) for n in LENGTHS]
    return [[name, *cells(name, keep)] for name, keep in [*keeps, ("2..8", several)]]


def some(rows: Sequence[Line], keep: Keep) -> list[Line]:
    """The edits to targets of some lengths."""
    return [row for row in rows if keep(row["n_tokens"])]


def success(runs: Runs, pair: Pair) -> str:
    """Success by length: N steps and one step side by side."""
    columns = [
        (f"{arm}, {how}", runs.series(pair.masked, pair.method, arm), measure)
        for arm in ("plain", "aware")
        for how, measure in zip(("N steps", "one step"), BOTH)
    ]
    columns.append(("autoregressive", runs.series(pair.causal, pair.method, "plain"), "exact"))
    body = rows_by_length(lambda _, keep: [told(estimate(some(rows, keep), m)) for _, rows, m in columns])
    return table(["N", *(name for name, *_ in columns)], body)


def success_of_others(runs: Runs, pair: Pair) -> str:
    """The same for the arms that were added later."""
    added = [arm for arm in (APART, "best") if runs.series(pair.masked, pair.method, arm)]
    columns = [
        (f"{arm}: {how}", runs.series(pair.masked, pair.method, arm), measure)
        for arm in added
        for how, measure in zip(("N steps", "one step"), BOTH)
    ]
    body = rows_by_length(lambda _, keep: [told(estimate(some(rows, keep), m)) for _, rows, m in columns])
    return table(["N", *(name for name, *_ in columns)], body)


def differences(runs: Runs, pair: Pair) -> str:
    """Paired differences in N steps at each length."""
    plain, aware, chosen = (runs.series(pair.masked, pair.method, arm) for arm in ("plain", "aware", "best"))
    reference = runs.series(pair.causal, pair.method, "plain")
    columns = {
        "aware - plain": (aware, plain),
        "best - plain": (chosen, plain),
        "autoregressive - aware": (reference, aware),
        "autoregressive - best": (reference, chosen),
    }
    body = rows_by_length(
        lambda _, keep: [difference(paired(a, b, keep=keep), 2) for a, b in columns.values()]
    )
    return table(["N", *columns], body)


def work(runs: Runs, pair: Pair) -> str:
    """How far the optimisation came, and what it cost."""
    arms = {arm: runs.series(pair.masked, pair.method, arm) for arm in ("plain", "aware")}

    def cells(_: str, keep: Keep) -> list[str]:
        """Of one length."""
        return [
            cell
            for rows in arms.values()
            for cell in convergence_of(some(rows, keep)) + _cost(some(rows, keep))
        ]

    head = ["steps", "cap", "loss", "forw.", "passes"]
    return table(
        ["N", *(f"{arm}: {head[0]}" if i == 0 else head[i] for arm in arms for i in range(5))],
        rows_by_length(cells),
    )


def convergence_of(rows: Sequence[Line]) -> list[str]:
    capped = sum(row["steps"] >= CAP for row in rows) / len(rows)
    return [
        f"{median(row['steps'] for row in rows):g}",
        f"{capped:.2f}",
        f"{median(row['last_loss'] for row in rows):.3f}",
    ]


def _cost(rows: Sequence[Line]) -> list[str]:
    return [whole(mean(rows, "forwards")), whole(mean(rows, "layer_passes"))]


def confirmatory(runs: Runs) -> str:
    """The protocol's test."""
    rows = []
    for pair in PAIRS:
        plain, aware, apart = (
            runs.series(pair.masked, pair.method, arm) for arm in ("plain", "aware", APART)
        )
        gain = paired(aware, plain)
        same = [difference(paired(aware, apart)), lengths_above(aware, apart)] if apart else ["the same"] * 2
        rows.append(
            [f"{pair}, {pair.layer}", difference(gain), verdict(gain), lengths_above(aware, plain), *same]
        )
    head = ["twin, method, layer", "aware - plain", "restores?", "at N", "at equal clamp", "at N"]
    return table(head, rows)


def halves(runs: Runs) -> str:
    """The test on the first 60 subjects, which were reported before the rest were run, and on the rest."""
    rows = []
    for pair in PAIRS:
        plain, aware = (runs.series(pair.masked, pair.method, arm) for arm in ("plain", "aware"))
        first = set(list(dict.fromkeys(row["subject"] for row in plain))[:60])
        parts = ([row for row in aware if (row["subject"] in first) == early] for early in (True, False))
        rows.append([str(pair), *(difference(paired(part, plain)) for part in parts)])
    return table(["twin, method", "aware - plain, first 60 subjects", "the other 60"], rows)


def lengths_above(first: Sequence[Line], second: Sequence[Line]) -> str:
    """The lengths from 2 on at which the interval of first minus second lies above 0."""
    lows = {n: paired(first, second, keep=only(n))["low"] for n in LENGTHS if n > 1}
    return ", ".join(str(n) for n, low in lows.items() if low is not None and low > 0) or "none"


def controls(runs: Runs) -> str:
    """The protocol's controls."""
    rows = []
    for pair in PAIRS:
        plain, aware, null = (
            runs.series(pair.masked, pair.method, arm) for arm in ("plain", "aware", "null")
        )
        reference = runs.series(pair.causal, pair.method, "plain")
        gaps = [paired(reference, aware, keep=only(n)) for n in LENGTHS]
        closed = all(abs(g["mean"]) <= 0.02 and g["low"] >= -0.05 and g["high"] <= 0.05 for g in gaps)
        room, nulls = paired(reference, plain), paired(null, plain, keep=only(1))
        largest = max(g["mean"] for g in gaps)
        rows.append(
            [str(pair), difference(room), difference(nulls), f"{largest:+.3f}", "yes" if closed else "no"]
        )
    head = [
        "twin, method",
        "autoregressive - plain",
        "null control, N = 1",
        "largest gap of aware",
        "no gap?",
    ]
    return table(head, rows)


def against_one_step(runs: Runs) -> str:
    """Everything against the plain edit committed in one step, N = 2..8."""
    rows = []
    for pair in PAIRS:
        for what, first, measure, plain in _against(runs, pair):
            e = paired(first, plain, measure, "one_step_exact")
            shares = mean(longer(first), measure), mean(longer(plain), "one_step_exact")
            rows.append(
                [str(pair), what, *map(plain_number, shares), difference(e), f"{e['n']}", f"{e['subjects']}"]
            )
    head = ["twin, method", "what", "it", "plain, one step", "difference", "edits", "subjects"]
    return table(head, rows)


def _against(runs: Runs, pair: Pair) -> Iterator[tuple[str, list[Line], str, list[Line]]]:
    """(name, edits, measure, the plain arm that they are compared with)."""
    plain, aware, apart, chosen = (
        runs.series(pair.masked, pair.method, arm) for arm in ("plain", "aware", APART, "best")
    )
    yield "aware, N steps", aware, "exact", plain
    yield "aware, one step", aware, "one_step_exact", plain
    yield "plain, N steps", plain, "exact", plain
    yield "best, N steps", chosen, "exact", plain
    yield "autoregressive", runs.series(pair.causal, pair.method, "plain"), "exact", plain
    if apart:
        yield "aware, N steps, both clamp 4", aware, "exact", apart


def against_one_step_by_length(runs: Runs) -> str:
    """Aware in N steps minus plain in one, at each length."""
    arms = [[runs.series(pair.masked, pair.method, arm) for arm in ("aware", "plain")] for pair in PAIRS]

    def cells(_: str, keep: Keep) -> list[str]:
        """Of one length."""
        found = [paired(aware, plain, *BOTH, keep=keep) for aware, plain in arms]
        counts = "/".join(dict.fromkeys(str(e["n"]) for e in found))
        return [*(difference(e, 2) for e in found), counts]

    return table(["N", *map(str, PAIRS), "n"], rows_by_length(cells))


def mechanism(runs: Runs) -> str:
    """Where edits of masked twins go wrong: right in one step and wrong in N, or the other way round."""
    rows = [
        _mechanism(f"{pair}", arm, longer(runs.series(pair.masked, pair.method, arm)))
        for pair, arm in masked_arms(runs)
    ]
    plain = [row for pair in PAIRS for row in longer(runs.series(pair.masked, pair.method, "plain"))]
    rows.append(_mechanism("all four", "plain", plain))
    head = [
        "twin, method",
        "arm",
        "edits",
        "wrong in N",
        "first right",
        "right in one",
        "wrong in both",
        "right in N, not one",
    ]
    return table(head, rows)


def masked_arms(runs: Runs) -> list[tuple[Pair, str]]:
    """All arms of the masked twins."""
    return [(pair, arm) for pair in PAIRS for arm in runs.arms(pair.masked, pair.method)]


def _mechanism(name: str, arm: str, rows: Sequence[Line]) -> list[str]:
    wrong = [row for row in rows if not row["exact"]]
    once = sum(row["one_step_exact"] for row in wrong)
    reverse = sum(row["exact"] and not row["one_step_exact"] for row in rows)
    first = sum(bool(row["first_commit"]) for row in wrong)
    return [name, arm, *map(str, (len(rows), len(wrong), first, once, len(wrong) - once, reverse))]


def failures(runs: Runs) -> str:
    """The edits that are wrong in N steps: how near they came, and whether the value had converged."""
    rows = []
    for model in MODELS:
        for method in METHODS:
            for arm in runs.arms(model, method):
                wrong = [row for row in longer(runs.series(model, method, arm)) if not row["exact"]]
                near = sum(row["token_acc"] * row["n_tokens"] >= row["n_tokens"] - 1.01 for row in wrong)
                lengths = " ".join(f"{n}:{k}" for n in LENGTHS if (k := len(of_length(wrong, n))))
                open_, works = sum(map(_open, wrong)), sum(bool(row["activation"]) for row in wrong)
                rows.append(
                    [
                        f"`{model}` {method}",
                        arm,
                        lengths,
                        *map(str, (len(wrong), near, open_, len(wrong) - works)),
                    ]
                )
    head = ["twin, method", "arm", "wrong, by N", "all", "one token", "not converged", "wrong as activation"]
    return table(head, rows)


def _open(row: Line) -> bool:
    """Whether the optimisation had not converged when it ended."""
    return bool(row["last_loss"] >= STOP)


def success_where_converged(runs: Runs) -> str:
    """Plain and aware, edits whose optimisation converged and those whose did not, N = 2..8."""
    rows = []
    for pair in PAIRS:
        for arm in ("plain", "aware"):
            found = longer(runs.series(pair.masked, pair.method, arm))
            cells = []
            for part in ([r for r in found if not _open(r)], [r for r in found if _open(r)]):
                cells += [str(len(part)), *(plain_number(mean(part, m)) for m in BOTH)]
            rows.append([str(pair), arm, *cells])
    head = ["converged", "N steps", "one step", "not converged", "N steps", "one step"]
    return table(["twin, method", "arm", *head], rows)


def compute(runs: Runs) -> str:
    """What an edit cost, N = 2..8."""
    rows = []
    for pair in PAIRS:
        plain = mean(longer(runs.series(pair.masked, pair.method, "plain")), "layer_passes") or 1.0
        for arm in runs.arms(pair.masked, pair.method):
            found = longer(runs.series(pair.masked, pair.method, arm))
            passes = mean(found, "layer_passes") or 0.0
            eight = mean(of_length(found, 8), "layer_passes")
            rows.append([str(pair), arm, *_cost(found), f"{passes / plain:.1f}", whole(eight)])
    head = ["twin, method", "arm", "forwards", "layer-passes", "times plain's", "layer-passes, N = 8"]
    return table(head, rows)


def secondary(runs: Runs, pair: Pair) -> str:
    """All other outcomes of one masked twin and method, N = 2..8."""
    measures = {
        "exact, N steps": "exact", "exact, one step": "one_step_exact", "tokens, one step": "one_step",
        "first commit": "first_commit", "value as activation": "activation", "paraphrase": "paraphrase",
        "neighbours kept": "kept", "same subject kept": "same_subject_kept", "canvas of 16": "canvas16",
        "random order": "random", "left to right": "left_to_right", "N/2 steps": "half_steps",
    }  # fmt: skip
    arms = {
        arm: longer(runs.series(pair.masked, pair.method, arm)) for arm in runs.arms(pair.masked, pair.method)
    }
    body = [[name, *(told(estimate(rows, m)) for rows in arms.values())] for name, m in measures.items()]
    return table(["", *arms], body)


def secondary_causal(runs: Runs) -> str:
    """All outcomes of the autoregressive twins, N = 2..8."""
    measures = {
        "exact, N greedy tokens": "exact", "tokens, teacher-forced": "teacher_forced",
        "first token": "first_commit", "value as activation": "activation", "paraphrase": "paraphrase",
        "neighbours kept": "kept", "same subject kept": "same_subject_kept", "canvas of 16": "canvas16",
    }  # fmt: skip
    series = {
        f"{model.removeprefix('twin-')} {method}": longer(runs.series(model, method, "plain"))
        for model, _ in FAMILIES
        for method in METHODS
    }
    return table(
        ["", *series],
        [[name, *(told(estimate(rows, m)) for rows in series.values())] for name, m in measures.items()],
    )


def keys(runs: Runs) -> str:
    """By layer: cosine of the keys with some and none revealed, and the share of delta that arrives."""
    rows = []
    for model in MASKED:
        found = [{**row, "known": True} for row in runs.lines("keys", model, known=False)]
        for layer in sorted({row["layer"] for row in found}):
            here = [row for row in found if row["layer"] == layer]
            cells = []
            for measure in ("cos", "delivered"):
                means = [sum(row[measure]) / len(row[measure]) for row in here]
                cells += [
                    told(bootstrap_mean(means, [row["subject"] for row in here]), 3),
                    f"{min(min(r[measure]) for r in here):.2f}",
                ]
            rows.append([f"`{model}`", str(layer), str(len(here)), *cells])
    return table(
        ["twin", "layer", "targets", "cos(k(S), k(empty))", "least", "share of delta that arrives", "least"],
        rows,
    )


def closed(runs: Runs) -> str:
    """Closed list of whole names against compositional objects, N = 2, 4, 8."""
    rows = []
    for model in MASKED:
        for arm in ("plain", "aware"):
            listed = longer(runs.lines("closed", model))
            listed = [row for row in listed if (row["method"], row["arm"]) == ("ROME_MDM", arm)]
            own = [row for row in runs.series(model, "ROME_MDM", arm) if row["n_tokens"] in (2, 4, 8)]
            rows.append(
                [f"`{model}`", arm, *(told(estimate(part, m)) for part in (listed, own) for m in BOTH)]
            )
    head = ["closed: N steps", "one step", "compositional: N", "one step"]
    return table(["twin", "arm", *head], rows)


def ablations(runs: Runs, pair: Pair) -> str:
    """One change at a time, N = 2, 4, 8."""
    rows = []
    for name, found in ablated(runs, pair).items():
        cells = [
            *(told(estimate(found, m)) for m in BOTH),
            *(plain_number(mean(found, m)) for m in ("paraphrase", "kept")),
        ]
        rows.append([name, *cells, *_cost(found)])
    return table(["what", "N steps", "one step", "paraphrase", "kept", "forwards", "layer-passes"], rows)


def ablated(runs: Runs, pair: Pair) -> dict[str, list[Line]]:
    """The edits of each ablation of a masked twin and method, N = 2, 4, 8, with their cost."""
    found = [row for row in longer(runs.lines("ablate", pair.masked)) if row["method"] == pair.method]
    parts = {name: [row for row in found if row["ablation"] == name] for name in ABLATIONS}
    return {name: part for name, part in parts.items() if part}


def against_long_plain(runs: Runs, pair: Pair) -> str:
    """Each ablation against plain with four times the steps: whole targets, and its cost as a multiple."""
    parts = ablated(runs, pair)
    plain = parts.pop(LONG_PLAIN)
    rows = []
    for name, found in parts.items():
        times = [(mean(found, m) or 0.0) / (mean(plain, m) or 1.0) for m in ("forwards", "layer_passes")]
        ends = paired(found, plain), paired(found, plain, *BOTH)
        rows.append([name, *map(difference, ends), *(f"{x:.2f}" for x in times)])
    return table(["what", "minus it, N steps", "minus it in one step", "x forwards", "x layer-passes"], rows)


def ablations_causal(runs: Runs) -> str:
    """The autoregressive twins: values through the weights."""
    rows = []
    for model, _ in FAMILIES:
        found = longer(runs.lines("ablate", model))
        for name in dict.fromkeys(row["ablation"] for row in found):
            part = [row for row in found if row["ablation"] == name]
            cells = (told(estimate(part, m)) for m in ("exact", "paraphrase", "kept"))
            rows.append([f"`{model}`", name, *cells, whole(mean(part, "forwards"))])
    return table(["twin, ROME_MDM", "what", "exact", "paraphrase", "kept", "forwards"], rows)


def tried(runs: Runs, model: str) -> str:
    """Each try of `beat` on one twin, N = 2, 4, 8."""
    rows, found = [], longer(runs.lines("beat", model))
    for i, changes in enumerate(BEAT):
        part = [row for row in found if row["try"] == i]
        eight = plain_number(mean(of_length(part, 8), "exact"))
        cells = [
            *(told(estimate(part, m)) for m in BOTH),
            eight,
            *(plain_number(mean(part, m)) for m in ("paraphrase", "kept")),
        ]
        rows.append([_words(changes), *cells, plain_number(score(part), 3)])
    return table([f"`{model}`", "N steps", "one step", "N = 8", "paraphrase", "kept", "score"], rows)


def _words(changes: Line) -> str:
    """`layer 4, clamp 4, 100 steps`."""
    words = [f"layer {changes['layers'][0]}, clamp {changes['clamp_norm_factor']:g}"]
    words += [f"lambda {changes['mom2_update_weight']}"] if "mom2_update_weight" in changes else []
    words += [f"{changes['v_num_grad_steps']} steps"] if "v_num_grad_steps" in changes else []
    words += ["masked C"] if "mom2_mask_ratio" in changes else []
    return ", ".join(words)


def score(rows: Sequence[Line]) -> float | None:
    """The search's score: the mean of exact, paraphrase and neighbours kept, each averaged over lengths."""
    if not rows:
        return None
    parts = []
    for measure in ("exact", "paraphrase", "kept"):
        means = [m for n in LENGTHS if (m := mean(of_length(rows, n), measure)) is not None]
        parts.append(sum(means) / len(means))
    return sum(parts) / len(parts)


def batches(runs: Runs) -> str:
    """Sixteen facts in one MEMIT_MDM edit, N = 2, 4, 8."""
    rows = []
    for model in MASKED:
        found = longer(runs.lines("batches", model))
        for arm, kind in dict.fromkeys((row["arm"], row["ablation"]) for row in found):
            part = [row for row in found if (row["arm"], row["ablation"]) == (arm, kind)]
            cells = [
                *(told(estimate(part, m)) for m in BOTH),
                *(plain_number(mean(part, m)) for m in ("paraphrase", "first_commit")),
            ]
            rows.append([f"`{model}`", arm, kind.split()[0], *cells, told(estimate(part, "kept"))])
    return table(
        ["twin", "arm", "lengths", "N steps", "one step", "paraphrase", "first", "neighbours kept"], rows
    )


def known(runs: Runs) -> str:
    """How many facts each model wrote before the edit; only those count."""
    counts = [
        (m, *(len({r["subject"] for r in runs.lines("run", m, known=k)}) for k in (True, False)))
        for m in MODELS
    ]
    return ", ".join(f"{m.removeprefix('twin-')} {knows}/{every}" for m, knows, every in counts)


def failed(runs: Runs) -> int:
    """Edits whose optimisation left the finite numbers."""
    return sum(
        value(row, "exact") is not None and "error" in row
        for m in MODELS
        for c in ("run", "best")
        for row in runs.lines(c, m)
    )
