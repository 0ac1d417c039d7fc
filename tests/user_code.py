"""Code as users write it, for the type checker: `mypy` in `make quality` reads it, and nothing runs it."""

from typing import Any, assert_type

import numpy as np
from transformers import AutoTokenizer

import hf_kd_ranking as kd


def rank(name: str) -> None:
    ranker = kd.Ranker.from_pretrained(name)
    assert_type(ranker.rerank("query", ["one", "two"], top_k=1), list[tuple[int, float]])
    scores: np.ndarray = ranker.score(["query"], ["one"])
    print(scores.mean())


def search(folder: str) -> None:
    for document_id, score in kd.load_pipeline(folder).search("query", k=10):
        print(document_id.upper(), score + 1)


def measure() -> None:
    run, qrels = kd.read_run("bm25.trec"), kd.read_qrels("qrels.txt")
    values: dict[str, float] = kd.evaluate_run(run, qrels, measures=("nDCG@10",))
    print(values)


def train(encoder: str) -> None:
    queries, documents = kd.TextStore.from_tsv("queries.tsv"), kd.TextStore.from_tsv("collection.tsv")
    trainer = kd.RankingTrainer(
        kd.BertDot.from_encoder(encoder),
        kd.RankingTrainingArguments("output", loss="margin_mse"),
        train_dataset=kd.load_teacher_scores("scores.tsv"),
        queries=queries,
        documents=documents,
        processing_class=AutoTokenizer.from_pretrained(encoder),
    )
    trainer.train()
    trainer.save_model()


def distil() -> None:
    job = kd.DistillJob("collection.tsv", "queries.tsv", "distilled", teachers=["teacher"], qrels="qrels.txt")
    assert_type(kd.distill(job), dict[str, Any])
