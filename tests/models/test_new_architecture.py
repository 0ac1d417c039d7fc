"""A new architecture is one file and one call of `register_ranker`: everything else works with it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, pipeline

import hf_kd_ranking as kd
from hf_kd_ranking.models import ARCHITECTURES, register_ranker
from hf_kd_ranking.retrieval.stored_reranker import score_stored

QUERY = "what is bread"
DOCUMENTS = ["moon", "bread apple iron", "", "house of the king under the lake"]
LENGTHS = {"max_query_length": 8, "max_document_length": 16}
# Prints a score where the architecture is not registered; its code comes from the checkpoint.
ELSEWHERE = """
import sys
from transformers import AutoModel, AutoTokenizer
import hf_kd_ranking

folder = sys.argv[1]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
print(hf_kd_ranking.Ranker(model, tokenizer).score("what is bread", ["bread apple iron"])[0])
"""


@pytest.fixture
def ranker(toy_architecture, encoder, tokenizer) -> kd.Ranker:
    return kd.Ranker(kd.load_ranker(encoder, "toy", **LENGTHS), tokenizer, batch_size=3)


@pytest.fixture
def folder(ranker, tmp_path) -> Path:
    ranker.save_pretrained(tmp_path / "toy")
    return tmp_path / "toy"


def mean_of_words(ranker: kd.Ranker, text: str) -> np.ndarray:
    table = ranker.model.embeddings.weight.detach().numpy()
    return table[ranker.tokenizer(text)["input_ids"]].mean(0)


def test_scores_are_dot_products_of_mean_embeddings(ranker):
    vectors = [mean_of_words(ranker, document) for document in DOCUMENTS]
    wanted = np.stack(vectors) @ mean_of_words(ranker, QUERY)
    assert wanted.std() > 0.01, "scores too alike to tell a change"
    np.testing.assert_allclose(ranker.score(QUERY, DOCUMENTS), wanted, rtol=1e-5, atol=1e-5)


def test_vectors_are_encoded_and_score_when_stored(ranker):
    stored, query = ranker.encode_documents(DOCUMENTS), ranker.encode_queries([QUERY])[0]
    assert (stored.shape, query.shape) == ((len(DOCUMENTS), 16), (16,))
    scores = score_stored(ranker.model, query, stored)
    np.testing.assert_allclose(scores, ranker.score(QUERY, DOCUMENTS), rtol=1e-5, atol=1e-5)


def test_saved_checkpoint_loads_as_its_class(ranker, folder, toy_architecture):
    for load in (kd.load_ranker, toy_architecture.from_pretrained, AutoModel.from_pretrained):
        assert type(load(folder)) is toy_architecture
    assert kd.load_ranker(folder, "toy", max_query_length=5).config.max_query_length == 5
    again = kd.Ranker.from_pretrained(folder, device="cpu")
    np.testing.assert_array_equal(again.score(QUERY, DOCUMENTS), ranker.score(QUERY, DOCUMENTS))


def test_checkpoint_of_the_toy_is_no_other_architecture(folder):
    with pytest.raises(ValueError, match="is a Toy checkpoint, not BERT_Dot: load_ranker"):
        kd.BertDot.from_pretrained(folder)
    with pytest.raises(ValueError, match="is a Toy checkpoint, not 'bert_dot'; leave the architecture out"):
        kd.load_ranker(folder, "bert_dot")


def test_capabilities_are_those_of_the_config(ranker):
    config = ranker.model.config
    assert config.is_storable and config.is_searchable and not config.joins_texts
    assert (config.vectors_per_text, config.similarity) == ("one", "dot")
    assert (ranker.processor.max_query_length, ranker.processor.query_augmentation) == (8, 0)


def test_pipeline_ranks_as_rerank(ranker, folder):
    ranking = pipeline("text-ranking", model=str(folder))({"query": QUERY, "documents": DOCUMENTS})
    wanted = ranker.rerank(QUERY, DOCUMENTS)
    assert [item["index"] for item in ranking] == [index for index, _ in wanted]
    assert [item["score"] for item in ranking] == pytest.approx([score for _, score in wanted], abs=1e-5)


def test_checkpoint_ships_the_code(ranker, folder, tmp_path):
    caches = {"HF_HOME": str(tmp_path / "cache"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    paths = {"PYTHONPATH": str(Path(kd.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(folder)],
        cwd=tmp_path,
        env=os.environ | caches | paths,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert float(result.stdout) == pytest.approx(ranker.score(QUERY, ["bread apple iron"])[0], abs=1e-5)


def test_a_taken_name_or_model_type_is_refused(toy_architecture):
    with pytest.raises(ValueError, match=r"The architecture 'toy' \(BERT_Dot\) is taken by"):
        register_ranker("toy", kd.BertDot)
    with pytest.raises(ValueError, match=r"The architecture 'another' \(Toy\) is taken by Toy"):
        register_ranker("another", toy_architecture)
    assert "another" not in ARCHITECTURES


def test_registration_ends_with_the_test():
    assert list(ARCHITECTURES) == ["bert_cat", "bert_dot", "colbert", "prettr", "splade", "tk", "tkl"]
    with pytest.raises(ValueError, match="Unrecognized model identifier"):
        AutoConfig.for_model("Toy")
    assert kd.BertCatConfig in AutoModelForSequenceClassification._model_mapping
