"""A server on this machine that answers as the APIs of teachers do, or as a test wants it to."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np


def truth(query: str, document: str) -> float:
    """The score of the server's model."""
    return float(len(query) * 10 + len(document))


def good_answer(path: str, body: dict) -> object:
    """Answer as the API of the path does, in another order than that of the documents."""
    if path == "/v1/chat/completions":
        prompt = body["messages"][0]["content"]
        query, document = prompt.split("Query: ")[1].split("\n\nDocument: ")
        score = truth(query, document.removesuffix("\n\nAnswer:"))
        top = [{"token": " Yes", "logprob": -1.0}, {"token": "no", "logprob": -1.0 - score}]
        content = [{"token": " Yes", "logprob": -1.0, "top_logprobs": top}]
        return {"choices": [{"logprobs": {"content": content}}], "usage": {"total_tokens": 7}}
    if path == "/score":
        results = [{"index": i, "score": truth(body["text_1"], text)} for i, text in enumerate(body["text_2"])]
        return {"data": results[::-1], "usage": {"total_tokens": 7}}
    if "texts" in body:
        assert body["raw_scores"] is True
        return [{"index": i, "score": truth(body["query"], text)} for i, text in enumerate(body["texts"])][::-1]
    scores = [truth(body["query"], text) for text in body["documents"]]
    order = np.argsort(scores)[::-1].tolist()
    return {"results": [{"index": i, "relevance_score": scores[i]} for i in order[: body["top_n"]]]}


class Server(ThreadingHTTPServer):
    """A server on this machine; `answers` are given to the first requests, `good_answer` to the others.

    An answer is (status, headers, body); a body that is no string is sent as JSON.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server_address[1]}"
        self.answers: list[tuple[int, dict, object]] = []
        self.answer: Callable[[str, dict], object] = good_answer
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()
        self.running = self.most_running = 0


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.keys.append(self.headers["Authorization"])
            self.server.running += 1
            self.server.most_running = max(self.server.most_running, self.server.running)
            status, headers, answer = 200, {}, None
            if self.server.answers:
                status, headers, answer = self.server.answers.pop(0)
        if answer is None:
            answer = self.server.answer(self.path, body)
        with self.server.lock:
            self.server.running -= 1
        text = answer if isinstance(answer, str) else json.dumps(answer)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: object) -> None:
        """Say nothing."""
