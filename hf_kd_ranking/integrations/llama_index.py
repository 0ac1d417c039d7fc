"""LlamaIndex: a node postprocessor that re-ranks what a retriever found."""

from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

from ..errors import InputError
from ..ranker import Ranker


class RankerPostprocessor(BaseNodePostprocessor):
    """Re-rank nodes, whose scores are replaced; `top_n` of None keeps all nodes.

    The ranker reads a node's text with the metadata that are meant for embeddings.
    """

    ranker: Ranker
    top_n: int | None = None

    @classmethod
    def class_name(cls) -> str:
        """Return the name under which LlamaIndex knows the component."""
        return "RankerPostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            raise InputError("Re-ranking nodes needs the query: give query_bundle or query_str.")
        texts = [node.node.get_content(metadata_mode=MetadataMode.EMBED) for node in nodes]
        reranked = []
        for place, score in self.ranker.rerank(query_bundle.query_str, texts, self.top_n):
            reranked.append(NodeWithScore(node=nodes[place].node, score=score))
        return reranked
