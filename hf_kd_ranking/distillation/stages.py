"""The stages of `distill` up to what students learn from: candidates, triples, teachers, scores.

Each is a call of another part in a folder of its own, see `run_stage`; a property that names a stage makes it, and
those before it, and gives its digest.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from ..artifacts import writing
from ..data.rows import column_batches, load_teacher_scores, sample_triples, write_teacher_scores
from ..data.runs import Run, read_run, write_qrels, write_run
from ..data.texts import TextStore
from ..evaluation.metrics import evaluate_run
from ..models import ARCHITECTURES
from ..processes import processes
from ..retrieval.bm25 import BM25Index
from ..retrieval.fusion import fuse_runs
from ..teachers.ensemble import ensemble_teachers
from ..teachers.load import Teacher, load_teacher
from ..teachers.score import score_teacher
from .job import BM25, FIRST_TEACHER, NO_TEACHER, SPLITS, DistillJob, digest_of
from .stage import run_stage

logger = logging.getLogger(__name__)

AGREED = 3  # the teachers' best candidates that count as relevant where there are no judgments
Grades = Mapping[str, Mapping[str, int]]


class Student(NamedTuple):
    """A trained ranker.

    Args:
        folder: of the checkpoint.
        digest: of what it was made from.
        rate: learning rate.
        dev: the measure on the queries to choose by.
    """

    folder: Path
    digest: str
    rate: float
    dev: float


class Stages(ABC):
    """A job's stages up to the scores.

    Args:
        job: what is distilled.

    Raises:
        ValueError, FileNotFoundError: see `DistillJob.split_queries`; if the output is of another collection or
            queries, an id stands twice, or several processes were launched.
    """

    def __init__(self, job: DistillJob) -> None:
        if processes().num_processes > 1:
            raise ValueError(
                "distill is one process; its parts, `teacher score` and `train`, are what several can share."
            )
        self.job = job
        self.judged = job.read_judgments()
        self.splits = job.split_queries(self.judged)
        self.device = job.device or processes().device.type
        self.queries = TextStore.from_file(job.queries)
        self.documents = TextStore.from_file(job.collection)
        if repeated := len(self.documents) - len(self.documents.distinct_rows()):
            raise ValueError(f"{job.collection} has {repeated:,} documents under an id of another; give each its own.")
        is_begun = self.folder("candidates").exists()  # until then a mistake can be mended
        files = job.inputs("collection", "queries")
        run_stage(self.folder("plan"), files, lambda _: None, is_replaced=not is_begun)

    def folder(self, *parts: str) -> Path:
        """Of a stage."""
        return Path(self.job.output, *parts)

    def run(self, split: str) -> Path:
        """BM25's candidates of a split, a TREC run."""
        return self.folder("candidates", f"{split}.trec")

    def judgments(self, split: str) -> Path:
        """What rankers are measured by, TREC qrels."""
        return self.folder("triples", f"{split}.qrels.txt")

    # ---- Candidates and triples -------------------------------------------------------------------------------------

    @cached_property
    def candidates(self) -> str:
        """BM25's candidates of every query, in train with the judged positives that it missed."""

        def work(folder: Path) -> None:
            index = BM25Index.build(self.documents)
            for split in SPLITS[1:] if self.job.scores else SPLITS:  # scores bring what is trained on
                texts = dict(zip(self.splits[split], self.queries[self.splits[split]], strict=True))
                run = index.search(texts, self.job.candidates)
                if split == "train":
                    grades = self._judged(split) if self.judged else {}
                    run = Run((query_id, _with_positives(run[query_id], grades.get(query_id, {}))) for query_id in run)
                write_run(run, folder / f"{split}.trec", tag="BM25")

        options = ("collection", "queries", "qrels", "dev_qrels", "test_qrels", "candidates", "held_out")
        return run_stage(self.folder("candidates"), self.job.inputs(*options) | {"splits": self.splits}, work)

    @cached_property
    def triples(self) -> str:
        """Triples with labels (1 and 0) as scores, and the judgments of every split."""
        before = self.candidates if self.judged else self.teaching  # without judgments teachers name positives
        options = ("scores", "qrels", "dev_qrels", "test_qrels", "triples_per_query")

        def work(folder: Path) -> None:
            judged = {split: self._judged(split) for split in SPLITS}
            for split in SPLITS:
                write_qrels(judged[split], folder / f"{split}.qrels.txt")
            if self.job.brings_rows:
                rows = load_teacher_scores(self.job.scores[0])
            else:
                grades = judged["train"]
                run, grades = self._common(grades) if self.job.scores else (read_run(self.run("train")), grades)
                rows = sample_triples(run, grades, self.job.triples_per_query)
            with writing(folder / "labels.tsv") as file:
                for batch in column_batches(rows, ("query_id", "pos_id", "neg_id")):
                    file.writelines("1\t0\t{}\t{}\t{}\n".format(*ids) for ids in zip(*batch.values(), strict=True))

        return run_stage(self.folder("triples"), {"before": before} | self.job.inputs(*options), work)

    def _judged(self, split: str) -> Grades:
        if self.judged:
            judged = {q: self.judged[q] for q in self.splits[split] if q in self.judged}
            if split == "train":  # what a part of a collection lacks teaches nothing, but counts in a test
                judged = {q: {d: g for d, g in grades.items() if d in self.documents} for q, grades in judged.items()}
            return judged
        best = self.teacher_run(split).top(AGREED)
        return {q: {doc_id: AGREED - i for i, (doc_id, _) in enumerate(ranking)} for q, ranking in best.items()}

    def _common(self, grades: Grades) -> tuple[Run, Grades]:
        """Of training queries, the documents that every run of scores has."""
        scored = [read_run(path) for path in self.job.scores]
        common = {
            query_id: set.intersection(*({doc_id for doc_id, _ in run.get(query_id, ())} for run in scored))
            for query_id in self.splits["train"]
        }
        run = Run((q, [pair for pair in scored[0].get(q, ()) if pair[0] in common[q]]) for q in common)
        return run, {q: {doc_id: grade for doc_id, grade in grades[q].items() if doc_id in common[q]} for q in grades}

    # ---- Teachers and their scores ----------------------------------------------------------------------------------

    @property
    def sources(self) -> dict[str, str]:
        """Teachers, or files of scores, by short names."""
        paths = self.job.teachers or self.job.scores
        names = [Path(path).name for path in paths]
        if len(set(names)) < len(names) or {"mean", "trained", "", ".."} & set(names):
            names = [f"{name}-{i}" for i, name in enumerate(names)]
        return dict(zip(names, paths, strict=True))

    def teach(self, name: str) -> str:
        """One teacher's run over the candidates that are held out, and over all where there are no judgments."""
        source = self.sources[name]

        def work(folder: Path) -> None:
            splits = SPLITS[1:] if self.judged else SPLITS
            if self.job.scores:
                scored, wanted = read_run(source), [query_id for split in splits for query_id in self.splits[split]]
                write_run(Run((q, scored[q]) for q in wanted if q in scored), folder / "run.trec", tag="teacher")
                return
            pairs = Run(pair for split in splits for pair in read_run(self.run(split)).items())
            if source == BM25:
                write_run(pairs, folder / "run.trec", tag=BM25)
            elif not (folder / "run.trec").is_file():
                score_teacher(self.teacher(name), pairs, self.queries, self.documents, folder / "run.trec")

        inputs = {"candidates": self.candidates, "teacher": self._made_of(name)}
        return run_stage(self.folder("teachers", name), inputs, work)

    def _made_of(self, name: str) -> str:
        source = self.sources[name]
        if source == BM25:
            return self.candidates
        return self.train_teacher(source).digest if source in ARCHITECTURES else digest_of(source)

    def teacher(self, name: str) -> Teacher:
        """A teacher, trained first if it is an architecture."""
        source = self.sources[name]
        if source in ARCHITECTURES:
            source = str(self.train_teacher(source).folder)
        return load_teacher(source, device=self.device)

    @abstractmethod
    def train_teacher(self, architecture: str) -> Student:
        """A teacher from the labels of the triples."""

    @cached_property
    def teaching(self) -> str:
        """All teachers' runs, and the mean of them, after `_check_teacher`."""
        digests = [self.teach(name) for name in self.sources]

        def work(folder: Path) -> None:
            runs = [_read(self.folder("teachers", name, "run.trec")) for name in self.sources]
            mean = runs[0] if len(runs) == 1 else fuse_runs(runs, "weighted_sum")
            write_run(mean, folder / "run.trec", tag="teacher")

        digest = run_stage(self.folder("teacher"), {"teachers": digests}, work)
        self._check_teacher()
        return digest

    def _check_teacher(self) -> None:
        run, measure = self.teacher_run("dev"), self.job.measure
        if not self.judged or not run:
            return

        def value(of: Run) -> float:
            return evaluate_run(of, {q: self.judged[q] for q in run}, (measure,))[measure]

        first, teacher = value(read_run(self.run("dev"))), value(run)
        if teacher <= first and not self.job.force:
            raise ValueError(
                f"The teacher ranks the {len(run)} queries to choose by no better than BM25 ({measure} "
                f"{teacher:.4f}, BM25 {first:.4f}): students would learn that; take another teacher, or --force."
            )
        alone = {name: value(self.teacher_run("dev", name)) for name in self.sources}
        best = max(alone, key=alone.get)
        if alone[best] > teacher:
            logger.warning(
                f"{best} alone ranks the {len(run)} queries to choose by better than the mean of the teachers "
                f"({measure} {alone[best]:.4f}, mean {teacher:.4f}): a mean pays where teachers are about as good."
            )

    def teacher_run(self, split: str, name: str | None = None) -> Run:
        """A split's candidates in the order of a teacher, or of the mean of all; empty where rows were given."""
        path = self.folder("teachers", name, "run.trec") if name else self.folder("teacher", "run.trec")
        run = Run() if self.job.brings_rows else _read(path)
        return Run((query_id, run[query_id]) for query_id in self.splits[split] if query_id in run)

    @cached_property
    def scores(self) -> str:
        """Every teacher's scores of the triples, each once, and their mean: whatever the triples came from."""
        _ = self.triples
        if self.job.brings_rows:
            files, digests = [Path(path) for path in self.sources.values()], self.job.inputs("scores")["scores"]
        else:
            _ = self.teaching
            files = [self.folder("scores", name, "rows.tsv") for name in self.sources]
            digests = [self._score(name, path) for name, path in zip(self.sources, files, strict=True)]

        def work(folder: Path) -> None:
            if len(files) > 1:
                ensemble_teachers(files, folder / "rows.tsv", "standardized", overwrite=True)

        return run_stage(self.folder("scores", "mean"), {"scores": digests}, work)

    def _score(self, name: str, path: Path) -> str:
        labels = self.folder("triples", "labels.tsv")

        def work(_: Path) -> None:
            if self.job.scores or self.sources[name] == BM25:  # a positive that it missed has its lowest score
                run = self.run("train") if self.sources[name] == BM25 else self.sources[name]
                _write_scored(labels, read_run(run), path)
            elif not path.is_file():
                score_teacher(self.teacher(name), labels, self.queries, self.documents, path)

        return run_stage(path.parent, {"labels": digest_of(str(labels)), "teacher": self._made_of(name)}, work)

    def teacher_name(self, condition: str) -> str:
        """What a condition learns from, in words."""
        names = [
            f"a {name} trained on the labels of the triples" if source in ARCHITECTURES else name.replace(BM25, "BM25")
            for name, source in self.sources.items()
        ]
        return names[0] if condition == FIRST_TEACHER else " and ".join(names)

    def scores_of(self, condition: str) -> Path:
        """The rows that a condition trains on."""
        if condition == NO_TEACHER:
            return self.folder("triples", "labels.tsv")
        if condition != FIRST_TEACHER and len(self.sources) > 1:
            return self.folder("scores", "mean", "rows.tsv")
        name, path = next(iter(self.sources.items()))
        return Path(path) if self.job.brings_rows else self.folder("scores", name, "rows.tsv")


def _read(path: Path) -> Run:
    """A run, which may have no query: a system that ranked training queries only."""
    return read_run(path) if path.stat().st_size else Run()


def _with_positives(ranking: list[tuple[str, float]], grades: Mapping[str, int]) -> list[tuple[str, float]]:
    found, last = {doc_id for doc_id, _ in ranking}, ranking[-1][1] if ranking else 0.0
    return ranking + [(doc_id, last) for doc_id, grade in grades.items() if grade > 0 and doc_id not in found]


def _write_scored(labels: Path, run: Run, output: Path) -> None:
    """The rows of a file of triples with a run's scores."""
    rows, scores = load_teacher_scores(labels), {query_id: dict(ranking) for query_id, ranking in run.items()}

    def look_up(row: dict) -> dict:
        of_query = scores[str(row["query_id"])]
        return {f"{kind}_score": of_query[str(row[f"{kind}_id"])] for kind in ("pos", "neg")}

    write_teacher_scores(rows.map(look_up, keep_in_memory=True), output)
