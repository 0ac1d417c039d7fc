"""Beyond one machine: dense vectors and ColBERT's term vectors in Qdrant, embedded, on a server, or on a cluster.

An embedded collection (`path=`) is searched by brute force in one process: for tests and small collections. A server
(`url=`) has its key from the environment variable QDRANT_API_KEY, and from nowhere else.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse
from tqdm.auto import tqdm

from ..data.ids import Id
from ..data.runs import Run
from ..ranker import Ranker
from .vector_store import VectorStore, best_of
from .versions import check_model

API_KEY = "QDRANT_API_KEY"
QUERIES_AT_ONCE = 32
ATTEMPTS = 6  # of a request; waits of 1, 2, 4, 8 and 16 s between them

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")


class QdrantIndex:
    """A collection in Qdrant; make one with `build` or `open`.

    Args:
        ranker: a BERT_DOT or a ColBERT; it encodes the queries.
        client: of the database.
        name: of the collection.
    """

    def __init__(self, ranker: Ranker, client: QdrantClient, name: str) -> None:
        self.ranker = ranker
        self.client = client
        self.name = name

    @classmethod
    def build(
        cls,
        ranker: Ranker,
        store: VectorStore,
        name: str,
        path: str | os.PathLike | None = None,
        url: str | None = None,
        batch_size: int = 256,
        vectors: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> "QdrantIndex":
        """Upload a store. Interrupted, the same call goes on; points are named by their row, so nothing is doubled.

        Args:
            ranker: that made the vectors.
            name: of the collection; it is created where it does not exist.
            path: folder of an embedded collection.
            url: of a server, in place of a path.
            batch_size: documents a request.
            vectors: of Qdrant's `VectorParams`: `on_disk`, `datatype`, `hnsw_config`, `quantization_config`.
            **settings: of Qdrant's `create_collection`: `shard_number`, `replication_factor`,
                `write_consistency_factor`, `optimizers_config`, `on_disk_payload`, ...

        Raises:
            ValueError: if the vectors are of another model, or the collection is of other vectors.
            ConnectionError: if the server does not answer; what is uploaded stays.
        """
        check_model(store.facts, ranker, store.folder)
        if store.has_token_vectors and store.facts["architecture"] != "ColBERT":
            raise ValueError(
                f"Qdrant ranks by dot products and MaxSim, not as {store.facts['architecture']} does: use"
                " StoredReranker."
            )
        index = cls(ranker, _connect(path, url), name)
        facts = {key: store.facts[key] for key in ("architecture", "model_dtype", "model")}
        facts |= {"documents": len(store), "vectors": store.facts["checksum"]}
        if not index._ask(lambda: index.client.collection_exists(name)):
            multivector = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
            parameters = models.VectorParams(
                size=store.dimension,
                distance=models.Distance.DOT,
                multivector_config=multivector if store.has_token_vectors else None,
                **(vectors or {}),
            )
            index._ask(lambda: index.client.create_collection(name, parameters, metadata=facts, **settings))
        if (found := index._facts()) != facts:
            other = next(key for key in facts if found.get(key) != facts[key])
            raise ValueError(
                f"The Qdrant collection {name!r} is of other {other} ({found.get(other)}, here {facts[other]}); give "
                "another name, or delete it first."
            )
        index._upload(store, batch_size)
        return index

    @classmethod
    def open(
        cls, ranker: Ranker, name: str, path: str | os.PathLike | None = None, url: str | None = None
    ) -> "QdrantIndex":
        """Open a collection that `build` uploaded.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it was built by another model, or is incomplete.
            ConnectionError: if the server does not answer.
        """
        index = cls(ranker, _connect(path, url), name)
        if not index._ask(lambda: index.client.collection_exists(name)):
            raise FileNotFoundError(f"There is no Qdrant collection {name!r} at {path or url}.")
        facts = index._facts()
        if "model" not in facts:
            raise ValueError(f"The Qdrant collection {name!r} does not say which model made it; build it here.")
        check_model(facts, ranker, Path(name))
        if len(index) < facts["documents"]:
            raise ValueError(
                f"The Qdrant collection {name!r} has {len(index):,} of {facts['documents']:,} documents; build it "
                "again, which goes on where it stopped."
            )
        return index

    def __len__(self) -> int:
        return self._ask(lambda: self.client.count(self.name, exact=True)).count

    def close(self) -> None:
        """Close the connection; an embedded collection can be opened once at a time."""
        self.client.close()

    def search(
        self, queries: Mapping[str, str], k: int = 100, only: Sequence[Id] | None = None, exact: bool | None = None
    ) -> Run:
        """The best k documents of every query.

        Args:
            queries: query_id -> text.
            k: documents a query; all where there are fewer.
            only: ids of the documents that may be found; None for all.
            exact: True makes a server compare every document; None leaves it to the server. Embedded always does.

        Returns:
            A run; ties in the order of the collection.

        Raises:
            ConnectionError: if the server does not answer.
        """
        run, items = Run(), list(queries.items())
        only = None if only is None else models.MatchAny(any=[str(i) for i in only])
        chosen = None if only is None else models.Filter(must=[models.FieldCondition(key="id", match=only)])
        settings = None if exact is None else models.SearchParams(exact=exact)
        for start in range(0, len(items), QUERIES_AT_ONCE):
            query_ids, texts = zip(*items[start : start + QUERIES_AT_ONCE], strict=True)
            requests = [
                models.QueryRequest(
                    query=vectors.tolist(), limit=k, filter=chosen, params=settings, with_payload=["id"]
                )
                for vectors in self.ranker.encode_queries(texts)
            ]
            answers = self._ask(lambda asked=requests: self.client.query_batch_points(self.name, asked))
            for query_id, answer in zip(query_ids, answers, strict=True):
                names = {point.id: point.payload["id"] for point in answer.points}
                scores = np.array([point.score for point in answer.points])
                found = best_of(scores, np.array(list(names), dtype=np.int64), k)
                run[str(query_id)] = [(names[int(row)], float(score)) for score, row in zip(*found, strict=True)]
        return run

    def _facts(self) -> dict[str, Any]:
        return self._ask(lambda: self.client.get_collection(self.name)).config.metadata or {}

    def _upload(self, store: VectorStore, batch_size: int) -> None:
        """In the order of the rows, and each batch is acknowledged before the next: the count says where to go on."""
        done = len(self) // batch_size * batch_size
        with tqdm(total=len(store), initial=done, desc=f"Uploading to {self.name}", unit="passage") as progress:
            for start in range(done, len(store), batch_size):
                rows = np.arange(start, min(start + batch_size, len(store)))
                batch = models.Batch(
                    ids=rows.tolist(),
                    vectors=[vectors.tolist() for vectors in store.take(rows)],
                    payloads=[{"id": doc_id} for doc_id in store.ids_of(rows)],
                )
                self._ask(lambda points=batch: self.client.upsert(self.name, points, wait=True))
                progress.update(len(rows))
        if len(self) != len(store):
            raise ValueError(
                f"The Qdrant collection {self.name!r} has {len(self):,} documents, not {len(store):,}: something else "
                "writes to it; delete it and build it again."
            )

    def _ask(self, request: Callable[[], Answer]) -> Answer:
        """A request, repeated while the server is down, slow or overloaded; all of ours may be repeated."""
        for attempt in range(ATTEMPTS):
            try:
                return request()
            except UnexpectedResponse as error:
                if error.status_code not in (408, 429) and error.status_code < 500:
                    raise ValueError(f"Qdrant refuses the request on {self.name!r}: {_line(error)}") from None
                problem = _line(error)
            except ResponseHandlingException as error:
                problem = _line(error)
            logger.warning("Qdrant did not answer (%s), attempt %d of %d", problem, attempt + 1, ATTEMPTS)
            if attempt + 1 < ATTEMPTS:
                time.sleep(2**attempt)
        raise ConnectionError(
            f"Qdrant did not answer {ATTEMPTS} times ({problem}); see that the server runs. What is uploaded stays, "
            "and the same call goes on from there."
        )


def _connect(path: str | os.PathLike | None, url: str | None) -> QdrantClient:
    if (path is None) == (url is None):
        raise ValueError("Give either path= (embedded) or url= (a server).")
    if url is not None:
        return QdrantClient(url=url, api_key=os.environ.get(API_KEY), timeout=60, check_compatibility=False)
    try:
        return QdrantClient(path=str(path))
    except RuntimeError as error:
        raise ValueError(f"{path}: {_line(error)}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
