"""Exact search equals brute force to the last rank, approximate search comes near; ids may be filtered and changed."""

import os
from pathlib import Path

import faiss
import numpy as np
import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.retrieval.dense import search_index

MODEL = pytest.mark.parametrize("model", ["bert_dot"], indirect=True)


def brute_force(ranker, documents, queries, without=()):
    """Scores in float64, rounded; ties in the order of the collection."""
    texts = dict(documents.items())
    for doc_id in without:
        del texts[doc_id]
    vectors = ranker.encode_documents(list(documents.texts.to_pylist()))  # encoded as the store was
    rows = documents.rows_of(list(texts))
    ids, run = list(texts), {}
    for query_id, query in zip(queries, ranker.encode_queries(list(queries.values())), strict=True):
        scores = (vectors[rows].astype(np.float64) @ query).astype(np.float32)
        run[query_id] = [(ids[i], float(scores[i])) for i in np.argsort(-scores, kind="stable")]
    return run


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for query_id, ranking in wanted.items():
        scores = [score for _, score in ranking]
        assert [score for _, score in found[query_id]] == pytest.approx(scores, abs=2e-5)
        assert [doc_id for doc_id, _ in found[query_id]] == [doc_id for doc_id, _ in ranking]


@MODEL
@pytest.mark.parametrize("k", [1, 5, 41, 1000])
def test_dense_exact_search_equals_brute_force(ranker, store, documents, queries, k):
    run = kd.DenseIndex.build(store).search(queries, k)
    assert isinstance(run, kd.Run)
    assert_same(run, {query_id: ranking[:k] for query_id, ranking in brute_force(ranker, documents, queries).items()})


def test_dense_ties_at_the_cut_go_to_the_first_rows():
    vectors = np.ones((3000, 4), dtype=np.float32)
    vectors[[7, 2999]] += 1
    index = faiss.IndexFlatIP(4)
    index.add(vectors)
    ((scores, rows),) = search_index(index, np.ones((1, 4), dtype=np.float32), 20)
    assert rows.tolist() == [7, 2999, *range(7), *range(8, 19)]
    assert scores.tolist() == [8.0] * 2 + [4.0] * 18


@MODEL
@pytest.mark.parametrize("factory", ["Flat", "HNSW32", "IVF4,Flat", "IVF2,PQ4x4", "PCA8,IVF2,Flat"])
def test_dense_factories_save_filter_add_and_remove(ranker, store, documents, queries, make_texts, tmp_path, factory):
    built = kd.DenseIndex.build(store, factory=factory)
    if "IVF" in factory:
        built.tune("nprobe=4")
    built.save(tmp_path / "index")
    index = kd.DenseIndex.open(tmp_path / "index", ranker)
    assert index.search(queries, 5) == built.search(queries, 5)
    only = ["d ü 7", "文書 same as 5", "d ü 11"]
    assert {doc_id for doc_id, _ in index.search({"q": "cat"}, 5, only=only)["q"]} == set(only)
    index.remove(["d ü 7", "d ü 12"])
    found = {doc_id for doc_id, _ in index.search({"q": "cat"}, 100)["q"]}
    assert (len(index), found) == (39, set(documents.ids()) - {"d ü 7", "d ü 12"})
    more = make_texts(("d ü 7", "apple cat"), ("new one", "apple cat"))
    index.add(kd.VectorStore.build(ranker, more, tmp_path / "more"))
    index.save(tmp_path / "index", overwrite=True)
    again = kd.DenseIndex.open(tmp_path / "index", ranker)
    assert len(again) == 41
    ranking = dict(again.search({"q": "apple cat"}, 100)["q"])
    assert ranking.keys() == set(documents.ids()) - {"d ü 12"} | {"new one"}
    assert ranking["d ü 7"] == pytest.approx(ranking["new one"], abs=1e-6)
    again.remove(["d ü 7"])  # its first row was removed before
    assert "d ü 7" not in again.ids and "new one" in again.ids
    assert "d ü 7" not in dict(again.search({"q": "apple cat"}, 100)["q"])
    if factory == "Flat":
        wanted = brute_force(ranker, documents, queries, without=("d ü 7", "d ü 12"))
        found = again.search(queries, 100, only=[doc_id for doc_id, _ in next(iter(wanted.values()))])
        assert_same(found, wanted)


@MODEL
def test_dense_recall_grows_with_the_probes(store, queries):
    exact = kd.DenseIndex.build(store).search(queries, 10)
    index = kd.DenseIndex.build(store, factory="IVF8,Flat")

    def recall(settings):
        index.tune(settings)
        run = index.search(queries, 10)
        return np.mean([len(dict(run[q]).keys() & dict(exact[q]).keys()) / 10 for q in exact])

    assert recall("nprobe=1") < recall("nprobe=8") == 1.0


@MODEL
def test_dense_search_refuses_bad_arguments(store):
    index = kd.DenseIndex.build(store)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        index.search({"q": "cat"}, 0)
    with pytest.raises(ValueError, match=r"holds vectors of 16 values, got queries of \(2, 6\)"):
        index.search_vectors(np.zeros((2, 6), dtype=np.float32))
    with pytest.raises(KeyError, match="1 of 2 ids are not among the 41 documents of the index: 'gone'"):
        index.search({"q": "cat"}, only=["d ü 1", "gone"])
    with pytest.raises(ValueError, match=r"41 of the 41 ids of .*store are in the index already, 'd ü 0' first"):
        index.add(store)
    with pytest.raises(ValueError, match="Flat does not have the setting 'nprobe=3'"):
        index.tune("nprobe=3")
    with pytest.raises(ValueError, match="cannot build 'IVF9x' over 41 vectors"):
        kd.DenseIndex.build(store, factory="IVF9x")
    with pytest.raises(ValueError, match="cannot build 'IVF64,Flat' over 41 vectors"):
        kd.DenseIndex.build(store, factory="IVF64,Flat")


@MODEL
def test_dense_open_refuses_other_models_and_damage(ranker, store, other_ranker, tmp_path, damage):
    index = kd.DenseIndex.build(store, tmp_path / "index")
    with pytest.raises(FileExistsError, match="index exists"):
        index.save(tmp_path / "index")
    with pytest.raises(ValueError, match="another model"):
        kd.DenseIndex.open(tmp_path / "index", other_ranker)
    damage(tmp_path / "index" / "v1" / "dense.faiss")
    with pytest.raises(ValueError, match=r"dense\.faiss is damaged"):
        kd.DenseIndex.open(tmp_path / "index", ranker)


@MODEL
def test_dense_index_may_be_emptied_and_filled(ranker, store, documents, make_texts, tmp_path):
    index = kd.DenseIndex.build(store)
    index.remove(list(documents.ids()))
    assert index.search({"q": "cat"}) == {"q": []}
    with pytest.raises(KeyError, match="'d ü 7'"):
        index.search({"q": "cat"}, only=["d ü 7"])
    index.add(kd.VectorStore.build(ranker, make_texts(("new", "cat")), tmp_path / "new"))
    assert [doc_id for doc_id, _ in index.search({"q": "cat"})["q"]] == ["new"]


@pytest.mark.data
@pytest.mark.skipif("HF_KD_RANKING_DATA" not in os.environ, reason="needs the folder that HF_KD_RANKING_DATA names")
@pytest.mark.parametrize("name", ["vaswani", "nfcorpus", "scifact"])
def test_dense_exact_search_of_real_collections(name):
    """Vectors of word hashes, small whole numbers: many ties, and no rounding."""
    folder = Path(os.environ["HF_KD_RANKING_DATA"]) / name
    texts, queries = (kd.TextStore.from_jsonl(folder / f"{part}.jsonl").texts for part in ("corpus", "queries"))

    def vectors(strings):
        found = np.zeros((len(strings), 64), dtype=np.float32)
        for row, text in enumerate(strings.to_pylist()):
            for word in text.lower().split():
                found[row, sum(word.encode()) % 64] += 1
        return found

    index, documents = faiss.IndexFlatIP(64), vectors(texts)
    index.add(documents)
    results = search_index(index, vectors(queries), len(documents))
    for query, (scores, rows) in zip(vectors(queries), results, strict=True):
        wanted = documents @ query
        order = np.argsort(-wanted, kind="stable")
        assert np.array_equal(rows, order)
        assert np.array_equal(scores, wanted[order])
