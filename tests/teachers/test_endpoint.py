"""Teachers behind an endpoint, against a server that answers, fails, stalls, and answers nonsense."""

import json
import threading
import time

import numpy as np
import pytest
from endpoint_server import good_answer, truth

import hf_kd_ranking as kd
from hf_kd_ranking.errors import InputError
from hf_kd_ranking.teachers import endpoint as endpoints
from hf_kd_ranking.teachers.endpoint import API_KEY, PATHS, Endpoint, EndpointSettings
from hf_kd_ranking.teachers.prompts import CHAT_TEMPLATE, Prompt

QUERIES = ["a cat", "a cat", "a cat", "red dogs", "red dogs"]
DOCUMENTS = ["one", "seventeen", "four", "six and a half", "a"]
WANTED = [len(query) * 10 + len(document) for query, document in zip(QUERIES, DOCUMENTS, strict=True)]


@pytest.mark.parametrize("kind", PATHS)
def test_every_kind_scores_in_the_order_of_the_documents(kind, server):
    teacher = kd.load_teacher(f"http://{server.address}?model=me/m", kind, batch_size=2)
    assert teacher.name == "me-m"
    assert teacher.score(QUERIES, DOCUMENTS) == pytest.approx(WANTED)
    assert all(body["model"] == "me/m" for body in server.bodies)
    requests = {"chat": 5}.get(kind, 3)  # two documents of one query at most
    assert teacher.usage["requests"] == len(server.bodies) == requests
    assert teacher.usage["tokens"] == 7 * requests * (kind in ("score", "chat"))


def test_address_gives_kind_and_path(server):
    endpoint = Endpoint(f"tei+http://{server.address}/v2/rerank")
    assert (endpoint.kind, endpoint.url.path, endpoint.model) == ("tei", "/v2/rerank", None)
    assert endpoint.name == server.address.replace(":", "-")
    others = [Endpoint(f"http://{server.address}", "tei"), Endpoint(f"tei+http://{server.address}?model=m")]
    assert len({endpoint.fingerprint, *(other.fingerprint for other in others)}) == 3
    chat = Endpoint("http://host:1", "chat")
    other = Endpoint("http://host:1", "chat", prompt=Prompt(CHAT_TEMPLATE, yes="ja"))
    assert chat.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("address", "kind", "message"),
    [
        ("http://host:1", None, "The kind of http://host:1 is one of rerank, tei, score, chat, got None"),
        ("http://host:1", "bi-encoder", "got 'bi-encoder'"),
        ("tei+http://host:1", "score", "got 'score'"),
        ("ftp://host:1", "tei", "ftp://host:1 is not an address of the form http://HOST:PORT"),
        ("http://", "tei", "not an address"),
        ("http://host:port", "tei", "not an address"),
        ("http://me:secret@host:1", "tei", "holds a user or a password; the key is read from HF_KD_RANKING_ENDPOINT"),
    ],
)
def test_bad_address_is_refused(address, kind, message):
    with pytest.raises(InputError) as error:
        Endpoint(address, kind)
    assert message in str(error.value) and "secret" not in str(error.value)


def test_key_is_sent_and_never_shown(server, monkeypatch, capfd):
    monkeypatch.setenv(API_KEY, "very-secret")
    Endpoint(f"http://{server.address}", "rerank").score(["q"], ["d"])
    assert server.keys == ["Bearer very-secret"]
    server.answers = [(401, {}, "no such key")]
    with pytest.raises(PermissionError, match=rf"refuses the key of {API_KEY} \(status 401\)") as error:
        Endpoint(f"http://{server.address}", "rerank").score(["q"], ["d"])
    assert "secret" not in str(error.value) + "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("failure", "wait"),
    [
        ((429, {"Retry-After": "17"}, "slow down"), 17.0),
        ((429, {"Retry-After": "99999"}, "slow down"), 120.0),
        ((503, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, "loading"), 1.0),
        ((500, {}, "oops"), 1.0),
        ((200, {}, "<html>proxy</html>"), 1.0),
    ],
    ids=["429", "429-long", "503-date", "500", "not-json"],
)
def test_failure_that_passes_is_tried_again(failure, wait, server, waits):
    endpoint = Endpoint(f"http://{server.address}", "rerank")
    server.answers = [failure]
    assert endpoint.score(QUERIES[:3], DOCUMENTS[:3]) == pytest.approx(WANTED[:3])
    assert waits == [wait]
    assert endpoint.usage == {"requests": 2, "retries": 1, "tokens": 0}


def test_endpoint_that_is_down_or_stalls_ends_the_work_after_some_attempts(server, waits, monkeypatch):
    server.answers = [(500, {}, "oops")] * endpoints.ATTEMPTS
    with pytest.raises(
        ConnectionError, match="did not answer in 6 attempts, at last status 500: oops; the answers before"
    ):
        Endpoint(f"http://{server.address}", "rerank").score(["q"], ["d"])
    assert waits == [1, 2, 4, 8, 16]
    stalled = threading.Event()
    server.answer = lambda *_: stalled.wait(20) and {}
    monkeypatch.setattr(endpoints, "LONGEST_WAIT", 0.05)
    with pytest.raises(ConnectionError, match="at last ReadTimeout"):
        Endpoint(f"http://{server.address}", "rerank").score(["q"], ["d"])
    stalled.set()
    with pytest.raises(ConnectionError, match="at last ConnectError"):
        Endpoint("http://127.0.0.1:9", "rerank").score(["q"], ["d"])


RESULT = {"index": 0, "relevance_score": 1.0}


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (400, "too many documents", "refuses the request, status 400: too many documents"),
        (404, "no such model", "refuses the request, status 404: no such model"),
        (200, {"results": [RESULT]}, "answered 1 scores for 2 documents"),
        (200, {"results": [RESULT, RESULT]}, "answered 2 scores for 2 documents"),
        (200, {"results": [RESULT, {"index": 2, "relevance_score": 1.0}]}, "answered 2 scores for 2 documents"),
        (200, {"results": [RESULT, {"index": 1, "relevance_score": "high"}]}, "does not answer as an API of the kind"),
        (200, {"results": [RESULT, {"index": 1, "relevance_score": None}]}, "does not answer as an API of the kind"),
        (200, '{"results": [{"index": 0, "relevance_score": NaN}, {"index": 1, "relevance_score": 1}]}', "not finite"),
        (200, {"error": "overloaded"}, "does not answer as an API of the kind rerank: KeyError"),
        (200, "[1, 2]", "does not answer as an API of the kind rerank"),
    ],
)
def test_answer_that_is_no_score_per_document_is_refused(status, answer, message, server):
    server.answers = [(status, {}, answer)]
    with pytest.raises(InputError) as error:
        Endpoint(f"http://{server.address}", "rerank").score(["q", "q"], ["a", "b"])
    assert message in str(error.value) and len(server.bodies) == 1


def chat(*tokens: tuple[str, float]) -> dict:
    top = [{"token": token, "logprob": logprob} for token, logprob in tokens]
    return {"choices": [{"logprobs": {"content": [{"token": tokens[0][0], "top_logprobs": top}]}}]}


def test_chat_models_answers_are_summed_and_bounded(server):
    endpoint = Endpoint(f"http://{server.address}", "chat", prompt=Prompt(CHAT_TEMPLATE, "True", "False"))
    half = np.log(0.25)
    server.answers = [(200, {}, chat(("True", half), (" true", half), ("maybe", -2.0), ("FALSE", -3.0)))]
    assert endpoint.score(["q"], ["d"]) == pytest.approx([np.log(0.5) + 3])
    server.answers = [(200, {}, chat(("True", -0.5), ("maybe", -6.0)))]  # False has at most the probability of maybe
    assert endpoint.score(["q"], ["d"]) == pytest.approx([-0.5 + 6])
    server.answers = [(200, {}, chat(("Perhaps", -0.5)))]
    with pytest.raises(InputError, match="the answer 'Perhaps' is neither True nor False"):
        endpoint.score(["q"], ["d"])
    assert server.bodies[0]["messages"][0]["content"].startswith(
        "Judge whether the document answers the query. Answer"
    )


def test_prompt_takes_texts_as_they_are():
    prompt = Prompt("{yes}/{no}: {query} | {document} | {}")
    assert prompt.fill("{document} a", "{query} {}") == "yes/no: {document} a | {query} {} | {}"
    with pytest.raises(InputError, match="is asked as tei and reads no prompt"):
        Endpoint("http://host:1", "tei", prompt=prompt)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"concurrency": 0}, "concurrency is a number of requests, at least 1; got 0"),
        ({"requests_per_minute": 0}, "requests_per_minute is a number above 0, got 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(InputError) as error:
        EndpointSettings(**settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"template": "{query}"}, "The template needs {document} once, where the text is put, and has it 0 times"),
        ({"template": "{query} {document} {query}"}, "needs {query} once, where the text is put, and has it 2 times"),
        ({"yes": "No "}, "two different words"),
        ({"no": " "}, "two different words"),
    ],
)
def test_bad_prompt_is_refused(values, message):
    with pytest.raises(InputError) as error:
        Prompt(**values)
    assert message in str(error.value)


def test_requests_run_at_the_same_time_and_keep_to_the_limit(server, waits):
    together = threading.Barrier(3)  # no request is answered before three are there

    def answer(path: str, body: dict) -> object:
        together.wait(20)
        return good_answer(path, body)

    server.answer = answer
    queries = [f"query {number}" for number in range(6)]
    endpoint = Endpoint(f"http://{server.address}", "tei", settings=EndpointSettings(concurrency=3))
    assert endpoint.score(queries, ["d"] * 6) == pytest.approx([71.0] * 6)
    assert server.most_running == 3 and not waits
    server.answer = good_answer
    start = time.monotonic()
    endpoint = Endpoint(f"http://{server.address}", "tei", settings=EndpointSettings(1, requests_per_minute=60))
    endpoint.score(queries, ["d"] * 6)
    slack = time.monotonic() - start  # no pause was made, so that each request waits for all before it
    assert len(waits) == 5 and max(waits) == pytest.approx(5, abs=slack)


def test_squashed_scores_are_warned_of_once(server, caplog):
    server.answer = lambda path, body: [{"index": i, "score": 0.5} for i in range(len(body["texts"]))]
    endpoint = Endpoint(f"http://{server.address}", "tei")
    for _ in range(2):
        endpoint.score(["q"] * 25, [f"d{i}" for i in range(25)])
    assert caplog.text.count("lie within [0, 1], as after a sigmoid") == 1


# ---- The command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def command(server, toy, tmp_path) -> str:
    texts = f"--queries {toy / 'queries.tsv'} --collection {toy / 'collection.tsv'}"
    candidates = f"--candidates {toy / 'candidates.trec'} --output {tmp_path / 'run.trec'}"
    return f"teacher score --model http://{server.address} --kind tei {texts} {candidates} --batch-size 4 --json"


def test_run_is_planned_scored_and_resumed(command, server, toy, tmp_path, call, waits, monkeypatch):
    monkeypatch.setattr("hf_kd_ranking.teachers.score.PAIRS_PER_BLOCK", 16)
    status, printed, error = call(f"{command} --plan-only")
    assert status == 0, error
    plan = json.loads(printed)
    assert plan["pairs"] == 40 and not server.bodies and not (tmp_path / "run.trec").exists()
    server.answer = lambda path, body: good_answer(path, body) if len(server.bodies) < 9 else "broken"
    status, _, error = call(f"{command} --concurrency 1")
    assert status == 1 and "the answers before are kept, and the same command resumes" in error
    server.answer = good_answer
    status, printed, error = call(command)
    assert status == 0, error
    counts = json.loads(printed)
    assert (counts["rows"], counts["pairs"], counts["resumed"]) == (40, 40, 16)
    assert counts["requests"] < plan["requests"]
    queries, documents = kd.TextStore.from_tsv(toy / "queries.tsv"), kd.TextStore.from_tsv(toy / "collection.tsv")
    for query_id, ranking in kd.read_run(tmp_path / "run.trec").items():
        for doc_id, score in ranking:
            assert score == truth(queries[query_id], documents[doc_id])
    server.bodies.clear()
    (tmp_path / "run.trec").unlink()
    status, printed, _ = call(command)
    assert (status, len(server.bodies)) == (0, plan["requests"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("--template {missing}", "does not exist"),
        ("--template {file}", "The template needs {document} once"),
        ("--yes no", "two different words"),
        ("--requests-per-minute -1", "requests_per_minute is a number above 0"),
    ],
)
def test_bad_options_are_refused(changed, message, command, call, tmp_path):
    (tmp_path / "template.txt").write_text("{query}?")
    changed = changed.replace("{missing}", str(tmp_path / "none.txt")).replace(
        "{file}", str(tmp_path / "template.txt")
    )
    status, _, error = call(f"{command} {changed}")
    assert status == 2 and message in error


def test_options_of_endpoints_are_refused_for_models(command, call, encoder, server):
    of_model = command.replace(f"http://{server.address}", str(encoder)).replace("--kind tei", "")
    for option in ("--concurrency 2", "--plan-only"):
        status, _, error = call(f"{of_model} {option}")
        assert status == 2 and f"{option.split()[0]} is for the address of an endpoint" in error


def test_endpoint_teaches_a_distillation(server, call, encoder, toy, tmp_path):
    files = f"--collection {toy / 'collection.tsv'} --queries {toy / 'queries.tsv'} --output {tmp_path / 'out'}"
    settings = "--architectures bert_dot --learning-rates 0.01 --k 5 --lists-per-query 2 --held-out 0.3 --no-fusion"
    lengths = "--max-query-length 8 --max-document-length 16 --depths 5"
    command = f"distill {files} --teacher tei+http://{server.address} --model {encoder} {settings} {lengths} --json"
    status, _, error = call(f"{command} --plan-only")
    assert status == 0 and not server.bodies, error
    status, printed, error = call(command)
    assert status == 0, error
    outcome = json.loads(printed.splitlines()[-1])
    assert "teacher" in outcome["test"] and "bert_dot teacher" in outcome["test"]
    assert server.bodies
