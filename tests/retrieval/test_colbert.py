"""Exact MaxSim search is scoring every pair; search by centroids comes near and is exact with all of them."""

import numpy as np
import pytest
import torch

import hf_kd_ranking as kd
from hf_kd_ranking.retrieval.colbert import search_terms
from hf_kd_ranking.retrieval.vector_store import VectorStore, best_of


@pytest.fixture
def ranker(encoder, tokenizer) -> kd.Ranker:
    torch.manual_seed(1)
    settings = {"max_query_length": 8, "max_document_length": 16, "compression_dim": 6, "initializer_range": 0.1}
    return kd.Ranker(kd.ColBERT.from_encoder(encoder, **settings), tokenizer, batch_size=7)


@pytest.fixture
def index(ranker, documents, tmp_path) -> kd.ColBERTIndex:
    VectorStore.build(ranker, documents, tmp_path / "store")
    return kd.ColBERTIndex.open(tmp_path / "store", ranker)


def every_pair(ranker, documents, queries):
    texts = dict(documents.items())
    return {
        query_id: dict(zip(texts, ranker.score(query, list(texts.values())).tolist(), strict=True))
        for query_id, query in queries.items()
    }


def assert_near(run, scores, k):
    """The run has the best scores in their order, whichever of nearly equal documents come first."""
    for query_id, wanted in scores.items():
        best = sorted(wanted.values(), reverse=True)[:k]
        assert [score for _, score in run[query_id]] == pytest.approx(best, abs=1e-5)
        for doc_id, score in run[query_id]:
            assert score == pytest.approx(wanted[doc_id], abs=1e-5)


@pytest.mark.parametrize("k", [3, 500])
def test_exact_search_is_scoring_every_pair(index, ranker, documents, queries, k, monkeypatch):
    monkeypatch.setattr("hf_kd_ranking.retrieval.colbert.QUERIES_AT_ONCE", 5)
    chunks = index.store.chunks
    monkeypatch.setattr(index.store, "chunks", lambda: chunks(30))
    run = index.search(queries, k)
    assert_near(run, every_pair(ranker, documents, queries), k)
    assert {len(ranking) for ranking in run.values()} == {min(k, 41)}


def test_hand_computed_maxima_ties_and_a_document_without_terms():
    query = np.array([[1.0, 0.0], [0.0, 2.0]], dtype=np.float32)
    vectors = np.array([[1, 0], [0, 1], [3, -1], [1, 1], [1, 1]], dtype=np.float32)
    chunks = [(0, np.array([2, 0, 1]), vectors[:3]), (3, np.array([1, 1]), vectors[3:])]
    ((scores, rows),) = search_terms([query], chunks, 5)
    assert rows.tolist() == [0, 3, 4, 2, 1]
    assert scores.tolist() == [3.0, 3.0, 3.0, 1.0, -20_000.0]
    ((_, first), (scores, rows)) = search_terms([query, query[:1]], chunks, 2)  # each query by itself
    assert first.tolist() == [0, 3] and (scores.tolist(), rows.tolist()) == ([3.0, 1.0], [2, 0])
    assert best_of(np.array([1.0, 2.0, 2.0]), np.array([0, 5, 3]), 2)[1].tolist() == [3, 5]


def test_search_by_all_centroids_is_exact_and_by_few_finds_most(index, ranker, documents, queries):
    with pytest.raises(ValueError, match=r"has no centroids for a search with probes; call cluster\(\) once"):
        index.search(queries, probes=2)
    with pytest.raises(ValueError, match=r"100000 centroids of [\d,]+ vectors: "):
        index.cluster(100_000)
    index.cluster(8)
    opened = kd.ColBERTIndex.open(index.store.folder, ranker)
    pairs = every_pair(ranker, documents, queries)
    assert_near(opened.search(queries, 10, probes=8, candidates=41), pairs, 10)
    exact = opened.search(queries, 10)

    def recall(**settings):
        run = opened.search(queries, 10, **settings)
        return np.mean([len({d for d, _ in run[q]} & {d for d, _ in exact[q]}) / 10 for q in exact])

    few, more = recall(probes=1, candidates=12), recall(probes=4, candidates=24)
    assert 0.4 < few < more <= 1
    assert opened.search(queries, 10, probes=2) == index.search(queries, 10, probes=2)


@pytest.mark.parametrize(("storage", "loss"), [("float16", 1e-3), ("int8", 2e-2), ("IVF4,SQ8", 5e-2)])
def test_compressed_vectors_move_scores_little(index, ranker, documents, queries, tmp_path, storage, loss):
    if "IVF" in storage:
        small = kd.ColBERTIndex(ranker, index.store.compress(tmp_path / "small", storage))
    else:
        small = kd.ColBERTIndex.build(ranker, documents, tmp_path / "small", storage)
    wanted, found = index.search(queries, 41), small.search(queries, 41)
    for query_id in queries:
        scale = max(abs(score) for _, score in wanted[query_id])
        assert dict(found[query_id]) == pytest.approx(dict(wanted[query_id]), abs=loss * scale)
    assert small.store.bytes_per_document < index.store.bytes_per_document


def test_centroids_of_an_earlier_version_are_refused(index, ranker, documents):
    index.cluster(4)
    VectorStore.build(ranker, documents, index.store.folder, "float16", overwrite=True)
    with pytest.raises(ValueError, match="centroids is of an earlier version of the vectors"):
        kd.ColBERTIndex.open(index.store.folder, ranker)


def test_vectors_of_another_architecture_are_refused(documents, tokenizer, encoder, tmp_path):
    ranker = kd.Ranker(kd.TK.from_encoder(encoder, max_document_length=16), tokenizer)
    with pytest.raises(ValueError, match="has vectors of TK, MaxSim needs ColBERT's"):
        kd.ColBERTIndex.build(ranker, documents, tmp_path / "tk")
