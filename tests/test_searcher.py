"""Pipelines: hand-computed sums, the same results after saving, and folders that do not belong together."""

import json
import shutil
from itertools import pairwise

import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.errors import InputError
from hf_kd_ranking.interop.onnx import OnnxRanker
from hf_kd_ranking.retrieval.fusion import fuse_runs
from hf_kd_ranking.searcher import Pipeline, combine, load_pipeline, save_pipeline

CANDIDATES = [("a", 9.0), ("b", 7.0), ("c", 5.0), ("d", 3.0), ("e", 1.0)]
SCORES = {"a": -1.0, "b": 3.0, "c": 1.0}
QUERIES = {"1": "the apple and bread", "2": "moon night", "3": "zzz", "4": ""}


@pytest.fixture
def documents(toy) -> kd.TextStore:
    return kd.TextStore.from_tsv(toy / "collection.tsv")


@pytest.fixture
def bm25(documents) -> kd.BM25Index:
    return kd.BM25Index.build(documents)


@pytest.fixture
def ranker(model, tokenizer) -> kd.Ranker:
    return kd.Ranker(model, tokenizer)


@pytest.fixture
def store(ranker, documents, tmp_path) -> kd.VectorStore:
    return kd.VectorStore.build(ranker, documents, tmp_path / "store")


@pytest.fixture
def other(tmp_path) -> kd.TextStore:
    """Another collection."""
    (tmp_path / "other.tsv").write_text("1\tapple\n2\tbread\n")
    return kd.TextStore.from_tsv(tmp_path / "other.tsv")


# ---- The sum --------------------------------------------------------------------------------------------------------


def test_combine_equals_hand_computed_sums():
    # Of the first three: the ranker's -1, 3, 1 are 0, 1, 1/2; the first stage's 9, 7, 5 are 1, 1/2, 0.
    ranking = combine(CANDIDATES, SCORES, 3, 0.25)
    expected = [("b", 0.75 + 0.125), ("c", 0.375), ("a", 0.25), ("d", 0.25 - 1), ("e", 0.25 - 2)]
    assert ranking == expected
    assert combine(CANDIDATES[:3], SCORES, 3, 1.0) == [("a", 1.0), ("b", 0.5), ("c", 0.0)]


def test_combine_without_weight_keeps_the_rankers_scores():
    assert combine(CANDIDATES, SCORES, 3, 0) == [("b", 3.0), ("c", 1.0), ("a", -1.0), ("d", -2.0), ("e", -3.0)]
    assert combine(CANDIDATES, dict.fromkeys("abcde", 2.0), 9, 0) == [(doc_id, 2.0) for doc_id in "abcde"]
    assert combine(CANDIDATES[:2], {"a": 1.0}, 1, 0) == [("a", 1.0), ("b", 0.0)]
    assert combine([], {}, 3, 0) == combine([], {}, 3, 0.5) == []


def test_combine_scales_as_weighted_sums_of_runs():
    run = fuse_runs([kd.Run({"q": list(SCORES.items())}), kd.Run({"q": CANDIDATES[:3]})], "weighted_sum", [0.75, 0.25])
    assert combine(CANDIDATES[:3], SCORES, 3, 0.25) == run["q"]
    equal = [("a", 4.0), ("b", 4.0)]  # gives 1 to both
    assert combine(equal, {"a": 0.0, "b": 2.0}, 2, 0.5) == [("b", 1.0), ("a", 0.5)]


def test_combine_needs_the_score_of_every_candidate_within_the_depth():
    with pytest.raises(KeyError, match="d"):
        combine(CANDIDATES, SCORES, 4, 0)


# ---- Search ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["bert_cat", "bert_dot"], indirect=True)
@pytest.mark.parametrize("weight", [0, 0.3])
def test_search_reranks_the_first_candidates(ranker, documents, bm25, weight):
    pipeline = Pipeline(documents, bm25, ranker, depth=4, weight=weight)
    first = bm25.search(QUERIES, 7)["1"]
    doc_ids = [doc_id for doc_id, _ in first[:4]]
    scores = dict(zip(doc_ids, ranker.score(QUERIES["1"], documents[doc_ids]).tolist(), strict=True))
    found = pipeline.search(QUERIES["1"], 7)
    expected = combine(first, scores, 4, weight)
    assert [doc_id for doc_id, _ in found] == [doc_id for doc_id, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-5)
    assert [doc_id for doc_id, _ in found[4:]] == [doc_id for doc_id, _ in first[4:]]
    assert all(better[1] >= worse[1] for better, worse in pairwise(found))
    assert_equal_runs(pipeline.search_run(QUERIES, 2), pipeline.search_run(QUERIES, 7).top(2))
    given = pipeline.rerank(kd.Run({"1": first, "2": []}), QUERIES)
    assert_equal_runs(given, {"1": found, "2": []})


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_depth_and_k_may_exceed_the_collection(ranker, documents, bm25, store):
    pipeline = Pipeline(documents, bm25, ranker, depth=1_000, store=store)
    everything = bm25.search(QUERIES, 40)["1"]
    assert sorted(doc_id for doc_id, _ in pipeline.search(QUERIES["1"], 500)) == sorted(d for d, _ in everything)
    index = kd.DenseIndex.build(store)
    assert len(Pipeline(documents, None, ranker, 1_000, store=store, index=index).search("apple", 500)) == 40


@pytest.mark.parametrize("model", ["bert_dot", "colbert"], indirect=True)
def test_index_search_adds_the_scores_of_bm25(ranker, documents, bm25, store):
    index = (kd.DenseIndex if store.offsets is None else kd.ColBERTIndex).build(store)
    alone = Pipeline(documents, None, ranker, depth=5, store=store, index=index)
    assert alone.purpose == "search"
    found, expected = alone.search(QUERIES["1"], 8), index.search(QUERIES, 8)["1"]
    assert [doc_id for doc_id, _ in found] == [doc_id for doc_id, _ in expected]
    # A query that is encoded with others differs in the last digits.
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], rel=1e-5)
    fused = Pipeline(documents, bm25, ranker, 5, 0.4, store, index)
    runs = [index.search(QUERIES, 5), bm25.search(QUERIES, 5)]
    assert fused.search_run(QUERIES, 8) == fuse_runs(runs, "weighted_sum", [0.6, 0.4]).top(8)


def test_queries_without_a_known_word_find_nothing(bm25):
    pipeline = Pipeline(first_stage=bm25)
    assert pipeline.search("") == pipeline.search("zzz") == []
    assert pipeline.search("apple zzz", 3) == bm25.search({"q": "apple"}, 3)["q"]
    assert pipeline.rerank(kd.Run({"1": CANDIDATES}), QUERIES) == {"1": CANDIDATES}


@pytest.mark.parametrize("model", ["tk"], indirect=True)
def test_wrong_arguments_are_refused(ranker, documents, bm25, store):
    with pytest.raises(TypeError, match="A query is a str, got list"):
        Pipeline(first_stage=bm25).search(["apple"])
    with pytest.raises(ValueError, match="k must be at least 1"):
        Pipeline(first_stage=bm25).search("apple", 0)
    with pytest.raises(ValueError, match="no first stage that finds candidates; give yours to rerank"):
        Pipeline(documents, None, ranker).search("apple")
    for parts, message in [
        ({}, "needs a first stage, a ranker, or both"),
        ({"first_stage": bm25, "depth": 0}, "at least 1; got 0"),
        ({"first_stage": bm25, "weight": 1.5}, "from 0 to 1, got 1.5"),
        ({"first_stage": bm25, "store": store}, "need the Ranker that made the vectors"),
        ({"first_stage": bm25, "ranker": ranker}, "needs the texts of the documents, or their stored vectors"),
        ({"ranker": ranker, "store": store, "index": bm25, "weight": 0.5}, "could have the weight 0.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            Pipeline(**parts)


# ---- Folders --------------------------------------------------------------------------------------------------------


def assert_saved_equals(pipeline: Pipeline, folder) -> Pipeline:
    """Save and load a pipeline, compare their results, and those of many queries with those of one."""
    save_pipeline(folder, pipeline)
    loaded = load_pipeline(folder, "cpu")
    assert (loaded.depth, loaded.weight, loaded.description) == (pipeline.depth, pipeline.weight, pipeline.description)
    run = pipeline.search_run(QUERIES, 12)
    assert_equal_runs(loaded.search_run(QUERIES, 12), run)
    assert_equal_runs({query_id: loaded.search(query, 12) for query_id, query in QUERIES.items()}, run)
    assert run["1"]
    return loaded


def assert_equal_runs(found, expected) -> None:
    assert found.keys() == expected.keys()
    for query_id, ranking in expected.items():
        assert [doc_id for doc_id, _ in found[query_id]] == [doc_id for doc_id, _ in ranking]
        assert [score for _, score in found[query_id]] == pytest.approx([score for _, score in ranking], abs=1e-5)


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_pipeline_with_stored_vectors_is_saved(ranker, documents, bm25, store, tmp_path):
    pipeline = Pipeline(documents, bm25, ranker, 6, 0.3, store, description={"nDCG@10": 0.5})
    loaded = assert_saved_equals(pipeline, tmp_path / "best")
    assert isinstance(loaded.store, kd.VectorStore) and loaded.index is None
    names = {path.name for path in (tmp_path / "best").iterdir()}
    assert names == {"pipeline.json", "ranker", "first_stage", "vectors", "documents"}
    saved = json.loads((tmp_path / "best" / "pipeline.json").read_text())
    assert (saved["kind"], saved["purpose"], saved["precision"]) == ("pipeline", "rerank", "float32")
    assert saved["collection"] == documents.fingerprint() == saved["parts"]["documents"]
    assert str(tmp_path) not in (tmp_path / "best" / "documents" / "store.json").read_text()


@pytest.mark.parametrize("model", ["bert_cat"], indirect=True)
def test_pipeline_from_texts_is_saved_with_its_card(ranker, documents, bm25, tmp_path):
    checkpoint = tmp_path / "trained"
    ranker.save_pretrained(checkpoint)
    for name in ("README.md", "manifest.json", "training_args.bin", "checkpoint-3/optimizer.pt"):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text("{}")
    pipeline = Pipeline(documents, bm25, ranker, 6)
    assert_saved_equals(pipeline, tmp_path / "plain")
    save_pipeline(tmp_path / "best", pipeline, checkpoint)
    files = {path.name for path in (tmp_path / "best" / "ranker").iterdir()}
    assert {"README.md", "manifest.json", "config.json", "model.safetensors", "tokenizer.json"} <= files
    assert not files & {"training_args.bin", "checkpoint-3"}
    assert_equal_runs(load_pipeline(tmp_path / "best").search_run(QUERIES), pipeline.search_run(QUERIES))


def test_pipeline_of_bm25_alone_is_saved(bm25, tmp_path):
    loaded = assert_saved_equals(Pipeline(first_stage=bm25), tmp_path / "best")
    assert loaded.ranker is None and loaded.documents is None


@pytest.mark.parametrize("model", ["bert_dot", "colbert"], indirect=True)
@pytest.mark.parametrize("weight", [0, 0.4])
def test_pipeline_that_searches_is_saved(ranker, documents, bm25, store, tmp_path, weight):
    if store.has_token_vectors:
        index = kd.ColBERTIndex.build(store, centroids=4)
        index.probes = 2
    else:
        index = kd.DenseIndex.build(store, factory="IVF4,Flat")
        index.tune("nprobe=2")
    loaded = assert_saved_equals(Pipeline(documents, bm25, ranker, 6, weight, store, index), tmp_path / "best")
    if store.has_token_vectors:
        assert loaded.index.probes == 2 and loaded.store is loaded.index.store
    else:
        assert loaded.index.index.nprobe == 2 and (tmp_path / "best" / "vectors" / "dense").is_dir()
    exact = type(index).build(kd.VectorStore.open(store.folder, ranker))
    assert_saved_equals(Pipeline(documents, bm25, ranker, 6, weight, store, exact), tmp_path / "exact")


@pytest.mark.parametrize("model", ["bert_cat"], indirect=True)
def test_pipeline_in_int8_is_saved(ranker, documents, bm25, tmp_path):
    pytest.importorskip("onnxruntime")
    ranker.save_pretrained(tmp_path / "ranker")
    (tmp_path / "ranker" / "README.md").write_text("card")
    kd.export_ranker(tmp_path / "ranker", "onnx-int8", tmp_path / "int8")
    pipeline = Pipeline(documents, bm25, OnnxRanker(tmp_path / "int8", threads=1), 6)
    loaded = assert_saved_equals(pipeline, tmp_path / "best")
    assert isinstance(loaded.ranker, OnnxRanker)
    save_pipeline(tmp_path / "best", loaded, tmp_path / "ranker", overwrite=True)
    assert (tmp_path / "best" / "ranker" / "README.md").read_text() == "card"


def test_only_a_pipeline_is_replaced(bm25, tmp_path):
    save_pipeline(tmp_path / "best", Pipeline(first_stage=bm25, depth=3))
    with pytest.raises(FileExistsError, match="best exists; give a new folder, or overwrite=True"):
        save_pipeline(tmp_path / "best", Pipeline(first_stage=bm25))
    save_pipeline(tmp_path / "best", load_pipeline(tmp_path / "best"), overwrite=True)
    assert load_pipeline(tmp_path / "best").depth == 3
    (tmp_path / "mine").mkdir()
    save_pipeline(tmp_path / "mine", Pipeline(first_stage=bm25))
    (tmp_path / "mine" / "pipeline.json").unlink()
    with pytest.raises(FileExistsError, match="mine exists"):
        save_pipeline(tmp_path / "mine", Pipeline(first_stage=bm25), overwrite=True)


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_parts_of_other_collections_are_refused(ranker, documents, bm25, other, store):
    index, other_bm25 = kd.DenseIndex.build(store), kd.BM25Index.build(other)
    for parts in (
        {"documents": documents, "first_stage": other_bm25, "ranker": ranker},
        {"first_stage": other_bm25, "ranker": ranker, "store": store},
        {"first_stage": other_bm25, "ranker": ranker, "index": index},
    ):
        with pytest.raises(InputError, match=r"these have different ones: .*fingerprint .*fingerprint") as error:
            Pipeline(**parts)
        assert "collection.tsv" in str(error.value)
        assert "other.tsv" in str(error.value)
    for part in ({"store": store}, {"index": index}, {"store": store, "index": index}):
        with pytest.raises(InputError, match=r"documents: other\.tsv .*collection\.tsv"):
            Pipeline(other, None, ranker, **part)
        Pipeline(documents, bm25, ranker, **part)


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_a_dense_index_that_grew_has_the_texts_that_it_was_given(ranker, documents, other, store, tmp_path):
    (tmp_path / "more.tsv").write_text("new\tmoon\n")
    lines = "".join(f"{doc_id}\t{text}\n" for doc_id, text in documents.items())
    (tmp_path / "all.tsv").write_text(lines + "new\tmoon\n")
    more, both = (kd.TextStore.from_tsv(tmp_path / f"{name}.tsv") for name in ("more", "all"))
    added = kd.VectorStore.build(ranker, more, tmp_path / "added")
    for texts, refused in ((None, both), (both, documents)):
        index = kd.DenseIndex.build(store)
        index.add(added, texts)
        index.remove(["new"])
        index.save(tmp_path / "dense", overwrite=True)
        opened = kd.DenseIndex.open(tmp_path / "dense", ranker)
        with pytest.raises(InputError, match="these have different ones"):
            Pipeline(refused, None, ranker, index=opened)
    Pipeline(both, None, ranker, index=opened)
    with pytest.raises(InputError, match=r"1 of 1 ids are not among the .* texts of"):
        kd.DenseIndex.build(store).add(added, documents)


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_parts_that_cannot_be_saved_are_refused(ranker, store, tmp_path):
    index = kd.DenseIndex.build(store)
    with pytest.raises(ValueError, match="a BM25Index as its first stage, got a DenseIndex"):
        save_pipeline(tmp_path / "best", Pipeline(first_stage=index))
    with pytest.raises(ValueError, match="the vectors of its index; give the store"):
        save_pipeline(tmp_path / "best", Pipeline(ranker=ranker, index=index))
    assert not (tmp_path / "best").exists()


def edit(folder, **values) -> None:
    path = folder / "pipeline.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def replace_documents(folder, other, ranker) -> None:
    shutil.rmtree(folder / "documents")
    other.save(folder / "documents")


def replace_first_stage(folder, other, ranker) -> None:
    shutil.rmtree(folder / "first_stage")
    kd.BM25Index.build(other, folder / "first_stage")


def replace_ranker(folder, other, ranker) -> None:
    ranker.model.config.max_query_length += 1
    ranker.save_pretrained(folder / "ranker")


DAMAGES = {
    "no file": (
        lambda folder, *_: (folder / "pipeline.json").unlink(),
        "has no pipeline.json, so it is not a pipeline",
    ),
    "half a file": (lambda folder, *_: (folder / "pipeline.json").write_text('{"kind"'), "pipeline.json is damaged"),
    "a list": (lambda folder, *_: (folder / "pipeline.json").write_text("[1]"), "pipeline.json is damaged"),
    "no depth": (
        lambda folder, *_: (folder / "pipeline.json").write_text('{"kind": "pipeline", "version": 1}'),
        "damaged: it lacks purpose, depth",
    ),
    "a new version": (lambda folder, *_: edit(folder, version=2), r"version 2; this release .* version 1"),
    "a missing part": (lambda folder, *_: shutil.rmtree(folder / "ranker"), "ranker is missing"),
    "other texts": (replace_documents, "documents is not the part that the pipeline was saved with"),
    "another first stage": (replace_first_stage, "first_stage is not the part"),
    "another ranker": (replace_ranker, "ranker is not the part"),
}


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES.keys())
def test_foreign_and_damaged_folders_are_refused_in_one_line(ranker, documents, bm25, other, tmp_path, damage, words):
    save_pipeline(tmp_path / "best", Pipeline(documents, bm25, ranker))
    damage(tmp_path / "best", other, ranker)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        load_pipeline(tmp_path / "best")
    assert "\n" not in str(caught.value)
