"""The demo from end to end, on a small package written here and a tiny backbone: what it chooses, runs and says."""

import random
from functools import partial
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

import hf_kd_ranking as kd
from hf_kd_ranking.demo import experiment
from hf_kd_ranking.demo.pydocs import build_pydocs
from hf_kd_ranking.distillation import students
from hf_kd_ranking.distillation.context import Context

WORDS = "apple bread cat dog earth fire glass house iron jam king lake moon night ocean paper queen river".split()


@pytest.fixture
def tiny(tmp_path, encoder, monkeypatch) -> Path:
    """Folder for a demo of 500 docstrings, 24 training queries, one epoch and small models."""
    rng = random.Random(0)
    source = tmp_path / "source" / "module.py"
    source.parent.mkdir()
    lines = []
    for index in range(500):
        chosen = rng.sample(WORDS, 4)  # also in the passage, so that BM25 finds it
        docstring = f"Give {' '.join(chosen)} number {index}.\n\n{' '.join([*chosen, *rng.choices(WORDS, k=10)])}"
        lines.append(f"def f{index}():\n    {docstring!r}\n")
    source.write_text("".join(lines))
    modules = [Transformer(str(encoder)), Pooling(16, pooling_mode="mean")]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(tmp_path / "backbone"))
    layers = {
        "bert_dot": {"layers": [0], "pooling": "mean"},
        "colbert": {"layers": [0]},
        "prettr": {"join_layer_idx": 1},
    }
    monkeypatch.setattr(experiment, "build_pydocs", partial(build_pydocs, roots={"source": source.parent}))
    monkeypatch.setattr(experiment, "find_backbone", lambda: str(tmp_path / "backbone"))
    monkeypatch.setattr(experiment, "QUERIES", {"train": 24, "dev": 4, "test": 8})
    monkeypatch.setattr(experiment, "SETTINGS", experiment.SETTINGS | {"max_document_length": 24, "force": True})
    monkeypatch.setattr(experiment, "OVERRIDES", layers)
    (tmp_path / "demo").mkdir()
    return tmp_path / "demo"


def test_demo_prints_plan_outcome_and_next_steps(tiny, capsys, monkeypatch):
    outcome = experiment.run_demo(tiny)
    printed = capsys.readouterr()
    assert "| students/colbert teacher/rate-5e-05 | " in printed.err and "| all | " in printed.err
    names = [f"{name} {condition}" for name in ("bert_dot", "colbert") for condition in ("no_teacher", "teacher")]
    assert {"BM25", "teacher", "bert_dot untrained", "colbert untrained", *names} <= outcome["test"].keys()
    assert all(f"| {name} | {outcome['test'][name]:.4f} |" in printed.out for name in names)
    pairs = {(test["treatment"], test["control"]) for test in outcome["tests"]}
    assert {(f"{name} teacher", f"{name} no_teacher") for name in ("bert_dot", "colbert")} <= pairs
    assert "PyDocs: " in printed.out and "favours BM25" in printed.out
    assert f"hf-kd-ranking serve --pipeline {outcome['folder']}" in printed.out
    cards = [Path(outcome["folders"][name], "README.md").read_text() for name in names]
    assert all("PyDocs, docstrings of installed Python packages" in card for card in cards)
    assert all("base_model: sentence-transformers/all-MiniLM-L6-v2\n" in card for card in cards)
    assert all("20 passages, median |" in card for card in cards)
    qrels = {split: kd.read_qrels(tiny / f"qrels.{split}.txt") for split in ("train", "dev", "test")}
    assert {split: len(found) for split, found in qrels.items()} == experiment.QUERIES == outcome["queries"]
    for split in ("dev", "test"):  # each query's passage is a candidate
        grades, run = qrels[split], kd.read_run(tiny / "bm25_search" / split / "run.trec")
        assert all(grades[q].keys() & dict(run[q]).keys() for q in grades)

    def no_training(*_: object) -> None:
        raise AssertionError("a finished step ran again")

    assert list(tiny.glob("students/colbert teacher/chosen/ranker")), "examples/write_model_cards.py looks there"
    monkeypatch.setattr(students, "train_ranker", no_training)
    assert experiment.run_demo(tiny)["test"] == outcome["test"]
    assert "| report | done |" in capsys.readouterr().err


def test_complete_demo_has_all_architectures(tiny):
    job = experiment.demo_job(tiny, seeds=2, is_complete=True)
    assert (set(job.architectures), job.seeds) == (set(kd.models.ARCHITECTURES), 2)
    assert Context(job).splits.keys() == {"train", "dev", "test"}


def test_student_job_trains_the_demos_student(tiny):
    job, args = experiment.student_job(tiny)
    assert (job.architecture, args.loss, args.teacher_scale) == ("bert_dot", "in_batch_kl_div", "match")
    results = kd.train_ranker(job, args)
    assert 0 <= results["after"]["eval_RR@10"] <= 1
    student = kd.Ranker.from_pretrained(args.output_dir)
    assert student.model.config.pooling == "mean" and student.model.config.encoder_config.num_hidden_layers == 1


def test_output_of_other_packages_is_refused(tiny, tmp_path):
    experiment.student_job(tiny)
    (tmp_path / "source" / "more.py").write_text(
        f"def g():\n    {'Give some more of it.' + chr(10) * 2 + 'word ' * 12!r}\n"
    )
    with pytest.raises(ValueError, match="was made from another collection; give another output folder"):
        experiment.student_job(tiny)
