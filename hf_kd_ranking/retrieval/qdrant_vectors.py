"""Vectors as Qdrant stores and compares them, and requests that search by several of them."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from qdrant_client import models
from scipy.sparse import csr_array

from ..data.texts import TextStore, check_same_collection
from ..errors import InputError
from .bm25 import BM25Vectors
from .vector_store import VectorStore

BM25, SPARSE, DENSE, TOKENS = "bm25", "sparse", "dense", "tokens"  # kinds of vectors
RRF = models.RrfQuery(rrf=models.Rrf(k=61))  # adds 1 / (k + rank - 1): the constant 60 of `fuse_runs`
Source = VectorStore | BM25Vectors | TextStore
Point = list | models.SparseVector | None  # a vector as it is sent; None for a text without words


def named_sources(sources: Source | Mapping[str, Source]) -> dict[str, VectorStore | BM25Vectors]:
    """Return name -> source, BM25's vectors for texts; an InputError if they are of different collections."""
    if isinstance(sources, Source):
        sources = {kind_of(sources): sources}
    named, collections = {}, {}
    for key, source in sources.items():
        if isinstance(source, TextStore):
            source = BM25Vectors(source)
        named[key] = source
        collections[key] = texts_or_store(source).collection
    if not named:
        raise InputError("Qdrant needs the vectors of at least one source, got none.")
    check_same_collection(collections)
    return named


def kind_of(source: Source) -> str:
    """Return the kind of a source's vectors, which is also their name where it is the only source."""
    if not isinstance(source, VectorStore):
        return BM25
    if source.words is not None:
        return SPARSE
    if source.has_token_vectors:
        return TOKENS
    return DENSE


def vector_parameters(
    sources: Mapping[str, VectorStore | BM25Vectors], settings: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return the arguments of `create_collection` that describe the vectors."""
    dense, sparse = {}, {}
    for key, source in sources.items():
        own, kind = settings.get(key, {}), kind_of(source)
        if kind == BM25:
            sparse[key] = models.SparseVectorParams(modifier=models.Modifier.IDF, **own)
        elif kind == SPARSE:
            sparse[key] = models.SparseVectorParams(**own)
        else:
            dense[key] = models.VectorParams(size=source.dimension, distance=models.Distance.DOT, **own)
        if kind == TOKENS:
            comparator = models.MultiVectorComparator.MAX_SIM
            dense[key].multivector_config = models.MultiVectorConfig(comparator=comparator)
            if len(sources) > 1 and dense[key].hnsw_config is None:
                dense[key].hnsw_config = models.HnswConfigDiff(m=0)
    return {"vectors_config": dense, "sparse_vectors_config": sparse}


def texts_or_store(source: VectorStore | BM25Vectors) -> VectorStore | TextStore:
    """Return what has the ids of a source's rows, and knows its collection."""
    if isinstance(source, BM25Vectors):
        return source.documents
    return source


def points_of(vectors: np.ndarray | csr_array | Sequence[np.ndarray] | Sequence[Mapping[int, float]]) -> list[Point]:
    """Return vectors as they are sent to Qdrant."""
    points: list[Point] = []
    if isinstance(vectors, csr_array):
        for start, stop in pairwise(vectors.indptr):
            words, weights = vectors.indices[start:stop].tolist(), vectors.data[start:stop].tolist()
            points.append(models.SparseVector(indices=words, values=weights) if words else None)
        return points
    for vector in vectors:
        if len(vector) == 0:
            points.append(None)
        elif isinstance(vector, Mapping):
            points.append(models.SparseVector(indices=list(vector), values=list(vector.values())))
        else:
            points.append(vector.tolist())
    return points


def make_request(
    searches: Mapping[str, Point], rerank: str | None, last: Point, k: int, depth: int, options: Mapping[str, Any]
) -> models.QueryRequest:
    """Return the request of a query: a search, or several whose results are fused, or re-ranked by the last vector."""
    shared = {"limit": k, "with_payload": ["id"]}
    if rerank is None and len(searches) == 1:
        [(key, query)] = searches.items()
        return models.QueryRequest(query=query, using=key, **shared, **options)
    found = []
    for key, query in searches.items():
        found.append(models.Prefetch(query=query, using=key, limit=max(k, depth), **options))
    if last is None:
        return models.QueryRequest(prefetch=found, query=RRF, **shared)
    return models.QueryRequest(prefetch=found, query=last, using=rerank, **shared)
