"""`hf-kd-ranking index | search | fuse`: what the classes give, from files to files."""

import json

import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.retrieval.fusion import fuse_runs


@pytest.fixture
def paths(model, tokenizer, toy, tmp_path):
    """The model's folder and ranker, and the beginnings of commands."""
    ranker = kd.Ranker(model, tokenizer)
    ranker.save_pretrained(tmp_path / "model")
    index = f"index --model {tmp_path}/model --collection {toy}/collection.tsv --output {tmp_path}/index --json"
    search = f"search --model {tmp_path}/model --index {tmp_path}/index --queries {toy}/queries.tsv --json"
    return ranker, index, f"{search} --output {tmp_path}"


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_dense_vectors_are_indexed_and_searched(call, paths, toy, tmp_path):
    ranker, index, search = paths
    status, out, err = call(f"{index} --factory IVF4,Flat")
    assert status == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result == {"output": f"{tmp_path}/index", "documents": 40, "bytes_per_document": 64.0}
    queries = dict(kd.TextStore.from_tsv(toy / "queries.tsv").items())
    wanted = kd.DenseIndex.build(kd.VectorStore.open(tmp_path / "index", ranker)).search(queries, 7)
    for name, options in [("exact", "--exact"), ("approximate", "--settings nprobe=4")]:
        status, out, err = call(f"{search}/{name}.trec --k 7 {options}")
        assert status == 0, err
        assert json.loads(out.splitlines()[-1])["documents"] == 16 * 7
        run = kd.read_run(tmp_path / f"{name}.trec")
        assert {q: [d for d, _ in ranking] for q, ranking in run.items()} == {
            q: [d for d, _ in ranking] for q, ranking in wanted.items()
        }
    for options, message in [
        ("--exact --settings nprobe=4", "--exact compares every document"),
        ("--probes 2", "--probes"),
    ]:
        status, _, err = call(f"{search}/ignored.trec {options}")
        assert (status, message in err, (tmp_path / "ignored.trec").exists()) == (2, True, False), err
    assert call(f"{index} --storage float16")[0] == 2
    assert call(f"{index} --storage float16 --overwrite")[0] == 0
    status, _, err = call(f"{search}/stale.trec")
    assert (status, "earlier version of the vectors" in err) == (2, True)


@pytest.mark.parametrize("model", ["colbert"], indirect=True)
def test_token_vectors_are_searched_and_rerank(call, paths, toy, tmp_path):
    ranker, index, search = paths
    assert call(f"{index} --centroids 4")[0] == 0
    queries = dict(kd.TextStore.from_tsv(toy / "queries.tsv").items())
    wanted = kd.ColBERTIndex.open(tmp_path / "index", ranker).search(queries, 5)
    for options, message in [("--settings nprobe=4", "--settings"), ("--exact --probes 2", "--exact compares")]:
        status, _, err = call(f"{search}/ignored.trec {options}")
        assert (status, message in err) == (2, True), err
    for name, options in [("exact", "--exact"), ("all", "--probes 4")]:
        assert call(f"{search}/{name}.trec --k 5 {options}")[0] == 0
        for query_id, ranking in kd.read_run(tmp_path / f"{name}.trec").items():
            assert [s for _, s in ranking] == pytest.approx([s for _, s in wanted[query_id]], rel=1e-4, abs=1e-4)
    status, _, err = call(f"{search}/reranked.trec --k 3 --candidates {toy}/candidates.trec")
    assert status == 0, err
    candidates = kd.read_run(toy / "candidates.trec").top(3)
    found = kd.read_run(tmp_path / "reranked.trec")
    assert {q: {d for d, _ in r} for q, r in found.items()} == {q: {d for d, _ in r} for q, r in candidates.items()}


@pytest.mark.parametrize("model", ["tk"], indirect=True)
def test_bad_input_of_index_and_search_is_one_line(call, paths, toy, tmp_path):
    _, index, search = paths
    assert call(index)[0] == 0
    (tmp_path / "other.trec").write_text("nobody Q0 0 1 1.0 first\n")
    for command, message in [
        (f"{search}/run.trec", "--candidates"),
        (f"{search}/run.trec --index {tmp_path}/none --candidates {toy}/candidates.trec", "does not exist"),
        (f"{search}/run.trec --candidates {toy}/candidates.trec --exact", "--candidates are re-ranked"),
        (f"{search}/run.trec --candidates {tmp_path}/other.trec", "1 of 1 ids are not among the"),
        (f"{index} --overwrite --factory Flat", "--factory is for a ranker with one vector per text"),
        (f"{index} --overwrite --centroids 0", "--centroids is for a ranker that compares by MaxSim"),
        (f"{index} --storage int4 --overwrite", "stored as one of float32, float16, int8, got 'int4'"),
    ]:
        status, _, err = call(command)
        assert (status, message in err, err.count("error: "), "Traceback" in err) == (2, True, 1, False), err


def test_bm25_is_searched_and_fused(call, toy, tmp_path):
    status, _, err = call(f"index --collection {toy}/collection.tsv --output {tmp_path}/bm25 --centroids 0")
    assert (status, "--centroids need --model" in err) == (2, True), err
    (tmp_path / "bm25" / "v1").mkdir(parents=True)  # as a kill leaves it
    status, _, err = call(f"index --collection {toy}/collection.tsv --output {tmp_path}/bm25")
    assert status == 0, err
    status, _, err = call(f"index --collection {toy}/collection.tsv --output {tmp_path}/bm25")
    assert (status, "bm25 exists" in err) == (2, True)
    assert call(f"index --collection {toy}/collection.tsv --output {tmp_path}/bm25 --overwrite")[0] == 0
    command = f"search --index {tmp_path}/bm25 --queries {toy}/queries.tsv"
    status, _, err = call(f"{command} --output {tmp_path}/bm25.trec --exact")
    assert (status, "--exact" in err) == (2, True), err
    status, _, err = call(f"{command} --output {tmp_path}/bm25.trec --candidates {toy}/candidates.trec")
    assert (status, "--candidates are re-ranked from the vectors of --model" in err) == (2, True), err
    status, _, err = call(f"{command} --output {tmp_path}/bm25.trec --k 9")
    assert status == 0, err
    status, _, err = call(
        f"fuse --run {tmp_path}/bm25.trec {toy}/candidates.trec --weights 2 1 --method weighted_sum "
        f"--k 4 --output {tmp_path}/fused.trec"
    )
    assert status == 0, err
    runs = [kd.read_run(path) for path in (tmp_path / "bm25.trec", toy / "candidates.trec")]
    assert kd.read_run(tmp_path / "fused.trec") == fuse_runs(runs, "weighted_sum", [2, 1]).top(4)


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_negatives_come_from_a_search_of_the_ranker(call, paths, toy, tmp_path):
    _, index, search = paths
    assert call(index)[0] == 0
    assert call(f"{search}/dense.trec --k 12")[0] == 0
    options = f"--candidates {tmp_path}/dense.trec --qrels {toy}/qrels.txt --ranks 3 10 --per-query 4"
    status, _, err = call(f"teacher triples {options} --output {tmp_path}/ids.tsv")
    assert status == 0, err
    texts = f"--collection {toy}/collection.tsv --queries {toy}/queries.tsv"
    triples = f"--triples {tmp_path}/ids.tsv --model {tmp_path}/model --output {tmp_path}/scores.tsv"
    status, _, err = call(f"teacher score {triples} {texts}")
    assert status == 0, err
    run, qrels = kd.read_run(tmp_path / "dense.trec"), kd.read_qrels(toy / "qrels.txt")
    rows = kd.load_teacher_scores(tmp_path / "scores.tsv")
    assert len(rows) >= 16
    for row in rows.rows:
        query_id = str(row["query_id"])
        positive, negative = map(str, row["doc_ids"])
        scores = dict(run[query_id])
        assert negative in [doc_id for doc_id, _ in run[query_id]][2:10]
        assert qrels[query_id].get(negative, 0) == 0 < qrels[query_id][positive]
        assert row["teacher_scores"][1] == pytest.approx(scores[negative], rel=1e-4, abs=1e-4)
