"""Bad input: the status and the fields that the clients of each API read, and one line that says what to do."""

import json
import threading

import numpy as np
import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.serving.model import ServedModel
from hf_kd_ranking.serving.service import Limits

pytestmark = pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
JSON = {"Content-Type": "application/json"}
LIMITS = Limits(body_bytes=5_000, documents=3, characters=1_000)
DOCUMENTS = {"query": "a", "documents": ["b"]}
TEXTS = {"query": "a", "texts": ["b"]}
LONG = "b " * 40
# What is sent -> status, error_type, words of the message. A dict is the body of POST /rerank.
CASES = {
    "no body": ({}, 422, "Validation", "query: Field required"),
    "not an object": ([], 422, "Validation", "Send a JSON object"),
    "no documents": ({"query": "a"}, 422, "Validation", "documents: Field required"),
    "no query": ({"texts": ["b"]}, 422, "Validation", "query: Field required"),
    "empty query": (DOCUMENTS | {"query": ""}, 400, "Empty", "query is empty"),
    "blank query": (TEXTS | {"query": " \n"}, 400, "Empty", "query is empty"),
    "empty documents": (DOCUMENTS | {"documents": []}, 400, "Empty", "documents is empty"),
    "empty texts": (TEXTS | {"texts": []}, 400, "Empty", "texts is empty"),
    "query of a wrong type": (DOCUMENTS | {"query": 1}, 422, "Validation", "query: Input should be a valid string"),
    "documents of a wrong type": (DOCUMENTS | {"documents": "b"}, 422, "Validation", "documents: Input should be"),
    "document of a wrong type": (DOCUMENTS | {"documents": ["b", 1]}, 422, "Validation", "documents.1: Input should"),
    "null document": (DOCUMENTS | {"documents": [None]}, 422, "Validation", "documents.0: Input should be a valid"),
    "text of a wrong type": (TEXTS | {"texts": ["b", {}]}, 422, "Validation", "texts.1: Input should be a valid"),
    "object without a text": (DOCUMENTS | {"documents": [{"x": 1}]}, 422, "Validation", "needs a text or an id"),
    "text of an object": (DOCUMENTS | {"documents": [{"text": 1}]}, 422, "Validation", "documents.0.text: Input"),
    "texts and ids": (DOCUMENTS | {"documents": ["b", {"id": 1}]}, 422, "Validation", "send texts or ids"),
    "unknown id": (DOCUMENTS | {"documents": [{"id": "x"}]}, 422, "Validation", "1 of 1 ids are not among the 41"),
    "half of a surrogate pair": (TEXTS | {"texts": ["\ud800"]}, 422, "Validation", "texts.0: the text has half"),
    "top_n 0": (DOCUMENTS | {"top_n": 0}, 422, "Validation", "top_n: Input should be greater than or equal to 1"),
    "top_n as a string": (DOCUMENTS | {"top_n": "1"}, 422, "Validation", "top_n: Input should be a valid integer"),
    "flag as a string": (TEXTS | {"raw_scores": "yes"}, 422, "Validation", "raw_scores: Input should be a valid"),
    "rank_fields": (DOCUMENTS | {"rank_fields": ["x"]}, 422, "Validation", "rank_fields: "),
    "max_tokens_per_doc": (DOCUMENTS | {"max_tokens_per_doc": 8}, 422, "Validation", "reads 16 tokens of each"),
    "unknown model": (DOCUMENTS | {"model": "x"}, 404, "NotFound", "There is no model 'x'; this server has 'tiny'"),
    "many documents": (DOCUMENTS | {"documents": ["b"] * 4}, 400, "Validation", "documents has 4 entries, the limit"),
    "many texts": (TEXTS | {"texts": ["b"] * 4}, 413, "Validation", "texts has 4 entries, the limit is 3"),
    "long document": (DOCUMENTS | {"documents": ["b" * 1001]}, 400, "Validation", "entry 0, has 1,001 characters"),
    "long text": (TEXTS | {"texts": ["b" * 1001]}, 413, "Validation", "entry 0, has 1,001 characters"),
    "long query": (TEXTS | {"query": "b" * 1001}, 413, "Validation", "query, entry 0, has 1,001 characters"),
    "no truncation": (TEXTS | {"texts": [LONG], "truncate": False}, 413, "Tokenizer", "42 tokens, the limit is 16"),
    "no truncation of documents": (
        DOCUMENTS | {"documents": [LONG], "truncate": False},
        400,
        "Tokenizer",
        "42 tokens, the limit is 16",
    ),
}
# The same for other requests.
REQUESTS = {
    "invalid JSON": (("POST", "/rerank", b'{"query": "a",'), 400, "Validation", "The body is not valid JSON: "),
    "invalid UTF-8": (("POST", "/rerank", b'{"query": "\xff"}'), 400, "Validation", "not valid UTF-8"),
    "body over the limit": (("POST", "/rerank", b" " * 5_001), 413, "Validation", "larger than 5,000 bytes"),
    "wrong method": (("GET", "/rerank", b""), 405, "NotFound", "GET /rerank: Method Not Allowed"),
    "wrong path": (("POST", "/v3/rerank", b"{}"), 404, "NotFound", "POST /v3/rerank: Not Found"),
    "texts in a versioned path": (("POST", "/v2/rerank", b'{"query": "a", "texts": []}'), 422, "Validation", "docum"),
    "embedding nothing": (("POST", "/embed", b'{"inputs": []}'), 400, "Empty", "inputs is empty"),
    "embedding numbers": (("POST", "/embed", b'{"inputs": [1]}'), 422, "Validation", "inputs.0: Input should be"),
    "another prompt": (("POST", "/embed", b'{"inputs": "a", "prompt_name": "x"}'), 422, "Validation", "'query' or"),
    "search without a collection": (("POST", "/search", b'{"query": "a"}'), 400, "Validation", "no collection"),
    "search for 0": (("POST", "/search", b'{"query": "a", "k": 0}'), 422, "Validation", "k: Input should be greater"),
}


@pytest.fixture
def client(serve, ranker, documents, tmp_path):
    store = kd.VectorStore.build(ranker, documents, tmp_path / "index")
    return serve(ServedModel("tiny", ranker, store), limits=LIMITS)


def assert_refused(answer, status, error_type, words):
    body = answer.json()
    assert set(body) == {"message", "error", "error_type"}
    assert (answer.status_code, body["error_type"], body["error"]) == (status, error_type, body["message"])
    assert words in body["message"] and "\n" not in body["message"]


def test_bad_requests_are_refused_with_status_and_reason(client):
    for name, (body, *wanted) in CASES.items():
        # Escaped, since bytes of half a surrogate pair are not UTF-8.
        answer = client.post("/rerank", content=json.dumps(body), headers=JSON)
        try:
            assert_refused(answer, *wanted)
        except AssertionError as error:
            raise AssertionError(f"{name}: {answer.status_code} {answer.text}") from error
    for name, ((method, path, content), *wanted) in REQUESTS.items():
        answer = client.request(method, path, content=content, headers=JSON)
        try:
            assert_refused(answer, *wanted)
        except AssertionError as error:
            raise AssertionError(f"{name}: {answer.status_code} {answer.text}") from error
    assert client.post("/rerank", json=DOCUMENTS).status_code == 200


def test_body_without_a_length_is_counted_as_it_arrives(client):
    answer = client.post("/rerank", content=(b" " * 1_000 for _ in range(6)), headers=JSON)
    assert "content-length" not in answer.request.headers
    assert_refused(answer, 413, "Validation", "larger than 5,000 bytes")


def test_full_queue_is_status_429_with_the_time_to_wait(serve, ranker):
    client = serve(ServedModel("tiny", ranker), max_waiting=1)
    began, go = threading.Event(), threading.Event()

    def wait(inputs):
        began.set()
        return [go.wait(20) for _ in inputs]

    client.service.engine.submit(wait, [1], [1])
    assert began.wait(20)
    client.service.engine.submit(wait, [2], [1])
    answer = client.post("/rerank", json=DOCUMENTS)
    go.set()
    assert_refused(answer, 429, "Overloaded", "The server is overloaded")
    assert int(answer.headers["retry-after"]) > 0


def test_failing_model_is_an_error_of_its_own_request(serve, ranker):
    class Failing(ServedModel):
        def score_texts(self, batch):
            if any("nan" in texts for _, texts in batch):
                raise kd.InputError("The score of pair 0 is nan")
            if any("bug" in texts for _, texts in batch):
                raise RuntimeError("a secret of the server")
            return [np.zeros(len(texts), np.float32) for _, texts in batch]

    client = serve(Failing("tiny", ranker))
    assert_refused(client.post("/rerank", json=TEXTS | {"texts": ["nan"]}), 500, "Backend", "The score of pair 0 is")
    assert_refused(client.post("/rerank", json=TEXTS | {"texts": ["bug"]}), 500, "Backend", "its log says why")
    assert client.post("/rerank", json=TEXTS).status_code == 200


def test_model_without_single_vectors_or_ranker_refuses_what_it_cannot_do(serve, ranker, encoder):
    model = kd.load_ranker(encoder, "colbert", max_query_length=8, max_document_length=16)
    colbert = kd.Ranker(model, ranker.tokenizer)
    client = serve(ServedModel("tiny", colbert))
    assert_refused(client.post("/embed", json={"inputs": "a"}), 400, "Validation", "no single vector per text")
    body = {"query": "a", "documents": [{"id": 1}]}
    assert_refused(client.post("/rerank", json=body), 422, "Validation", "this server has no index")
    client = serve(ServedModel("bm25", None))
    assert_refused(client.post("/rerank", json=DOCUMENTS), 400, "Validation", "bm25 is BM25 alone")
