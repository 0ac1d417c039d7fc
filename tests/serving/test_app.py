"""The application: answers, limits, escaping and headers."""

import asyncio
import threading
from dataclasses import asdict

import httpx
import pytest
from starlette.testclient import TestClient

from hf_kd_ranking.serving.app import Limits, SearchPage, make_app
from hf_kd_ranking.serving.connections import find_client
from hf_kd_ranking.serving.search import Results

ABOUT = {"title": "Toy", "documents": 41, "examples": [], "name": "a", "line": "ranks"}


class Slow:
    """An engine that searches until an event is set, and counts how many searches run at once."""

    def __init__(self):
        self.go = threading.Event()
        self.most = self.running = 0

    def search(self, query):
        self.running += 1
        self.most = max(self.most, self.running)
        self.go.wait(10)
        self.running -= 1
        return Results(query, None, {}, [])


class Quick:
    """An engine that finds nothing."""

    def search(self, query):
        return Results(query, 0, {"BM25": 1.0}, [])


def client(engine, *arguments, peer="127.0.0.1", **settings):
    app = make_app(SearchPage(engine, ABOUT, *arguments, **settings))
    return TestClient(app, base_url="http://localhost", client=(peer, 50_000))


@pytest.mark.parametrize("model", ["colbert"], indirect=True)
def test_answer_equals_the_engine_and_keeps_markup_as_text(engine, hostile):
    page = client(engine)
    answer = page.get("/api/search", params={"q": " king \n script "})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    results = answer.json()
    wanted = asdict(engine.search("king script"))
    assert results["query"] == "king script"
    assert results["hits"] == wanted["hits"]
    (hit,) = [hit for hit in results["hits"] if hit["doc_id"] == "<b>41</b>"]
    assert "".join(part["text"] for part in hit["parts"]) == hostile
    assert page.get("/api/search", params={"q": "<script>\0alert(1)</script>"}).json()["query"].startswith("<script>")


def test_page_files_have_headers_and_no_foreign_addresses():
    page = client(Quick())
    assert page.get("/api/about").json() == ABOUT | {"characters": 300}
    for path in ("/", "/style.css", "/page.js", "/icon.svg", "/api/about", "/api/search?q=", "/none"):
        answer = page.get(path)
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert (policy["default-src"], policy["script-src"], policy["style-src"]) == ("'none'", "'self'", "'self'")
        assert answer.headers["x-content-type-options"] == "nosniff"
        allowed = ("http://www.w3.org/2000/svg", "// ")  # the name of a format, and comments
        text = answer.text
        for part in allowed:
            text = text.replace(part, "")
        assert "//" not in text
    html = page.get("/").text
    for inline in ("<style", "style=", "<script>"):
        assert inline not in html
    assert " on" not in html.split("<body")[0]
    assert page.get("/../app.py").status_code == 404


@pytest.mark.parametrize(
    ("query", "message"),
    [("", "The query is empty"), (" \n", "The query is empty"), ("x" * 301, "has 301 characters, the limit is 300")],
)
def test_bad_query_is_refused_in_one_line(query, message):
    answer = client(Quick()).get("/api/search", params={"q": query})
    error = answer.json()["error"]
    assert (answer.status_code, message in error, "\n" in error) == (400, True, False)


def test_mismatched_index_is_reported_in_one_line():
    class Torn:
        def search(self, query):
            raise KeyError("doc_id 'd7' is not among the documents of index")

    answer = client(Torn()).get("/api/search", params={"q": "king"})
    assert answer.status_code == 500
    assert answer.json()["error"].endswith("do not belong together: doc_id 'd7' is not among the documents of index")


def test_queries_per_client_are_limited_every_minute(monkeypatch):
    now = [1_000.0]
    monkeypatch.setattr("hf_kd_ranking.serving.app.time.monotonic", lambda: now[0])
    page = client(Quick(), Limits(per_minute=2), behind_proxy=True)

    def ask(addresses):
        return page.get("/api/search?q=a", headers={"X-Forwarded-For": addresses}).status_code

    # The proxy appends the address that it sees; what a client writes before it counts for nothing.
    assert [ask("1.1.1.1"), ask("9.9.9.9, 1.1.1.1"), ask("8.8.8.8, 1.1.1.1"), ask("2.2.2.2")] == [200, 200, 429, 200]
    now[0] += 60
    assert ask("1.1.1.1") == 200


@pytest.mark.parametrize(
    ("peer", "forwarded", "wanted"),
    [
        ("10.0.0.2", [], "10.0.0.2"),
        ("10.0.0.2", ["1.1.1.1"], "1.1.1.1"),
        ("127.0.0.1", ["9.9.9.9, 1.1.1.1"], "1.1.1.1"),  # the client wrote 9.9.9.9
        ("127.0.0.1", ["9.9.9.9", "1.1.1.1"], "1.1.1.1"),  # two headers
        ("::1", ["9.9.9.9, 1.1.1.1, 10.0.0.7, 192.168.0.1"], "1.1.1.1"),  # two proxies
        ("127.0.0.1", ["10.0.0.8, 10.0.0.7"], "10.0.0.7"),
        ("8.8.8.8", ["1.1.1.1"], "8.8.8.8"),  # no proxy
        ("testclient", ["1.1.1.1"], "testclient"),
        ("127.0.0.1", ["1.1.1.1, unknown"], "127.0.0.1"),
        ("127.0.0.1", [" 2600:1f18::1:2:3 "], "2600:1f18::/64"),  # its owner has every address of the network
        ("127.0.0.1", ["::ffff:1.1.1.1"], "1.1.1.1"),
    ],
)
def test_the_client_is_the_last_address_that_no_proxy_has(peer, forwarded, wanted):
    assert find_client(peer, forwarded) == wanted


def test_a_client_that_names_new_addresses_does_not_escape_the_limit():
    page = client(Quick(), Limits(per_minute=2, by_proxy=5), behind_proxy=True)
    direct = client(Quick(), Limits(per_minute=2, by_proxy=5), behind_proxy=True, peer="1.2.3.4")
    for asked, allowed in ((page, 5), (direct, 2)):
        statuses = []
        for number in range(8):
            headers = {"X-Forwarded-For": f"9.9.9.{number}"}
            statuses.append(asked.get("/api/search?q=a", headers=headers).status_code)
        assert statuses == [200] * allowed + [429] * (8 - allowed)


def test_proxy_header_is_ignored_without_a_proxy():
    page = client(Quick(), Limits(per_minute=1))
    statuses = [page.get("/api/search?q=a", headers={"X-Forwarded-For": f"{i}.1.1.1"}).status_code for i in range(2)]
    assert statuses == [200, 429]


def test_one_search_runs_a_few_wait_and_the_rest_are_refused():
    engine = Slow()
    app = make_app(SearchPage(engine, ABOUT, Limits(waiting=3)))

    async def ask_all():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
            asked = [asyncio.create_task(http.get("/api/search?q=a")) for _ in range(5)]
            while sum(task.done() for task in asked) < 2:
                await asyncio.sleep(0.01)
            engine.go.set()
            return await asyncio.gather(*asked), await http.get("/api/search?q=b")

    answers, later = asyncio.run(asyncio.wait_for(ask_all(), 20))
    assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 429, 429]
    assert {a.json()["error"] for a in answers if a.status_code == 429} == {
        "Too many searches at once; try again in a few seconds."
    }
    assert (later.status_code, engine.most) == (200, 1)


def test_foreign_host_name_is_refused():
    assert client(Quick()).get("/api/about", headers={"Host": "evil.example"}).status_code == 400
