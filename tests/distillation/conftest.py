"""A small collection to distil on."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.distillation import students

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
        settings = {"model_name": str(encoder), "k": 8, "triples_per_query": 2, "held_out": 0.5}
        settings |= {"learning_rates": [1e-3], "max_query_length": 8, "max_document_length": 16, "force": True}
        settings |= {"qrels": str(tmp_path / "qrels.txt"), "measure": "RR@10", "batch_size": 8}
        paths = [str(tmp_path / name) for name in ("collection.tsv", "queries.tsv", "out")]
        if "scores" not in options:
            settings["teachers"] = [str(tmp_path / "teacher")]
        return kd.DistillJob(*paths, **settings | options)

    return make


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
