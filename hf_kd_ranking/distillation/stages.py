"""The stages of `distill`, each a call of another part: candidates, teacher, triples, students, report."""

import json
from collections.abc import Mapping
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from ..data.formats import writing
from ..data.texts import TextStore
from ..data.trec import Run, read_qrels, read_run, write_qrels, write_run
from ..data.triples import sample_triples
from ..evaluation.metrics import evaluate_run
from ..evaluation.rerank import rerank_run
from ..hub.model_card import costs_of, write_model_card
from ..inference import processes
from ..ranker import Ranker
from ..reporting.efficiency import measure_efficiency
from ..reporting.report import write_report
from ..retrieval.bm25 import BM25Index
from ..retrieval.fusion import fuse_runs
from ..teachers.adapters import load_teacher
from ..teachers.ensemble import ensemble_teachers
from ..teachers.score import score_teacher
from ..training.arguments import RankingTrainingArguments
from ..training.job import TrainingJob, train_ranker
from .job import CONFIGS, SPLITS, DistillJob
from .stage import run_stage

TAUGHT, ALONE = "taught", "alone"  # by the teacher's scores; from the labels of the same triples
AGREED = 3  # the teacher's best candidates that count as relevant where there are no judgments
TIMED_QUERIES = 10


class Student(NamedTuple):
    """A trained ranker: its folder, the digest of what it was made from, and the measure on dev."""

    folder: Path
    digest: str
    dev: float


class Distillation:
    """A job's stages, each in a folder of the output. A stage makes those before it; one that is done costs nothing.

    Args:
        job: what is distilled.

    Raises:
        ValueError, FileNotFoundError: see `DistillJob.check`; if the output is of another collection or other queries.
    """

    def __init__(self, job: DistillJob) -> None:
        self.job = job
        self.splits = job.check()
        run_stage(Path(job.output, "plan"), job.inputs("collection", "queries"), lambda _: None, is_replaced=False)

    @cached_property
    def queries(self) -> TextStore:
        """All queries' texts."""
        return TextStore.from_file(self.job.queries)

    @cached_property
    def documents(self) -> TextStore:
        """The collection's texts."""
        return TextStore.from_file(self.job.collection)

    def folder(self, *parts: str) -> Path:
        """Of a stage."""
        return Path(self.job.output, *parts)

    def run(self, split: str) -> Path:
        """BM25's candidates of a split, a TREC run."""
        return self.folder("candidates", f"{split}.trec")

    def judgments(self, split: str) -> Path:
        """What rankers are measured by, TREC qrels."""
        return self.folder("triples", f"{split}.qrels.txt")

    @cached_property
    def candidates(self) -> str:
        """BM25's candidates of every query, in train with the judged positives that it missed; the stage's digest."""

        def work(folder: Path) -> None:
            index = BM25Index.build(self.documents)
            qrels = {} if self.job.qrels is None else read_qrels(self.job.qrels)
            for split in SPLITS:
                texts = dict(zip(self.splits[split], self.queries[self.splits[split]], strict=True))
                run = index.search(texts, self.job.candidates)
                if split == "train":
                    run = Run((query_id, _with_positives(run[query_id], qrels.get(query_id, {}))) for query_id in run)
                write_run(run, folder / f"{split}.trec", tag="BM25")

        inputs = self.job.inputs("collection", "queries", "qrels", "candidates", "held_out")
        return run_stage(self.folder("candidates"), inputs, work)

    @cached_property
    def teaching(self) -> str:
        """Every teacher's scores of all candidates, and their runs fused where there are several; the stage's digest.

        Raises:
            ValueError: if the teacher ranks the judged queries that are for choosing worse than BM25, unless forced.
        """
        inputs = {"candidates": self.candidates} | self.job.inputs("teachers")

        def work(folder: Path) -> None:
            candidates = Run(pair for split in SPLITS for pair in read_run(self.run(split)).items())
            for number, name in enumerate(self.job.teachers):
                output = folder / f"{number}.trec"
                if not output.is_file():
                    teacher = load_teacher(name, device=processes().device)
                    score_teacher(teacher, candidates, self.queries, self.documents, output)
            runs = [read_run(folder / f"{number}.trec") for number in range(len(self.job.teachers))]
            write_run(
                runs[0] if len(runs) == 1 else fuse_runs(runs, "weighted_sum"), folder / "all.trec", tag="teacher"
            )

        digest = run_stage(self.folder("teacher"), inputs, work)
        if self.job.qrels is not None and not self.job.force:
            judged = read_qrels(self.job.qrels)
            qrels = {query_id: judged[query_id] for query_id in self.splits["dev"]}
            first = evaluate_run(read_run(self.run("dev")), qrels, (self.job.measure,))[self.job.measure]
            teacher = evaluate_run(self.teacher_run("dev"), qrels, (self.job.measure,))[self.job.measure]
            if teacher <= first:
                raise ValueError(
                    f"The teacher ranks the {len(qrels)} held-out queries no better than BM25 ({self.job.measure} "
                    f"{teacher:.4f}, BM25 {first:.4f}): students would learn that; take another teacher, or --force."
                )
        return digest

    def teacher_run(self, split: str) -> Run:
        """A split's candidates in the teacher's order."""
        run = read_run(self.folder("teacher", "all.trec"))
        return Run((query_id, run[query_id]) for query_id in self.splits[split] if query_id in run)

    @cached_property
    def triples(self) -> str:
        """Triples with labels (1 and 0), with every teacher's scores and with their mean; the stage's digest."""
        inputs = {"teacher": self.teaching} | self.job.inputs("qrels", "triples_per_query")

        def work(folder: Path) -> None:
            for split in SPLITS:
                write_qrels(self._judged(split), folder / f"{split}.qrels.txt")
            run, qrels = read_run(self.run("train")), read_qrels(folder / "train.qrels.txt")
            rows = sample_triples(run, qrels, self.job.triples_per_query).to_list()
            files = [folder / f"scores.{number}.tsv" for number in range(len(self.job.teachers))]
            for number, file in enumerate(files):
                of_query = {
                    q: dict(ranking) for q, ranking in read_run(self.folder("teacher", f"{number}.trec")).items()
                }
                _write_rows(file, rows, lambda query_id, doc_id, of=of_query: of[query_id][doc_id])
            _write_rows(folder / "labels.tsv", rows, lambda query_id, doc_id: int(qrels[query_id].get(doc_id, 0) > 0))
            ensemble_teachers(
                files, folder / "scores.tsv", "standardized" if len(files) > 1 else "mean", overwrite=True
            )

        return run_stage(self.folder("triples"), inputs, work)

    def _judged(self, split: str) -> Mapping[str, Mapping[str, int]]:
        if self.job.qrels is not None:
            qrels = read_qrels(self.job.qrels)
            return {query_id: qrels[query_id] for query_id in self.splits[split]}
        best = self.teacher_run(split).top(AGREED)
        return {q: {doc_id: AGREED - i for i, (doc_id, _) in enumerate(ranking)} for q, ranking in best.items()}

    def train_students(self) -> dict[str, list[Student]]:
        """Train every architecture with the teacher and without, choose learning rates on dev, then the other seeds.

        Returns:
            "architecture condition" -> the students with the chosen learning rate, one a seed.
        """
        chosen: dict[str, list[Student]] = {}
        for architecture, condition in product(self.job.architectures, (ALONE, TAUGHT)):
            tried = {rate: self.train(architecture, condition, rate, 0) for rate in self.job.learning_rates}
            rate = max(tried, key=lambda rate: tried[rate].dev)
            others = [self.train(architecture, condition, rate, seed) for seed in range(1, self.job.seeds)]
            chosen[f"{architecture} {condition}"] = [tried[rate], *others]
        return chosen

    def train(self, architecture: str, condition: str, rate: float, seed: int) -> Student:
        """Train one student, unless that is done."""
        folder = self.folder("students", architecture, f"{condition}-{rate:g}-seed{seed}")
        names = ("model_name", "epochs", "batch_size", "max_query_length", "max_document_length", "layers", "measure")
        settings = {"architecture": architecture, "condition": condition, "rate": rate, "seed": seed}
        settings["config"] = CONFIGS.get(architecture, {}) | self.job.configs.get(architecture, {})
        inputs = {"triples": self.triples} | self.job.inputs(*names) | settings
        digest = run_stage(folder, inputs, partial(self._train, settings))
        results = json.loads((folder / "ranker" / "results.json").read_text(encoding="utf-8"))
        return Student(folder / "ranker", digest, results["after"][f"eval_{self.job.measure}"])

    def _train(self, settings: Mapping[str, Any], folder: Path) -> None:
        is_taught, job = settings["condition"] == TAUGHT, self.job
        training = TrainingJob(
            job.model_name,
            settings["architecture"],
            layers=None if settings["architecture"] == "tk" else job.layers,
            config_overrides=settings["config"],
            max_query_length=job.max_query_length,
            max_document_length=job.max_document_length,
            teacher_scores=str(self.folder("triples", "scores.tsv" if is_taught else "labels.tsv")),
            collection=job.collection,
            queries=job.queries,
            candidates=str(self.run("dev")),
            qrels=str(self.judgments("dev")),
            measures=[job.measure],
        )
        args = RankingTrainingArguments(
            str(folder / "ranker"),
            loss="margin_mse" if is_taught else "ranknet",
            teacher_scale="match" if is_taught else 1.0,
            learning_rate=settings["rate"],
            num_train_epochs=job.epochs,
            per_device_train_batch_size=job.batch_size,
            seed=42 + settings["seed"],
            warmup_steps=0.1,
            save_strategy="epoch",
            save_total_limit=1,
            resume_from_checkpoint="true",
            dataloader_pin_memory=torch.cuda.is_available(),
            data_name=Path(job.collection).name,
            teacher_name=self._teachers if is_taught else "the labels",
        )
        train_ranker(training, args)

    def measure(self) -> dict[str, Any]:
        """Rank the test split with every chosen student, once; time them; write the report and the cards' costs.

        Returns:
            `test` and `dev` (name -> mean of the measure), `latency_ms` (name -> median of a query), `folders` (name
            -> the student of the first seed) and `page`, the report.
        """
        chosen = self.train_students()
        students = {name: [student.digest for student in of_seeds] for name, of_seeds in chosen.items()}
        inputs = {"students": students} | self.job.inputs("candidates")
        run_stage(self.folder("report"), inputs, partial(self._measure, chosen))
        return json.loads((self.folder("report") / "outcome.json").read_text(encoding="utf-8"))

    def _measure(self, chosen: Mapping[str, list[Student]], folder: Path) -> None:
        (folder / "runs").mkdir(exist_ok=True)
        candidates, qrels = read_run(self.run("test")), read_qrels(self.judgments("test"))
        runs = {"BM25": [candidates], "teacher": [self.teacher_run("test")]}
        for name, students in chosen.items():
            rankers = (Ranker.from_pretrained(student.folder) for student in students)
            runs[name] = [rerank_run(ranker, candidates, self.queries, self.documents) for ranker in rankers]
        values = {}
        for name, of_seeds in runs.items():
            write_run(of_seeds[0], folder / "runs" / f"{name}.trec", tag=name.replace(" ", "_"))
            values[name] = fmean(evaluate_run(run, qrels, (self.job.measure,))[self.job.measure] for run in of_seeds)
        firsts = {name: students[0] for name, students in chosen.items()}
        costs = self._timed(firsts)
        with writing(folder / "efficiency.json") as file:
            json.dump(costs, file, indent=1)
        for name, student in firsts.items():
            write_model_card(student.folder, name.replace(" ", "-"), costs_of(costs, name))
        files = {"qrels": self.judgments("test"), "candidates": self.run("test")}
        files |= {"queries": self.job.queries, "collection": self.job.collection}
        arrows = [(f"{name} {ALONE}", f"{name} {TAUGHT}") for name in self.job.architectures]
        page = self.folder("report.html")
        write_report(folder, page, (self.job.measure,), arrows, title=f"Distillation of {self._teachers}", files=files)
        outcome = {
            "test": values,
            "dev": {name: student.dev for name, student in firsts.items()},
            "latency_ms": {name: of["total_ms"]["p50"] for name, of in costs["rankers"].items()},
            "folders": {name: str(student.folder) for name, student in firsts.items()},
            "page": str(page),
        }
        with writing(folder / "outcome.json") as file:
            json.dump(outcome, file, indent=1)

    def _timed(self, students: Mapping[str, Student]) -> dict[str, Any]:
        """What rankers cost against as many passages as they re-rank."""
        passages = self.documents.texts[: self.job.candidates].to_pylist()
        loads = {name: partial(Ranker.from_pretrained, student.folder) for name, student in students.items()}
        return measure_efficiency(loads, self.queries[self.splits["test"][:TIMED_QUERIES]], passages)

    @property
    def _teachers(self) -> str:
        return " and ".join(Path(name).name for name in self.job.teachers)


def _with_positives(ranking: list[tuple[str, float]], grades: Mapping[str, int]) -> list[tuple[str, float]]:
    found, last = {doc_id for doc_id, _ in ranking}, ranking[-1][1] if ranking else 0.0
    return ranking + [(doc_id, last) for doc_id, grade in grades.items() if grade > 0 and doc_id not in found]


def _write_rows(path: Path, rows: list[dict[str, str]], score: Any) -> None:
    with writing(path) as file:
        for row in rows:
            query_id, positive, negative = row["query_id"], row["pos_id"], row["neg_id"]
            scores = score(query_id, positive), score(query_id, negative)
            file.write("\t".join([*map(repr, scores), query_id, positive, negative]) + "\n")
