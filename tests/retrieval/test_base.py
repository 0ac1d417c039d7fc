"""`open_index` opens what a folder contains, refuses what nothing reads, and writers exclude one another."""

import re

import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.artifacts import locked, write_description
from hf_kd_ranking.retrieval.base import model_identity, open_index

BERT_DOT = pytest.mark.parametrize("model", ["bert_dot"], indirect=True)


def refused(message: str, **arguments) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        open_index(**arguments)


def test_open_index_of_bm25_takes_no_ranker(documents, queries, tmp_path):
    index = kd.BM25Index.build(documents, tmp_path / "bm25")
    assert open_index(tmp_path / "bm25").search(queries, 5) == index.search(queries, 5)
    for name, option in {"exact": True, "settings": "nprobe=2", "probes": 2}.items():
        refused(f"--{name} is for ", folder=tmp_path / "bm25", **{name: option})
    with pytest.raises(FileNotFoundError, match=r"artifact\.json does not exist"):
        open_index(tmp_path / "nothing")


@BERT_DOT
def test_open_index_of_dense_vectors(ranker, store, queries, other_ranker, tmp_path):
    folder, exact = store.folder, kd.DenseIndex.build(store).search(queries, 5)
    assert open_index(folder, ranker).search(queries, 5) == exact
    refused("--settings is for a faiss index (index --factory)", folder=folder, ranker=ranker, settings="nprobe=2")
    index = kd.DenseIndex.build(store, folder / "dense", factory="IVF8,Flat")
    assert open_index(folder, ranker).search(queries, 5) == index.search(queries, 5) != exact
    assert open_index(folder / "dense", ranker).search(queries, 5) == index.search(queries, 5)
    tuned = open_index(folder, ranker, settings="nprobe=8").search(queries, 5)
    for query_id, ranking in exact.items():
        assert dict(tuned[query_id]) == pytest.approx(dict(ranking), abs=1e-5)
    assert open_index(folder, ranker, exact=True).search(queries, 5) == exact
    refused("--exact compares every document", folder=folder, ranker=ranker, exact=True, settings="nprobe=2")
    refused("is an index of kind dense, needed vectors", folder=folder / "dense", ranker=ranker, exact=True)
    refused("--probes is for a ColBERT index with centroids", folder=folder, ranker=ranker, probes=2)
    refused("give the ranker (--model) that made them", folder=folder)
    refused("another model", folder=folder, ranker=other_ranker)


@BERT_DOT
def test_open_index_refuses_an_index_of_older_vectors(ranker, documents, store):
    kd.DenseIndex.build(store, store.folder / "dense")
    kd.VectorStore.build(ranker, documents, store.folder, "float16", overwrite=True)
    refused("dense was built from an earlier version of the vectors", folder=store.folder, ranker=ranker)
    assert len(open_index(store.folder, ranker, exact=True)) == 41


@BERT_DOT
def test_a_description_of_something_else_is_not_an_index(ranker, documents, tmp_path):
    write_description(tmp_path, {"teacher": "of a step of `distill`"})
    for given in (None, ranker):
        refused("is an index of kind None, needed", folder=tmp_path, ranker=given)
    with pytest.raises(FileExistsError, match="to replace a bm25 index"):
        kd.BM25Index.build(documents).save(tmp_path, overwrite=True)


@pytest.mark.parametrize("model", ["colbert"], indirect=True)
def test_open_index_of_token_vectors(ranker, store, queries):
    folder, exact = store.folder, kd.ColBERTIndex.build(store).search(queries, 5)
    refused("--probes is for a ColBERT index with centroids", folder=folder, ranker=ranker, probes=2)
    index = kd.ColBERTIndex.build(store, centroids=8)
    assert open_index(folder, ranker).search(queries, 5) == exact
    assert open_index(folder, ranker, exact=True).search(queries, 5) == exact
    probed = index.search(queries, 5, probes=1, candidates=256)
    opened = open_index(folder, ranker, probes=1)
    assert (opened.probes, opened.search(queries, 5)) == (1, probed)
    refused("--settings is for a faiss index", folder=folder, ranker=ranker, settings="nprobe=2")
    refused("--exact compares every document", folder=folder, ranker=ranker, exact=True, probes=2)


@pytest.mark.parametrize("model", ["prettr", "tk"], indirect=True)
def test_open_index_refuses_rankers_that_only_rerank(ranker, store):
    refused("similarity layers); use StoredReranker (--candidates)", folder=store.folder, ranker=ranker)


@pytest.mark.parametrize("model", ["bert_dot", "colbert", "tk"], indirect=True)
@pytest.mark.parametrize("index", ["DenseIndex", "ColBERTIndex", "QdrantIndex"])
def test_indexes_compare_what_a_config_declares(ranker, store, index, tmp_path):
    build, form = getattr(kd, index).build, (ranker.model.config.vectors_per_text, ranker.model.config.similarity)
    arguments = (store, tmp_path / "db") if index == "QdrantIndex" else (store,)
    forms = {"DenseIndex": [("one", "dot")], "ColBERTIndex": [("per_token", "max_sim")]}
    if form in forms.get(index, [("one", "dot"), ("per_token", "max_sim")]):
        assert len(build(*arguments)) == 41
    else:
        with pytest.raises(ValueError, match=rf"{index} cannot search .*similarity {form[1]}\); use \w+"):
            build(*arguments)


@BERT_DOT
def test_capabilities_decide_and_not_the_architecture(ranker, store, monkeypatch):
    monkeypatch.setattr(type(ranker.model.config), "vectors_per_text", "sparse")
    with pytest.raises(ValueError, match="vectors per text sparse, similarity dot"):
        kd.DenseIndex.build(store)
    monkeypatch.setattr(type(ranker.model.config), "vectors_per_text", "one")
    ranker.model.config.model_type = "BERT_New"
    assert len(kd.DenseIndex.build(store)) == 41


@BERT_DOT
def test_stores_opened_without_a_ranker_cannot_search(store, tmp_path):
    without = kd.VectorStore.open(store.folder)
    assert without.description == store.description
    for build in (kd.DenseIndex.build, kd.StoredReranker):
        with pytest.raises(ValueError, match="store was opened without its ranker"):
            build(without)


@BERT_DOT
def test_two_writers_of_an_index_are_refused(ranker, documents, store, tmp_path):
    """One writer at a time, of the index itself and of unfinished work."""
    index = kd.DenseIndex.build(store, tmp_path / "dense")
    with locked(tmp_path / "dense"), pytest.raises(ValueError, match=r"dense is in use by process \d+"):
        index.save(tmp_path / "dense", overwrite=True)
    with locked(tmp_path / "new.parts"), pytest.raises(ValueError, match=r"new\.parts is in use by process \d+"):
        kd.VectorStore.build(ranker, documents, tmp_path / "new")
    index.save(tmp_path / "dense", overwrite=True)
    assert len(kd.VectorStore.build(ranker, documents, tmp_path / "new")) == 41


@BERT_DOT
def test_save_never_replaces_something_else(documents, store, tmp_path):
    indexes = {"bm25": kd.BM25Index.build(documents), "dense": kd.DenseIndex.build(store)}
    (tmp_path / "mine" / "vendor").mkdir(parents=True)
    for kind, index in indexes.items():
        with pytest.raises(FileExistsError, match="contains vendor, which is not of an index"):
            index.save(tmp_path / "mine", overwrite=True)
        with pytest.raises(FileExistsError, match=f"store exists.*to replace a {kind} index"):
            index.save(store.folder, overwrite=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="file is a file; give a new folder"):
        indexes["bm25"].save(tmp_path / "file", overwrite=True)
    with pytest.raises(FileExistsError, match="contains vendor"):
        store.compress(tmp_path / "mine", "SQ8")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["vendor"]


@pytest.mark.parametrize("model", ["colbert"], indirect=True)
def test_save_refuses_an_index_that_is_saved_where_it_is_built(store, tmp_path):
    for index in (kd.ColBERTIndex.build(store), kd.QdrantIndex.build(store, tmp_path / "db")):
        with pytest.raises(NotImplementedError, match=f"{type(index).__name__} is saved where it is built"):
            index.save(tmp_path / "index")
    assert not (tmp_path / "index").exists()


@BERT_DOT
@pytest.mark.parametrize("kind", ["bm25", "dense"])
def test_an_interrupted_save_leaves_the_old_index(
    documents, store, queries, make_texts, tmp_path, stop_at_write, kind
):
    few = make_texts(("new", "apple"))
    old, new = kd.BM25Index.build(documents), kd.BM25Index.build(few)
    ranker = None
    if kind == "dense":
        ranker = store.ranker
        old = kd.DenseIndex.build(store)
        new = kd.DenseIndex.build(kd.VectorStore.build(ranker, few, tmp_path / "few"))
    folder = tmp_path / "index"
    stop_at_write(1)
    with pytest.raises(KeyboardInterrupt):
        old.save(folder)
    stop_at_write(0)
    old.save(folder)
    opened = type(old).open(folder, ranker)
    stop_at_write(1)
    with pytest.raises(KeyboardInterrupt):
        new.save(folder, overwrite=True)
    assert type(old).open(folder, ranker).search(queries, 3) == old.search(queries, 3)
    stop_at_write(0)
    new.save(folder, overwrite=True)
    assert [doc for doc, _ in type(old).open(folder, ranker).search({"q": "apple"})["q"]] == ["new"]
    assert opened.search(queries, 3) == old.search(queries, 3)  # a reader keeps what it has opened
    assert [path.name for path in folder.glob("v*")] == ["v2"]


@BERT_DOT
def test_model_identity_ignores_the_query_side(ranker, encoder):
    def identity(**settings):
        settings = {"max_query_length": 8, "max_document_length": 16, "initializer_range": 0.5} | settings
        model = kd.BertDot.from_encoder(encoder, **settings)
        return model_identity(kd.Ranker(model, ranker.tokenizer))

    assert identity() == identity(max_query_length=9, query_prefix="query: ")
    for settings in ({"max_document_length": 9}, {"document_prefix": "text: "}, {"pooling": "mean"}):
        assert identity(**settings)["model"] != identity()["model"]


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_search_for_nothing_is_empty_and_for_no_text_refused(documents, store):
    for index in (kd.BM25Index.build(documents), kd.DenseIndex.build(store)):
        assert index.search({}) == {}
        with pytest.raises(TypeError, match="Queries are a dictionary, query_id -> text, got str"):
            index.search("cat")
        for query in (None, float("nan"), ["cat"]):
            with pytest.raises(TypeError, match=f"A query is a str, got {type(query).__name__}"):
                index.search({"q": "cat", "r": query})


@pytest.mark.parametrize("model", ["bert_dot", "colbert"], indirect=True)
def test_every_index_knows_its_collection(ranker, documents, store, tmp_path):
    kd.BM25Index.build(documents, tmp_path / "bm25")
    kd.QdrantIndex.build(store, tmp_path / "db").close()
    opened = [kd.BM25Index.open(tmp_path / "bm25"), kd.VectorStore.open(tmp_path / "store")]
    opened.append(kd.QdrantIndex.open(tmp_path / "db", ranker))
    if store.has_token_vectors:
        opened.append(kd.ColBERTIndex.open(tmp_path / "store", ranker))
    else:
        kd.DenseIndex.build(store, tmp_path / "dense")
        opened.append(kd.DenseIndex.open(tmp_path / "dense", ranker))
    for index in opened:
        assert index.collection == documents.collection
