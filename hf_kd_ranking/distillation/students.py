"""The trainings of `distill`: every architecture under every condition, and teachers that are trained here.

All see the same triples and are tuned alike: the same learning rates are tried under every condition, on the queries
to choose by.
"""

import json
import shutil
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np

from ..data.rows import column_batches, load_teacher_scores
from ..training.arguments import MATCH, RankingTrainingArguments
from ..training.job import TrainingJob, train_ranker
from .job import NO_TEACHER, DistillJob, digest_of
from .stage import run_stage
from .stages import Stages, Student

SEED = 42
# Products of an encoder's vectors have a scale of their own, which the teacher's margins are matched to. A fresh head
# has none, near 0: its teacher's margins get this root mean square (matched, a PreTTR learnt half as much).
PRODUCTS = ("bert_dot", "colbert")
HEAD_MARGIN = 1.5
SETTINGS = ("model_name", "batch_size", "max_query_length", "max_document_length", "measure", "device", "bf16")


class Distillation(Stages):
    """A job's stages, the trainings among them; see `Stages`."""

    def __init__(self, job: DistillJob) -> None:
        super().__init__(job)
        self._digest_of = cache(digest_of)  # of 40 million rows it takes seconds

    def train_students(self) -> dict[str, list[Student]]:
        """Train every architecture under every condition, choose the learning rates, then train the other seeds.

        Returns:
            "architecture condition" -> the students with the chosen learning rate, one a seed.
        """
        chosen = {}
        for architecture, condition in product(self.job.architectures, self.job.conditions):
            rate = self.best_rate(architecture, condition)
            seeds = range(self.job.seeds)
            chosen[f"{architecture} {condition}"] = [
                self.train_student(architecture, condition, rate, seed) for seed in seeds
            ]
        return chosen

    def best_rate(self, architecture: str, condition: str) -> float:
        """The learning rate that is best on the queries to choose by, by the first seed."""
        rates = self.job.options_of(architecture)[0]["learning_rates"]
        return max(rates, key=lambda rate: self.train_student(architecture, condition, rate, 0).dev)

    def train_student(self, architecture: str, condition: str, rate: float, seed: int) -> Student:
        """Train one student, unless that is done."""
        loss = "ranknet" if condition == NO_TEACHER else self.job.loss
        folder = self.folder("students", architecture, f"{condition}-{loss}-{rate:g}-seed{seed}")
        return self._train(folder, architecture, condition, rate, seed)

    def train_teacher(self, architecture: str) -> Student:
        """A teacher from the labels of the students' triples, with the best of its learning rates."""

        def train(rate: float) -> Student:
            folder = self.folder("teachers", "trained", f"{architecture}-{rate:g}")
            return self._train(folder, architecture, NO_TEACHER, rate, 0, is_teacher=True)

        rates = self.job.options_of(architecture, is_teacher=True)[0]["learning_rates"]
        return max(map(train, rates), key=lambda teacher: teacher.dev)

    def _train(
        self,
        folder: Path,
        architecture: str,
        condition: str,
        rate: float,
        seed: int,
        is_teacher: bool = False,
    ) -> Student:
        options, config = self.job.options_of(architecture, is_teacher)
        del options["learning_rates"]  # others that are tried change nothing
        inputs = {"files": self._learned_from(condition), "config": config, "rate": rate}
        inputs |= {"architecture": architecture, "condition": condition, "seed": seed, "options": options}
        inputs |= self.job.inputs(*SETTINGS, *(() if condition == NO_TEACHER else ("loss",)))

        def work(folder: Path) -> None:
            output = folder.resolve() / "ranker"  # a checkpoint remembers where the best one is
            if not (output / "README.md").is_file():  # what training writes last; checkpoints may be gone half
                training = self.training_of(architecture, condition, rate, seed, output, is_teacher)
                train_ranker(*training, is_measured_before=False)
            for checkpoint in output.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)

        digest = run_stage(folder, inputs, work)
        results = json.loads((folder / "ranker" / "results.json").read_text(encoding="utf-8"))
        return Student(folder / "ranker", digest, rate, results["after"][f"eval_{self.job.measure}"])

    def _learned_from(self, condition: str) -> list[str]:
        """Digests of what a training reads, and not of how that came to be: other test queries change no student."""
        _ = self.triples if condition == NO_TEACHER else self.scores
        files = (self.scores_of(condition), self.run("dev"), self.judgments("dev"))
        return [self._digest_of(str(file)) for file in files]

    def _teacher_scale(self, architecture: str, condition: str) -> str:
        if condition == NO_TEACHER:
            return "1"
        if architecture in PRODUCTS:
            return MATCH
        rows, squares = load_teacher_scores(self.scores_of(condition)), 0.0
        for batch in column_batches(rows, ("pos_score", "neg_score")):
            squares += float(np.square(batch["pos_score"].astype(np.float64) - batch["neg_score"]).sum())
        return f"{HEAD_MARGIN / max(squares / len(rows), 1e-12) ** 0.5:.6g}"

    def training_of(
        self,
        architecture: str,
        condition: str,
        rate: float,
        seed: int,
        output: Path,
        is_teacher: bool = False,
    ) -> tuple[TrainingJob, RankingTrainingArguments]:
        """One training, for `train_ranker`.

        Args:
            output: folder of the checkpoint.
            is_teacher: it is to be one.
        """
        job, is_alone = self.job, condition == NO_TEACHER
        options, config = job.options_of(architecture, is_teacher)
        training = TrainingJob(
            job.model_name,
            architecture,
            config_overrides=config,
            max_query_length=job.max_query_length,
            max_document_length=job.max_document_length,
            teacher_scores=str(self.scores_of(condition)),
            collection=job.collection,
            queries=job.queries,
            candidates=str(self.run("dev")),
            qrels=str(self.judgments("dev")),
            measures=[job.measure],
        )
        best = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
        best |= {"metric_for_best_model": f"eval_{job.measure}"}
        only = {"save_strategy": "steps", "save_steps": 1_000}  # one epoch may take a day
        args = RankingTrainingArguments(
            str(output),
            loss="ranknet" if is_alone else job.loss,
            teacher_scale=self._teacher_scale(architecture, condition),
            learning_rate=rate,
            head_learning_rate=options["head_learning_rate"],
            num_train_epochs=options["epochs"],
            per_device_train_batch_size=job.batch_size,
            seed=SEED + seed,
            weight_decay=0.01,
            warmup_steps=0.1,
            logging_steps=10,
            save_total_limit=2,  # of one, the last goes before the ranker is saved
            resume_from_checkpoint="true",
            bf16=job.bf16,
            use_cpu=self.device == "cpu",
            dataloader_pin_memory=self.device != "cpu",
            data_name=job.data_name or Path(job.collection).name,
            base_model=None if architecture == "tk" else job.base_model,
            teacher_name="the labels of the triples" if is_alone else self.teacher_name(condition),
            **(best if options["epochs"] > 1 else only),
        )
        args._n_gpu = min(args.n_gpu, 1)  # on several GPUs transformers would take a batch on each
        return training, args
