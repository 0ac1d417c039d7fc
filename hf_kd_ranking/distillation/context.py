"""Texts, judgments and the split of the queries of a distillation; everything is checked before any work."""

import logging
from dataclasses import replace
from pathlib import Path

from ..data.runs import check_run_ids, read_run
from ..data.texts import TextStore
from ..errors import InputError
from ..losses import IN_BATCH, get_loss, get_losses
from ..models import ARCHITECTURES
from ..processes import processes
from ..ranker import Ranker, check_model_paths
from ..retrieval.bm25 import check_language
from ..teachers.endpoint import Endpoint, is_endpoint
from ..training.in_batch import can_be_live
from .job import BM25, NO_TEACHER, TEACHER, DistillJob
from .queries import Grades, read_judgments, split_queries

logger = logging.getLogger(__name__)


class Context:
    """A job with its texts, judgments and split of the queries.

    Raises:
        InputError, FileNotFoundError: if an option, a file or a model cannot work.
    """

    def __init__(self, job: DistillJob) -> None:
        job.check()
        check_language(job.language)
        check_model_paths([*job.teachers, job.model_name, job.dense_model or ""])
        state = processes()
        if job.batch_size % state.num_processes:
            raise InputError(f"batch_size {job.batch_size} is not a multiple of the {state.num_processes} processes.")
        if min(job.parallel, state.num_processes) > 1:
            raise InputError(
                f"parallel {job.parallel} starts processes by itself; launch one process, got {state.num_processes}."
            )
        self.is_main_process = state.is_main_process
        self.device = job.device or state.device.type
        with state.main_process_first():  # one process builds the stores, the others open them
            self.queries = TextStore.from_file(job.queries)
            self.documents = TextStore.from_file(job.collection)
        check_run_ids(self.queries, "queries")
        check_run_ids(self.documents, "documents")
        self.judgments = read_judgments(job)
        split = split_queries(job, self.judgments, self.queries)
        self.splits = split.query_ids
        self.overlaps = split.overlaps | {"positives of train and test": self._count_shared_positives()}
        self._check_candidates(job)
        self.job = replace(job, conditions=self._conditions(job))
        self.live_teacher = _live_teacher(job)
        self.dense_model = job.dense_model or self.live_teacher
        self._check_loss()
        if "dense" in job.shares and self.dense_model is None:
            raise InputError("The source dense needs --dense-model: no single teacher encodes documents separately.")
        self._fingerprint = self.documents.fingerprint() + self.queries.fingerprint()

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
            kept = judged = self.judgments[split].get(query_id, {})
            if split == "train":
                rows = self.documents.rows_of_documents(list(judged))
                kept = {doc: judged[doc] for doc, row in zip(judged, rows, strict=True) if row >= 0}
            if kept:
                grades[query_id] = kept
        return grades

    def _conditions(self, job: DistillJob) -> list[str]:
        """Return the conditions of the job, by default all that there are labels for."""
        has_labels = job.brings_rows
        for grades in self.grades("train").values():
            has_labels = has_labels or max(grades.values()) >= job.minimum_grade
        if NO_TEACHER in job.conditions and not has_labels:
            raise InputError(f"The condition {NO_TEACHER} needs judgments of training queries, and there are none.")
        if job.conditions:
            return job.conditions
        return [NO_TEACHER, TEACHER] if has_labels else [TEACHER]

    def _check_loss(self) -> None:
        """Refuse a loss over the batch that no teacher can supervise."""
        losses = {} if self.job.loss is None else get_losses(self.job.loss)
        for name in losses:
            if name.startswith(IN_BATCH) and get_loss(name).needs_teacher:
                if self.live_teacher is None:
                    raise InputError(
                        f"{name} needs a live teacher: a single one that encodes queries and documents separately, "
                        f"such as a bi-encoder or a colbert; got {', '.join(self.job.teachers or self.job.scores)}."
                    )

    def _count_shared_positives(self) -> int:
        positives = {}
        for split in ("train", "test"):
            positives[split] = set()
            for query_id in self.splits[split]:
                grades = self.judgments[split].get(query_id, {})
                positives[split].update(doc_id for doc_id, grade in grades.items() if grade > 0)
        return len(positives["train"] & positives["test"])

    def _check_candidates(self, job: DistillJob) -> None:
        """Check the ids in the candidates of the user's engine, if there are any."""
        if job.candidates is None:
            return
        run = read_run(job.candidates)
        doc_ids: dict[str, None] = {}
        for found in run.values():
            doc_ids.update(dict.fromkeys(doc_id for doc_id, _ in found))
        self._refuse_unknown(self.queries, list(run), f"{job.candidates}: query", job.queries)
        self._refuse_unknown(self.documents, list(doc_ids), f"{job.candidates}: document", job.collection)
        for split in ("dev", "test"):
            lacking = [query_id for query_id in self.splits[split] if query_id not in run]
            if lacking:
                raise InputError(
                    f"{job.candidates} lacks {len(lacking):,} of the {len(self.splits[split]):,} {split} queries, for "
                    f"example {lacking[0]!r}; a ranker can only be measured on queries with candidates."
                )

    @staticmethod
    def _refuse_unknown(store: TextStore, ids: list[str], what: str, where: str) -> None:
        missing = (store.rows_of_documents(ids) < 0).nonzero()[0]
        if len(missing):
            raise InputError(f"{what} {ids[missing[0]]!r} ({len(missing):,} in all) is not in {where}.")


def _live_teacher(job: DistillJob) -> str | None:
    """Return the teacher if it is a single one that encodes queries and documents separately, else None."""
    if len(job.teachers) != 1 or job.teachers[0] == BM25 or job.teachers[0] in ARCHITECTURES:
        return None
    if is_endpoint(job.teachers[0]):
        return None
    try:
        config = Ranker.from_pretrained(job.teachers[0], device="cpu").model.config
    except (ValueError, OSError):  # a model of another kind, for example a cross-encoder
        return None
    return job.teachers[0] if can_be_live(config) else None


def name_sources(job: DistillJob) -> dict[str, str]:
    """Return short name -> teacher, or file of scores, in the order given."""
    paths = job.teachers or job.scores
    names = [Endpoint(path).name if is_endpoint(path) else Path(path).name for path in paths]
    if len(set(names)) < len(names) or not {"mean", "", ".."}.isdisjoint(names):
        names = [f"{name}-{number}" for number, name in enumerate(names)]
    return dict(zip(names, paths, strict=True))
