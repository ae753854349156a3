"""Imports that the installed packages cannot serve: what EasyEdit's code gets, what everybody else gets, and
what is said when it is used.
"""

from __future__ import annotations

import builtins
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from easyedit_mdm.errors import MissingPackageError
from easyedit_mdm.host.calls import understand_old_cache_name
from easyedit_mdm.host.masks import causal_attention_mask
from easyedit_mdm.host.moved import MOVED
from easyedit_mdm.host.standins import make_standin, standins, version_of

VERSION = transformers.__version__


def run(
    folder: Path, source: str, name: str = "easyeditor.models.probe", script: Path | None = None
) -> dict[str, Any]:
    """Run source code as the module `name` inside `standins()`; returns its globals."""
    file = folder / "probe.py"
    file.write_text(textwrap.dedent(source))
    module = {"__name__": name, "__file__": str(file)}
    with standins(script):
        exec(compile(file.read_text(), str(file), "exec"), module)
    return module


def used(thing: Any) -> str:
    """What is said when a stand-in is called."""
    with pytest.raises(MissingPackageError) as error:
        thing(1)
    return str(error.value)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Factory of packages that can be imported, with a version."""
    monkeypatch.syspath_prepend(tmp_path / "site")

    def make(name: str, version: str, source: str = "", pip: str | None = None) -> None:
        folder = tmp_path / "site" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(source)
        info = tmp_path / "site" / f"{pip or name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {pip or name}\nVersion: {version}\n")
        monkeypatch.delitem(sys.modules, name, raising=False)

    yield make
    for name in [n for n in sys.modules if n.split(".")[0].startswith("fake")]:
        del sys.modules[name]


def test_a_package_that_is_not_installed(tmp_path):
    """It may be imported in every way, named, subclassed and put into annotations; used, it names the
    package.
    """
    found = run(
        tmp_path,
        """
        import nowhere, nowhere.sub.deep
        import nowhere.sub as sub
        from nowhere import one, two as second
        from nowhere.sub import Base
        from nowhere.sub import *
        from abc import ABC, abstractmethod

        class Child(Base, ABC):
            def run(self, x: one[int] = None) -> second.Thing: ...
        """,
    )
    assert (
        used(found["one"])
        == "nowhere.one was used, but the package 'nowhere' is not installed: pip install nowhere"
    )
    for name in ("nowhere", "sub"):
        assert "pip install nowhere" in used(found[name].thing.other)
    assert "nowhere.two was used" in used(found["second"]) and "nowhere.sub.Base was used" in used(
        found["Child"]
    )
    assert "pip install opencv-python-headless" in used(make_standin("cv2").imread) and "hydra-core" in used(
        make_standin("hydra.main")
    )
    with pytest.raises(MissingPackageError):
        list(found["one"])


def test_a_name_that_is_gone(tmp_path):
    """The names beside it are the real ones; the version that is installed is told, and one older than it is
    the cure.
    """
    found = run(
        tmp_path,
        "from transformers import AutoConfig, NeverThere\nfrom torch.nn import Linear, NoSuchLayer\nimport"
        " transformers",
    )
    now = sys.modules["transformers"]  # which another test may have imported anew
    assert found["AutoConfig"] is now.AutoConfig
    assert found["Linear"] is torch.nn.Linear
    assert found["transformers"] is now
    assert (
        used(found["NeverThere"])
        == f"transformers.NeverThere was used, but transformers {VERSION} has it no more: pip install"
        f' "transformers<{VERSION}"'
    )
    assert "torch.nn.NoSuchLayer was used, but torch" in used(found["NoSuchLayer"])
    assert not hasattr(transformers, "NeverThere") and not hasattr(torch.nn, "NoSuchLayer")


def test_a_module_that_is_gone(tmp_path):
    """All ways to import it; the package itself stays what it is, and does not know of it."""
    found = run(
        tmp_path,
        """
        import transformers.nowhere
        import transformers.models.nowhere.deep
        import transformers.nowhere.deep as deep
        from transformers.nowhere import Thing
        from transformers.models import llama, nowhere
        """,
    )
    for thing in (
        found["transformers"].models.nowhere.deep,
        found["deep"].x,
        found["Thing"],
        found["nowhere"],
    ):
        assert f"transformers {VERSION} has it no more" in used(thing)
    assert found["transformers"].AutoConfig is transformers.AutoConfig
    assert found["transformers"].models.llama is found["llama"] is transformers.models.llama
    assert not hasattr(transformers, "nowhere") and not hasattr(transformers.models, "nowhere")
    assert not [name for name in sys.modules if "nowhere" in name]


def test_a_package_that_fails_at_import(tmp_path, package):
    """Whatever it raises: the error is told, when it is used."""
    package("fakebroken", "1.2", "raise RuntimeError('operator nms\\ndoes not exist')")
    package("fakeneeds", "3.4", "import nowhere_at_all")
    package(
        "fakelazy", "5.6", "def __getattr__(name): raise ModuleNotFoundError('needs vision', name='vision')"
    )
    found = run(tmp_path, "import fakebroken\nfrom fakeneeds import one\nfrom fakelazy import two")
    assert (
        "fakebroken 1.2 fails to import it (RuntimeError: operator nms does not exist); install what it asks"
        " for, or pip install" in used(found["fakebroken"].run)
    )
    assert "fakeneeds 3.4 fails to import it (ModuleNotFoundError: No module named 'nowhere_at_all')" in used(
        found["one"]
    )
    assert "fakelazy 5.6 fails to import it (ModuleNotFoundError: needs vision)" in used(found["two"])


def test_versions_are_those_of_pip(package):
    """A package may have another name there, or none."""
    package("sklearn", "9.9", pip="scikit_learn")
    assert (
        version_of("sklearn") == "9.9"
        and version_of("nowhere") is None
        and version_of("torch") == torch.__version__
    )


GUARDED = """
    def inner():
        try:
            {body}
        except {kind}:
            return "own way"
        return "answered"
    said = inner()
"""


@pytest.mark.parametrize(
    "body",
    [
        "import nowhere",
        "from nowhere import x",
        "from transformers import (\n                NeverThere,\n            )",
    ],
)
@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("ImportError", True),
        ("(OSError, ModuleNotFoundError)", True),
        ("Exception", True),
        ("KeyError", False),
    ],
)
def test_what_easyedit_catches_itself(tmp_path, body, kind, own):
    """An import in a `try` that catches its error keeps its own way."""
    if "transformers" in body and "ModuleNotFound" in kind:
        pytest.skip("a missing name is no ModuleNotFoundError")
    assert run(tmp_path, GUARDED.format(body=body, kind=kind))["said"] == ("own way" if own else "answered")


def test_in_a_try_and_beside_it(tmp_path):
    """Only the body of the `try` is guarded, not what its handler imports."""
    found = run(
        tmp_path,
        "try:\n    import nowhere\nexcept ImportError:\n    from elsewhere import nowhere\nif True:\n   "
        " import third",
    )
    assert "elsewhere.nowhere" in used(found["nowhere"]) and "pip install third" in used(found["third"].x)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("somebody.else", "import nowhere"),
        ("somebody.else", "from transformers import NeverThere"),
        ("easyeditors", "import nowhere"),
        ("easyeditor.models.probe", "from json import never_there"),
        ("easyeditor.models.probe", "import easyeditor.never_there"),
        ("easyeditor.editors.editor", "from torch.nn import NoSuchLayer"),
        ("easyeditor.util.hparams", "import yaml.nowhere"),
        (
            "easyeditor.editors.editor",
            "from transformers.nowhere import x\nfrom torch import nothing_like_it",
        ),
    ],
)
def test_what_is_not_answered_for(tmp_path, monkeypatch, name, source):
    """Other people's imports, Python's own modules, EasyEdit's own files, and what BaseEditor cannot do
    without.
    """
    monkeypatch.setitem(sys.modules, "easyeditor", types.ModuleType("easyeditor"))
    with pytest.raises(ImportError) as error:
        run(tmp_path, source, name)
    assert not isinstance(error.value, MissingPackageError)


def test_the_script_is_answered_too(tmp_path):
    """The script that is run, and no other file of the same name."""
    assert "nowhere" in run(tmp_path, "import nowhere", "__main__", (tmp_path / "probe.py").resolve())
    with pytest.raises(ImportError):
        run(tmp_path, "import nowhere", "__main__", (tmp_path / "other" / "probe.py").resolve())


def test_nothing_stays(tmp_path):
    """Python's import is put back, also after an error and where somebody wrapped it meanwhile; nested blocks
    too.
    """
    before, modules = builtins.__import__, set(sys.modules)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, "import nowhere\nwith open(__file__): 1 / 0")
    assert builtins.__import__ is before and set(sys.modules) <= modules | {"encodings.ascii"}
    with standins():
        outer = builtins.__import__
        run(tmp_path, "import nowhere")
        assert builtins.__import__ is outer
    with standins():
        ours = builtins.__import__
        builtins.__import__ = lambda *a, **k: ours(*a, **k)
    try:
        with pytest.raises(ImportError):
            exec("import nowhere", {"__name__": "easyeditor.late"})
    finally:
        builtins.__import__ = before


# ---- what works --------------------------------------------------------------------------------------------


def test_moved_names_work(tmp_path, monkeypatch):
    """Names that the wheel's BLIP-2 and the head's UnKE import: what is still there, and elsewhere, is the
    real function.
    """
    lines = [f"from {place} import {name}" for place, _, name in (dotted.rpartition(".") for dotted in MOVED)]
    found = run(tmp_path, "\n".join(lines))
    assert found["apply_chunking_to_forward"] is transformers.pytorch_utils.apply_chunking_to_forward
    assert found["prune_linear_layer"] is transformers.pytorch_utils.prune_linear_layer
    real = getattr(transformers.pytorch_utils, "find_pruneable_heads_and_indices", None)
    if real is None:
        assert 'has it no more: pip install "transformers<5"' in used(
            found["find_pruneable_heads_and_indices"]
        )
    else:
        assert found["find_pruneable_heads_and_indices"] is real
    monkeypatch.setitem(sys.modules, "transformers.modeling_attn_mask_utils", None)  # as from 5.24 on
    mask = run(
        tmp_path,
        "from transformers.modeling_attn_mask_utils import AttentionMaskConverter,"
        " _prepare_4d_causal_attention_mask",
    )
    assert mask["_prepare_4d_causal_attention_mask"] is causal_attention_mask
    assert 'pip install "transformers<5.24"' in used(mask["AttentionMaskConverter"])


def test_causal_mask_by_hand():
    """Two rows, the first padded on the left, one key in the past: 0 where a query may look, the least number
    elsewhere.
    """
    low, given = torch.finfo(torch.float16).min, torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    mask = causal_attention_mask(given, (2, 3), torch.zeros(2, 3, 5, dtype=torch.float16), 1)
    rows = [[[0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]], [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]]
    assert mask.dtype == torch.float16 and torch.equal(mask[:, 0] == 0, torch.tensor(rows, dtype=torch.bool))
    assert set(mask.unique().tolist()) == {0.0, low}
    plain = causal_attention_mask(None, (1, 2), torch.zeros(1, 2, 5), 0)
    assert torch.equal(plain, torch.tensor([[[[0.0, torch.finfo(torch.float32).min], [0.0, 0.0]]]]))


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_mask_is_that_of_transformers(past, dtype):
    """Equal values, where the installed transformers still has the function."""
    theirs = pytest.importorskip(
        "transformers.modeling_attn_mask_utils", reason="transformers 5.24 has it no more"
    )
    generator = torch.Generator().manual_seed(0)
    for batch, queries in ((1, 4), (3, 5), (2, 1)):
        padding = (torch.rand(batch, queries + past, generator=generator) > 0.3).long()
        embedded = torch.zeros(batch, queries, 2, dtype=dtype)
        expected = theirs._prepare_4d_causal_attention_mask(padding, (batch, queries), embedded, past)
        assert torch.equal(causal_attention_mask(padding, (batch, queries), embedded, past), expected)


class _Output:
    """An output of a transformers to come."""

    def __init__(self, cache: Any):
        self.cache = cache


class _Model(torch.nn.Module):
    def forward(self, ids: Any, cache: Any = None) -> _Output:
        """Knows the new name alone."""
        return _Output([*(cache or []), ids])


def test_the_old_name_of_the_cache():
    """EasyEdit calls with `past_key_values` and reads it from the output; a model that takes it is left
    alone.
    """
    model = _Model()
    for _ in range(2):
        understand_old_cache_name(model)
    assert len(model._forward_pre_hooks) == 1
    first = model(1, past_key_values=None)
    assert (
        model(2, past_key_values=first.past_key_values).cache == [1, 2] == model(2, cache=[1]).past_key_values
    )
    older = torch.nn.Linear(1, 1)
    understand_old_cache_name(older)
    understand_old_cache_name(None)
    assert not older._forward_pre_hooks
