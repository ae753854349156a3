"""What the app does, without Gradio: desks, both edits, a stack with undo, downloads, reports."""

from __future__ import annotations

import zipfile

import pytest
import torch

from easyedit_mdm import Edit, load_model
from easyedit_mdm.app.desk import KINDS, OWN, PLAIN, Desk, Dials, Fact, models
from easyedit_mdm.app.pages import notice, report_page, stack_page, trial_page, wrong
from easyedit_mdm.common.fingerprints import parameter_hashes
from easyedit_mdm.errors import DataError, EditError, HyperParameterError, RequestError, UnknownNameError

FILE = "ROME_MDM/twin-llada"


@pytest.fixture(scope="module")
def desk():
    """A desk with a masked twin; a test leaves its stack empty."""
    opened = Desk.open(" twin-llada ")
    yield opened
    opened.close()
    assert not opened.folder.exists()


def test_both_edits_are_tried_and_the_model_stays(desk):
    """A picked fact: the canvas fills one slot a step on every side, and nothing is left in the model."""
    before = parameter_hashes(desk.model)
    fact = next(fact for fact in desk.facts() if len(fact.target.split()) == 2)
    trial = desk.attempt(fact, Dials(FILE))
    assert parameter_hashes(desk.model) == before and desk.edits == []
    assert list(trial.sides) == ["before", PLAIN, OWN]
    assert not trial.sides["before"].exact and trial.sides[OWN].exact
    for side in trial.sides.values():
        masked = [sum(slot.text is None for slot in frame) for frame in side.frames]
        assert masked == [2, 1, 0] and [sum(s.new for s in frame) for frame in side.frames] == [0, 1, 1]
        assert " ".join(slot.text for slot in side.frames[-1]) == side.text
    assert trial.edits[PLAIN].card["facts"][0]["schedule"] == "full_mask"
    assert trial.edits[OWN].card["facts"][0]["schedule"] == "stratified"
    page = trial_page(trial)
    assert page.count("<section ") == 3 and page.count('class="frame"') == 9
    assert fact.paraphrases[0] in page and fact.neighbours[0] in page


def test_a_stack_with_undo_and_its_downloads(desk, tmp_path):
    """Two edits kept; the files hold both, for the model without them; either can be taken back."""
    before = parameter_hashes(desk.model)
    with pytest.raises(EditError, match="no edit to keep"):
        desk.trial = None
        desk.keep(OWN)
    first, second = [fact for fact in desk.facts() if len(fact.target.split()) == 1][:2]
    for fact in (first, second):
        desk.attempt(fact, Dials(FILE))
        desk.keep(PLAIN)
    edited = parameter_hashes(desk.model)
    assert [edit.card["facts"][0]["prompt"] for edit in desk.edits] == [first.prompt, second.prompt]
    assert stack_page(desk.edits).count("<li>") == 2
    for kind in KINDS:
        with zipfile.ZipFile(desk.download(kind)) as file:
            file.extractall(tmp_path / kind)
    assert parameter_hashes(desk.model) == edited
    other = load_model("twin-llada")
    saved = Edit.load(tmp_path / "edit")
    saved.apply(other)
    for (name, mine), (_, theirs) in zip(desk.model.named_parameters(), other.named_parameters()):
        assert torch.allclose(mine, theirs, atol=1e-6), name
    merged = load_model(tmp_path / "merged model")
    assert parameter_hashes(merged) == edited
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    for kind in ("adapter", "merged model"):
        told = (tmp_path / kind / "README.md").read_text()
        assert all(fact.prompt in told and fact.target in told for fact in (first, second))
    assert [edit.card["facts"][0]["prompt"] for edit in desk.undo(1)] == [second.prompt]
    assert desk.undo() == [] and parameter_hashes(desk.model) == before
    with pytest.raises(EditError, match="no edit to take back"):
        desk.undo()
    with pytest.raises(EditError, match="keep one first"):
        desk.download("edit")


@pytest.mark.end_to_end
def test_desks_do_not_disturb_each_other(desk):
    """An edit that one keeps is not in the other's model."""
    other = Desk.open("twin-llada")
    before = parameter_hashes(other.model)
    desk.attempt(desk.facts()[0], Dials(FILE))
    desk.keep(PLAIN)
    assert parameter_hashes(other.model) == before and other.edits == [] and other.trial is None
    desk.undo()
    other.close()


@pytest.mark.parametrize(
    ("fact", "dials", "kind", "says"),
    [
        (Fact("", "Ann", "red"), Dials(FILE), RequestError, "the prompt is empty"),
        (Fact("Ann is", "Bob", "red"), Dials(FILE), RequestError, "is not in prompt"),
        (Fact("Ann is", "Ann", " "), Dials(FILE), RequestError, "the target is empty"),
        (Fact("Ann is", "Ann", "red"), Dials(""), HyperParameterError, "give the path of one"),
        (Fact("Ann is", "Ann", "red"), Dials(FILE, 99), HyperParameterError, "has layers 0 to 7"),
        (Fact("Ann is", "Ann", "red"), Dials(FILE, 1, "stratifed"), UnknownNameError, "stratified"),
    ],
)
def test_wrong_input_is_a_sentence(desk, fact, dials, kind, says):
    """Each ends before anything is edited."""
    with pytest.raises(kind, match=says):
        desk.attempt(fact, dials)


def test_an_autoregressive_model_has_one_way():
    """No masks, so no denoising-aware edit beside a plain one; its own layers and files."""
    desk = Desk.open("twin-llama")
    assert desk.files()[0] == "ROME_MDM/twin-llama" and "MEMIT_MDM/twin-llama" in desk.files()
    trial = desk.attempt(desk.facts()[0], Dials(desk.files()[0]))
    assert list(trial.sides) == ["before", OWN] and trial.sides[OWN].exact
    assert trial_page(trial).count("<section ") == 2
    desk.close()


def test_pages_escape_what_they_show(tmp_path):
    """Nothing that is typed, and nothing in a report, becomes a part of the page."""
    assert "<b>" not in notice("<b>x") and "<b>" not in wrong("<b>x")
    report = tmp_path / "report.html"
    report.write_text('<p title="x">"hello"</p><script>alert(1)</script>')
    page = report_page(report)
    assert 'sandbox="allow-scripts"' in page and "<script>" not in page and "same-origin" not in page
    assert report_page(tmp_path) == page, "a folder that compare wrote"
    for path, says in ((None, "no report"), (tmp_path / "x.pdf", "not an HTML"), (tmp_path / "y", "not an")):
        with pytest.raises(DataError, match=says):
            report_page(path)


def test_models_that_are_there():
    """The twins always; SmolLM2 where its weights are."""
    assert models()[:4] == ["twin-llada", "twin-dream", "twin-llama", "twin-qwen"]
