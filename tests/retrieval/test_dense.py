"""Exact search is brute force to the last rank; approximate ones come near; ids may be filtered, added and removed."""

import os
from pathlib import Path

import faiss
import numpy as np
import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.retrieval.dense import search_index

MODEL = pytest.mark.parametrize("model", ["bert_dot"], indirect=True)


@pytest.fixture
def store(ranker, documents, tmp_path) -> kd.VectorStore:
    return kd.VectorStore.build(ranker, documents, tmp_path / "store")


def brute_force(ranker, documents, queries, without=()):
    """Scores in float64, rounded; ties in the order of the collection."""
    texts = {doc_id: text for doc_id, text in dict(documents.items()).items() if doc_id not in without}
    vectors = ranker.encode_documents(list(documents.texts.to_pylist()))  # encoded as the store was
    rows = documents.rows_of(list(texts))
    run = {}
    for query_id, query in zip(queries, ranker.encode_queries(list(queries.values())), strict=True):
        scores = (vectors[rows].astype(np.float64) @ query).astype(np.float32)
        run[query_id] = [(list(texts)[i], float(scores[i])) for i in np.lexsort((np.arange(len(scores)), -scores))]
    return run


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for query_id, ranking in wanted.items():
        scores = [score for _, score in ranking]
        assert [score for _, score in found[query_id]] == pytest.approx(scores, abs=2e-5)
        assert [doc_id for doc_id, _ in found[query_id]] == [doc_id for doc_id, _ in ranking]


@MODEL
@pytest.mark.parametrize("k", [1, 5, 41, 1000])
def test_exact_search_is_brute_force_to_the_last_rank(ranker, store, documents, queries, k):
    run = kd.DenseIndex.build(ranker, store).search(queries, k)
    assert isinstance(run, kd.Run)
    assert_same(run, {query_id: ranking[:k] for query_id, ranking in brute_force(ranker, documents, queries).items()})
    # "文書 same as 5" has the text of "d ü 5": where both are found they are tied, in the order of the collection.
    for ranking in run.values():
        ids = [doc_id for doc_id, _ in ranking]
        if "文書 same as 5" in ids:
            assert ids.index("文書 same as 5") == ids.index("d ü 5") + 1


def test_ties_at_the_cut_go_to_the_first_rows():
    vectors = np.ones((3000, 4), dtype=np.float32)
    vectors[[7, 2999]] += 1
    index = faiss.IndexFlatIP(4)
    index.add(vectors)
    ((scores, rows),) = search_index(index, np.ones((1, 4), dtype=np.float32), 20)
    assert rows.tolist() == [7, 2999, *range(7), *range(8, 19)]
    assert scores.tolist() == [8.0] * 2 + [4.0] * 18


@MODEL
@pytest.mark.parametrize("factory", ["Flat", "HNSW32", "IVF4,Flat", "IVF2,PQ4x4", "PCA8,IVF2,Flat"])
def test_every_factory_saves_filters_adds_and_removes(ranker, store, documents, queries, tmp_path, factory):
    built = kd.DenseIndex.build(ranker, store, factory)
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
    (tmp_path / "more.tsv").write_text("d ü 7\tapple cat\nnew one\tapple cat\n")
    more = kd.VectorStore.build(ranker, kd.TextStore.from_tsv(tmp_path / "more.tsv"), tmp_path / "more")
    index.add(more)
    index.save(tmp_path / "index", overwrite=True)
    again = kd.DenseIndex.open(tmp_path / "index", ranker)
    assert len(again) == 41
    ranking = dict(again.search({"q": "apple cat"}, 100)["q"])
    assert ranking.keys() == set(documents.ids()) - {"d ü 12"} | {"new one"}
    assert ranking["d ü 7"] == pytest.approx(ranking["new one"], abs=1e-6)
    if factory == "Flat":
        wanted = brute_force(ranker, documents, queries, without=("d ü 7", "d ü 12"))
        found = again.search(queries, 100, only=[doc_id for doc_id, _ in next(iter(wanted.values()))])
        assert_same(found, wanted)


@MODEL
def test_more_effort_finds_what_exact_search_finds(ranker, store, queries):
    exact = kd.DenseIndex.build(ranker, store).search(queries, 10)
    index = kd.DenseIndex.build(ranker, store, "IVF8,Flat")

    def recall(settings):
        index.tune(settings)
        run = index.search(queries, 10)
        return np.mean([len({d for d, _ in run[q]} & {d for d, _ in exact[q]}) / 10 for q in exact])

    assert recall("nprobe=1") < recall("nprobe=8") == 1.0


@MODEL
def test_what_cannot_be_searched_is_refused(ranker, store, documents, tmp_path, encoder, tokenizer, damage):
    index = kd.DenseIndex.build(ranker, store)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        index.search({"q": "cat"}, 0)
    with pytest.raises(ValueError, match=r"holds vectors of 16 values, got queries of \(2, 6\)"):
        index.search_vectors(np.zeros((2, 6), dtype=np.float32))
    with pytest.raises(KeyError, match="1 of 2 ids are not among the 41 documents of the index: 'gone'"):
        index.search({"q": "cat"}, only=["d ü 1", "gone"])
    with pytest.raises(ValueError, match=r"41 of the 41 ids of .*store are in the index already, 'd ü 0' first"):
        index.add(store)
    with pytest.raises(ValueError, match="Flat has no setting 'nprobe=3'"):
        index.tune("nprobe=3")
    with pytest.raises(ValueError, match="cannot build 'IVF9x' over 41 vectors"):
        kd.DenseIndex.build(ranker, store, "IVF9x")
    with pytest.raises(ValueError, match="cannot build 'IVF64,Flat' over 41 vectors"):
        kd.DenseIndex.build(ranker, store, "IVF64,Flat")
    index.save(tmp_path / "index")
    with pytest.raises(FileExistsError, match="index exists"):
        index.save(tmp_path / "index")
    other = kd.Ranker(kd.BertDot.from_encoder(encoder, pooling="mean", max_document_length=16), tokenizer)
    with pytest.raises(ValueError, match="another model"):
        kd.DenseIndex.open(tmp_path / "index", other)
    damage(tmp_path / "index" / "v1" / "dense.faiss")
    with pytest.raises(ValueError, match=r"dense\.faiss is damaged"):
        kd.DenseIndex.open(tmp_path / "index", ranker)
    index.remove(list(documents.ids()))
    assert index.search({"q": "cat"}) == {"q": []}
    with pytest.raises(KeyError, match="'d ü 7'"):
        index.search({"q": "cat"}, only=["d ü 7"])
    (tmp_path / "new.tsv").write_text("new\tcat\n")
    index.add(kd.VectorStore.build(ranker, kd.TextStore.from_tsv(tmp_path / "new.tsv"), tmp_path / "new"))
    assert [doc_id for doc_id, _ in index.search({"q": "cat"})["q"]] == ["new"]


@pytest.mark.parametrize("model", ["colbert"], indirect=True)
def test_vectors_of_terms_are_refused(ranker, store):
    with pytest.raises(ValueError, match=r"has a vector a term \(ColBERT\).*use ColBERTIndex, or StoredReranker"):
        kd.DenseIndex.build(ranker, store)


@pytest.mark.data
@pytest.mark.skipif("HF_KD_RANKING_DATA" not in os.environ, reason="needs the folder that HF_KD_RANKING_DATA names")
@pytest.mark.parametrize("name", ["vaswani", "nfcorpus", "scifact"])
def test_exact_search_of_real_collections_is_brute_force_to_the_last_rank(name):
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
    for query, (scores, rows) in zip(
        vectors(queries), search_index(index, vectors(queries), len(documents)), strict=True
    ):
        wanted = documents @ query
        order = np.lexsort((np.arange(len(wanted)), -wanted))
        assert np.array_equal(rows, order)
        assert np.array_equal(scores, wanted[order])
