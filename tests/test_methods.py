"""What every method's entry in the table says, and what its hyperparameters refuse, whatever the method."""

from __future__ import annotations

import dataclasses

import pytest

from easyedit_mdm import load_hparams
from easyedit_mdm.editing import METHODS
from easyedit_mdm.errors import HyperParameterError, UnknownNameError

# name: (EasyEdit's counterpart, writes several facts at once, remembers the keys of a sequence)
TABLE = {
    "ROME_MDM": ("ROME", False, False),
    "R-ROME_MDM": ("R-ROME", False, False),
    "MEMIT_MDM": ("MEMIT", True, True),
    "EMMET_MDM": ("EMMET", True, True),
    "AlphaEdit_MDM": ("AlphaEdit", True, True),
    "FT_MDM": ("FT", True, False),
    "LORA_MDM": ("LoRA", True, False),
    "IKE_MDM": ("ROME", True, False),  # for IKE, EasyEdit's runners ask for sentence embeddings
    "GRACE_MDM": ("GRACE", True, False),
    "WISE_MDM": ("WISE", True, False),
    "TimeROME-style": ("ROME", True, False),
}
OPTIMISES_VALUES = {"ROME_MDM", "R-ROME_MDM", "MEMIT_MDM", "EMMET_MDM", "AlphaEdit_MDM", "TimeROME-style"}


def test_the_table():
    """Names, counterparts, and what each can do."""
    methods = {name: METHODS[name] for name in METHODS}
    assert {name: (m.stands_for, m.batchable, m.sequential) for name, m in methods.items()} == TABLE
    assert {name for name, m in methods.items() if m.values is not None} == OPTIMISES_VALUES


@pytest.mark.parametrize("name", list(TABLE))
def test_shipped_files_are_refused_with_one_bad_value(name):
    """Each class checks what all have in common, its own checks notwithstanding."""
    hparams = load_hparams(f"{name}/twin-llada")
    for change, says in (
        ({"seed": -1}, "seed=-1"),
        ({"alg_name": "ROME"}, "ROME"),
        ({"decode": {"steps": 0}}, "steps"),
        ({"guard": {"nothing": 1}}, "nothing"),
    ):
        with pytest.raises((HyperParameterError, UnknownNameError)) as caught:
            dataclasses.replace(hparams, **change)
        assert says in str(caught.value)
    if hasattr(hparams, "batch_size"):
        with pytest.raises(HyperParameterError, match="batch_size=0"):
            dataclasses.replace(hparams, batch_size=0)


@pytest.mark.parametrize("name", list(TABLE))
def test_advice(name):
    """What to try where a fact was not written: a sentence that names a field of the method's file."""
    hparams = load_hparams(f"{name}/twin-llada")
    advice = hparams.advice(1.0)
    fields = {field.name for field in dataclasses.fields(hparams)}
    assert advice.strip() and any(name in advice for name in (*fields, "layer"))
