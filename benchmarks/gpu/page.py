"""The kit's report as a page, from its JSON alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

GIB, MIB = 2**30, 2**20


def page(found: dict[str, Any]) -> str:
    """The whole page. A part that has no rows is not on it."""
    parts = [
        _head(found), _edits(found), _statistics(found), _decoding(found), _memory(found), _error(found),
        _profile(found), _left_out(found),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(names)} |", f"| {' | '.join('---' for _ in names)} |"]
    return "\n".join([*lines, *(f"| {' | '.join(_cell(c) for c in row)} |" for row in rows)])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")


def _bytes(value: int | None) -> str:
    if value is None:
        return "-"
    return f"{value / GIB:.1f} GiB" if value >= GIB else f"{value / MIB:.0f} MiB"


def _head(found: dict[str, Any]) -> str:
    cpu = found["device_bytes"] is None
    rehearsal = any(name.startswith("tiny") for name in found["shapes"])
    lines = [f"# Edit speed on {found['device']}", ""]
    if rehearsal:
        lines += [
            f"**A rehearsal{' on a CPU' if cpu else ''}, with tiny shapes. No figure here says anything about"
            " a large model or a GPU.**",
            "",
        ]
    rows = [
        ("weights", "random, bfloat16"),
        ("shapes", ", ".join(found["shapes"])),
        ("memory of the device", _bytes(found["device_bytes"])),
        ("CPU threads", found["threads"]),
        ("versions", f"torch {found['torch']}, transformers {found['transformers']}, CUDA {found['cuda']}"),
        ("easyedit_mdm", f"{found['easyedit_mdm']}, commit {found['commit'] or 'unknown'}"),
        ("time", f"{found['seconds']:.0f} s of {found['minutes'] * 60:.0f} s"),
        ("run to its end", "yes" if found["finished"] else "**no**"),
    ]
    return "\n".join([*lines, _table(("", ""), rows)])


def _aim(row: dict[str, Any], aims: dict[str, float]) -> float | None:
    if row["method"].startswith("EasyEdit") or row["facts"] < 256:
        return None
    return aims["plain_seconds_per_fact" if row["plain"] else "aware_seconds_per_fact"]


def _edits(found: dict[str, Any]) -> str:
    rows = found.get("edits", [])
    if not rows:
        return ""
    base = {r["asked"]: r["seconds_per_fact"] for r in rows if r["method"] == "EasyEdit ROME"}
    least = min(base.values(), default=None)
    table = _table(
        ("shape", "method", "states", "stop", "facts", "steps", "s a fact", "aim", "x EasyEdit's ROME"),
        [
            (
                r["shape"], r["method"], r["states"], r["stop"], r["facts"], r.get("steps"),
                r["seconds_per_fact"], _aim(r, found["aims"]),
                None if least is None else least / r["seconds_per_fact"],
            )
            for r in rows
        ],
    )  # fmt: skip
    return (
        f"## Edits\n\nSix context prefixes, targets of 1 to 4 tokens, at most {found['steps'] - 1} optimiser"
        " steps; layers, rows a pass and facts a batch are those of the shipped files. `early`: a fact ends"
        " at the loss that half of the facts were below half way, since a random model does not reach the"
        " files' own 0.05. EasyEdit's ROME edits one fact after another; the last column compares with its"
        " fastest time a fact. Its v is cast to bfloat16, without which it stops with an error.\n\n" + table
    )


def _statistics(found: dict[str, Any]) -> str:
    rows = found.get("statistics", [])
    if not rows:
        return ""
    aim = found["aims"]["statistics_seconds_per_million"]
    table = _table(
        ("shape", "layers", "width", "tokens", "tokens a s", "s for 10^6", "aim", "fixed, s", "factors, s"),
        [
            (
                r["shape"], " ".join(map(str, r["layers"])), r["width"], r["tokens"], r["tokens_per_second"],
                r["seconds_per_million"], aim if len(r["layers"]) == 4 else None, r["fixed_seconds"],
                r["factor_seconds"],
            )
            for r in rows
        ],
    )  # fmt: skip
    return (
        f"## Second moments\n\nWithout the model's hash and the files. Factors: on the CPU, once.\n\n{table}"
    )


def _decoding(found: dict[str, Any]) -> str:
    rows = found.get("decoding", [])
    if not rows:
        return ""
    keys = ("shape", "prompts", "new_tokens", "steps", "seconds", "tokens_per_second")
    return "## Decoding\n\n" + _table(
        ("shape", "prompts", "new tokens each", "steps", "s", "tokens a s"),
        [[r[k] for k in keys] for r in rows],
    )


def _memory(found: dict[str, Any]) -> str:
    """Peaks; of the edits the largest of each arm."""
    rows = []
    for part in ("models", "statistics", "edits", "decoding", "error"):
        most: dict[tuple, dict[str, Any]] = {}
        for row in found.get(part, []):
            key = (row["shape"], row.get("method"), row.get("states"))
            if key not in most or row["peak_bytes"] > most[key]["peak_bytes"]:
                most[key] = row
        for (shape, method, states), row in most.items():
            what = " ".join(str(x) for x in (part, method, states) if x)
            told = row.get("doctor_bytes") or row.get("doctor_weights_bytes")
            here = row.get("predicted_bytes")
            ratio = row["peak_bytes"] / here if here else None
            rows.append((shape, what, *(_bytes(b) for b in (row["peak_bytes"], told, here)), ratio))
    if not rows:
        return ""
    of = (
        "On a CPU the peak is that of the whole process since it began."
        if found["device_bytes"] is None
        else "The peak is that of the tensors on the device."
    )
    return (
        f"## Memory\n\n{of} `doctor`: its figure for this shape, weights and a full pass. `these rows`: "
        + (
            "the same formula for the rows that ran.\n\n"
            + _table(("shape", "part", "peak", "doctor", "these rows", "peak / these rows"), rows)
        )
    )


def _error(found: dict[str, Any]) -> str:
    rows = found.get("error", [])
    if not rows:
        return ""
    return (
        "## bfloat16 against float32\n\nOne edit of a bfloat16 model, and of the same weights in float32."
        " `update`: ||dW_bf16 - dW_fp32|| / ||dW_fp32||. `written`: what is lost when dW is added to bfloat16"
        " weights, over ||dW||.\n\n"
        + _table(
            ("shape", "update", "cosine", "ratio of norms", "written", "reverted to the bit"),
            [
                (r["shape"], r["update"], r["cosine"], r["norm_ratio"], r["written"], r["reverted"])
                for r in rows
            ],
        )
    )


def _profile(found: dict[str, Any]) -> str:
    parts = []
    for r in found.get("profile", []):
        busy = r["device_busy_seconds"]
        summary = _table(
            ("", ""),
            [
                ("edit", f"{r['shape']}, {r['method']}, {r['facts']} facts at once, {r['steps']} losses"),
                ("time", f"{r['seconds']:.3f} s"),
                ("work", f"{r['flops'] / 1e12:.3g} TFLOP, {r['flops_per_second'] / 1e12:.3g} TFLOP a second"),
                ("one matrix product of this size", f"{r['matrix_speed'] / 1e12:.3g} TFLOP a second"),
                ("share of it", f"{r['share_of_matrix_speed']:.0%}"),
                ("kernels' own time", "-" if busy is None else f"{busy:.3f} s"),
            ],
        )
        table = _table(
            ("operation", "calls", "ms", "share"),
            [(f"`{o['name']}`", o["calls"], o["milliseconds"], f"{o['share']:.0%}") for o in r["operations"]],
        )
        parts.append(f"{summary}\n\n{table}")
    return "## Where the time goes\n\n" + "\n\n".join(parts) if parts else ""


def _left_out(found: dict[str, Any]) -> str:
    rows = [(r["what"], r["why"]) for r in found["left_out"]]
    return "## Left out\n\n" + _table(("what", "why"), rows) if rows else ""
