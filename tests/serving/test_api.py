"""The endpoints: equal to the ranker and the pipeline, in the formats of existing clients."""

import numpy as np
import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.retrieval.base import open_index
from hf_kd_ranking.searcher import Pipeline
from hf_kd_ranking.serving import model as served
from hf_kd_ranking.serving.api import sigmoid
from hf_kd_ranking.serving.model import ServedModel
from hf_kd_ranking.serving.search import SearchEngine
from hf_kd_ranking.serving.service import Service

QUERY = "the apple and bread"
TEXTS = [
    "apple bread",
    "",
    "a violin under the moon 😀",
    "bread of the king and the queen in the house of stone",
    "cat",
]
SEARCHABLE = ["bert_dot", "colbert"]


def logit(probabilities):
    probabilities = np.asarray(probabilities)
    return np.log(probabilities / (1 - probabilities))


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
@pytest.mark.parametrize("model", ["bert_cat"], indirect=True)
def test_rerank_gives_the_sigmoid_of_the_rankers_scores(client, ranker, path):
    answer = client.post(path, json={"model": "tiny", "query": QUERY, "documents": TEXTS}).json()
    assert (answer["model"], len(answer["id"])) == ("tiny", 36)
    results = answer["results"]
    scores = ranker.score(QUERY, TEXTS)
    assert [result["index"] for result in results] == np.argsort(-scores, kind="stable").tolist()
    found = logit([result["relevance_score"] for result in results])
    assert found == pytest.approx(np.sort(scores)[::-1], abs=1e-4)
    assert {frozenset(result) for result in results} == {frozenset({"index", "relevance_score"})}


def test_raw_scores_of_every_architecture_equal_the_ranker(client, ranker):
    body = {"query": QUERY, "documents": TEXTS, "raw_scores": True, "top_n": 3, "return_documents": True}
    results = client.post("/rerank", json=body).json()["results"]
    scores = ranker.score(QUERY, TEXTS)
    assert [result["relevance_score"] for result in results] == pytest.approx(np.sort(scores)[::-1][:3], abs=1e-4)
    assert [result["document"] for result in results] == [{"text": TEXTS[result["index"]]} for result in results]
    body = {"query": QUERY, "texts": TEXTS, "raw_scores": True, "return_text": True}
    results = client.post("/rerank", json=body).json()
    assert [result["score"] for result in results] == pytest.approx(np.sort(scores)[::-1], abs=1e-4)
    assert [result["text"] for result in results] == [TEXTS[result["index"]] for result in results]
    body = {"query": QUERY, "texts": TEXTS}
    results = client.post("/rerank", json=body).json()
    assert {frozenset(result) for result in results} == {frozenset({"index", "score"})}
    assert [result["score"] for result in results] == pytest.approx(sigmoid(np.sort(scores)[::-1]), abs=1e-4)


def test_sigmoid_equals_hand_computed_values_and_does_not_overflow():
    scores = np.array([0.0, np.log(3), -800.0, 30.0, 80.0], np.float32)
    assert sigmoid(scores) == pytest.approx([0.5, 0.75, 0, 1, 1], abs=1e-7)
    assert sigmoid(np.float32([30, 31])).tolist() == sorted(set(sigmoid(np.float32([30, 31])).tolist()))


@pytest.mark.parametrize("model", ["colbert"], indirect=True)
def test_saturated_scores_are_sorted_by_raw_score(serve, ranker):
    class Saturated(ServedModel):
        def score_texts(self, batch):
            return [np.float32([60, 80, 70, 80])]

    client = serve(Saturated("tiny", ranker))
    results = client.post("/rerank", json={"query": "a", "documents": ["a"] * 4}).json()["results"]
    assert [result["index"] for result in results] == [1, 3, 2, 0]  # ties keep the order of the request
    assert {result["relevance_score"] for result in results} == {1.0}


@pytest.mark.parametrize("model", ["bert_cat"], indirect=True)
def test_documents_may_be_objects_and_are_repeated_as_they_came(client, ranker):
    documents = [{"text": "apple", "id": 7, "title": "x"}, "bread"]
    body = {"query": QUERY, "documents": documents, "return_documents": True, "raw_scores": True}
    results = client.post("/rerank", json=body).json()["results"]
    by_index = {result["index"]: result for result in results}
    assert [by_index[place]["document"] for place in (0, 1)] == [documents[0], {"text": "bread"}]
    found = [by_index[place]["relevance_score"] for place in (0, 1)]
    assert found == pytest.approx(ranker.score(QUERY, ["apple", "bread"]), abs=1e-4)


@pytest.mark.parametrize("model", ["bert_cat"], indirect=True)
def test_server_option_gives_raw_scores_by_default(serve, ranker):
    client = serve(ServedModel("tiny", ranker), raw_scores=True)
    [score] = ranker.score(QUERY, ["apple"])
    for asked, wanted in ((None, score), (True, score), (False, sigmoid(score))):
        answer = client.post("/rerank", json={"query": QUERY, "texts": ["apple"], "raw_scores": asked}).json()
        assert answer[0]["score"] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("model", ["bert_cat", "colbert"], indirect=True)
def test_long_requests_are_split_and_joined_in_order(serve, ranker, monkeypatch):
    monkeypatch.setattr(served, "PIECE_TOKENS", 40)
    model = ServedModel("tiny", ranker)
    pieces, tokens = model.split_pairs(QUERY, TEXTS * 4)
    assert len(pieces) > 3 and max(tokens) <= 40
    assert [text for _, texts in pieces for text in texts] == TEXTS * 4
    body = {"query": QUERY, "texts": TEXTS * 4, "raw_scores": True}
    found = np.empty(20)
    for result in serve(model).post("/rerank", json=body).json():
        found[result["index"]] = result["score"]
    assert found == pytest.approx(ranker.score(QUERY, TEXTS * 4), abs=1e-4)


@pytest.mark.parametrize("model", ["bert_dot", "colbert", "prettr", "splade", "tk", "tkl"], indirect=True)
def test_documents_by_id_score_as_their_texts(serve, ranker, documents, tmp_path):
    store = kd.VectorStore.build(ranker, documents, tmp_path / "index")
    client = serve(ServedModel("tiny", ranker, store))
    ids = ["3", "<b>41</b>", "17", "3"]
    body = {"query": QUERY, "documents": [{"id": name} for name in ids], "raw_scores": True, "return_documents": True}
    results = client.post("/rerank", json=body).json()["results"]
    found = {result["index"]: result["relevance_score"] for result in results}
    scores = ranker.score(QUERY, [documents[name] for name in ids])
    assert [found[place] for place in range(4)] == pytest.approx(scores, abs=1e-4)
    assert [result["document"]["id"] for result in results] == [ids[result["index"]] for result in results]
    assert client.get("/v1/models").json()["data"][0]["stored_documents"] == 41


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_embed_gives_the_vectors_of_each_side(serve, ranker):
    client = serve(ServedModel("tiny", ranker))
    assert client.post("/embed", json={"inputs": "apple"}).json() == pytest.approx(ranker.encode_documents(["apple"]))
    long = "the apple of the king and the queen in the house"  # queries are cut earlier
    for side, encode in (("query", ranker.encode_queries), ("document", ranker.encode_documents)):
        body = {"inputs": [long, "cat"], "prompt_name": side}
        assert np.array(client.post("/embed", json=body).json()) == pytest.approx(encode([long, "cat"]), abs=1e-5)
        vectors = np.array(client.post("/embed", json=body | {"normalize": True}).json())
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(1)


@pytest.mark.parametrize("model", SEARCHABLE, indirect=True)
def test_search_equals_the_pipeline(serve, ranker, documents, bm25, tmp_path):
    store = kd.VectorStore.build(ranker, documents, tmp_path / "index")
    index = open_index(store.folder, ranker)
    pipeline = Pipeline(documents, bm25, ranker, 20, 0.5, store, index)
    search = SearchEngine(pipeline)
    client = serve(ServedModel("tiny", ranker, store, search))
    answer = client.post("/search", json={"query": " apple\n bread ", "k": 4}).json()
    assert (answer["query"], list(answer["stages_ms"])) == ("apple bread", ["BM25", "query encoding", "search"])
    wanted = pipeline.search("apple bread", 4)
    assert [hit["doc_id"] for hit in answer["hits"]] == [doc_id for doc_id, _ in wanted]
    assert answer["hits"] == [hit.model_dump() for hit in search.search("apple bread", 4).hits]


@pytest.mark.parametrize("model", ["tk"], indirect=True)
def test_truncation_is_refused_only_on_demand(client, ranker):
    long = "apple " * 40
    for path_body in ({"texts": ["cat", long]}, {"documents": ["cat", long]}):
        body = {"query": QUERY, "raw_scores": True, **path_body}
        assert client.post("/rerank", json=body).status_code == 200
        refused = client.post("/rerank", json=body | {"truncate": False})
        assert refused.status_code == (413 if "texts" in body else 400)
        assert "Text 1 has 40 tokens, the limit is 16" in refused.json()["message"]


def test_health_reports_the_progress_of_the_start(ranker_free_app):
    client, progress, let_load = ranker_free_app
    progress.begin("building the BM25 index", 40)
    progress.done = 10
    answer = client.get("/health")
    wanted = {"status": "loading", "stage": "building the BM25 index", "done": 10, "total": 40}
    assert (answer.status_code, answer.json()) == (503, wanted)
    refused = client.post("/rerank", json={"query": "a", "documents": ["a"]})
    assert (refused.status_code, refused.json()["error_type"]) == (503, "Unhealthy")
    assert int(refused.headers["retry-after"]) > 0
    let_load()
    while client.get("/health").status_code == 503:
        pass
    assert client.get("/v1/models").json()["data"][0]["id"] == "bm25"


@pytest.fixture
def ranker_free_app(bm25, documents):
    """A client of a service that loads until a test lets it go on."""
    import threading

    from starlette.testclient import TestClient

    from hf_kd_ranking.serving.app import make_app

    go, held = threading.Event(), []

    def load(progress):
        held.append(progress)
        assert go.wait(20)
        return ServedModel("bm25", None, search=SearchEngine(Pipeline(documents, bm25)))

    service = Service(load)
    with TestClient(make_app(service), base_url="http://localhost") as client:
        while not held:
            client.get("/health")
        yield client, held[0], go.set
