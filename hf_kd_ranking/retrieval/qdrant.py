"""Vectors of documents, or of their tokens, in Qdrant: embedded, on a server or on a cluster.

The key of a server is read from the environment variable QDRANT_API_KEY and from nowhere else.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse
from tqdm.auto import tqdm

from ..artifacts import changed_names
from ..data.ids import Id
from ..data.rankings import Ranking
from ..data.texts import Collection
from ..errors import InputError
from ..ranker import Ranker
from .base import INDEX_NAMES, Index, best_of, check_model
from .vector_store import VectorStore

API_KEY = "QDRANT_API_KEY"
ATTEMPTS = 6  # of a request; waits of 1, 2, 4, 8 and 16 s between them

logger = logging.getLogger(__name__)


class QdrantIndex(Index):
    """A collection in Qdrant; make one with `build` or `open`.

    Options of `search`: `only`, the ids of the documents that may be returned, None for all; `exact`, True makes a
    server compare every document, None leaves it to the server. An embedded collection always compares every document
    in one process: it is for tests and small collections.
    """

    compares = tuple(INDEX_NAMES)
    queries_at_once = 32

    def __init__(self, ranker: Ranker, client: QdrantClient, name: str) -> None:
        self.ranker = ranker
        self.client = client
        self.name = name

    @classmethod
    def build(
        cls,
        store: VectorStore,
        path: str | Path | None = None,
        *,
        url: str | None = None,
        name: str = "documents",
        batch_size: int = 256,
        vectors: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> "QdrantIndex":
        """Upload a store; after an interruption the same call resumes, and no document is uploaded twice.

        Args:
            store: the vectors; it knows its ranker.
            path: folder of an embedded collection.
            url: address of a server, in place of a path.
            name: name of the collection; it is created if it does not exist.
            batch_size: documents per request.
            vectors: arguments of Qdrant's `VectorParams`: `on_disk`, `datatype`, `hnsw_config`, `quantization_config`.
            **settings: arguments of Qdrant's `create_collection`: `shard_number`, `replication_factor`,
                `write_consistency_factor`, `optimizers_config`, `on_disk_payload`, ...

        Raises:
            InputError: if Qdrant cannot compare the vectors, or the collection contains others.
            ConnectionError: if the server does not answer; what is uploaded stays.
        """
        index = cls(cls.check_ranker(store.ranker, store.folder), _connect(path, url), name)
        description = {"documents": len(store)} | store.identity
        if index._description() is None:
            parameters = models.VectorParams(size=store.dimension, distance=models.Distance.DOT, **(vectors or {}))
            if store.has_token_vectors:
                comparator = models.MultiVectorComparator.MAX_SIM
                parameters.multivector_config = models.MultiVectorConfig(comparator=comparator)
            index._ask(index.client.create_collection, name, parameters, metadata=description, **settings)
        uploaded = index._description()
        del description["source"]  # another name of the same texts
        for key in changed_names(uploaded, description):
            values = f"{uploaded.get(key)}, here {description[key]}"
            raise InputError(
                f"Qdrant collection {name!r} has other {key} ({values}); give another name, or delete it."
            )
        index._upload(store, batch_size)
        return index

    @classmethod
    def open(
        cls,
        path: str | Path | None = None,
        ranker: Ranker | None = None,
        *,
        url: str | None = None,
        name: str = "documents",
    ) -> "QdrantIndex":
        """Open a collection that `build` uploaded.

        Raises:
            FileNotFoundError: if there is no such collection.
            InputError: if another model made its vectors, the ranker is missing, or the upload is incomplete.
            ConnectionError: if the server does not answer.
        """
        if ranker is None:
            raise InputError(f"The ranker that made the vectors in the Qdrant collection {name!r} is needed.")
        index = cls(ranker, _connect(path, url), name)
        description = index._description()
        if description is None:
            raise FileNotFoundError(f"There is no Qdrant collection {name!r} at {path or url}.")
        if "model" not in description:
            raise InputError(f"The Qdrant collection {name!r} does not say which model made it; build it here.")
        check_model(description, ranker, Path(name))
        if len(index) < description["documents"]:
            counts = f"{len(index):,} of {description['documents']:,} documents"
            raise InputError(f"Qdrant collection {name!r} has {counts}; build it again, which resumes.")
        return index

    @cached_property
    def collection(self) -> Collection:
        """The collection that was uploaded; asked for once."""
        return Collection.of(self._description() or {})

    def __len__(self) -> int:
        return self._ask(self.client.count, self.name, exact=True).count

    def close(self) -> None:
        """Close the connection; an embedded collection can be opened once at a time."""
        self.client.close()

    def _rank(
        self, texts: Sequence[str], k: int, only: Sequence[Id] | None = None, exact: bool | None = None
    ) -> list[Ranking]:
        options = {"limit": k, "with_payload": ["id"]}
        if exact is not None:
            options["params"] = models.SearchParams(exact=exact)
        if only is not None:
            ids = models.MatchAny(any=[str(i) for i in only])
            options["filter"] = models.Filter(must=[models.FieldCondition(key="id", match=ids)])
        queries = self.ranker.encode_queries(texts)
        requests = [models.QueryRequest(query=query.tolist(), **options) for query in queries]
        rankings = []
        for answer in self._ask(self.client.query_batch_points, self.name, requests):
            ids = {point.id: point.payload["id"] for point in answer.points}
            scores = np.array([point.score for point in answer.points])
            scores, rows = best_of(scores, np.array(list(ids), dtype=np.int64), k)
            rankings.append(Ranking([ids[row] for row in rows.tolist()], scores))
        return rankings

    def _description(self) -> dict[str, Any] | None:
        """Return what the collection was built from; None if it does not exist."""
        if not self._ask(self.client.collection_exists, self.name):
            return None
        return self._ask(self.client.get_collection, self.name).config.metadata or {}

    def _upload(self, store: VectorStore, batch_size: int) -> None:
        # In the order of the rows, and each batch is acknowledged before the next, so the count says where to resume.
        # Points are named by their row, so a batch that is uploaded again replaces itself.
        done = len(self) // batch_size * batch_size
        with tqdm(total=len(store), initial=done, desc=f"Uploading to {self.name}", unit="passage") as progress:
            for start in range(done, len(store), batch_size):
                rows = np.arange(start, min(start + batch_size, len(store)))
                vectors = [vectors.tolist() for vectors in store.take(rows)]
                payloads = [{"id": doc_id} for doc_id in store.ids_of(rows)]
                batch = models.Batch(ids=rows.tolist(), vectors=vectors, payloads=payloads)
                self._ask(self.client.upsert, self.name, batch, wait=True)
                progress.update(len(rows))
        if len(self) != len(store):
            problem = f"has {len(self):,} documents, not {len(store):,}: something else writes to it"
            raise InputError(f"The Qdrant collection {self.name!r} {problem}; delete it and build it again.")

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
