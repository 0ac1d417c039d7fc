"""Every request passes these: key, CORS, headers, log, metrics, host names; and clients that leave."""

import asyncio
import json
import logging
import threading

import httpx
import numpy as np
import pytest

from hf_kd_ranking.serving.app import make_app
from hf_kd_ranking.serving.model import ServedModel
from hf_kd_ranking.serving.service import Service

pytestmark = pytest.mark.parametrize("model", ["bert_cat"], indirect=True)
BODY = {"query": "a secret", "documents": ["confidential apple", "bread"]}
KEY = "kéy"


def bearer(key):
    return {"Authorization": b"Bearer " + key.encode()}


def test_key_protects_all_but_health_and_the_page(serve, ranker):
    client = serve(ServedModel("tiny", ranker), key=KEY)
    for path in ("/health", "/docs", "/openapi.json", "/static/docs.js"):
        assert client.get(path).status_code == 200, path
    for path in ("/metrics", "/v1/models"):
        assert client.get(path).status_code == 401, path
        assert client.get(path, headers=bearer(KEY)).status_code == 200, path
    for path in ("/rerank", "/v1/rerank", "/v2/rerank", "/embed", "/search"):
        for headers in ({}, bearer("wrong"), bearer(""), {"Authorization": KEY.encode()}, {"Authorization": "Bearer"}):
            answer = client.post(path, json=BODY, headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert answer.json()["error_type"] == "Unauthorized"
    assert client.post("/rerank", json=BODY, headers=bearer(KEY)).status_code == 200


def test_other_sites_may_read_answers_only_if_allowed(serve, ranker):
    origin = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    model = ServedModel("tiny", ranker)
    assert "access-control-allow-origin" not in serve(model).post("/rerank", json=BODY, headers=origin).headers
    client = serve(model, key=KEY, allowed_origins=["https://app.example"])
    preflight = client.options("/rerank", headers=origin | {"Access-Control-Request-Headers": "Authorization"})
    assert preflight.status_code == 200
    answer = client.post("/rerank", json=BODY, headers=origin | bearer(KEY))
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    other = client.post("/rerank", json=BODY, headers=origin | bearer(KEY) | {"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


def test_access_log_is_json_without_texts(client, caplog):
    caplog.set_level(logging.INFO, "hf_kd_ranking.serving.access")
    client.post("/rerank", json=BODY)
    client.post("/rerank", content=b"{")
    client.get("/?q=a+secret+confidential")
    lines = [json.loads(record.message) for record in caplog.records if record.name.endswith("access")]
    found = [(line["method"], line["path"], line["status"], line["documents"]) for line in lines]
    assert found == [("POST", "/rerank", 200, 2), ("POST", "/rerank", 422, None), ("GET", "/", 200, None)]
    assert all(line["ms"] > 0 and line["client"] == "testclient" for line in lines)
    assert "secret" not in caplog.text and "confidential" not in caplog.text


def test_metrics_count_requests_batches_and_unknown_paths_as_one(client):
    for path in ("/rerank", "/rerank", "/made/up/1", "/made/up/2"):
        client.post(path, json=BODY)
    lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#")
    assert lines['ranking_requests_total{endpoint="/rerank",status="200"}'] == "2.0"
    assert lines['ranking_requests_total{endpoint="other",status="404"}'] == "2.0"
    assert lines['ranking_request_seconds_count{endpoint="/rerank"}'] == "2.0"
    assert lines["ranking_batch_jobs_count"] == "3.0"  # one loaded the model
    assert float(lines["ranking_tokens_total"]) > 0
    assert lines["ranking_waiting_jobs"] == "0.0"


def test_pages_have_headers_and_no_foreign_addresses(client, serve, ranker):
    for path in ("/docs", "/static/docs.js", "/static/page.js", "/static/style.css", "/static/index.html", "/none"):
        answer = client.get(path)
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert (policy["default-src"], policy["script-src"], policy["style-src"]) == ("'none'", "'self'", "'self'")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "//" not in answer.text.replace("http://www.w3.org/2000/svg", "").replace("// ", "")
        for inline in ("<style", "style=", "<script>"):
            assert inline not in answer.text
    assert client.get("/static/../app.py").status_code == 404
    assert "<form" not in client.get("/").text  # without a collection there is no page to search
    assert "<form" in serve(ServedModel("tiny", ranker), about={"title": "Toy", "examples": []}).get("/").text


def test_description_of_the_page(serve, engine):
    client = serve(ServedModel("tiny", engine.pipeline.ranker, search=engine), {"title": "Toy", "examples": ["cat"]})
    described = {"name": "tiny", "title": "Toy", "examples": ["cat"], "documents": 41, "line": engine.describe()}
    assert client.get("/about").json() == described


def test_openapi_describes_every_endpoint(client):
    api = client.get("/openapi.json").json()
    wanted = {"/rerank", "/v1/rerank", "/v2/rerank", "/embed", "/search", "/health", "/v1/models", "/metrics"}
    assert set(api["paths"]) == wanted
    fields = api["components"]["schemas"]["RerankRequest"]["properties"]
    assert {"query", "documents", "top_n", "return_documents", "model", "raw_scores"} <= set(fields)


def test_foreign_host_name_is_refused(client):
    assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 400


def test_request_of_a_client_that_leaves_is_not_computed(ranker, caplog):
    caplog.set_level(logging.INFO, "hf_kd_ranking.serving.access")
    began, go, scored = threading.Event(), threading.Event(), []

    class Slow(ServedModel):
        def score_texts(self, batch):
            scored.extend(query for query, _ in batch)
            began.set()
            assert go.wait(20)
            return [np.zeros(len(texts), np.float32) for _, texts in batch]

    async def leave():
        service = Service(lambda progress: Slow("tiny", ranker))
        app = make_app(service)
        await asyncio.wrap_future(service.start())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
            first = asyncio.create_task(http.post("/rerank", json={"query": "first", "texts": ["a"]}))
            await asyncio.to_thread(began.wait, 20)
            abandoned = asyncio.create_task(_ask_and_leave(app, {"query": "abandoned", "texts": ["a"]}))
            await abandoned
            go.set()
            last = await http.post("/rerank", json={"query": "last", "texts": ["a"]})
            answers = (await first).status_code, last.status_code
        service.close()
        return answers

    assert asyncio.run(asyncio.wait_for(leave(), 20)) == (200, 200)
    assert scored == ["first", "last"]
    statuses = [json.loads(record.message)["status"] for record in caplog.records if record.name.endswith("access")]
    assert sorted(statuses) == [200, 200, 499]


async def _ask_and_leave(app, body):
    """Send a request as a server would that sees its client leave."""
    messages = [{"type": "http.request", "body": json.dumps(body).encode()}, {"type": "http.disconnect"}]

    async def receive():
        return messages.pop(0)

    async def send(message):
        pass

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/rerank", "raw_path": b"/rerank", "query_string": b""}
    scope |= {"headers": headers, "client": ("127.0.0.1", 1), "server": ("localhost", 80), "scheme": "http"}
    await app(scope | {"asgi": {"version": "3.0"}, "http_version": "1.1", "root_path": ""}, receive, send)
