"""The web application: a static page, its description, and a search with limits. It loads nothing from other sites."""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from .connections import find_client
from .search import SearchEngine

HEADERS = {
    # The Hub shows a Space in a frame of its page.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'self' https://huggingface.co",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class Limits:
    """Limits of queries.

    Args:
        characters: of a query.
        per_minute: queries of a client in a minute.
        by_proxy: queries in a minute that a proxy passes on, whatever addresses it names.
        waiting: queries that wait or are searched (one is).
    """

    characters: int = 300
    per_minute: int = 60
    by_proxy: int = 1_200
    waiting: int = 8


class SearchPage:
    """The two answers of the server: the description of the page, and the results of a query.

    Args:
        engine: searches.
        about: `title`, `documents` (a number), `examples` (queries), and `name` and `line`, which describe the ranker.
        limits: None takes the default limits.
        behind_proxy: True identifies clients by X-Forwarded-For, see `find_client`.
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
        self._counts: Counter[str | tuple[str, str]] = Counter()

    async def describe(self, request: Request) -> Response:
        """Return what the page shows before a query."""
        return JSONResponse(self.about)

    async def search(self, request: Request) -> Response:
        """Return the results of `?q=`, or one line with the reason of a refusal (status 400, 429, 500)."""
        query = " ".join(request.query_params.get("q", "").split())
        if not query:
            return _refusal(400, "The query is empty; type a few words.")
        if len(query) > self.limits.characters:
            limit = f"the limit is {self.limits.characters:,}"
            return _refusal(400, f"The query has {len(query):,} characters, {limit}; shorten it.")
        if not self._admits(request):
            return _refusal(429, f"More than {self.limits.per_minute} queries in a minute; wait a little.")
        if self._waiting >= self.limits.waiting:
            return _refusal(429, "Too many searches at once; try again in a few seconds.")
        self._waiting += 1
        try:
            async with self._turn:
                results = await run_in_threadpool(self.engine.search, query)
        except KeyError as error:  # a candidate without a text or a stored vector
            return _refusal(500, f"The collection and an index do not belong together: {error.args[0]}")
        finally:
            self._waiting -= 1
        return JSONResponse(asdict(results))

    def _admits(self, request: Request) -> bool:
        """Count the client's query; the counts are cleared every minute, so that memory stays bounded."""
        peer = request.client.host if request.client else ""
        forwarded = request.headers.getlist("x-forwarded-for") if self.behind_proxy else []
        client = find_client(peer, forwarded)
        minute = int(time.monotonic() // 60)
        if minute != self._minute:
            self._minute = minute
            self._counts.clear()
        if client != find_client(peer):
            self._counts["proxy", peer] += 1
            # Without a proxy in front, a client may name another address every time.
            if self._counts["proxy", peer] > self.limits.by_proxy:
                return False
        self._counts[client] += 1
        return self._counts[client] <= self.limits.per_minute


def make_app(page: SearchPage, allowed_hosts: Sequence[str] = ("127.0.0.1", "localhost")) -> Starlette:
    """Make the application that serves a page.

    A request must name one of `allowed_hosts`, "*" for any. Otherwise a foreign page could reach a server on this
    machine under a name of its own (DNS rebinding).
    """
    files = StaticFiles(directory=Path(__file__).parent / "static", html=True)
    app = Starlette(routes=[Route("/api/about", page.describe), Route("/api/search", page.search), Mount("/", files)])
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts))
    app.add_middleware(BaseHTTPMiddleware, dispatch=_with_headers)  # the last one added is the outermost
    return app


async def _with_headers(request: Request, call_next: RequestResponseEndpoint) -> Response:
    response = await call_next(request)
    response.headers.update(HEADERS)
    return response


def _refusal(status: int, message: str) -> Response:
    response = JSONResponse({"error": message}, status)
    if status == 429:
        response.headers["Retry-After"] = "10"
    return response
