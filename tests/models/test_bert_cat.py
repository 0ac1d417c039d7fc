"""BERT_CAT: the original class' numbers (golden/bert_cat), and its life as a plain sequence classifier."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, pipeline

import hf_kd_ranking as kd

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINT = GOLDEN / "bert_cat"
EXPECTED = json.loads((CHECKPOINT / "expected.json").read_text())
TEXTS = json.loads((GOLDEN / "texts.json").read_text())
BACKBONE = json.loads((CHECKPOINT / "backbone_config.json").read_text())
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}  # of the golden cases' README: 2e-5 * (1 + |want|)


def load(dtype: torch.dtype = torch.float32) -> kd.BertCat:
    return kd.BertCat.from_pretrained(CHECKPOINT, encoder_config=BACKBONE, dtype=dtype)


@pytest.fixture(scope="module")
def published() -> kd.BertCat:
    return load()


@pytest.fixture
def bert_cat(encoder) -> kd.BertCat:
    torch.manual_seed(1)
    return kd.BertCat.from_encoder(str(encoder), max_query_length=8, max_document_length=16, initializer_range=0.5)


def tensors(case: dict) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(rows) for name, rows in case["query_n_doc_sequence"].items()}


@pytest.mark.parametrize("case", EXPECTED["cases"].values(), ids=EXPECTED["cases"].keys())
def test_scores_equal_the_original_class(published, case):
    with torch.no_grad():
        output = published(**tensors(case))
    assert output.logits.shape == (len(case["scores"]), 1)
    np.testing.assert_allclose(output.logits[:, 0], case["scores"], **TOLERANCE)
    np.testing.assert_allclose(output.scores, case["scores"], **TOLERANCE)


def test_scores_in_double_equal_the_original_class_in_double():
    model = load(torch.float64)
    for case in EXPECTED["cases"].values():
        with torch.no_grad():
            logits = model(**tensors(case)).logits
        np.testing.assert_allclose(logits[:, 0], case["scores_float64"], rtol=1e-9, atol=1e-9)


def test_scores_from_texts_equal_the_original_class_one_by_one(published, score_golden_texts):
    wanted = np.asarray(EXPECTED["texts"])  # (queries, documents)
    # An empty document is a document: [CLS] q [SEP] [SEP], and not the single text that a lone pair is tokenised to.
    wanted[:, TEXTS["empty_document_index"]] = EXPECTED["texts_empty_document"]
    np.testing.assert_allclose(score_golden_texts(published), wanted, **TOLERANCE)


def test_margin_mse_step_has_the_original_loss_and_gradients(check_golden_step):
    # from_pretrained leaves dropout off
    check_golden_step(load(), tensors(EXPECTED["cases"]["batch4"]), EXPECTED["margin_mse_step"])


def test_published_config_has_one_label_and_its_sizes_are_saved(published, tmp_path):
    assert (published.config.num_labels, published.config.problem_type) == (1, "regression")
    published.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)  # without the override
    assert (again.config.num_labels, again.config.problem_type) == (1, "regression")
    case = EXPECTED["cases"]["batch8"]
    assert torch.allclose(again(**tensors(case)).logits, published(**tensors(case)).logits, atol=1e-6)


def test_published_weights_with_the_wrong_sizes_name_the_keys():
    with pytest.raises(ValueError, match=r"mismatched keys: .*_classification_layer\.weight"):
        kd.BertCat.from_pretrained(CHECKPOINT, encoder_config=BACKBONE | {"dim": 16, "hidden_dim": 32})


def test_text_classification_pipeline_returns_the_raw_logit(bert_cat, tokenizer):
    # With two labels, or without problem_type, the pipeline would answer with a softmax or a sigmoid of it.
    classify = pipeline("text-classification", model=bert_cat, tokenizer=tokenizer)
    pairs = [("what is bread", "bread house iron"), ("moon", "night lake lake")]
    answers = classify([{"text": query, "text_pair": document} for query, document in pairs])
    wanted = [bert_cat(**tokenizer([query], [doc], return_tensors="pt")).logits.item() for query, doc in pairs]
    assert not all(0 <= score <= 1 for score in wanted), "the random weights hide a sigmoid or softmax"
    assert [answer["score"] for answer in answers] == pytest.approx(wanted, rel=1e-5)


def test_labels_give_the_mean_squared_error_of_the_scores(bert_cat, tokenizer):
    inputs = tokenizer(["moon", "bread"], ["night", "house iron"], return_tensors="pt", padding=True)
    output = bert_cat(**inputs, labels=torch.tensor([1.0, -2.0]))
    first, second = output.scores.tolist()
    assert output.loss.item() == pytest.approx(((first - 1) ** 2 + (second + 2) ** 2) / 2)
    assert bert_cat(**inputs).loss is None


def test_segments_of_the_pair_reach_the_encoder(bert_cat, tokenizer):
    inputs = tokenizer(["moon"], ["night lake"], return_tensors="pt")
    assert inputs["token_type_ids"].sum() > 0
    without = {name: tensor for name, tensor in inputs.items() if name != "token_type_ids"}
    assert not torch.allclose(bert_cat(**inputs).scores, bert_cat(**without).scores)
