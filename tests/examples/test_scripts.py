"""The example scripts run on toy files with a tiny ranker."""

import ast
import json
import shutil
from pathlib import Path

import pytest

import hf_kd_ranking as kd

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = [path for path in sorted(EXAMPLES.glob("*.py")) if path.name != "convert_flag_embedding.py"]
SHORT = ("rank.py", "retrieve.py", "evaluate.py", "score_teacher.py", "distill.py", "export.py")


def as_arguments(files: dict[str, Path], *names: str) -> list:
    return [part for name in names for part in (name, files[name])]


def test_rank_prints_all_passages(run_example, save_ranker):
    lines = run_example("rank.py", "--model", save_ranker("bert_cat")).splitlines()
    assert len(lines) == 4
    assert ast.literal_eval(lines[3])["document"] in lines[0]  # the pipeline agrees


@pytest.mark.parametrize("architecture", ["bert_dot", "colbert"])
def test_retrieve_searches_and_fuses(run_example, files, save_ranker, tmp_path, architecture):
    arguments = as_arguments(files, "--collection", "--queries")
    output = tmp_path / "indexes"
    printed = run_example("retrieve.py", "--model", save_ranker(architecture), *arguments, "--output", output)
    assert [line.split()[0] for line in printed.splitlines()[1:]] == ["BM25"] * 3 + ["ranker"] * 3 + ["fused"] * 3
    assert {path.name for path in output.iterdir()} >= {"bm25", "vectors"}


def test_evaluate_compares_with_bm25(run_example, files, save_ranker):
    arguments = as_arguments(files, "--collection", "--queries", "--qrels")
    printed = run_example("evaluate.py", "--model", save_ranker("bert_dot"), *arguments)
    assert "RR@10" in printed and "| BM25 |" in printed and "| ranker |" in printed


def test_score_teacher_writes_rows(run_example, files, save_ranker, tmp_path):
    arguments = as_arguments(files, "--collection", "--queries", "--qrels")
    teacher, output = save_ranker("bert_cat"), tmp_path / "scores"
    printed = run_example("score_teacher.py", "--model", teacher, *arguments, "--output", output)
    rows = kd.load_teacher_scores(output / "scores.tsv")
    assert f"{len(rows)} rows" in printed and len(rows) == 2 * 60


@pytest.mark.slow
def test_distill_delivers_a_pipeline(run_example, files, save_ranker, encoder, tmp_path):
    arguments = as_arguments(files, "--collection", "--queries", "--qrels")
    options = ["--teacher", save_ranker("bert_cat"), "--model", encoder, "--output", tmp_path / "distilled", "--force"]
    printed = run_example("distill.py", *arguments, *options)
    assert "bert_dot teacher" in printed and "chosen: " in printed
    assert kd.load_pipeline(tmp_path / "distilled" / "best").search("apple bread", k=3)


@pytest.mark.slow
def test_export_writes_a_graph_with_equal_scores(run_example, save_ranker, tmp_path):
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    printed = run_example("export.py", "--model", save_ranker("bert_dot"), "--output", tmp_path / "exported")
    assert "largest_difference" in printed and "onnxruntime" in printed


@pytest.fixture
def training(toy, encoder, tmp_path) -> list:
    """Options of a short training on the toy data."""
    options = ["--architecture", "bert_dot", "--model", encoder, "--max-query-length", 8, "--max-document-length", 16]
    for name in ("collection", "queries"):
        options += [f"--{name}", toy / f"{name}.tsv"]
    options += ["--scores", toy / "scores.tsv", "--candidates", toy / "candidates.trec", "--qrels", toy / "qrels.txt"]
    options += ["--max-steps", 4, "--batch-size", 8, "--save-steps", 2, "--use-cpu", "--disable-tqdm", "true"]
    return [*options, "--output", tmp_path / "trained"]


def test_train_has_the_results_of_train_ranker(run_example, training, tmp_path):
    from hf_kd_ranking.cli.train import parse_job

    printed = run_example("train.py", *training)
    assert "saved to" in printed
    results = json.loads((tmp_path / "trained" / "results.json").read_text())
    job, args, _ = parse_job([str(part) for part in training[:-1]] + [str(tmp_path / "other")])
    expected = kd.train_ranker(job, args)
    for name in ("first_stage", "before", "after", "tests", "job"):
        assert results[name] == json.loads(json.dumps(expected[name]))
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("trained", "other")]
    assert manifests[0]["results"] == manifests[1]["results"]
    written = {path.name for path in (tmp_path / "trained").iterdir()}
    assert written == {path.name for path in (tmp_path / "other").iterdir()}
    kd.Ranker.from_pretrained(tmp_path / "trained")


def test_train_resumes(run_example, training, tmp_path):
    run_example("train.py", *training)
    whole = (tmp_path / "trained" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "trained" / "checkpoint-4")
    run_example("train.py", *training, "--resume-from-checkpoint", "true")
    assert (tmp_path / "trained" / "model.safetensors").read_bytes() == whole


def test_train_refuses_bad_input_in_one_line(run_example, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_example("train.py", "--architecture", "bert_dot")
    assert exit_.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_write_model_cards_renders_the_published_cards(run_example, tmp_path):
    run_example("write_model_cards.py", "--output", tmp_path)
    for card in tmp_path.rglob("README.md"):
        committed = EXAMPLES.parent / "model_cards" / card.parent.name / "README.md"
        assert card.read_text().splitlines()[:3] == committed.read_text().splitlines()[:3]
    assert len(list(tmp_path.rglob("README.md"))) == 5


def test_write_model_cards_renders_the_students_of_a_demo(run_example, training, tmp_path):
    chosen = tmp_path / "demo" / "students" / "bert_dot teacher" / "chosen" / "ranker"
    run_example("train.py", *training[:-1], chosen)
    run_example("write_model_cards.py", "--demo", tmp_path / "demo", "--output", tmp_path / "cards")
    card = tmp_path / "cards" / "bert_dot-teacher-pydocs" / "README.md"
    assert "\n# bert_dot-teacher-pydocs\n" in card.read_text()
    with pytest.raises(SystemExit, match="has no students; give the output folder of `make demo`"):
        run_example("write_model_cards.py", "--demo", tmp_path / "cards", "--output", tmp_path / "cards")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_is_short_and_documented(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= (40 if path.name in SHORT else 80)
    assert f"    python examples/{path.name}" in text or f"examples/{path.name}" in text.split('"""')[1]
