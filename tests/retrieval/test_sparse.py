"""Exact search of sparse vectors equals brute force to the last rank; stored vectors, filters, files and the verbs."""

import numpy as np
import pytest
import scipy.sparse

import hf_kd_ranking as kd
from hf_kd_ranking.retrieval import vector_store
from hf_kd_ranking.retrieval.base import open_index
from hf_kd_ranking.retrieval.sparse import InvertedLists

MODEL = pytest.mark.parametrize("model", ["splade"], indirect=True)


def brute_force(vectors, query, doc_ids):
    """Scores above zero in float64, rounded; ties in the order of the collection."""
    scores = (vectors.toarray().astype(np.float64) @ query).astype(np.float32)
    return [(doc_ids[row], float(scores[row])) for row in np.argsort(-scores, kind="stable") if scores[row] > 0]


@MODEL
@pytest.mark.parametrize("k", [1, 5, 1000])
def test_sparse_search_equals_brute_force(ranker, store, documents, queries, k, tmp_path):
    kd.SparseIndex.build(store, tmp_path / "index")
    run = kd.SparseIndex.open(tmp_path / "index", ranker).search(queries, k)
    vectors, doc_ids = store.take(np.arange(len(store))), list(store.ids())
    encoded = ranker.encode_documents(documents[doc_ids])
    np.testing.assert_allclose(vectors.toarray(), encoded.toarray(), atol=1e-5)
    for query_id, query in zip(queries, ranker.encode_queries(list(queries.values())).toarray(), strict=True):
        wanted = brute_force(vectors, query, doc_ids)[:k]
        assert [doc_id for doc_id, _ in run[query_id]] == [doc_id for doc_id, _ in wanted]
        assert [score for _, score in run[query_id]] == pytest.approx([score for _, score in wanted], abs=1e-5)
    assert sum(map(len, run.values())) > len(queries) / 2


@MODEL
def test_sparse_vectors_are_stored_in_blocks(ranker, store, documents, tmp_path, monkeypatch):
    monkeypatch.setattr(vector_store, "DOCUMENTS_PER_BLOCK", 9)
    blocks = kd.VectorStore.build(ranker, documents, tmp_path / "blocks")
    rows = np.array([40, 3, 3, 17])
    assert blocks.take(rows).toarray() == pytest.approx(store.take(rows).toarray(), abs=1e-5)
    assert blocks.matrix().nnz == len(blocks.words) == store.matrix().nnz and not blocks.has_token_vectors
    assert blocks.take(rows[:0]).shape == (0, 39)


def test_sparse_search_of_large_random_vectors_equals_brute_force():
    rng = np.random.default_rng(0)
    weights = np.where(rng.random((3000, 50)) < 0.1, rng.integers(1, 4, (3000, 50)), 0).astype(np.float32)
    queries = np.where(rng.random((20, 50)) < 0.2, rng.integers(-1, 3, (20, 50)), 0).astype(np.float32)
    for dtype in (np.float32, np.float16):
        lists = InvertedLists.build(scipy.sparse.csr_array(weights), dtype)
        for query, (scores, rows) in zip(queries, lists.search(scipy.sparse.csr_array(queries), 100), strict=True):
            wanted = weights @ query  # whole numbers: many ties
            order = [row for row in np.argsort(-wanted, kind="stable")[:100] if wanted[row] > 0]
            assert rows.tolist() == order and scores.tolist() == wanted[order].tolist()


@MODEL
def test_sparse_index_filters_adds_and_removes(ranker, store, make_texts, tmp_path):
    index = kd.SparseIndex.build(store)
    everything = dict(index.search({"q": "cat apple"}, 100)["q"])
    chosen = list(everything)[1:4]
    found = dict(index.search({"q": "cat apple"}, 100, only=chosen)["q"])
    assert found == {doc_id: everything[doc_id] for doc_id in chosen}
    index.remove(chosen[:2])
    index.save(tmp_path / "index")
    again = kd.SparseIndex.open(tmp_path / "index", ranker)
    assert len(again) == len(store) - 2
    assert dict(again.search({"q": "cat apple"}, 100)["q"]).keys() == everything.keys() - set(chosen[:2])
    assert set(dict(again.search({"q": "cat apple"}, 100, only=chosen[2:])["q"])) == {chosen[2]}
    again.add(
        kd.VectorStore.build(ranker, make_texts((chosen[0], "cat apple"), ("new one", "cat apple")), tmp_path / "new")
    )
    again.save(tmp_path / "index", overwrite=True)
    grown = kd.SparseIndex.open(tmp_path / "index", ranker)
    ranking = dict(grown.search({"q": "cat apple"}, 100)["q"])
    assert len(grown) == len(store) and ranking.keys() == everything.keys() - {chosen[1]} | {"new one"}
    assert ranking["new one"] == pytest.approx(ranking[chosen[0]], abs=1e-6)
    assert ranking[chosen[2]] == pytest.approx(everything[chosen[2]], abs=1e-6)
    with pytest.raises(ValueError, match=r"41 of the 41 ids of .*store are in the index already"):
        kd.SparseIndex.build(store).add(store)
    with pytest.raises(KeyError, match=r"are not among the .* documents of the index"):
        again.search({"q": "cat"}, only=chosen)


@MODEL
def test_fewer_query_words_approach_the_exact_result(store, queries):
    index = kd.SparseIndex.build(store)
    exact = index.search(queries, 10)

    def recall(count):
        run = index.search(queries, 10, query_words=count)
        return np.mean([len(dict(run[q]).keys() & dict(exact[q]).keys()) / len(exact[q]) for q in exact if exact[q]])

    assert recall(1) < recall(39) == 1
    with pytest.raises(ValueError, match="query_words must be at least 1, or None for all, got 0"):
        index.search(queries, query_words=0)


@MODEL
def test_sparse_index_refuses_other_models_damage_and_dimensions(ranker, store, other_ranker, tmp_path, damage):
    index = kd.SparseIndex.build(store, tmp_path / "index")
    with pytest.raises(ValueError, match=r"holds vectors over 39 words, got queries of \(1, 40\)"):
        index.search_vectors(scipy.sparse.csr_array((1, 40), dtype=np.float32))
    with pytest.raises(ValueError, match="another model"):
        kd.SparseIndex.open(tmp_path / "index", other_ranker)
    with pytest.raises(ValueError, match=r"DenseIndex cannot search .* use SparseIndex"):
        kd.DenseIndex.build(store)
    with pytest.raises(ValueError, match="are sparse, which faiss cannot compress"):
        store.compress(tmp_path / "codes", "PQ4")
    with pytest.raises(ValueError, match="weights of sparse vectors are stored in float32 or float16, got 'int8'"):
        kd.VectorStore.build(ranker, kd.TextStore.open, tmp_path / "int8", storage="int8")
    damage(tmp_path / "index" / "v1" / "weights.npy")
    with pytest.raises(ValueError, match=r"weights\.npy is damaged"):
        kd.SparseIndex.open(tmp_path / "index", ranker)


@MODEL
def test_open_index_finds_the_index_in_a_store(ranker, store, documents, queries, make_texts, tmp_path):
    wanted = kd.SparseIndex.build(store).search(queries, 5)
    assert open_index(store.folder, ranker).search(queries, 5) == wanted
    kd.SparseIndex.build(store).save(store.folder / "sparse")
    assert open_index(store.folder, ranker).search(queries, 5) == wanted
    assert open_index(store.folder / "sparse", ranker).search(queries, 5) == wanted
    assert open_index(store.folder / "sparse", ranker, exact=True).search(queries, 5) == wanted  # it is exact
    with pytest.raises(ValueError, match="--probes is for a ColBERT index"):
        open_index(store.folder, ranker, probes=3)
    kd.VectorStore.build(ranker, make_texts(("a", "cat")), store.folder, overwrite=True)
    with pytest.raises(ValueError, match="built from an earlier version of the vectors"):
        open_index(store.folder, ranker)


@MODEL
def test_evaluator_retrieves_as_the_index(ranker, store, documents, queries, toy):
    qrels = {query_id: {"d ü 1": 1} for query_id in queries}
    texts = kd.TextStore.from_tsv(toy / "queries.tsv")
    found = kd.RetrievalEvaluator(qrels, texts, documents, k=7).retrieve(ranker)
    wanted = kd.SparseIndex.build(store).search(queries, 7)
    for query_id, ranking in wanted.items():
        assert dict(found[query_id]) == pytest.approx(dict(ranking), abs=1e-5)


@MODEL
def test_verbs_index_and_search_sparse_vectors(call, model, tokenizer, toy, tmp_path):
    kd.Ranker(model, tokenizer).save_pretrained(tmp_path / "splade")
    common = f"--model {tmp_path}/splade --output {tmp_path}"
    status, out, error = call(f"index {common}/index --collection {toy}/collection.tsv --storage float16 --json")
    assert status == 0 and '"bytes_per_document"' in out, error
    search = f"search {common}/run.trec --index {tmp_path}/index --queries {toy}/queries.tsv --k 5"
    status, _, error = call(search)
    assert status == 0, error
    run = kd.read_run(tmp_path / "run.trec")
    ranker = kd.Ranker.from_pretrained(tmp_path / "splade", device="cpu")
    wanted = open_index(tmp_path / "index", ranker).search(dict(kd.TextStore.from_tsv(toy / "queries.tsv").items()), 5)
    for query_id, ranking in run.items():
        assert [doc_id for doc_id, _ in ranking] == [doc_id for doc_id, _ in wanted[query_id]]
    assert (tmp_path / "index" / "sparse").is_dir() and len(run) > 8
    status, _, error = call(f"index {common}/dense --collection {toy}/collection.tsv --factory Flat")
    assert status == 2 and "--factory is for a ranker with one vector per text" in error
