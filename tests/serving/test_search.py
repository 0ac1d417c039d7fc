"""The search of a query: the same scores as everywhere else, with ranks, times and parts."""

import pytest

import hf_kd_ranking as kd
from hf_kd_ranking import artifacts
from hf_kd_ranking.retrieval.base import open_index
from hf_kd_ranking.retrieval.fusion import fuse_runs
from hf_kd_ranking.serving.search import LONGEST_TEXT, SHOWN, RankerSearch, SearchEngine, build_engine

QUERY = "the apple and bread"


@pytest.fixture
def store(ranker, documents, tmp_path) -> kd.VectorStore:
    return kd.VectorStore.build(ranker, documents, tmp_path / "index")


def test_search_equals_rerank_of_the_candidates(ranker, documents, bm25, make_engine):
    results = make_engine(a=ranker).search(QUERY)
    candidates = [doc_id for doc_id, _ in bm25.search({"q": QUERY}, 20)["q"]]
    expected = ranker.rerank(QUERY, documents[candidates], SHOWN)
    (ranking,) = results.rankings
    assert results.candidates == len(candidates) > SHOWN
    assert [hit.doc_id for hit in ranking.hits] == [candidates[i] for i, _ in expected]
    scores = [score for _, score in expected]
    assert [hit.score for hit in ranking.hits] == pytest.approx(scores, rel=1e-4, abs=1e-4)
    assert [hit.first_rank for hit in ranking.hits] == [i + 1 for i, _ in expected]
    texts = documents[[hit.doc_id for hit in ranking.hits]]
    assert ["".join(part.text for part in hit.parts) for hit in ranking.hits] == texts
    has_marks = any(part.strength for hit in ranking.hits for part in hit.parts)
    assert has_marks == (ranker.model.config.token_similarity is not None)
    stages = ["scoring"]
    if ranker.model.config.is_storable:
        stages = ["query encoding", "passage encoding", "scoring"]
    assert list(ranking.stages_ms) == stages
    assert all(ms > 0 for ms in (results.first_stage_ms, *ranking.stages_ms.values()))


def test_fused_search_adds_the_scores_of_bm25(ranker, documents, bm25):
    search = RankerSearch(ranker, documents, is_fused=True)
    first = bm25.search({"q": QUERY}, 20)
    ids = [doc_id for doc_id, _ in first["q"]]
    scores = ranker.score(QUERY, documents[ids]).tolist()
    own = kd.Run({"q": sorted(zip(ids, scores, strict=True), key=lambda pair: -pair[1])})
    expected = dict(fuse_runs([own, first], "weighted_sum")["q"])
    hits = SearchEngine({"a": search}, bm25, k=20).search(QUERY).rankings[0].hits
    assert [hit.score for hit in hits] == pytest.approx(sorted(expected.values(), reverse=True)[:SHOWN], abs=1e-4)
    assert [hit.score for hit in hits] == pytest.approx([expected[hit.doc_id] for hit in hits], abs=1e-4)
    assert "adds BM25’s scores" in search.describe(20)


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_search_of_an_index_is_not_fused(ranker, documents, store):
    with pytest.raises(ValueError, match=r"\(--rerank\); this ranker searches an index"):
        RankerSearch(ranker, documents, store, open_index(store.folder, ranker), is_fused=True)


@pytest.mark.parametrize("model", ["bert_dot", "colbert", "prettr", "tk"], indirect=True)
def test_stored_vectors_rank_as_texts_do(ranker, documents, bm25, make_engine, store):
    stored = SearchEngine({"a": RankerSearch(ranker, documents, store)}, bm25, k=20).search(QUERY).rankings[0]
    fresh = make_engine(a=ranker).search(QUERY).rankings[0]
    assert list(stored.stages_ms) == ["query encoding", "reading vectors", "scoring"]
    assert [(hit.doc_id, hit.parts) for hit in stored.hits] == [(hit.doc_id, hit.parts) for hit in fresh.hits]


@pytest.mark.parametrize("model", ["bert_dot", "colbert"], indirect=True)
def test_index_search_equals_the_index_and_has_first_ranks(ranker, documents, bm25, store):
    index = open_index(store.folder, ranker)
    search = RankerSearch(ranker, documents, store, index)
    results = SearchEngine({"a": search}, None).search("zzz")  # not a word of the collection
    expected = index.search({"q": "zzz"}, SHOWN)["q"]
    assert [(hit.doc_id, hit.score) for hit in results.rankings[0].hits] == expected
    assert list(results.rankings[0].stages_ms) == ["query encoding", "search"]
    assert (results.candidates, results.first_stage_ms) == (None, None)
    assert {hit.first_rank for hit in results.rankings[0].hits} == {None}
    hits = SearchEngine({"a": search}, bm25, k=3).search("apple").rankings[0].hits
    ranks = {doc_id: rank for rank, (doc_id, _) in enumerate(bm25.search({"q": "apple"}, 3)["q"], 1)}
    assert [hit.first_rank for hit in hits] == [ranks.get(hit.doc_id) for hit in hits]


@pytest.mark.parametrize("model", ["bert_cat", "colbert"], indirect=True)
def test_query_without_candidates_has_no_hits(ranker, make_engine):
    results = make_engine(a=ranker).search("zzz")
    assert (results.candidates, results.rankings[0].hits, results.rankings[0].stages_ms) == (0, [], {})


@pytest.mark.parametrize("model", ["colbert"], indirect=True)
def test_long_passages_are_cut(ranker, tmp_path):
    (tmp_path / "long.tsv").write_text("1\t" + "apple " * 1_000 + "\n2\tbread\n")
    documents = kd.TextStore.from_tsv(tmp_path / "long.tsv")
    engine = SearchEngine({"a": RankerSearch(ranker, documents)}, kd.BM25Index.build(documents))
    (hit,) = engine.search("apple").rankings[0].hits
    assert sum(len(part.text) for part in hit.parts) == LONGEST_TEXT


@pytest.mark.parametrize("model", ["tk"], indirect=True)
def test_reranking_needs_a_first_stage(ranker, documents):
    with pytest.raises(ValueError, match="needs a first stage"):
        SearchEngine({"a": RankerSearch(ranker, documents)}, None)


# ---- Building an engine ---------------------------------------------------------------------------------------------


@pytest.fixture
def rankers(encoder, tokenizer) -> dict[str, kd.Ranker]:
    """A BERT_DOT and a TK, which cannot search."""
    settings = {"max_query_length": 8, "max_document_length": 16}
    dot, tk = kd.load_ranker(encoder, "bert_dot", **settings), kd.load_ranker(encoder, "tk", **settings)
    return {"dot": kd.Ranker(dot, tokenizer), "tk": kd.Ranker(tk, tokenizer)}


@pytest.fixture
def folders(rankers, documents, tmp_path) -> list:
    """The indexes of both, in the other order."""
    for name, ranker in rankers.items():
        kd.VectorStore.build(ranker, documents, tmp_path / f"{name}-index")
    return [tmp_path / "tk-index", tmp_path / "dot-index"]


def test_engine_gives_each_ranker_its_own_index(rankers, documents, folders, bm25, tmp_path):
    bm25.save(tmp_path / "bm25")
    engine = build_engine(rankers, documents, folders, tmp_path / "bm25", k=20)
    assert [search.store.folder for search in engine.rankers.values()] == folders[::-1]
    assert [search.index is not None for search in engine.rankers.values()] == [True, False]
    assert engine.search(QUERY).candidates == len(bm25.search({"q": QUERY}, 20)["q"])
    engine = build_engine(rankers, documents, folders, rerank=True, fuse=True)
    assert all(search.index is None and search.is_fused for search in engine.rankers.values())
    assert build_engine({"dot": rankers["dot"]}, documents, folders[1:]).first_stage is None


@pytest.mark.parametrize("architecture", ["bert_dot", "colbert", "tk"])
def test_engine_opens_and_verifies_vectors_once(architecture, encoder, tokenizer, documents, tmp_path, monkeypatch):
    model = kd.load_ranker(encoder, architecture, max_query_length=8, max_document_length=16)
    ranker, opened = kd.Ranker(model, tokenizer), []
    folder = kd.VectorStore.build(ranker, documents, tmp_path / "index").folder

    def open_version(folder, kind, is_verified):
        opened.append((folder, is_verified))
        return artifacts.open_version(folder, kind, is_verified)

    monkeypatch.setattr("hf_kd_ranking.retrieval.vector_store.open_version", open_version)
    engine = build_engine({"a": ranker}, documents, [folder])
    assert opened == [(folder, True)]
    assert engine.rankers["a"].store.folder == folder


def test_engine_refuses_foreign_and_second_indexes(rankers, documents, folders, tmp_path):
    with pytest.raises(ValueError, match=r"tk-index \(TK\) was not built by one of the models \(dot\)"):
        build_engine({"dot": rankers["dot"]}, documents, folders)
    with pytest.raises(ValueError, match="or is the second index of one"):
        build_engine(rankers, documents, [folders[0], folders[0]])
    artifacts.write_description(tmp_path, {"teacher": "of a step of `distill`"})
    with pytest.raises(ValueError, match=r"\(None\) was not built by one of the models"):
        build_engine(rankers, documents, [tmp_path])


def test_engine_gives_settings_to_faiss_indexes_only(rankers, documents, folders):
    with pytest.raises(ValueError, match="--settings nprobe=4 is for a faiss index that searches"):
        build_engine(rankers, documents, folders, settings="nprobe=4")
    with pytest.raises(ValueError, match="--probes 4 is for a ColBERT index that searches"):
        build_engine(rankers, documents, folders, probes=4)
    store = kd.VectorStore.open(folders[1], rankers["dot"])
    kd.DenseIndex.build(store, folders[1] / "dense", factory="IVF2,Flat")
    for probed, expected in (("nprobe=1", 1), ("nprobe=2", 2)):
        engine = build_engine(rankers, documents, folders, settings=probed)
        assert engine.rankers["dot"].index.index.nprobe == expected
