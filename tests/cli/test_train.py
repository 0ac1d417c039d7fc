"""`hf-kd-ranking train` on the toy data: it ends with results, and bad input ends it with one line and status 2."""

import json
from pathlib import Path

import numpy as np
import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.cli import main


@pytest.fixture
def options(encoder, toy, tmp_path) -> dict[str, str]:
    return {
        "--model_name": str(encoder),
        "--architecture": "bert_dot",
        "--max_query_length": "8",
        "--max_document_length": "16",
        "--teacher_scores": str(toy / "scores.tsv"),
        "--collection": str(toy / "collection.tsv"),
        "--queries": str(toy / "queries.tsv"),
        "--candidates": str(toy / "candidates.trec"),
        "--qrels": str(toy / "qrels.txt"),
        "--max_steps": "2",
        "--per_device_train_batch_size": "4",
        "--use_cpu": "true",
        "--output_dir": str(tmp_path / "out"),
    }


def run(monkeypatch, options: dict[str, str], *flags: str) -> int:
    arguments = [part for pair in options.items() for part in pair]
    monkeypatch.setattr("sys.argv", ["hf-kd-ranking", "train", *arguments, *flags])
    with pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code


def test_a_job_leaves_a_loadable_ranker_with_card_and_results(monkeypatch, capsys, options):
    assert run(monkeypatch, options, "--json") == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    folder = Path(options["--output_dir"])
    saved = json.loads((folder / "results.json").read_text())
    assert saved["after"]["eval_nDCG@10"] == printed["after"]["eval_nDCG@10"]
    assert saved["first_stage"]["RR@10"] == pytest.approx(1 / 5)  # the positives stand at ranks 5 and 8
    ranker = kd.Ranker.from_pretrained(folder)
    assert type(ranker.model) is kd.BertDot and ranker.model.config.max_document_length == 16
    assert "RR@10" in (folder / "README.md").read_text()


def test_a_live_teacher_and_batches_on_one_topic_and_a_resumed_run_keeps_its_clusters(
    monkeypatch, options, encoder, tokenizer, tmp_path
):
    for name, model in (("colbert", kd.ColBERT), ("dot", kd.BertDot)):
        ranker = kd.Ranker(model.from_encoder(encoder, max_query_length=8, max_document_length=16), tokenizer)
        ranker.save_pretrained(tmp_path / name)
    options |= {
        "--loss": "margin_mse:1,in_batch_margin_mse:0.75",
        "--in_batch_teacher": str(tmp_path / "colbert"),
        "--query_clusters": "3",
        "--cluster_model": str(tmp_path / "dot"),
        "--save_steps": "1",
    }
    assert run(monkeypatch, options) == 0
    saved = Path(options["--output_dir"]) / "query_clusters.npy"
    clusters, written = np.load(saved), saved.stat().st_mtime_ns
    assert set(clusters) == {-1, 0, 1, 2}
    assert run(monkeypatch, options | {"--max_steps": "3", "--resume_from_checkpoint": "true"}) == 0
    assert saved.stat().st_mtime_ns == written
    assert run(monkeypatch, options, "--overwrite") == 0
    assert saved.stat().st_mtime_ns > written


def test_an_option_file_is_read(monkeypatch, options, tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("".join(f"{name[2:]}: {value}\n" for name, value in options.items()))
    assert run(monkeypatch, {"--config": str(file)}) == 0
    assert (Path(options["--output_dir"]) / "results.json").is_file()


def break_file(name: str, text: bytes):
    def change(options: dict[str, str], folder: Path) -> None:
        path = folder / "broken.tsv"
        path.write_bytes(text)
        options[name] = str(path)

    return change


def set_option(name: str, value: str):
    return lambda options, folder: options.update({name: value})


def fill_output(options: dict[str, str], folder: Path) -> None:
    Path(options["--output_dir"]).mkdir()
    (Path(options["--output_dir"]) / "notes.txt").write_text("mine")


def empty_model(options: dict[str, str], folder: Path) -> None:
    (folder / "model").mkdir()
    options["--model_name"] = str(folder / "model")


SCORES, QUERIES, COLLECTION = "--teacher_scores", "--queries", "--collection"
BAD_INPUT = {
    "missing file": (set_option(SCORES, "nowhere.tsv"), "nowhere.tsv does not exist"),
    "empty file": (break_file(SCORES, b""), "broken.tsv is empty"),
    "columns": (break_file(SCORES, b"1\t2\t100\t1\t2\n1\t2\t100\t1\n"), "broken.tsv line 2: needed 5 tab-separated"),
    "no number": (
        break_file(SCORES, b"1\t2\t100\t1\t2\n1\tx\t100\t1\t2\n"),
        "line 2: neg_score must be a finite number",
    ),
    "NaN": (break_file(SCORES, b"nan\t2\t100\t1\t2\n"), "line 1: pos_score must be a finite number, got 'nan'"),
    "unknown document": (
        break_file(SCORES, b"1\t2\t100\t1\t2\n1\t2\t101\t1\t77\n"),
        "line 2: neg_id '77' is not among",
    ),
    "unknown query": (break_file(SCORES, b"1\t2\t7\t1\t2\n"), "line 1: query_id '7' is not among the 16 texts"),
    "two texts": (break_file(COLLECTION, b"1\tone\n1\tother\n"), "id '1' stands twice with different texts"),
    "bad UTF-8": (
        break_file(QUERIES, b"100\tfine\n101\t\xff\n"),
        "broken.tsv line 2: byte 0xff at column 5 is no UTF-8",
    ),
    "output not empty": (fill_output, "is not empty; give another one, --resume_from_checkpoint true"),
    "no model": (empty_model, "is no model folder: it has no config.json"),
    "architecture": (set_option("--architecture", "bert_dto"), "choose one of bert_cat, bert_dot"),
    "length": (set_option("--max_document_length", "65"), "max_document_length is 65 tokens, but the encoder"),
    "loss": (set_option("--loss", "margin_sme"), "did you mean 'margin_mse'"),
    "pooling": (set_option("--config_overrides", '{"pooling": "max"}'), "max"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(monkeypatch, capsys, options, tmp_path, case):
    change, message = BAD_INPUT[case]
    change(options, tmp_path)
    assert run(monkeypatch, options) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and message in lines[0]
    left = set(Path(options["--output_dir"]).glob("*")) if Path(options["--output_dir"]).exists() else set()
    assert {path.name for path in left} <= {"notes.txt"}


def test_missing_options_are_named(monkeypatch, capsys, options):
    del options["--collection"], options["--candidates"]
    assert run(monkeypatch, options) == 2
    assert "Training needs --collection as well" in capsys.readouterr().err
