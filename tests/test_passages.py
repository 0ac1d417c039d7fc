"""A collection of passages in everything that ranks: passages are scored, documents are answered."""

import json

import numpy as np
import pytest
from starlette.testclient import TestClient

import hf_kd_ranking as kd
from hf_kd_ranking.data.passages import split_documents, to_documents
from hf_kd_ranking.data.runs import write_qrels
from hf_kd_ranking.errors import UnknownIdError
from hf_kd_ranking.evaluation.rerank import rerank_run
from hf_kd_ranking.models import tokenization
from hf_kd_ranking.retrieval.base import INDEX_NAMES
from hf_kd_ranking.retrieval.fusion import fuse_runs
from hf_kd_ranking.searcher import Pipeline, load_pipeline, save_pipeline
from hf_kd_ranking.serving.app import make_app
from hf_kd_ranking.serving.model import ServedModel
from hf_kd_ranking.serving.search import SearchEngine
from hf_kd_ranking.serving.service import Service
from hf_kd_ranking.teachers.load import Teacher


@pytest.fixture
def whole(toy) -> kd.TextStore:
    """40 documents of 2 to 12 tokens."""
    return kd.TextStore.from_tsv(toy / "collection.tsv")


@pytest.fixture
def split(whole, tokenizer, tmp_path) -> kd.TextStore:
    """The same in passages of 5 tokens, so that about a third is not split."""
    return split_documents(whole, tokenizer, "5/3", tmp_path / "split")


@pytest.fixture
def queries(toy) -> dict[str, str]:
    return dict(kd.TextStore.from_tsv(toy / "queries.tsv").items())


@pytest.fixture
def candidates(toy) -> kd.Run:
    return kd.read_run(toy / "candidates.trec")


@pytest.fixture
def ranker(model, tokenizer) -> kd.Ranker:
    return kd.Ranker(model, tokenizer)


def scores_of(run: kd.Run) -> dict[tuple[str, str], float]:
    return {(query_id, doc_id): score for query_id, ranking in run.items() for doc_id, score in ranking}


def by_hand(ranker: kd.Ranker, split: kd.TextStore, query: str, aggregation: str = "max") -> dict[str, float]:
    """Score every passage, and aggregate by document."""
    scores: dict[str, list[float]] = {}
    for passage_id, text in split.items():
        scores.setdefault(passage_id.partition("#")[0], []).append(float(ranker.score([query], [text])[0]))
    if aggregation == "first":
        return {doc_id: values[0] for doc_id, values in scores.items()}
    count = {"max": 1, "mean_top3": 3}[aggregation]
    return {doc_id: float(np.mean(sorted(values)[-count:])) for doc_id, values in scores.items()}


# ---- Every architecture ---------------------------------------------------------------------------------------------


def test_documents_of_one_passage_keep_their_scores(ranker, whole, split, toy, candidates):
    texts = kd.TextStore.from_tsv(toy / "queries.tsv")
    before = scores_of(rerank_run(ranker, candidates, texts, whole))
    after = scores_of(rerank_run(ranker, candidates, texts, split))
    assert after.keys() == before.keys()
    kept = {pair for pair in before if pair[1] in split}
    assert 5 < len(kept) < len(before) - 5
    for pair in kept:
        assert after[pair] == pytest.approx(before[pair], abs=1e-5)


def test_stored_vectors_rank_documents_as_texts_do(ranker, split, toy, candidates, tmp_path):
    texts = kd.TextStore.from_tsv(toy / "queries.tsv")
    wanted = scores_of(rerank_run(ranker, candidates, texts, split))
    if not ranker.model.config.is_storable:
        return
    store = kd.VectorStore.build(ranker, split, tmp_path / "vectors")
    found = scores_of(kd.StoredReranker(kd.VectorStore.open(store.folder, ranker)).rerank(candidates, texts))
    assert found == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("model", ["bert_dot", "colbert", "splade"], indirect=True)
def test_indexes_answer_with_documents_by_their_best_passage(ranker, split, queries, tmp_path):
    config = ranker.model.config
    store = kd.VectorStore.build(ranker, split, tmp_path / "vectors")
    index = getattr(kd, INDEX_NAMES[config.vectors_per_text, config.similarity]).build(store)
    qrels = {query_id: {"3": 1} for query_id in queries}
    evaluator = kd.RetrievalEvaluator(qrels, kd.TextStore.from_tsv(tmp_path / "queries.tsv"), split, k=7)
    runs = {"index": index.search(queries, 7), "evaluator": evaluator.retrieve(ranker)}
    for query_id, text in queries.items():
        wanted = sorted(by_hand(ranker, split, text).values(), reverse=True)[:7]
        for run in runs.values():
            found = [score for _, score in run[query_id]]
            positive = [score for score in wanted if config.vectors_per_text != "sparse" or score > 0]
            assert found[: len(positive)] == pytest.approx(positive, abs=1e-4)
            assert len(dict(run[query_id])) == len(run[query_id])


@pytest.fixture(autouse=True)
def _queries_beside(toy, tmp_path):
    (tmp_path / "queries.tsv").write_text((toy / "queries.tsv").read_text())


# ---- Reranking, BM25, pipelines -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
@pytest.mark.parametrize("aggregation", ["max", "first", "mean_top3"])
def test_reranking_aggregates_all_passages(ranker, whole, tokenizer, toy, tmp_path, candidates, aggregation):
    split = split_documents(whole, tokenizer, "3/2", tmp_path / "short", aggregation)
    texts = kd.TextStore.from_tsv(toy / "queries.tsv")
    run = rerank_run(ranker, candidates, texts, split)
    for query_id, ranking in run.items():
        wanted = by_hand(ranker, split, texts[query_id], aggregation)
        assert dict(ranking) == pytest.approx({doc_id: wanted[doc_id] for doc_id, _ in candidates[query_id]}, abs=1e-5)
        assert [score for _, score in ranking] == sorted(dict(ranking).values(), reverse=True)


def test_bm25_finds_documents_until_there_are_enough(split, queries):
    index = kd.BM25Index.build(split)
    for k in (1, 5, 100):
        for query_id, ranking in index.search(queries, k).items():
            scores: dict[str, float] = {}
            for passage_id, score in index._rank([queries[query_id]], len(index))[0]:
                doc_id = passage_id.partition("#")[0]
                scores[doc_id] = max(score, scores.get(doc_id, 0.0))
            assert [score for _, score in ranking] == pytest.approx(sorted(scores.values(), reverse=True)[:k])
            assert all(scores[doc_id] == score for doc_id, score in ranking)


@pytest.mark.parametrize("model", ["bert_cat", "bert_dot"], indirect=True)
def test_saved_pipeline_ranks_documents_and_the_page_shows_passages(ranker, split, queries, tmp_path):
    config, parts = ranker.model.config, {}
    if config.is_storable:
        parts["store"] = kd.VectorStore.build(ranker, split, tmp_path / "vectors")
    pipelines = [Pipeline(split, kd.BM25Index.build(split), ranker, depth=6, **parts)]
    if config.is_storable:
        index = kd.DenseIndex.build(parts["store"])
        pipelines.append(Pipeline(split, pipelines[0].first_stage, ranker, 6, 0.3, parts["store"], index))
    for place, pipeline in enumerate(pipelines):
        save_pipeline(tmp_path / f"pipeline-{place}", pipeline)
        opened = load_pipeline(tmp_path / f"pipeline-{place}")
        for query_id in ("100", "105"):
            wanted = pipeline.search(queries[query_id], 5)
            assert dict(opened.search(queries[query_id], 5)) == pytest.approx(dict(wanted), abs=1e-5)
            hits = SearchEngine(opened).search(queries[query_id], 5).hits
            assert [hit.doc_id for hit in hits] == [doc_id for doc_id, _ in wanted]
            for hit in hits:
                assert hit.passage_id.partition("#")[0] == hit.doc_id
                assert hit.text == split[hit.passage_id]
                passages = [id_ for id_ in split.ids() if id_.partition("#")[0] == hit.doc_id]
                if place == 0:
                    scores = ranker.score(queries[query_id], split[passages])
                    assert scores[passages.index(hit.passage_id)] == pytest.approx(max(scores), abs=1e-5)
    bm25 = SearchEngine(Pipeline(split, pipelines[0].first_stage)).search(queries["100"], 5).hits
    assert any("#" in hit.passage_id for hit in bm25)


# ---- Teachers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def teacher() -> Teacher:
    """Scores a passage by the places of its letters, whatever the query."""

    def score(queries, documents):
        return np.array([sum(map(ord, text)) % 97 for text in documents], dtype=np.float32)

    return Teacher("letters", score, "letters")


def test_teacher_scores_all_passages_of_candidates(teacher, split, toy, candidates, tmp_path):
    texts = kd.TextStore.from_tsv(toy / "queries.tsv")
    kd.score_teacher(teacher, candidates, texts, split, tmp_path / "run.trec")
    run = kd.read_run(tmp_path / "run.trec")
    for query_id, ranking in run.items():
        passages = {passage_id for passage_id, _ in ranking}
        documents = {doc_id for doc_id, _ in candidates[query_id]}
        assert passages == {passage_id for passage_id in split.ids() if passage_id.partition("#")[0] in documents}
        for passage_id, score in ranking:
            assert score == teacher.score([""], [split[passage_id]])[0]


@pytest.mark.parametrize("suffix", ["tsv", "jsonl"])
def test_teacher_rows_have_the_best_passage_of_each_document(teacher, split, toy, tmp_path, suffix):
    texts = kd.TextStore.from_tsv(toy / "queries.tsv")
    output = tmp_path / f"scored.{suffix}"
    kd.score_teacher(teacher, toy / "scores.tsv", texts, split, output)
    rows = kd.load_teacher_scores(output).rows
    before = kd.load_teacher_scores(toy / "scores.tsv").rows
    for row, given in zip(rows, before, strict=True):
        for passage_id, score, doc_id in zip(row["doc_ids"], row["teacher_scores"], given["doc_ids"], strict=True):
            passages = [id_ for id_ in split.ids() if id_.partition("#")[0] == str(doc_id)]
            scores = teacher.score([""] * len(passages), split[passages])
            assert (str(passage_id), score) == (passages[int(scores.argmax())], scores.max())


# ---- The command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_workflow_from_split_to_measures(call, ranker, toy, tmp_path):
    ranker.save_pretrained(tmp_path / "model")
    make = f"passages --collection {toy}/collection.tsv --model {tmp_path}/model --json --output {tmp_path}"
    status, out, err = call(f"{make}/split --passages 5/3 --aggregation mean_top3")
    result = json.loads(out.splitlines()[-1])
    assert (status, result["documents"]) == (0, 40), err
    assert result["passages"] > 60
    assert call(f"{make}/other --passages 6/3")[0] == 0
    shared = f"--model {tmp_path}/model --queries {toy}/queries.tsv --output {tmp_path}"
    assert call(f"index --model {tmp_path}/model --collection {tmp_path}/split --output {tmp_path}/index")[0] == 0
    reranked = f"rerank {shared}/reranked.trec --collection {tmp_path}/split --candidates {toy}/candidates.trec"
    assert call(reranked)[0] == 0
    stored = f"search {shared}/stored.trec --index {tmp_path}/index --candidates {toy}/candidates.trec"
    assert call(stored)[0] == 0
    runs = [scores_of(kd.read_run(tmp_path / f"{name}.trec")) for name in ("reranked", "stored")]
    assert runs[0] == pytest.approx(runs[1], abs=1e-5)
    assert call(f"search {shared}/found.trec --index {tmp_path}/index --k 9")[0] == 0
    assert {len(ranking) for ranking in kd.read_run(tmp_path / "found.trec").values()} == {9}
    status, out, err = call(f"evaluate --run {tmp_path}/reranked.trec --qrels {toy}/qrels.txt --json")
    assert status == 0, err
    status, _, err = call(f"search {shared}/refused.trec --index {tmp_path}/index --collection {tmp_path}/other")
    assert (status, "6 by 3 tokens (max)" in err, "5 by 3 tokens (mean_top3)" in err) == (2, True, True), err
    status, _, err = call(f"{make}/refused --passages 5/6")
    assert (status, "stride" in err, (tmp_path / "refused").exists()) == (2, True, False)


def test_runs_of_passages_are_measured_by_documents(call, toy, tmp_path):
    passages = {"112": [("7#3", 9.0), ("5#0", 8.0), ("7#1", 7.0), ("5#1", 7.5), ("7#0", 1.0)]}
    kd.write_run(passages, tmp_path / "passages.trec")
    write_qrels({"112": {"5": 1}}, tmp_path / "qrels.txt")
    values = {}
    for aggregation in ("max", "first", "mean_top3"):
        options = f"--run {tmp_path}/passages.trec --qrels {tmp_path}/qrels.txt --measure RR@1 --json"
        status, out, err = call(f"evaluate {options} --aggregation {aggregation}")
        assert status == 0, err
        values[aggregation] = json.loads(out)["passages"]["RR@1"]
    assert values == {"max": 0.0, "first": 1.0, "mean_top3": 1.0}
    assert call(f"evaluate {options} --aggregation sum")[0] == 2
    assert [doc_id for doc_id, _ in to_documents(passages["112"])] == ["7", "5"]


def test_triples_of_passages_take_the_teachers_best(call, teacher, split, toy, candidates, tmp_path):
    texts = kd.TextStore.from_tsv(toy / "queries.tsv")
    kd.score_teacher(teacher, candidates, texts, split, tmp_path / "teacher.trec")
    options = f"--candidates {toy}/candidates.trec --qrels {toy}/qrels.txt --collection {split.folder}"
    sample = f"teacher triples {options} --relative-margin 9 --output {tmp_path}/rows.tsv"
    status, _, err = call(sample)
    assert (status, "--scores" in err) == (2, True)
    status, _, err = call(f"{sample} --scores {tmp_path}/teacher.trec")
    assert status == 0, err
    qrels, run = kd.read_qrels(toy / "qrels.txt"), kd.read_run(tmp_path / "teacher.trec")
    rows = kd.load_teacher_scores(tmp_path / "rows.tsv").rows
    assert len(rows) > 1
    for row in rows:
        ranking = run[str(row["query_id"])]
        for place, passage_id in enumerate(map(str, row["doc_ids"])):
            doc_id = passage_id.partition("#")[0]
            assert (doc_id in qrels[str(row["query_id"])]) == (place == 0)
            best = next(id_ for id_, _ in ranking if id_.partition("#")[0] == doc_id)
            assert passage_id == best


# ---- What is cut ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_verbs_say_how_much_is_cut(call, ranker, split, toy, tmp_path, caplog):
    ranker.model.config.max_document_length = 7  # 5 tokens of a text
    ranker.save_pretrained(tmp_path / "model")
    counts = np.array([len(text.split()) for text in kd.TextStore.from_tsv(toy / "collection.tsv").texts.to_pylist()])
    wanted = {"cut_texts": (counts > 5).mean(), "cut_tokens": (counts - 5).clip(0).sum() / (counts + 2).sum()}
    for collection, expected in ((toy / "collection.tsv", wanted), (split.folder, dict.fromkeys(wanted, 0.0))):
        caplog.clear()
        output = f"{tmp_path}/index-{collection.name}"
        status, out, err = call(f"index --model {tmp_path}/model --collection {collection} --output {output} --json")
        assert status == 0, err
        result = json.loads(out.splitlines()[-1])
        assert {name: result[name] for name in wanted} == pytest.approx(expected, abs=1e-4)
        assert caplog.text.count("are cut") == int(expected["cut_texts"] > 0.1)
        assert kd.VectorStore.open(output).cuts == pytest.approx(expected, abs=1e-4)
    everything = kd.Run({"100": [(str(doc_id), 0.0) for doc_id in range(40)]})
    kd.write_run(everything, tmp_path / "all.trec")
    files = f"--queries {toy}/queries.tsv --collection {toy}/collection.tsv --candidates {tmp_path}/all.trec --json"
    for verb in ("rerank", "teacher score"):
        caplog.clear()
        tokenization._warn_once.cache_clear()
        output = tmp_path / f"{verb.split()[-1]}.trec"
        status, out, err = call(f"{verb} --model {tmp_path}/model {files} --output {output}")
        assert status == 0, err
        result = json.loads(out.splitlines()[-1])
        assert {name: result[name] for name in wanted} == pytest.approx(wanted, abs=1e-4)
        assert caplog.text.count("are cut") == 1


# ---- Documents that are named by their ids --------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["bert_dot", "splade"], indirect=True)
def test_split_documents_are_chosen_removed_and_added_by_their_id(ranker, whole, split, queries, tmp_path):
    store = kd.VectorStore.build(ranker, split, tmp_path / "vectors")
    name = INDEX_NAMES[ranker.model.config.vectors_per_text, ranker.model.config.similarity]
    index = getattr(kd, name).build(store)
    assert "0#0" in split and "1#0" in split
    qdrant = kd.QdrantIndex.build(store, tmp_path / "qdrant")
    wanted = {query_id: dict(ranking) for query_id, ranking in index.search(queries, 40).items()}
    for searched in (index, qdrant):
        for query_id, ranking in searched.search(queries, 5, only=["0", 1]).items():
            assert set(dict(ranking)) == wanted[query_id].keys() & {"0", "1"}
            assert dict(ranking) == pytest.approx(
                {doc_id: wanted[query_id][doc_id] for doc_id, _ in ranking}, abs=1e-4
            )
        with pytest.raises(UnknownIdError, match="'x'"):
            searched.search(queries, 5, only=["0", "x"])
    with pytest.raises(kd.InputError, match="'0#1' is a passage"):
        index.remove(["3", "0#1"])
    index.remove(["0"])
    assert len(index) == len(split) - sum(id_.startswith("0#") for id_ in split.ids())
    for query_id, ranking in index.search(queries, 40).items():
        assert dict(ranking).keys() == wanted[query_id].keys() - {"0"}
    (tmp_path / "more.tsv").write_text("90\tapple\n")
    more = kd.TextStore.from_tsv(tmp_path / "more.tsv")
    with pytest.raises(kd.InputError, match=r"one aggregation of passages \(max there, None in more.tsv\)"):
        index.add(kd.VectorStore.build(ranker, more, tmp_path / "more"))
    documents = getattr(kd, name).build(kd.VectorStore.build(ranker, whole, tmp_path / "whole"))
    with pytest.raises(kd.InputError, match="one aggregation of passages"):
        documents.add(store)


@pytest.mark.parametrize("model", ["colbert"], indirect=True)
@pytest.mark.parametrize("aggregation", ["first", "mean_top3"])
def test_served_documents_are_scored_by_all_their_passages(ranker, whole, tokenizer, queries, tmp_path, aggregation):
    split = split_documents(whole, tokenizer, "3/2", tmp_path / "short", aggregation)
    store = kd.VectorStore.build(ranker, split, tmp_path / "vectors")
    service = Service(lambda progress: ServedModel("tiny", ranker, store))
    names = ["0", "3", "1#1", "0"]
    body = {"query": queries["100"], "documents": [{"id": name} for name in names], "raw_scores": True}
    with TestClient(make_app(service), base_url="http://localhost") as client:
        while client.get("/health").status_code == 503:
            pass
        results = client.post("/rerank", json=body).json()["results"]
        refused = client.post("/rerank", json=body | {"documents": [{"id": "x"}]})
    scores = by_hand(ranker, split, body["query"], aggregation)
    scores["1#1"] = float(ranker.score([body["query"]], [split["1#1"]])[0])
    assert {result["index"] for result in results} == {0, 1, 2, 3}
    for result in results:
        assert result["relevance_score"] == pytest.approx(scores[names[result["index"]]], abs=1e-4)
    assert (refused.status_code, "'x'" in refused.text) == (422, True)


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_langchain_retriever_shows_the_best_passage(ranker, split, queries):
    langchain = pytest.importorskip("hf_kd_ranking.integrations.langchain")
    bm25 = kd.BM25Index.build(split)
    pipeline = Pipeline(split, bm25, ranker, depth=6)
    found = langchain.PipelineRetriever(pipeline=pipeline, k=4).invoke(queries["100"])
    assert [(document.id, document.metadata["relevance_score"]) for document in found] == pipeline.search(
        queries["100"], 4
    )
    [ranking] = bm25.rank_passages([queries["100"]], 6)
    best = {}
    for passage_id, _ in ranking:
        best.setdefault(passage_id.partition("#")[0], passage_id)
    assert [document.page_content for document in found] == [split[best[document.id]] for document in found]
    assert any("#" in best[document.id] for document in found)


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_qdrant_fuses_the_ranks_of_documents(ranker, split, queries, tmp_path):
    sources = {"dense": kd.VectorStore.build(ranker, split, tmp_path / "vectors"), "bm25": split}
    index = kd.QdrantIndex.build(sources, tmp_path / "qdrant")
    runs = [index.search(queries, 100, using=name) for name in ("dense", "bm25")]
    wanted = fuse_runs(runs, weights=[1, 1])
    found = index.search(queries, 100)
    assert scores_of(found) == pytest.approx(scores_of(wanted), abs=1e-6)
    assert any(len(dict(ranking)) > 5 for ranking in runs[1].values())
    for query_id, ranking in index.search(queries, 3, using=("dense", "bm25"), depth=100, only=["0", "3"]).items():
        assert dict(ranking).keys() == dict(wanted[query_id]).keys() & {"0", "3"}
    reranked = index.search(queries, 3, using=("dense", "bm25"), rerank="dense")
    assert scores_of(reranked) == pytest.approx(scores_of(index.search(queries, 3, using="dense")), abs=1e-4)
