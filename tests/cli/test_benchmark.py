"""`benchmark` on the toy data, as the command line calls it."""

import json

import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.reporting.efficiency import measure_efficiency


@pytest.fixture
def command(encoder, tokenizer, toy, tmp_path) -> str:
    """The beginning of commands; two rankers stand in the folder."""
    lengths = {"max_query_length": 8, "max_document_length": 16}
    for name in ("bert_dot", "bert_cat"):
        kd.Ranker(kd.load_ranker(str(encoder), name, **lengths), tokenizer).save_pretrained(tmp_path / name)
    return f"benchmark --queries {toy}/queries.tsv --collection {toy}/collection.tsv"


def test_benchmark_prints_a_table_and_writes_a_file(call, command, tmp_path):
    models = f"--model {tmp_path}/bert_cat --model dot={tmp_path}/bert_dot"
    status, out, err = call(f"{command} {models} --k 5 --rounds 3 --warm-up 1 --output {tmp_path}/efficiency.json")
    assert status == 0, err
    results = json.loads((tmp_path / "efficiency.json").read_text())
    assert list(results["rankers"]) == ["bert_cat", "dot"]
    assert (results["protocol"]["queries"], results["protocol"]["candidates"]) == (3, 5)
    assert out.count("\n| ") == 2
    status, out, _ = call(f"{command} --model {tmp_path}/bert_dot --k 2 --rounds 1 --json")
    assert json.loads(out)["rankers"]["bert_dot"]["architecture"] == "bert_dot"


def test_benchmark_times_the_candidates_of_a_run(call, command, toy, tmp_path, monkeypatch):
    run, queries = kd.read_run(toy / "candidates.trec"), kd.TextStore.from_tsv(toy / "queries.tsv")
    documents, timed = kd.TextStore.from_tsv(toy / "collection.tsv"), []

    def measure(rankers, texts, lists, warm_up, depths, counts):
        timed.extend(zip(texts, lists, strict=True))
        return measure_efficiency(rankers, texts, lists, warm_up, depths, counts=counts)

    monkeypatch.setattr("hf_kd_ranking.cli.benchmark.measure_efficiency", measure)
    options = f"--candidates {toy}/candidates.trec --k 6 --depth 2 --depth 4 --json"
    status, out, err = call(f"{command} --model {tmp_path}/bert_dot {options}")
    assert status == 0, err
    wanted = []
    for query_id, ranking in run.items():
        wanted.append((queries[query_id], documents[[doc_id for doc_id, _ in ranking[:6]]]))
    assert timed == wanted
    results = json.loads(out)
    assert list(results["rankers"]["bert_dot"]["total_ms_by_depth"]) == ["2", "4"]
    assert (results["protocol"]["queries"], results["protocol"]["candidates"]) == (4, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model {0}/bert_dot --model {0}/bert_dot", "Two of the rankers are called 'bert_dot'; write NAME=PATH"),
        ("--model {0}/bert_dot --dtype int4", "--dtype is one of fp32, tf32, bf16, fp16, got 'int4'"),
        ("--model {0}/gone", "gone"),
        ("--model {0}/bert_dot --k 10 --depth 5 11", "--depth is at most --k, 10, got 11"),
    ],
)
def test_benchmark_refuses_bad_input_in_one_line(call, command, tmp_path, options, message):
    status, _, err = call(f"{command} {options.format(tmp_path)}")
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (status, len(lines), message in lines[0]) == (2, 1, True)
