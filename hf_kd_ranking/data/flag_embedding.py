"""FlagEmbedding's training files, which hold texts, to teacher rows of ids and their texts."""

import math
import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple, TextIO

from ..artifacts import building, existing_file
from .tables import read_jsonl


class Converted(NamedTuple):
    """The three files that the rest of the package reads."""

    scores: Path
    queries: Path
    collection: Path


def convert_flag_embedding(path: str | os.PathLike, folder: str | os.PathLike) -> Converted:
    """Convert JSON lines of `query, pos, neg, pos_scores, neg_scores` into TSV files of rows, queries and documents.

    Every positive is paired with every negative of its line. Equal texts get one id, numbered in the order of the
    file; tabs and line breaks in texts become blanks.

    Args:
        path: the JSONL file.
        folder: new, for `scores.tsv`, `queries.tsv` and `collection.tsv`; appears when all are complete.

    Raises:
        FileExistsError: if the folder is there.
        ValueError: with file and line, for a missing field, or scores that are as many numbers as there are texts.
    """
    path, folder = existing_file(path, "FlagEmbedding"), Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; give a new folder.")
    with building(folder) as temporary:
        files = Converted(*(temporary / f"{name}.tsv" for name in Converted._fields))
        with (
            files.scores.open("w", encoding="utf-8") as rows,
            files.queries.open("w", encoding="utf-8") as queries,
            files.collection.open("w", encoding="utf-8") as collection,
        ):
            query_ids, doc_ids = _Ids(queries), _Ids(collection)
            for query, (positive, pos_score), (negative, neg_score) in _read(path):
                ids = f"{query_ids.of(query)}\t{doc_ids.of(positive)}\t{doc_ids.of(negative)}"
                rows.write(f"{pos_score!r}\t{neg_score!r}\t{ids}\n")
    return Converted(*(folder / f"{name}.tsv" for name in Converted._fields))


class _Ids:
    """Numbers texts as they come, and writes each new one."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._ids: dict[int, int] = {}  # hashes: the texts of a large file would not fit

    def of(self, text: str) -> int:
        """The number of a text."""
        text = " ".join(text.splitlines()).replace("\t", " ")
        known = len(self._ids)
        number = self._ids.setdefault(hash(text), known)
        if number == known:
            self._file.write(f"{number}\t{text}\n")
        return number


def _read(path: Path) -> Iterator[tuple[str, tuple[str, float], tuple[str, float]]]:
    """Queries, each with a positive and a negative and their scores."""
    for line, row in read_jsonl(path):
        needed = ("query", "pos", "neg", "pos_scores", "neg_scores")
        if missing := [name for name in needed if name not in row]:
            raise ValueError(f"{path} line {line}: needed {', '.join(needed)}, missing {', '.join(missing)}.")
        if not isinstance(row["query"], str):
            raise ValueError(f"{path} line {line}: query must be a string, got {row['query']!r}.")
        sides = []
        for side in ("pos", "neg"):
            texts, scores = row[side], row[f"{side}_scores"]
            if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{path} line {line}: {side} must be a list of one or more strings, got {texts!r}.")
            is_list = isinstance(scores, list) and len(scores) == len(texts)
            if not is_list or not all(isinstance(score, int | float) and math.isfinite(score) for score in scores):
                raise ValueError(f"{path} line {line}: {side}_scores must be {len(texts)} numbers, got {scores}.")
            sides.append(list(zip(texts, map(float, scores), strict=True)))
        yield from ((row["query"], positive, negative) for positive, negative in product(*sides))
