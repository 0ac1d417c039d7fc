"""The demo from end to end, on a small package written here and a tiny backbone: its stages, files and sentence."""

import json
import random
from functools import partial
from pathlib import Path

import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.demo import experiment, stages
from hf_kd_ranking.demo.outcome import ROWS
from hf_kd_ranking.demo.pydocs import build_pydocs

WORDS = "apple bread cat dog earth fire glass house iron jam king lake moon night ocean paper queen river".split()


@pytest.fixture
def tiny(tmp_path, encoder, monkeypatch) -> Path:
    """Folder for a demo of 500 docstrings, 24 training queries, one epoch and one learning rate."""
    rng = random.Random(0)
    source = tmp_path / "source" / "module.py"
    source.parent.mkdir()
    lines = []
    for index in range(500):
        chosen = rng.sample(WORDS, 4)  # also in the passage, so that BM25 finds it
        docstring = f"Give {' '.join(chosen)} number {index}.\n\n{' '.join([*chosen, *rng.choices(WORDS, k=10)])}"
        lines.append(f"def f{index}():\n    {docstring!r}\n")
    source.write_text("".join(lines))
    monkeypatch.setattr(stages, "build_pydocs", partial(build_pydocs, roots={"source": source.parent}))
    monkeypatch.setattr(stages, "find_backbone", lambda: str(encoder))
    monkeypatch.setattr(stages, "QUERIES", {"train": 24, "dev": 4, "test": 8})
    monkeypatch.setattr(stages, "DOCUMENT_TOKENS", 24)
    monkeypatch.setattr(experiment, "LEARNING_RATES", (1e-3, 3e-3))
    monkeypatch.setattr(experiment, "EPOCHS", 1)
    monkeypatch.setattr(experiment, "STUDENT", experiment.STUDENT | {"layers": [0]})
    return tmp_path / "demo"


def test_the_demo_runs_all_stages_says_what_it_found_and_reuses_what_is_done(tiny, capsys, monkeypatch):
    results = experiment.run_demo(tiny)
    printed = capsys.readouterr().out
    assert json.loads((tiny / "results.json").read_text()) == json.loads(json.dumps(results))
    assert list(results["test"]) == list(ROWS)
    for name in ("T1", "T2"):
        difference = results["test"][name] - results["test"]["no teacher"]
        assert results["against_no_teacher"][name]["difference"] == pytest.approx(difference)
        assert f"With {name} the student" in printed
    page = (tiny / "report.html").read_text()
    assert f"single queries: {tiny / 'report.html'}" in printed
    assert all(name in page for name in ROWS)
    timed = json.loads((tiny / "report" / "efficiency.json").read_text())["rankers"]
    assert list(timed) == [name for name in ROWS if name != "BM25"]
    cards = {path.parent.name: path.read_text() for path in tiny.glob("runs/student-*/README.md")}
    names = [name for name, card in cards.items() if "| a query against 100 passages, median |" in card]
    assert len(names) == 3 and 'from_pretrained("bert_dot-T1-pydocs")' in "".join(cards.values())
    # Teacher and students: the same triples, the teachers' scores in the order of the labels.
    labels, taught = (kd.load_teacher_scores(tiny / name) for name in ("labels.tsv", "scores.T1.tsv"))
    assert [labels[name] for name in ("query_id", "pos_id", "neg_id")] == [
        taught[name] for name in ("query_id", "pos_id", "neg_id")
    ]
    teacher = kd.Ranker.from_pretrained(tiny / "runs" / "teacher")
    queries, documents = (
        kd.TextStore.from_tsv(tiny / "queries.tsv"),
        kd.TextStore.from_tsv(tiny / "collection/collection.tsv"),
    )
    scores = teacher.score(queries[taught["query_id"]], documents[taught["neg_id"]])
    assert taught["neg_score"] == pytest.approx(scores.tolist(), abs=1e-4)

    def no_training(*_: object) -> None:
        raise AssertionError("a finished stage ran again")

    monkeypatch.setattr(stages, "train_ranker", no_training)
    assert experiment.run_demo(tiny)["test"] == results["test"]


def test_the_examples_default_job_is_the_demos_student(tiny):
    job, args = experiment.student_job(tiny)
    assert (job.architecture, args.loss, args.teacher_scale) == ("bert_dot", "margin_mse", "match")
    results = kd.train_ranker(job, args)
    assert 0 <= results["after"]["eval_RR@10"] <= 1
    student = kd.Ranker.from_pretrained(args.output_dir)
    assert student.model.config.pooling == "mean" and student.model.config.encoder_config.num_hidden_layers == 1


def test_a_folder_made_from_other_packages_is_refused(tiny):
    tiny.mkdir()
    (tiny / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match="was made from other packages or by another version of the demo"):
        experiment.run_demo(tiny)
