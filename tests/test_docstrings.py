"""Every public name has an example in its docstring, which runs and shows what it returns."""

import doctest
import inspect

import pytest
import torch
from transformers import AutoTokenizer

import hf_kd_ranking as kd

NAMES = {"kd": kd, "torch": torch, "AutoTokenizer": AutoTokenizer}
EXTRAS = {"MtebEncoder": "mteb", "MtebRanker": "mteb", "QdrantIndex": "qdrant_client"}
EXTRAS |= {"export_ranker": "sentence_transformers", "DenseIndex": "faiss", "ColBERTIndex": "faiss"}


@pytest.mark.parametrize("name", sorted(kd.__all__))
def test_example_of_a_public_name_is_true(name, workplace):
    if name in EXTRAS:
        pytest.importorskip(EXTRAS[name])
    _, heading, example = inspect.cleandoc(getattr(kd, name).__doc__).partition("\nExample:\n")
    assert heading, f"the docstring of {name} has no example"
    assert len(example.splitlines()) <= 7, "an example is short"
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner, printed = doctest.DocTestRunner(verbose=False, optionflags=options), []
    runner.run(doctest.DocTestParser().get_doctest(example, dict(NAMES), name, None, None), out=printed.append)
    assert runner.tries > 0
    assert not printed, "".join(printed)
