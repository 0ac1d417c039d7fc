"""The whole job: from a collection and a teacher to the best ranker within a budget, again and after interruptions."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import hf_kd_ranking as kd
from hf_kd_ranking.distillation import outcome as outcomes
from hf_kd_ranking.distillation import stages, students
from hf_kd_ranking.distillation.outcome import choose, outcome_text
from hf_kd_ranking.evaluation.rerank import rerank_run


def test_a_job_is_split_taught_ranked_and_described(make_job, trainings, tmp_path):
    outcome = kd.distill(make_job())
    assert len(trainings) == 4  # two architectures with and without the teacher
    untrained = {"bert_dot untrained", "colbert untrained"}
    assert outcome["test"].keys() == {"BM25", "teacher", *untrained, *outcome["dev"]}
    best = max(outcome["dev"], key=outcome["dev"].get)
    assert (outcome["best"], outcome["ranker"]) == (best, str(tmp_path / "out" / "best"))
    scores = [
        kd.Ranker.from_pretrained(path).score("cat", ["dog cat"])
        for path in (outcome["ranker"], outcome["folders"][best])
    ]
    assert scores[0] == scores[1]
    assert all(name in Path(outcome["page"]).read_text() for name in outcome["test"])
    # The figures are those of the runs, and the triples' scores the teacher's.
    qrels = kd.read_qrels(tmp_path / "out" / "triples" / "test.qrels.txt")
    for name, value in outcome["test"].items():
        run = kd.read_run(tmp_path / "out" / "report" / "runs" / f"{name}.trec")
        assert kd.evaluate_run(run, qrels, ("RR@10",))["RR@10"] == pytest.approx(value)
    rows = kd.load_teacher_scores(tmp_path / "out" / "scores" / "teacher" / "rows.tsv")
    teacher = kd.Ranker.from_pretrained(tmp_path / "teacher")
    queries, documents = (
        kd.TextStore.from_tsv(tmp_path / "queries.tsv"),
        kd.TextStore.from_tsv(tmp_path / "collection.tsv"),
    )
    expected = teacher.score(queries[rows["query_id"]], documents[rows["neg_id"]])
    assert rows["neg_score"] == pytest.approx(expected.tolist(), abs=1e-4)
    splits = [
        set(kd.read_qrels(tmp_path / "out" / "triples" / f"{split}.qrels.txt")) for split in ("train", "dev", "test")
    ]
    assert set(rows["query_id"]) <= splits[0] and sum(map(len, splits)) == len(set().union(*splits)) == 60
    assert min(map(len, splits)) >= 8  # held out is half, of which dev and test have a half each
    assert json.loads((tmp_path / "out/report/efficiency.json").read_text())["protocol"]["candidates"] == 8
    # Taught by the teacher's scores, alone by the labels of the same triples.
    for name, (loss, scores) in {
        "teacher": ("margin_mse", "rows.tsv"),
        "no_teacher": ("ranknet", "labels.tsv"),
    }.items():
        manifest = json.loads((Path(outcome["folders"][f"bert_dot {name}"]) / "manifest.json").read_text())
        assert (manifest["loss"], manifest["files"]["teacher_scores"]["name"]) == (loss, scores)
        assert manifest["results"]["after"] == {"RR@10": pytest.approx(outcome["test"][f"bert_dot {name}"])}
        card = (Path(outcome["folders"][f"bert_dot {name}"]) / "README.md").read_text()
        assert f"| RR@10 | {outcome['test'][f'bert_dot {name}']:.4f} | {outcome['test']['BM25']:.4f} |" in card
    labels = kd.load_teacher_scores(tmp_path / "out" / "triples" / "labels.tsv")
    assert all(labels[name] == rows[name] for name in ("query_id", "pos_id", "neg_id"))
    assert set(labels["pos_score"]) == {1.0} and set(labels["neg_score"]) == {0.0}


def test_stages_are_made_once_and_again_where_an_option_that_they_depend_on_changes(make_job, trainings, tmp_path):
    outcome = kd.distill(make_job())
    # Again, nothing runs; with an architecture more only that is trained; with another length all are.
    again = kd.distill(make_job())
    assert (again, len(trainings)) == (outcome, 4)
    more = kd.distill(
        make_job(architectures=["bert_dot", "colbert", "tk"], overrides={"tk": {"learning_rates": [1e-3]}})
    )
    assert len(trainings) == 6 and all("/tk/" in folder for folder in trainings[4:])
    assert {name: more["test"][name] for name in outcome["test"]} == outcome["test"]
    shorter, efficiency = (
        make_job(architectures=["bert_dot"], max_document_length=9),
        tmp_path / "out/report/efficiency.json",
    )
    timed = [efficiency.read_text()]
    kd.distill(shorter)
    timed.append(efficiency.read_text())
    assert len(trainings) == 8
    # Another teacher under the same name is another teacher.
    before = (tmp_path / "out" / "scores" / "teacher" / "rows.tsv").read_text()
    other = kd.load_ranker(tmp_path / "teacher")
    torch.nn.init.normal_(other._classification_layer.weight)
    other.save_pretrained(tmp_path / "teacher")
    kd.distill(shorter)
    assert len(trainings) == 9 and "/teacher-" in trainings[-1]  # nor does it change what labels alone teach
    assert (tmp_path / "out" / "scores" / "teacher" / "rows.tsv").read_text() != before
    assert len({*timed, efficiency.read_text()}) == 3  # each time measured anew


def test_an_interrupted_job_goes_on_to_the_same_figures(make_job, trainings, monkeypatch):
    whole = kd.distill(make_job(architectures=["bert_dot"]))
    other = dataclasses.replace(make_job(architectures=["bert_dot"]), output=make_job().output + "2")
    stops = [(stages, "sample_triples"), (stages, "score_teacher"), (students, "train_ranker")]
    for module, name in [*stops, (outcomes, "rerank_run"), (outcomes, "measure_efficiency")]:
        function = getattr(module, name)

        def stop(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(module, name, stop)
        with pytest.raises(KeyboardInterrupt):
            kd.distill(other)
        monkeypatch.setattr(module, name, function)
    assert kd.distill(other)["test"] == whole["test"]
    assert len(trainings) == 4


def test_a_finished_output_can_be_moved(make_job, trainings, tmp_path):
    outcome = kd.distill(make_job(architectures=["bert_dot"]))
    (tmp_path / "out").rename(tmp_path / "moved")
    moved = kd.distill(dataclasses.replace(make_job(architectures=["bert_dot"]), output=str(tmp_path / "moved")))
    assert (moved["test"], len(trainings)) == (outcome["test"], 2)
    assert moved["ranker"] == str(tmp_path / "moved" / "best") and "/moved/" in moved["folders"]["bert_dot teacher"]


def test_every_ranker_is_measured_with_bm25_too(make_job, trainings, tmp_path):
    job = make_job(architectures=["bert_dot"])
    outcome = kd.distill(job)
    assert outcome["fused"].keys() == outcome["test"].keys() - {"BM25"}
    runs, qrels = tmp_path / "out" / "report" / "runs", kd.read_qrels(tmp_path / "out" / "triples" / "test.qrels.txt")

    def scaled(name: str) -> dict[str, dict[str, float]]:
        found = {q: dict(ranking) for q, ranking in kd.read_run(runs / f"{name}.trec").items()}
        low, high = ({q: of(scores.values()) for q, scores in found.items()} for of in (min, max))
        return {q: {d: (s - low[q]) / (high[q] - low[q]) for d, s in scores.items()} for q, scores in found.items()}

    student, first = scaled("bert_dot teacher"), scaled("BM25")
    sums = {q: {doc_id: (score + first[q][doc_id]) / 2 for doc_id, score in of.items()} for q, of in student.items()}
    hybrid = kd.Run((q, sorted(of.items(), key=lambda scored: -scored[1])) for q, of in sums.items())
    expected = kd.evaluate_run(hybrid, qrels, ("RR@10",))["RR@10"]
    assert outcome["fused"]["bert_dot teacher"] == pytest.approx(expected)
    assert expected not in (outcome["test"]["bert_dot teacher"], outcome["test"]["BM25"])
    cells = [f"{outcome[key]['bert_dot teacher']:.4f}" for key in ("test", "fused", "dev")]
    assert f"| bert_dot teacher | {' | '.join(cells)} |" in outcome_text(outcome, job)


def test_untrained_students_are_ranked_too(make_job, trainings, tmp_path, encoder, tokenizer):
    kd.distill(make_job(architectures=["bert_dot"]))
    ranker = kd.Ranker(kd.load_ranker(encoder, "bert_dot", max_query_length=8, max_document_length=16), tokenizer)
    stores = kd.TextStore.from_tsv(tmp_path / "queries.tsv"), kd.TextStore.from_tsv(tmp_path / "collection.tsv")
    expected = rerank_run(ranker, kd.read_run(tmp_path / "out" / "candidates" / "test.trec"), *stores)
    found = kd.read_run(tmp_path / "out" / "report" / "runs" / "bert_dot untrained.trec")
    for query_id, ranking in expected.items():
        assert dict(found[query_id]) == pytest.approx(dict(ranking), abs=1e-4)


def test_rankers_of_one_vector_also_search_the_collection(make_job, trainings, tmp_path):
    outcome = kd.distill(make_job())
    assert outcome["retrieval"].keys() == {"bert_dot no_teacher", "bert_dot teacher"}
    stores = kd.TextStore.from_tsv(tmp_path / "queries.tsv"), kd.TextStore.from_tsv(tmp_path / "collection.tsv")
    qrels = kd.read_qrels(tmp_path / "out" / "triples" / "test.qrels.txt")
    expected = kd.RetrievalEvaluator(qrels, *stores, ("RR@10",))(
        kd.Ranker.from_pretrained(outcome["folders"]["bert_dot teacher"])
    )
    assert outcome["retrieval"]["bert_dot teacher"] == pytest.approx(expected["RR@10"])
    assert f"| {outcome['retrieval']['bert_dot teacher']:.4f} |" in outcome_text(outcome, make_job())
    without = kd.distill(make_job(retrieve=False))
    assert without["retrieval"] == {} and "whole collection" not in outcome_text(without, make_job())


def test_the_best_within_the_budget_is_chosen_on_dev():
    outcome = {
        "dev": {"slow": 0.9, "quick": 0.7, "quicker": 0.6},
        "latency_ms": {"slow": 50.0, "quick": 9.0, "quicker": 1.5},
    }
    assert [choose(outcome, budget) for budget in (None, 50, 10, 2)] == ["slow", "slow", "quick", "quicker"]
    with pytest.raises(ValueError, match=r"within 1 ms.*fastest, quicker, takes 1\.5 ms"):
        choose(outcome, 1)


def test_the_verb_prints_a_table_and_the_choice(call, make_job, trainings, tmp_path):
    job = make_job(architectures=["bert_dot"])
    files = f"--collection {job.collection} --queries {job.queries} --qrels {job.qrels} --output {job.output}"
    options = "--architectures bert_dot --candidates 8 --triples-per-query 2 --held-out 0.5 --learning-rates 0.001"
    options += """ --overrides {"bert_dot":{"pooling":"mean"}}"""
    options += " --max-query-length 8 --max-document-length 16 --measure RR@10 --batch-size 8 --force"
    command = f"distill {files} --teacher {job.teachers[0]} --model-name {job.model_name} {options}"
    status, out, err = call(f"{command} --budget-ms 60000")
    assert status == 0, err
    assert kd.load_ranker(tmp_path / "out" / "best").config.pooling == "mean"
    assert "| bert_dot teacher | " in out and "Chosen on dev within 60000 ms a query: bert_dot" in out
    status, _, err = call(f"{command} --budget-ms 0.001")
    assert (status, "No ranker is within 0.001 ms" in err) == (2, True)
    assert len(trainings) == 2  # the second call repeated nothing
    status, _, err = call(f"{command} --teachers x")
    assert (status, "--teachers stands twice" in err) == (2, True)
    status, out, err = call(f"{command} --plan-only")
    assert (status, out.splitlines()[2]) == (0, "| candidates | done |  |  |")
    (tmp_path / "job.yaml").write_text("architectures: [bert_dot]\noverrides: {bert_dot: {pooling: mean}}\n")
    status, out, err = call(
        f"{command.replace('--architectures bert_dot', '').split(' --overrides')[0]} --max-query-length 8 "
        f"--max-document-length 16 --measure RR@10 --batch-size 8 --force --config {tmp_path / 'job.yaml'}"
    )
    assert (status, "| bert_dot teacher | " in out, len(trainings)) == (0, True, 2)
    status, _, err = call(f"{command} --overrides {{bert_dot")
    assert (status, "--overrides is not valid JSON" in err) == (2, True)
