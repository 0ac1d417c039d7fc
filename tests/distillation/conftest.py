"""A small collection to distil on."""

import random

import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.distillation import students

WORDS = "apple bread cat dog earth fire glass house iron jam king lake moon night ocean paper queen river".split()


@pytest.fixture
def make_job(tmp_path, encoder, tokenizer):
    """A collection of 60 passages, 60 queries with one judged passage each, and a teacher that may rank anyhow."""
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
        settings = {"model_name": str(encoder), "candidates": 8, "triples_per_query": 2, "held_out": 0.5}
        settings |= {"learning_rates": [1e-3], "max_query_length": 8, "max_document_length": 16, "force": True}
        settings |= {"qrels": str(tmp_path / "qrels.txt"), "measure": "RR@10", "batch_size": 8}
        paths = [str(tmp_path / name) for name in ("collection.tsv", "queries.tsv", "out")]
        if "scores" not in options:
            settings["teachers"] = [str(tmp_path / "teacher")]
        return kd.DistillJob(*paths, **settings | options)

    return make


@pytest.fixture
def trainings(monkeypatch) -> list[str]:
    """The folders of all trainings that were run."""
    calls, train = [], students.train_ranker
    monkeypatch.setattr(
        students, "train_ranker", lambda job, args, **how: (calls.append(args.output_dir), train(job, args, **how))[1]
    )
    return calls
