"""What a query does: a first stage, then each ranker, with the time of every stage and the terms that matched."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..data.runs import Run
from ..data.texts import TextStore
from ..inference import score_stored
from ..ranker import Ranker
from ..retrieval.bm25 import BM25Index
from ..retrieval.colbert import ColBERTIndex
from ..retrieval.dense import DenseIndex
from ..retrieval.fusion import fuse_runs
from ..retrieval.stored_reranker import StoredReranker
from .matches import Part, mark_matches

SHOWN = 10  # passages of a ranking
LONGEST_TEXT = 2_000  # characters of a passage that are sent


@dataclass(frozen=True)
class Hit:
    """A passage of a ranking: its score, its rank in the first stage (None where it is not), its text in parts."""

    doc_id: str
    score: float
    first_rank: int | None
    parts: list[Part]


@dataclass(frozen=True)
class Ranking:
    """What one ranker found, best first, and the milliseconds of its stages."""

    name: str
    stages_ms: dict[str, float]
    hits: list[Hit]


@dataclass(frozen=True)
class Results:
    """What a query found: the first stage's candidates and milliseconds (None without one), and the rankings."""

    query: str
    candidates: int | None
    first_stage_ms: float | None
    rankings: list[Ranking]


class StageTimes(dict[str, float]):
    """Milliseconds by stage, each from the end of the one before."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def end(self, stage: str) -> None:
        """Note that a stage ends now."""
        now = time.perf_counter()
        self[stage] = 1_000 * (now - self._last)
        self._last = now


class RankerSearch:
    """One ranker over a collection: searches it, or re-ranks candidates from stored vectors, or from their texts.

    Args:
        ranker: any.
        documents: the texts.
        store: its documents' vectors; None encodes texts.
        index: that searches in place of re-ranking; None re-ranks.
        probes: centroids a query term, of a ColBERT index; None compares every document.
        is_fused: True adds the candidates' own scores to the ranker's, see `fuse_runs` (weighted sum).

    Raises:
        ValueError: if it is fused and searches, which leaves most of what it finds without a score to add.
    """

    def __init__(
        self,
        ranker: Ranker,
        documents: TextStore,
        store: StoredReranker | None = None,
        index: DenseIndex | ColBERTIndex | None = None,
        probes: int | None = None,
        is_fused: bool = False,
    ) -> None:
        if is_fused and index is not None:
            raise ValueError(
                "BM25's scores are added to re-ranked candidates' (--rerank); this ranker searches by itself."
            )
        self.ranker = ranker
        self.documents = documents
        self.store = store
        self.index = index
        self.probes = probes
        self.is_fused = is_fused
        self.has_matches = ranker.model.config.model_type in ("ColBERT", "TK") and ranker.tokenizer.is_fast

    def describe(self, candidates: int) -> str:
        """What it is and how it ranks, in words."""
        kind = self.ranker.model.config.model_type
        if self.index is not None:
            return f"{kind}, searches all {len(self.documents):,} passages"
        source = "their texts" if self.store is None else "stored vectors"
        added = ", adds BM25’s scores" if self.is_fused else ""
        return f"{kind}, re-ranks BM25’s best {candidates:,} from {source}{added}"

    def search(self, name: str, query: str, candidates: Sequence[tuple[str, float]]) -> Ranking:
        """Rank for a query.

        Args:
            name: of the ranker.
            candidates: ids that are re-ranked and their scores, best first; where it searches they only give ranks.

        Raises:
            KeyError: if a document has no text, or no stored vector.
        """
        if self.index is None and not candidates:
            return Ranking(name, {}, [])
        times = StageTimes()
        ids, scores, query_vector, vectors = self._rank(query, candidates, times)
        texts = [text[:LONGEST_TEXT] for text in self.documents[ids]]
        if self.has_matches:
            is_cosine = self.ranker.model.config.model_type == "TK"
            passages = mark_matches(self.ranker.processor, query, texts, query_vector, vectors, is_cosine)
        else:
            passages = [[Part(text)] for text in texts]
        ranks = {doc_id: rank for rank, (doc_id, _) in enumerate(candidates, start=1)}
        hits = zip(ids, scores, map(ranks.get, ids), passages, strict=True)
        return Ranking(
            name, dict(times), [Hit(doc_id, float(score), rank, parts) for doc_id, score, rank, parts in hits]
        )

    def _rank(
        self, query: str, candidates: Sequence[tuple[str, float]], times: StageTimes
    ) -> tuple[list[str], np.ndarray, np.ndarray | None, Sequence[np.ndarray]]:
        """Ids and scores, best first; the query's vectors, and those of the documents where terms are marked."""
        found = [doc_id for doc_id, _ in candidates]
        if not self.ranker.model.config.is_storable:
            scores = self._fused(candidates, self.ranker.score(query, self.documents[found]))
            times.end("scoring")
            return *_best(found, scores)[:2], None, ()
        queries = self.ranker.encode_queries([query])
        times.end("query encoding")
        if self.index is not None:
            ids, scores = self._found(queries)
            times.end("search")
            return ids, scores, queries[0], self._vectors_of(ids) if self.has_matches else ()
        vectors = self._vectors_of(found)
        times.end("passage encoding" if self.store is None else "reading vectors")
        scores = score_stored(self.ranker.model, queries[0], vectors, self.ranker.batch_size)
        scores = self._fused(candidates, scores)
        times.end("scoring")
        ids, scores, order = _best(found, scores)
        return ids, scores, queries[0], [vectors[i] for i in order]

    def _fused(self, candidates: Sequence[tuple[str, float]], scores: np.ndarray) -> np.ndarray:
        """The scores, with the candidates' own added where that was asked for."""
        if not self.is_fused:
            return scores
        own = [(doc_id, score) for (doc_id, _), score in zip(candidates, scores.tolist(), strict=True)]
        fused = dict(fuse_runs([Run({"q": own}), Run({"q": list(candidates)})], "weighted_sum")["q"])
        return np.array([fused[doc_id] for doc_id, _ in candidates])

    def _found(self, queries: np.ndarray | Sequence[np.ndarray]) -> tuple[list[str], np.ndarray]:
        if isinstance(self.index, DenseIndex):
            [(scores, rows)] = self.index.search_vectors(queries, SHOWN)
            return self.index.ids.ids_of(rows), scores
        [(scores, rows)] = self.index.search_vectors(queries, SHOWN, self.probes)
        return self.index.store.ids_of(rows), scores

    def _vectors_of(self, ids: Sequence[str]) -> np.ndarray | list[np.ndarray]:
        if self.store is None:
            return self.ranker.encode_documents(self.documents[ids])
        store = self.store.store
        return store.take(store.rows_of_known(ids, f"documents of {store.folder}"))


class SearchEngine:
    """Rankers side by side over one collection, with BM25 as their first stage.

    Args:
        rankers: by name, in the order of the columns.
        first_stage: None where every ranker searches by itself.
        k: candidates that are re-ranked.

    Raises:
        ValueError: if a ranker re-ranks and there is no first stage.
    """

    def __init__(self, rankers: Mapping[str, RankerSearch], first_stage: BM25Index | None, k: int = 100) -> None:
        if first_stage is None and any(ranker.index is None for ranker in rankers.values()):
            raise ValueError("A ranker that searches no collection needs a first stage, a BM25Index.")
        self.rankers = dict(rankers)
        self.first_stage = first_stage
        self.k = k

    def search(self, query: str) -> Results:
        """Run all stages, one after the other, so that no time includes another's work."""
        times, candidates = StageTimes(), []
        if self.first_stage is not None:
            candidates = self.first_stage.search({"q": query}, self.k)["q"]
            times.end("BM25")
        rankings = [ranker.search(name, query, candidates) for name, ranker in self.rankers.items()]
        return Results(query, len(candidates) if times else None, times.get("BM25"), rankings)


def _best(ids: Sequence[str], scores: np.ndarray) -> tuple[list[str], np.ndarray, np.ndarray]:
    order = np.argsort(-scores, kind="stable")[:SHOWN]
    return [ids[i] for i in order], scores[order], order
