"""The judgments of a distillation, and the split of its queries into training, validation (dev) and test.

A query belongs to a split by a digest of its text (see `normalized`), so that two queries of one text are
in one split and other queries do not move it; a generated query by a digest of the id of its document. One digest
decides whether a query is held out, another whether it is then for dev or for test: a larger `held_out` never makes a
query of one into a query of the other.
"""

import hashlib
from dataclasses import dataclass

from ..data.rows import load_teacher_scores
from ..data.runs import read_qrels, read_run
from ..data.texts import TextStore, normalized
from ..errors import InputError
from .job import SPLITS, DistillJob

LEAST_QUERIES = {"train": 8, "dev": 2, "test": 2}
Grades = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Split:
    """The queries of each split in the order of their file, and the numbers of those left out for an overlap."""

    query_ids: dict[str, list[str]]
    overlaps: dict[str, int]


def read_judgments(job: DistillJob) -> dict[str, Grades]:
    """Return the judgments by split; those of `qrels` are for all splits that have no file of their own.

    Raises:
        InputError: if the dev and test judgments share queries.
    """
    general = {} if job.qrels is None else read_qrels(job.qrels)
    judgments = {"train": general}
    for split, path in (("dev", job.dev_qrels), ("test", job.test_qrels)):
        judgments[split] = general if path is None else read_qrels(path)
    if job.dev_qrels is not None and job.test_qrels is not None:
        shared = sorted(judgments["dev"].keys() & judgments["test"].keys())
        if shared:
            raise InputError(
                f"{job.dev_qrels} and {job.test_qrels} share {len(shared):,} queries, for example {shared[0]!r}; a "
                "test of queries that a choice was made on says nothing."
            )
    return judgments


def split_queries(job: DistillJob, judgments: dict[str, Grades], queries: TextStore) -> Split:
    """Split the queries of a job, see the module.

    Rows of scores bring their own training queries: all other judged queries are held out. Dev and test queries have a
    relevant document; without any judgments they, and the training queries, are those that all runs of scores have.
    Too few queries of a split are an InputError.
    """
    trained = _queries_of_rows(job)
    runs = [] if job.brings_rows else [read_run(path) for path in job.scores]
    places: dict[str, list[str]] = {split: [] for split in SPLITS}
    texts: dict[str, str] = {}
    for query_id, text in queries.items():
        texts[query_id] = normalized(text)
        key = texts[query_id]
        if job.query_generator is not None:
            key = next(iter(judgments["train"].get(query_id, [key])))  # queries of one document are in one split
        split = _place(query_id, key, job, judgments, trained)
        is_scored = all(query_id in run for run in runs)
        if split is not None and (is_scored or (split != "train" and job.is_judged)):
            places[split].append(query_id)
    overlaps = {}
    taken = {texts[query_id] for query_id in places["test"]}
    for split in ("dev", "train"):
        kept = []
        for query_id in places[split]:
            if texts[query_id] not in taken:
                kept.append(query_id)
        left_out = len(places[split]) - len(kept)
        overlaps[f"{split} queries left out, as their text is one of a held-out query"] = left_out
        taken.update(texts[query_id] for query_id in kept)
        places[split] = kept
    places["train"] = places["train"][: job.train_queries]
    _check_counts(job, places, bool(trained))
    return Split(places, overlaps)


def _place(query_id: str, key: str, job: DistillJob, judgments: dict[str, Grades], trained: set[str]) -> str | None:
    """Return the split of a query by a digest of its key, None if it has none."""
    if query_id in trained:
        return "train"
    for split, path in (("test", job.test_qrels), ("dev", job.dev_qrels)):
        if path is not None and query_id in judgments[split]:
            return split if _has_positive(judgments[split], query_id) else None
    shared = [split for split in ("dev", "test") if getattr(job, f"{split}_qrels") is None]
    can_be_held_out = bool(shared) and (not job.is_judged or _has_positive(judgments["train"], query_id))
    held_out = 1.0 if trained else job.held_out
    if can_be_held_out and _digest("held out", key) < held_out:
        return shared[int(_digest("dev or test", key) * len(shared))]
    return None if trained else "train"


def _has_positive(judgments: Grades, query_id: str) -> bool:
    return max(judgments.get(query_id, {}).values(), default=0) > 0


def _digest(purpose: str, text: str) -> float:
    """Return a number between 0 and 1 that depends on a text; another one for each purpose."""
    return int.from_bytes(hashlib.sha256(f"{purpose}\n{text}".encode()).digest()[:8]) / 2**64


def _queries_of_rows(job: DistillJob) -> set[str]:
    """Return the queries of the rows of scores that the job brings; lists, and rows without scores, are refused."""
    query_ids: set[str] = set()
    if not job.brings_rows:
        return query_ids
    for path in reversed(job.scores):  # the first gives the queries; the others must score the same rows
        rows, query_ids = load_teacher_scores(path), set()
        rows.check_scores()
        for _, columns in rows.batches(["query_id", "doc_ids"]):
            if len(columns["doc_ids"].flatten()) > 2 * len(columns["doc_ids"]):
                raise InputError(f"Scores are rows of triples or TREC runs; {path} holds lists.")
            query_ids.update(str(query_id) for query_id in columns["query_id"].unique().to_pylist())
    return query_ids


def _check_counts(job: DistillJob, places: dict[str, list[str]], brings_rows: bool) -> None:
    if brings_rows and not places["train"]:
        raise InputError(f"None of the queries of the scores has a text in {job.queries}.")
    least = dict(LEAST_QUERIES)
    if brings_rows:
        least["train"] = 1
    short, counts = [], []
    for split in SPLITS:
        counts.append(f"{split} {len(places[split])} (needed {least[split]})")
        if len(places[split]) < least[split]:
            short.append(split)
    if short:
        with_what = ""
        if job.is_judged:
            with_what = " with a relevant document"
        raise InputError(
            f"Too few queries{with_what} for {' and '.join(short)}: {', '.join(counts)}; add queries, or change "
            "--held-out."
        )
