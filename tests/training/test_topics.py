"""Clusters of the training queries, and runs with batches on one topic."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import hf_kd_ranking as kd
from hf_kd_ranking.training.topics import cluster_queries, rows_of_queries, teacher_margins


@pytest.fixture
def ranker(encoder, tokenizer) -> kd.Ranker:
    model = kd.BertDot.from_encoder(encoder, max_query_length=8, max_document_length=16)
    return kd.Ranker(model, tokenizer)


@pytest.fixture
def queries(toy) -> kd.TextStore:
    return kd.TextStore.from_tsv(toy / "queries.tsv")


def test_near_queries_share_a_cluster(tmp_path):
    texts, lengths = ["a" * 41, "a", "aa", "a" * 40, "a" * 41], []

    def encode(texts: list[str]) -> np.ndarray:
        lengths.extend(map(len, texts))
        return np.array([[len(text), 0.0] for text in texts], dtype=np.float32)

    ranker = SimpleNamespace(encode_queries=encode)
    (tmp_path / "queries.tsv").write_text("".join(f"{i}\t{text}\n" for i, text in enumerate(texts)))
    (tmp_path / "rows.tsv").write_text("".join(f"1\t0\t{i}\t1\t2\n" for i in (4, 3, 2, 1, 1)))
    queries, rows = kd.TextStore.from_tsv(tmp_path / "queries.tsv"), kd.load_teacher_scores(tmp_path / "rows.tsv")
    labels = cluster_queries(ranker, queries, rows, 2)
    assert labels.dtype == np.int32
    assert labels[1] == labels[2] != labels[3] == labels[4]
    assert (labels[0], lengths) == (-1, [1, 2, 40, 41])  # a query with two rows is encoded once


def test_queries_are_in_the_cluster_of_the_nearest_centre(toy, ranker, queries):
    rows = kd.load_teacher_scores(toy / "scores.tsv")
    labels = cluster_queries(ranker, queries, rows, 3, seed=5)
    used = np.flatnonzero(labels >= 0)
    assert set(queries.ids_of(used)) == {str(i) for i in rows.rows["query_id"]}
    vectors = ranker.encode_queries(queries[queries.ids_of(used)])
    centres = np.stack([vectors[labels[used] == cluster].mean(0) for cluster in range(3)])
    distances = ((vectors[:, None] - centres) ** 2).sum(-1)
    assert (distances.argmin(1) == labels[used]).all()  # k-means has come to rest on so few points


@pytest.mark.parametrize("clusters", [0, 13])
def test_clusters_beyond_the_queries_are_refused(toy, ranker, queries, clusters):
    with pytest.raises(ValueError, match=f"query_clusters must be 1 to 12, the queries of the rows; got {clusters}"):
        cluster_queries(ranker, queries, kd.load_teacher_scores(toy / "scores.tsv"), clusters)


def test_margins_and_places_of_pairs_and_uneven_lists(tmp_path, toy, queries):
    (tmp_path / "rows.jsonl").write_text(
        '{"query_id": 103, "doc_ids": [1, 2, 3], "teacher_scores": [5.0, 1.0, 2.0]}\n'
        '{"query_id": 100, "doc_ids": [1, 2, 3, 4], "teacher_scores": [0.0, -1.0, 2.0, 3.5]}\n'
    )
    lists, pairs = kd.load_teacher_scores(tmp_path / "rows.jsonl"), kd.load_teacher_scores(toy / "scores.tsv")
    assert teacher_margins(lists).tolist() == [3.5, -1.5]
    assert rows_of_queries(lists, queries).tolist() == [3, 0]
    scores = pairs.rows["teacher_scores"][:]
    assert teacher_margins(pairs) == pytest.approx([positive - negative for positive, negative in scores])
    assert rows_of_queries(pairs, queries).tolist() == [query_id - 100 for query_id in pairs.rows["query_id"]]


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_training_reads_batches_on_one_topic(model, make_trainer, monkeypatch):
    clusters = np.arange(16) % 3
    trainer = make_trainer(model, {"query_clusters": clusters}, per_device_train_batch_size=4, max_steps=6)
    seen, compute_loss = [], trainer.compute_loss

    def record(model, inputs, **kwargs) -> torch.Tensor:
        seen.append(inputs["rows"]["query"].tolist())
        return compute_loss(model, inputs, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", record)
    trainer.train()
    assert len(seen) == 6
    assert all(len({int(clusters[row]) for row in rows}) == 1 for rows in seen)
    assert all(len(set(rows)) == 4 for rows in seen)
