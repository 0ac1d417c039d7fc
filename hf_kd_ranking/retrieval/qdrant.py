"""Vectors of documents in Qdrant: embedded, on a server or on a cluster; dense, one per token, sparse, and BM25.

One collection holds several named vectors of each document, so that one request searches by some of them, fuses the
results, and re-ranks by another. The key of a server is read from the environment variable QDRANT_API_KEY and from
nowhere else.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse
from tqdm.auto import tqdm

from ..artifacts import changed_names
from ..data.ids import Id, IdIndex
from ..data.passages import rows_of_passages
from ..data.rankings import Pairs, Ranking, Run
from ..data.texts import Collection, check_same_collection
from ..errors import InputError
from ..ranker import Ranker
from .base import INDEX_NAMES, Index, best_of, check_model
from .bm25 import count_words
from .fusion import fuse_runs
from .qdrant_vectors import (
    BM25,
    TOKENS,
    Point,
    Source,
    kind_of,
    make_request,
    named_sources,
    points_of,
    texts_or_store,
    vector_parameters,
)
from .vector_store import VectorStore

API_KEY = "QDRANT_API_KEY"
ATTEMPTS = 6  # of a request; waits of 1, 2, 4, 8 and 16 s between them

logger = logging.getLogger(__name__)


class QdrantIndex(Index):
    """A collection in Qdrant; make one with `build` or `open`.

    Options of `search`:
        using: the name of the vectors to search by, or a list of names, whose rankings are fused by reciprocal ranks.
            None searches by all vectors whose ranker is given; token vectors are left out if other vectors can be
            searched. In a collection of passages, each name is a request of its own, and the rankings of documents are
            fused.
        rerank: the name of the vectors that re-rank the documents that were found (in a collection of passages, the
            passages that were found). None keeps the order of the search.
        depth: number of documents (or passages) that each search finds before the rankings are fused or re-ranked.
        only: the ids of the documents that may be returned, None for all; it needs the `ids` of the index.
        exact: True makes a server compare every document, None leaves it to the server. An embedded collection always
            compares every document in one process: it is for tests and small collections.

    Example:
        >>> documents = kd.TextStore.from_tsv("collection.tsv")
        >>> store = kd.VectorStore.build(kd.Ranker.from_pretrained("bert_dot"), documents, "vectors")
        >>> index = kd.QdrantIndex.build({"bm25": documents, "dense": store}, "qdrant")
        >>> run = index.search({"q1": "what is bread"}, k=10, using=["bm25", "dense"])
    """

    compares = tuple(INDEX_NAMES)
    queries_at_once = 32
    ids: IdIndex | None

    def __init__(
        self,
        client: QdrantClient,
        name: str,
        description: dict[str, Any],
        rankers: Mapping[str, Ranker],
        ids: IdIndex | None = None,
    ) -> None:
        self.client = client
        self.name = name
        self._built = description
        self.rankers = dict(rankers)
        self.ids = ids

    @classmethod
    def build(
        cls,
        sources: Source | Mapping[str, Source],
        path: str | Path | None = None,
        *,
        url: str | None = None,
        name: str = "documents",
        batch_size: int = 256,
        parallel: int = 1,
        vectors: Mapping[str, Mapping[str, Any]] | None = None,
        **settings: Any,
    ) -> "QdrantIndex":
        """Upload vectors; after an interruption the same call resumes, and uploads only what is missing.

        Args:
            sources: a store, which knows its ranker; texts, for BM25; or name -> one of them, of one collection. A
                single source is named by its kind: "dense", "tokens", "sparse" or "bm25".
            path: folder of an embedded collection.
            url: address of a server, in place of a path.
            name: name of the collection; it is created if it does not exist.
            batch_size: documents per request.
            parallel: requests at the same time; an embedded collection takes one.
            vectors: name -> arguments of Qdrant's `VectorParams` or `SparseVectorParams`: `on_disk`, `datatype`,
                `hnsw_config`, `quantization_config`, `index`. Token vectors beside others have no graph (`m=0`) unless
                `hnsw_config` is given: they re-rank.
            **settings: arguments of Qdrant's `create_collection`: `shard_number`, `replication_factor`,
                `write_consistency_factor`, `optimizers_config`, `on_disk_payload`, ...

        Raises:
            InputError: if Qdrant cannot compare the vectors, they are of different collections, or the collection
                contains others.
            ConnectionError: if the server does not answer; what is uploaded stays.
        """
        sources = named_sources(sources)
        unknown = ", ".join((vectors or {}).keys() - sources.keys())
        if unknown or min(batch_size, parallel) < 1:
            problem = f"settings for {unknown or 'none'} among {', '.join(sources)}, {batch_size=}, {parallel=}"
            raise InputError(f"Settings are for vectors that are uploaded, and numbers at least 1; got {problem}.")
        ids = texts_or_store(next(iter(sources.values())))
        of_collection = ids.collection.describe()
        rankers, kinds = {}, {}
        for key, source in sources.items():
            if isinstance(source, VectorStore):
                rankers[key] = cls.check_ranker(source.ranker, source.folder)
            identity = {part: value for part, value in source.identity.items() if part not in of_collection}
            kinds[key] = {"kind": kind_of(source), **identity}
        description = {"documents": len(ids), "vectors": kinds, **of_collection}
        index = cls(_connect(path, url), name, description, rankers, ids)
        uploaded = index._description()
        if uploaded is None:
            parameters = vector_parameters(sources, vectors or {})
            index._ask(index.client.create_collection, name, **parameters, metadata=description, **settings)
        else:
            _check_uploaded(uploaded, description, name)
        if uploaded is None or not uploaded.get("is_complete"):
            index._upload(sources, batch_size, 1 if url is None else parallel, is_resumed=uploaded is not None)
            index._ask(index.client.update_collection, name, metadata={"is_complete": True})
        return index

    @classmethod
    def open(
        cls,
        path: str | Path | None = None,
        ranker: Ranker | Mapping[str, Ranker] | None = None,
        *,
        url: str | None = None,
        name: str = "documents",
        ids: IdIndex | None = None,
    ) -> "QdrantIndex":
        """Open a collection that `build` uploaded.

        Args:
            path, url, name: as of `build`.
            ranker: the ranker that made the vectors, or name of the vectors -> ranker; those without one are not
                searched. BM25 needs none.
            ids: the text or vector store that was uploaded, for filters; None if there will be none.

        Raises:
            FileNotFoundError: if there is no such collection.
            InputError: if another model made its vectors, no vectors can be searched, or the upload is incomplete.
            ConnectionError: if the server does not answer.
        """
        index = cls(_connect(path, url), name, {}, {}, ids)
        description = index._description()
        if description is None:
            raise FileNotFoundError(f"There is no Qdrant collection {name!r} at {path or url}.")
        if "vectors" not in description:
            raise InputError(f"The Qdrant collection {name!r} does not say which model made it; build it here.")
        stored = {key: kind for key, kind in description["vectors"].items() if kind["kind"] != BM25}
        if isinstance(ranker, Ranker):
            if len(stored) != 1:
                raise InputError(f"Qdrant collection {name!r} has {', '.join(stored)}; give name -> ranker.")
            ranker = dict.fromkeys(stored, ranker)
        for key, given in (ranker or {}).items():
            if key not in stored:
                raise InputError(f"Qdrant collection {name!r} has no vectors {key!r}, only {', '.join(stored)}.")
            check_model(stored[key], given, Path(f"{name}/{key}"))
        if not ranker and len(stored) == len(description["vectors"]):
            raise InputError(f"The ranker that made the vectors in the Qdrant collection {name!r} is needed.")
        if not description.get("is_complete"):
            problem = f"the upload of {description['documents']:,} documents is not complete"
            raise InputError(f"Qdrant collection {name!r}: {problem}; build it again, which resumes.")
        if ids is not None:
            check_same_collection({"ids": ids.collection, f"Qdrant {name!r}": Collection.of(description)})
        index._built, index.rankers = description, dict(ranker or {})
        return index

    @property
    def collection(self) -> Collection:
        """The collection that was uploaded."""
        return Collection.of(self._built)

    def __len__(self) -> int:
        return self._built["documents"]

    def close(self) -> None:
        """Close the connection; an embedded collection can be opened once at a time."""
        self.client.close()

    def _rank_documents(
        self,
        texts: Sequence[str],
        k: int,
        using: str | Sequence[str] | None = None,
        rerank: str | None = None,
        depth: int = 100,
        **options: Any,
    ) -> list[Pairs]:
        names = self._searched(using)
        if self.collection.aggregation is None or rerank is not None or len(names) < 2:
            return super()._rank_documents(texts, k, using=using, rerank=rerank, depth=depth, **options)
        runs = []
        for key in names:  # ranks are those of documents: Qdrant would fuse the ranks of passages
            rankings = super()._rank_documents(texts, max(k, depth), using=key, **options)
            runs.append(Run((str(place), ranking) for place, ranking in enumerate(rankings)))
        return list(fuse_runs(runs, weights=[1.0] * len(runs)).top(k).values())

    def _rank(
        self,
        texts: Sequence[str],
        k: int,
        only: Sequence[Id] | None = None,
        exact: bool | None = None,
        using: str | Sequence[str] | None = None,
        rerank: str | None = None,
        depth: int = 100,
    ) -> list[Ranking]:
        names = self._searched(using)
        if not names or min(k, depth) < 1:
            raise InputError(f"Searching needs a ranker for token vectors, or other vectors, and {depth=} at least 1.")
        encoded = {key: self._encode(key, texts) for key in {*names, rerank} - {None}}
        options = self._options(only, exact)
        rankings = [Ranking([], np.zeros(0)) for _ in texts]
        requests: dict[int, models.QueryRequest] = {}
        for place in range(len(texts)):
            searches = {key: encoded[key][place] for key in names if encoded[key][place] is not None}
            last = encoded[rerank][place] if rerank is not None else None
            if searches:
                requests[place] = make_request(searches, rerank, last, k, depth, options)
        answers = self._ask(self.client.query_batch_points, self.name, list(requests.values())) if requests else []
        for place, answer in zip(requests, answers, strict=True):
            ids = {point.id: point.payload["id"] for point in answer.points}
            scores = np.array([point.score for point in answer.points])
            scores, rows = best_of(scores, np.array(list(ids), dtype=np.int64), k)
            rankings[place] = Ranking([ids[row] for row in rows.tolist()], scores)
        return rankings

    def _searched(self, using: str | Sequence[str] | None) -> list[str]:
        """Return the names of the vectors to search by, those of `using` if there are any."""
        if isinstance(using, str):
            return [using]
        if using:
            return list(using)
        kinds = {key: kind["kind"] for key, kind in self._built["vectors"].items()}
        ready = [key for key, kind in kinds.items() if kind == BM25 or key in self.rankers]
        return [key for key in ready if kinds[key] != TOKENS] or ready

    def _encode(self, key: str, texts: Sequence[str]) -> list[Point]:
        """Return the vectors of queries that are compared with those of a name."""
        kind = self._built["vectors"].get(key)
        if kind is not None and kind["kind"] == BM25:
            return points_of(count_words(texts, kind["language"]))
        if key not in self.rankers:
            known = ", ".join(self._built["vectors"])
            raise InputError(f"Qdrant collection {self.name!r} has no {key!r} whose ranker is given; it has {known}.")
        return points_of(self.rankers[key].encode_queries(texts))

    def _options(self, only: Sequence[Id] | None, exact: bool | None) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if exact is not None:
            options["params"] = models.SearchParams(exact=exact)
        if only is not None:
            if self.ids is None:
                raise InputError("Documents are chosen by their rows; give QdrantIndex.open(..., ids=store).")
            rows = rows_of_passages(self.ids, self.collection.aggregation, only, "documents of the index")
            options["filter"] = models.Filter(must=[models.HasIdCondition(has_id=rows.tolist())])
        return options

    def _description(self) -> dict[str, Any] | None:
        """Return what the collection was built from; None if it does not exist."""
        if not self._ask(self.client.collection_exists, self.name):
            return None
        description = self._ask(self.client.get_collection, self.name).config.metadata or {}
        if not isinstance(description.get("vectors"), Mapping):  # an earlier release had a checksum there
            description.pop("vectors", None)
        return description

    def _upload(self, sources: Mapping[str, Source], batch_size: int, parallel: int, is_resumed: bool) -> None:
        # Points are named by their row, so that a batch that is uploaded again replaces itself.
        def upload(start: int) -> int:
            rows = np.arange(start, min(start + batch_size, len(self)))
            if is_resumed:
                found = self._ask(self.client.retrieve, self.name, rows.tolist(), with_payload=False)
                if len(found) == len(rows):
                    return len(rows)
            points = []
            for row, doc_id in zip(rows.tolist(), self.ids.ids_of(rows), strict=True):
                points.append(models.PointStruct(id=row, vector={}, payload={"id": doc_id}))
            for key, source in sources.items():
                for point, vector in zip(points, points_of(source.take(rows)), strict=True):
                    if vector is not None:
                        point.vector[key] = vector
            self._ask(self.client.upsert, self.name, points, wait=True)
            return len(rows)

        progress = tqdm(total=len(self), desc=f"Uploading to {self.name}", unit="passage")
        with progress, ThreadPoolExecutor(parallel) as pool:
            running = deque()
            for start in range(0, len(self), batch_size):
                if len(running) == parallel:  # a list of all would be long
                    progress.update(running.popleft().result())
                running.append(pool.submit(upload, start))
            for batch in running:
                progress.update(batch.result())

    def _ask(self, method: Callable, *arguments: Any, **options: Any) -> Any:
        """Send a request, again while the server is down, slow or overloaded; all of ours may be repeated."""
        for attempt in range(ATTEMPTS):
            if attempt > 0:
                time.sleep(2 ** (attempt - 1))
            try:
                return method(*arguments, **options)
            except UnexpectedResponse as error:
                problem = _line(error)
                if error.status_code not in (408, 429) and error.status_code < 500:
                    raise InputError(f"Qdrant refuses the request on {self.name!r}: {problem}") from None
            except ResponseHandlingException as error:
                problem = _line(error)
            logger.warning("Qdrant did not answer (%s), attempt %d of %d", problem, attempt + 1, ATTEMPTS)
        raise ConnectionError(
            f"Qdrant did not answer {ATTEMPTS} times ({problem}); when the server runs, the same call resumes there."
        )


def _connect(path: str | Path | None, url: str | None) -> QdrantClient:
    if (path is None) == (url is None):
        raise InputError("Give either a path (embedded) or url= (a server).")
    if url is not None:
        return QdrantClient(url=url, api_key=os.environ.get(API_KEY), timeout=60, check_compatibility=False)
    try:
        return QdrantClient(path=str(path))
    except RuntimeError as error:
        raise InputError(f"{path}: {_line(error)}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _check_uploaded(uploaded: Mapping[str, Any], description: Mapping[str, Any], name: str) -> None:
    """Refuse, by an InputError, a collection that was built from something else."""
    stored = uploaded.get("vectors", {})
    pairs = [(stored.get(key, {}), kind) for key, kind in description["vectors"].items()]
    pairs.insert(0, (uploaded, {key: description[key] for key in ("documents", "collection")}))
    pairs.insert(1, ({"vectors": sorted(stored)}, {"vectors": sorted(description["vectors"])}))
    for there, here in pairs:
        for key in changed_names(there, here):
            values = f"{there.get(key)}, here {here[key]}"
            problem = f"has other {key} ({values}); give another name, or delete it"
            raise InputError(f"Qdrant collection {name!r} {problem}.")
