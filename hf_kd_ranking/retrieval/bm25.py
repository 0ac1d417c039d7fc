"""BM25 by bm25s: the first stage whose candidates everything else re-ranks."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import bm25s
import numpy as np
import Stemmer

from ..artifacts import building, existing_file
from ..data.runs import Run
from ..data.texts import TextStore

TOKENIZATIONS = ("plain", "english")


class BM25Index:
    """A BM25 index over a collection: build, save, open, search.

    Settings are those of the field for MS MARCO passages, k1 0.9 and b 0.4; words are lower-cased runs of letters and
    digits of any length. "plain" keeps them as they are, "english" drops stop words and takes stems (Snowball).
    """

    def __init__(self, retriever: bm25s.BM25, doc_ids: list[str], tokenization: str = "plain") -> None:
        self._retriever = retriever
        self._doc_ids = doc_ids
        self._tokenization = tokenization

    @classmethod
    def build(cls, documents: TextStore, k1: float = 0.9, b: float = 0.4, tokenization: str = "plain") -> "BM25Index":
        """Index all texts of a store.

        Raises:
            ValueError: if the tokenization is neither "plain" nor "english".
        """
        if tokenization not in TOKENIZATIONS:
            raise ValueError(f"tokenization is one of {', '.join(TOKENIZATIONS)}, got {tokenization!r}.")
        doc_ids, texts = zip(*documents.items(), strict=True)
        retriever = bm25s.BM25(k1=k1, b=b)
        retriever.index(_tokenize(texts, tokenization), show_progress=len(texts) > 100_000)
        return cls(retriever, list(doc_ids), tokenization)

    def save(self, folder: str | os.PathLike, overwrite: bool = False) -> None:
        """Write the index; the folder appears, or is replaced, when it is complete.

        Raises:
            FileExistsError: if the folder is there and is not to be replaced, or is no BM25 index.
        """
        folder = Path(folder)
        if folder.exists() and not (overwrite and (folder / "tokenization.json").is_file()):
            raise FileExistsError(f"{folder} exists; give a new folder, or overwrite=True to replace a BM25 index.")
        with building(folder) as temporary:
            self._retriever.save(str(temporary))
            (temporary / "doc_ids.json").write_text(json.dumps(self._doc_ids), encoding="utf-8")
            (temporary / "tokenization.json").write_text(json.dumps(self._tokenization), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)  # readers of the old files keep them

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "BM25Index":
        """Open a saved index, memory-mapped.

        Raises:
            FileNotFoundError: if there is none.
        """
        doc_ids = existing_file(Path(folder) / "doc_ids.json", "BM25 index's ids")
        tokenization = existing_file(Path(folder) / "tokenization.json", "BM25 index's tokenization")
        return cls(
            bm25s.BM25.load(str(folder), mmap=True),
            json.loads(doc_ids.read_text(encoding="utf-8")),
            json.loads(tokenization.read_text(encoding="utf-8")),
        )

    def search(self, queries: Mapping[str, str], k: int = 100) -> Run:
        """The best k documents of every query; documents without a common word are left out.

        Args:
            queries: query_id -> text.

        Returns:
            A run; ties in the order of the collection, but which documents tied at rank k are in is up to bm25s.
        """
        k = min(k, len(self._doc_ids))
        tokens = _tokenize(list(queries.values()), self._tokenization)
        places, scores = self._retriever.retrieve(tokens, k=k, show_progress=len(queries) > 10_000)
        run = Run()
        for query_id, row, row_scores in zip(queries, places, scores, strict=True):
            order = np.lexsort((row, -row_scores))
            run[str(query_id)] = [(self._doc_ids[row[i]], float(row_scores[i])) for i in order if row_scores[i] > 0]
        return run


def _tokenize(texts: Sequence[str], tokenization: str) -> bm25s.tokenization.Tokenized:
    is_english = tokenization == "english"
    return bm25s.tokenize(
        texts,
        stopwords="en" if is_english else None,
        stemmer=Stemmer.Stemmer("english") if is_english else None,
        token_pattern=r"(?u)\w+",
        show_progress=len(texts) > 100_000,
    )
