"""The search of one query: the stages of a pipeline, each with its time."""

import time
from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array

from ..data.passages import best_passages, to_documents, to_passages
from ..data.rankings import Pairs
from ..data.runs import Run
from ..errors import InputError
from ..ranker import Ranker
from ..retrieval.fusion import fuse_runs
from ..retrieval.stored_reranker import score_stored
from ..searcher import Pipeline, combine
from .schemas import Passage, SearchAnswer, TermWeight

TERMS = 12  # that are shown of a sparse vector


class StageTimes(dict[str, float]):
    """Milliseconds of each stage, measured from the end of the stage before."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def end(self, stage: str) -> None:
        """Record that a stage ends now."""
        now = time.perf_counter()
        self[stage] = 1_000 * (now - self._last)
        self._last = now


class SearchEngine:
    """A pipeline that is searched for the page; the results are those of `Pipeline.search`.

    Raises:
        InputError: if the pipeline has no texts to show, or nothing that finds documents.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        if pipeline.documents is None:
            raise InputError("The page shows passages, and this pipeline has no texts of its documents.")
        if pipeline.first_stage is None and pipeline.index is None:
            raise InputError("This pipeline re-ranks given candidates; a page needs a first stage or an index.")
        self.pipeline = pipeline
        self.config = None
        if isinstance(pipeline.ranker, Ranker):
            self.config = pipeline.ranker.model.config
        elif pipeline.ranker is not None:
            self.config = pipeline.ranker.config

    def describe(self) -> str:
        """Return in words how passages are ranked."""
        pipeline = self.pipeline
        if self.config is None:
            return "BM25"
        if pipeline.index is not None:
            line = f"{self.config.model_type}, searches all {len(pipeline.documents):,} passages"
        else:
            source = "their texts" if pipeline.store is None else "stored vectors"
            line = f"{self.config.model_type}, re-ranks BM25’s best {pipeline.depth:,} from {source}"
        if pipeline.weight > 0:
            line += ", adds BM25’s scores"
        return line

    def warm_up(self) -> None:
        """Search once, for words of the first document; raises what `search` raises."""
        _, text = next(self.pipeline.documents.items())
        self.search(" ".join(text.split()[:8]))

    def search(self, query: str, k: int = 10) -> SearchAnswer:
        """Return the best k passages; the stages run one after the other, so that no time includes another stage.

        Raises:
            UnknownIdError: if a document has no text, or no stored vector.
        """
        pipeline, times = self.pipeline, StageTimes()
        candidates, count = [], None
        shown: dict[str, str] = {}  # document -> its best passage, by the last stage that scored it
        if pipeline.first_stage is not None:
            [found] = pipeline.first_stage.rank_passages([query], max(k, pipeline.depth))
            candidates = self._documents(found, "max", shown)[: max(k, pipeline.depth)]
            count = len(candidates)
            times.end("BM25")
        if pipeline.index is not None:
            ranking = self._search_index(query, k, candidates, times, shown)
        elif pipeline.ranker is not None and candidates:
            ranking = self._rerank(query, candidates, times, shown)
        else:
            ranking = candidates
        first_ranks = {doc_id: rank for rank, (doc_id, _) in enumerate(candidates, start=1)}
        passage_ids = [shown.get(doc_id, doc_id) for doc_id, _ in ranking[:k]]
        texts = pipeline.documents[passage_ids]
        query_terms, terms = None, [None] * len(texts)
        if isinstance(pipeline.ranker, Ranker) and self.config.vectors_per_text == "sparse" and texts:
            [query_terms] = self._terms(pipeline.ranker.encode_queries([query]), [query])
            terms = self._terms(self._read_vectors(passage_ids), texts)
            times.end("words")
        hits = []
        for (doc_id, score), passage_id, text, of_hit in zip(ranking, passage_ids, texts, terms, strict=False):
            ranks = {"first_rank": first_ranks.get(doc_id), "passage_id": passage_id}
            hits.append(Passage(doc_id=doc_id, score=score, text=text, terms=of_hit, **ranks))
        return SearchAnswer(query=query, candidates=count, stages_ms=dict(times), hits=hits, terms=query_terms)

    def _terms(self, vectors: csr_array, texts: Sequence[str]) -> list[list[TermWeight]]:
        """Return the words of the largest weights in the vector of each text."""
        tokenizer = self.pipeline.ranker.tokenizer
        tokens = self.pipeline.ranker.processor.encode(texts)["input_ids"]  # by itself in a thread
        found = []
        for row, of_text in enumerate(tokens):
            places = slice(vectors.indptr[row], vectors.indptr[row + 1])
            numbers, weights = vectors.indices[places], vectors.data[places]
            largest = np.argsort(-np.abs(weights), kind="stable")[:TERMS]
            own = set(of_text)
            words = tokenizer.convert_ids_to_tokens(numbers[largest].tolist())
            terms = []
            for word, number, weight in zip(words, numbers[largest].tolist(), weights[largest].tolist(), strict=True):
                terms.append(TermWeight(word=word, weight=weight, is_expansion=number not in own))
            found.append(terms)
        return found

    def _documents(self, passages: Pairs, aggregation: str | None, shown: dict[str, str]) -> Pairs:
        """Return the ranking of documents, and note the best passage of each if they are split."""
        if self.pipeline.documents.aggregation is None:
            return passages
        shown.update({doc_id: passage_id for doc_id, (passage_id, _) in best_passages(passages).items()})
        return to_documents(passages, aggregation)

    def _search_index(self, query: str, k: int, candidates: Pairs, times: StageTimes, shown: dict[str, str]) -> Pairs:
        pipeline = self.pipeline
        count = max(k, pipeline.depth) if pipeline.weight == 0 else pipeline.depth
        if pipeline.documents.aggregation is None:
            queries = pipeline.ranker.encode_queries([query])
            times.end("query encoding")
            [(scores, rows)] = pipeline.index.search_vectors(queries, count)
            ranking = list(zip(pipeline.index.ids.ids_of(rows), scores.tolist(), strict=True))
        else:
            [found] = pipeline.index.rank_passages([query], count)
            ranking = self._documents(found, "max", shown)[:count]
        if pipeline.weight > 0:
            runs = [Run({"q": ranking}), Run({"q": candidates[: pipeline.depth]})]
            ranking = fuse_runs(runs, "weighted_sum", [1 - pipeline.weight, pipeline.weight])["q"]
        times.end("search")
        return ranking

    def _rerank(self, query: str, candidates: Pairs, times: StageTimes, shown: dict[str, str]) -> Pairs:
        pipeline = self.pipeline
        top = Run({"q": candidates[: pipeline.depth]})
        if pipeline.documents.aggregation is not None:
            top = to_passages(top, pipeline.documents, f"texts of {pipeline.documents.source}")
        doc_ids = [doc_id for doc_id, _ in top["q"]]
        if isinstance(pipeline.ranker, Ranker) and self.config.is_storable:
            query_vectors = pipeline.ranker.encode_queries([query])[0]
            times.end("query encoding")
            vectors = self._read_vectors(doc_ids)
            times.end("passage encoding" if pipeline.store is None else "reading vectors")
            scores = score_stored(pipeline.ranker.model, query_vectors, vectors, pipeline.ranker.batch_size)
        else:
            scores = pipeline.ranker.score(query, pipeline.documents[doc_ids])
        scored = sorted(zip(doc_ids, scores.tolist(), strict=True), key=lambda pair: -pair[1])
        by_document = dict(self._documents(scored, pipeline.documents.aggregation, shown))
        ranking = combine(candidates, by_document, pipeline.depth, pipeline.weight)
        times.end("scoring")
        return ranking

    def _read_vectors(self, doc_ids: list[str]) -> np.ndarray | list[np.ndarray]:
        pipeline = self.pipeline
        if pipeline.store is None:
            return pipeline.ranker.encode_documents(pipeline.documents[doc_ids])
        return pipeline.store.take(pipeline.store.rows_of_known(doc_ids, f"documents of {pipeline.store.folder}"))
