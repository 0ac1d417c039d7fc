"""The endpoints: requests in the formats of existing clients to the model's scores and back."""

import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool

from ..data.passages import passages_of, to_documents
from ..errors import InputError, UnknownIdError
from . import schemas
from .errors import RefusedError
from .model import ServedModel
from .service import Service

ERRORS = {status: {"model": schemas.ErrorAnswer} for status in (400, 401, 404, 413, 422, 429, 500, 503)}


def make_router(service: Service) -> APIRouter:
    """Return the endpoints of a service."""
    router = APIRouter(responses=ERRORS)

    @router.post("/rerank", response_model=schemas.RerankAnswer | list[schemas.TextScore])
    async def rerank(request: Request, body: schemas.AnyRerankRequest) -> Response:
        """Score documents for a query: the format of Cohere and Jina, or with `texts` that of TEI."""
        return await _rerank(service, request, body)

    @router.post("/v1/rerank", response_model=schemas.RerankAnswer)
    @router.post("/v2/rerank", response_model=schemas.RerankAnswer)
    async def rerank_documents(request: Request, body: schemas.RerankRequest) -> Response:
        """Score documents for a query: the format of Cohere and Jina."""
        return await _rerank(service, request, body)

    @router.post("/embed", response_model=list[list[float]])
    async def embed(request: Request, body: schemas.EmbedRequest) -> Response:
        """Return the vectors of queries or documents; for rankers with one vector per text."""
        return await _embed(service, request, body)

    @router.post("/search", response_model=schemas.SearchAnswer)
    async def search(request: Request, body: schemas.SearchRequest) -> Response:
        """Find passages in the collection that is served."""
        return await _search(service, request, body)

    @router.get("/health", responses={503: {"description": "The server is starting; the body says how far it is."}})
    async def health() -> Response:
        """Say whether requests are answered: status 200, or 503 with the progress of the start."""
        if service.is_ready:
            return JSONResponse({"status": "ok"})
        progress = {"status": "loading", **asdict(service.progress)}
        return JSONResponse(progress, 503, {"Retry-After": "1"})

    @router.get("/v1/models")
    async def models() -> Response:
        """List the model that is served."""
        model = service.model
        described = {"id": model.name, "object": "model", "owned_by": "hf_kd_ranking"}
        if model.config is not None:
            described["architecture"] = model.config.model_type
            described["max_query_length"] = model.config.max_query_length
            described["max_document_length"] = model.config.max_document_length
        described["stored_documents"] = 0 if model.store is None else len(model.store)
        return JSONResponse({"object": "list", "data": [described]})

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Report counts and times in the format of Prometheus."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router


async def _rerank(
    service: Service, request: Request, body: schemas.RerankRequest | schemas.TextsRequest
) -> JSONResponse:
    model = _find_model(service, body)
    if model.ranker is None:
        raise RefusedError(400, f"{model.name} is BM25 alone, which cannot score documents of a request; use /search.")
    is_texts_form = isinstance(body, schemas.TextsRequest)
    documents = body.texts if is_texts_form else body.documents
    request.state.documents = len(documents)
    texts, ids = _read_documents(documents)
    _check_texts(service, body, "query", [body.query])
    _check_texts(service, body, "texts" if is_texts_form else "documents", texts or ids)
    if not is_texts_form:
        _check_tokens_per_document(model, body.max_tokens_per_doc)
    if ids:
        scores = await _score_stored(service, request, model, body, ids)
    else:
        scores = await _score_texts(service, request, model, body, texts)
    order = np.argsort(-scores, kind="stable").tolist()
    is_raw = service.raw_scores if body.raw_scores is None else body.raw_scores
    shown = (scores if is_raw else sigmoid(scores)).tolist()
    if is_texts_form:
        return JSONResponse(_text_scores(body, order, shown))
    results = []
    for index in order[: body.top_n]:
        result: dict[str, Any] = {"index": index, "relevance_score": shown[index]}
        if body.return_documents:
            result["document"] = _repeat(documents[index])
        results.append(result)
    return JSONResponse({"id": str(uuid.uuid4()), "model": model.name, "results": results})


def sigmoid(scores: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-score)) in float64; scores above 37 give 1.0, so results are sorted by the scores."""
    return 1 / (1 + np.exp(-np.clip(scores.astype(np.float64), -700, None)))


def _text_scores(body: schemas.TextsRequest, order: Sequence[int], shown: Sequence[float]) -> list[dict[str, Any]]:
    results = []
    for index in order:
        result: dict[str, Any] = {"index": index, "score": shown[index]}
        if body.return_text:
            result["text"] = body.texts[index]
        results.append(result)
    return results


def _find_model(service: Service, body: schemas.RequestBody) -> ServedModel:
    model = service.model
    if body.model not in (None, "", model.name):
        raise RefusedError(404, f"There is no model {body.model!r}; this server has {model.name!r}, see /v1/models.")
    return model


def _read_documents(documents: Sequence[str | schemas.Document]) -> tuple[list[str], list[str]]:
    """Return the texts of documents, or their ids if they have no texts."""
    texts: list[str] = []
    ids: list[str] = []
    for document in documents:
        if isinstance(document, str):
            texts.append(document)
        elif document.text is not None:
            texts.append(document.text)
        else:
            ids.append(str(document.id))
    if texts and ids:
        raise RefusedError(
            422, f"{len(texts)} documents have texts and {len(ids)} only ids; send texts or ids, not both."
        )
    return texts, ids


def _repeat(document: str | schemas.Document) -> dict[str, Any]:
    if isinstance(document, str):
        return {"text": document}
    return document.model_dump(exclude_unset=True)


def _check_texts(service: Service, body: schemas.RequestBody, name: str, texts: Sequence[str]) -> None:
    limits = service.limits
    if not texts:
        raise RefusedError(400, f"{name} is empty; send at least one.", "Empty")
    if name == "query" and not texts[0].strip():
        raise RefusedError(400, "query is empty; send a text.", "Empty")
    if len(texts) > limits.documents:
        problem = f"{name} has {len(texts):,} entries, the limit is {limits.documents:,}"
        raise RefusedError(body.limit_status, f"{problem}; send several requests.")
    for place, text in enumerate(texts):
        if len(text) > limits.characters:
            problem = f"{name}, entry {place}, has {len(text):,} characters, the limit is {limits.characters:,}"
            raise RefusedError(body.limit_status, f"{problem}; split it into passages.")


def _check_tokens_per_document(model: ServedModel, max_tokens: int | None) -> None:
    if max_tokens is not None and max_tokens < model.config.max_document_length:
        longest = model.config.max_document_length
        problem = f"max_tokens_per_doc is {max_tokens}, and {model.name} reads {longest} tokens of each document"
        raise RefusedError(422, f"{problem}; leave it out, or shorten the documents.")


async def _check_lengths(body: schemas.RequestBody, check: Callable[..., None], *texts: Any) -> None:
    """Refuse texts that the model would read only in part, unless they are truncated."""
    if body.truncate:
        return
    try:
        await run_in_threadpool(check, *texts)
    except InputError as error:
        raise RefusedError(body.limit_status, str(error), "Tokenizer") from None


async def _score_texts(
    service: Service,
    request: Request,
    model: ServedModel,
    body: schemas.RerankRequest | schemas.TextsRequest,
    texts: list[str],
) -> np.ndarray:
    await _check_lengths(body, model.check_pair_lengths, body.query, texts)
    pieces, tokens = model.split_pairs(body.query, texts)
    return np.concatenate(await service.run(request, model.score_texts, pieces, tokens))


async def _score_stored(
    service: Service, request: Request, model: ServedModel, body: schemas.RerankRequest, ids: list[str]
) -> np.ndarray:
    if model.store is None:
        raise RefusedError(
            422, "Documents are given by id, and this server has no index; send texts, or serve --index."
        )
    aggregation, found = model.store.collection.aggregation, {doc_id: [doc_id] for doc_id in ids}
    try:
        if aggregation is not None:
            found = passages_of(model.store, ids, "documents of the index")
        names = list(chain.from_iterable(found.values()))
        rows = model.store.rows_of_known(names, "documents of the index")
    except UnknownIdError as error:
        raise RefusedError(422, str(error)) from None
    # A stored document is not encoded, which saves most of the work of its tokens.
    tokens = len(rows) * model.config.max_document_length // 4
    [scores] = await service.run(request, model.score_stored, [(body.query, rows)], [tokens])
    by_name = dict(zip(names, scores.tolist(), strict=True))
    totals = []
    for doc_id in ids:
        ranking = sorted([(name, by_name[name]) for name in found[doc_id]], key=lambda scored: -scored[1])
        [(_, score)] = to_documents(ranking, aggregation or "max") or ranking  # a passage by its own id has its score
        totals.append(score)
    return np.array(totals, dtype=np.float32)


async def _embed(service: Service, request: Request, body: schemas.EmbedRequest) -> JSONResponse:
    model = _find_model(service, body)
    if model.config is None or model.config.vectors_per_text != "one" or not model.is_batched:
        raise RefusedError(400, f"{model.name} has no single vector per text, so it cannot embed; use /rerank.")
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    request.state.documents = len(texts)
    _check_texts(service, body, "inputs", texts)
    encode, longest = model.encode_documents, model.config.max_document_length
    if body.prompt_name == "query":
        encode, longest = model.encode_queries, model.config.max_query_length
    await _check_lengths(body, model.check_lengths, body.prompt_name, texts)
    pieces, tokens = model.split(texts, longest)
    vectors = np.concatenate(await service.run(request, encode, pieces, tokens))
    if body.normalize:
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return JSONResponse(vectors.tolist())


async def _search(service: Service, request: Request, body: schemas.SearchRequest) -> JSONResponse:
    model = _find_model(service, body)
    if model.search is None:
        raise RefusedError(400, "This server has no collection to search; serve --collection, or use /rerank.")
    query = " ".join(body.query.split())
    _check_texts(service, body, "query", [query])
    [results] = await service.run(request, model.run_searches, [(query, body.k)], [0])
    return JSONResponse(results.model_dump())
