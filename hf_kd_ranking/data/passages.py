"""Passages: a collection whose long documents are split once, and the way from passages back to documents.

A document that fits into one passage keeps its id and its text; the passages of a longer one are `ID#0`, `ID#1`, ...
Passages are what is indexed, encoded and scored. Judgments, candidates and the runs of rankers are of documents.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from .ids import ROWS_AT_ONCE, Id, IdIndex
from .rankings import Pairs, Run
from .texts import AGGREGATIONS, PASSAGE_SETTINGS, TextStore, text_batch
from .tokens import without_limits

PASSAGE_ID = re.compile(r"(.+)#(\d+)", re.DOTALL)
# The end of a sentence: its last mark and what closes after it, or the end of a line.
SENTENCE_END = re.compile(r"[.!?…؟।॥۔]+[\"'”’)\]]*(?=\s+[^a-z\s])|[。！？]+[」』”’]*|\S(?=\s*\n)")
LAST_PART = 4  # a passage ends, or begins, at a border within the last quarter of its window, if there is one


def read_settings(passages: str) -> tuple[int, int]:
    """Read "LENGTH/STRIDE", or raise an InputError: tokens of a passage, and from one beginning to the next."""
    match = re.fullmatch(r"(\d+)/(\d+)", passages)
    if match is None:
        raise InputError(f"--passages are LENGTH/STRIDE in tokens, such as 180/120, got {passages!r}.")
    length, stride = int(match[1]), int(match[2])
    if not 1 <= stride <= length:
        raise InputError(
            f"--passages {passages}: the stride is the distance between the beginnings of two passages, from 1 to "
            f"the length; with a stride of {stride} after {length} tokens, texts would be left out."
        )
    return length, stride


def split_documents(
    documents: TextStore,
    tokenizer: PreTrainedTokenizerBase,
    passages: str,
    folder: str | Path,
    aggregation: str = "max",
) -> TextStore:
    """Write the store of the passages of a collection, or open it if the folder has it.

    Args:
        documents: the collection.
        tokenizer: the fast tokenizer of the ranker; special tokens and prefixes do not count.
        passages: "LENGTH/STRIDE" in tokens. Within the last quarter of a window, a passage ends at the last end of a
            sentence, else at the last end of a word; so does what is skipped before the next passage begins.
        folder: the folder of the store.
        aggregation: how the scores of its passages make that of a document: the largest ("max"), that of the first
            passage ("first"), or the mean of the three largest ("mean_top3").

    Raises:
        FileExistsError: if the folder contains other texts, or something else.
        InputError: if a setting is invalid, the tokenizer is not a fast one, the collection consists of passages
            already, or the id of a document looks like that of a passage.
    """
    length, stride = read_settings(passages)
    check_aggregation(aggregation)
    if documents.aggregation is not None:
        raise InputError(f"{documents.source} are passages already; give the collection that they were made from.")
    if not tokenizer.is_fast:
        raise InputError(f"Passages are made by fast tokenizers, got {type(tokenizer).__name__}.")
    backend = without_limits(tokenizer)

    def batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, len(documents), ROWS_AT_ONCE // 10):
            rows = np.arange(start, min(start + ROWS_AT_ONCE // 10, len(documents)))
            texts, ids, parts = documents.take(rows), [], []
            encodings = backend.encode_batch(texts, add_special_tokens=False)
            for doc_id, text, encoding in zip(documents.ids_of(rows), texts, encodings, strict=True):
                if PASSAGE_ID.fullmatch(doc_id):
                    raise InputError(f"The id {doc_id!r} of a document ends as that of a passage does; rename it.")
                spans = _spans(text, encoding.offsets, encoding.word_ids, length, stride)
                for number, (first, last) in enumerate(spans):
                    ids.append(doc_id if len(spans) == 1 else f"{doc_id}#{number}")
                    parts.append(text[first:last])
            yield text_batch(ids, parts)

    source = f"{Path(documents.source).name} in passages of {length} by {stride} tokens ({aggregation})"
    inputs = [documents.fingerprint(), passages, aggregation, backend.to_str()]
    made_from = xxhash.xxh3_128_hexdigest(" ".join(inputs).encode())
    settings = dict(zip(PASSAGE_SETTINGS, (passages, aggregation), strict=True))
    return TextStore.build(Path(folder), batches(), source, made_from, settings)


def check_aggregation(aggregation: str) -> None:
    """Refuse, by an InputError, an unknown way from the scores of passages to that of their document."""
    if aggregation not in AGGREGATIONS:
        raise InputError(f"The aggregation of passages is one of {', '.join(AGGREGATIONS)}, got {aggregation!r}.")


def _spans(
    text: str, offsets: Sequence[tuple[int, int]], words: Sequence[int | None], length: int, stride: int
) -> list[tuple[int, int]]:
    """Return first and last character of each passage of a text, given the characters and the word of each token."""
    count = len(offsets)
    if count <= length:
        return [(0, len(text))]
    borders = np.zeros(count, dtype=np.int8)  # before each token: 2 a sentence, 1 a word, 0 a part of a word
    for token in range(1, count):
        borders[token] = words[token] != words[token - 1]
    last_characters = np.array([last for _, last in offsets])
    for match in SENTENCE_END.finditer(text):
        token = int(np.searchsorted(last_characters, match.end(), side="right"))
        if token < count:
            borders[token] = 2
    spans, first = [], 0
    while True:
        last = first + length
        if last >= count:
            spans.append((offsets[first][0], len(text)))
            return spans
        last = _border(borders, last, length)
        spans.append((offsets[first][0], offsets[last - 1][1]))
        first = min(last, _border(borders, first + stride, stride))


def _border(borders: np.ndarray, token: int, size: int) -> int:
    """Return the last of the best borders in the last part of the `size` tokens before a token, or the token."""
    earliest = token - (size - 1) // LAST_PART
    candidates = borders[earliest : token + 1][::-1]
    return token - int(candidates.argmax())


# ---- From passages to documents, and back ---------------------------------------------------------------------------


def split_id(passage_id: str) -> tuple[str, int]:
    """Return the id of a passage's document, and the number of the passage in it."""
    match = PASSAGE_ID.fullmatch(passage_id)
    if match is None:
        return passage_id, 0
    return match[1], int(match[2])


def passages_of(ids: IdIndex, doc_ids: Sequence[Id], what: str) -> dict[str, list[str]]:
    """Return the passages of each document, or passage, among the ids of a collection of passages, which is `what`.

    Raises:
        UnknownIdError: naming the first documents that have no passage.
    """
    found: dict[str, list[str]] = {str(doc_id): [] for doc_id in doc_ids}
    distinct = list(found)
    split = []
    for doc_id, row in zip(distinct, ids.rows_of(distinct), strict=True):
        if row >= 0:
            found[doc_id].append(doc_id)
        else:
            split.append(doc_id)
    number = 0
    while split:
        names = [f"{doc_id}#{number}" for doc_id in split]
        rows = ids.rows_of(names)
        if number == 0 and (rows < 0).any():
            missing = [doc_id for doc_id, row in zip(split, rows, strict=True) if row < 0]
            ids.rows_of_known(missing, what)  # raises
        left = []
        for doc_id, name, row in zip(split, names, rows, strict=True):
            if row >= 0:
                found[doc_id].append(name)
                left.append(doc_id)
        split, number = left, number + 1
    return found


def rows_of_passages(ids: IdIndex, aggregation: str | None, doc_ids: Sequence[Id], what: str) -> np.ndarray:
    """Return the rows of documents in `what`: of all passages of each, where an aggregation says that they are split.

    Unknown documents are an UnknownIdError.
    """
    if aggregation is not None:
        doc_ids = list(chain.from_iterable(passages_of(ids, doc_ids, what).values()))
    return ids.rows_of_known(doc_ids, what)


def to_passages(run: Run, ids: IdIndex, what: str) -> Run:
    """Return a run with all passages of each document in its place, in their order, with the document's score."""
    doc_ids: dict[str, None] = {}
    for ranking in run.values():
        doc_ids.update(dict.fromkeys(doc_id for doc_id, _ in ranking))
    passages = passages_of(ids, list(doc_ids), what)
    result = Run()
    for query_id, ranking in run.items():
        result[query_id] = []
        for doc_id, score in ranking:
            result[query_id] += [(passage_id, score) for passage_id in passages[doc_id]]
    return result


def to_documents(passages: Pairs, aggregation: str = "max") -> list[tuple[str, float]]:
    """Return the ranking of documents from one of passages, best first; ties keep the order of the best passages."""
    scores: dict[str, list[float]] = {}
    for passage_id, score in passages:
        doc_id, number = split_id(passage_id)
        if aggregation != "first" or number == 0:
            scores.setdefault(doc_id, []).append(score)
    counted = 1
    if aggregation == "mean_top3":
        counted = 3
    ranking = []
    for doc_id, values in scores.items():
        best = values[:counted]
        ranking.append((doc_id, sum(best) / len(best)))
    ranking.sort(key=lambda scored: -scored[1])
    return ranking


def run_of_documents(run: Run, aggregation: str | None) -> Run:
    """Return the run of documents from one of passages; None returns the run as it is."""
    if aggregation is None:
        return run
    return Run((query_id, to_documents(ranking, aggregation)) for query_id, ranking in run.items())


def best_passages(ranking: Pairs) -> dict[str, tuple[str, float]]:
    """Return the best passage of each document in a ranking of passages, and its score."""
    best: dict[str, tuple[str, float]] = {}
    for passage_id, score in ranking:
        best.setdefault(split_id(passage_id)[0], (passage_id, score))
    return best


def without_document(ranking: Pairs, doc_id: str) -> Pairs:
    """Return a ranking of passages without those of a document."""
    return [(passage_id, score) for passage_id, score in ranking if split_id(passage_id)[0] != doc_id]


def choose_passages(
    run: Run, passages: Run, qrels: Mapping[str, Mapping[str, int]], documents: TextStore
) -> tuple[Run, dict[str, dict[str, int]]]:
    """Return a run and its judgments with the best passage of each document in its place.

    Args:
        run: of documents.
        passages: a run of passages, whose scores say which is best; of a document that it lacks, the first one is.
        qrels: judgments of documents.
        documents: the store of the passages, which has all documents.

    Raises:
        UnknownIdError: naming documents of the run or the judgments that the store lacks.
    """
    chosen, judged = Run(), {}
    for query_id, ranking in run.items():
        best, grades = best_passages(passages.get(query_id, ())), qrels.get(query_id, {})
        names = [doc_id for doc_id, _ in ranking] + list(grades)
        rows = documents.rows_of_documents(names)
        documents.rows_of_texts([names[place] for place in np.flatnonzero(rows < 0)])  # raises if there are any
        firsts = dict(zip(names, documents.ids_of(rows), strict=True))
        chosen[query_id] = []
        for doc_id, score in ranking:
            chosen[query_id].append(best.get(doc_id, (firsts[doc_id], score)))
        judged[query_id] = {}
        for doc_id, grade in grades.items():
            judged[query_id][best.get(doc_id, (firsts[doc_id], 0.0))[0]] = grade
    return chosen, judged


def texts_of(documents: TextStore, doc_ids: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return the texts of documents, of a collection of passages all of theirs, and how many each document has."""
    if documents.aggregation is None:
        return documents[doc_ids], [1] * len(doc_ids)
    found = passages_of(documents, doc_ids, f"texts of {documents.source}")
    names, counts = [], []
    for doc_id in doc_ids:
        names += found[doc_id]
        counts.append(len(found[doc_id]))
    return documents[names], counts
