"""The whole job: from a collection and a teacher to the best ranker within a budget, again and after interruptions."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import hf_kd_ranking as kd
from hf_kd_ranking.distillation import selection, steps, students
from hf_kd_ranking.distillation.selection import choose, outcome_text
from hf_kd_ranking.evaluation.rerank import rerank_run


def test_job_splits_teaches_ranks_and_describes(make_job, trainings, tmp_path, out, stores, pair_scores):
    outcome = kd.distill(make_job())
    assert len(trainings) == 4  # two architectures with and without the teacher
    untrained = {"bert_dot untrained", "colbert untrained"}
    assert outcome["test"].keys() == {"BM25", "teacher", *untrained, *outcome["dev"]}
    best = max(outcome["dev"], key=outcome["dev"].get)
    assert (outcome["best"], outcome["ranker"]) == (best, str(out / "best"))
    folders = (outcome["ranker"], outcome["folders"][best])
    scores = [kd.Ranker.from_pretrained(path).score("cat", ["dog cat"]) for path in folders]
    assert scores[0] == scores[1]
    assert not list((out / "best").glob("artifact.json"))
    assert all(name in Path(outcome["page"]).read_text() for name in outcome["test"])
    qrels = kd.read_qrels(out / "judgments/test/qrels.txt")
    for name, value in outcome["test"].items():
        run = kd.read_run(out / "report/runs" / f"{name}.trec")
        assert kd.evaluate_run(run, qrels, ("RR@10",))["RR@10"] == pytest.approx(value)
    rows = kd.load_teacher_scores(out / "scores/teacher/rows.tsv").rows
    negatives = [doc_ids[1] for doc_ids in rows["doc_ids"]]
    expected = kd.Ranker.from_pretrained(tmp_path / "teacher").score(stores[0][rows["query_id"]], stores[1][negatives])
    assert pair_scores(out / "scores/teacher/rows.tsv")[1] == pytest.approx(expected.tolist(), abs=1e-4)
    splits = [set(kd.read_qrels(out / "judgments" / split / "qrels.txt")) for split in ("train", "dev", "test")]
    assert set(rows["query_id"]) <= splits[0] and sum(map(len, splits)) == len(set().union(*splits)) == 60
    assert min(map(len, splits)) >= 8  # held out is half, of which dev and test have a half each
    assert json.loads((out / "report/efficiency.json").read_text())["protocol"]["candidates"] == 8
    labels = kd.load_teacher_scores(out / "labels/rows.tsv").rows
    assert all(labels[name] == rows[name] for name in ("query_id", "doc_ids"))
    assert set(map(tuple, labels["teacher_scores"])) == {(1.0, 0.0)} and outcome["triples"] == len(labels)


def test_cards_name_losses_and_results_of_the_test(make_job, trainings):
    outcome = kd.distill(make_job(architectures=["bert_dot"]))
    for condition, loss in (("teacher", "margin_mse"), ("no_teacher", "ranknet")):
        name, folder = f"bert_dot {condition}", Path(outcome["folders"][f"bert_dot {condition}"])
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["loss"] == loss
        assert manifest["results"]["after"] == {"RR@10": pytest.approx(outcome["test"][name])}
        row = f"| RR@10 | {outcome['test'][name]:.4f} | {outcome['test']['BM25']:.4f} |"
        assert row in (folder / "README.md").read_text()


def test_steps_run_again_only_where_their_inputs_change(make_job, trainings, tmp_path, out):
    outcome = kd.distill(make_job())
    again = kd.distill(make_job())
    assert (again, len(trainings)) == (outcome, 4)
    options = {"architectures": ["bert_dot", "colbert", "tk"], "overrides": {"tk": {"learning_rates": [1e-3]}}}
    more = kd.distill(make_job(**options))
    assert len(trainings) == 6 and all("/tk/" in folder for folder in trainings[4:])
    assert {name: more["test"][name] for name in outcome["test"]} == outcome["test"]
    shorter, efficiency = make_job(architectures=["bert_dot"], max_document_length=9), out / "report/efficiency.json"
    timed = [efficiency.read_text()]
    kd.distill(shorter)
    timed.append(efficiency.read_text())
    assert len(trainings) == 8
    # Another teacher under the same name is another teacher, and changes nothing that labels alone teach.
    before = (out / "scores/teacher/rows.tsv").read_text()
    other = kd.load_ranker(tmp_path / "teacher")
    torch.nn.init.normal_(other._classification_layer.weight)
    other.save_pretrained(tmp_path / "teacher")
    kd.distill(shorter)
    assert len(trainings) == 9 and "/teacher-" in trainings[-1]
    assert (out / "scores/teacher/rows.tsv").read_text() != before
    assert len({*timed, efficiency.read_text()}) == 3  # each time measured anew


def test_whole_number_and_decimal_are_one_option(make_job, trainings):
    for epochs in (1, 1.0):
        overrides = {"bert_dot": {"epochs": 2 * epochs}}
        kd.distill(make_job(architectures=["bert_dot", "colbert"], epochs=epochs, overrides=overrides))
    assert len(trainings) == 4


def test_interrupted_job_resumes_to_the_same_figures(make_job, trainings, monkeypatch):
    whole = kd.distill(make_job(architectures=["bert_dot"]))
    other = dataclasses.replace(make_job(architectures=["bert_dot"]), output=make_job().output + "2")
    stops = [(steps, "sample_triples"), (steps, "score_teacher"), (students, "train_ranker")]
    stops += [(selection, "rerank_run"), (selection, "measure_efficiency"), (selection, "write_report")]
    for module, name in stops:
        function = getattr(module, name)

        def stop(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(module, name, stop)
        with pytest.raises(KeyboardInterrupt):
            kd.distill(other)
        monkeypatch.setattr(module, name, function)
    assert kd.distill(other)["test"] == whole["test"]
    assert len(trainings) == 4


def test_finished_output_can_be_moved(make_job, trainings, tmp_path, out):
    outcome = kd.distill(make_job(architectures=["bert_dot"]))
    out.rename(tmp_path / "moved")
    moved = kd.distill(dataclasses.replace(make_job(architectures=["bert_dot"]), output=str(tmp_path / "moved")))
    assert (moved["test"], len(trainings)) == (outcome["test"], 2)
    assert moved["ranker"] == str(tmp_path / "moved/best") and "/moved/" in moved["folders"]["bert_dot teacher"]


def test_rankers_are_measured_with_bm25_too(make_job, trainings, out):
    job = make_job(architectures=["bert_dot"])
    outcome = kd.distill(job)
    assert outcome["fused"].keys() == outcome["test"].keys() - {"BM25"}

    def scaled(name: str) -> dict[str, dict[str, float]]:
        rankings = {}
        for query_id, ranking in kd.read_run(out / "report/runs" / f"{name}.trec").items():
            scores = dict(ranking)
            low, high = min(scores.values()), max(scores.values())
            rankings[query_id] = {doc_id: (score - low) / (high - low) for doc_id, score in scores.items()}
        return rankings

    student, first, hybrid = scaled("bert_dot teacher"), scaled("BM25"), kd.Run()
    for query_id, scores in student.items():
        sums = {doc_id: (score + first[query_id][doc_id]) / 2 for doc_id, score in scores.items()}
        hybrid[query_id] = sorted(sums.items(), key=lambda pair: -pair[1])
    expected = kd.evaluate_run(hybrid, kd.read_qrels(out / "judgments/test/qrels.txt"), ("RR@10",))["RR@10"]
    assert outcome["fused"]["bert_dot teacher"] == pytest.approx(expected)
    assert expected not in (outcome["test"]["bert_dot teacher"], outcome["test"]["BM25"])
    cells = [f"{outcome[key]['bert_dot teacher']:.4f}" for key in ("test", "fused", "dev")]
    assert f"| bert_dot teacher | {' | '.join(cells)} |" in outcome_text(outcome, job)


def test_untrained_students_are_ranked_too(make_job, trainings, out, stores, encoder, tokenizer):
    kd.distill(make_job(architectures=["bert_dot"]))
    ranker = kd.Ranker(kd.load_ranker(encoder, "bert_dot", max_query_length=8, max_document_length=16), tokenizer)
    expected = rerank_run(ranker, kd.read_run(out / "candidates/test/run.trec"), *stores)
    run = kd.read_run(out / "report/runs/bert_dot untrained.trec")
    for query_id, ranking in expected.items():
        assert dict(run[query_id]) == pytest.approx(dict(ranking), abs=1e-4)


def test_rankers_of_one_vector_also_search_the_collection(make_job, trainings, out, stores):
    outcome = kd.distill(make_job())
    assert outcome["retrieval"].keys() == {"bert_dot no_teacher", "bert_dot teacher"}
    evaluate = kd.RetrievalEvaluator(kd.read_qrels(out / "judgments/test/qrels.txt"), *stores, ("RR@10",))
    expected = evaluate(kd.Ranker.from_pretrained(outcome["folders"]["bert_dot teacher"]))
    assert outcome["retrieval"]["bert_dot teacher"] == pytest.approx(expected["RR@10"])
    assert f"| {outcome['retrieval']['bert_dot teacher']:.4f} |" in outcome_text(outcome, make_job())
    without = kd.distill(make_job(retrieve=False))
    assert without["retrieval"] == {} and "whole collection" not in outcome_text(without, make_job())


def test_best_within_the_budget_is_chosen_on_dev():
    outcome = {
        "dev": {"slow": 0.9, "quick": 0.7, "quicker": 0.6},
        "latency_ms": {"slow": 50.0, "quick": 9.0, "quicker": 1.5},
    }
    assert [choose(outcome, budget) for budget in (None, 50, 10, 2)] == ["slow", "slow", "quick", "quicker"]
    with pytest.raises(ValueError, match=r"within 1 ms.*fastest, quicker, takes 1\.5 ms"):
        choose(outcome, 1)


def test_verb_prints_a_table_and_the_choice(call, make_job, trainings, tmp_path, out):
    job = make_job(architectures=["bert_dot"])
    files = f"--collection {job.collection} --queries {job.queries} --qrels {job.qrels} --output {job.output}"
    numbers = "--k 8 --triples-per-query 2 --held-out 0.5 --learning-rates 0.001 --batch-size 8"
    numbers += " --max-query-length 8 --max-document-length 16 --measure RR@10 --force"
    settings = """--architectures bert_dot --overrides {"bert_dot":{"pooling":"mean"}}"""
    plain = f"distill {files} --teacher {job.teachers[0]} --model {job.model_name} {numbers}"
    status, printed, error = call(f"{plain} {settings} --budget-ms 60000")
    assert status == 0, error
    assert kd.load_ranker(out / "best").config.pooling == "mean"
    assert "| bert_dot teacher | " in printed and "Chosen on dev within 60000 ms per query: bert_dot" in printed
    status, _, error = call(f"{plain} {settings} --budget-ms 0.001")
    assert (status, "No ranker is within 0.001 ms" in error) == (2, True)
    assert len(trainings) == 2  # the second call repeated nothing
    status, printed, error = call(f"{plain} {settings} --plan-only")
    assert (status, printed.splitlines()[2]) == (0, "| bm25 | done |  |  |")
    (tmp_path / "job.yaml").write_text("architectures: [bert_dot]\noverrides: {bert_dot: {pooling: mean}}\n")
    status, printed, error = call(f"{plain} --config {tmp_path / 'job.yaml'}")
    assert (status, "| bert_dot teacher | " in printed, len(trainings)) == (0, True, 2)
    status, _, error = call(f"{plain} --overrides {{bert_dot")
    assert (status, "overrides is not valid JSON" in error) == (2, True)
