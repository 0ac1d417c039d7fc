"""Qdrant, embedded: the results of exact search; uploads that are interrupted, and servers that fail."""

import shutil
from copy import deepcopy
from pathlib import Path
from threading import Barrier, Lock

import httpx
import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.retrieval.base import INDEX_NAMES
from hf_kd_ranking.retrieval.bm25 import BM25Vectors
from hf_kd_ranking.retrieval.fusion import fuse_runs

qdrant_index = pytest.importorskip("hf_kd_ranking.retrieval.qdrant")
SPLADE = pytest.mark.parametrize("model", ["splade"], indirect=True)
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


@pytest.mark.parametrize("model", ["bert_dot", "colbert", "splade"], indirect=True)
def test_qdrant_results_equal_exact_search(ranker, store, queries, tmp_path):
    index = kd.QdrantIndex.build(store, tmp_path / "db", batch_size=7)
    exact = getattr(kd, INDEX_NAMES[ranker.model.config.vectors_per_text, ranker.model.config.similarity]).build(store)
    assert len(index) == 41
    assert_same(index.search(queries, 41), exact.search(queries, 41))
    only = ["d ü 7", "文書 same as 5"]
    found = index.search({"q": "cat"}, 5, only=only)["q"]
    assert {doc_id for doc_id, _ in found} == set(only)
    index.close()
    again = kd.QdrantIndex.open(tmp_path / "db", ranker)
    assert_same(again.search(queries, 100), exact.search(queries, 100))
    with pytest.raises(ValueError, match=r"chosen by their rows; give QdrantIndex.open\(..., ids=store\)"):
        again.search({"q": "cat"}, only=only)
    again.close()
    again = kd.QdrantIndex.open(tmp_path / "db", ranker, ids=store)
    assert again.search({"q": "cat"}, 5, only=only)["q"] == found


@BERT_DOT
def test_qdrant_retries_a_lost_connection_and_resumes(ranker, store, queries, tmp_path, monkeypatch, waits):
    real, calls = qdrant_index.QdrantClient.upsert, []

    def fail(numbers):
        def upsert(client, name, points, **options):
            calls.append(points[0].id)
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
    with pytest.raises(ValueError, match="'documents': the upload of 41 documents is not complete; build it again"):
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
        calls.append(points[0].id)
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


@BERT_DOT
def test_qdrant_collection_of_an_earlier_release_is_refused(store, ranker, tmp_path):
    client, identity = qdrant_index.QdrantClient(path=str(tmp_path / "db")), store.identity | {"vectors": "a checksum"}
    size = qdrant_index.models.VectorParams(size=store.dimension, distance=qdrant_index.models.Distance.DOT)
    client.create_collection("documents", size, metadata={"documents": len(store)} | identity)
    client.close()
    with pytest.raises(ValueError, match="does not say which model made it; build it here"):
        kd.QdrantIndex.open(copy(tmp_path / "db", tmp_path / "copy"), ranker)
    with pytest.raises(ValueError, match=r"has other vectors .* give another name, or delete it"):
        kd.QdrantIndex.build(store, tmp_path / "db")


@pytest.fixture
def sources(store, documents, encoder, tokenizer, other_ranker, tmp_path) -> dict:
    """The sources of every kind of vectors; `store` is of a SPLADE."""
    colbert = kd.Ranker(kd.ColBERT.from_encoder(encoder, compression_dim=8, max_document_length=16), tokenizer)
    return {
        "words": BM25Vectors(documents, language="english"),
        "splade": store,
        "dense": kd.VectorStore.build(other_ranker, documents, tmp_path / "dense"),
        "tokens": kd.VectorStore.build(colbert, documents, tmp_path / "tokens"),
    }


@SPLADE
def test_qdrant_fuses_and_reranks_in_one_request(sources, documents, queries, tmp_path, monkeypatch):
    requests = []
    real = qdrant_index.QdrantClient.query_batch_points
    monkeypatch.setattr(
        qdrant_index.QdrantClient,
        "query_batch_points",
        lambda client, name, batch: requests.append(batch) or real(client, name, batch),
    )
    index = kd.QdrantIndex.build(sources, tmp_path / "db", vectors={"splade": {"index": {"datatype": "float16"}}})
    bm25 = kd.BM25Index.build(documents, language="english")
    queries = {"empty": "", "repeated": "cat apple cat", **queries}
    alone = {"words": bm25, "splade": kd.SparseIndex.build(sources["splade"])}
    alone["dense"] = kd.DenseIndex.build(sources["dense"])
    alone = {key: found.search(queries, 41) for key, found in alone.items()}
    for key, wanted in alone.items():
        assert_same(index.search(queries, 41, using=key), wanted)
    requests.clear()
    fused = index.search(queries, 41)
    assert [len(batch) for batch in requests] == [len(queries)]
    wanted = fuse_runs(list(alone.values()), weights=[1, 1, 1])
    for query_id, ranking in wanted.items():
        scores = [score for _, score in ranking]
        assert [score for _, score in fused[query_id]] == pytest.approx(scores, abs=1e-3)  # ties in another order
        assert sum(score for _, score in fused[query_id]) == pytest.approx(sum(scores), rel=1e-5)
    found = index.search(queries, 5, using=["words", "dense"], rerank="tokens", depth=7)
    candidates = {key: index.search(queries, 7, using=key) for key in ("words", "dense")}  # the same ones of ties
    exact = kd.ColBERTIndex.build(sources["tokens"]).search(queries, 41)
    for query_id in queries:
        allowed = {doc_id for run in candidates.values() for doc_id, _ in run.get(query_id, ())}
        best = [(doc_id, score) for doc_id, score in exact[query_id] if doc_id in allowed][:5]
        assert [score for _, score in found[query_id]] == pytest.approx([s for _, s in best], rel=1e-4)
    filtered = index.search(queries, 5, only=["d ü 7", "d ü 8"])
    assert {doc_id for ranking in filtered.values() for doc_id, _ in ranking} == {"d ü 7", "d ü 8"}


@SPLADE
def test_qdrant_collections_have_the_settings_of_their_vectors(sources, tmp_path):
    scalar = {"scalar": {"type": "int8", "always_ram": True}}
    vectors = {"dense": {"on_disk": True, "quantization_config": scalar}}
    index = kd.QdrantIndex.build(sources, tmp_path / "db", vectors=vectors)
    parameters = index.client.get_collection("documents").config.params
    assert parameters.sparse_vectors["words"].modifier == "idf"
    assert parameters.sparse_vectors["splade"].modifier is None
    assert parameters.vectors["tokens"].hnsw_config.m == 0 and parameters.vectors["dense"].hnsw_config is None
    assert parameters.vectors["dense"].quantization_config.scalar.type == "int8"
    alone = kd.QdrantIndex.build(sources["tokens"], tmp_path / "alone")
    assert alone.client.get_collection("documents").config.params.vectors["tokens"].hnsw_config is None
    assert len(alone.search({"q": "cat"}, 3)["q"]) == 3


@BERT_DOT
def test_qdrant_uploads_in_parallel_and_resumes_with_what_is_missing(store, queries, monkeypatch, waits):
    client = qdrant_index.QdrantClient(":memory:")
    monkeypatch.setattr(qdrant_index, "_connect", lambda path, url: client)
    real, started, lock, meeting = client.upsert, [], Lock(), Barrier(3, timeout=30)
    refused = set()

    def upsert(name, points, **options):
        first = points[0].id
        if first not in started and not refused and first < 15:
            started.append(first)
            meeting.wait()  # passes only if three requests run at the same time
        started.append(first)
        if first in refused:
            raise qdrant_index.ResponseHandlingException(ConnectionResetError("reset by peer"))
        with lock:
            return real(name, points, **options)

    monkeypatch.setattr(client, "upsert", upsert)
    refused.add(10)
    settings = {"url": "http://server", "batch_size": 5, "parallel": 3}
    with pytest.raises(ConnectionError, match="the same call resumes there"):
        kd.QdrantIndex.build(store, **settings)
    refused.clear()
    missing = sorted(set(range(0, 41, 5)) - {p.id for p in client.scroll("documents", limit=99)[0]})
    assert 10 in missing and 0 not in missing and len(missing) < 9
    started[:] = range(41)
    kd.QdrantIndex.build(store, **settings)
    assert sorted(started[41:]) == missing
    index = kd.QdrantIndex.build(store, **settings)  # uploads nothing
    assert len(started) == 41 + len(missing)
    assert_same(index.search(queries, 50), kd.DenseIndex.build(store).search(queries, 50))
    client.delete_collection("documents")
    started.clear()
    kd.QdrantIndex.build(store, **settings)  # three at the same time


def copy(source: Path, target: Path) -> Path:
    """Copy an embedded database whose client is still open and holds its lock."""
    return Path(shutil.copytree(source, target, ignore=shutil.ignore_patterns(".lock")))


@BERT_DOT
def test_qdrant_refuses_what_it_cannot_open(ranker, store, make_texts, tmp_path, other_ranker, waits, monkeypatch):
    with pytest.raises(ValueError, match="either a path"):
        kd.QdrantIndex.open(ranker=ranker)
    with pytest.raises(FileNotFoundError, match="no Qdrant collection 'docs'"):
        kd.QdrantIndex.open(tmp_path / "empty", ranker, name="docs")
    index = kd.QdrantIndex.build(store, tmp_path / "db", name="docs")
    with pytest.raises(ValueError, match="already accessed by another instance"):
        kd.QdrantIndex.open(tmp_path / "db", ranker, name="docs")
    index.close()
    with pytest.raises(ValueError, match="another model"):
        kd.QdrantIndex.open(copy(tmp_path / "db", tmp_path / "copy"), other_ranker, name="docs")
    with pytest.raises(ValueError, match="The ranker that made the vectors in the Qdrant collection 'docs'"):
        kd.QdrantIndex.open(copy(tmp_path / "db", tmp_path / "copy3"), name="docs")
    few = kd.VectorStore.build(ranker, make_texts(("a", "cat"), ("b", "dog")), tmp_path / "few")
    with pytest.raises(ValueError, match=r"has other documents \(41, here 2\)"):
        kd.QdrantIndex.build(few, copy(tmp_path / "db", tmp_path / "copy2"), name="docs")
    monkeypatch.setenv(qdrant_index.API_KEY, "a secret")
    with pytest.raises(ConnectionError, match="did not answer 6 times") as caught:
        kd.QdrantIndex.open(ranker=ranker, url="http://127.0.0.1:9")
    assert waits == [1, 2, 4, 8, 16]
    assert "secret" not in str(caught.value)


@SPLADE
def test_qdrant_refuses_vectors_that_do_not_belong_together(
    sources, store, documents, make_texts, tokenizer, tmp_path
):
    few = make_texts(("a", "cat"))
    with pytest.raises(ValueError, match=r"these have different ones: splade: .*, words: "):
        kd.QdrantIndex.build({"splade": store, "words": few}, tmp_path / "db")
    with pytest.raises(ValueError, match=r"Settings are for vectors that are uploaded.*settings for dens among words"):
        kd.QdrantIndex.build(sources, tmp_path / "db", vectors={"dens": {}})
    index = kd.QdrantIndex.build(sources, tmp_path / "db")
    with pytest.raises(ValueError, match=r"has no 'bm25' whose ranker is given; it has words, splade, dense, tokens"):
        index.search({"q": "cat"}, using="bm25")
    index.close()
    rankers = {"splade": store.ranker, "dense": sources["dense"].ranker}
    model = deepcopy(store.ranker.model)
    model.resize_token_embeddings(50)
    cases = [
        ({"splade": kd.Ranker(model, tokenizer)}, "documents/splade was built by another model"),
        ({"words": store.ranker}, "has no vectors 'words', only splade, dense, tokens"),
        (store.ranker, "has splade, dense, tokens; give name -> ranker"),
    ]
    for place, (given, message) in enumerate(cases):
        with pytest.raises(ValueError, match=message):
            kd.QdrantIndex.open(copy(tmp_path / "db", tmp_path / f"copy{place}"), given)
    with pytest.raises(ValueError, match=r"ids: .*, Qdrant 'documents': .*open what was built from these texts"):
        kd.QdrantIndex.open(copy(tmp_path / "db", tmp_path / "copy_ids"), rankers, ids=few)
    with pytest.raises(ValueError, match=r"has other language \(english, here None\)"):
        kd.QdrantIndex.build({**sources, "words": documents}, copy(tmp_path / "db", tmp_path / "copy_words"))
    opened = kd.QdrantIndex.open(tmp_path / "db", rankers, ids=documents)
    assert opened.search({"q": "cat"}, only=["d ü 7"])["q"][0][0] == "d ü 7"
    opened.close()
    words = kd.QdrantIndex.open(tmp_path / "db")  # BM25 needs no ranker
    assert words.search({"q": "cat"}, 5)["q"]
