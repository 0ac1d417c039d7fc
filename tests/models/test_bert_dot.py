"""BERT_DOT: the original model's numbers (golden/bert_dot), and pooling by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModel

import hf_kd_ranking as kd

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINT = GOLDEN / "bert_dot"  # a plain DistilBERT, as it was published
EXPECTED = json.loads((CHECKPOINT / "expected.json").read_text())
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}  # of the golden cases' README: 2e-5 * (1 + |want|)


@pytest.fixture(scope="module")
def published() -> kd.BertDot:
    return kd.load_ranker(str(CHECKPOINT), "bert_dot")


def sides(case: dict) -> dict[str, dict[str, torch.Tensor]]:
    return {side: {name: torch.tensor(rows) for name, rows in case[side].items()} for side in ("query", "document")}


@pytest.mark.parametrize("case", EXPECTED["cases"].values(), ids=EXPECTED["cases"].keys())
def test_scores_and_vectors_equal_the_original_model(published, case):
    with torch.no_grad():
        output = published(**sides(case))
    np.testing.assert_allclose(output.scores, case["scores"], **TOLERANCE)
    for vectors in {"query_vectors", "document_vectors"} & case.keys():
        np.testing.assert_allclose(output[vectors], case[vectors], **TOLERANCE)


def test_scores_in_double_stay_within_the_tolerance():
    model = kd.BertDot.from_encoder(str(CHECKPOINT), dtype=torch.float64)
    for case in EXPECTED["cases"].values():
        with torch.no_grad():
            output = model(**sides(case))
        assert output.query_vectors.dtype == torch.float64
        # The dot product is taken in float32, so scores near 100 have five digits after the point.
        np.testing.assert_allclose(output.scores, case["scores_float64"], rtol=1e-6, atol=2e-5)


def test_scores_from_texts_equal_the_original_model_one_by_one(published, score_golden_texts):
    np.testing.assert_allclose(score_golden_texts(published), EXPECTED["texts"], **TOLERANCE)


def test_margin_mse_step_has_the_original_loss_and_gradients(check_golden_step):
    model = kd.load_ranker(str(CHECKPOINT), "bert_dot")
    check_golden_step(model, sides(EXPECTED["cases"]["batch4"]), EXPECTED["margin_mse_step"])


def test_saved_checkpoint_loads_without_an_architecture(published, tmp_path):
    published.save_pretrained(tmp_path)
    again, case = kd.load_ranker(str(tmp_path)), sides(EXPECTED["cases"]["batch8"])
    assert type(again) is kd.BertDot
    assert torch.allclose(again(**case).scores, published(**case).scores, atol=1e-5)


def test_from_pretrained_reads_the_published_plain_encoder(published):
    case = sides(EXPECTED["cases"]["batch8"])
    model = kd.BertDot.from_pretrained(CHECKPOINT)
    with torch.no_grad():
        assert torch.equal(model(**case).scores, published(**case).scores)


def test_from_pretrained_refuses_a_missing_head():
    with pytest.raises(ValueError, match=r"missing keys: compressor\.bias, compressor\.weight.*BertDot\.from_encoder"):
        kd.BertDot.from_pretrained(CHECKPOINT, compression_dim=4)


def test_loading_a_bert_cat_checkpoint_as_bert_dot_raises():
    with pytest.raises(ValueError, match=r"is a BERT_Cat checkpoint, not BERT_Dot: load_ranker"):
        kd.BertDot.from_pretrained(
            GOLDEN / "bert_cat", encoder_config=json.loads((GOLDEN / "bert_cat" / "backbone_config.json").read_text())
        )


# ---- Pooling --------------------------------------------------------------------------------------------------------


MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
IDS = torch.tensor([[2, 5, 3, 0, 0], [2, 6, 7, 8, 3]])


def test_cls_pooling_is_the_first_state_of_the_plain_encoder(encoder):
    model = kd.BertDot.from_encoder(str(encoder), max_document_length=60)
    states = AutoModel.from_pretrained(encoder)(input_ids=IDS, attention_mask=MASK).last_hidden_state
    vectors = model(document={"input_ids": IDS, "attention_mask": MASK}).document_vectors
    assert torch.allclose(vectors, states[:, 0], atol=1e-6)


def test_mean_pooling_is_the_mean_of_the_attended_states(encoder):
    model = kd.BertDot.from_encoder(str(encoder), max_document_length=60, pooling="mean")
    states = AutoModel.from_pretrained(encoder)(input_ids=IDS, attention_mask=MASK).last_hidden_state
    vectors = model(query={"input_ids": IDS, "attention_mask": MASK}).query_vectors
    assert torch.allclose(vectors[0], (states[0, 0] + states[0, 1] + states[0, 2]) / 3, atol=1e-6)
    assert torch.allclose(vectors[1], states[1].mean(0), atol=1e-6)


def test_mean_of_nothing_attended_is_zero(encoder):
    model = kd.BertDot.from_encoder(str(encoder), max_document_length=60, pooling="mean")
    vectors = model(document={"input_ids": IDS, "attention_mask": torch.zeros_like(MASK)}).document_vectors
    assert torch.equal(vectors, torch.zeros_like(vectors))


def test_compression_is_a_linear_layer_on_the_pooled_vector(encoder):
    model = kd.BertDot.from_encoder(str(encoder), max_document_length=60, compression_dim=6)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    pooled = model.bert_model(**inputs).last_hidden_state[:, 0]
    wanted = pooled @ model.compressor.weight.T + model.compressor.bias
    assert wanted.shape == (2, 6)
    assert torch.allclose(model(document=inputs).document_vectors, wanted, atol=1e-6)


def test_one_side_gives_that_sides_vectors_and_no_scores(encoder):
    output = kd.BertDot.from_encoder(str(encoder), max_document_length=60)(
        query={"input_ids": IDS, "attention_mask": MASK}
    )
    assert list(output.keys()) == ["query_vectors"]


def test_pooling_other_than_cls_or_mean_is_refused():
    with pytest.raises(StrictDataclassError, match=r"(?s)pooling.*cls.*mean.*got max"):
        kd.BertDotConfig(pooling="max")


def test_misaligned_queries_and_documents_name_both_shapes(encoder):
    model = kd.BertDot.from_encoder(str(encoder), max_document_length=60)
    side = {"input_ids": IDS, "attention_mask": MASK}
    with pytest.raises(ValueError, match=r"got 1 queries, shape \(1, 5\), and documents of shape \(2, 5\)"):
        model(query={name: tensor[:1] for name, tensor in side.items()}, document=side)
