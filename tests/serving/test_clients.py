"""Clients that exist: `cohere` of the registry, and text-embeddings-inference's through huggingface_hub."""

import threading
import time

import cohere
import huggingface_hub
import numpy as np
import pytest
import uvicorn
from cohere.core.api_error import ApiError

from hf_kd_ranking.serving.api import sigmoid
from hf_kd_ranking.serving.app import make_app
from hf_kd_ranking.serving.model import ServedModel
from hf_kd_ranking.serving.service import Limits, Service
from hf_kd_ranking.teachers.endpoint import API_KEY, Endpoint

pytestmark = pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
QUERY, TEXTS = "the apple", ["cat", "apple bread", "a king"]
ONCE = {"max_retries": 0}


@pytest.fixture
def address(ranker):
    """Address of a server in a thread, whose key is "key"."""
    service = Service(lambda progress: ServedModel("tiny", ranker), Limits(documents=3))
    server = uvicorn.Server(uvicorn.Config(make_app(service, key="key"), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not (server.started and service.is_ready):
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_cohere_client_reads_results(address, ranker, version):
    client = {"v1": cohere.Client, "v2": cohere.ClientV2}[version]("key", base_url=address)
    answer = client.rerank(model="tiny", query=QUERY, documents=TEXTS, top_n=2)
    scores = ranker.score(QUERY, TEXTS)
    order = np.argsort(-scores, kind="stable")[:2].tolist()
    assert [result.index for result in answer.results] == order
    assert [result.relevance_score for result in answer.results] == pytest.approx(sigmoid(scores[order]), abs=1e-5)
    if version == "v1":
        answer = client.rerank(model="tiny", query=QUERY, documents=[{"text": "cat"}], return_documents=True)
        assert answer.results[0].document.text == "cat"


@pytest.mark.parametrize(
    ("key", "changed", "error_type", "words"),
    [
        ("wrong", {}, cohere.UnauthorizedError, "The API key is missing or wrong"),
        ("key", {"query": ""}, cohere.BadRequestError, "query is empty"),
        ("key", {"documents": []}, cohere.BadRequestError, "documents is empty"),
        ("key", {"documents": ["b"] * 4}, cohere.BadRequestError, "the limit is 3"),
        ("key", {"documents": [1]}, cohere.UnprocessableEntityError, "documents.0: Input should be a valid string"),
        ("key", {"top_n": 0}, cohere.UnprocessableEntityError, "top_n: Input should be"),
        ("key", {"model": "rerank-v3.5"}, cohere.NotFoundError, "There is no model 'rerank-v3.5'"),
    ],
)
def test_cohere_client_raises_its_errors_with_our_reason(address, key, changed, error_type, words):
    client = cohere.ClientV2(key, base_url=address)
    arguments = {"model": "tiny", "query": QUERY, "documents": TEXTS} | changed
    with pytest.raises(error_type) as caught:
        client.rerank(**arguments, request_options=ONCE)
    assert isinstance(caught.value, ApiError)
    assert words in caught.value.body["message"]


def test_hub_client_reads_vectors(address, ranker, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the server is on this machine
    huggingface_hub.close_session()
    client = huggingface_hub.InferenceClient(base_url=f"{address}/embed", token="key")
    found = client.feature_extraction(TEXTS, prompt_name="query")
    assert np.array(found) == pytest.approx(ranker.encode_queries(TEXTS), abs=1e-5)


def test_teacher_behind_this_server_has_the_scores_of_the_ranker(address, ranker, monkeypatch):
    monkeypatch.setenv(API_KEY, "key")
    queries, wanted = [QUERY] * 3, ranker.score(QUERY, TEXTS)
    assert Endpoint(f"tei+{address}").score(queries, TEXTS) == pytest.approx(wanted, abs=1e-4)
    squashed = Endpoint(f"rerank+{address}/v2/rerank?model=tiny").score(queries, TEXTS)
    assert squashed == pytest.approx(sigmoid(wanted), abs=1e-4)
