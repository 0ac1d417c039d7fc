"""The scripts around `distill`: the files of reproduce_*.yaml, and the comparison of losses."""

import os
from pathlib import Path

import pytest

import hf_kd_ranking as kd


@pytest.fixture
def small_job(monkeypatch, files, encoder, tmp_path):
    """Replace the demo's collection, which takes minutes, by the toy files."""

    def demo_job(output: Path, seeds: int = 1, *args, **kwargs) -> kd.DistillJob:
        return kd.DistillJob(
            str(files["--collection"]),
            str(files["--queries"]),
            output=str(output),
            teachers=["bm25"],
            qrels=str(files["--qrels"]),
            model_name=str(encoder),
            k=8,
            learning_rates=[1e-3],
            held_out=0.5,
            max_query_length=8,
            max_document_length=16,
            measure="RR@10",
            force=True,
        )

    monkeypatch.setattr("hf_kd_ranking.demo.experiment.demo_job", demo_job)
    monkeypatch.chdir(tmp_path)


def test_prepare_small_counts_the_queries(run_example, small_job, monkeypatch):
    monkeypatch.delenv("HF_KD_RANKING_DATA", raising=False)
    assert "queries of PyDocs" in run_example("prepare_small.py")


@pytest.mark.data
@pytest.mark.slow
def test_prepare_small_joins_two_years_of_trec(run_example, small_job, tmp_path):
    assert Path(os.environ["HF_KD_RANKING_DATA"], "msmarco-v1").is_dir()
    run_example("prepare_small.py")
    folder = tmp_path / "reproduce" / "msmarco"
    run, queries = kd.read_run(folder / "splade.trec"), kd.TextStore.from_tsv(folder / "queries.tsv")
    for split in ("train", "dev", "test"):
        for query_id in kd.read_qrels(folder / f"qrels.{split}.txt"):
            assert query_id in run and queries[query_id]


@pytest.mark.slow
def test_loss_ablation_prints_a_row_per_loss(run_example, small_job, tmp_path):
    options = ["--architectures", "bert_dot", "--losses", "mse", "margin_mse", "--seeds", 1]
    printed = run_example("loss_ablation.py", "--output", tmp_path / "ablation", *options)
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")]
    assert rows == ["loss", "---", "mse", "margin_mse"]
