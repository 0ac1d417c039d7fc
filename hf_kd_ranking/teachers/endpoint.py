"""Teachers behind an endpoint: rerank APIs, text-embeddings-inference, vLLM, and chat models with log-probabilities.

The key of an endpoint is read from the environment variable HF_KD_RANKING_ENDPOINT_KEY and from nowhere else.
"""

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TypeVar

import httpx2
import numpy as np
import xxhash

from ..errors import InputError
from .prompts import CHAT_TEMPLATE, Prompt

API_KEY = "HF_KD_RANKING_ENDPOINT_KEY"
# Kind -> path of the API, for an address without one.
PATHS = {"rerank": "/rerank", "tei": "/rerank", "score": "/score", "chat": "/v1/chat/completions"}
ATTEMPTS = 6  # of a request; waits of 1, 2, 4, 8 and 16 s between them, or what the server asks for
LONGEST_WAIT = 120.0  # seconds, for an answer and for what a server may ask for
TOP_LOGPROBS = 20  # the most that OpenAI and vLLM give
CHARACTERS_PER_TOKEN = 4  # of English; for estimates
SQUASHED_FROM = 20  # scores that must all be within [0, 1] before a warning

logger = logging.getLogger(__name__)
Pair = tuple[str, str]
T = TypeVar("T")


@dataclass(frozen=True)
class EndpointSettings:
    """How an endpoint is asked.

    Args:
        concurrency: requests at the same time.
        requests_per_minute: the most that are sent; None sets no limit.
    """

    concurrency: int = 8  # requests at the same time
    requests_per_minute: float | None = None  # the most that are sent; None sets no limit

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise InputError(f"concurrency is a number of requests, at least 1; got {self.concurrency}.")
        if self.requests_per_minute is not None and not 0 < self.requests_per_minute < math.inf:
            raise InputError(f"requests_per_minute is a number above 0, got {self.requests_per_minute}.")


def is_endpoint(name: str) -> bool:
    """Return whether the name of a teacher is an address."""
    return "://" in name


@dataclass
class Endpoint:
    """A teacher that is asked over HTTP.

    Args:
        address: `http://HOST:PORT`, with the API's path if it is not the usual one, `?model=NAME` if the API wants the
            name of a model, and optionally the kind before it, as in `tei+http://HOST:PORT`.
        kind: "rerank" (Cohere, Jina, vLLM), "tei" (text-embeddings-inference, raw scores), "score" (vLLM), or "chat"
            (OpenAI's chat completions with log-probabilities); None reads it from the address.
        per_request: documents of one query per request; "chat" has one.
        prompt: prompt and answers of a chat model, the answers compared without case and white space.
        settings: see `EndpointSettings`.

    Raises:
        InputError: if the address is malformed or holds a password, or the kind is missing or unknown.
    """

    address: str
    kind: str | None = None  # None reads it from the address
    per_request: int = 32  # documents of one query; "chat" has one
    prompt: Prompt | None = None  # of a chat model, whose answers are compared without case and white space
    settings: EndpointSettings = field(default_factory=EndpointSettings)

    def __post_init__(self) -> None:
        scheme, _, rest = self.address.partition("://")
        named, plus, scheme = scheme.rpartition("+")
        self.kind = self.kind or named or None
        if self.kind not in PATHS or (plus and named != self.kind):
            raise InputError(f"The kind of {self.address} is one of {', '.join(PATHS)}, got {self.kind!r}.")
        try:
            url = httpx2.URL(f"{scheme}://{rest}")
        except httpx2.InvalidURL as error:
            raise InputError(f"{self.address} is not an address: {error}.") from None
        if url.scheme not in ("http", "https") or not url.host:
            raise InputError(f"{self.address} is not an address of the form http://HOST:PORT.")
        if url.userinfo:
            raise InputError(f"The address of {url.host} holds a user or a password; the key is read from {API_KEY}.")
        self.model = url.params.get("model")
        self.url = url.copy_with(query=None, fragment=None)
        if self.url.path in ("", "/"):
            self.url = self.url.copy_with(path=PATHS[self.kind])
        if self.prompt is not None and self.kind != "chat":
            raise InputError(f"{self.address} is asked as {self.kind} and reads no prompt; it is for chat models.")
        self.prompt = self.prompt or Prompt(CHAT_TEMPLATE)
        self.name = (self.model or f"{url.host}-{url.port or url.scheme}").replace("/", "-")
        self.usage = {"requests": 0, "retries": 0, "tokens": 0}
        self._pace = _Pace(self.settings.requests_per_minute)
        self._lock = threading.Lock()
        self._is_warned = False

    @property
    def fingerprint(self) -> str:
        """Return a digest of what determines the scores: address, kind, model and prompt."""
        settings = (str(self.url), self.kind, self.model)
        if self.kind == "chat":
            settings += (self.prompt,)
        return xxhash.xxh3_128_hexdigest(repr(settings).encode())

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        """Score query i with document i; (N,) float32.

        Raises:
            InputError: if the endpoint refuses the request, or answers something else than a score per document.
            PermissionError: if it refuses the key.
            ConnectionError: if it does not answer after `ATTEMPTS` attempts.
        """
        requests = self.requests(queries, documents)
        bodies = [self._body(pairs) for pairs in requests]
        scores: list[float] = []
        for of_request in self._ask_all(bodies, lambda answer, place: self._read(answer, len(requests[place]))):
            scores += of_request
        self._warn_of_squashed(scores)
        return np.array(scores, dtype=np.float32)

    def complete(self, prompts: Sequence[str], most_tokens: int) -> list[str]:
        """Return a chat model's answer to each prompt, of at most `most_tokens` tokens; errors as `score`."""
        bodies = []
        for prompt in prompts:
            bodies.append(self._chat(prompt, max_tokens=most_tokens))
        return self._ask_all(bodies, lambda answer, _: self._read_text(answer))

    def requests(self, queries: Sequence[str], documents: Sequence[str]) -> list[list[Pair]]:
        """Return the pairs of each request, in the order given."""
        most = 1 if self.kind == "chat" else self.per_request
        requests = []
        for _, of_query in groupby(zip(queries, documents, strict=True), key=lambda pair: pair[0]):
            pairs = list(of_query)
            for start in range(0, len(pairs), most):
                requests.append(pairs[start : start + most])
        return requests

    def tokens(self, query: str, document: str) -> int:
        """Estimate the tokens of a pair."""
        text = query + document
        if self.kind == "chat":
            text = self.prompt.fill(query, document)
        return math.ceil(len(text) / CHARACTERS_PER_TOKEN)

    def _ask_all(self, bodies: Sequence[dict[str, Any]], read: Callable[[Any, int], T]) -> list[T]:
        """Send all requests, some at the same time, and return what `read` makes of each answer and its place."""
        headers = {}
        if os.environ.get(API_KEY):
            headers["Authorization"] = f"Bearer {os.environ[API_KEY]}"
        with httpx2.Client(headers=headers, timeout=LONGEST_WAIT) as client:
            pool = ThreadPoolExecutor(self.settings.concurrency)
            try:
                return list(pool.map(lambda place: read(self._ask(client, bodies[place]), place), range(len(bodies))))
            finally:
                pool.shutdown(cancel_futures=True)

    def _ask(self, client: httpx2.Client, body: dict[str, Any]) -> Any:
        """Send one request, again after failures that pass, and return the answer."""
        problem = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                self._count(retries=1)
            self._pace.wait()
            self._count(requests=1)
            wait = 2.0**attempt
            try:
                response = client.post(self.url, json=body)
                if response.status_code in (401, 403):
                    raise PermissionError(f"{self.url} refuses the key of {API_KEY} (status {response.status_code}).")
                if response.status_code == 200:
                    return response.json()
                problem = f"status {response.status_code}: {response.text[:200]}"
                if response.status_code not in (408, 409, 425, 429) and response.status_code < 500:
                    raise InputError(f"{self.url} refuses the request, {problem}")
                wait = _seconds(response.headers.get("Retry-After"), wait)
            except InputError:
                raise
            except httpx2.RequestError as error:
                problem = f"{type(error).__name__} {error}".strip()
            except ValueError as error:  # not JSON, as the page of a proxy
                problem = f"an answer that is not JSON ({error})"
            if attempt + 1 < ATTEMPTS:
                time.sleep(min(wait, LONGEST_WAIT))
        raise ConnectionError(
            f"{self.url} did not answer in {ATTEMPTS} attempts, at last {problem}; the answers before are kept, and "
            "the same command resumes."
        )

    def _body(self, pairs: list[Pair]) -> dict[str, Any]:
        query, documents = pairs[0][0], [document for _, document in pairs]
        body: dict[str, Any] = {}
        if self.model is not None:
            body["model"] = self.model
        if self.kind == "tei":
            return body | {"query": query, "texts": documents, "raw_scores": True, "truncate": True}
        if self.kind == "score":
            return body | {"text_1": query, "text_2": documents}
        if self.kind == "rerank":
            return body | {"query": query, "documents": documents, "top_n": len(documents)}
        prompt = self.prompt.fill(query, documents[0])
        return self._chat(prompt, max_tokens=1, logprobs=True, top_logprobs=TOP_LOGPROBS)

    def _chat(self, prompt: str, **options: Any) -> dict[str, Any]:
        body = {"messages": [{"role": "user", "content": prompt}], "temperature": 0, **options}
        if self.model is not None:
            body["model"] = self.model
        return body

    def _read_text(self, answer: Any) -> str:
        try:
            self._count(tokens=_used_tokens(answer))
            return (answer["choices"][0]["message"]["content"] or "").strip()  # None if the model refused
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise self._wrong_answer(error, answer) from None

    def _wrong_answer(self, error: Exception, answer: Any) -> InputError:
        shown = f"{type(error).__name__} {error}, in {str(answer)[:200]}"
        return InputError(f"{self.url} does not answer as an API of the kind {self.kind}: {shown}")

    def _read(self, answer: Any, count: int) -> list[float]:
        if isinstance(answer, Mapping):
            self._count(tokens=_used_tokens(answer))
        try:
            if self.kind == "chat":
                return [_yes_minus_no(answer, self.prompt)]
            if self.kind == "score":
                results, name = answer["data"], "score"
            elif self.kind == "rerank":
                results, name = answer["results"], "relevance_score"
            else:
                results, name = answer, "score"
            scores = dict.fromkeys(range(count))
            for result in results:
                scores[result["index"]] = float(result[name])
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise self._wrong_answer(error, answer) from None
        values = list(scores.values())
        if len(values) != count or None in values or len(results) != count:
            raise InputError(f"{self.url} answered {len(results)} scores for {count} documents: {str(answer)[:200]}")
        if not np.isfinite(values).all():
            raise InputError(f"{self.url} answered a score that is not finite: {str(answer)[:200]}")
        return values

    def _count(self, **counts: int) -> None:
        with self._lock:
            for name, count in counts.items():
                self.usage[name] += count

    def _warn_of_squashed(self, scores: Sequence[float]) -> None:
        is_squashed = len(scores) >= SQUASHED_FROM and min(scores) >= 0 and max(scores) <= 1
        if is_squashed and not self._is_warned:
            self._is_warned = True
            logger.warning(
                f"All scores of {self.url} lie within [0, 1], as after a sigmoid, so that large margins look small; "
                "ask for raw scores, or train with a loss that reads the order only (adr_mse, order_ranknet)."
            )


class _Pace:
    """Let at most so many requests per minute begin, from all threads together."""

    def __init__(self, per_minute: float | None) -> None:
        self._interval = 0.0 if per_minute is None else 60 / per_minute
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Wait for the turn of one request."""
        with self._lock:
            start = max(time.monotonic(), self._next)
            self._next = start + self._interval
        time.sleep(max(0.0, start - time.monotonic()))


def _seconds(header: str | None, default: float) -> float:
    """Return the seconds of a Retry-After header; the default for none, and for a date."""
    try:
        return max(float(header), 0.0)
    except (TypeError, ValueError):
        return default


def _used_tokens(answer: Mapping[str, Any]) -> int:
    """Return the tokens that an answer says it cost: OpenAI's, vLLM's and Jina's form."""
    usage = answer.get("usage")
    tokens = usage.get("total_tokens") if isinstance(usage, Mapping) else None
    return tokens if isinstance(tokens, int) else 0


def _yes_minus_no(answer: Mapping[str, Any], prompt: Prompt) -> float:
    """Return the difference of the log-probabilities of the two answers at the first token.

    An answer that is not among the most probable tokens has at most the probability of the last of these.
    """
    token = answer["choices"][0]["logprobs"]["content"][0]
    found: dict[str, list[float]] = {prompt.yes.strip().lower(): [], prompt.no.strip().lower(): []}
    lowest = math.inf
    for candidate in token["top_logprobs"]:
        lowest = min(lowest, candidate["logprob"])
        logprobs = found.get(candidate["token"].strip().lower())
        if logprobs is not None:
            logprobs.append(candidate["logprob"])
    if not any(found.values()):
        raise ValueError(f"the answer {token['token']!r} is neither {prompt.yes} nor {prompt.no}")
    yes, no = (float(np.logaddexp.reduce(logprobs or [lowest])) for logprobs in found.values())
    return yes - no
