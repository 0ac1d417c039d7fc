"""Options of a job, and what is refused before anything is read."""

from pathlib import Path

import datasets
import pytest
import torch

import hf_kd_ranking as kd
from hf_kd_ranking.distillation.job import is_run

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"output": ""}, "Give --output, the folder"),
        ({"architectures": ["bert"]}, "Unknown architectures bert"),
        ({"architectures": []}, "needs a teacher or scores, an architecture and a learning rate"),
        ({"learning_rates": []}, "needs a teacher or scores, an architecture and a learning rate"),
        ({"conditions": ["first_teacher"]}, "first_teacher needs several teachers"),
        ({"conditions": ["T2"]}, "Unknown conditions T2; there are no_teacher, first_teacher, teacher"),
        ({"overrides": {"bert": {}}}, "Unknown overrides bert; there are bert_cat, .*, teacher"),
        ({"overrides": {"tk": 5}}, "overrides of tk must be an object, its learning_rates a list; got 5"),
        ({"overrides": {"tk": {"learning_rates": 2e-4}}}, "overrides of tk must be .* got {'learning_rates': 0.0002}"),
        ({"qrels": None, "test_qrels": "qrels.txt"}, "Give --dev-qrels and --test-qrels, or --qrels"),
        ({"qrels": None, "scores": ["scores.tsv"]}, "Rows of scores need judgments of other queries"),
        ({"scores": ["scores.tsv", "scores.trec"]}, "all rows of triples, or all TREC runs"),
        ({"scores": ["scores.tsv"], "teachers": ["x"]}, "not both"),
        ({"scores": ["scores.trec"], "rounds": 2}, "needs teachers that score what is mined"),
        ({"scores": [], "teachers": []}, "needs a teacher or scores"),
        ({"qrels": None, "teachers": ["bert_cat"]}, "A teacher is trained on judgments"),
        ({"qrels": None, "teachers": ["bm25"]}, "bm25 needs judgments: without them BM25 would be measured against"),
        ({"device": "cuda"}, "needs a GPU"),
        ({"device": "gpu"}, "Unknown device gpu; there are cpu, cuda"),
        ({"loss": "margin-mse"}, "Unknown loss 'margin-mse'"),
        (
            {"loss": "margin_mse:1,in_batch_margin_mse:1", "architectures": ["bert_dot", "bert_cat"]},
            "in_batch_margin_mse scores documents of other queries, which a bert_cat cannot",
        ),
        ({"measure": "nDGC@10"}, "nDGC@10"),
        ({"scores": ["scores.jsonl"]}, r"scores\.jsonl holds lists"),
        ({"scores": ["lists.parquet"]}, r"lists\.parquet holds lists"),
        ({"scores": ["triples.tsv"]}, r"triples\.tsv has no teacher scores"),
        ({"scores": ["scores.tsv", "triples.tsv"]}, r"triples\.tsv has no teacher scores"),
        ({"seeds": 0, "epochs": -1, "patience": 0}, "above 0, got epochs -1, patience 0, seeds 0"),
        ({"held_out": 1.5}, "held_out is a share between 0 and 1, got 1.5"),
        ({"relative_margin": 1.5}, "relative_margin is a share between 0 and 1, got 1.5"),
        ({"relative_margin": 0.0}, "Options must be above 0, got relative_margin 0.0"),
        ({"held_out": 0.01}, r"Too few queries with a relevant document for .*test 0 \(needed 2\)"),
        ({"documents": 1}, "at least two documents, got documents 1"),
        ({"depths": [4, 9]}, "Depths lie between 1 and k, 8; got 9"),
        ({"sampling": "hard"}, "Unknown sampling hard; there are random, top, stratified"),
        ({"purpose": "find"}, "Unknown purpose find; there are rerank, search"),
        (
            {"purpose": "search", "architectures": ["bert_dot", "tk"]},
            "Only bert_dot, colbert and splade search",
        ),
        (
            {"rounds": 2, "architectures": ["tk"]},
            "A second round needs a bert_dot, colbert or splade",
        ),
        ({"precisions": ["float32", "int8"]}, "The precision int8 is for bert_cat"),
        ({"patience": 2}, "patience 2 needs several evaluations of a training; raise --evaluations"),
        ({"precisions": ["int4"]}, "Unknown precisions int4; there are float32, int8"),
        ({"sources": ["web"]}, "Unknown sources web; there are bm25, candidates, dense"),
        ({"sources": ["bm25:0.5", "dense:0.4"]}, "above 0 and sum up to 1, got 0.9 in all"),
        ({"sources": ["bm25:1.5", "dense:-0.5"]}, "above 0 and sum up to 1, got 1 in all"),
        ({"sources": ["bm25:half"]}, "share of the source bm25 must be a number, got 'half'"),
        ({"sources": ["candidates"]}, "source candidates is the run of --candidates, which is not given"),
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


def test_folder_of_others_is_not_replaced(make_job, out):
    (out / "best").mkdir(parents=True)
    (out / "best/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="best does not hold a pipeline of an earlier call"):
        kd.distill(make_job())
    assert (out / "best/notes.txt").read_text() == "mine"


def test_shares_of_sources(make_job):
    assert make_job().shares == {"bm25": 1.0}
    assert make_job(candidates="mine.trec").shares == {"candidates": 1.0}
    assert make_job(sources=["dense"]).shares == {"dense": 1.0}
    assert make_job(sources=["bm25:0.25", "dense:0.75"]).shares == {"bm25": 0.25, "dense": 0.75}


def test_depths_end_with_k(make_job):
    assert make_job().tried_depths == [4, 8]
    assert make_job(depths=[6, 2]).tried_depths == [2, 6, 8]
    assert make_job(k=1).tried_depths == [1]


def test_options_of_architectures_come_before_those_of_the_job(make_job):
    overrides = {"tk": {"epochs": 3, "num_hidden_layers": 1}, "teacher": {"learning_rates": [2e-4]}}
    job = make_job(overrides=overrides)
    training, config = job.training_options("tk")
    expected = {"learning_rates": [3e-4, 1e-3], "epochs": 3.0, "head_learning_rate": None, "regularization": None}
    assert training == expected
    assert config == {"num_hidden_layers": 1}
    assert job.training_options("bert_cat", is_teacher=True)[0]["learning_rates"] == [2e-4]
    assert job.training_options("colbert")[1] == {"compression_dim": 128}


def test_runs_and_rows_are_told_apart_by_their_columns(make_job, tmp_path):
    (tmp_path / "rows.tsv").write_text("\n1.0\t0.5\tq0\td0\td1\n")
    (tmp_path / "scores.txt").write_text("q0 Q0 d0 1 0.5 x\n")
    assert [is_run(tmp_path / name) for name in ("rows.tsv", "scores.txt")] == [False, True]
    assert make_job(scores=[str(tmp_path / "rows.tsv")]).brings_rows
    assert not make_job(scores=[str(tmp_path / "scores.txt")]).brings_rows and not make_job().brings_rows


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("reproduce_*.yaml")), ids=lambda file: file.stem)
def test_an_example_names_options_that_there_are(file, tmp_path, monkeypatch):
    from hf_kd_ranking.cli.settings import parse_settings

    (job,), _ = parse_settings((kd.DistillJob,), ["--config", str(file)])
    monkeypatch.chdir(tmp_path)
    for path in filter(None, (job.collection, job.queries, job.qrels, job.dev_qrels, job.test_qrels, *job.scores)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("1\t0\tq0\td0\td1\n")
    job.check()
    assert set(job.architectures) == set(kd.models.ARCHITECTURES) - {"splade", "tkl"}  # the paper's
    for architecture in job.architectures:
        training, config = job.training_options(architecture)
        assert training["learning_rates"] and config.keys() <= {
            "compression_dim",
            "join_layer_idx",
            "layers",
            "pooling",
        }
