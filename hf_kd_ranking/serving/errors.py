"""Refusals: a status, one line for people, and the fields that clients of the APIs read."""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

# The types that text-embeddings-inference has for a status; Unauthorized and NotFound are ours.
ERROR_TYPES = {401: "Unauthorized", 404: "NotFound", 405: "NotFound", 429: "Overloaded", 500: "Backend"}
ERROR_TYPES |= {503: "Unhealthy"}
RETRY_SECONDS = {429: 1, 503: 5}


class RefusedError(Exception):
    """A request that is not answered.

    Args:
        status: HTTP status.
        message: one line: what was needed, what came, what to do.
        error_type: None takes the usual one of the status.
    """

    def __init__(self, status: int, message: str, error_type: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.error_type = error_type

    def answer(self) -> JSONResponse:
        """Return the response."""
        message = str(self)
        error_type = self.error_type or ERROR_TYPES.get(self.status, "Validation")
        headers = {}
        if self.status in RETRY_SECONDS:
            headers["Retry-After"] = str(RETRY_SECONDS[self.status])
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse({"message": message, "error": message, "error_type": error_type}, self.status, headers)


def add_error_answers(app: FastAPI) -> None:
    """Answer every error of an application in one shape."""
    app.add_exception_handler(RefusedError, _answer_refusal)
    app.add_exception_handler(RequestValidationError, _answer_invalid_body)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Exception, _answer_crash)


async def _answer_refusal(request: Request, error: RefusedError) -> JSONResponse:
    return error.answer()


async def _answer_invalid_body(request: Request, error: RequestValidationError) -> JSONResponse:
    """Name the first wrong field; the message has no text of the request."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:] if not str(part).startswith("<"))
    status, message = 422, f"{place}: {first['msg'].removeprefix('Value error, ')}."
    if first["type"] == "json_invalid":
        status, message = 400, f"The body is not valid JSON: {first['ctx']['error']} at character {place}."
    elif first["type"] in ("model_attributes_type", "dict_type", "model_type"):
        message = "Send a JSON object, with the header Content-Type: application/json."
    return RefusedError(status, message).answer()


async def _answer_http_error(request: Request, error: HTTPException) -> JSONResponse:
    message = error.detail
    if error.status_code == 400:  # of fastapi, whose reason is a UnicodeDecodeError
        message = "The body is not valid UTF-8; send JSON in UTF-8."
    elif error.status_code in (404, 405):
        message = f"{request.method} {request.url.path}: {error.detail}; /docs lists what this server answers."
    answer = RefusedError(error.status_code, message).answer()
    answer.headers.update(error.headers or {})  # Allow
    return answer


async def _answer_crash(request: Request, error: Exception) -> JSONResponse:
    return RefusedError(500, "The server failed; its log says why.").answer()
