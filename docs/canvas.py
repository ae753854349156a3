"""Draws docs/canvas.svg: one fact of twin-llada, denoised before and after an edit. `python docs/canvas.py`

The same edit gives the same file: it is made on the CPU, and every draw comes from the file's seed.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

import torch

from easyedit_mdm import Adapter, decode, load_hparams, load_model, make_edit
from easyedit_mdm.common.reproducible import same_bytes_on_any_number_of_threads

REQUEST = {"prompt": "Sedim works for", "subject": "Sedim", "target_new": "Sogam Boles Nehetre"}
SLOTS = 3
WIDTH, MARGIN, LABEL, CELL, ROW, GAP = 390, 16, 58, 96, 28, 6
STYLE = """
    text { font: 14px ui-monospace, Menlo, Consolas, monospace; fill: #1f2328; }
    .quiet { fill: #59636e; font-size: 13px; }
    .title { font-weight: 600; }
    .page { fill: #ffffff; stroke: #d1d9e0; }
    .mask { fill: #eff1f4; stroke: #818b98; stroke-dasharray: 3 3; }
    .shown { fill: #ffffff; stroke: #818b98; }
    .new { fill: #dbeafe; stroke: #2563eb; stroke-width: 2; }
    @media (prefers-color-scheme: dark) {
      text { fill: #f0f6fc; }
      .quiet { fill: #a4acb5; }
      .page { fill: #0d1117; stroke: #3d444d; }
      .mask { fill: #1b2129; stroke: #7d8590; }
      .shown { fill: #0d1117; stroke: #7d8590; }
      .new { fill: #132e57; stroke: #60a5fa; }
    }"""


def frames(model: Adapter) -> list[list[str | None]]:
    """The canvas before the first step and after each; a masked slot is None."""
    prompt = torch.tensor(model.tokenizer(REQUEST["prompt"])["input_ids"])
    trace = decode(model, [prompt], [SLOTS])[0]
    return [
        [
            None if token == model.ids.mask else model.tokenizer.decode([token]).strip()
            for token in map(int, frame)
        ]
        for frame in trace.frames(model.ids.mask)
    ]


def panel(title: str, canvases: list[list[str | None]], top: int) -> tuple[list[str], int]:
    """The canvases of one decoding, one under the other, and where the next panel may begin."""
    lines = [f'<text class="title" x="{MARGIN}" y="{top + 14}">{escape(title)}</text>']
    for step, canvas in enumerate(canvases):
        y = top + 26 + step * (ROW + GAP)
        lines.append(f'<text class="quiet" x="{MARGIN}" y="{y + 19}">step {step}</text>')
        for slot, token in enumerate(canvas):
            is_new = step > 0 and canvases[step - 1][slot] is None and token is not None
            kind = "mask" if token is None else "new" if is_new else "shown"
            x = MARGIN + LABEL + slot * (CELL + GAP)
            lines.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{CELL}" height="{ROW}" rx="5"/>')
            words, style = ("mask", ' class="quiet"') if token is None else (token, "")
            lines.append(
                f'<text{style} x="{x + CELL // 2}" y="{y + 19}" text-anchor="middle">{escape(words)}</text>'
            )
    return lines, top + 26 + len(canvases) * (ROW + GAP) + 12


def picture(before: list[list[str | None]], after: list[list[str | None]]) -> str:
    """The SVG: both decodings of the prompt."""
    first, middle = panel(f"Before: “{REQUEST['prompt']} …”", before, MARGIN)
    second, end = panel(f"After the edit to “{REQUEST['target_new']}”", after, middle)
    said = (
        f"A canvas of {SLOTS} masks after “{REQUEST['prompt']}”, denoised in {SLOTS} steps. "
        f"Before the edit: {' '.join(map(str, before[-1]))}. After it: {' '.join(map(str, after[-1]))}."
    )
    return "\n".join(
        [
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {end}" width="{WIDTH}"'
                f' height="{end}" role="img" aria-labelledby="said">'
            ),
            f'  <title id="said">{escape(said)}</title>',
            f"  <style>{STYLE}\n  </style>",
            f'  <rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{end - 1}" rx="8"/>',
            *("  " + line for line in [*first, *second]),
            "</svg>\n",
        ]
    )


def main() -> None:
    """Edit, decode before and after, write the picture beside this file."""
    same_bytes_on_any_number_of_threads()
    model = load_model("twin-llada", device="cpu")
    before = frames(model)
    edit = make_edit(model, REQUEST, load_hparams("ROME_MDM/twin-llada"))
    edit.apply(model)
    after = frames(model)
    edit.revert(model)
    Path(__file__).with_name("canvas.svg").write_text(picture(before, after), encoding="utf-8")


if __name__ == "__main__":
    main()
