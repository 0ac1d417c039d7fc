"""ColBERT: the original class' numbers (golden/colbert, golden/colbert_default_dim), and cosines by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel

import hf_kd_ranking as kd
from hf_kd_ranking.models.scoring import max_sim

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = json.loads((GOLDEN / "colbert" / "expected.json").read_text())
CASES = EXPECTED["cases"]
DEFAULT_DIM = json.loads((GOLDEN / "colbert_default_dim" / "expected.json").read_text())["cases"]
VECTORS = np.load(GOLDEN / "colbert" / "vectors.npz")
BACKBONE = json.loads((GOLDEN / "bert_cat" / "backbone_config.json").read_text())  # one for all golden cases
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}  # of the golden cases' README: 2e-5 * (1 + |want|)
LENGTHS = {"max_query_length": 8, "max_document_length": 16}
IDS = torch.tensor([[2, 5, 6, 3], [2, 9, 3, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
INPUTS = {"input_ids": IDS, "attention_mask": MASK}


@pytest.fixture(scope="module")
def published(golden_checkpoint) -> kd.ColBERT:
    return kd.load_ranker(golden_checkpoint("colbert"), encoder_config=BACKBONE)


@pytest.fixture
def colbert(encoder) -> kd.ColBERT:
    torch.manual_seed(1)
    return kd.ColBERT.from_encoder(str(encoder), compression_dim=6, initializer_range=0.5, **LENGTHS)


def sides(case: dict) -> dict[str, dict[str, torch.Tensor]]:
    return {side: {name: torch.tensor(rows) for name, rows in case[side].items()} for side in ("query", "document")}


def without_padding(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One row up to its last attended token."""
    length = inputs["attention_mask"][row].nonzero().max() + 1
    return {name: tensor[row : row + 1, :length] for name, tensor in inputs.items()}


@torch.no_grad()
def score(model: kd.ColBERT, batch: dict) -> torch.Tensor:
    return model(**batch).scores


# ---- The original class ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_scores_equal_the_original_class(published, case):
    np.testing.assert_allclose(score(published, sides(case)), case["scores"], **TOLERANCE)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_scores_of_unpadded_pairs_equal_the_original_class(published, case):
    batch = sides(case)
    pairs = [{side: without_padding(batch[side], row) for side in batch} for row in range(len(case["scores"]))]
    got = [score(published, pair).item() for pair in pairs]
    np.testing.assert_allclose(got, case["scores_unpadded_one_by_one"], **TOLERANCE)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_all_pairs_equal_the_original_class(published, case):
    batch, count = sides(case), len(case["scores"])
    batch["document"] = {name: rows.expand(count, -1, -1) for name, rows in batch["document"].items()}  # (B, B, Ld)
    np.testing.assert_allclose(score(published, batch), case["scores_all_pairs"], **TOLERANCE)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_largest_products_equal_the_original_class(published, case):
    with torch.no_grad():
        output = published(**sides(case))
    products = output.query_vectors @ output.document_vectors.transpose(1, 2)  # (B, Lq, Ld)
    products[~output.document_mask.unsqueeze(1).expand_as(products)] = -torch.inf
    got = products.amax(-1) * output.query_mask
    np.testing.assert_allclose(got, case["per_query_term"], **TOLERANCE)


@pytest.mark.parametrize("name", ["single", "holes"])
def test_token_vectors_equal_the_original_class(published, name):
    with torch.no_grad():
        output = published(**sides(CASES[name]))
    for side in ("query", "document"):
        attended = np.array(CASES[name][side]["attention_mask"], dtype=bool)
        assert np.array_equal(output[f"{side}_mask"], attended)
        wanted = VECTORS[f"{name}/{side}_vectors"]
        assert output[f"{side}_vectors"].shape == wanted.shape
        np.testing.assert_allclose(output[f"{side}_vectors"][attended], wanted[attended], **TOLERANCE)


@pytest.mark.parametrize("case", DEFAULT_DIM.values(), ids=DEFAULT_DIM)
def test_published_config_without_a_dimension_has_768(golden_checkpoint, case):
    folder = golden_checkpoint("colbert_default_dim")
    assert "compression_dim" not in json.loads((folder / "config.json").read_text())
    model = kd.load_ranker(folder, encoder_config=BACKBONE)
    assert model.config.compression_dim == 768
    np.testing.assert_allclose(score(model, sides(case)), case["scores"], **TOLERANCE)


def test_first_vectors_of_the_768_equal_the_original_class(golden_checkpoint):
    model = kd.load_ranker(golden_checkpoint("colbert_default_dim"), encoder_config=BACKBONE)
    with torch.no_grad():
        output = model(**sides(DEFAULT_DIM["single"]))
    wanted = np.load(GOLDEN / "colbert_default_dim" / "vectors.npz")
    for name in ("query_vectors", "document_vectors"):
        np.testing.assert_allclose(output[name][:, :2], wanted[f"single/{name}"], **TOLERANCE)


def test_scores_from_texts_equal_the_original_class_one_by_one(published, score_golden_texts):
    np.testing.assert_allclose(score_golden_texts(published), EXPECTED["texts"], **TOLERANCE)


def test_margin_mse_step_has_the_original_loss_and_gradients(golden_checkpoint, check_golden_step):
    model = kd.load_ranker(golden_checkpoint("colbert"), encoder_config=BACKBONE)
    check_golden_step(model, sides(CASES["batch4"]), EXPECTED["margin_mse_step"])


@pytest.mark.parametrize("name", ["plain", "large_negative_dots", "between_the_two_constants"])
def test_max_sim_of_given_vectors_equals_the_original_class(name):
    keys = ("query_vectors", "document_vectors", "query_mask", "document_mask")
    tensors = [torch.from_numpy(VECTORS[f"aggregation/{name}/{key}"]) for key in keys]
    np.testing.assert_allclose(max_sim(*tensors), VECTORS[f"aggregation/{name}/notebook_scores"], **TOLERANCE)


@pytest.mark.parametrize("name", ["all_masked", "cls_only"])
def test_documents_without_tokens_equal_the_original_class(published, name):
    edge = EXPECTED["edge"]
    batch = sides({"query": edge["query"], "document": edge[name]["document"]})
    assert np.isfinite(edge[name]["scores"]).all()
    np.testing.assert_allclose(score(published, batch), edge[name]["scores"], **TOLERANCE)


def test_saved_checkpoint_holds_the_config_of_the_backbone(published, tmp_path):
    published.save_pretrained(tmp_path)
    batch = sides(CASES["batch8"])
    again = kd.load_ranker(tmp_path)
    assert type(again) is kd.ColBERT
    assert torch.allclose(score(again, batch), score(published, batch), atol=1e-5)


def test_published_weights_of_another_dimension_name_the_keys(golden_checkpoint):
    with pytest.raises(ValueError, match=r"mismatched keys: .*compressor\.weight"):
        kd.load_ranker(golden_checkpoint("colbert"), encoder_config=BACKBONE, compression_dim=23)


# ---- By hand --------------------------------------------------------------------------------------------------------


def test_vectors_are_a_linear_layer_on_encoder_states(colbert, encoder):
    states = AutoModel.from_pretrained(encoder)(**INPUTS).last_hidden_state
    wanted = states @ colbert.compressor.weight.T + colbert.compressor.bias
    assert wanted.shape == (2, 4, 6)
    assert torch.allclose(colbert(document=INPUTS).document_vectors, wanted, atol=1e-5)


def test_one_side_gives_the_vectors_that_both_sides_give(colbert):
    both = colbert(query=INPUTS, document={name: tensor.flip(0) for name, tensor in INPUTS.items()})
    query = colbert(query=INPUTS)
    document = colbert(document={name: tensor.flip(0) for name, tensor in INPUTS.items()})
    assert list(query.keys()) == ["query_vectors", "query_mask"]
    assert list(document.keys()) == ["document_vectors", "document_mask"]
    for name, tensor in [*query.items(), *document.items()]:
        assert torch.equal(tensor, both[name])


def test_normalized_vectors_give_sums_of_largest_cosines(encoder):
    torch.manual_seed(1)
    model = kd.ColBERT.from_encoder(str(encoder), compression_dim=6, normalize=True, **LENGTHS)
    query, document = IDS[:1], IDS[1:, :3]
    with torch.no_grad():
        output = model(query=with_mask(query), document=with_mask(document))
        plain = AutoModel.from_pretrained(encoder)
        rows = [model.compressor(plain(**with_mask(ids)).last_hidden_state[0]) for ids in (query, document)]
    wanted = 0.0
    for token in rows[0]:
        wanted += max(float(token @ other / (token @ token).sqrt() / (other @ other).sqrt()) for other in rows[1])
    assert output.scores.item() == pytest.approx(wanted, abs=1e-5)
    assert torch.allclose(output.query_vectors.norm(dim=-1), torch.ones(1, 4), atol=1e-6)


def with_mask(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("augmentation", [8, 0, 3])
def test_augmentation_adds_query_tokens(encoder, tokenizer, augmentation):
    torch.manual_seed(1)
    model = kd.ColBERT.from_encoder(str(encoder), compression_dim=6, query_augmentation=augmentation, **LENGTHS)
    ranker = kd.Ranker(model, tokenizer)
    special = [tokenizer.cls_token_id, tokenizer.vocab["moon"], tokenizer.sep_token_id]
    ids = torch.tensor([special + [tokenizer.mask_token_id] * augmentation])
    query = model(query=with_mask(ids)).query_vectors.detach()
    np.testing.assert_allclose(ranker.encode_queries(["moon"])[0], query[0], atol=1e-5)
    document = model(document=with_mask(torch.tensor([special]))).document_vectors.detach()
    assert ranker.score("moon", ["moon"]) == pytest.approx(max_sim(query, document).numpy(), abs=1e-5)


def test_padding_never_wins_where_all_similarities_are_negative(colbert):
    generator = torch.Generator().manual_seed(0)
    query, document = torch.rand(2, 3, 6, generator=generator) + 0.1, -torch.rand(2, 4, 6, generator=generator) - 0.1
    document[:, 2:] = 0  # padding: larger than any similarity, were it a token
    mask = torch.tensor([[True, True, False, False]] * 2)
    scores = colbert.score_vectors(query, document, torch.ones(2, 3, dtype=torch.bool), mask)
    assert (scores < 0).all()
    assert torch.allclose(scores, colbert.score_vectors(query, document[:, :2]))


def test_padding_of_either_side_changes_no_score(colbert):
    padded = {name: torch.nn.functional.pad(tensor, (0, 3)) for name, tensor in INPUTS.items()}
    wanted = colbert(query=INPUTS, document=INPUTS).scores
    assert torch.allclose(colbert(query=padded, document=padded).scores, wanted, atol=1e-4)
    one_by_one = [without_padding(INPUTS, row) for row in range(2)]
    got = torch.cat([colbert(query=row, document=row).scores for row in one_by_one])
    assert torch.allclose(got, wanted, atol=1e-4)
