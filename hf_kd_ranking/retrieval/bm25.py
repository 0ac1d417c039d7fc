"""BM25 by bm25s: the first stage whose candidates the rankers re-rank."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bm25s
import Stemmer

from ..artifacts import has_description, open_version
from ..data.ids import IdIndex, open_ids
from ..data.texts import TextStore
from ..errors import InputError
from .base import Index, Ranking, best_of

TOKENIZATIONS = ("plain", "english")


class BM25Index(Index):
    """An index of the words of a collection; make one with `build` or `open`.

    Documents without a word of the query are not part of a ranking. Which of the documents tied at rank k are returned
    is up to bm25s.
    """

    def __init__(self, retriever: bm25s.BM25, ids: IdIndex, description: dict[str, Any]) -> None:
        self._retriever = retriever
        self.ids = ids
        self.description = description

    @classmethod
    def build(
        cls,
        documents: TextStore,
        folder: str | Path | None = None,
        *,
        k1: float = 0.9,
        b: float = 0.4,
        tokenization: str = "plain",
    ) -> "BM25Index":
        """Index the texts of a store, see `Index`.

        Args:
            k1: saturation of term frequencies; the default is common for the passages of MS MARCO, as is that of `b`.
            b: normalisation by document length, 0 to 1.
            tokenization: "plain" keeps words (runs of letters and digits) in lower case; "english" also drops stop
                words and stems the others (Snowball).

        Raises:
            FileExistsError: if the folder contains something.
            InputError: if the tokenization is another one.
        """
        if tokenization not in TOKENIZATIONS:
            raise InputError(f"tokenization is one of {', '.join(TOKENIZATIONS)}, got {tokenization!r}.")
        rows = documents.distinct_rows()
        tokens = _tokenize(documents.take(rows), tokenization)
        retriever = bm25s.BM25(k1=k1, b=b)
        retriever.index(tokens, show_progress=len(rows) > 100_000)
        description = {"kind": "bm25", "collection": documents.fingerprint(), "documents": len(rows)}
        description |= {"k1": k1, "b": b, "tokenization": tokenization}
        index = cls(retriever, IdIndex.build(documents.columns(rows)), description)
        if folder is not None:
            index.save(folder)
        return index

    def _write(self, data: Path) -> None:
        self._retriever.save(str(data), show_progress=False)
        self.ids.save_ids(data)

    @classmethod
    def open(cls, folder: str | Path, ranker: None = None, is_verified: bool = True) -> "BM25Index":
        """Open a saved index, see `Index`; those of earlier releases are refused by an InputError."""
        folder = Path(folder)
        if ranker is not None:
            raise InputError("BM25 searches without a ranker; open it with the folder only.")
        if (folder / "tokenization.json").is_file() and not has_description(folder):
            raise InputError(f"{folder} is a BM25 index of an earlier release; remove it and build it again.")
        description, data = open_version(folder, "bm25", is_verified)
        retriever = bm25s.BM25.load(str(data), mmap=True, show_progress=False)
        return cls(retriever, IdIndex(description["documents"], *open_ids(data)), description)

    def __len__(self) -> int:
        return len(self.ids)

    def _rank(self, texts: Sequence[str], k: int) -> list[Ranking]:
        tokens = _tokenize(texts, self.description["tokenization"])
        rows_and_scores = self._retriever.retrieve(tokens, k=min(k, len(self)), show_progress=False)
        results = []
        for rows, scores in zip(*rows_and_scores, strict=True):
            has_match = scores > 0
            results.append(best_of(scores[has_match], rows[has_match], k))
        return self._with_ids(results)


def _tokenize(texts: Sequence[str], tokenization: str) -> bm25s.tokenization.Tokenized:
    options = {"token_pattern": r"(?u)\w+", "show_progress": len(texts) > 100_000, "stopwords": None}
    if tokenization == "english":
        options |= {"stopwords": "en", "stemmer": Stemmer.Stemmer("english")}
    return bm25s.tokenize(texts, **options)
