"""The page itself, in Gradio: what stands where, and what is called when. Needs the extra `app`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import gradio as gr

from easyedit_mdm.app.desk import KINDS, OWN, PLAIN, Desk, Dials, Fact, models, schedules
from easyedit_mdm.app.pages import notice, report_page, stack_page, style, trial_page, wrong
from easyedit_mdm.errors import EasyEditMDMError, EditError

_INTRO = """# Edit a fact, watch the model write
Both edits are made for the model as it is, and taken off again. Keep one, and the next edit is made on top
of it. Everything stays on this machine."""
Changes = dict[Any, Any]  # what is shown from now on, by component
_FILE = "the hyperparameters; a file that ships, or the path of one"


class Page:
    """The components, and the functions behind the buttons. What a tab works on is its `Desk`."""

    def __init__(self) -> None:
        with gr.Blocks(title="easyedit_mdm", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
            self.blocks = blocks
            self.desk = gr.State(None, delete_callback=_close)
            gr.Markdown(_INTRO)
            with gr.Row(equal_height=False):
                with gr.Column(scale=2, min_width=300):
                    self._controls()
                with gr.Column(scale=3, min_width=300):
                    self._results()
            self._report()
            self._wire()

    # ---- what stands where ---------------------------------------------------------------------------------
    def _controls(self) -> None:
        names = models()
        with gr.Group():
            self.model = gr.Dropdown(
                names, value=names[0], allow_custom_value=True, label="Model", elem_id="model",
                info="a name, or type a folder",
            )  # fmt: skip
            self.load = gr.Button("Load the model", size="sm", elem_id="load")
        self.pick = gr.Dropdown([], value=None, label="Pick a fact", elem_id="pick", type="index")
        self.prompt = gr.Textbox(label="Prompt", elem_id="prompt", info="with the subject in it")
        with gr.Row():
            self.subject = gr.Textbox(label="Subject", elem_id="subject", min_width=130)
            self.target = gr.Textbox(label="New target", elem_id="target", min_width=130)
        with gr.Accordion("Paraphrases and neighbours", open=False):
            self.paraphrases = gr.Textbox(label="Other prompts for the fact, one a line", lines=2)
            self.neighbours = gr.Textbox(label="Prompts about other subjects, one a line", lines=3)
        with gr.Accordion("Dials", open=False, elem_id="dials"):
            self.file = gr.Dropdown([], allow_custom_value=True, label="Method and file", info=_FILE)
            self.layer = gr.Slider(0, 1, step=1, label="Layer")
            self.schedule = gr.Dropdown(
                schedules(), label="States of the denoising-aware edit", info="which partly revealed canvases"
            )
        self.edit = gr.Button("Edit and watch", variant="primary", elem_id="edit")

    def _results(self) -> None:
        self.message = gr.HTML(notice("The model is being loaded."), elem_id="message")
        self.canvas = gr.HTML(elem_id="canvas")
        with gr.Row():
            self.keep_plain = gr.Button("Keep the plain edit", elem_id="keep-plain", interactive=False)
            self.keep_own = gr.Button("Keep the denoising-aware edit", elem_id="keep-own", interactive=False)
        gr.Markdown("### Edits in the model")
        self.stack = gr.HTML(stack_page([]), elem_id="stack")
        with gr.Row(equal_height=False):
            with gr.Column(min_width=280):
                self.number = gr.Dropdown(
                    [], type="index", label="Take back", info="the last, if none is chosen"
                )
                self.undo = gr.Button("Take it back", elem_id="undo", size="md")
            with gr.Column(min_width=280):
                self.kind = gr.Radio(KINDS, value=KINDS[0], label="Download", info="all edits as one")
                self.make = gr.Button("Make the file", elem_id="make", size="md")
        self.result = gr.File(label="Download", interactive=False, visible=False, elem_id="result")

    def _report(self) -> None:
        with gr.Accordion("Open a report", open=False, elem_id="report"):
            self.upload = gr.File(label="report.html", height=120)
            self.report = gr.HTML()

    # ---- what is called when -------------------------------------------------------------------------------
    def _wire(self) -> None:
        fact = [self.prompt, self.subject, self.target, self.paraphrases, self.neighbours]
        dials = [self.file, self.layer, self.schedule]
        keeps = [self.keep_plain, self.keep_own]
        changed = [self.message, self.stack, self.number, self.canvas, self.result, *keeps]
        loaded = [self.desk, self.pick, *dials, *changed]
        self._on(self.blocks.load, self._opened, [self.model, self.desk], loaded)
        self._on(self.load.click, self._opened, [self.model, self.desk], loaded)
        self._on(self.pick.input, self._picked, [self.desk, self.pick], fact)
        self._on(self.file.change, self._turned, [self.desk, self.file], dials[1:])
        edited = [self.canvas, *keeps]
        begun = self.edit.click(_busy, None, self.message, show_progress="hidden", api_visibility="private")
        self._on(begun.then, self._edited, [self.desk, *fact, *dials], edited)
        for button, arm in ((self.keep_plain, PLAIN), (self.keep_own, OWN)):
            self._on(button.click, functools.partial(self._kept, arm), [self.desk], changed)
        self._on(self.undo.click, self._undone, [self.desk, self.number], changed)
        self._on(self.make.click, self._made, [self.desk, self.kind], [self.result])
        self._on(self.upload.change, self._shown, [self.upload], [self.report])

    def _on(self, event: Any, work: Callable[..., Changes], given: list, changes: list) -> None:
        """When `event`, do `work`; its errors become a sentence in the message's place, and nothing else
        changes.
        """

        def call(*values: Any) -> Changes:
            """What the event calls."""
            try:
                return work(*values)
            except EasyEditMDMError as error:
                return {self.message: wrong(str(error))}

        event(
            call,
            given,
            [self.message, *(part for part in changes if part is not self.message)],
            show_progress="minimal",
            show_progress_on=[self.message],
            api_visibility="private",
        )

    def _opened(self, name: str | None, before: Desk | None) -> Changes:
        desk = Desk.open(name or "")
        if before is not None:
            before.close()
        files, masked = desk.files(), desk.model.denoises
        facts = [f"{fact.prompt} … {fact.target}" for fact in desk.facts()]
        kind = "writes by denoising" if masked else "autoregressive"
        parameters = sum(p.numel() for p in desk.model.parameters())
        message = f"{desk.name} is loaded: {kind}, {desk.model.layers} layers, {parameters:,} parameters."
        first = files[0] if files else None
        return {
            **self._stacked(desk, message),
            **self._dials(desk, first),
            self.desk: desk,
            self.pick: gr.update(choices=facts, value=None, visible=bool(facts)),
            self.file: gr.update(choices=files, value=first),
        }

    def _dials(self, desk: Desk, file: str | None) -> Changes:
        """The dials as a file sets them; those that it does not have cannot be turned."""
        layers, schedule = desk.defaults(file)
        one, most = len(layers) == 1, desk.model.layers - 1
        label = "Layer" if one or not layers else f"Layers {', '.join(map(str, layers))}"
        value = layers[0] if layers else 0
        return {
            self.layer: gr.update(maximum=most, value=value, interactive=one, label=label),
            self.schedule: gr.update(value=schedule, visible=desk.model.denoises),
        }

    def _turned(self, desk: Desk | None, file: str | None) -> Changes:
        return self._dials(_there(desk), file)

    def _picked(self, desk: Desk | None, number: int | None) -> Changes:
        if number is None:
            return {}
        fact = _there(desk).facts()[number]
        return {
            self.prompt: fact.prompt,
            self.subject: fact.subject,
            self.target: fact.target,
            self.paraphrases: "\n".join(fact.paraphrases),
            self.neighbours: "\n".join(fact.neighbours),
        }

    def _edited(self, desk: Desk | None, *given: Any) -> Changes:
        here, (file, layer, schedule) = _there(desk), given[5:]
        words = [text or "" for text in given[:5]]  # an empty box gives None
        others, near = (tuple(text.splitlines()) for text in words[3:])
        fact = Fact(words[0], words[1], words[2], others, near)
        one = len(here.defaults(file)[0]) == 1
        trial = here.attempt(fact, Dials(file or "", int(layer or 0) if one else None, schedule or None))
        return {
            self.message: notice("Done. The model is as it was; keep an edit to put it in."),
            self.canvas: trial_page(trial),
            self.keep_plain: gr.update(interactive=PLAIN in trial.edits),
            self.keep_own: gr.update(interactive=True),
        }

    def _kept(self, arm: str, desk: Desk | None) -> Changes:
        here = _there(desk)
        here.keep(arm)
        return self._stacked(here, f"Kept. The model carries {len(here.edits)} edit(s).")

    def _undone(self, desk: Desk | None, number: int | None) -> Changes:
        here = _there(desk)
        here.undo(None if number is None else number + 1)
        return self._stacked(here, f"Taken back. The model carries {len(here.edits)} edit(s).")

    def _stacked(self, desk: Desk, message: str) -> Changes:
        """The stack as it is now; the canvas and the file of before do not fit the model any more."""
        facts = [fact for edit in desk.edits for fact in edit.card.get("facts", [])]
        names = [f"{i}. {fact['prompt']} … {fact['target_new']}" for i, fact in enumerate(facts, 1)]
        own = "Keep the denoising-aware edit" if desk.model.denoises else "Keep the edit"
        return {
            self.message: notice(message),
            self.stack: stack_page(desk.edits),
            self.number: gr.update(choices=names, value=None),
            self.canvas: "",
            self.result: gr.update(value=None, visible=False),
            self.keep_plain: gr.update(interactive=False, visible=desk.model.denoises),
            self.keep_own: gr.update(interactive=False, value=own),
        }

    def _made(self, desk: Desk | None, kind: str) -> Changes:
        path = _there(desk).download(kind)
        return {
            self.message: notice(f"{path.name} is ready."),
            self.result: gr.update(value=str(path), visible=True),
        }

    def _shown(self, path: str | None) -> Changes:
        if path is None:
            return {self.report: ""}
        return {self.message: notice("The report is open below."), self.report: report_page(path)}


def _busy() -> str:
    return notice("Editing, in both ways; seconds on a small model.")


def _there(desk: Desk | None) -> Desk:
    if desk is None:
        raise EditError("no model is loaded: choose one and press Load the model")
    return desk


def _close(desk: Desk | None) -> None:
    if desk is not None:
        desk.close()


def theme() -> gr.themes.Base:
    """Fonts of the system: nothing is fetched."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return gr.themes.Default(primary_hue="emerald", **fonts)


def launch(port: int | None = None, inbrowser: bool = False, block: bool = True) -> Any:
    """Serve the page to this machine alone.

    Args:
        port: 7860 or the next free one by default.
        block: wait until it is interrupted.

    Returns:
        the running page; `close()` ends it.
    """
    page = Page().blocks
    page.queue(default_concurrency_limit=1)
    page.launch(
        server_name="127.0.0.1", server_port=port, share=False, inbrowser=inbrowser, quiet=True,
        prevent_thread_lock=not block, css=style(), theme=theme(), ssr_mode=False, enable_monitoring=False,
        footer_links=[], mcp_server=False, pwa=False, run_history=False, max_file_size="50mb",
    )  # fmt: skip
    return page
