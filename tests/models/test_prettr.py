"""PreTTR: the original class' numbers (golden/prettr), the split against plain encoders, and stored documents."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoModel,
    BertConfig,
    DistilBertConfig,
    PreTrainedConfig,
    RobertaConfig,
)

import hf_kd_ranking as kd

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = json.loads((GOLDEN / "prettr" / "expected.json").read_text())
INPUTS = json.loads((GOLDEN / "colbert" / "expected.json").read_text())  # both rankers were given the same
VECTORS = np.load(GOLDEN / "prettr" / "vectors.npz")
CASES = [pytest.param(INPUTS["cases"][name], case, id=name) for name, case in EXPECTED["cases"].items()]
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}  # of the golden cases' README: 2e-5 * (1 + |want|)
LENGTHS = {"max_query_length": 8, "max_document_length": 16}
TINY = {"vocab_size": 40, "max_position_embeddings": 64, "initializer_range": 0.5}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
ENCODERS = {
    "distilbert": DistilBertConfig(**TINY, dim=16, n_layers=2, n_heads=2, hidden_dim=32),
    "bert": BertConfig(**TINY, **SIZES),
    "roberta": RobertaConfig(**TINY, **SIZES, pad_token_id=1),
}


@pytest.fixture(scope="module")
def published(golden_checkpoint) -> kd.PreTTR:
    return kd.load_ranker(golden_checkpoint("prettr"))


@pytest.fixture(scope="module")
def batched(golden_checkpoint) -> kd.PreTTR:
    """With the positions of the authors' code for batches."""
    return kd.load_ranker(golden_checkpoint("prettr"), document_position_offset="query_width")


@pytest.fixture
def prettr(encoder) -> kd.PreTTR:
    return on_encoder(encoder)


def on_encoder(encoder: Path, **config) -> kd.PreTTR:
    torch.manual_seed(1)
    return kd.PreTTR.from_encoder(str(encoder), **({"join_layer_idx": 1, "initializer_range": 0.5} | LENGTHS | config))


def sides(case: dict) -> dict[str, dict[str, torch.Tensor]]:
    return {side: {name: torch.tensor(rows) for name, rows in case[side].items()} for side in ("query", "document")}


def side(*rows: list[int], padding: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of texts of given ids, padded to the longest."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [padding] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


QUERY = side([2, 5, 6, 3], [2, 9, 3, 4])
DOCUMENT = side([2, 11, 12, 13, 14, 3], [2, 7, 8, 3])


@torch.no_grad()
def score(model: kd.PreTTR, query: dict, document: dict) -> torch.Tensor:
    return model(query=query, document=document).scores


def save_encoder(config: PreTrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


# ---- The original class ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("inputs", "case"), CASES)
def test_query_width_scores_equal_the_original_class_in_batches(batched, inputs, case):
    np.testing.assert_allclose(score(batched, **sides(inputs)), case["scores"], **TOLERANCE)


@pytest.mark.parametrize(("inputs", "case"), CASES)
def test_published_scores_equal_the_original_class_one_by_one(published, inputs, case):
    assert published.config.document_position_offset == "query_length"
    np.testing.assert_allclose(score(published, **sides(inputs)), case["scores_unpadded_one_by_one"], **TOLERANCE)


@pytest.mark.parametrize("name", ["single", "batch4"])
@pytest.mark.parametrize("layer", [0, 1, 2, 5, 6])
def test_scores_joined_at_other_layers_equal_the_original_class(golden_checkpoint, layer, name):
    model = kd.load_ranker(golden_checkpoint("prettr"), join_layer_idx=layer, document_position_offset="query_width")
    got = score(model, **sides(INPUTS["cases"][name]))
    np.testing.assert_allclose(got, EXPECTED["cases"][name][f"scores_join_at_{layer}"], **TOLERANCE)


@pytest.mark.parametrize("name", ["single", "holes"])
def test_vectors_are_the_original_states_below_the_join(batched, name):
    case = INPUTS["cases"][name]
    with torch.no_grad():
        output = batched(**sides(case))
    masks = {side: np.array(case[side]["attention_mask"], dtype=bool) for side in ("query", "document")}
    masks["document"] = masks["document"][:, 1:]  # without [CLS]
    for which, attended in masks.items():
        assert np.array_equal(output[f"{which}_mask"], attended)
        wanted = VECTORS[f"{name}/{which}_vectors"]
        assert output[f"{which}_vectors"].shape == wanted.shape
        np.testing.assert_allclose(output[f"{which}_vectors"][attended], wanted[attended], **TOLERANCE)


def test_scores_from_texts_equal_the_original_class_one_by_one(published, score_golden_texts):
    np.testing.assert_allclose(score_golden_texts(published), EXPECTED["texts"], **TOLERANCE)


def test_margin_mse_step_has_the_original_loss_and_gradients(golden_checkpoint, check_golden_step):
    model = kd.load_ranker(golden_checkpoint("prettr"), document_position_offset="query_width")
    check_golden_step(model, sides(INPUTS["cases"]["batch4"]), EXPECTED["margin_mse_step"])


@pytest.mark.parametrize("name", ["all_masked", "cls_only"])
def test_documents_without_tokens_have_finite_scores(batched, name):
    inputs = sides({"query": INPUTS["edge"]["query"], "document": INPUTS["edge"][name]["document"]})
    full, empty = score(batched, **inputs).tolist()
    wanted, nan = EXPECTED["edge"][name]["scores"]
    assert np.isnan(nan)
    assert np.isfinite(empty)
    assert full == pytest.approx(wanted, rel=2e-5, abs=2e-5)


# ---- Loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "load",
    [lambda folder: kd.load_ranker(folder, "bert_dot"), kd.BertDot.from_pretrained, kd.BertDot.from_encoder],
    ids=["load_ranker", "from_pretrained", "from_encoder"],
)
def test_published_checkpoint_is_not_a_dot_model(golden_checkpoint, load):
    with pytest.raises(ValueError, match=r"PreTTR checkpoint, not|_classification_layer\.weight"):
        load(golden_checkpoint("prettr"))


def test_a_plain_encoder_names_the_missing_head():
    with pytest.raises(ValueError, match=r"missing keys: _classification_layer\.weight\)\. .*PreTTR\.from_encoder"):
        kd.PreTTR.from_pretrained(GOLDEN / "bert_dot")  # a plain DistilBERT


def test_a_layer_index_in_the_published_config_counts(golden_checkpoint, tmp_path):
    weights = torch.load(golden_checkpoint("prettr") / "pytorch_model.bin")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    config = json.loads((golden_checkpoint("prettr") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"join_layer_idx": 1}))
    model = kd.load_ranker(tmp_path)
    assert (model.config.join_layer_idx, kd.load_ranker(golden_checkpoint("prettr")).config.join_layer_idx) == (1, 3)
    got = score(model, **sides(INPUTS["cases"]["single"]))
    np.testing.assert_allclose(got, EXPECTED["cases"]["single"]["scores_join_at_1"], **TOLERANCE)


def test_saved_published_checkpoint_keeps_positions_and_scores(published, tmp_path):
    published.save_pretrained(tmp_path)
    again, inputs = kd.load_ranker(tmp_path), sides(INPUTS["cases"]["batch8"])
    assert type(again) is kd.PreTTR
    assert again.config.document_position_offset == "query_length"
    assert torch.allclose(score(again, **inputs), score(published, **inputs), atol=1e-6)


@pytest.mark.parametrize("offset", ["query_width", 38])
def test_overridden_positions_are_saved(golden_checkpoint, published, offset, tmp_path):
    model = kd.load_ranker(golden_checkpoint("prettr"), document_position_offset=offset)
    model.save_pretrained(tmp_path)
    again, inputs = kd.load_ranker(tmp_path), sides(INPUTS["cases"]["batch4"])
    assert again.config.document_position_offset == offset
    assert torch.allclose(score(again, **inputs), score(model, **inputs), atol=1e-6)
    assert not torch.allclose(score(again, **inputs), score(published, **inputs), atol=1e-2)


@pytest.mark.parametrize(("layer", "depth"), [(-1, 6), (7, 6)])
def test_a_join_layer_that_the_encoder_lacks_is_refused(layer, depth):
    with pytest.raises(ValueError, match=rf"join_layer_idx must be 0\.\.{depth}, the encoder's layers; got {layer}"):
        kd.PreTTRConfig(join_layer_idx=layer)


def test_an_overridden_join_layer_is_checked_too(golden_checkpoint):
    with pytest.raises(ValueError, match=r"join_layer_idx must be 0\.\.6, the encoder's layers; got 7"):
        kd.load_ranker(golden_checkpoint("prettr"), join_layer_idx=7)


def test_encoder_that_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match=r"cannot split albert encoders; it can split distilbert, bert, roberta"):
        kd.PreTTRConfig(encoder_config=AlbertConfig())


def test_positions_beyond_the_encoders_are_refused(encoder):
    with pytest.raises(ValueError, match=r"document_position_offset \+ max_document_length - 1 is 65 .* for 64"):
        on_encoder(encoder, document_position_offset=50)
    with pytest.raises(ValueError, match=r"document_position_offset must not be negative, got -1"):
        on_encoder(encoder, document_position_offset=-1)


# ---- The split, against plain encoders ------------------------------------------------------------------------------


def plain_states(encoder: PreTrainedConfig | Path, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return AutoModel.from_pretrained(encoder)(**inputs).last_hidden_state


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ENCODERS)
def test_joined_at_layer_0_is_the_plain_encoder(name, attention, tmp_path):
    folder = save_encoder(ENCODERS[name], tmp_path)
    model = on_encoder(folder, join_layer_idx=0, document_position_offset="query_width")
    model.set_attn_implementation(attention)
    assert model.bert_model.config._attn_implementation == attention
    document = side([2, 11, 12, 13, 14, 3], [2, 7, 8, 3], padding=ENCODERS[name].pad_token_id)
    joined = {key: torch.cat([QUERY[key], document[key][:, 1:]], 1) for key in QUERY}
    states = plain_states(folder, **joined)
    wanted = states[:, 0] @ model._classification_layer.weight[0]
    assert abs(wanted[0] - wanted[1]) > 0.01, "scores too alike to tell a change"
    assert torch.allclose(score(model, QUERY, document), wanted, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ENCODERS)
def test_all_layers_separate_ignores_the_document(name, attention, tmp_path):
    folder = save_encoder(ENCODERS[name], tmp_path)
    model = on_encoder(folder, join_layer_idx=2)
    model.set_attn_implementation(attention)
    states = plain_states(folder, **QUERY)
    with torch.no_grad():
        output = model(query=QUERY, document=DOCUMENT)
    assert torch.allclose(output.query_vectors, states, atol=1e-5)
    assert torch.allclose(output.scores, states[:, 0] @ model._classification_layer.weight[0], atol=1e-5)
    other = {name: tensor.flip(0) for name, tensor in DOCUMENT.items()}
    assert torch.equal(score(model, QUERY, other), output.scores)


def test_segments_reach_the_encoder(encoder, prettr):
    ids = {"token_type_ids": torch.ones_like(DOCUMENT["input_ids"])}
    assert not torch.allclose(score(prettr, QUERY, DOCUMENT | ids), score(prettr, QUERY, DOCUMENT), atol=1e-3)
    model = on_encoder(encoder, join_layer_idx=0, document_position_offset="query_width")
    query, document = QUERY | {"token_type_ids": torch.zeros_like(QUERY["input_ids"])}, DOCUMENT | ids
    states = plain_states(encoder, **{key: torch.cat([query[key], document[key][:, 1:]], 1) for key in query})
    wanted = states[:, 0] @ model._classification_layer.weight[0]
    assert torch.allclose(score(model, query, document), wanted, atol=1e-5)


def test_document_of_one_token_does_not_change_the_score(encoder):
    model = on_encoder(encoder)
    states = plain_states(encoder, **QUERY)
    wanted = states[:, 0] @ model._classification_layer.weight[0]
    got = score(model, QUERY, side([2], [2]))
    assert got.isfinite().all()
    assert torch.allclose(got, wanted, atol=1e-5)
    assert torch.allclose(score(model, QUERY, side([2, 7], [2]))[1], wanted[1], atol=1e-5)


def test_positions_of_a_document_start_at_the_offset(tmp_path):
    folder = save_encoder(ENCODERS["bert"], tmp_path)
    model = on_encoder(folder, join_layer_idx=1, document_position_offset=20)
    plain = AutoModel.from_pretrained(folder)
    inputs = {name: tensor[:, 1:] for name, tensor in DOCUMENT.items()}
    positions = torch.arange(20, 25).expand(2, -1)
    with torch.no_grad():
        states = plain(**inputs, position_ids=positions, output_hidden_states=True).hidden_states[1]
        vectors = model(document=DOCUMENT).document_vectors
    attended = inputs["attention_mask"].bool()
    assert torch.allclose(vectors[attended], states[attended], atol=1e-5)


# ---- Stored documents -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"document_position_offset": 30}, {"compression_dim": 6}], ids=str)
def test_stored_vectors_score_as_forward_does(encoder, config):
    model = on_encoder(encoder, **config)
    with torch.no_grad():
        both = model(query=QUERY, document=DOCUMENT)
        query, document = model(query=QUERY), model(document=DOCUMENT)
        scores = model.score_vectors(
            query.query_vectors, document.document_vectors, query.query_mask, document.document_mask
        )
    assert torch.allclose(scores, both.scores, atol=1e-6)
    assert abs(scores[0] - scores[1]) > 0.01, "scores too alike to tell a change"
    assert document.document_vectors.shape == (2, 5, config.get("compression_dim", 16))
    assert query.query_vectors.shape == (2, 4, 16)  # queries are not stored


def test_documents_start_after_the_longest_query_by_default(prettr):
    assert prettr.config.document_position_offset == 8 + 8  # max_query_length + query_augmentation
    assert kd.PreTTRConfig().document_position_offset == 38


def test_vectors_of_a_document_do_not_depend_on_the_query(prettr):
    with torch.no_grad():
        outputs = [prettr(query=query, document=DOCUMENT) for query in (QUERY, side([2, 8, 8, 8, 8, 3], [2, 3]))]
        alone = prettr(document=DOCUMENT)
    for output in outputs:
        assert torch.equal(output.document_vectors, alone.document_vectors)
    assert not torch.allclose(outputs[0].scores, outputs[1].scores, atol=1e-3)


@pytest.mark.parametrize("offset", ["query_length", "query_width"])
def test_documents_that_follow_the_query_need_a_query(encoder, offset):
    model = on_encoder(encoder, document_position_offset=offset)
    with pytest.raises(ValueError, match=rf"document_position_offset='{offset}'.*for example .*=16"):
        model(document=DOCUMENT)
    assert model(query=QUERY).query_vectors.shape == (2, 4, 16)


def test_offsets_follow_the_length_or_width_of_the_query(encoder):
    padded = side([2, 5, 6, 3], [2, 9, 3])
    alone = {name: tensor[1:, :3] for name, tensor in padded.items()}
    document = {name: tensor[1:] for name, tensor in DOCUMENT.items()}
    by_length, by_width = (
        on_encoder(encoder, document_position_offset=f"query_{what}") for what in ("length", "width")
    )
    wanted = score(by_length, alone, document)
    assert torch.allclose(score(by_width, alone, document), wanted, atol=1e-6)
    assert torch.allclose(score(by_length, padded, DOCUMENT)[1], wanted, atol=1e-5)
    assert not torch.allclose(score(by_width, padded, DOCUMENT)[1], wanted, atol=1e-3)


def test_scores_without_the_masks_are_refused(prettr):
    with torch.no_grad():
        output = prettr(query=QUERY, document=DOCUMENT)
    with pytest.raises(ValueError, match="PreTTR scores need the masks of both sides"):
        prettr.score_vectors(output.query_vectors, output.document_vectors)


def test_texts_longer_than_the_positions_name_both_lengths(prettr):
    with pytest.raises(ValueError, match=r"A query needs positions for 65 tokens, the model has 64"):
        prettr(query=side([2] * 65))
    with pytest.raises(
        ValueError, match=r"A document after its query needs positions for 65 tokens, the model has 64"
    ):
        prettr(document=side([2] * (65 - 16 + 1)))
    assert prettr(document=side([2] * (64 - 16 + 1))).document_vectors.shape == (1, 48, 16)


def test_compression_is_linear_gelu_linear_layer_norm(encoder):
    model, plain = on_encoder(encoder, compression_dim=6), on_encoder(encoder)
    with torch.no_grad():
        states = plain(query=QUERY, document=DOCUMENT)
        stored = torch.nn.functional.gelu(states.document_vectors @ model.compressor.weight.T + model.compressor.bias)
        restored = stored @ model.decompressor.weight.T + model.decompressor.bias
        restored = torch.nn.functional.layer_norm(restored, (16,))
        plain._classification_layer.weight.copy_(model._classification_layer.weight)
        wanted = plain.score_vectors(states.query_vectors, restored, states.query_mask, states.document_mask)
    assert torch.allclose(model(document=DOCUMENT).document_vectors, stored, atol=1e-5)
    assert torch.allclose(score(model, QUERY, DOCUMENT), wanted, atol=1e-4)
