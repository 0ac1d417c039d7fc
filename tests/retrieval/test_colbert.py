"""Exact MaxSim search equals scoring every pair; search with centroids comes near and is exact with all of them."""

import numpy as np
import pytest
import torch

import hf_kd_ranking as kd
from hf_kd_ranking.retrieval.base import best_of
from hf_kd_ranking.retrieval.colbert import search_tokens


@pytest.fixture
def ranker(encoder, tokenizer) -> kd.Ranker:
    torch.manual_seed(1)
    settings = {"max_query_length": 8, "max_document_length": 16, "compression_dim": 6, "initializer_range": 0.1}
    return kd.Ranker(kd.ColBERT.from_encoder(encoder, **settings), tokenizer, batch_size=7)


@pytest.fixture
def index(store) -> kd.ColBERTIndex:
    return kd.ColBERTIndex.build(store)


@pytest.fixture
def pairs(ranker, documents, queries) -> dict[str, dict[str, float]]:
    """The score of every document for every query."""
    texts, scores = dict(documents.items()), {}
    for query_id, query in queries.items():
        scores[query_id] = dict(zip(texts, ranker.score(query, list(texts.values())).tolist(), strict=True))
    return scores


def assert_near(run, scores, k):
    """The run has the best scores in their order, whichever of nearly equal documents come first."""
    for query_id, wanted in scores.items():
        best = sorted(wanted.values(), reverse=True)[:k]
        assert [score for _, score in run[query_id]] == pytest.approx(best, abs=1e-5)
        for doc_id, score in run[query_id]:
            assert score == pytest.approx(wanted[doc_id], abs=1e-5)


@pytest.mark.parametrize("k", [3, 500])
def test_colbert_exact_search_equals_scoring_every_pair(index, pairs, queries, k, monkeypatch):
    monkeypatch.setattr(kd.ColBERTIndex, "queries_at_once", 5)
    chunks = index.store.chunks
    monkeypatch.setattr(index.store, "chunks", lambda: chunks(30))
    run = index.search(queries, k)
    assert_near(run, pairs, k)
    assert {len(ranking) for ranking in run.values()} == {min(k, 41)}


def test_search_tokens_matches_hand_computed_maxima():
    query = np.array([[1.0, 0.0], [0.0, 2.0]], dtype=np.float32)
    vectors = np.array([[1, 0], [0, 1], [3, -1], [1, 1], [1, 1]], dtype=np.float32)
    chunks = [(0, np.array([2, 0, 1]), vectors[:3]), (3, np.array([1, 1]), vectors[3:])]
    ((scores, rows),) = search_tokens([query], chunks, 5)
    assert rows.tolist() == [0, 3, 4, 2, 1]
    assert scores.tolist() == [3.0, 3.0, 3.0, 1.0, -20_000.0]
    ((_, first), (scores, rows)) = search_tokens([query, query[:1]], chunks, 2)  # each query by itself
    assert first.tolist() == [0, 3] and (scores.tolist(), rows.tolist()) == ([3.0, 1.0], [2, 0])
    assert best_of(np.array([1.0, 2.0, 2.0]), np.array([0, 5, 3]), 2)[1].tolist() == [3, 5]


def test_colbert_centroids_find_most_and_all_of_them_everything(store, ranker, pairs, queries):
    with pytest.raises(ValueError, match="has no centroids to probe; build the index with centroids"):
        kd.ColBERTIndex.build(store).search(queries, probes=2)
    with pytest.raises(ValueError, match=r"100000 centroids of [\d,]+ vectors: "):
        kd.ColBERTIndex.build(store, centroids=100_000)
    index = kd.ColBERTIndex.build(store, store.folder, centroids=8)
    opened = kd.ColBERTIndex.open(store.folder, ranker)
    assert_near(opened.search(queries, 10, probes=8, candidates=41), pairs, 10)
    exact = opened.search(queries, 10)

    def recall(**settings):
        run = opened.search(queries, 10, **settings)
        return np.mean([len(dict(run[q]).keys() & dict(exact[q]).keys()) / 10 for q in exact])

    few, more = recall(probes=1, candidates=12), recall(probes=4, candidates=24)
    assert 0.4 < few < more <= 1
    assert opened.search(queries, 10, probes=2) == index.search(queries, 10, probes=2)


@pytest.mark.parametrize(("storage", "loss"), [("float16", 1e-3), ("int8", 2e-2), ("IVF4,SQ8", 5e-2)])
def test_colbert_compressed_vectors_move_scores_little(index, ranker, documents, queries, tmp_path, storage, loss):
    if "IVF" in storage:
        small = kd.ColBERTIndex.build(index.store.compress(tmp_path / "small", storage))
    else:
        small = kd.ColBERTIndex.build(kd.VectorStore.build(ranker, documents, tmp_path / "small", storage))
    wanted, found = index.search(queries, 41), small.search(queries, 41)
    for query_id in queries:
        scale = max(abs(score) for _, score in wanted[query_id])
        assert dict(found[query_id]) == pytest.approx(dict(wanted[query_id]), abs=loss * scale)
    assert small.store.bytes_per_document < index.store.bytes_per_document


def test_colbert_open_refuses_centroids_of_older_vectors(ranker, documents, store, tmp_path):
    assert len(kd.ColBERTIndex.build(store, centroids=0).centroids) == max(1, len(store.values) // 39)
    with pytest.raises(ValueError, match=r"is saved with its vectors in .*store, not in "):
        kd.ColBERTIndex.build(store, tmp_path / "elsewhere")
    kd.VectorStore.build(ranker, documents, store.folder, "float16", overwrite=True)
    with pytest.raises(ValueError, match="centroids was built from an earlier version of the vectors"):
        kd.ColBERTIndex.open(store.folder, ranker)


def test_interrupted_centroids_leave_the_vectors_searchable(ranker, store, queries, stop_at_write):
    stop_at_write(1)
    with pytest.raises(KeyboardInterrupt):
        kd.ColBERTIndex.build(store, centroids=4)
    opened = kd.ColBERTIndex.open(store.folder, ranker)
    assert opened.search(queries, 3) == kd.ColBERTIndex.build(store).search(queries, 3)
