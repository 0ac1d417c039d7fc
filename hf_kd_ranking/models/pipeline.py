"""The "text-ranking" pipeline: a query and documents in, the documents' order and scores out."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import AutoModel
from transformers.pipelines import PIPELINE_REGISTRY, Pipeline

from .errors import InputError
from .tokenization import RankingProcessor

TASK = "text-ranking"
DOCUMENTS_PER_FORWARD = 64


class TextRankingPipeline(Pipeline):
    """Ranks documents for their query, with any of the rankers.

    In:  {"query": "what is bread", "documents": ["a king", "a baked food"]}, or a list of such.
    Out: [{"index": 1, "score": 7.1, "document": "a baked food"}, {"index": 0, ...}], best first; or a list of such.

    `pipeline(..., top_k=10)` and `ranking(inputs, top_k=10)` keep the best; `truncation=False` makes texts beyond the
    checkpoint's lengths an error.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def _sanitize_parameters(self, **settings: Any) -> tuple[dict, dict, dict]:
        unknown = settings.keys() - {"top_k", "truncation"}
        if unknown:
            raise TypeError(f"{TASK} takes top_k and truncation, not {', '.join(sorted(unknown))}.")
        # Only what is given: a call keeps the other settings of the pipeline.
        postprocessing = {name: settings.pop(name) for name in ("top_k",) if name in settings}
        return settings, {}, postprocessing

    def preprocess(self, inputs: Mapping[str, Any], truncation: bool = True) -> dict[str, Any]:
        """Tokenise; documents of similar length share a batch."""
        if not isinstance(inputs, Mapping) or not isinstance(inputs.get("query"), str) or "documents" not in inputs:
            raise InputError(
                f'{TASK} takes {{"query": "...", "documents": ["..."]}} or a list of such, got {str(inputs)[:80]!r}.'
            )
        query, documents = inputs["query"], inputs["documents"]
        if isinstance(documents, str | Mapping) or not isinstance(documents, Iterable):
            raise InputError(f"{TASK} takes a list of documents, got {str(documents)[:80]!r}.")
        documents = list(documents)
        if not documents or not all(isinstance(document, str) for document in documents):
            raise InputError(f"{TASK} takes one or more documents, each a string, got {str(documents)[:80]}.")
        processor = RankingProcessor.from_config(self.tokenizer, self.model.config, truncation)
        order = sorted(range(len(documents)), key=lambda i: len(documents[i]))
        batches = []
        for start in range(0, len(order), DOCUMENTS_PER_FORWARD):
            texts = [documents[i] for i in order[start : start + DOCUMENTS_PER_FORWARD]]
            batches.append(processor([query], texts))
        return {"batches": batches, "order": order, "documents": documents}

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        scores = [self.model(**batch).scores[0] for batch in model_inputs.pop("batches")]
        return {"scores": torch.cat(scores), **model_inputs}

    def postprocess(self, model_outputs: dict[str, Any], top_k: int | None = None) -> list[dict[str, Any]]:
        """Sort by score; ties keep the order given."""
        documents, scores = model_outputs["documents"], model_outputs["scores"].tolist()
        ranking = []
        for index, score in zip(model_outputs["order"], scores, strict=True):
            ranking.append({"index": index, "score": score, "document": documents[index]})
        ranking.sort(key=lambda item: (-item["score"], item["index"]))
        return ranking[:top_k]


def register_pipeline() -> None:
    """Register `pipeline("text-ranking", model=...)` with transformers, unless the task is taken."""
    if TASK not in PIPELINE_REGISTRY.supported_tasks:
        PIPELINE_REGISTRY.register_pipeline(TASK, TextRankingPipeline, pt_model=(AutoModel,), type="text")
