"""Queries for documents that have none: generated, checked, and written with their judgments.

A generated query is kept only if its document is found by it (round trip, https://arxiv.org/abs/2209.11755). What a
student learns from such queries is described in https://arxiv.org/abs/2112.07577 (GPL).
"""

import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..artifacts import compute_blocks, refuse_existing, work_folder, write_json, writing
from ..data.passages import split_id
from ..data.rankings import Run
from ..data.runs import check_run_ids, write_qrels
from ..data.texts import TextStore, normalized, scripts
from ..errors import InputError
from ..processes import processes
from .generators import FIRST_SENTENCE, TITLE, QueryGenerator

DOCUMENTS_PER_BLOCK = 64  # between two saves, which is the most that an interruption loses
NEAR = 0.8  # Jaccard similarity of the words of two queries from which they are near-duplicates
LEAST_SHARE = 0.1  # of a document's letters, for its queries to be in their script
LEFT_OUT = ("empty", "equal_to_document", "other_script", "near_duplicates", "not_found")
ROUND_TRIPS_AT_ONCE = 10_000


def generate_queries(
    generator: QueryGenerator,
    documents: TextStore,
    output: str | os.PathLike,
    titles: Mapping[str, str] | None = None,
    most_documents: int | None = None,
    search: Callable[[Mapping[str, str], int], Run] | None = None,
    round_trip: int = 20,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Generate queries for documents, and write the good ones with their judgments.

    A query is left out, and counted, if it has no word, is its document, is mostly in a script that its document
    hardly has, has nearly the words of an earlier one, or if its document is not among the first `round_trip` results
    of `search`. The same call after an interruption resumes; under `accelerate launch` the processes share the work.

    Args:
        generator: see `load_generator`.
        documents: doc_id -> text. Of a split document each passage is one text; the judgments name the document.
        output: TSV file of query_id and text, a query_id being `DOC_ID-qN`. Beside it are `STEM.qrels.txt`, which
            judges each query's document as relevant, and `STEM.json`: generator, whether it is weak, and counts.
        titles: doc_id -> title, with which a text begins; the fallback "title" needs them.
        most_documents: documents, or passages, that queries are generated for, evenly spread; None takes all.
        search: function of query_id -> text and k that returns a run, such as that of a `BM25Index`; None keeps
            queries without a round trip.
        round_trip: rank within which the document must be found.
        overwrite: True replaces existing files.

    Returns:
        The counts: `documents`, `generated` queries, those that are left out, named as in `LEFT_OUT`, `queries` that
        are kept, and `documents_without_query`; with the `usage` of an endpoint.

    Raises:
        FileExistsError: if a file exists and `overwrite` is False.
        InputError: if no query is left, or there is the unfinished work of other inputs.
    """
    output = Path(output)
    # A call that ended while it wrote left the files beside the queries, and the folder of `work_folder`.
    is_begun = output.with_name(f"{output.name}.parts").is_dir()
    for path in (output, *files_beside(output)):
        refuse_existing(path, overwrite or (is_begun and path != output))
    titles = titles or {}
    if generator.name == TITLE and not titles:
        raise InputError(f"{documents.source} has no titles; JSON lines have, or take the fallback {FIRST_SENTENCE}.")
    check_run_ids(documents, "documents")
    rows = choose_rows(documents, most_documents)
    made_from = {"generator": generator.fingerprint, "documents": documents.fingerprint(), "count": len(rows)}

    def generate_block(block: slice) -> dict[str, np.ndarray]:
        texts, doc_ids = documents.take(rows[block]), _document_ids(documents, rows[block])
        made = generator.generate(texts, [titles.get(doc_id, "") for doc_id in doc_ids], block.start)
        return {"queries": np.frombuffer(json.dumps(made).encode(), np.uint8)}

    counts: dict[str, Any] = {}
    with work_folder(output, lambda _: made_from) as folder:
        description = f"Generating with {generator.name}"
        parts, _ = compute_blocks(folder, len(rows), DOCUMENTS_PER_BLOCK, generate_block, description, "document")
        if processes().is_main_process:
            count = len(set(_document_ids(documents, rows)))
            counts = {"documents": count, "generated": 0, **dict.fromkeys(LEFT_OUT, 0)}
            kept = _distinct(_good(_read_parts(parts), documents, rows, counts), counts)
            if search is not None:
                kept = _found_again(kept, search, round_trip, counts)
            counts |= {"queries": len(kept), "documents_without_query": count - len({doc for doc, _ in kept})}
            if not kept:
                raise InputError(f"No query is left of {generator.name}'s: {_counts_text(counts)}.")
            origin = {"generator": generator.name, "is_weak": generator.is_weak, "made_from": made_from}
            _write(kept, output, origin | {"round_trip": round_trip if search is not None else None, **counts})
    return {**counts, **generator.usage}


def choose_rows(documents: TextStore, most: int | None) -> np.ndarray:
    """Return the rows of the texts that queries are generated for: all, or `most`, evenly spread."""
    count = len(documents)
    if most is not None:
        count = min(most, count)
    return np.linspace(0, len(documents) - 1, count).astype(np.int64)


def _document_ids(documents: TextStore, rows: np.ndarray) -> list[str]:
    """Return the ids of the documents in some rows; those of the whole documents if the rows are passages."""
    ids = documents.ids_of(rows)
    if documents.aggregation is None:
        return ids
    return [split_id(passage_id)[0] for passage_id in ids]


def plan_queries(generator: QueryGenerator, documents: TextStore, most_documents: int | None) -> dict[str, int]:
    """Estimate what an endpoint would be asked, without asking: `documents`, `requests`, and at most so many `tokens`.

    Raises:
        InputError: if the generator is not an endpoint.
    """
    if generator.plan is None:
        raise InputError(f"A plan is for an endpoint; {generator.name} is not one.")
    rows, tokens = choose_rows(documents, most_documents), 0
    for start in range(0, len(rows), DOCUMENTS_PER_BLOCK):
        tokens += sum(map(generator.plan, documents.take(rows[start : start + DOCUMENTS_PER_BLOCK])))
    return {"documents": len(set(_document_ids(documents, rows))), "requests": len(rows), "tokens": tokens}


def files_beside(output: Path) -> tuple[Path, Path]:
    """Return the files of judgments and of counts that belong to a file of queries."""
    return output.with_suffix(".qrels.txt"), output.with_suffix(".json")


def _counts_text(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in counts.items())


def _read_parts(parts: Sequence[Path]) -> Iterator[list[str]]:
    """Yield the generated queries of each document."""
    for part in parts:
        yield from json.loads(np.load(part)["queries"].tobytes())


def _good(
    made: Iterator[list[str]], documents: TextStore, rows: np.ndarray, counts: dict[str, int]
) -> Iterator[tuple[str, str]]:
    """Yield document and query, without the queries that are bad by themselves."""
    for row, queries in zip(rows, made, strict=True):
        (doc_id,), (text,) = _document_ids(documents, [row]), documents.take([row])
        for query in queries:
            counts["generated"] += 1
            problem = _problem(query, text)
            if problem is None:
                yield doc_id, " ".join(query.split())
            else:
                counts[problem] += 1


def _problem(query: str, text: str) -> str | None:
    """Return what is wrong with a query by itself, named as in `LEFT_OUT`; None if nothing is."""
    if not re.search(r"\w", query):
        return "empty"
    if normalized(query) == normalized(text):
        return "equal_to_document"
    of_query, of_text = scripts(query), scripts(text)
    if of_query:
        script = of_query.most_common(1)[0][0]
        if of_text[script] < LEAST_SHARE * of_text.total():
            return "other_script"
    return None


def _distinct(queries: Iterator[tuple[str, str]], counts: dict[str, int]) -> list[tuple[str, str]]:
    """Leave out queries that have nearly the words of an earlier one.

    Two sets with a Jaccard similarity of `NEAR` share one of their rarest words, so that few pairs are compared.
    """
    listed = list(queries)
    words = [frozenset(re.findall(r"\w+", normalized(query))) for _, query in listed]
    frequency: Counter[str] = Counter()
    for of_query in words:
        frequency.update(of_query)
    holders: dict[str, list[frozenset[str]]] = defaultdict(list)
    kept = []
    for pair, of_query in zip(listed, words, strict=True):
        rarest = sorted(of_query, key=lambda word: (frequency[word], word))
        rarest = rarest[: len(rarest) - math.ceil(NEAR * len(rarest)) + 1]
        if any(_is_near(of_query, other) for word in rarest for other in holders[word]):
            counts["near_duplicates"] += 1
            continue
        kept.append(pair)
        for word in rarest:
            holders[word].append(of_query)
    return kept


def _is_near(first: frozenset[str], second: frozenset[str]) -> bool:
    return len(first & second) >= NEAR * len(first | second)


def _found_again(
    kept: Sequence[tuple[str, str]],
    search: Callable[[Mapping[str, str], int], Run],
    round_trip: int,
    counts: dict[str, int],
) -> list[tuple[str, str]]:
    """Leave out queries whose document is not among the first `round_trip` results."""
    found = []
    for start in range(0, len(kept), ROUND_TRIPS_AT_ONCE):
        block = kept[start : start + ROUND_TRIPS_AT_ONCE]
        run = search({str(place): query for place, (_, query) in enumerate(block)}, round_trip)
        for place, (doc_id, query) in enumerate(block):
            if doc_id in dict(run.get(str(place), ())):
                found.append((doc_id, query))
    counts["not_found"] = len(kept) - len(found)
    return found


def _write(kept: Sequence[tuple[str, str]], output: Path, description: Mapping[str, Any]) -> None:
    """Write queries, judgments and description; the queries get their name last."""
    qrels_path, description_path = files_beside(output)
    qrels, numbers = {}, Counter()
    with writing(output) as file:
        for doc_id, query in kept:
            numbers[doc_id] += 1
            query_id = f"{doc_id}-q{numbers[doc_id]}"
            file.write(f"{query_id}\t{query}\n")
            qrels[query_id] = {doc_id: 1}
        write_qrels(qrels, qrels_path)
        write_json(description_path, description)
