"""The search of one query: a first stage, then each ranker, with the time of every stage and the words that match."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..artifacts import changed_names, read_description
from ..data.runs import Run
from ..data.texts import TextStore
from ..inference import score_stored
from ..ranker import Ranker
from ..retrieval.base import Index, model_identity, open_index
from ..retrieval.bm25 import BM25Index
from ..retrieval.fusion import fuse_runs
from ..retrieval.vector_store import VectorStore
from .matches import Part, mark_matches

logger = logging.getLogger(__name__)

SHOWN = 10  # passages of a ranking
LONGEST_TEXT = 2_000  # characters of a passage that are sent


@dataclass(frozen=True)
class Hit:
    """A passage of a ranking: its score, its rank in the first stage (None if it is not there), its text in parts."""

    doc_id: str
    score: float
    first_rank: int | None
    parts: list[Part]


@dataclass(frozen=True)
class Ranking:
    """The passages that one ranker found, best first, and the milliseconds of its stages."""

    name: str
    stages_ms: dict[str, float]
    hits: list[Hit]


@dataclass(frozen=True)
class Results:
    """The rankings of a query, and the number and milliseconds of the first stage's candidates (None without one)."""

    query: str
    candidates: int | None
    first_stage_ms: float | None
    rankings: list[Ranking]


# Documents and their scores, best first, and the vectors of the query and the documents, to mark matching words.
Scored = tuple[list[str], np.ndarray, np.ndarray | None, Sequence[np.ndarray]]


class StageTimes(dict[str, float]):
    """Milliseconds of each stage, measured from the end of the stage before."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def end(self, stage: str) -> None:
        """Record that a stage ends now."""
        now = time.perf_counter()
        self[stage] = 1_000 * (now - self._last)
        self._last = now


@dataclass
class RankerSearch:
    """One ranker over a collection: it searches an index, or re-ranks candidates from stored vectors or from texts.

    Args:
        ranker: any ranker.
        documents: the collection.
        store: the vectors of the documents; None encodes their texts.
        index: searches the whole collection; None re-ranks candidates.
        is_fused: True adds the candidates' scores to the ranker's by the weighted sum of `fuse_runs`.

    Raises:
        ValueError: if both `index` and `is_fused` are given: most documents that an index finds have no score to add.
    """

    ranker: Ranker
    documents: TextStore
    store: VectorStore | None = None
    index: Index | None = None
    is_fused: bool = False

    def __post_init__(self) -> None:
        if self.is_fused and self.index is not None:
            raise ValueError(
                "BM25's scores are added to re-ranked candidates (--rerank); this ranker searches an index."
            )
        self.config = self.ranker.model.config
        compares_tokens = self.config.token_similarity is not None and self.config.is_storable
        self.has_matches = compares_tokens and self.ranker.tokenizer.is_fast  # others do not know a token's place

    def describe(self, candidates: int) -> str:
        """Return in words how the ranker ranks, given the number of candidates."""
        if self.index is not None:
            return f"{self.config.model_type}, searches all {len(self.documents):,} passages"
        source = "their texts" if self.store is None else "stored vectors"
        line = f"{self.config.model_type}, re-ranks BM25’s best {candidates:,} from {source}"
        if self.is_fused:
            line += ", adds BM25’s scores"
        return line

    def search(self, name: str, query: str, candidates: Sequence[tuple[str, float]]) -> Ranking:
        """Rank documents for a query.

        Args:
            name: name of the ranker.
            query: text of the query.
            candidates: doc_ids and scores of the first stage, best first. With an index they only give the ranks.

        Raises:
            KeyError: if a document has no text, or no stored vector.
        """
        if self.index is None and not candidates:
            return Ranking(name, {}, [])
        times = StageTimes()
        if self.index is not None:
            doc_ids, scores, *vectors = self._search_index(query, times)
        else:
            doc_ids, scores, *vectors = self._rerank(query, candidates, times)
        texts = [text[:LONGEST_TEXT] for text in self.documents[doc_ids]]
        if self.has_matches:
            passages = mark_matches(self.ranker.processor, query, texts, *vectors, self.config.token_similarity)
        else:
            passages = [[Part(text)] for text in texts]
        first_ranks = {doc_id: rank for rank, (doc_id, _) in enumerate(candidates, start=1)}
        hits = []
        for doc_id, score, parts in zip(doc_ids, scores.tolist(), passages, strict=True):
            hits.append(Hit(doc_id, score, first_ranks.get(doc_id), parts))
        return Ranking(name, dict(times), hits)

    def _search_index(self, query: str, times: StageTimes) -> Scored:
        queries = self.ranker.encode_queries([query])
        times.end("query encoding")
        [(scores, rows)] = self.index.search_vectors(queries, SHOWN)
        doc_ids = self.index.ids.ids_of(rows)
        times.end("search")
        if not self.has_matches:
            return doc_ids, scores, None, ()
        return doc_ids, scores, queries[0], self._read_vectors(doc_ids)

    def _rerank(self, query: str, candidates: Sequence[tuple[str, float]], times: StageTimes) -> Scored:
        doc_ids = [doc_id for doc_id, _ in candidates]
        query_vectors, vectors = None, ()
        if self.config.is_storable:
            query_vectors = self.ranker.encode_queries([query])[0]
            times.end("query encoding")
            vectors = self._read_vectors(doc_ids)
            times.end("passage encoding" if self.store is None else "reading vectors")
            scores = score_stored(self.ranker.model, query_vectors, vectors, self.ranker.batch_size)
        else:
            scores = self.ranker.score(query, self.documents[doc_ids])
        if self.is_fused:
            own = Run({"q": list(zip(doc_ids, scores.tolist(), strict=True))})
            fused = dict(fuse_runs([own, Run({"q": list(candidates)})], "weighted_sum")["q"])
            scores = np.array([fused[doc_id] for doc_id in doc_ids])
        times.end("scoring")
        best = np.argsort(-scores, kind="stable")[:SHOWN]
        if self.has_matches:
            vectors = [vectors[i] for i in best]
        return [doc_ids[i] for i in best], scores[best], query_vectors, vectors

    def _read_vectors(self, doc_ids: Sequence[str]) -> np.ndarray | list[np.ndarray]:
        if self.store is None:
            return self.ranker.encode_documents(self.documents[doc_ids])
        return self.store.take(self.store.rows_of_known(doc_ids, f"documents of {self.store.folder}"))


@dataclass
class SearchEngine:
    """Rankers side by side over one collection, with BM25 as their first stage.

    Args:
        rankers: by name, in the order of the columns.
        first_stage: finds `k` candidates; None if every ranker searches an index.

    Raises:
        ValueError: if a ranker re-ranks and there is no first stage.
    """

    rankers: Mapping[str, RankerSearch]
    first_stage: BM25Index | None
    k: int = 100

    def __post_init__(self) -> None:
        if self.first_stage is None and any(ranker.index is None for ranker in self.rankers.values()):
            raise ValueError("A ranker without an index needs a first stage, a BM25Index.")

    def search(self, query: str) -> Results:
        """Run all stages one after the other, so that no time includes the work of another stage."""
        times, candidates, count = StageTimes(), [], None
        if self.first_stage is not None:
            candidates = self.first_stage.search({"q": query}, self.k)["q"]
            count = len(candidates)
            times.end("BM25")
        rankings = []
        for name, ranker in self.rankers.items():
            rankings.append(ranker.search(name, query, candidates))
        return Results(query, count, times.get("BM25"), rankings)


def build_engine(
    rankers: Mapping[str, Ranker],
    documents: TextStore,
    index_folders: Sequence[Path] = (),
    candidates: Path | None = None,
    rerank: bool = False,
    fuse: bool = False,
    k: int = 100,
    settings: str | None = None,
    probes: int | None = None,
) -> SearchEngine:
    """Give each ranker the index that it made, if there is one, and build BM25 if a ranker re-ranks.

    Args:
        rankers: by name.
        documents: the collection.
        index_folders: folders that `index` wrote, in any order.
        candidates: folder of a BM25 index; None builds one if it is needed.
        rerank, fuse, k, settings, probes: as the options of `hf-kd-ranking serve`.

    Raises:
        ValueError: if no ranker made an index, two belong to one ranker, or nothing reads `settings` or `probes`.
        FileNotFoundError: if an index does not exist.
    """
    folders = _match_indexes(rankers, index_folders)
    searches, used, has_reranker = {}, set(), False
    for name, ranker in rankers.items():
        folder, store, index = folders.get(name), None, None
        if folder is not None and ranker.model.config.is_searchable and not rerank:
            options = {}
            if (folder / "dense").is_dir():
                options["settings"] = settings
            if (folder / "centroids").is_dir():
                options["probes"] = probes
            used.update(options)
            index = open_index(folder, ranker, **options)
            store = index.ids  # without faiss it is the store, which was opened and verified
        if folder is not None and not isinstance(store, VectorStore):
            store = VectorStore.open(folder, ranker)
        has_reranker = has_reranker or index is None
        searches[name] = RankerSearch(ranker, documents, store, index, fuse)
    if settings is not None and "settings" not in used:
        raise ValueError(f"--settings {settings} is for a faiss index that searches; `index --factory` builds one.")
    if probes is not None and "probes" not in used:
        raise ValueError(f"--probes {probes} is for a ColBERT index that searches; `index --centroids` builds one.")
    first_stage = None
    if candidates is not None:
        first_stage = BM25Index.open(candidates)
    elif has_reranker:
        logger.info("Indexing %d passages for BM25", len(documents))
        first_stage = BM25Index.build(documents)
    return SearchEngine(searches, first_stage, k)


def _match_indexes(rankers: Mapping[str, Ranker], folders: Sequence[Path]) -> dict[str, Path]:
    """Return the folder of each ranker's index, by the model that its description names."""
    matched: dict[str, Path] = {}
    for folder in folders:
        description = read_description(folder)
        for name, ranker in rankers.items():
            if name not in matched and not changed_names(description, model_identity(ranker)):
                matched[name] = folder
                break
        else:
            architecture = description.get("architecture", description.get("kind"))
            raise ValueError(
                f"{folder} ({architecture}) was not built by one of the models ({', '.join(rankers)}), or is the "
                "second index of one; give the model that built it, or build it again."
            )
    return matched
