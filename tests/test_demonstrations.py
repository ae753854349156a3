"""IKE_MDM's demonstrations from a pool. What needs sentence-transformers runs in `make ike-test`."""

from __future__ import annotations

import importlib
import json
import os
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from easyedit_mdm import make_edit
from easyedit_mdm.editing.demonstrations import nearest, pool_texts
from easyedit_mdm.editing.methods import METHODS
from easyedit_mdm.errors import HyperParameterError, MissingPackageError
from easyedit_mdm.host import import_easyedit

POOL = [
    {
        "prompt": "The river of Anna is", "target_new": "the red river",
        "rephrase_prompt": "Anna has a river:", "locality_prompt": "The song of Ben is",
        "locality_ground_truth": "old",
    },
    {"src": "What is the  song of Ben? ", "alt": "new", "rephrase": "Ben's song is what?",
     "loc": "the sea is", "loc_ans": "deep"},
    {"src": "What is empty?", "alt": "", "rephrase": "Empty is what?", "loc": "a is", "loc_ans": "b"},
    {"prompt": "The mother tongue of Leonora is", "target_new": "French",
     "rephrase_prompt": ["Leonora speaks"]},
]  # fmt: skip
FACT, LEAD = "New Fact: {prompt} {target}\n", "Prompt: "
REQUEST = {"prompt": "The river of Anna is", "subject": "Anna", "target_new": "red river"}


@pytest.fixture
def pool(tmp_path):
    """A pool of three records."""
    (tmp_path / "pool.json").write_text(json.dumps(POOL))
    return str(tmp_path / "pool.json")


def settings(**changes):
    """IKE_MDM's hyperparameters for a tiny model."""
    return METHODS["IKE_MDM"].hparams(alg_name="IKE_MDM", model_name="tiny", **changes)


def test_the_texts_of_a_pool(pool):
    """Each record's fact, paraphrase and neighbour, under EasyEdit's names and zsRE's, spaces as they are;
    none of a record without a target.
    """
    texts = pool_texts(pool, FACT, LEAD)
    assert len(texts) == 8
    assert texts[0] == (
        "New Fact: The river of Anna is the red river\nPrompt: The river of Anna is the red river\n\n"
    )
    assert texts[2] == "New Fact: The river of Anna is the red river\nPrompt: The song of Ben is old\n\n"
    assert texts[4] == "New Fact: What is the  song of Ben?  new\nPrompt: Ben's song is what? new\n\n"
    assert texts[7].endswith("Prompt: Leonora speaks French\n\n")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "no list of records"),
        ('{"prompt": "a"}', "no list of records"),
        ('[{"prompt": "a"}]', "record 0: it needs a prompt and a target_new"),
        ('[{"prompt": "a", "target_new": 3}]', "record 0"),
    ],
)
def test_bad_pools(tmp_path, text, says):
    """The file, and what is wrong with it."""
    file = tmp_path / "pool.json"
    file.write_text(text)
    with pytest.raises(HyperParameterError, match=says) as caught:
        pool_texts(str(file), FACT, LEAD)
    assert str(file) in str(caught.value)
    with pytest.raises(HyperParameterError, match="cannot be read"):
        pool_texts(str(tmp_path / "none.json"), FACT, LEAD)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"demonstration_pool": "a.json"}, "go together"),
        ({"sentence_model_name": "a"}, "go together"),
        ({"k": 0}, "k=0"),
        (
            {
                "demonstration_pool": "a.json", "sentence_model_name": "a",
                "demonstration": "{prompt} {target}",
            },
            "said by fact and",
        ),
        (
            {
                "demonstration_pool": "a.json", "sentence_model_name": "a",
                "demonstrations": [{"prompt": "a", "target_new": "b"}],
            },
            "both given",
        ),
    ],
)  # fmt: skip
def test_bad_settings(change, says):
    """Each names what contradicts."""
    with pytest.raises(HyperParameterError, match=says):
        settings(**change)


@pytest.mark.skipif(find_spec("sentence_transformers") is not None, reason="the package is here")
def test_without_the_package(tiny, pool):
    """One line that says what to install."""
    with pytest.raises(MissingPackageError, match="pip install 'sentence-transformers"):
        make_edit(tiny("llada"), REQUEST, settings(demonstration_pool=pool, sentence_model_name="any"))


# ---- with sentence-transformers ----------------------------------------------------------------------------

with_package = pytest.mark.skipif(
    find_spec("sentence_transformers") is None, reason="sentence-transformers is not here: make ike-test"
)


@pytest.fixture
def sentence_model(tmp_path):
    """A random BERT of two layers as a model of sentence embeddings; its letters are its tokens."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path / "sentences"
    folder.mkdir()
    letters = [chr(i) for i in range(33, 127)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(tokens))
    BertTokenizer(str(folder / "vocab.txt"), do_lower_case=False).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokens), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=256,
    )  # fmt: skip
    BertModel(config).eval().save_pretrained(folder)
    return str(folder)


@with_package
@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_same_as_easyedit(sentence_model, tmp_path, k):
    """The texts that EasyEdit's IKE chooses, in its order."""
    if os.environ.get("ORACLE_FORM") != "head":
        pytest.skip("PyPI's wheel runs IKE on a GPU alone: make ike-test with EASYEDIT_HOME set")
    import_easyedit()
    main = importlib.import_module("easyeditor.models.ike.ike_main")
    util = importlib.import_module("easyeditor.models.ike.util")
    from sentence_transformers import SentenceTransformer

    named = ("prompt", "target_new", "rephrase_prompt", "locality_prompt", "locality_ground_truth")
    theirs = [POOL[0], dict(zip(named, POOL[1].values()))]
    file = tmp_path / "whole.json"
    file.write_text(json.dumps(theirs))
    hparams = SimpleNamespace(
        device="cpu", use_icl_examples=True, sentence_model_name=sentence_model, results_dir=str(tmp_path),
        alg_name="IKE", k=k,
    )  # fmt: skip
    util.encode_ike_facts(SentenceTransformer(sentence_model, device="cpu"), theirs, hparams)
    wanted = main.apply_ike_to_model(None, None, REQUEST, hparams, train_ds=theirs)
    query = "New Fact: The river of Anna is red river\nPrompt: The river of Anna is\n\n"
    found = nearest([query], str(file), sentence_model, k, FACT, LEAD, "cpu")
    assert found == wanted and len(found) == k


@with_package
def test_the_demonstrations_stand_before_the_fact(tiny, pool, sentence_model, tokenizer):
    """The edit's tokens are the chosen texts', in their order; more of them cost more tokens."""
    model = tiny("llada")
    given = {"demonstration_pool": pool, "sentence_model_name": sentence_model}
    two, five = (make_edit(model, REQUEST, settings(k=k, **given)) for k in (2, 5))
    query = "New Fact: The river of Anna is red river\nPrompt: The river of Anna is\n\n"
    texts = "".join(nearest([query], pool, sentence_model, 2, FACT, LEAD, "cpu"))
    shown = two.attached[0].tensors["demonstrations"]
    assert shown.tolist() == tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert two.card["context_tokens"] < five.card["context_tokens"]


@with_package
def test_of_several_facts_the_nearest_counts(pool, sentence_model):
    """Texts that are the queries themselves come first."""
    texts = pool_texts(pool, FACT, LEAD)
    found = nearest([texts[6], texts[3]], pool, sentence_model, 2, FACT, LEAD, "cpu")
    assert set(found) == {texts[6], texts[3]}


@with_package
def test_a_sentence_model_that_is_not_there(tiny, pool, tmp_path):
    """Its name, and what to give."""
    missing = str(tmp_path / "none")
    with pytest.raises(HyperParameterError, match="sentence_model_name") as caught:
        make_edit(tiny("llada"), REQUEST, settings(demonstration_pool=pool, sentence_model_name=missing))
    assert missing in str(caught.value)
