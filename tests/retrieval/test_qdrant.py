"""Qdrant, embedded: the results of exact search; uploads that are interrupted or killed, and servers that fail."""

import multiprocessing
import os
import random
import time
from pathlib import Path

import httpx
import pytest
import torch

import hf_kd_ranking as kd
from hf_kd_ranking.retrieval.vector_store import VectorStore

qdrant_index = pytest.importorskip("hf_kd_ranking.retrieval.qdrant")
KILLS = int(os.environ.get("HF_KD_RANKING_KILLS", "3"))


@pytest.fixture
def store(ranker, documents, tmp_path) -> VectorStore:
    return VectorStore.build(ranker, documents, tmp_path / "store")


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Seconds that would have been waited."""
    found = []
    monkeypatch.setattr(qdrant_index.time, "sleep", found.append)
    return found


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for query_id, ranking in wanted.items():
        assert [score for _, score in found[query_id]] == pytest.approx([s for _, s in ranking], rel=1e-4, abs=1e-4)
        assert dict(found[query_id]) == pytest.approx(dict(ranking), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("model", ["bert_dot", "colbert"], indirect=True)
def test_results_are_those_of_exact_search(ranker, store, queries, tmp_path):
    index = kd.QdrantIndex.build(ranker, store, "docs", path=tmp_path / "db", batch_size=7)
    exact = kd.ColBERTIndex(ranker, store) if store.has_token_vectors else kd.DenseIndex.build(ranker, store)
    assert len(index) == 41
    assert_same(index.search(queries, 41), exact.search(queries, 41))
    only = ["d ü 7", "文書 same as 5"]
    found = index.search({"q": "cat"}, 5, only=only)["q"]
    assert {doc_id for doc_id, _ in found} == set(only)
    index.close()
    again = kd.QdrantIndex.open(ranker, "docs", path=tmp_path / "db")
    assert_same(again.search(queries, 100), exact.search(queries, 100))


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_a_lost_connection_is_retried_and_an_upload_resumed_without_doubling(
    ranker, store, tmp_path, monkeypatch, waits
):
    real, calls = qdrant_index.QdrantClient.upsert, []

    def fail(numbers):
        def upsert(client, name, points, **options):
            calls.append(points.ids[0])
            if len(calls) in numbers:
                raise qdrant_index.ResponseHandlingException(ConnectionResetError("reset by peer"))
            return real(client, name, points, **options)

        monkeypatch.setattr(qdrant_index.QdrantClient, "upsert", upsert)

    fail({2, 3})
    kd.QdrantIndex.build(ranker, store, "docs", path=tmp_path / "db", batch_size=20).close()
    assert (calls, waits) == ([0, 20, 20, 20, 40], [1, 2])
    calls.clear()
    fail(set(range(2, 99)))
    with pytest.raises(ConnectionError, match=r"did not answer 6 times \(reset by peer\).*the same call goes on"):
        kd.QdrantIndex.build(ranker, store, "docs", path=tmp_path / "other", batch_size=20)
    monkeypatch.setattr(qdrant_index.QdrantClient, "upsert", real)
    with pytest.raises(ValueError, match="'docs' has 20 of 41 documents; build it again"):
        kd.QdrantIndex.open(ranker, "docs", path=copy(tmp_path / "other", tmp_path / "copy"))
    calls.clear()
    fail(set())
    index = kd.QdrantIndex.build(
        ranker, store, "docs", path=copy(tmp_path / "other", tmp_path / "copy2"), batch_size=20
    )
    assert (calls, len(index)) == ([20, 40], 41)  # the first 20 were there


@pytest.mark.parametrize(("status", "attempts"), [(429, 2), (503, 2), (400, 1), (404, 1)])
@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_an_overloaded_server_is_asked_again_and_a_refusal_is_final(
    ranker, store, tmp_path, monkeypatch, waits, status, attempts
):
    real, calls = qdrant_index.QdrantClient.upsert, []

    def upsert(client, name, points, **options):
        calls.append(points.ids[0])
        if len(calls) == 1:
            raise qdrant_index.UnexpectedResponse(status, "reason", b"content", httpx.Headers())
        return real(client, name, points, **options)

    monkeypatch.setattr(qdrant_index.QdrantClient, "upsert", upsert)
    if attempts == 1:
        with pytest.raises(ValueError, match="Qdrant refuses the request on 'docs'"):
            kd.QdrantIndex.build(ranker, store, "docs", path=tmp_path / "db")
    else:
        assert len(kd.QdrantIndex.build(ranker, store, "docs", path=tmp_path / "db")) == 41
    assert len(calls) == attempts


def copy(source: Path, target: Path) -> Path:
    """Of an embedded database whose client is still there and holds its lock."""
    for path in source.rglob("*"):
        if path.is_file() and path.name != ".lock":
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(source)).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_what_cannot_be_built_or_opened_is_refused(ranker, store, tmp_path, encoder, tokenizer, waits, monkeypatch):
    with pytest.raises(ValueError, match="either path="):
        kd.QdrantIndex.open(ranker, "docs")
    with pytest.raises(FileNotFoundError, match="no Qdrant collection 'docs'"):
        kd.QdrantIndex.open(ranker, "docs", path=tmp_path / "empty")
    index = kd.QdrantIndex.build(ranker, store, "docs", path=tmp_path / "db")
    with pytest.raises(ValueError, match="already accessed by another instance"):
        kd.QdrantIndex.open(ranker, "docs", path=tmp_path / "db")
    index.close()
    copy(tmp_path / "db", tmp_path / "copy")
    other = kd.Ranker(kd.BertDot.from_encoder(encoder, pooling="mean", max_document_length=16), tokenizer)
    with pytest.raises(ValueError, match="another model"):
        kd.QdrantIndex.open(other, "docs", path=tmp_path / "copy")
    half = VectorStore.build(ranker, kd.TextStore.from_tsv(few(tmp_path)), tmp_path / "few")
    copy(tmp_path / "db", tmp_path / "copy2")
    with pytest.raises(ValueError, match=r"is of other documents \(41, here 2\)"):
        kd.QdrantIndex.build(ranker, half, "docs", path=tmp_path / "copy2")
    monkeypatch.setenv(qdrant_index.API_KEY, "a secret")
    with pytest.raises(ConnectionError, match="did not answer 6 times") as caught:
        kd.QdrantIndex.open(ranker, "docs", url="http://127.0.0.1:9")
    assert waits == [1, 2, 4, 8, 16]
    assert "secret" not in str(caught.value)


def few(folder: Path) -> Path:
    (folder / "few.tsv").write_text("a\tcat\nb\tdog\n")
    return folder / "few.tsv"


@pytest.mark.parametrize("model", ["tk"], indirect=True)
def test_vectors_that_qdrant_cannot_rank_are_refused(ranker, store, tmp_path):
    with pytest.raises(ValueError, match="not as TK does: use StoredReranker"):
        kd.QdrantIndex.build(ranker, store, "docs", path=tmp_path / "db")


def upload(model: Path, store: Path, database: Path) -> None:
    torch.set_num_threads(1)
    ranker = kd.Ranker.from_pretrained(model, device="cpu")
    kd.QdrantIndex.build(ranker, VectorStore.open(store), "docs", path=database, batch_size=2)


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_a_killed_upload_is_completed_by_the_same_call(ranker, store, queries, tmp_path):
    ranker.save_pretrained(tmp_path / "model")
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["hf_kd_ranking.retrieval.qdrant"])
    rng, wanted = random.Random(0), kd.DenseIndex.build(ranker, store).search(queries, 50)

    def run(database: Path, seconds: float) -> float | None:
        process = fork.Process(target=upload, args=(tmp_path / "model", tmp_path / "store", database))
        begin = time.monotonic()
        process.start()
        process.join(seconds)
        status = process.exitcode
        process.kill()
        process.join()
        assert status in (None, 0)
        return None if status is None else time.monotonic() - begin

    run(tmp_path / "first", 60)
    seconds = run(tmp_path / "second", 60)
    for kill in range(KILLS):
        run(tmp_path / f"killed{kill}", rng.uniform(0.3, 1.0) * seconds)
        index = kd.QdrantIndex.build(ranker, store, "docs", path=tmp_path / f"killed{kill}", batch_size=2)
        assert len(index) == 41
        assert_same(index.search(queries, 50), wanted)
        index.close()
