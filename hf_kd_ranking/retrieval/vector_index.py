"""Base of the indexes of one vector per document, in which documents are added, removed, and chosen by id."""

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import xxhash

from ..data.ids import Id, IdIndex
from ..data.passages import rows_of_passages, split_id
from ..data.texts import Collection, TextStore
from ..errors import InputError
from ..ranker import Ranker
from .base import Index, check_model
from .vector_store import VectorStore


class VectorIndex(Index):
    """An index of one vector per document, dense or sparse.

    Args:
        ranker: made the vectors.
        ids: of the rows.
        removed: (N,) True at rows that are not returned any more.
        description: see `Index`.
    """

    def __init__(self, ranker: Ranker, ids: IdIndex, removed: np.ndarray, description: dict) -> None:
        self.ranker = ranker
        self.ids = ids
        self.removed = removed
        self.description = description

    def __len__(self) -> int:
        return len(self.removed) - int(self.removed.sum())

    @abstractmethod
    def _append(self, store: VectorStore) -> None:
        """Index the vectors of another store after those that are indexed."""

    def add(self, store: VectorStore, documents: TextStore | None = None) -> None:
        """Add the vectors of another store; quantisers of a dense index stay as they were trained.

        Args:
            store: the vectors of documents that are not in the index.
            documents: texts of all documents that the index then has, with which alone it can be part of a pipeline;
                None if there will be no texts beside it.

        Raises:
            InputError: if its vectors are of another model, an id is in the index already, or only one holds passages.
        """
        check_model(store.description, self.ranker, store.folder)
        for added in (store.collection, store.collection if documents is None else documents.collection):
            if added.aggregation != self.collection.aggregation:
                ways = f"{self.collection.aggregation} there, {added.aggregation} in {added.source}"
                raise InputError(f"An index has one aggregation of passages ({ways}); split all documents, or none.")
        new_ids = list(store.ids())
        known = np.flatnonzero(self.ids.rows_of(new_ids) >= 0)
        if len(known):
            count = f"{len(known)} of the {len(new_ids):,} ids of {store.folder}"
            raise InputError(f"{count} are in the index already, {new_ids[known[0]]!r} first; remove them before.")
        self._append(store)
        self.removed = np.concatenate([self.removed, np.zeros(len(new_ids), dtype=bool)])
        self.ids = IdIndex.build(self.ids.columns() + store.columns(), self.removed)
        sources = f"{self.collection.source} and {store.collection.source}"
        both = f"{self.collection.fingerprint} {store.collection.fingerprint}"
        collection = Collection(xxhash.xxh3_128_hexdigest(both.encode()), sources)
        if documents is not None:
            documents.rows_of_known(new_ids, f"texts of {documents.source}")
            collection = documents.collection
        self.description |= {"rows": len(self.ids), "collection": collection.fingerprint, "source": collection.source}

    def remove(self, ids: Sequence[Id]) -> None:
        """Leave documents, with all their passages, out of all results until the index is built again.

        Their space is free then.

        Raises:
            InputError: for a single passage of a document.
            UnknownIdError: naming ids that are not in the index.
        """
        for id_ in ids if self.collection.aggregation is not None else ():
            if split_id(str(id_))[0] != str(id_):
                raise InputError(f"{id_!r} is a passage; documents are removed with all of theirs: give the document.")
        rows = self._rows_of(ids)
        self.removed = self.removed.copy()
        self.removed[rows] = True
        self.ids = self.ids.without(rows)

    def _allowed(self, only: Sequence[Id] | None) -> np.ndarray | None:
        """Return True at rows that may be returned, (N,), those of `only` if it is given; None if all may."""
        allowed = ~self.removed
        if only is not None:
            is_chosen = np.zeros_like(allowed)
            is_chosen[self._rows_of(only)] = True
            allowed &= is_chosen
        return None if allowed.all() else allowed

    def _rows_of(self, ids: Sequence[Id]) -> np.ndarray:
        return rows_of_passages(self.ids, self.collection.aggregation, ids, "documents of the index")
