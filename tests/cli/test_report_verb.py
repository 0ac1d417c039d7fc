"""`report` as the command line calls it."""

import json
import shutil

import pytest

import hf_kd_ranking as kd

pytest.importorskip("matplotlib")


@pytest.fixture
def results(toy, tmp_path):
    """Two runs, judgments, and the latency of one."""
    (tmp_path / "results" / "runs").mkdir(parents=True)
    candidates = kd.read_run(toy / "candidates.trec")
    turned = {query: [(doc, -score) for doc, score in reversed(ranking)] for query, ranking in candidates.items()}
    kd.write_run(candidates, tmp_path / "results" / "runs" / "bm25.trec")
    kd.write_run(turned, tmp_path / "results" / "runs" / "turned.trec")
    shutil.copy(toy / "qrels.txt", tmp_path / "results")
    latencies = {"rankers": {"turned": {"architecture": "bert_dot", "total_ms": {"p50": 3.5, "p95": 4.0}}}}
    (tmp_path / "results" / "efficiency.json").write_text(json.dumps(latencies))
    return tmp_path / "results"


def test_report_writes_a_page_and_a_plot(call, results, toy, tmp_path):
    texts = f"--queries {toy}/queries.tsv --collection {toy}/collection.tsv --candidates {toy}/candidates.trec"
    options = f"--measure RR@10 --arrow bm25=turned --plot {tmp_path}/plot.png --title Toy {texts} --json"
    status, out, err = call(f"report --results {results} --output {tmp_path}/report.html {options}")
    assert status == 0, err
    expected = {"output": f"{tmp_path}/report.html", "plot": f"{tmp_path}/plot.png", "rankers": 2, "queries": 4}
    assert json.loads(out.splitlines()[-1]) == expected
    page = (tmp_path / "report.html").read_text()
    assert "<title>Toy</title>" in page
    assert "0.3333" in page  # RR of the relevant document at rank 3
    assert kd.TextStore.from_tsv(toy / "queries.tsv")["112"] in page
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_report_reads_an_option_file(call, results, toy, tmp_path):
    (tmp_path / "report.yaml").write_text(f"results: {results}\noutput: {tmp_path}/report.html\nmeasure: [P@1]\n")
    status, out, _ = call(f"report --config {tmp_path}/report.yaml")
    assert (status, out) == (0, f"output {tmp_path}/report.html, rankers 2, queries 4\n")
    assert "P@1" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--arrow bm25", "--arrow is CONTROL=TREATMENT, got 'bm25'"),
        ("--arrow bm25=gone", "No run is called gone"),
        ("--qrels gone.txt", "gone.txt does not exist"),
        ("--plot none/plot.png", "does not exist"),
        ("--results none", "none/runs holds no NAME.trec"),
    ],
)
def test_report_refuses_bad_input_in_one_line(call, results, tmp_path, options, message):
    status, _, err = call(f"report --results {results} --output {tmp_path}/report.html {options}")
    assert status == 2
    assert message in err.splitlines()[-1]
    assert not (tmp_path / "report.html").exists()
