"""The search of a query: the same results as the pipeline's, with ranks, times and texts."""

import numpy as np
import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.interop.onnx import OnnxRanker
from hf_kd_ranking.retrieval.base import open_index
from hf_kd_ranking.searcher import Pipeline
from hf_kd_ranking.serving.model import ServedModel
from hf_kd_ranking.serving.search import SearchEngine

QUERY = "the apple and bread"
SHOWN = 10


@pytest.fixture
def store(ranker, documents, tmp_path) -> kd.VectorStore:
    return kd.VectorStore.build(ranker, documents, tmp_path / "index")


def assert_equal_results(engine, query=QUERY):
    """Compare the page's hits with the pipeline's results, and return them."""
    results, expected = engine.search(query), engine.pipeline.search(query, SHOWN)
    assert [hit.doc_id for hit in results.hits] == [doc_id for doc_id, _ in expected]
    scores = [score for _, score in expected]
    assert [hit.score for hit in results.hits] == pytest.approx(scores, rel=1e-4, abs=1e-4)
    texts = engine.pipeline.documents[[hit.doc_id for hit in results.hits]]
    assert [hit.text for hit in results.hits] == texts
    return results


@pytest.mark.parametrize("weight", [0, 0.5])
def test_page_shows_what_the_pipeline_finds(ranker, documents, bm25, weight):
    engine = SearchEngine(Pipeline(documents, bm25, ranker, 20, weight))
    results = assert_equal_results(engine)
    ranks = {doc_id: rank for rank, (doc_id, _) in enumerate(bm25.search({"q": QUERY}, 20)["q"], 1)}
    assert results.candidates == len(ranks) > SHOWN
    assert [hit.first_rank for hit in results.hits] == [ranks[hit.doc_id] for hit in results.hits]
    stages = ["BM25", "scoring"]
    if ranker.model.config.is_storable:
        stages = ["BM25", "query encoding", "passage encoding", "scoring"]
    if ranker.model.config.vectors_per_text == "sparse":
        stages.append("words")
    assert list(results.stages_ms) == stages
    assert all(ms > 0 for ms in results.stages_ms.values())
    assert ("adds BM25’s scores" in engine.describe()) == (weight > 0)


@pytest.mark.parametrize("model", ["bert_dot", "colbert", "prettr", "tk"], indirect=True)
def test_stored_vectors_rank_as_texts_do(ranker, documents, bm25, engine, store):
    stored = SearchEngine(Pipeline(documents, bm25, ranker, 20, store=store)).search(QUERY)
    fresh = engine.search(QUERY)
    assert list(stored.stages_ms) == ["BM25", "query encoding", "reading vectors", "scoring"]
    assert [(hit.doc_id, hit.text) for hit in stored.hits] == [(hit.doc_id, hit.text) for hit in fresh.hits]


@pytest.mark.parametrize("model", ["bert_dot", "colbert"], indirect=True)
def test_index_search_has_the_ranks_of_a_first_stage(ranker, documents, bm25, store):
    index = open_index(store.folder, ranker)
    results = assert_equal_results(SearchEngine(Pipeline(documents, None, ranker, 3, 0, store, index)), "zzz")
    assert list(results.stages_ms) == ["query encoding", "search"]
    assert results.candidates is None
    assert {hit.first_rank for hit in results.hits} == {None}
    ranks = {doc_id: rank for rank, (doc_id, _) in enumerate(bm25.search({"q": "apple"}, SHOWN)["q"], 1)}
    for weight in (0, 0.5):
        engine = SearchEngine(Pipeline(documents, bm25, ranker, SHOWN, weight, store, index))
        hits = assert_equal_results(engine, "apple").hits
        assert [hit.first_rank for hit in hits] == [ranks.get(hit.doc_id) for hit in hits]
        assert engine.describe().startswith(f"{ranker.model.config.model_type}, searches all 41 passages")


@pytest.mark.parametrize("model", ["bert_cat", "colbert"], indirect=True)
def test_query_without_candidates_has_no_hits(engine):
    results = engine.search("zzz")
    assert (results.candidates, results.hits, list(results.stages_ms)) == (0, [], ["BM25"])


@pytest.mark.parametrize("model", ["splade"], indirect=True)
@pytest.mark.parametrize("is_stored", [True, False])
def test_heaviest_words_of_query_and_passages_are_shown(serve, ranker, documents, bm25, store, is_stored):
    pipeline = Pipeline(documents, bm25, ranker, 20, store=store if is_stored else None)
    answer = serve(ServedModel("tiny", ranker, search=SearchEngine(pipeline))).post("/search", json={"query": QUERY})
    answer = answer.json()
    words = ranker.tokenizer.get_vocab()
    shown = [(answer["terms"], QUERY, ranker.encode_queries([QUERY]))]
    for hit in answer["hits"]:
        shown.append((hit["terms"], hit["text"], ranker.encode_documents([hit["text"]])))
    assert len(shown) == SHOWN + 1
    for terms, text, vector in shown:
        weights = vector.toarray()[0]
        largest = np.sort(weights)[::-1][:12]
        assert [term["weight"] for term in terms] == pytest.approx(largest[largest > 0], abs=1e-4)
        for term in terms:
            assert weights[words[term["word"]]] == pytest.approx(term["weight"], abs=1e-4)
            assert term["is_expansion"] == (words[term["word"]] not in ranker.tokenizer(text)["input_ids"])
    assert {term["is_expansion"] for terms, _, _ in shown for term in terms} == {True, False}


def test_page_of_bm25_alone(documents, bm25):
    engine = SearchEngine(Pipeline(documents, bm25))
    assert [hit.first_rank for hit in assert_equal_results(engine).hits] == list(range(1, SHOWN + 1))
    assert engine.describe() == "BM25"


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_int8_ranker_is_searched_with_and_served_without_mixing_requests(serve, ranker, documents, bm25, tmp_path):
    ranker.save_pretrained(tmp_path / "ranker")
    kd.export_ranker(tmp_path / "ranker", "onnx-int8", tmp_path / "int8")
    int8 = OnnxRanker(tmp_path / "int8", threads=1)
    engine = SearchEngine(Pipeline(documents, bm25, int8, 20))
    assert list(assert_equal_results(engine).stages_ms) == ["BM25", "scoring"]
    assert engine.describe() == "BERT_Dot, re-ranks BM25’s best 20 from their texts"
    model = ServedModel("tiny", int8, search=engine)
    batch = [(QUERY, ["apple", "king of the house"]), ("cat", ["dog"])]
    for found, (query, texts) in zip(model.score_texts(batch), batch, strict=True):
        assert found.tolist() == int8.score(query, texts).tolist()
    answer = serve(model).post("/rerank", json={"query": "cat", "texts": ["dog"], "raw_scores": True}).json()
    assert answer[0]["score"] == int8.score("cat", ["dog"])[0]


@pytest.mark.parametrize("model", ["tk"], indirect=True)
def test_page_needs_texts_and_a_first_stage(ranker, documents, bm25):
    with pytest.raises(ValueError, match="needs a first stage or an index"):
        SearchEngine(Pipeline(documents, None, ranker))
    with pytest.raises(ValueError, match="has no texts of its documents"):
        SearchEngine(Pipeline(None, bm25))
