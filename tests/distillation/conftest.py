"""A small collection to distil on."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from transformers import BertModel
from warm_processes import SETTINGS, Warm, run_ranks

import hf_kd_ranking as kd
from hf_kd_ranking.data.runs import write_qrels
from hf_kd_ranking.distillation import students
from hf_kd_ranking.distillation.work import Artifact

WORDS = "apple bread cat dog earth fire glass house iron jam king lake moon night ocean paper queen river".split()


@pytest.fixture
def make_job(tmp_path, encoder, tokenizer) -> Callable[..., kd.DistillJob]:
    """A collection of 60 passages, 60 queries with one judged passage each, and a teacher with random weights."""
    rng = random.Random(3)
    passages = [rng.choices(WORDS, k=8) for _ in range(60)]
    lines = {
        "collection.tsv": [f"d{i}\t{' '.join(words)}\n" for i, words in enumerate(passages)],
        "queries.tsv": [f"q{i}\t{' '.join(rng.sample(words, 3))}\n" for i, words in enumerate(passages)],
        "qrels.txt": [f"q{i} 0 d{i} 1\n" for i in range(60)],
    }
    for name, of_file in lines.items():
        (tmp_path / name).write_text("".join(of_file))
    teacher = kd.load_ranker(encoder, "bert_cat", max_query_length=8, max_document_length=16)
    kd.Ranker(teacher, tokenizer).save_pretrained(tmp_path / "teacher")

    def make(**options) -> kd.DistillJob:
        settings = {
            "model_name": str(encoder),
            "k": 8,
            "candidates_per_query": 8,
            "candidate_depth": 8,
            "held_out": 0.5,
        }
        settings |= {"learning_rates": [1e-3], "max_query_length": 8, "max_document_length": 16, "force": True}
        settings |= {"qrels": str(tmp_path / "qrels.txt"), "measure": "RR@10", "batch_size": 8}
        paths = [str(tmp_path / name) for name in ("collection.tsv", "queries.tsv", "out")]
        if "scores" not in options:
            settings["teachers"] = [str(tmp_path / "teacher")]
        settings |= {"output": paths.pop()} | options
        return kd.DistillJob(*paths, **settings)

    return make


@pytest.fixture
def fixed_encoder(tmp_path, encoder, tokenizer) -> Path:
    """The tiny encoder without dropout: processes draw their random numbers independently."""
    folder = tmp_path / "encoder"
    model = BertModel.from_pretrained(encoder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Launched(subprocess.Popen):
    """A program with the interface of `Warm`."""

    def __init__(self, command: list[str], name: Path, environment: dict[str, str]) -> None:
        self.paths = [Path(f"{name}.stdout"), Path(f"{name}.stderr")]
        with self.paths[0].open("w") as printed, self.paths[1].open("w") as errors:
            settings = {"stdout": printed, "stderr": errors, "env": os.environ | SETTINGS | environment}
            super().__init__(command, start_new_session=True, **settings)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for the end, and return what was printed, and printed as errors."""
        self.wait(timeout)
        return self.paths[0].read_text(), self.paths[1].read_text()


@pytest.fixture
def launch(tmp_path) -> Iterator[Callable[..., Launched | Warm]]:
    """launch(job): start `distill`, in a warm process unless `is_warm` is False or there is a launcher (`-m`, ...)."""
    started = []
    (tmp_path / "temporary").mkdir()
    environment = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "temporary")}

    def start(job: kd.DistillJob, *launcher: str, is_warm: bool = True) -> Launched | Warm:
        name = tmp_path / f"{Path(job.output).name}-{len(started)}"
        if launcher or not is_warm:
            started.append(Launched([sys.executable, *launcher, *verb(job, name)], name, environment))
        else:
            started.append(Warm(verb(job, name), name, environment))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()  # a launcher ends its processes, which are not of its group
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def launch_ranks(tmp_path) -> Callable[[kd.DistillJob], list[str]]:
    """launch_ranks(job): run `distill` in two processes, and return what each printed."""
    environment = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}

    def run(job: kd.DistillJob) -> list[str]:
        name = tmp_path / f"{Path(job.output).name}-ranks"
        return run_ranks(verb(job, name), name, environment)

    return run


def verb(job: kd.DistillJob, name: Path) -> list[str]:
    """Write the options of a job, and return what comes after `python` to distil with them."""
    options = {option: value for option, value in asdict(job).items() if value not in (None, [], {})}
    config = Path(f"{name}.yaml")
    config.write_text(yaml.safe_dump(options))
    return ["-m", "hf_kd_ranking", "distill", "--config", str(config), "--json"]


@pytest.fixture
def out(tmp_path) -> Path:
    """Output of the jobs of `make_job`."""
    return tmp_path / "out"


@pytest.fixture
def stores(tmp_path, make_job) -> tuple[kd.TextStore, kd.TextStore]:
    """Queries and documents of the jobs of `make_job`."""
    return kd.TextStore.from_tsv(tmp_path / "queries.tsv"), kd.TextStore.from_tsv(tmp_path / "collection.tsv")


@pytest.fixture
def trainings(monkeypatch) -> list[str]:
    """The folders of all trainings that were run."""
    folders, train = [], students.train_ranker

    def noted(job, args, **options):
        folders.append(args.output_dir)
        return train(job, args, **options)

    monkeypatch.setattr(students, "train_ranker", noted)
    return folders


@pytest.fixture
def pair_scores() -> Callable[[Path], tuple[list[float], list[float]]]:
    """Scores of the positives and of the negatives in a file of teacher rows."""

    def read(path: Path) -> tuple[list[float], list[float]]:
        rows = kd.load_teacher_scores(path).rows["teacher_scores"]
        return [scores[0] for scores in rows], [scores[1] for scores in rows]

    return read


@pytest.fixture
def make_artifact(tmp_path) -> Callable[..., Artifact]:
    """make_artifact("name", run=..., qrels=...): a folder with a run or judgments, as a step leaves it."""

    def make(name: str, run: dict | None = None, qrels: dict | None = None) -> Artifact:
        folder = tmp_path / "artifacts" / name
        folder.mkdir(parents=True)
        if run is not None:
            kd.write_run(run, folder / "run.trec")
        if qrels is not None:
            write_qrels(qrels, folder / "qrels.txt")
        return Artifact(folder, name)

    return make
