"""The benchmarks load and explain themselves; the short ones run with tiny sizes."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel

import hf_kd_ranking as kd
from hf_kd_ranking.losses import get_losses

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"
BENCHMARKS = sorted(path for path in FOLDER.glob("*.py") if "__main__" in path.read_text())  # not their modules


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.name)
def test_benchmark_shows_its_help(path, run_example, capsys):
    if path.name == "retrieval.py":
        pytest.importorskip("faiss", reason="the extra retrieval is not installed")
    with pytest.raises(SystemExit) as exit_:
        run_example(f"benchmarks/{path.name}", "--help")
    assert exit_.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_architectures_are_compared_with_the_paper(run_example, files, tokenizer, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)  # reads 230 tokens
    tokenizer.save_pretrained(tmp_path)
    options = ["--queries", files["--queries"], "--collection", files["--collection"], "--k", 3, "--rounds", 1]
    lines = run_example("benchmarks/architectures.py", tmp_path, *options).splitlines()
    assert set(json.loads(lines[-1])["rankers"]) == {"bert_cat", "prettr", "colbert", "bert_dot", "tk"}
    assert "bert_cat: 1.0 times faster than BERT_CAT, paper 1.0" in lines


def test_storage_of_float32_is_exact(run_example, toy, save_ranker):
    options = ["--queries", toy / "queries.tsv", "--collection", toy / "collection.tsv"]
    options += ["--candidates", toy / "candidates.trec", "--qrels", toy / "qrels.txt"]
    model = save_ranker("bert_dot")
    rows = json.loads(run_example("benchmarks/storage.py", "--model", model, *options).splitlines()[-1])["storage"]
    assert [row["storage"] for row in rows] == ["float32", "float16", "int8"]
    queries, documents = kd.TextStore.from_tsv(toy / "queries.tsv"), kd.TextStore.from_tsv(toy / "collection.tsv")
    candidates, qrels = kd.read_run(toy / "candidates.trec"), kd.read_qrels(toy / "qrels.txt")
    evaluator = kd.RerankingEvaluator(candidates, qrels, queries, documents, ["nDCG@10"])
    expected = kd.evaluate_run(evaluator.rerank(kd.Ranker.from_pretrained(model)), qrels, ["nDCG@10"])
    assert rows[0]["nDCG@10"] == pytest.approx(expected["nDCG@10"])


def test_bm25_extends_a_collection_and_measures_it(toy, tmp_path, monkeypatch):
    options = ["--queries", toy / "queries.tsv", "--collection", toy / "collection.tsv", "--passages", 60]
    command = [sys.executable, FOLDER / "bm25.py", *options, "--searched", 3, "--engines"]
    result = subprocess.run([*map(str, command), "numpy"], capture_output=True, text=True, check=True)
    [row] = json.loads(result.stdout.splitlines()[-1])["engines"]
    assert row["engine"] == "numpy" and row["queries_per_second"] > 0 and row["index_gb"] > 0
    monkeypatch.syspath_prepend(FOLDER)
    bm25 = importlib.import_module("bm25")
    bm25.write_collection([toy / "collection.tsv"], 60, tmp_path)
    texts, given = kd.TextStore.open(tmp_path / "texts"), kd.TextStore.from_tsv(toy / "collection.tsv")
    assert len(texts) == 60 > len(given)
    assert texts.take(range(len(given))) == given.take(range(len(given)))


def test_recipes_are_losses_that_exist(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    recipes = importlib.import_module("recipes")
    parts = [list(recipes.plan()), list(recipes.plan_orders())]
    parts += [list(recipes.plan_seeds(name)) for name in recipes.MEASURES]
    assert [len(part) for part in parts[1:]] == [12, 36, 36]
    for recipe in set().union(*parts):
        assert recipe.loss == "none" or get_losses(recipe.loss.removesuffix("_level"))


def test_recipes_score_the_positives_that_bm25_did_not_find(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(FOLDER)
    needed = importlib.import_module("recipes_data").needed
    (tmp_path / "collection").mkdir()
    texts = {"collection.tsv": "d1\tapple\nd2\tbread\nd3\tcat\n", "queries.tsv": "q1\tapple\n"}
    for name, text in texts.items():
        (tmp_path / "collection" / name).write_text(text)
    (tmp_path / "collection" / "qrels.train.txt").write_text("q1 0 d3 1\n")
    kd.write_run({"q1": [("d1", 2.0), ("d2", 1.0)]}, tmp_path / "candidates.train.trec")
    run = needed("bi_encoder", tmp_path, "train")
    assert dict(run) == {"q1": [("d1", 2.0), ("d2", 1.0), ("d3", 0.0)]}
