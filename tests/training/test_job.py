"""`train_ranker`: what it evaluates and writes."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.evaluation.rerank import rerank_run
from hf_kd_ranking.training.job import json_option, load_student


@pytest.fixture
def job(encoder, toy) -> kd.TrainingJob:
    return kd.TrainingJob(
        str(encoder),
        "bert_dot",
        max_query_length=8,
        max_document_length=16,
        teacher_scores=str(toy / "scores.tsv"),
        collection=str(toy / "collection.tsv"),
        queries=str(toy / "queries.tsv"),
        candidates=str(toy / "candidates.trec"),
        qrels=str(toy / "qrels.txt"),
    )


def arguments(folder: Path, **settings) -> kd.RankingTrainingArguments:
    return kd.RankingTrainingArguments(str(folder / "out"), max_steps=2, use_cpu=True, disable_tqdm=True, **settings)


@pytest.mark.parametrize("is_measured_before", [True, False])
def test_job_evaluates_once_after_training(job, tmp_path, monkeypatch, is_measured_before):
    calls, rerank = [], kd.RerankingEvaluator.rerank
    monkeypatch.setattr(
        kd.RerankingEvaluator, "rerank", lambda self, ranker: (calls.append(1), rerank(self, ranker))[1]
    )
    results = kd.train_ranker(job, arguments(tmp_path), is_measured_before, command=["train.py", "--max_steps", "2"])
    assert len(calls) == 1 + is_measured_before
    assert set(results) == {"first_stage", "tests", "before", "after", "cuts", "training", "job"}
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert bool(results["before"]) == is_measured_before
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["command"] == ["train.py", "--max_steps", "2"]
    assert manifest["results"]["after"]["RR@10"] == results["after"]["eval_RR@10"]


@pytest.mark.parametrize("has_bar", [True, False])
def test_title_replaces_the_log_lines(job, tmp_path, capsys, has_bar):
    for title in (None, "bert_dot, first"):
        args = arguments(tmp_path / str(title), logging_steps=1)
        args.disable_tqdm = not has_bar
        kd.train_ranker(job, args, title=title)
        shown = capsys.readouterr()
        assert ("{'loss'" in shown.out) == (title is None)
        assert ("bert_dot, first: 100%" in shown.err and "loss=" in shown.err) == (has_bar and title is not None)
        state = json.loads((tmp_path / str(title) / "out" / "trainer_state.json").read_text())
        assert sum("loss" in entry for entry in state["log_history"]) == 2


def test_job_writes_the_run_of_the_saved_weights(job, tmp_path):
    results = kd.train_ranker(
        job, arguments(tmp_path, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
    )
    ranker = kd.Ranker.from_pretrained(tmp_path / "out")
    texts = kd.TextStore.from_file(job.queries), kd.TextStore.from_file(job.collection)
    wanted = rerank_run(ranker, kd.read_run(job.candidates), *texts)
    run = kd.read_run(tmp_path / "out" / "runs" / "held_out.trec")
    for query_id, ranking in run.items():
        assert dict(ranking) == pytest.approx(dict(wanted[query_id]), rel=1e-4)
    measured = kd.evaluate_run(run, kd.read_qrels(job.qrels), job.measures)
    assert measured == pytest.approx({name: results["after"][f"eval_{name}"] for name in measured})


def test_json_option_takes_objects_only():
    assert json_option("x", None) == {}
    assert json_option("x", {"a": 1}) == json_option("x", '{"a": 1}') == {"a": 1}
    with pytest.raises(ValueError, match="--x is not valid JSON"):
        json_option("x", "{a")
    with pytest.raises(ValueError, match=r"--x must be a JSON object, got '\[1\]'"):
        json_option("x", "[1]")


def test_static_queries_start_from_the_frequencies_of_the_collection(job, tmp_path):
    texts = ["moon moon cat", "moon river", "moon"]
    (tmp_path / "texts.tsv").write_text("".join(f"{row}\t{text}\n" for row, text in enumerate(texts)))
    job.architecture, job.config_overrides = "splade", {"query_encoding": "static"}
    documents = kd.TextStore.from_tsv(tmp_path / "texts.tsv")
    student = load_student(job, documents)
    vectors = student.encode_queries(["moon", "cat", "river"])
    moon, cat, river = (vectors[row].max() for row in range(3))
    assert cat / moon == pytest.approx(math.log(1 + 2.5 / 1.5) / math.log(1 + 0.5 / 3.5))
    assert cat == river
    assert moon + cat + river == pytest.approx(3)  # their mean is 1: [CLS] and [SEP], in every document, do not count
    student.save_pretrained(tmp_path / "trained")
    job.model_name, job.architecture = str(tmp_path / "trained"), None
    (tmp_path / "texts.tsv").write_text("0\tcat\n")
    again = load_student(job, kd.TextStore.from_tsv(tmp_path / "texts.tsv"))  # a ranker that is trained further
    assert again.encode_queries(["moon"]).max() == moon


def test_static_queries_start_from_documents_without_words_as_well(job, tmp_path):
    (tmp_path / "texts.tsv").write_text("0\tmoon cat\n1\t \n")
    job.architecture, job.config_overrides = "splade", {"query_encoding": "static"}
    student = load_student(job, kd.TextStore.from_tsv(tmp_path / "texts.tsv"))
    assert student.encode_queries(["moon"]).max() == 1
    (tmp_path / "texts.tsv").write_text("0\t \n")
    with pytest.raises(ValueError, match="None of 1 documents has a word"):
        load_student(job, kd.TextStore.from_tsv(tmp_path / "texts.tsv"))


def test_static_queries_need_the_tokenizer_of_the_encoder(job, encoder, tokenizer, tmp_path):
    shutil.copytree(encoder, tmp_path / "encoder")
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["comet"])
    larger.save_pretrained(tmp_path / "encoder")
    (tmp_path / "texts.tsv").write_text("0\tcomet\n")
    job.model_name, job.architecture = str(tmp_path / "encoder"), "splade"
    job.config_overrides = {"query_encoding": "static"}
    with pytest.raises(ValueError, match="The tokenizer has 40 tokens, the encoder embeddings for 39"):
        load_student(job, kd.TextStore.from_tsv(tmp_path / "texts.tsv"))
