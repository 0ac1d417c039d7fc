"""The one shape of indexes: `build`, `open`, `save` and `search`; `open_index` opens what a folder contains."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tqdm.auto import tqdm

from ..artifacts import DESCRIPTION, has_description, new_version, read_description
from ..data.ids import IdIndex
from ..data.passages import to_documents
from ..data.rankings import Pairs, Ranking, Run
from ..data.texts import Collection
from ..errors import InputError
from ..inference import PROGRESS_FROM, fingerprint
from ..models import RankerConfig
from ..ranker import Ranker

Result = tuple[np.ndarray, np.ndarray]  # of a query: scores, descending, and rows
# (vectors per text, similarity), as configs declare them -> the index that searches such vectors.
INDEX_NAMES = {
    ("one", "dot"): "DenseIndex",
    ("per_token", "max_sim"): "ColBERTIndex",
    ("sparse", "dot"): "SparseIndex",
}
# Config fields that change no vector of a document; fields of the query side are recognised by their names.
OTHER_FIELDS = {"encoder_config", "initializer_range", *(field.name for field in fields(RankerConfig))}


class Index:
    """A collection that can be searched; make one with `build` or `open`.

    `build(source, folder=None, **settings)` indexes a `TextStore` (BM25) or a `VectorStore` that knows its ranker, in
    memory, or also in a new folder. `open(folder, ranker=None, is_verified=True)` maps a saved index for the ranker
    that made its vectors. It raises FileNotFoundError if there is not an index, and InputError if another model made
    its vectors, or a file is truncated or damaged; for the latter every file is read, unless `is_verified` is False.
    """

    compares: ClassVar[Sequence[tuple[str, str]]] = ()  # the keys of `INDEX_NAMES` that it can search; none for texts
    queries_at_once: ClassVar[int] = 256
    ranker: Ranker  # encodes the queries
    ids: IdIndex  # of the rows
    description: dict[str, Any] | None = None  # what the index was built from; None if `save` cannot write it

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write a BM25 or dense index, which appears, or replaces the old version, when it is complete.

        Raises:
            FileExistsError: if the folder contains something else, or an index and `overwrite` is False.
            NotImplementedError: if the index is of another kind.
        """
        if self.description is None:
            raise NotImplementedError(f"A {type(self).__name__} is saved where it is built.")
        refuse_replacing(Path(folder), self.description["kind"], overwrite)
        with new_version(Path(folder), self.description) as data:
            self._write(data)

    @property
    def collection(self) -> Collection:
        """The collection that was indexed."""
        return Collection.of(self.description)

    def search(self, queries: Mapping[str, str], k: int = 100, **options: Any) -> Run:
        """Return the best k documents of every query; tied documents are in the order of the collection.

        In a collection of passages, the score of a document is that of its best passage.

        Args:
            queries: query_id -> text.
            k: documents per query; all if the index has fewer.
            **options: see `QdrantIndex`, and `search_vectors` of the other indexes.

        Raises:
            TypeError: if the queries are not a dictionary of strings.
            InputError: if k is not positive.
        """
        return Run(self.rankings(queries, k, **options))

    def rankings(self, queries: Mapping[str, str], k: int = 100, **options: Any) -> Iterator[tuple[str, Ranking]]:
        """Yield every query's id and ranking as `search` returns them, of a block of queries at a time."""
        check_k(k)
        if not isinstance(queries, Mapping):
            raise TypeError(f"Queries are a dictionary, query_id -> text, got {type(queries).__name__}.")
        for query in queries.values():
            if not isinstance(query, str):
                raise TypeError(f"A query is a str, got {type(query).__name__}: {query!r}.")
        query_ids = list(queries)
        starts = range(0, len(query_ids), self.queries_at_once)
        for start in tqdm(starts, desc="Searching", disable=len(query_ids) < PROGRESS_FROM):
            block = query_ids[start : start + self.queries_at_once]
            rankings = self._rank_documents([queries[query_id] for query_id in block], k, **options)
            for query_id, ranking in zip(block, rankings, strict=True):
                yield str(query_id), ranking

    def _rank_documents(self, texts: Sequence[str], k: int, **options: Any) -> list[Pairs]:
        rankings = self.rank_passages(texts, k, **options)
        if self.collection.aggregation is None:
            return rankings
        return [to_documents(ranking)[:k] for ranking in rankings]

    def rank_passages(self, texts: Sequence[str], k: int, **options: Any) -> list[Ranking]:
        """Return the rankings of so many passages that there are k documents, or of all that are found.

        In an index whose texts are documents these are the best k.
        """
        if self.collection.aggregation is None:
            return self._rank(texts, k, **options)
        depth = min(2 * k, len(self))
        rankings = self._rank(texts, depth, **options)
        lacking = _lacking(rankings, range(len(texts)), k, depth)
        while lacking and depth < len(self):  # for each query by itself, so that ties do not depend on the others
            depth = min(2 * depth, len(self))
            deeper = self._rank([texts[place] for place in lacking], depth, **options)
            for place, ranking in zip(lacking, deeper, strict=True):
                rankings[place] = ranking
            lacking = _lacking(rankings, lacking, k, depth)
        return rankings

    def _rank(self, texts: Sequence[str], k: int, **options: Any) -> list[Ranking]:
        return self._with_ids(self.search_vectors(self.ranker.encode_queries(texts), k, **options))

    def _with_ids(self, results: Sequence[Result]) -> list[Ranking]:
        rankings = []
        for scores, rows in results:
            rankings.append(Ranking(self.ids.ids_of(rows), scores))
        return rankings

    @classmethod
    def check_ranker(cls, ranker: Ranker | None, folder: Path) -> Ranker:
        """Return the ranker of a vector store; an InputError if it is missing, or its vectors cannot be compared."""
        if ranker is None:
            raise InputError(f"{folder} was opened without its ranker; give VectorStore.open(folder, ranker).")
        config = ranker.model.config
        vectors, similarity = config.vectors_per_text, config.similarity
        if not config.is_searchable or (vectors, similarity) not in cls.compares:
            other = INDEX_NAMES.get((vectors, similarity), "StoredReranker (--candidates)")
            form = f"{config.model_type}: vectors per text {vectors}, similarity {similarity}"
            raise InputError(f"{cls.__name__} cannot search the vectors in {folder} ({form}); use {other}.")
        return ranker


def open_index(
    folder: str | Path,
    ranker: Ranker | None = None,
    exact: bool = False,
    settings: str | None = None,
    probes: int | None = None,
) -> Index:
    """Open what a folder contains so that it searches the whole collection.

    Args:
        folder: a BM25, faiss or sparse index, or a vector store, which may contain an index or centroids.
        ranker: the ranker that made the vectors; None for BM25.
        exact: True compares every vector, also if there is a faiss index.
        settings: search settings of the faiss index, see `DenseIndex.tune`.
        probes: centroids per query token, see `ColBERTIndex`.

    Raises:
        FileNotFoundError: if there is not an index.
        InputError: if nothing reads a setting; if the ranker is missing, did not make the vectors or cannot search; or
            if the index inside belongs to an earlier version of the vectors.
    """
    folder = Path(folder)
    if exact and (settings is not None or probes is not None):
        raise InputError("--exact compares every document; --settings and --probes are for searches that do not.")
    if ranker is None:
        from .bm25 import BM25Index  # every index needs libraries of its own

        if has_description(folder) and read_description(folder).get("kind") in ("vectors", "dense", "sparse"):
            raise InputError(f"{folder} contains the vectors of a ranker; give the ranker (--model) that made them.")
        if exact:
            raise InputError("--exact is for the vectors of a ranker (--model); BM25 does not read it.")
        _refuse_unread(folder, settings, probes)
        return BM25Index.open(folder)
    from .colbert import ColBERTIndex
    from .dense import DenseIndex
    from .sparse import SparseIndex
    from .vector_store import VectorStore

    description = read_description(folder)
    if ranker.model.config.similarity == "max_sim":
        index = ColBERTIndex.open(folder, ranker)
        if index.centroids is None:
            _refuse_unread(folder, probes=probes)
        _refuse_unread(folder, settings)
        index.probes = probes
        return index
    _refuse_unread(folder, probes=probes)
    kind, index_class = "dense", DenseIndex
    if ranker.model.config.vectors_per_text == "sparse":
        kind, index_class = "sparse", SparseIndex
        exact = False  # a saved index is exact as well
        _refuse_unread(folder, settings)
    inside = folder
    if description.get("kind") != kind:
        inside = folder / kind
    if exact or not has_description(inside):
        _refuse_unread(folder, settings)
        return index_class.build(VectorStore.open(folder, ranker))
    index = index_class.open(inside, ranker)
    if inside != folder:
        check_vectors(index.description, description, inside)
    if settings is not None:
        index.tune(settings)
    return index


def _refuse_unread(folder: Path, settings: str | None = None, probes: int | None = None) -> None:
    if settings is not None:
        raise InputError(f"--settings is for a faiss index (index --factory), which {folder} does not contain.")
    if probes is not None:
        raise InputError(f"--probes is for a ColBERT index with centroids (index --centroids), unlike {folder}.")


def model_identity(ranker: Ranker) -> dict[str, str]:
    """Return what identifies the model that makes vectors: architecture, dtype, digest of weights and settings."""
    config = ranker.model.config
    names = {field.name for field in fields(type(config))} - OTHER_FIELDS | {"max_document_length", "document_prefix"}
    settings = {name: vars(config)[name] for name in sorted(names) if not name.startswith("query_")}
    return {
        "architecture": config.model_type,
        "model_dtype": str(ranker.model.dtype).removeprefix("torch."),
        "model": fingerprint(ranker.model, settings),
    }


def check_model(description: Mapping[str, Any], ranker: Ranker, folder: Path) -> None:
    """Refuse, by an InputError with the first difference, a ranker that did not make the vectors of a folder."""
    for name, value in model_identity(ranker).items():
        if description[name] != value:
            there = f"{name.replace('_', ' ')} {description[name]} there, {value} here"
            raise InputError(f"{folder} was built by another model: {there}; open it with that, or build it again.")


def check_vectors(description: Mapping[str, Any], vectors: Mapping[str, Any], folder: Path) -> None:
    """Refuse, by an InputError, an index inside a vector store that was built from other vectors."""
    if description["vectors"] != vectors["checksum"]:
        raise InputError(f"{folder} was built from an earlier version of the vectors; build it again.")


def refuse_replacing(folder: Path, kind: str, overwrite: bool) -> None:
    """Refuse, by a FileExistsError, to write over other files or kinds, or to replace an index without `overwrite`."""
    if has_description(folder):
        if not overwrite or read_description(folder).get("kind") != kind:
            replace = f"--overwrite (overwrite=True) to replace a {kind} index"
            raise FileExistsError(f"{folder} exists; give a new folder, or {replace}.")
    elif folder.is_file():
        raise FileExistsError(f"{folder} is a file; give a new folder.")
    elif folder.exists():
        for path in folder.iterdir():
            # A process that is killed while it writes the first version leaves such names.
            if not re.fullmatch(rf"v\d+|{re.escape(DESCRIPTION)}.*", path.name):
                raise FileExistsError(f"{folder} contains {path.name}, which is not of an index; give a new folder.")


def _lacking(rankings: Sequence[Ranking], places: Iterable[int], k: int, depth: int) -> list[int]:
    """Return the places of rankings of `depth` passages that have less than k documents."""
    lacking = []
    for place in places:
        if len(rankings[place]) == depth and len(to_documents(rankings[place])) < k:
            lacking.append(place)
    return lacking


def check_k(k: int) -> None:
    """Refuse, by an InputError, a number of results that is not positive."""
    if not isinstance(k, int | np.integer) or k < 1:
        raise InputError(f"k must be at least 1, got {k}.")


def best_of(scores: np.ndarray, rows: np.ndarray, k: int) -> Result:
    """Return the k highest scores, descending, and their rows; ties by row, rows of -1 (faiss' padding) left out."""
    scores, rows = scores[rows >= 0], rows[rows >= 0]
    order = np.lexsort((rows, -scores))[:k]
    return scores[order], rows[order]
