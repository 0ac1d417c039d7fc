"""Texts and judgments of a distillation, and the split of its queries into training, validation (dev) and test."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ..data.rows import load_teacher_scores
from ..data.runs import read_qrels, read_run
from ..data.texts import TextStore
from ..processes import processes
from .job import SPLITS, DistillJob

LEAST_QUERIES = {"train": 8, "dev": 2, "test": 2}
Grades = dict[str, dict[str, int]]


class Context:
    """A job with its texts, judgments and split of the queries; everything is checked before any work.

    Raises:
        ValueError, FileNotFoundError: if an option or a file cannot work, an id appears twice in the collection, or
            several processes were launched.
    """

    def __init__(self, job: DistillJob) -> None:
        if processes().num_processes > 1:
            raise ValueError("distill is one process; several can share its parts, `teacher score` and `train`.")
        job.check()
        self.job = job
        self.device = job.device or processes().device.type
        self.judgments: Grades = {}
        for path in (job.qrels, job.dev_qrels, job.test_qrels):
            if path is not None:
                self.judgments.update(read_qrels(path))
        self.queries = TextStore.from_file(job.queries)
        self.splits = _split_queries(job, self.judgments, self.queries)
        self.documents = TextStore.from_file(job.collection)
        repeated = len(self.documents) - len(self.documents.distinct_rows())
        if repeated:
            raise ValueError(f"{job.collection} has {repeated:,} documents under the id of another; rename them.")
        self._fingerprint = self.documents.fingerprint() + self.queries.fingerprint()

    @property
    def is_judged(self) -> bool:
        """True if the queries have judgments; otherwise rankers are measured by their agreement with the teachers."""
        return bool(self.judgments)

    def fingerprint(self) -> str:
        """Return the identity of collection and queries: all that a step may read of a context besides its inputs."""
        return self._fingerprint

    def texts(self, split: str) -> dict[str, str]:
        """Return query_id -> text of the queries of a split."""
        query_ids = self.splits[split]
        return dict(zip(query_ids, self.queries[query_ids], strict=True))

    def grades(self, split: str) -> Grades:
        """Return the judgments of a split.

        A judged document that the collection lacks teaches nothing, but counts in a test.
        """
        grades = {}
        for query_id in self.splits[split]:
            if query_id in self.judgments:
                judged = self.judgments[query_id].items()
                grades[query_id] = {doc: grade for doc, grade in judged if split != "train" or doc in self.documents}
        return grades


def _split_queries(job: DistillJob, judgments: Grades, queries: TextStore) -> dict[str, list[str]]:
    """Return "train", "dev" and "test" -> query ids in the order of the file.

    The split of a query depends on a digest of its id, so that other queries do not move it. Rows of scores bring
    their own training queries: all other judged queries are held out.
    """
    split_of: dict[str, str] = {}  # queries with judgments for one split
    shared = ["test", "dev"]
    for split, path in (("dev", job.dev_qrels), ("test", job.test_qrels)):
        if path is not None:
            split_of |= dict.fromkeys(read_qrels(path), split)
            shared.remove(split)
    trained: set[str] = set()
    held_out = job.held_out
    if job.brings_rows:
        held_out = 1.0
        trained = _queries_of_triples(job.scores[0])
        for path in job.scores[1:]:  # only checked: they must score the same triples
            _queries_of_triples(path)
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for query_id in _usable_queries(job, judgments, queries):
        split = split_of.get(query_id) or _split_by_digest(query_id, held_out, shared)
        if query_id in trained:
            split = "train"
        elif trained and split == "train":
            continue
        splits[split].append(query_id)
    if trained and not splits["train"]:
        raise ValueError(f"None of the {len(trained):,} queries of the scores has a text in {job.queries}.")
    least = dict(LEAST_QUERIES)
    if trained:
        least["train"] = 0
    short = [split for split in SPLITS if len(splits[split]) < least[split]]
    if short:
        counts = ", ".join(f"{split} {len(splits[split])} (needed {least[split]})" for split in SPLITS)
        with_what = " with a relevant document" if job.qrels else ""
        raise ValueError(
            f"Too few queries{with_what} for {' and '.join(short)}: {counts}; add queries, or change --held-out."
        )
    return splits


def _queries_of_triples(path: str) -> set[str]:
    """Return the queries of a file of scored triples; other rows are refused."""
    rows, query_ids = load_teacher_scores(path), set()
    if not rows.has_scores:
        raise ValueError(f"{path} has no teacher scores; `teacher score` adds them.")
    for _, columns in rows.batches(["query_id", "doc_ids"]):
        if len(columns["doc_ids"].flatten()) > 2 * len(columns["doc_ids"]):
            raise ValueError(f"Scores are rows of triples or TREC runs; {path} holds lists.")
        query_ids.update(str(query_id) for query_id in columns["query_id"].unique().to_pylist())
    return query_ids


def _split_by_digest(query_id: str, held_out: float, shared: Sequence[str]) -> str:
    """Return the split of a query; the splits that share what is held out get equal parts of it."""
    place = int.from_bytes(hashlib.sha256(query_id.encode()).digest()[:8]) / 2**64
    for number, split in enumerate(shared, start=1):
        if place < held_out * number / len(shared):
            return split
    return "train"


def _usable_queries(job: DistillJob, judgments: Grades, queries: TextStore) -> list[str]:
    """Return the queries with a relevant document; without judgments those that every run of scores has."""
    usable = []
    runs = [read_run(path) for path in job.scores if job.qrels is None]
    for query_id in queries.ids():
        if job.qrels is None:
            is_usable = all(query_id in run for run in runs)
        else:
            is_usable = max(judgments.get(query_id, {}).values(), default=0) > 0
        if is_usable:
            usable.append(query_id)
    return usable


def name_sources(job: DistillJob) -> dict[str, str]:
    """Return short name -> teacher, or file of scores, in the order given."""
    paths = job.teachers or job.scores
    sources = {Path(path).name: path for path in paths}
    if len(sources) == len(paths) and {"mean", "", ".."}.isdisjoint(sources):
        return sources
    return {f"{Path(path).name}-{number}": path for number, path in enumerate(paths)}
