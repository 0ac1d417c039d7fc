"""Haystack: a ranker component."""

from dataclasses import replace
from typing import Any

from haystack import Document, component, default_to_dict

from ..errors import InputError
from ..ranker import Ranker


@component
class PassageRanker:
    """Re-rank documents by a checkpoint, which `warm_up` loads; `top_k` of None keeps all documents.

    Saved pipelines hold the checkpoint's name and the device, and no weights. Haystack loads them with
    `Pipeline.load(file, allowed_modules=["hf_kd_ranking.integrations.haystack"])`.
    """

    def __init__(self, model: str, top_k: int | None = None, device: str | None = None) -> None:
        self.model, self.top_k, self.device = model, top_k, device
        self.ranker: Ranker | None = None

    def warm_up(self) -> None:
        """Load the checkpoint, once."""
        if self.ranker is None:
            self.ranker = Ranker.from_pretrained(self.model, device=self.device)

    def to_dict(self) -> dict[str, Any]:
        """Return the component's settings, for Haystack's saved pipelines."""
        return default_to_dict(self, model=self.model, top_k=self.top_k, device=self.device)

    @component.output_types(documents=list[Document])
    def run(self, query: str, documents: list[Document], top_k: int | None = None) -> dict[str, list[Document]]:
        """Return `documents`, best first, with the ranker's scores; `top_k` wins over that of the component."""
        without_text = [document.id for document in documents if document.content is None]
        if without_text:
            raise InputError(f"Re-ranking reads texts, and document {without_text[0]} has none; leave it out.")
        self.warm_up()
        texts = [document.content for document in documents]
        ranked = self.ranker.rerank(query, texts, self.top_k if top_k is None else top_k)
        return {"documents": [replace(documents[place], score=score) for place, score in ranked]}
