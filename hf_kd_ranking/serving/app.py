"""The web application: a static page, what it is about, and a search with limits. It loads nothing from elsewhere."""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from .search import SearchEngine

STATIC = Path(__file__).parent / "static"
HEADERS = {
    # A Space is shown in a frame of the Hub's page.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'self' https://huggingface.co",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class Limits:
    """What a server takes on.

    Args:
        characters: of a query.
        per_minute: queries of a client.
        waiting: queries that are searched or wait for their turn; one is searched at a time.
    """

    characters: int = 300
    per_minute: int = 60
    waiting: int = 8


class SearchPage:
    """The page's two answers: what it searches, and what a query finds.

    Args:
        engine: that searches.
        about: what the page says of itself: `title`, `documents` (their number), `examples` (queries), and `rankers`,
            each a `name` and a `line`.
        behind_proxy: True takes the last address of X-Forwarded-For, the one that the proxy wrote, for the client.
    """

    def __init__(
        self, engine: SearchEngine, about: dict, limits: Limits | None = None, behind_proxy: bool = False
    ) -> None:
        self.engine = engine
        self.limits = limits or Limits()
        self.about = about | {"characters": self.limits.characters}
        self.behind_proxy = behind_proxy
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._minute = 0
        self._counts: Counter[str] = Counter()

    async def describe(self, request: Request) -> Response:
        """What the page shows before a query."""
        return JSONResponse(self.about)

    async def search(self, request: Request) -> Response:
        """The results of `?q=`, or one line that says why there are none (status 400, 429, 500)."""
        query = " ".join(request.query_params.get("q", "").split())
        if not query:
            return _refusal(400, "The query is empty; type a few words.")
        if len(query) > self.limits.characters:
            return _refusal(
                400, f"The query has {len(query):,} characters, the limit is {self.limits.characters:,}; shorten it."
            )
        if not self._admits(request):
            return _refusal(429, f"More than {self.limits.per_minute} queries in a minute; wait a little.")
        if self._waiting >= self.limits.waiting:
            return _refusal(429, "Too many searches at once; try again in a few seconds.")
        self._waiting += 1
        try:
            async with self._turn:
                results = await run_in_threadpool(self.engine.search, query)
        except KeyError as error:  # a candidate of which a store knows nothing
            return _refusal(500, f"The collection and an index do not belong together: {error.args[0]}")
        finally:
            self._waiting -= 1
        return JSONResponse(asdict(results))

    def _admits(self, request: Request) -> bool:
        """Count the client's queries of this minute; forgotten with it, so that memory stays bounded."""
        client = request.client.host if request.client else ""
        if self.behind_proxy:
            client = ",".join([client, *request.headers.getlist("x-forwarded-for")]).rpartition(",")[2].strip()
        if (minute := int(time.monotonic() // 60)) != self._minute:
            self._minute = minute
            self._counts.clear()
        self._counts[client] += 1
        return self._counts[client] <= self.limits.per_minute


def make_app(page: SearchPage, allowed_hosts: Sequence[str] = ("127.0.0.1", "localhost")) -> Starlette:
    """The application.

    Args:
        allowed_hosts: names that a request may call the server by, "*" for any; a foreign page cannot then reach a
            server on this machine under a name of its own (DNS rebinding).
    """
    return Starlette(
        routes=[
            Route("/api/about", page.describe),
            Route("/api/search", page.search),
            Mount("/", StaticFiles(directory=STATIC, html=True)),
        ],
        middleware=[
            Middleware(BaseHTTPMiddleware, dispatch=_with_headers),
            Middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts)),
        ],
    )


async def _with_headers(request: Request, call_next: RequestResponseEndpoint) -> Response:
    response = await call_next(request)
    response.headers.update(HEADERS)
    return response


def _refusal(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status, {"Retry-After": "10"} if status == 429 else None)
