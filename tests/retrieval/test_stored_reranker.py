"""Re-ranking from the store equals re-ranking from texts."""

import numpy as np
import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.evaluation.rerank import rerank_run

STORING = ("bert_dot", "colbert", "colbert-normalized", "prettr", "prettr-compressed", "splade", "tk", "tkl")


@pytest.fixture
def candidates(documents, queries) -> kd.Run:
    ids = list(dict(documents.items()))
    return kd.Run(
        {query_id: [(ids[(7 * i + j) % 41], -float(j)) for j in range(12)] for i, query_id in enumerate(queries)}
    )


@pytest.mark.parametrize("model", STORING, indirect=True)
def test_stored_reranker_ranks_as_texts_do(ranker, documents, queries, candidates, tmp_path):
    kd.VectorStore.build(ranker, documents, tmp_path / "store")
    ranker.model.train()  # a store is for use
    found = kd.StoredReranker.open(tmp_path / "store", ranker).rerank(candidates, queries)
    (tmp_path / "queries.tsv").write_text("".join(f"{i}\t{text}\n" for i, text in queries.items()))
    wanted = rerank_run(ranker, candidates, kd.TextStore.from_tsv(tmp_path / "queries.tsv"), documents)
    assert found.keys() == wanted.keys()
    for query_id, ranking in wanted.items():
        scale = max(abs(score) for _, score in ranking)
        assert dict(found[query_id]) == pytest.approx(dict(ranking), abs=1e-5 * max(scale, 1))
        if len({round(score, 3) for _, score in ranking}) == 12:
            assert [doc_id for doc_id, _ in found[query_id]] == [doc_id for doc_id, _ in ranking]


@pytest.mark.parametrize("model", ["prettr", "tk", "colbert"], indirect=True)
@pytest.mark.parametrize(("storage", "loss"), [("float16", 2e-3), ("int8", 3e-2)])
def test_stored_reranker_small_storages_move_scores_little(ranker, documents, queries, tmp_path, storage, loss):
    stores = [kd.VectorStore.build(ranker, documents, tmp_path / name, name) for name in ("float32", storage)]
    ids = list(documents.ids())
    wanted, found = (kd.StoredReranker(store).score("cat of the river", ids) for store in stores)
    assert 0 < np.abs(found - wanted).max() < loss * np.abs(wanted).max()
    assert stores[1].values.nbytes < stores[0].values.nbytes


@pytest.mark.parametrize("model", ["tk"], indirect=True)
def test_stored_reranker_scores_documents_without_tokens(ranker, make_texts, tmp_path):
    documents = make_texts(("empty", ""), ("full", "cat dog"))
    store = kd.VectorStore.build(ranker, documents, tmp_path / "store")
    assert [len(vectors) for vectors in store.take([0, 1])] == [0, 2]
    for ids in (["empty", "full"], ["empty"]):
        wanted = ranker.score("cat", documents[ids])
        assert kd.StoredReranker(store).score("cat", ids) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("model", ["tk"], indirect=True)
def test_stored_reranker_refuses_unknown_ids_and_other_models(ranker, documents, tmp_path, encoder, tokenizer):
    store = kd.StoredReranker(kd.VectorStore.build(ranker, documents, tmp_path / "store", "float16"))
    with pytest.raises(KeyError, match=r"1 of 2 ids are not among the 41 documents of .*store: 'gone'"):
        store.rerank(kd.Run({"q": [("gone", 1.0), ("d ü 1", 0.5)]}), {"q": "cat"})
    other = kd.Ranker(kd.TK.from_encoder(encoder, max_document_length=16), tokenizer)
    with pytest.raises(ValueError, match="another model"):
        kd.StoredReranker.open(tmp_path / "store", other)


@pytest.mark.parametrize("model", STORING[:3], indirect=True)
def test_stored_reranker_of_nothing_gives_empty_rankings(ranker, store, monkeypatch):
    reranker = kd.StoredReranker(store)
    assert reranker.rerank({}, {}) == {}
    assert reranker.rerank({"q": [], "r": {}}, {"q": "cat", "r": "dog"}) == {"q": [], "r": []}
    found = reranker.rerank({"q": [], "r": {"d ü 1": 1.0, "d ü 2": 2.0}}, {"q": "cat", "r": "dog"})
    assert (found["q"], {doc_id for doc_id, _ in found["r"]}) == ([], {"d ü 1", "d ü 2"})
    assert reranker.score("cat", []).shape == (0,)
    monkeypatch.setattr(ranker, "encode_queries", lambda _: pytest.fail("encoded before all ids were looked up"))
    with pytest.raises(KeyError, match="Query 'q' of the candidates has no text"):
        reranker.rerank({"r": [("d ü 1", 1.0)], "q": [("d ü 1", 1.0)]}, {"r": "dog"})
    with pytest.raises(KeyError, match="'gone'"):
        reranker.rerank({"r": [("d ü 1", 1.0)], "q": [("gone", 1.0)]}, {"r": "dog", "q": "cat"})
