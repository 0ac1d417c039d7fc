"""A sixth architecture, registered from one file, goes through every part of the package that serves architectures."""

import json
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard

import hf_kd_ranking as kd

LENGTHS = "--max-query-length 8 --max-document-length 16"


@pytest.fixture
def trained(toy_architecture, call, encoder, toy, tmp_path) -> Path:
    """A toy ranker, trained on the command line."""
    files = f"--scores {toy / 'scores.tsv'} --collection {toy / 'collection.tsv'} --queries {toy / 'queries.tsv'}"
    evaluation = f"--candidates {toy / 'candidates.trec'} --qrels {toy / 'qrels.txt'}"
    settings = "--max-steps 4 --batch-size 8 --learning-rate 0.01 --use-cpu --logging-steps 1 --disable-tqdm"
    output = tmp_path / "trained"
    status, _, error = call(
        f"train --model {encoder} --architecture toy {LENGTHS} {files} {evaluation} {settings} --output {output}"
    )
    assert status == 0, error
    return output


def test_toy_learns_and_describes_itself(trained, encoder):
    untrained = kd.load_ranker(encoder, "toy")
    assert not np.allclose(
        kd.load_ranker(trained).embeddings.weight.detach(), untrained.embeddings.weight.detach(), atol=1e-3
    )
    card = ModelCard.load(trained / "README.md")
    assert "Toy ranker: a text's vector is the mean of its word embeddings." in card.text
    assert "Toy" in card.data.tags and (trained / "toy_architecture.py").is_file()
    assert {"eval_nDCG@10", "eval_RR@10"} <= json.loads((trained / "results.json").read_text())["after"].keys()


def test_toy_reranks_is_indexed_and_searched(trained, call, toy, tmp_path):
    queries, collection = f"--queries {toy / 'queries.tsv'}", f"--collection {toy / 'collection.tsv'}"
    status, _, error = call(
        f"rerank --model {trained} {queries} {collection} --candidates {toy / 'candidates.trec'} "
        f"--output {tmp_path / 'reranked.trec'}"
    )
    assert status == 0, error
    status, _, error = call(f"index --model {trained} {collection} --output {tmp_path / 'index'} --factory HNSW4")
    assert status == 0, error
    search = f"search --model {trained} --index {tmp_path / 'index'} {queries}"
    status, _, error = call(f"{search} --exact --k 40 --output {tmp_path / 'found.trec'}")
    assert status == 0, error
    candidates = f"--candidates {toy / 'candidates.trec'}"
    status, _, error = call(f"{search} {candidates} --output {tmp_path / 'stored.trec'}")
    assert status == 0, error
    reranked, found, stored = (kd.read_run(tmp_path / f"{name}.trec") for name in ("reranked", "found", "stored"))
    for query_id, ranking in reranked.items():
        everything = dict(found[query_id])
        assert len(everything) == 40
        for doc_id, score in ranking:
            assert everything[doc_id] == pytest.approx(score, abs=1e-4)
            assert dict(stored[query_id])[doc_id] == pytest.approx(score, abs=1e-4)


def test_toy_is_measured_and_exported_where_it_fits(trained, call, toy, tmp_path):
    texts = f"--queries {toy / 'queries.tsv'} --collection {toy / 'collection.tsv'}"
    status, printed, error = call(f"benchmark --model toy={trained} {texts} --k 10 --rounds 2 --json")
    assert status == 0, error
    figures = json.loads(printed)["rankers"]["toy"]
    assert (figures["architecture"], figures["bytes_per_passage"]) == ("toy", 16 * 4)
    for layout in ("cross-encoder", "sentence-transformer", "multi-vector", "pylate"):
        status, _, error = call(f"export --model {trained} --to {layout} --output {tmp_path / layout}")
        assert status == 2 and "Toy" in error and not (tmp_path / layout).exists()


def test_toy_is_distilled(toy_architecture, call, encoder, tokenizer, toy, tmp_path):
    teacher = kd.load_ranker(encoder, "bert_cat", max_query_length=8, max_document_length=16)
    kd.Ranker(teacher, tokenizer).save_pretrained(tmp_path / "teacher")
    files = f"--collection {toy / 'collection.tsv'} --queries {toy / 'queries.tsv'} --output {tmp_path / 'out'}"
    settings = f"--architectures toy --learning-rates 0.01 --k 5 --lists-per-query 2 --held-out 0.3 {LENGTHS}"
    status, printed, error = call(
        f"distill {files} --teacher {tmp_path / 'teacher'} --model {encoder} {settings} --for search --measure RR@10 "
        "--json"
    )
    assert status == 0, error
    outcome = json.loads(printed.splitlines()[-1])
    assert {"toy untrained", "toy teacher"} < outcome["test"].keys()  # it has one vector per text, and can search
    assert type(kd.load_ranker(outcome["folders"]["toy teacher"])) is toy_architecture
