"""`rerank`, `evaluate` and `compare` on the toy data, as the command line calls them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.evaluation.rerank import rerank_run


@pytest.fixture
def runs(toy, tmp_path) -> tuple[Path, Path]:
    """The toy candidates and the same with the order of each query turned round."""
    candidates = kd.read_run(toy / "candidates.trec")
    turned = {query: [(doc, -score) for doc, score in reversed(ranking)] for query, ranking in candidates.items()}
    kd.write_run(turned, tmp_path / "turned.trec")
    return toy / "candidates.trec", tmp_path / "turned.trec"


@pytest.mark.parametrize("model", ["bert_dot", "bert_cat"], indirect=True)
def test_rerank_writes_the_scores_of_the_ranker(call, model, tokenizer, toy, tmp_path):
    ranker = kd.Ranker(model, tokenizer)
    ranker.save_pretrained(tmp_path / "model")
    texts = f"--queries {toy}/queries.tsv --collection {toy}/collection.tsv --candidates {toy}/candidates.trec"
    status, out, err = call(f"rerank --model {tmp_path}/model {texts} --k 3 --output {tmp_path}/out.trec --json")
    assert status == 0, err
    cuts = {"cut_texts": 0.0, "cut_tokens": 0.0}
    expected = {"output": f"{tmp_path}/out.trec", "queries": 4, "pairs": 12} | cuts
    assert json.loads(out.splitlines()[-1]) == expected
    queries, documents = kd.TextStore.from_tsv(toy / "queries.tsv"), kd.TextStore.from_tsv(toy / "collection.tsv")
    found = kd.read_run(tmp_path / "out.trec")
    for query, ranking in kd.read_run(toy / "candidates.trec").top(3).items():
        ids = [doc for doc, _ in ranking]
        wanted = dict(zip(ids, ranker.score(queries[query], documents[ids]).tolist(), strict=True))
        assert dict(found[query]) == pytest.approx(wanted, rel=1e-5)
        assert [score for _, score in found[query]] == pytest.approx(sorted(wanted.values(), reverse=True), rel=1e-5)
    status, _, err = call(f"rerank --model {tmp_path}/model {texts} --output {tmp_path}/out.trec")
    assert (status, "out.trec" in err) == (2, True)


def test_evaluate_measures_runs_and_queries(call, runs, toy):
    options = f"--qrels {toy}/qrels.txt --measure RR@10 --measure nDCG@3"
    status, out, _ = call(f"evaluate --run {runs[0]} --run turned={runs[1]} {options} --json")
    result = json.loads(out)
    assert status == 0
    # The positives stand at ranks 5 and 8 of ten; turned round at 6 and 3.
    assert result["candidates"]["RR@10"] == pytest.approx(1 / 5)
    assert result["turned"]["RR@10"] == pytest.approx(1 / 3)
    assert (result["turned"]["queries"], result["turned"]["without_results"]) == (4, 0)
    status, out, _ = call(f"evaluate --run {runs[0]} {options} --per-query")
    assert set(json.loads(out)["candidates"]["per_query"]["RR@10"].values()) == {1 / 5}
    status, out, _ = call(f"evaluate --run {runs[0]} {options}")
    assert out == "candidates: RR@10 0.2, nDCG@3 0, queries 4, without_results 0\n"


def test_evaluate_refuses_options_that_it_does_not_read(call, runs, toy):
    ignored = "--model x --results y --retrieve --k 5 --language en --batch-size 3 --tokens-per-batch 9 --dtype fp32"
    status, out, err = call(f"evaluate --run {runs[0]} --qrels {toy}/qrels.txt {ignored}")
    names = "--model, --results, --retrieve, --k, --language, --batch-size, --tokens-per-batch, --dtype"
    assert (status, out) == (2, "")
    assert err == f"error: evaluate with --run does not read {names}; leave out what is not read.\n"


def test_evaluate_takes_a_path_with_an_equals_sign(call, toy, tmp_path):
    (tmp_path / "k=10.trec").write_bytes((toy / "candidates.trec").read_bytes())
    status, out, _ = call(f"evaluate --run {tmp_path}/k=10.trec --qrels {toy}/qrels.txt --measure RR@10")
    assert (status, out) == (0, "k=10: RR@10 0.2, queries 4, without_results 0\n")


def test_compare_prints_tables_and_json(call, runs, toy):
    command = f"compare --run {runs[0]} --run turned={runs[1]} --qrels {toy}/qrels.txt --measure RR@10"
    status, out, _ = call(f"{command} --json")
    (pair,) = json.loads(out)["pairs"]
    assert (status, pair["wins"], pair["ties"], pair["losses"]) == (0, 4, 0, 0)
    assert pair["difference"] == pytest.approx(1 / 3 - 1 / 5)
    status, out, _ = call(command)
    assert "| candidates | 0.2000 |" in out
    assert "| RR@10 | turned - candidates | +0.1333 |" in out
    assert out.count("4 / 0 / 0") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--run {run}", "at least two runs"),
        ("--run {run} --run {run}", "Two of the runs are called 'candidates'; write NAME=PATH"),
        ("--run {run} --run b={run} --correction none", "holm, bonferroni"),
        ("--run {run} --run b={run} --measure nDC@10", "Unknown measure"),
        ("--run {run} --run b=gone.trec", "gone.trec"),
    ],
)
def test_compare_refuses_bad_input_in_one_line(call, runs, toy, options, message):
    status, _, err = call(f"compare --qrels {toy}/qrels.txt {options.format(run=runs[0])}")
    assert (status, message in err, err.count("\n")) == (2, True, 1)


@pytest.fixture
def folder(toy, tmp_path) -> Path:
    """The toy data as a collection in TREC's layout, without a first stage."""
    for source, name in (("collection.tsv",) * 2, ("queries.tsv",) * 2, ("qrels.txt",) * 2):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_bytes((toy / source).read_bytes())
    return tmp_path / "data"


def test_rerank_and_evaluate_take_a_data_set(call, model, tokenizer, folder, tmp_path):
    kd.Ranker(model, tokenizer).save_pretrained(tmp_path / "model")
    command = f"rerank --model {tmp_path}/model --dataset {folder} --k 3 --output {tmp_path}/out.trec --json"
    status, out, err = call(command)
    assert status == 0, err
    data = kd.load_collection(str(folder))
    wanted = kd.BM25Index.build(data.documents).search(data.judged_queries(), 3)
    found = kd.read_run(tmp_path / "out.trec")
    assert {query: {doc for doc, _ in of} for query, of in found.items()} == {
        query: {doc for doc, _ in of} for query, of in wanted.items()
    }
    status, out, _ = call(f"evaluate --run {tmp_path}/out.trec --dataset {folder} --measure R@3 --json")
    assert json.loads(out)["out"]["R@3"] == pytest.approx(kd.evaluate_run(wanted, data.qrels, ["R@3"])["R@3"])


@pytest.mark.parametrize("verb", ["evaluate", "compare"])
def test_missing_judgments_name_their_options(call, runs, verb):
    status, _, err = call(f"{verb} --run {runs[0]}")
    assert (status, err) == (2, "error: Give --qrels, or --dataset.\n")


def test_two_processes_rerank_as_one(encoder, tokenizer, toy, tmp_path):
    lengths = {"max_query_length": 8, "max_document_length": 16}
    ranker = kd.Ranker(kd.load_ranker(str(encoder), "bert_dot", **lengths), tokenizer)
    ranker.save_pretrained(tmp_path / "model")
    verb = ["rerank", "--model", tmp_path / "model", "--output", tmp_path / "out.trec"]
    verb += ["--queries", toy / "queries.tsv", "--collection", toy / "collection.tsv"]
    verb += ["--candidates", toy / "candidates.trec"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = map(str, [*launch, "-m", "hf_kd_ranking", *verb])
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("out.trec") == 1  # one of the two is the main process
    stores = kd.TextStore.from_tsv(toy / "queries.tsv"), kd.TextStore.from_tsv(toy / "collection.tsv")
    wanted = rerank_run(ranker, kd.read_run(toy / "candidates.trec"), *stores)
    found = kd.read_run(tmp_path / "out.trec")
    for query, ranking in wanted.items():
        assert dict(found[query]) == pytest.approx(dict(ranking), rel=1e-5)
