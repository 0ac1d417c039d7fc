"""Model cards: valid metadata, training data and results of a run, and the finished cards of this repository."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from transformers import AutoTokenizer

import hf_kd_ranking as kd
from hf_kd_ranking.data.languages import detect_languages
from hf_kd_ranking.hub.manifest import select_measures, write_manifest
from hf_kd_ranking.hub.model_card import RankerCard, _base_model, select_efficiency, write_card, write_model_card
from hf_kd_ranking.hub.publish import check_card
from hf_kd_ranking.models import ARCHITECTURES

MODEL_CARDS = Path(__file__).parents[2] / "model_cards"


@pytest.fixture
def trained(model, make_trainer, toy) -> tuple[kd.RankingTrainer, ModelCard]:
    """A trainer after two steps, each with an evaluation, and the card that it wrote."""
    queries, documents = kd.TextStore.from_tsv(toy / "queries.tsv"), kd.TextStore.from_tsv(toy / "collection.tsv")
    candidates, qrels = kd.read_run(toy / "candidates.trec"), kd.read_qrels(toy / "qrels.txt")
    trainer = make_trainer(
        model,
        {"evaluator": kd.RerankingEvaluator(candidates, qrels, queries, documents)},
        max_steps=2,
        learning_rate=0.1,
        eval_strategy="steps",
        eval_steps=1,
        teacher_scale="0.25",
        data_name="Toy of words",
        teacher_name="three dice",
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    return trainer, ModelCard.load(Path(trainer.args.output_dir) / "README.md")


def test_model_card_has_metadata_and_last_measures(trained):
    trainer, card = trained
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-ranking"
    assert {"hf_kd_ranking", trainer.model.config.model_type} <= set(data["tags"])
    assert data.get("language", []) == detect_languages(trainer.documents) != []
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    first, last = (entry for entry in trainer.state.log_history if "eval_nDCG@10" in entry)
    assert first["eval_nDCG@10"] != last["eval_nDCG@10"], "the test could not tell which evaluation is in the card"
    assert found == {measure: round(last[f"eval_{measure}"], 4) for measure in ("nDCG@10", "RR@10")}
    assert {result.dataset_name for result in card.data.eval_results} == {"held-out queries of Toy of words"}


def test_model_card_names_teacher_data_settings_and_results(trained):
    trainer, card = trained
    last = [entry for entry in trainer.state.log_history if "eval_nDCG@10" in entry][-1]
    for phrase in (
        "loss `margin_mse`. Teacher: three dice.",
        "Trained on 64 teacher rows of Toy of words",
        "Queries are cut to 8 tokens, documents to",
        "| learning_rate | 0.1 |",
        "| per_device_train_batch_size | 8 |",
        "| max_steps | 2 |",
        "| teacher_scale | 0.25 |",
        f"| nDCG@10 | {last['eval_nDCG@10']:.4g} | ",
        trainer.model.config.summary,
        "arXiv",
    ):
        assert phrase in card.text, phrase


def test_model_card_has_no_placeholder(trained):
    _, card = trained
    assert not re.search(r"\{\{|\}\}|TODO|More Information", card.content)


def test_model_card_usage_runs_with_the_saved_model(trained):
    trainer, card = trained
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    name = Path(trainer.args.output_dir).name
    assert f'from_pretrained("{name}")' in code
    exec(compile(code.replace(f'"{name}"', repr(trainer.args.output_dir)), "README.md", "exec"), {})


def test_model_card_has_no_local_paths(trained, encoder, tmp_path):
    _, card = trained
    assert str(tmp_path) not in card.content
    assert str(encoder.parent) not in card.content


def test_base_model_is_a_name_on_the_hub_or_none():
    assert _base_model({"encoder_config": {"_name_or_path": "org/encoder"}}) == "org/encoder"
    assert _base_model({"encoder_config": {"_name_or_path": "folder"}}) is None
    assert _base_model({"encoder_config": {}}) is None


def test_model_card_without_evaluation_says_so(tmp_path):
    kd.BertDotConfig().save_pretrained(tmp_path)
    arguments = kd.RankingTrainingArguments(str(tmp_path), use_cpu=True).to_dict()
    write_manifest(tmp_path, arguments, 1_000_000, {"after": {}}, {})
    card = ModelCard.load(write_model_card(tmp_path, "some/model-name"))
    assert "Not evaluated on held-out queries." in card.text
    assert "1,000,000 teacher rows" in card.text
    assert "# model-name\n" in card.text and 'from_pretrained("some/model-name")' in card.text
    assert card.data.eval_results is None


def test_results_of_a_hub_data_set_are_eval_results(tmp_path):
    kd.BertDotConfig().save_pretrained(tmp_path)
    arguments = kd.RankingTrainingArguments(str(tmp_path), use_cpu=True, data_name="me/passages").to_dict()
    tests = {"nDCG@10": {"difference": 0.25, "p_value": 0.031, "queries": 9}}
    results = {"first_stage": {"nDCG@10": 0.25}, "after": {"nDCG@10": 0.5}, "tests": tests}
    write_manifest(tmp_path, arguments, 7, results, {}, languages=["de", "en"])
    card = ModelCard.load(write_model_card(tmp_path))
    assert card.data.language == ["de", "en"]
    assert "| held-out queries of me/passages | nDCG@10 | 0.5 | 0.25 | 0.031 |" in card.text
    assert card.data.datasets == "me/passages"
    entries = parse_eval_result_entries(yaml.safe_load((tmp_path / ".eval_results" / "ranking.yaml").read_text()))
    assert [(entry.dataset_id, entry.task_id, entry.value) for entry in entries] == [("me/passages", "nDCG@10", 0.5)]


def test_efficiency_is_saved_for_the_next_card(tmp_path, encoder):
    load = partial(kd.Ranker.from_pretrained, encoder, "bert_dot", "cpu", max_document_length=9)
    vector_bytes = 4 * load().model.config.encoder_config.hidden_size
    efficiency = select_efficiency(kd.measure_efficiency({"x": load}, ["a b"], ["c", "d e"]), "x")
    write_manifest(tmp_path, kd.RankingTrainingArguments(str(tmp_path), use_cpu=True).to_dict(), 7, {"after": {}}, {})
    kd.BertDotConfig().save_pretrained(tmp_path)
    texts = [ModelCard.load(write_model_card(tmp_path, efficiency=given)).text for given in (None, efficiency, None)]
    assert "Not measured with these weights;" in texts[0] and texts[1] == texts[2]
    assert f"| bytes stored per passage, float32 | {vector_bytes} |" in texts[1]
    median = efficiency["costs"]["total_ms"]["p50"]
    assert f"| latency per query with 2 passages, median | {median:,.1f} ms |" in texts[1]


def test_measures_are_recognised_without_a_cutoff():
    logged = {"eval_AP": 0.5, "eval_RR(rel=2)@10": 0.25, "eval_loss": 1.0, "eval_runtime": 2.0, "step": 3, "AP": 0.1}
    assert select_measures(logged) == {"AP": 0.5, "RR(rel=2)@10": 0.25}
    assert select_measures(logged, ["AP", "nDCG@10"]) == {"AP": 0.5}


def test_results_on_several_query_sets_are_separate_entries(tmp_path):
    published = yaml.safe_load((MODEL_CARDS / "published.yaml").read_text())
    name = "distilbert-dot-margin_mse-T2-msmarco"
    content = RankerCard(repository=name, **{**published["shared"], **published["cards"][name]})
    card = ModelCard.load(write_card(tmp_path, content))
    sets = {(result.dataset_name, result.metric_type, result.metric_value) for result in card.data.eval_results}
    assert ("MS MARCO DEV (49K queries), retrieval", "RR@10", 0.323) in sets
    assert ("TREC-DL 2019, retrieval", "nDCG@10", 0.697) in sets
    assert len(sets) == 6


def test_finished_cards_are_the_output_of_the_script(tmp_path):
    script = MODEL_CARDS.parent / "examples" / "write_model_cards.py"
    subprocess.run([sys.executable, script, "--output", tmp_path], check=True)
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len([path for path in written if path.name == "README.md"]) == 5
    for path in written:
        assert (MODEL_CARDS / path).read_text() == (tmp_path / path).read_text(), path


@pytest.mark.parametrize("path", sorted(MODEL_CARDS.glob("*/README.md")), ids=lambda path: path.parent.name)
def test_finished_card_is_complete_and_its_usage_runs(path, monkeypatch, encoder):
    check_card(path)
    card = ModelCard.load(path)
    headings = {"# " + path.parent.name, "## Results", "## Latency and memory", "## Limits and biases"}
    assert headings <= set(card.text.splitlines())
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    (arguments,) = re.findall(r"from_pretrained\((.*)\)", code)
    architecture = next(name for name, kind in ARCHITECTURES.items() if kind.config_class.model_type in card.data.tags)
    loaded = []

    def load(name: str, *wanted: str) -> kd.Ranker:
        loaded.append((name, *wanted))
        settings = {"max_document_length": 9} | ({"join_layer_idx": 1} if architecture == "prettr" else {})
        return kd.Ranker(kd.load_ranker(encoder, architecture, **settings), AutoTokenizer.from_pretrained(encoder))

    monkeypatch.setattr(kd.Ranker, "from_pretrained", load)
    exec(compile(code, str(path), "exec"), {})
    assert loaded == [eval(f"({arguments},)")]


def test_every_architecture_has_a_summary():
    assert all(model.config_class.summary for model in ARCHITECTURES.values())
