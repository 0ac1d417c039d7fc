"""`hf-kd-ranking train` on the toy data: it ends with results, and bad input ends it with one line and status 2."""

import json
from pathlib import Path

import numpy as np
import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.cli import main
from hf_kd_ranking.evaluation.rerank import rerank_run


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


def test_train_leaves_a_ranker_with_card_and_results(monkeypatch, capsys, options):
    assert run(monkeypatch, options, "--json") == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    folder = Path(options["--output_dir"])
    saved = json.loads((folder / "results.json").read_text())
    assert saved["after"]["eval_nDCG@10"] == printed["after"]["eval_nDCG@10"]
    assert saved["first_stage"]["RR@10"] == pytest.approx(1 / 5)  # the positives are at ranks 5 and 8
    ranker = kd.Ranker.from_pretrained(folder)
    assert type(ranker.model) is kd.BertDot and ranker.model.config.max_document_length == 16
    assert "RR@10" in (folder / "README.md").read_text()


@pytest.mark.parametrize("architecture", ["bert_dot", "bert_cat"])
def test_train_says_how_much_it_does_not_read(monkeypatch, capsys, caplog, options, toy, architecture):
    lengths = {"--max_document_length": "7", "--architecture": architecture}
    assert run(monkeypatch, options | lengths, "--json") == 0
    cuts = json.loads(capsys.readouterr().out.splitlines()[-1])["cuts"]
    counts = np.array([len(text.split()) for text in kd.TextStore.from_tsv(toy / "collection.tsv").texts.to_pylist()])
    if architecture == "bert_dot":
        assert cuts["cut_texts"] == (counts > 5).mean()
    assert 0.1 < cuts["cut_texts"] < 0.9
    assert sum("are cut" in record.message and "longer than 7" in record.message for record in caplog.records) >= 1
    card = (Path(options["--output_dir"]) / "README.md").read_text()
    assert f"which cuts {100 * cuts['cut_texts']:.1f} % of the documents" in card


@pytest.mark.parametrize("measured", [[0.1, 0.2, 0.3], [0.1, 0.3, 0.2]])
def test_results_are_those_of_the_saved_weights(monkeypatch, options, measured):
    values = iter(measured)  # before training, and after each of its two steps
    monkeypatch.setattr(kd.RerankingEvaluator, "__call__", lambda self, ranker: {"nDCG@10": next(values)})
    every = {"--eval_strategy": "steps", "--eval_steps": "1", "--save_strategy": "steps", "--save_steps": "1"}
    keep_best = {"--load_best_model_at_end": "true", "--metric_for_best_model": "eval_nDCG@10"}
    assert run(monkeypatch, options | every | keep_best) == 0
    folder = Path(options["--output_dir"])
    assert json.loads((folder / "trainer_state.json").read_text())["best_metric"] == 0.3
    texts = (kd.TextStore.from_tsv(options[name]) for name in ("--queries", "--collection"))
    wanted = rerank_run(kd.Ranker.from_pretrained(folder), kd.read_run(options["--candidates"]), *texts)
    for query_id, ranking in kd.read_run(folder / "runs" / "held_out.trec").items():
        assert dict(ranking) == pytest.approx(dict(wanted[query_id]), rel=1e-4)
    after = kd.evaluate_run(wanted, kd.read_qrels(options["--qrels"]), ["nDCG@10"])["nDCG@10"]
    assert json.loads((folder / "results.json").read_text())["after"]["eval_nDCG@10"] == pytest.approx(after)


def test_a_ranker_is_trained_further(monkeypatch, options, encoder, tokenizer, tmp_path):
    ranker = kd.load_ranker(encoder, "colbert", max_query_length=8, max_document_length=16)
    kd.Ranker(ranker, tokenizer).save_pretrained(tmp_path / "earlier")
    del options["--architecture"]
    assert run(monkeypatch, options | {"--model_name": str(tmp_path / "earlier")}) == 0
    folder = Path(options["--output_dir"])
    assert (folder / "README.md").is_file() and type(kd.Ranker.from_pretrained(folder).model) is kd.ColBERT
    assert (folder / "runs" / "held_out.trec").read_text().split()[5] == "ColBERT"


def test_a_resumed_run_keeps_its_query_clusters(monkeypatch, options, encoder, tokenizer, tmp_path):
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


def test_train_reads_an_option_file(monkeypatch, options, tmp_path):
    file, wanted = tmp_path / "job.yaml", tmp_path / "other"
    file.write_text("".join(f"{name[2:]}: {value}\n" for name, value in options.items()))
    assert run(monkeypatch, {"--config": str(file), "--output_dir": str(wanted), "--max_steps": "1"}) == 0
    assert json.loads((wanted / "trainer_state.json").read_text())["global_step"] == 1
    assert not Path(options["--output_dir"]).exists()


# ---- Bad input ------------------------------------------------------------------------------------------------------


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
        "line 2: doc_id '77' is not among",
    ),
    "unknown query": (break_file(SCORES, b"1\t2\t7\t1\t2\n"), "line 1: query_id '7' is not among the 16 texts"),
    "two texts": (break_file(COLLECTION, b"1\tone\n1\tother\n"), "id '1' appears twice with different texts"),
    "bad UTF-8": (
        break_file(QUERIES, b"100\tfine\n101\t\xff\n"),
        "broken.tsv line 2: byte 0xff at column 5 is not UTF-8",
    ),
    "output not empty": (fill_output, "is not empty; give another one, --resume-from-checkpoint true"),
    "no model": (empty_model, "is not a model folder: it has no config.json"),
    "architecture": (set_option("--architecture", "bert_dto"), "choose one of bert_cat, bert_dot"),
    "length": (set_option("--max_document_length", "65"), "max_document_length is 65 tokens, but the encoder"),
    "clusters alone": (set_option("--query_clusters", "3"), "need both --query_clusters and --cluster_model"),
    "a document twice": (
        break_file(SCORES, b"3\t2\t100\t1\t1\n"),
        "line 1: document 1 appears twice in the row (1 of 1",
    ),
    "constant": (break_file(SCORES, b"2\t2\t100\t1\t2\n"), "All teacher margins are 0"),
    "loss": (set_option("--loss", "margin_sme"), "did you mean 'margin_mse'"),
    "setting of a loss": (set_option("--loss", "kl_div(temperature=0):1"), "temperature of kl_div must be a positive"),
    "cosines": (
        lambda options, folder: options.update(
            {"--loss": "margin_mse:1,in_batch_info_nce:0.2", "--config-overrides": '{"normalize": true}'}
        ),
        "give a temperature, in_batch_info_nce(temperature=0.05)",
    ),
    "sampling": (
        set_option("--train-sampling-strategy", "group_by_length"),
        "is 'random' or 'sequential', got 'group",
    ),
    "refused": (set_option("--label-smoothing-factor", "0.1"), "label_smoothing_factor must stay 0.0, got 0.1"),
    "of transformers": (set_option("--lr-scheduler-type", "steep"), "steep"),
    "metric": (
        lambda options, folder: options.update({"--eval-strategy": "epoch", "--metric-for-best-model": "AP"}),
        "metric_for_best_model is 'AP', and evaluation measures nDCG@10, RR@10",
    ),
    "patience": (set_option("--early-stopping-patience", "2"), "early_stopping_patience needs an eval_strategy"),
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


def test_evaluation_without_candidates_names_the_options(monkeypatch, capsys, options):
    del options["--candidates"], options["--qrels"]
    assert run(monkeypatch, options | {"--eval-strategy": "epoch"}) == 2
    assert "needs something to measure: an evaluator, such as RerankingEvaluator (--candidates and --qrels)" in (
        capsys.readouterr().err
    )


def test_several_gpus_without_a_launcher_are_refused_at_once(monkeypatch, capsys, options):
    monkeypatch.setattr(kd.RankingTrainingArguments, "n_gpu", 4)
    monkeypatch.setattr(kd.TrainingJob, "load_model", None)  # nothing is loaded
    assert run(monkeypatch, options) == 2
    assert "`accelerate launch -m hf_kd_ranking train ...`" in capsys.readouterr().err


def test_measures_without_a_cutoff_are_on_the_card(monkeypatch, options):
    assert run(monkeypatch, options, "--measures", "AP", "SetP", "--loss", "margin_mse:1,mse:0.5") == 0
    card = (Path(options["--output_dir"]) / "README.md").read_text()
    assert "| AP | " in card and "| SetP | " in card and "Not evaluated" not in card


def test_missing_options_are_named(monkeypatch, capsys, options):
    del options["--collection"], options["--candidates"]
    assert run(monkeypatch, options) == 2
    assert "Training needs --collection as well" in capsys.readouterr().err
