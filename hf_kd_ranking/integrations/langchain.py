"""LangChain: a compressor that re-ranks what a retriever found, and a retriever that searches with a pipeline."""

from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict

from ..data.passages import best_passages
from ..errors import InputError
from ..ranker import Ranker
from ..searcher import Pipeline


class RankerCompressor(BaseDocumentCompressor):
    """Re-rank documents; their metadata get `relevance_score`. `top_k` of None keeps all of them."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    ranker: Ranker
    top_k: int | None = None

    def compress_documents(self, documents: Sequence[Document], query: str, callbacks: Any = None) -> list[Document]:
        """Return the best `top_k` documents, best first."""
        reranked = []
        for place, score in self.ranker.rerank(query, [document.page_content for document in documents], self.top_k):
            metadata = documents[place].metadata | {"relevance_score": score}
            reranked.append(documents[place].model_copy(update={"metadata": metadata}))
        return reranked


class PipelineRetriever(BaseRetriever):
    """Search a collection with a pipeline that has its texts; metadata are `relevance_score` and the document's id.

    Of a split document, the text is the passage that the index, or else the first stage, scores best.
    """

    pipeline: Pipeline
    k: int = 10

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        documents = self.pipeline.documents
        if documents is None:
            raise InputError("The retriever returns texts, and this pipeline has none; save it with its documents.")
        ranking = self.pipeline.search(query, self.k)
        best: dict[str, tuple[str, float]] = {}
        if documents.aggregation is not None:
            searched = self.pipeline.first_stage if self.pipeline.index is None else self.pipeline.index
            [passages] = searched.rank_passages([query], max(self.k, self.pipeline.depth))
            best = best_passages(passages)
        found = []
        for doc_id, score in ranking:
            [row] = documents.rows_of_documents([best.get(doc_id, (doc_id, score))[0]])
            [text] = documents.take([row])
            found.append(Document(text, id=str(doc_id), metadata={"relevance_score": score}))
        return found
