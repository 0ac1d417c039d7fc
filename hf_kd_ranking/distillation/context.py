"""Texts and judgments of a distillation, and the split of its queries into training, validation (dev) and test."""

import hashlib
from collections.abc import Mapping
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

    Args:
        job: the job.

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
        self.judgments = read_judgments(job)
        self.queries = TextStore.from_file(job.queries)
        self.splits = split_queries(job, self.judgments, self.queries)
        self.documents = TextStore.from_file(job.collection)
        repeated = len(self.documents) - len(self.documents.distinct_rows())
        if repeated:
            raise ValueError(
                f"{job.collection} has {repeated:,} documents under the id of another; give each document its own id."
            )
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
            of_query = self.judgments.get(query_id)
            if of_query is None:
                continue
            if split == "train":
                of_query = {doc_id: grade for doc_id, grade in of_query.items() if doc_id in self.documents}
            grades[query_id] = of_query
        return grades


def read_judgments(job: DistillJob) -> Grades:
    """Return all judgments of a job; empty if it has none."""
    judgments: Grades = {}
    for path in (job.qrels, job.dev_qrels, job.test_qrels):
        if path is not None:
            judgments.update(read_qrels(path))
    return judgments


def split_queries(job: DistillJob, judgments: Mapping[str, Mapping[str, int]], queries: TextStore) -> dict:
    """Return "train", "dev" and "test" -> query ids in the order of the file.

    The split of a query depends on a digest of its id, so that other queries do not move it. Rows of scores bring
    their own training queries: all other judged queries are held out.

    Raises:
        ValueError: if a split has too few queries, with the counts.
    """
    with_judgments = {}
    for split, path in (("dev", job.dev_qrels), ("test", job.test_qrels)):
        if path is not None:
            with_judgments[split] = read_qrels(path).keys()
    trained, held_out = None, job.held_out
    if job.brings_rows:
        trained, held_out = _queries_of_rows(job), 1.0
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for query_id in _usable_queries(job, judgments, queries):
        if trained is not None and query_id in trained:
            splits["train"].append(query_id)
            continue
        split = split_by_digest(query_id, held_out, with_judgments)
        for judged_split, query_ids in with_judgments.items():
            if query_id in query_ids:
                split = judged_split
        if trained is None or split != "train":
            splits[split].append(query_id)
    if trained is not None and not splits["train"]:
        raise ValueError(f"None of the {len(trained):,} queries of the scores has a text in {job.queries}.")
    _check_sizes(job, splits)
    return splits


def split_by_digest(query_id: str, held_out: float, with_judgments: Mapping[str, object]) -> str:
    """Return the split of a query.

    Args:
        query_id: the query.
        held_out: share of the queries that are not trained on; half of it is for the test and half for validation, or
            all of it for the one of them that has no judgments of its own.
        with_judgments: the splits that have judgments of their own.
    """
    place = int.from_bytes(hashlib.sha256(query_id.encode()).digest()[:8]) / 2**64
    shared = [split for split in ("test", "dev") if split not in with_judgments]
    for number, split in enumerate(shared, start=1):
        if place < held_out * number / len(shared):
            return split
    return "train"


def _usable_queries(job: DistillJob, judgments: Mapping[str, Mapping[str, int]], queries: TextStore) -> list[str]:
    """Return the queries with a relevant document; without judgments those that every run of scores has."""
    usable = []
    if job.qrels is not None:
        for query_id, _ in queries.items():
            if max(judgments.get(query_id, {}).values(), default=0) > 0:
                usable.append(query_id)
        return usable
    runs = [read_run(path) for path in job.scores]
    for query_id, _ in queries.items():
        if all(query_id in run for run in runs):
            usable.append(query_id)
    return usable


def _queries_of_rows(job: DistillJob) -> set[str]:
    query_ids: set[str] = set()
    for _, columns in load_teacher_scores(job.scores[0]).batches(["query_id"]):
        query_ids.update(map(str, columns["query_id"].unique().to_pylist()))
    return query_ids


def _check_sizes(job: DistillJob, splits: Mapping[str, list[str]]) -> None:
    least = dict(LEAST_QUERIES)
    if job.brings_rows:
        least["train"] = 0
    short = [split for split in SPLITS if len(splits[split]) < least[split]]
    if short:
        counts = ", ".join(f"{split} {len(splits[split])} (needed {least[split]})" for split in SPLITS)
        with_what = " with a relevant document" if job.qrels else ""
        raise ValueError(
            f"Too few queries{with_what} for {' and '.join(short)}: {counts}; add queries, or change --held-out."
        )


def name_sources(job: DistillJob) -> dict[str, str]:
    """Return short name -> teacher, or file of scores, in the order given."""
    paths = job.teachers or job.scores
    sources, numbered = {}, {}
    for number, path in enumerate(paths):
        name = Path(path).name
        sources[name] = path
        numbered[f"{name}-{number}"] = path
    is_ambiguous = len(sources) < len(paths) or not {"mean", "", ".."}.isdisjoint(sources)
    return numbered if is_ambiguous else sources
