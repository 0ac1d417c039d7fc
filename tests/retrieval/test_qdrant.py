"""Qdrant, embedded: the results of exact search; uploads that are interrupted, and servers that fail."""

import shutil
from pathlib import Path

import httpx
import pytest

import hf_kd_ranking as kd

qdrant_index = pytest.importorskip("hf_kd_ranking.retrieval.qdrant")
BERT_DOT = pytest.mark.parametrize("model", ["bert_dot"], indirect=True)


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The seconds of all waits, which are skipped."""
    found = []
    monkeypatch.setattr(qdrant_index.time, "sleep", found.append)
    return found


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for query_id, ranking in wanted.items():
        assert [score for _, score in found[query_id]] == pytest.approx([s for _, s in ranking], rel=1e-4, abs=1e-4)
        assert dict(found[query_id]) == pytest.approx(dict(ranking), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("model", ["bert_dot", "colbert"], indirect=True)
def test_qdrant_results_equal_exact_search(ranker, store, queries, tmp_path):
    index = kd.QdrantIndex.build(store, tmp_path / "db", batch_size=7)
    exact = (kd.ColBERTIndex if store.has_token_vectors else kd.DenseIndex).build(store)
    assert len(index) == 41
    assert_same(index.search(queries, 41), exact.search(queries, 41))
    only = ["d ü 7", "文書 same as 5"]
    found = index.search({"q": "cat"}, 5, only=only)["q"]
    assert {doc_id for doc_id, _ in found} == set(only)
    index.close()
    again = kd.QdrantIndex.open(tmp_path / "db", ranker)
    assert_same(again.search(queries, 100), exact.search(queries, 100))


@BERT_DOT
def test_qdrant_retries_a_lost_connection_and_resumes(ranker, store, queries, tmp_path, monkeypatch, waits):
    real, calls = qdrant_index.QdrantClient.upsert, []

    def fail(numbers):
        def upsert(client, name, points, **options):
            calls.append(points.ids[0])
            if len(calls) in numbers:
                raise qdrant_index.ResponseHandlingException(ConnectionResetError("reset by peer"))
            return real(client, name, points, **options)

        monkeypatch.setattr(qdrant_index.QdrantClient, "upsert", upsert)

    fail({2, 3})
    kd.QdrantIndex.build(store, tmp_path / "db", batch_size=20).close()
    assert (calls, waits) == ([0, 20, 20, 20, 40], [1, 2])
    calls.clear()
    fail(set(range(2, 99)))
    with pytest.raises(
        ConnectionError, match=r"did not answer 6 times \(reset by peer\).*the same call resumes there"
    ):
        kd.QdrantIndex.build(store, tmp_path / "other", batch_size=20)
    with pytest.raises(ValueError, match="'documents' has 20 of 41 documents; build it again"):
        kd.QdrantIndex.open(copy(tmp_path / "other", tmp_path / "copy"), ranker)
    calls.clear()
    fail(set())
    index = kd.QdrantIndex.build(store, copy(tmp_path / "other", tmp_path / "copy2"), batch_size=20)
    assert (calls, len(index)) == ([20, 40], 41)  # the first 20 were uploaded before
    assert_same(index.search(queries, 50), kd.DenseIndex.build(store).search(queries, 50))


@pytest.mark.parametrize(("status", "attempts"), [(429, 2), (503, 2), (400, 1), (404, 1)])
@BERT_DOT
def test_qdrant_asks_an_overloaded_server_again(store, tmp_path, monkeypatch, waits, status, attempts):
    real, calls = qdrant_index.QdrantClient.upsert, []

    def upsert(client, name, points, **options):
        calls.append(points.ids[0])
        if len(calls) == 1:
            raise qdrant_index.UnexpectedResponse(status, "reason", b"content", httpx.Headers())
        return real(client, name, points, **options)

    monkeypatch.setattr(qdrant_index.QdrantClient, "upsert", upsert)
    if attempts == 1:
        with pytest.raises(ValueError, match="Qdrant refuses the request on 'documents'"):
            kd.QdrantIndex.build(store, tmp_path / "db")
    else:
        assert len(kd.QdrantIndex.build(store, tmp_path / "db")) == 41
    assert len(calls) == attempts


def copy(source: Path, target: Path) -> Path:
    """Copy an embedded database whose client is still open and holds its lock."""
    return Path(shutil.copytree(source, target, ignore=shutil.ignore_patterns(".lock")))


@BERT_DOT
def test_qdrant_refuses_what_it_cannot_open(ranker, store, make_texts, tmp_path, other_ranker, waits, monkeypatch):
    with pytest.raises(ValueError, match="either a path"):
        kd.QdrantIndex.open(ranker=ranker)
    with pytest.raises(ValueError, match="The ranker that made the vectors"):
        kd.QdrantIndex.open(tmp_path / "db")
    with pytest.raises(FileNotFoundError, match="no Qdrant collection 'docs'"):
        kd.QdrantIndex.open(tmp_path / "empty", ranker, name="docs")
    index = kd.QdrantIndex.build(store, tmp_path / "db", name="docs")
    with pytest.raises(ValueError, match="already accessed by another instance"):
        kd.QdrantIndex.open(tmp_path / "db", ranker, name="docs")
    index.close()
    with pytest.raises(ValueError, match="another model"):
        kd.QdrantIndex.open(copy(tmp_path / "db", tmp_path / "copy"), other_ranker, name="docs")
    few = kd.VectorStore.build(ranker, make_texts(("a", "cat"), ("b", "dog")), tmp_path / "few")
    with pytest.raises(ValueError, match=r"has other documents \(41, here 2\)"):
        kd.QdrantIndex.build(few, copy(tmp_path / "db", tmp_path / "copy2"), name="docs")
    monkeypatch.setenv(qdrant_index.API_KEY, "a secret")
    with pytest.raises(ConnectionError, match="did not answer 6 times") as caught:
        kd.QdrantIndex.open(ranker=ranker, url="http://127.0.0.1:9")
    assert waits == [1, 2, 4, 8, 16]
    assert "secret" not in str(caught.value)
