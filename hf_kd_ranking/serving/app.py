"""The application: the endpoints, the page, and what every request passes: key, limit, headers, log and metrics.

It loads nothing from other sites.
"""

import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .api import make_router
from .errors import RefusedError, add_error_answers
from .service import ClientGoneError, Service

access_log = logging.getLogger("hf_kd_ranking.serving.access")
STATIC = Path(__file__).parent / "static"
HEADERS = {
    # The Hub shows a Space in a frame of its page.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'self' https://huggingface.co",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
CLIENT_GONE = 499  # nobody reads it; for log and metrics, as in nginx and Cohere's API


def make_app(
    service: Service,
    about: dict | None = None,
    key: str | None = None,
    allowed_hosts: Sequence[str] = ("127.0.0.1", "localhost"),
    allowed_origins: Sequence[str] = (),
) -> FastAPI:
    """Make the application of a service, which it starts and closes.

    Args:
        about: `title` and `examples` (queries) of the page; None serves the API without the page.
        key: needed as `Authorization: Bearer KEY` by all endpoints but `/health`; None needs none.
        allowed_hosts: a request must name one of them, "*" for any. Otherwise a foreign page could reach a server on
            this machine under a name of its own (DNS rebinding).
        allowed_origins: sites whose pages may read answers (CORS), "*" for any.
    """

    @asynccontextmanager
    async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await run_in_threadpool(service.close)

    app = FastAPI(
        title="hf_kd_ranking", version=version("hf_kd_ranking"), lifespan=_lifespan, docs_url=None, redoc_url=None
    )
    router = make_router(service)
    app.include_router(router)
    add_error_answers(app)

    for error_type in (ClientGoneError, ClientDisconnect):
        app.add_exception_handler(error_type, _answer_nobody)

    @app.get("/docs", include_in_schema=False)
    async def _docs() -> FileResponse:
        return FileResponse(STATIC / "docs.html")

    @app.get("/", include_in_schema=False)
    async def _page() -> FileResponse:
        return FileResponse(STATIC / ("docs.html" if about is None else "index.html"))

    @app.get("/about", include_in_schema=False)
    async def _describe() -> JSONResponse:
        if not service.is_ready:
            return JSONResponse({"progress": asdict(service.progress)})
        described = {"name": service.model.name, **(about or {})}
        if service.model.search is not None:
            described["documents"] = len(service.model.search.pipeline.documents)
            described["line"] = service.model.search.describe()
        return JSONResponse(described)

    protected = {route.path for route in router.routes} - {"/health"}
    app.mount("/static", StaticFiles(directory=STATIC))
    app.add_middleware(Gate, service=service, key=key, protected=protected)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts))
    if allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


class Gate:
    """Check the key and the size of every request; add headers, a line of the access log, and metrics.

    The log is one JSON object per request, without texts: an address of the page has a query, so that only the path
    is logged.
    """

    def __init__(self, app: ASGIApp, service: Service, key: str | None, protected: set[str]) -> None:
        self.app = app
        self.service = service
        self.key = key
        self.protected = protected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status, started = 500, time.perf_counter()

        async def _answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *headers]
            await send(message)

        try:
            refusal = self._refuse(scope)
            if refusal is not None:
                await refusal.answer()(scope, receive, _answer)
            else:
                await self.app(scope, _limited(receive, self.service.limits.body_bytes), _answer)
        finally:
            self._record(scope, status, time.perf_counter() - started)

    def _refuse(self, scope: Scope) -> RefusedError | None:
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.service.limits.body_bytes:
            return _too_large(self.service.limits.body_bytes)
        if self.key is None or scope["path"] not in self.protected:
            return None
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), self.key.encode()):
            return None
        return RefusedError(401, "The API key is missing or wrong; send the header Authorization: Bearer KEY.")

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        endpoint = getattr(scope.get("route"), "path", "other")  # not the path: anybody can make up paths
        self.service.metrics.requests.labels(endpoint, str(status)).inc()
        self.service.metrics.seconds.labels(endpoint).observe(seconds)
        line = {"time": round(time.time(), 3), "method": scope["method"], "path": scope["path"], "status": status}
        line |= {"ms": round(1_000 * seconds, 1), "documents": scope.get("state", {}).get("documents")}
        line["client"] = scope["client"][0] if scope["client"] else None
        access_log.info(json.dumps(line))


def _limited(receive: Receive, limit: int) -> Receive:
    """Return a `receive` that refuses a body beyond a limit as it arrives, whatever length it declares."""
    received = 0

    async def _receive_part() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            refusal = _too_large(limit)
            raise HTTPException(refusal.status, str(refusal))
        return message

    return _receive_part


def _too_large(limit: int) -> RefusedError:
    return RefusedError(413, f"The body is larger than {limit:,} bytes; send several requests.")
