"""Options of a job, and the queries that it holds out."""

from pathlib import Path

import datasets
import pytest
import torch

import hf_kd_ranking as kd
from hf_kd_ranking.distillation.context import Context

EXAMPLES = Path(__file__).parents[2] / "examples"


def splits_of(job: kd.DistillJob) -> dict[str, list[str]]:
    return Context(job).splits


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"architectures": ["bert"]}, "Unknown architectures bert"),
        ({"architectures": []}, "needs a teacher or scores, an architecture, a condition and a learning rate"),
        ({"conditions": ["first_teacher"]}, "first_teacher needs several teachers"),
        ({"conditions": ["T2"]}, "Unknown conditions T2; there are no_teacher, first_teacher, teacher"),
        ({"overrides": {"bert": {}}}, "Unknown overrides bert; there are bert_cat, .*, teacher"),
        ({"overrides": {"tk": 5}}, "overrides of tk must be an object, its learning_rates a list; got 5"),
        ({"overrides": {"tk": {"learning_rates": 2e-4}}}, "overrides of tk must be .* got {'learning_rates': 0.0002}"),
        ({"qrels": None, "test_qrels": "qrels.txt"}, "Give --qrels too"),
        ({"qrels": None, "scores": ["scores.tsv"]}, "Give --qrels too"),
        ({"scores": ["scores.tsv", "scores.trec"]}, "all rows of triples, or all TREC runs"),
        ({"scores": ["scores.tsv"], "teachers": ["x"]}, "not both"),
        ({"scores": [], "teachers": []}, "needs a teacher or scores"),
        ({"qrels": None, "teachers": ["bert_cat"]}, "A teacher is trained on judgments"),
        ({"device": "cuda"}, "needs a GPU"),
        ({"loss": "margin-mse"}, "Unknown loss 'margin-mse'"),
        ({"loss": "margin_mse:1,in_batch_margin_mse:1"}, "trains on pairs; in_batch_margin_mse needs more"),
        ({"measure": "nDGC@10"}, "nDGC@10"),
        ({"scores": ["scores.jsonl"]}, "scores.jsonl holds lists"),
        ({"scores": ["lists.parquet"]}, "lists.parquet holds lists"),
        ({"scores": ["triples.tsv"]}, "triples.tsv has no teacher scores"),
        ({"scores": ["scores.tsv", "triples.tsv"]}, "triples.tsv has no teacher scores"),
        ({"device": "gpu"}, "device is cpu or cuda, got 'gpu'"),
        ({"seeds": 0, "epochs": -1}, "above 0, got seeds 0, epochs -1"),
        ({"held_out": 1.5}, "between 0 and 1, got 1.5"),
        ({"held_out": 0.01}, r"Too few queries with a relevant document for .*test 0 \(needed 2\)"),
    ],
)
def test_bad_options_are_refused_before_any_work(make_job, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("scores.tsv").write_text("1.0\t0.5\tq0\td0\td1\n")
    Path("triples.tsv").write_text("q0\td0\td1\n")
    Path("scores.jsonl").write_text("{}")
    lists = {"query_id": ["q0"], "doc_ids": [["d0", "d1", "d2"]], "teacher_scores": [[3.0, 2.0, 1.0]]}
    datasets.Dataset.from_dict(lists).to_parquet("lists.parquet")
    Path("scores.trec").write_text("q0 Q0 d0 1 0.5 x\n")
    with pytest.raises(ValueError, match=words):
        kd.distill(make_job(**options))
    assert not (tmp_path / "out").exists()


def test_judgments_of_their_own_decide_what_is_held_out(make_job, tmp_path):
    lines = (tmp_path / "qrels.txt").read_text().splitlines(keepends=True)
    for name, part in (("qrels.txt", lines[:40]), ("dev.txt", lines[40:45]), ("test.txt", lines[45:])):
        (tmp_path / name).write_text("".join(part))
    dev, test = str(tmp_path / "dev.txt"), str(tmp_path / "test.txt")
    splits = splits_of(make_job(dev_qrels=dev, test_qrels=test))
    assert splits["train"] == [f"q{i}" for i in range(40)] and splits["dev"] == [f"q{i}" for i in range(40, 45)]
    assert splits["test"] == [f"q{i}" for i in range(45, 60)]
    splits = splits_of(make_job(test_qrels=test))
    assert splits["test"] == [f"q{i}" for i in range(45, 60)]
    assert len(splits["dev"]) > 10  # all of the held out half of 40
    assert splits_of(make_job(test_qrels=test, held_out=0.25))["dev"] == splits_of(make_job(held_out=0.5))["test"]


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("reproduce_*.yaml")), ids=lambda file: file.stem)
def test_an_example_names_options_that_there_are(file, tmp_path, monkeypatch):
    from hf_kd_ranking.cli.settings import parse_settings

    (job,), _ = parse_settings((kd.DistillJob,), ["--config", str(file)])
    monkeypatch.chdir(tmp_path)
    for path in (job.collection, job.queries, job.qrels, job.test_qrels, *job.scores):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("1\t0\tq0\td0\td1\n")
    job.check()
    assert set(job.architectures) == set(kd.models.ARCHITECTURES)
    for architecture in job.architectures:
        training, config = job.training_options(architecture)
        assert training["learning_rates"] and config.keys() <= {
            "compression_dim",
            "join_layer_idx",
            "layers",
            "pooling",
        }
