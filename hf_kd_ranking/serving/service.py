"""The service of all endpoints: the model once it is loaded, the engine, limits and metrics."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.requests import Request

from ..errors import InputError
from .engine import Engine, Job, OverloadedError, Run
from .errors import RefusedError
from .model import ServedModel

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Limits:
    """Limits of a request.

    Args:
        body_bytes: of the body.
        documents: documents or texts.
        characters: of one text; the model reads its beginning only, see `truncate`.
    """

    body_bytes: int = 10_000_000
    documents: int = 1_000
    characters: int = 100_000


@dataclass
class Progress:
    """The stage of the start in words, and how many of its units are done; `total` is 0 if they cannot be counted."""

    stage: str = "Starting"
    done: int = 0
    total: int = 0

    def begin(self, stage: str, total: int = 0) -> None:
        """Begin a stage."""
        self.stage, self.done, self.total = stage, 0, total


class ClientGoneError(Exception):
    """The client closed the connection before its answer."""


class Metrics:
    """Counts and times of `/metrics`, in a registry of their own."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        names = ("endpoint", "status")
        shared = {"namespace": "ranking", "registry": self.registry}
        self.requests = Counter("requests", "Requests that were answered.", names, **shared)
        self.seconds = Histogram("request_seconds", "Time to answer.", names[:1], buckets=SECONDS, **shared)
        self.batch_jobs = Histogram("batch_jobs", "Parts of requests that shared a batch.", buckets=SIZES, **shared)
        self.tokens = Counter("tokens", "Tokens of all batches, as estimated from characters.", **shared)
        Gauge("waiting_jobs", "Parts of requests that wait for the model.", **shared).set_function(waiting)

    def observe_batch(self, jobs: Sequence[Job]) -> None:
        """Count a batch."""
        self.batch_jobs.observe(len(jobs))
        self.tokens.inc(sum(job.tokens for job in jobs))


class Service:
    """A model that is loaded by the engine's thread, and asked through `run`.

    Args:
        load: returns the model; it reports what it does by the progress that it is given.
        raw_scores: default of the requests' `raw_scores`.
        engine_settings: see `Engine`.
    """

    def __init__(
        self,
        load: Callable[[Progress], ServedModel],
        limits: Limits | None = None,
        raw_scores: bool = False,
        **engine_settings: Any,
    ) -> None:
        self.limits = limits or Limits()
        self.raw_scores = raw_scores
        self.progress = Progress()
        self.failure: BaseException | None = None
        self._loaded: ServedModel | None = None
        self._load = load
        self.on_failure: Callable[[], None] = lambda: None  # called if the model cannot be loaded, see `failure`
        self.metrics = Metrics(lambda: len(self.engine))
        self.engine = Engine(**engine_settings, on_batch=self.metrics.observe_batch)

    def start(self) -> Future:
        """Begin to load the model; the future ends when it is ready."""
        return self.engine.submit(self._open, [None], [0])[0]

    def _open(self, _: list[None]) -> list[None]:
        try:
            self._loaded = self._load(self.progress)
        except BaseException as error:
            self.failure = error
            self.on_failure()
        return [None]

    @property
    def is_ready(self) -> bool:
        """True once the model is loaded."""
        return self._loaded is not None

    @property
    def model(self) -> ServedModel:
        """The model; a refusal with status 503 until it is loaded."""
        if self._loaded is None:
            raise RefusedError(
                503, f"The server is starting: {self.progress.stage}; /health reports when it is ready."
            )
        return self._loaded

    async def run(self, request: Request, function: Run, inputs: Sequence[Any], tokens: Sequence[int]) -> list[Any]:
        """Queue the parts of a request, wait for them, and return their results.

        Raises:
            ClientGoneError: if the client closes the connection first; parts that did not begin are cancelled.
            RefusedError: if the queue is full, or the model fails.
        """
        try:
            futures = self.engine.submit(function, inputs, tokens)
        except OverloadedError as error:
            raise RefusedError(429, f"The server is overloaded: {error} Try again later.") from None
        answer = asyncio.gather(*map(asyncio.wrap_future, futures))
        gone = asyncio.ensure_future(_wait_until_gone(request))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise ClientGoneError
            return answer.result()
        except InputError as error:
            raise RefusedError(500, f"The model failed: {error}") from None
        finally:
            gone.cancel()
            answer.cancel()
            for future in futures:  # after an error of one part, the others
                future.cancel()

    def close(self) -> None:
        """Finish what waits and end the engine; an unfinished start is left behind."""
        self.engine.close(is_awaited=self.is_ready)


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
