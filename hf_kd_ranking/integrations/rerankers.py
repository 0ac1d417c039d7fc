"""The `rerankers` library: a ranker with the interface of its models."""

from rerankers.documents import Document
from rerankers.models.ranker import BaseRanker
from rerankers.results import RankedResults, Result
from rerankers.utils import prep_docs

from ..ranker import Ranker


class PassageReranker(BaseRanker):
    """A checkpoint, or a `Ranker`, as a model of the library: `rank(query, docs)` and `score(query, doc)`."""

    def __init__(self, model_name_or_path: str | Ranker, verbose: int = 1, device: str | None = None) -> None:
        self.ranker = model_name_or_path
        if not isinstance(model_name_or_path, Ranker):
            self.ranker = Ranker.from_pretrained(model_name_or_path, device=device)
        self.verbose = verbose

    def score(self, query: str, doc: str) -> float:
        """Return the score of one document."""
        return float(self.ranker.score(query, [doc])[0])

    def rank(
        self,
        query: str,
        docs: str | list[str] | Document | list[Document],
        doc_ids: list[str] | list[int] | None = None,
        metadata: list[dict] | None = None,
    ) -> RankedResults:
        """Return all documents, best first, with their scores and ranks from 1."""
        documents = prep_docs(docs, doc_ids, metadata) if docs else []
        results = []
        for place, score in self.ranker.rerank(query, [document.text for document in documents]):
            results.append(Result(documents[place], score, rank=len(results) + 1))
        return RankedResults(results, query, has_scores=True)
