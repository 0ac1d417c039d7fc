"""Convert FlagEmbedding's training files, which hold texts, into teacher rows of ids and the texts of the ids.

    python examples/convert_flag_embedding.py train.jsonl converted/

The folder gets `scores.tsv`, `queries.tsv` and `collection.tsv`, for `hf-kd-ranking train --scores --queries
--collection`. Each line of the input has `query`, `pos`, `neg`, `pos_scores` and `neg_scores`.
"""

import argparse
import math
import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple, TextIO

from hf_kd_ranking.artifacts import building, existing_file, refuse_existing
from hf_kd_ranking.data.tables import read_jsonl

FIELDS = ("query", "pos", "neg", "pos_scores", "neg_scores")


class Converted(NamedTuple):
    """The three files that the package reads."""

    scores: Path
    queries: Path
    collection: Path


def main() -> None:
    """Convert a file from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="JSON lines of FlagEmbedding")
    parser.add_argument("folder", type=Path, help="new folder for the three files")
    args = parser.parse_args()
    print(*convert_flag_embedding(args.file, args.folder), sep="\n")


def convert_flag_embedding(path: str | os.PathLike, folder: str | os.PathLike) -> Converted:
    """Convert JSON lines of `query, pos, neg, pos_scores, neg_scores` into TSV files of rows, queries and documents.

    Every positive is paired with every negative of its line. Equal texts get one id, numbered in the order of the
    file; tabs and line breaks in texts become blanks.

    Args:
        path: the JSONL file.
        folder: a new folder, which appears when its files are complete.

    Raises:
        FileExistsError: if the folder exists.
        ValueError: with file and line, for a missing field, or another number of scores than of texts.
    """
    path, folder = existing_file(path, "FlagEmbedding"), Path(folder)
    refuse_existing(folder, overwrite=False)
    with building(folder) as temporary:
        files = _files(temporary)
        with (
            files.scores.open("w", encoding="utf-8") as rows,
            files.queries.open("w", encoding="utf-8") as queries,
            files.collection.open("w", encoding="utf-8") as collection,
        ):
            query_ids, doc_ids = _Ids(queries), _Ids(collection)
            for query, (positive, pos_score), (negative, neg_score) in _read(path):
                ids = f"{query_ids.number(query)}\t{doc_ids.number(positive)}\t{doc_ids.number(negative)}"
                rows.write(f"{pos_score!r}\t{neg_score!r}\t{ids}\n")
    return _files(folder)


def _files(folder: Path) -> Converted:
    return Converted(folder / "scores.tsv", folder / "queries.tsv", folder / "collection.tsv")


class _Ids:
    """Number texts as they come, and write each new one."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._ids: dict[int, int] = {}  # hashes: the texts of a large file would not fit

    def number(self, text: str) -> int:
        """Return the number of a text."""
        text = " ".join(text.splitlines()).replace("\t", " ")
        known = len(self._ids)
        number = self._ids.setdefault(hash(text), known)
        if number == known:
            self._file.write(f"{number}\t{text}\n")
        return number


def _read(path: Path) -> Iterator[tuple[str, tuple[str, float], tuple[str, float]]]:
    """Yield queries, each with a positive and a negative and their scores."""
    for line, row in read_jsonl(path):
        missing = [name for name in FIELDS if name not in row]
        if missing:
            raise ValueError(f"{path} line {line}: needed {', '.join(FIELDS)}, missing {', '.join(missing)}.")
        if not isinstance(row["query"], str):
            raise ValueError(f"{path} line {line}: query must be a string, got {row['query']!r}.")
        positives, negatives = _scored(path, line, row, "pos"), _scored(path, line, row, "neg")
        for positive, negative in product(positives, negatives):
            yield row["query"], positive, negative


def _scored(path: Path, line: int, row: dict, side: str) -> list[tuple[str, float]]:
    texts, scores = row[side], row[f"{side}_scores"]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{path} line {line}: {side} must be a list of one or more strings, got {texts!r}.")
    is_list = isinstance(scores, list) and len(scores) == len(texts)
    if not is_list or not all(isinstance(score, int | float) and math.isfinite(score) for score in scores):
        raise ValueError(f"{path} line {line}: {side}_scores must be {len(texts)} numbers, got {scores}.")
    return [(text, float(score)) for text, score in zip(texts, scores, strict=True)]


if __name__ == "__main__":
    main()
