"""What a query does: the same scores as everywhere else, with ranks, times and parts."""

import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.retrieval.base import open_searchable
from hf_kd_ranking.retrieval.fusion import fuse_runs
from hf_kd_ranking.serving.search import LONGEST_TEXT, SHOWN, RankerSearch, SearchEngine

QUERY = "the apple and bread"


def test_results_equal_rerank_of_bm25s_candidates(ranker, documents, bm25, make_engine):
    results = make_engine(a=ranker).search(QUERY)
    candidates = [doc_id for doc_id, _ in bm25.search({"q": QUERY}, 20)["q"]]
    wanted = ranker.rerank(QUERY, documents[candidates], SHOWN)
    (ranking,) = results.rankings
    assert results.candidates == len(candidates) > SHOWN
    assert [hit.doc_id for hit in ranking.hits] == [candidates[i] for i, _ in wanted]
    assert [hit.score for hit in ranking.hits] == pytest.approx([score for _, score in wanted], rel=1e-4, abs=1e-4)
    assert [hit.first_rank for hit in ranking.hits] == [i + 1 for i, _ in wanted]
    assert ["".join(part.text for part in hit.parts) for hit in ranking.hits] == documents[
        [hit.doc_id for hit in ranking.hits]
    ]
    has_marks = any(part.strength for hit in ranking.hits for part in hit.parts)
    assert has_marks == (ranker.model.config.model_type in ("ColBERT", "TK"))
    is_apart = ranker.model.config.is_storable
    stages = ["query encoding", "passage encoding", "scoring"] if is_apart else ["scoring"]
    assert list(ranking.stages_ms) == stages
    assert all(ms > 0 for ms in (results.first_stage_ms, *ranking.stages_ms.values()))


def test_bm25s_scores_are_added_where_asked_for(ranker, documents, bm25):
    search = RankerSearch(ranker, documents, is_fused=True)
    first = bm25.search({"q": QUERY}, 20)
    ids = [doc_id for doc_id, _ in first["q"]]
    scores = ranker.score(QUERY, documents[ids]).tolist()
    own = kd.Run({"q": sorted(zip(ids, scores, strict=True), key=lambda pair: -pair[1])})
    wanted = dict(fuse_runs([own, first], "weighted_sum")["q"])
    hits = SearchEngine({"a": search}, bm25, k=20).search(QUERY).rankings[0].hits
    assert [hit.score for hit in hits] == pytest.approx(sorted(wanted.values(), reverse=True)[:SHOWN], abs=1e-4)
    assert [hit.score for hit in hits] == pytest.approx([wanted[hit.doc_id] for hit in hits], abs=1e-4)
    assert "adds BM25’s scores" in search.describe(20)


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_a_ranker_that_searches_is_not_fused(ranker, documents, tmp_path):
    store = kd.StoredReranker(ranker, kd.VectorStore.build(ranker, documents, tmp_path / "index"))
    index = open_searchable(tmp_path / "index", ranker)
    with pytest.raises(ValueError, match="this ranker searches by itself"):
        RankerSearch(ranker, documents, store, index, is_fused=True)


@pytest.mark.parametrize("model", ["bert_dot", "colbert", "prettr", "tk"], indirect=True)
def test_stored_vectors_rank_as_texts_do(ranker, documents, bm25, make_engine, tmp_path):
    store = kd.StoredReranker(ranker, kd.VectorStore.build(ranker, documents, tmp_path / "index"))
    stored = SearchEngine({"a": RankerSearch(ranker, documents, store)}, bm25, k=20).search(QUERY).rankings[0]
    fresh = make_engine(a=ranker).search(QUERY).rankings[0]
    assert list(stored.stages_ms) == ["query encoding", "reading vectors", "scoring"]
    assert [(hit.doc_id, hit.parts) for hit in stored.hits] == [(hit.doc_id, hit.parts) for hit in fresh.hits]


@pytest.mark.parametrize("model", ["bert_dot", "colbert"], indirect=True)
def test_an_index_searches_by_itself(ranker, documents, bm25, tmp_path):
    store = kd.StoredReranker(ranker, kd.VectorStore.build(ranker, documents, tmp_path / "index"))
    index = open_searchable(tmp_path / "index", ranker)
    search = RankerSearch(ranker, documents, store, index)
    alone = SearchEngine({"a": search}, None).search("zzz")  # no word of the collection
    wanted = index.search({"q": "zzz"}, SHOWN)["q"]
    assert [(hit.doc_id, hit.score) for hit in alone.rankings[0].hits] == wanted
    assert (alone.candidates, alone.first_stage_ms) == (None, None)
    assert {hit.first_rank for hit in alone.rankings[0].hits} == {None}
    beside = SearchEngine({"a": search}, bm25, k=3).search("apple")
    first = {doc_id: rank for rank, (doc_id, _) in enumerate(bm25.search({"q": "apple"}, 3)["q"], 1)}
    assert [hit.first_rank for hit in beside.rankings[0].hits] == [
        first.get(hit.doc_id) for hit in beside.rankings[0].hits
    ]


@pytest.mark.parametrize("model", ["bert_cat", "colbert"], indirect=True)
def test_a_query_without_candidates_has_no_hits(ranker, make_engine):
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
def test_a_ranker_that_reranks_needs_a_first_stage(ranker, documents):
    with pytest.raises(ValueError, match="needs a first stage"):
        SearchEngine({"a": RankerSearch(ranker, documents)}, None)
