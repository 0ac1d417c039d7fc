"""MTEB 2: a ranker as a cross-encoder, and as an encoder that also searches collections."""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
from mteb.models import ModelMeta
from mteb.types import PromptType

from ..data.texts import TextStore
from ..errors import InputError
from ..inference import fingerprint
from ..ranker import Ranker
from ..retrieval.base import open_index
from ..retrieval.vector_store import VectorStore


class _MtebModel:
    """A ranker with its name, owner/name, in MTEB's results.

    Their revision is the digest of weights and config, so that MTEB's cache has no results of another model.
    """

    model_type: str

    def __init__(self, ranker: Ranker, name: str = "hf_kd_ranking/ranker") -> None:
        self.ranker = ranker
        revision = fingerprint(ranker.model, ranker.model.config.to_dict())
        fields = {"name": name, "revision": revision, "model_type": [self.model_type], "framework": ["PyTorch"]}
        self.mteb_model_meta = ModelMeta.create_empty(fields)


class MtebRanker(_MtebModel):
    """A ranker of any architecture with MTEB's `CrossEncoderProtocol`: MTEB re-ranks what is `top_ranked` with it.

    Example:
        >>> ranker = kd.MtebRanker(kd.Ranker.from_pretrained("bert_cat"), name="me/bert_cat")
        >>> ranker.mteb_model_meta.name
        'me/bert_cat'
    """

    model_type = "cross-encoder"

    def predict(self, inputs1: Iterable[dict], inputs2: Iterable[dict], **options: Any) -> np.ndarray:
        """Score pairs of a query (`inputs1`) and a document (`inputs2`), (N,) float32."""
        return self.ranker.score(_texts(inputs1), _texts(inputs2))


class MtebEncoder(_MtebModel):
    """A ranker with MTEB's `EncoderProtocol` and `SearchProtocol`.

    Any architecture that can search, with exact search, runs MTEB's retrieval; BERT_DOT runs its other tasks as well.
    The vectors of a collection lie in a temporary folder on disk while it is searched.

    Example:
        >>> encoder = kd.MtebEncoder(kd.Ranker.from_pretrained("bert_dot"), name="me/bert_dot")
        >>> encoder.mteb_model_meta.name
        'me/bert_dot'
    """

    model_type = "dense"

    def encode(self, inputs: Iterable[dict], *, prompt_type: PromptType | None = None, **options: Any) -> np.ndarray:
        """Encode texts as documents if `prompt_type` says so, else as queries, (N, H)."""
        config = self.ranker.model.config
        if config.vectors_per_text != "one":
            raise InputError(f"MTEB's encoders have one vector per text, and a {config.model_type} has other ones.")
        if prompt_type == PromptType.document:
            return self.ranker.encode_documents(_texts(inputs))
        return self.ranker.encode_queries(_texts(inputs))

    def similarity(self, embeddings1: np.ndarray, embeddings2: np.ndarray) -> np.ndarray:
        """Return the dot products of all pairs, (N, M)."""
        return np.asarray(embeddings1) @ np.asarray(embeddings2).T

    def similarity_pairwise(self, embeddings1: np.ndarray, embeddings2: np.ndarray) -> np.ndarray:
        """Return the dot products of the pairs, (N,)."""
        return (np.asarray(embeddings1) * np.asarray(embeddings2)).sum(axis=-1)

    def index(self, corpus: datasets.Dataset, **options: Any) -> None:
        """Keep the collection; its vectors are made if it is searched."""
        self._folder = TemporaryDirectory(prefix="hf_kd_ranking")
        self._documents = TextStore.from_dataset(corpus, Path(self._folder.name, "texts"))

    def search(
        self, queries: datasets.Dataset, *, top_k: int, top_ranked: dict[str, list[str]] | None = None, **options: Any
    ) -> dict[str, dict[str, float]]:
        """Return query_id -> doc_id -> score of the best documents, or of those in `top_ranked`."""
        texts = dict(zip(queries["id"], queries["text"], strict=True))
        found = {}
        if top_ranked is None:
            folder = Path(self._folder.name, "vectors")
            VectorStore.build(self.ranker, self._documents, folder)
            for query_id, ranking in open_index(folder, self.ranker).rankings(texts, top_k):
                found[query_id] = dict(ranking)
            return found
        for query_id, doc_ids in top_ranked.items():
            if query_id not in texts:
                continue
            found[query_id] = {}  # of a query without candidates as well: MTEB's means are over the queries found
            if doc_ids:
                scores = self.ranker.score(texts[query_id], self._documents[doc_ids])
                found[query_id] = dict(zip(doc_ids, scores.tolist(), strict=True))
        return found


def _texts(batches: Iterable[dict]) -> list[str]:
    """Return the texts of MTEB's batches."""
    return list(chain.from_iterable(batch["text"] for batch in batches))
