"""The card that a training run writes: valid metadata, and what was trained on what with which result."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import hf_kd_ranking as kd
from hf_kd_ranking.hub.model_card import ARCHITECTURE, base_model, write_model_card
from hf_kd_ranking.models import ARCHITECTURES


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


def test_metadata_says_what_it_is_and_what_was_measured(trained):
    trainer, card = trained
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-ranking"
    assert {"hf_kd_ranking", trainer.model.config.model_type} <= set(data["tags"])
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    first, last = (entry for entry in trainer.state.log_history if "eval_nDCG@10" in entry)
    assert first["eval_nDCG@10"] != last["eval_nDCG@10"], "the test could not tell which evaluation is in the card"
    assert found == {measure: round(last[f"eval_{measure}"], 4) for measure in ("nDCG@10", "RR@10")}
    assert {result.dataset_name for result in card.data.eval_results} == {"Toy of words"}


def test_text_names_teacher_data_loss_settings_and_results(trained):
    trainer, card = trained
    last = [entry for entry in trainer.state.log_history if "eval_nDCG@10" in entry][-1]
    for fact in (
        "loss `margin_mse`, teacher: three dice",
        "Trained on 64 teacher rows of Toy of words",
        "Queries are cut at 8 tokens, documents at",
        "| learning_rate | 0.1 |",
        "| per_device_train_batch_size | 8 |",
        "| max_steps | 2 |",
        "| teacher_scale | 0.25 |",
        f"| nDCG@10 | {last['eval_nDCG@10']:.4f} |",
        ARCHITECTURE[trainer.model.config.model_type],
        "arXiv",
    ):
        assert fact in card.text, fact


def test_every_placeholder_is_filled(trained):
    _, card = trained
    assert not re.search(r"\{\{|\}\}|TODO|More Information", card.content)


def test_usage_is_code_that_runs_with_the_saved_model(trained):
    trainer, card = trained
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    name = Path(trainer.args.output_dir).name
    assert f'from_pretrained("{name}")' in code
    exec(compile(code.replace(f'"{name}"', repr(trainer.args.output_dir)), "README.md", "exec"), {})


def test_local_paths_stay_out_of_the_card(trained, encoder, tmp_path):
    _, card = trained
    assert str(tmp_path) not in card.content
    assert str(encoder.parent) not in card.content


def test_base_model_is_the_encoders_hub_name_or_nothing():
    assert base_model({"encoder_config": {"_name_or_path": "org/encoder"}}) == "org/encoder"
    assert base_model({"encoder_config": {"_name_or_path": "folder"}}) is None
    assert base_model({"encoder_config": {}}) is None


def test_card_without_evaluation_says_so(tmp_path):
    arguments = kd.RankingTrainingArguments(str(tmp_path), use_cpu=True).to_dict()
    config = kd.BertDotConfig().to_dict()
    path = write_model_card(tmp_path, "some/where/model-name", config, arguments, results={}, training_rows=1_000_000)
    card = ModelCard.load(path)
    assert "Not evaluated on held-out queries." in card.text
    assert "1,000,000 teacher rows" in card.text
    assert "# model-name" in card.text and "some/where" not in card.content
    assert card.data.eval_results is None


def test_every_architecture_has_its_sentences():
    assert {model.config_class.model_type for model in ARCHITECTURES.values()} == ARCHITECTURE.keys()
