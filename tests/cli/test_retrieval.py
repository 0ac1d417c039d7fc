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
    expected = {"output": f"{tmp_path}/index", "documents": 40, "bytes_per_document": 64.0}
    assert result == expected | {"cut_texts": 0.0, "cut_tokens": 0.0}
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


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_search_has_the_precision_of_the_vectors(call, paths, tmp_path):
    _, index, search = paths
    status, _, err = call(f"{index} --dtype bf16 --tokens-per-batch 40")
    assert status == 0, err
    assert json.loads((tmp_path / "index" / "artifact.json").read_text())["model_dtype"] == "bfloat16"
    status, _, err = call(f"{search}/run.trec")
    assert status == 0, err
    status, _, err = call(f"{search}/other.trec --dtype fp32")
    assert (status, "model dtype bfloat16 there, float32 here" in err) == (2, True), err
    status, _, err = call(f"{search}/other.trec --dtype tf32")
    assert (status, "--dtype tf32 needs a GPU" in err) == (2, True), err


@pytest.mark.parametrize("model", ["tk"], indirect=True)
def test_bad_input_of_index_and_search_is_one_line(call, paths, toy, tmp_path):
    _, index, search = paths
    assert call(index)[0] == 0
    (tmp_path / "other.trec").write_text("nobody Q0 0 1 1.0 first\n")
    for command, message in [
        (f"{search}/run.trec", "--candidates"),
        (f"{search}/run.trec --index {tmp_path}/none --candidates {toy}/candidates.trec", "does not exist"),
        (f"{search}/run.trec --candidates {toy}/candidates.trec --exact", "--candidates are re-ranked"),
        (f"{search}/run.trec --candidates {tmp_path}/other.trec", "Query 'nobody' of the candidates has no text"),
        (f"{index} --overwrite --factory Flat", "--factory is for a ranker with one vector per text"),
        (f"{index} --overwrite --centroids 0", "--centroids is for a ranker that compares by MaxSim"),
        (f"{index} --storage int4 --overwrite", "stored as one of float32, float16, int8, got 'int4'"),
        (f"{index} --overwrite --language german", "--language is for BM25"),
    ]:
        status, _, err = call(command)
        assert (status, message in err, err.count("error: "), "Traceback" in err) == (2, True, 1, False), err


@pytest.mark.parametrize("model", ["bert_dot", "colbert"], indirect=True)
def test_index_refuses_before_it_encodes(call, paths, tmp_path, model):
    _, index, _ = paths
    settings = [
        ("--factory IVF9999,Nope", "faiss cannot build 'IVF9999,Nope' over 40 vectors"),
        ("--factory IVF41,Flat", "needs at least 41, one for each of its centroids"),
        ("--factory IVF2,PQ4", "needs at least 256, one for each of its centroids"),
        ("--factory PQ4", "needs at least 256, one for each of its centroids"),
    ]
    if model.config.similarity == "max_sim":
        most = 40 * model.config.max_document_length
        settings = [
            (f"--centroids {most + 1}", f"40 documents have at most {most:,} vectors for {most + 1} centroids")
        ]
    for options, message in settings:
        status, _, err = call(f"{index} {options}")
        assert (status, message in err) == (2, True), err
        assert not (tmp_path / "index").exists()
    if model.config.similarity == "dot":
        assert call(f"{index} --factory Flat")[0] == 0
        status, _, err = call(f"{index} --factory HNSW4")
        assert (status, "dense exists; give a new folder, or --overwrite" in err) == (2, True), err


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_search_refuses_the_index_of_another_collection(call, paths, toy, tmp_path):
    _, index, search = paths
    assert call(f"{index} --factory Flat")[0] == 0
    assert call(f"index --collection {toy}/collection.tsv --output {tmp_path}/bm25")[0] == 0
    other = tmp_path / "other"
    other.mkdir()
    lines = (toy / "collection.tsv").read_text().splitlines()
    ids = [line.split("\t")[0] for line in lines]
    texts = [line.split("\t")[1] for line in lines]
    rows = zip(ids, reversed(texts), strict=True)  # all ids are known
    (other / "collection.tsv").write_text("".join(f"{doc_id}\t{text}\n" for doc_id, text in rows))
    for name in ("queries.tsv", "qrels.txt"):
        (other / name).write_bytes((toy / name).read_bytes())
    bm25 = f"search --index {tmp_path}/bm25 --queries {toy}/queries.tsv --output {tmp_path}"
    for command in (search, f"{search}/x.trec --exact", f"{search}/x.trec --candidates {toy}/candidates.trec", bm25):
        command = command if "x.trec" in command else f"{command}/x.trec"
        for options in (f"--collection {other}/collection.tsv", f"--dataset {other}"):
            status, _, err = call(f"{command} {options}")
            assert (status, "documents: collection.tsv (fingerprint" in err, "Traceback" in err) == (2, True, False)
            assert not (tmp_path / "x.trec").exists()
        status, _, err = call(f"{command} --collection {toy}/collection.tsv --overwrite")
        assert status == 0, err
        (tmp_path / "x.trec").unlink()


def test_search_and_rerank_refuse_ids_that_no_run_can_hold(call, toy, tmp_path, monkeypatch):
    (tmp_path / "blank.tsv").write_text("d 1\tapple\n")
    (tmp_path / "blank_queries.tsv").write_text("q 1\tapple\n")
    assert call(f"index --collection {tmp_path}/blank.tsv --output {tmp_path}/blank")[0] == 0
    assert call(f"index --collection {toy}/collection.tsv --output {tmp_path}/index")[0] == 0
    monkeypatch.setattr(kd.BM25Index, "search", lambda *_: pytest.fail("searched"))
    for command, message in [
        (f"search --index {tmp_path}/blank --queries {toy}/queries.tsv", "the id 'd 1' of the documents; rename"),
        (f"search --index {tmp_path}/index --queries {tmp_path}/blank_queries.tsv", "the id 'q 1' of the queries"),
    ]:
        status, _, err = call(f"{command} --output {tmp_path}/run.trec")
        assert (status, message in err) == (2, True), err


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_documents_with_the_ids_of_their_queries_are_left_out(call, paths, tmp_path):
    """Each document is a query too, as in ArguAna."""
    _, _index, _search = paths
    (tmp_path / "texts.tsv").write_text("a\tapple bread cat\nb\tapple bread dog\nc\tapple moon\nd\tapple bread\n")
    (tmp_path / "qrels.txt").write_text("a 0 d 1\nb 0 d 1\nc 0 d 1\n")
    texts = f"--collection {tmp_path}/texts.tsv"
    assert call(f"index {texts} --output {tmp_path}/bm25")[0] == 0
    assert call(f"index --model {tmp_path}/model {texts} --output {tmp_path}/index")[0] == 0
    with_model = f"--model {tmp_path}/model --queries {tmp_path}/texts.tsv"
    searches = {
        "bm25": f"search --index {tmp_path}/bm25 --queries {tmp_path}/texts.tsv --k 2",
        "dense": f"search --index {tmp_path}/index {with_model} --k 2",
        "reranked": f"search --index {tmp_path}/index {with_model} --candidates {tmp_path}/all.trec --k 2",
        "rerank": f"rerank {with_model} {texts} --k 2",
        "rerank_candidates": f"rerank {with_model} {texts} --candidates {tmp_path}/all.trec --k 2",
    }
    assert call(f"search --index {tmp_path}/bm25 --queries {tmp_path}/texts.tsv --output {tmp_path}/all.trec")[0] == 0
    for name, command in searches.items():
        status, _, err = call(f"{command} --exclude-same-id --output {tmp_path}/{name}.trec")
        assert status == 0, err
        run = kd.read_run(tmp_path / f"{name}.trec")
        assert {query_id: len(ranking) for query_id, ranking in run.items()} == dict.fromkeys("abcd", 2), name
        assert all(query_id not in dict(ranking) for query_id, ranking in run.items()), name
    evaluate = f"evaluate --qrels {tmp_path}/qrels.txt --measure RR@1 --json --run"
    every = json.loads(call(f"{evaluate} {tmp_path}/all.trec --exclude-same-id")[1].splitlines()[-1])
    found = json.loads(call(f"{evaluate} {tmp_path}/bm25.trec")[1].splitlines()[-1])
    assert every["all"]["RR@1"] == found["bm25"]["RR@1"] == 1.0
    compare = f"compare --qrels {tmp_path}/qrels.txt --measure RR@1 --json --exclude-same-id --run"
    compared = json.loads(call(f"{compare} {tmp_path}/all.trec {tmp_path}/bm25.trec")[1].splitlines()[-1])
    assert compared["pairs"][0]["ties"] == 3


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_bm25_has_the_stems_of_a_language(call, model, tokenizer, tmp_path):
    (tmp_path / "texts.tsv").write_text("1\tdie Häuser\n2\tder Baum wird groß\n", encoding="utf-8")
    (tmp_path / "queries.tsv").write_text("q\tdes Hauses\n")
    texts = f"--collection {tmp_path}/texts.tsv --queries {tmp_path}/queries.tsv"
    index = f"index --collection {tmp_path}/texts.tsv --output {tmp_path}/bm25"
    status, _, err = call(f"{index} --language klingon")
    assert (status, "The language is one of arabic, " in err) == (2, True), err
    assert call(f"{index} --language auto")[0] == 0
    command = f"search --index {tmp_path}/bm25 --queries {tmp_path}/queries.tsv --output {tmp_path}/run.trec"
    assert call(command)[0] == 0
    assert [doc_id for doc_id, _ in kd.read_run(tmp_path / "run.trec")["q"]] == ["1"]
    kd.Ranker(model, tokenizer).save_pretrained(tmp_path / "model")
    rerank = f"rerank --model {tmp_path}/model {texts} --overwrite --output {tmp_path}/run.trec"
    status, _, err = call(rerank)
    assert (status, "None of the 1 queries has a candidate to re-rank" in err) == (2, True), err
    assert call(f"{rerank} --language auto")[0] == 0
    assert [doc_id for doc_id, _ in kd.read_run(tmp_path / "run.trec")["q"]] == ["1"]
    status, _, err = call(f"{rerank} --language auto --candidates {tmp_path}/run.trec")
    assert (status, "and there are other candidates" in err) == (2, True), err


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
