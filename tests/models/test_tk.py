"""TK: the original class' numbers (golden/tk*), embeddings from an encoder or a file, and empty texts."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel

import hf_kd_ranking as kd
from hf_kd_ranking.models.scoring import kernel_pooling
from hf_kd_ranking.models.tk import _sine_positions
from hf_kd_ranking.ranker import load_tokenizer
from hf_kd_ranking.teachers.load import load_teacher

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = ["tk", "tk_nomix_samepos", "tk_odd_dim"]
EXPECTED = {name: json.loads((GOLDEN / name / "expected.json").read_text()) for name in FOLDERS}
ALL_CASES = [
    pytest.param(folder, case, id=f"{folder}-{name}")
    for folder in FOLDERS
    for name, case in EXPECTED[folder]["cases"].items()
]
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}  # of the golden cases' README: 2e-5 * (1 + |want|)
# Size 4, with word2vec's first line; one word has a space.
WORD_VECTORS = """4 4
moon 1 0.5 -2 0.25
bread -1 0 3 0.5
new york 0.125 2 0.5 -0.75
king 4 -0.5 0.5 1
"""


@pytest.fixture(scope="module")
def published(golden_checkpoint) -> dict[str, kd.TK]:
    return {name: kd.load_ranker(golden_checkpoint(name)) for name in FOLDERS}


@pytest.fixture
def word_vectors(tmp_path) -> Path:
    path = tmp_path / "vectors.txt"
    path.write_text(WORD_VECTORS)
    return path


@pytest.fixture
def file_ranker(word_vectors) -> kd.Ranker:
    torch.manual_seed(1)
    return kd.Ranker.from_pretrained(word_vectors, "tk", device="cpu", batch_size=3)


def side(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def sides(case: dict) -> dict[str, dict[str, torch.Tensor]]:
    return {name: side(case[name]) for name in ("query", "document")}


@torch.no_grad()
def score(model: kd.TK, query: dict, document: dict) -> torch.Tensor:
    return model(query=query, document=document).scores


# ---- The original class ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("folder", "case"), ALL_CASES)
def test_scores_equal_the_original_class(published, folder, case):
    np.testing.assert_allclose(score(published[folder], **sides(case)), case["scores"], **TOLERANCE)


@pytest.mark.parametrize(("folder", "case"), ALL_CASES)
def test_ids_alone_mean_the_same_as_with_their_mask(published, folder, case):
    ids = {name: {"input_ids": inputs["input_ids"]} for name, inputs in sides(case).items()}
    with torch.no_grad():
        output = published[folder](**ids)
    np.testing.assert_allclose(output.scores, case["scores"], **TOLERANCE)
    assert torch.equal(output.document_mask, ids["document"]["input_ids"] > 0)


@pytest.mark.parametrize(("folder", "case"), ALL_CASES)
def test_sums_per_kernel_equal_the_original_class(published, folder, case):
    model = published[folder]
    with torch.no_grad():
        output = model(**sides(case))
        kernels = [tensor.flatten() for tensor in (model.mu, model.sigma, model.kernel_alpha_scaler)]
        pooled = kernel_pooling(
            output.query_vectors, output.document_vectors, output.query_mask, output.document_mask, *kernels
        )
    np.testing.assert_allclose(pooled, case["per_kernel"], **TOLERANCE)


@pytest.mark.parametrize(
    ("folder", "name"), [*itertools.product(FOLDERS, ["single", "interior_zero"]), ("tk", "batch4")]
)
def test_token_vectors_equal_the_original_class(published, folder, name):
    wanted, case = np.load(GOLDEN / folder / "vectors.npz"), EXPECTED[folder]["cases"][name]
    with torch.no_grad():
        output = published[folder](**sides(case))
    for which in ("query", "document"):
        attended, vectors = np.array(case[which]) > 0, wanted[f"{name}/{which}_vectors"]
        assert output[f"{which}_vectors"].shape == vectors.shape
        np.testing.assert_allclose(output[f"{which}_vectors"][attended], vectors[attended], **TOLERANCE)


@pytest.mark.parametrize("name", ["single", "interior_zero"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_token_cosines_equal_the_original_class(published, folder, name):
    with torch.no_grad():
        output = published[folder](**sides(EXPECTED[folder]["cases"][name]))
    query, document = (
        torch.nn.functional.normalize(output[f"{which}_vectors"], dim=-1) * output[f"{which}_mask"].unsqueeze(-1)
        for which in ("query", "document")
    )
    wanted = np.load(GOLDEN / folder / "vectors.npz")[f"{name}/cosines"]
    np.testing.assert_allclose(query @ document.transpose(1, 2), wanted, **TOLERANCE)


def test_each_query_with_all_documents_scores_as_pair_by_pair(published):
    model, batch = published["tk"], sides(EXPECTED["tk"]["cases"]["batch4"])
    every = {name: rows.expand(4, -1, -1) for name, rows in batch["document"].items()}  # (B, n, Ld)
    got = score(model, batch["query"], every)
    np.testing.assert_allclose(got.diagonal(), EXPECTED["tk"]["cases"]["batch4"]["scores"], **TOLERANCE)
    for shift in range(1, 4):
        rolled = {name: rows.roll(-shift, 0) for name, rows in batch["document"].items()}
        wanted = score(model, batch["query"], rolled)
        np.testing.assert_allclose(got[range(4), [(i + shift) % 4 for i in range(4)]], wanted, **TOLERANCE)


def test_margin_mse_step_has_the_original_loss_and_gradients(golden_checkpoint, check_golden_step):
    batch = sides(EXPECTED["tk"]["cases"]["batch4"])
    check_golden_step(kd.load_ranker(golden_checkpoint("tk")), batch, EXPECTED["tk"]["margin_mse_step"])


@pytest.mark.parametrize("empty", ["query", "document"])
def test_empty_texts_score_as_in_the_original_class(published, empty):
    edge = EXPECTED["tk"]["edge"]
    texts = {"query": side(edge["full"]), "document": side(edge["full"])} | {empty: side(edge["empty"])}
    np.testing.assert_allclose(score(published["tk"], **texts), edge[f"empty_{empty}"], **TOLERANCE)


# ---- Training folders and saved checkpoints -------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS)
def test_training_folder_loads_in_every_way(golden_checkpoint, published, folder):
    path, batch = golden_checkpoint(folder), sides(EXPECTED[folder]["cases"]["batch8"])
    wanted = score(published[folder], **batch)
    for model in (kd.TK.from_pretrained(path), kd.TK.from_pretrained(str(path)), kd.load_ranker(path, "tk")):
        assert type(model) is kd.TK
        assert not model.training
        assert torch.equal(score(model, **batch), wanted)


def test_settings_come_from_the_training_config(published):
    config = published["tk_nomix_samepos"].config
    assert (config.vocab_size, config.hidden_size, config.num_attention_heads) == (800, 30, 10)
    assert (config.max_query_length, config.max_document_length, config.max_position_embeddings) == (30, 60, 60)
    assert (config.mixes_embeddings, config.has_document_positions) == (False, False)
    assert (published["tk"].config.mixes_embeddings, published["tk"].config.has_document_positions) == (True, True)


def test_settings_of_a_training_folder_can_be_overridden(golden_checkpoint):
    model = kd.load_ranker(golden_checkpoint("tk"), max_document_length=50, dtype=torch.float64)
    assert (model.config.max_document_length, model.config.max_position_embeddings) == (50, 200)
    assert model.word_embeddings.weight.dtype == torch.float64


@pytest.mark.parametrize("folder", FOLDERS)
def test_saved_checkpoint_keeps_the_scores(published, folder, tmp_path):
    published[folder].save_pretrained(tmp_path)
    batch = sides(EXPECTED[folder]["cases"]["batch8"])
    again = kd.load_ranker(tmp_path)
    assert torch.equal(score(again, **batch), score(published[folder], **batch))


def training_folder(source: Path, folder: Path, config: str, weights: dict[str, torch.Tensor] | None = None) -> Path:
    (folder / "config.yaml").write_text(config)
    state = torch.load(source / "best-model.pytorch-state-dict") if weights is None else weights
    torch.save(state, folder / "best-model.pytorch-state-dict")
    return folder


def test_a_training_folder_with_a_tokenizer_is_a_teacher(golden_checkpoint, tokenizer, tmp_path):
    source, texts = golden_checkpoint("tk"), (["apple pie", "moon"], ["a pie of apples", "night lake"])
    folder = training_folder(source, tmp_path, (source / "config.yaml").read_text())
    tokenizer.save_pretrained(folder)
    scores = load_teacher(str(folder), device="cpu").score(*texts)
    np.testing.assert_array_equal(scores, kd.Ranker(kd.load_ranker(source), tokenizer).score(*texts))
    assert scores[0] != scores[1]


def test_a_training_folder_of_another_model_is_refused(golden_checkpoint, tmp_path):
    config = (golden_checkpoint("tk") / "config.yaml").read_text().replace('"TK"', '"knrm"')
    with pytest.raises(ValueError, match=r"config\.yaml describes the model 'knrm', needed a TK"):
        kd.load_ranker(training_folder(golden_checkpoint("tk"), tmp_path, config))


def test_a_training_config_names_the_fields_that_it_lacks(golden_checkpoint, tmp_path):
    lines = (golden_checkpoint("tk") / "config.yaml").read_text().splitlines(keepends=True)
    config = "".join(line for line in lines if not line.startswith(("tk_att_heads", "max_doc_length")))
    with pytest.raises(ValueError, match=r"config\.yaml lacks max_doc_length, tk_att_heads\."):
        kd.load_ranker(training_folder(golden_checkpoint("tk"), tmp_path, config))


def test_weights_that_a_training_folder_lacks_are_named(golden_checkpoint, tmp_path):
    source = golden_checkpoint("tk")
    weights = torch.load(source / "best-model.pytorch-state-dict")
    del weights["neural_ir_model.kernel_bin_weights.weight"]
    folder = training_folder(source, tmp_path, (source / "config.yaml").read_text(), weights)
    with pytest.raises(ValueError, match=r"missing keys: kernel_bin_weights\.weight\)\. .*TK\.from_encoder"):
        kd.load_ranker(folder)


@pytest.mark.parametrize("source", ["fresh", "training folder", "saved"])
def test_training_without_mixing_reaches_every_parameter(golden_checkpoint, encoder, source, tmp_path):
    if source == "training folder":
        model = kd.load_ranker(golden_checkpoint("tk_nomix_samepos"))
    else:
        model = kd.TK.from_encoder(encoder, mixes_embeddings=False)
    if source == "saved":
        model.save_pretrained(tmp_path)
        model = kd.load_ranker(tmp_path)
    model(query=side([[5, 6]]), document=side([[7, 5, 8]])).scores.sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 30, "num_attention_heads": 4}, "num_attention_heads must divide hidden_size, got 4 and 30"),
        ({"kernel_mu": [1.0, 0.5]}, r"got 2 kernel_mu and 11 kernel_sigma"),
        ({"max_document_length": 201}, r"max_document_length is 201 tokens.*for 200"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(golden_checkpoint, published, config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        kd.TKConfig(**config)
    published["tk"].save_pretrained(tmp_path)
    for folder in (golden_checkpoint("tk"), tmp_path):
        with pytest.raises(ValueError, match=message):
            kd.load_ranker(folder, **config)


def test_texts_longer_than_the_positions_name_both_lengths(published):
    with pytest.raises(ValueError, match="A document needs positions for 61 tokens, the model has 60"):
        published["tk_nomix_samepos"](document=side([[5] * 61]))


# ---- Positions ------------------------------------------------------------------------------------------------------


def test_sine_positions_are_sines_then_cosines():
    # Size 4 has two time scales, 1 and 10,000.
    wanted = [[0, 0, 1, 1], [math.sin(1), math.sin(1e-4), math.cos(1), math.cos(1e-4)]]
    wanted += [[math.sin(2), math.sin(2e-4), math.cos(2), math.cos(2e-4)]]
    assert torch.allclose(_sine_positions(3, 4), torch.tensor([wanted]), atol=1e-7)
    # Size 7 has three, 1, 100 and 10,000, and a zero column.
    last = [math.sin(1), math.sin(1e-2), math.sin(1e-4), math.cos(1), math.cos(1e-2), math.cos(1e-4), 0]
    assert torch.allclose(_sine_positions(2, 7)[0, 1], torch.tensor(last), atol=1e-7)


@pytest.mark.parametrize("folder", FOLDERS)
def test_positions_of_a_fresh_model_are_those_of_the_checkpoint(golden_checkpoint, published, folder):
    weights = torch.load(golden_checkpoint(folder) / "best-model.pytorch-state-dict")
    fresh = kd.TK(published[folder].config)
    for name in ("positional_features_q", "positional_features_d"):
        # Angles up to 700 have four digits after the point in float32.
        assert torch.allclose(getattr(fresh, name), weights[f"neural_ir_model.{name}"], atol=1e-4)
    same = torch.equal(fresh.positional_features_q, fresh.positional_features_d)
    assert same == (folder == "tk_nomix_samepos")


# ---- Fresh models on given embeddings -------------------------------------------------------------------------------


def test_encoder_embeddings_are_scaled_to_the_positions(encoder):
    model = kd.TK.from_encoder(encoder)
    table, wanted = model.word_embeddings.weight, AutoModel.from_pretrained(encoder).get_input_embeddings().weight
    assert torch.allclose(table, wanted * (table[5, 3] / wanted[5, 3]))  # one factor, so that cosines stay
    assert table.norm(dim=1).mean().item() == pytest.approx(8**0.5, rel=1e-5)  # of 16 features
    assert model.positional_features_q.norm(dim=-1).mean().item() == pytest.approx(8**0.5, rel=1e-5)
    assert model.config.num_attention_heads == 8  # the largest up to 10 that divides 16
    assert not model.training


def test_fresh_kernel_weights_are_small(encoder):
    weights = kd.TK.from_encoder(encoder).kernel_bin_weights.weight
    assert 0 < weights.abs().max() <= 0.014


def test_fresh_models_take_config_fields_and_no_others(encoder):
    config = kd.TK.from_encoder(encoder, num_hidden_layers=1, num_attention_heads=2, max_document_length=300).config
    assert (config.num_hidden_layers, config.num_attention_heads) == (1, 2)
    assert (config.max_document_length, config.max_position_embeddings) == (300, 300)
    with pytest.raises(ValueError, match=r"TK has no config field num_layers; it has .*num_hidden_layers"):
        kd.TK.from_encoder(encoder, num_layers=1)


def test_embeddings_of_a_file_follow_two_special_rows(word_vectors):
    model = kd.load_ranker(word_vectors, "tk")
    rows = [[1, 0.5, -2, 0.25], [-1, 0, 3, 0.5], [0.125, 2, 0.5, -0.75], [4, -0.5, 0.5, 1]]
    wanted = torch.tensor([[0.0] * 4, torch.tensor(rows).mean(0).tolist(), *rows])
    assert torch.equal(model.word_embeddings.weight, wanted)
    assert (model.config.vocab_size, model.config.hidden_size, model.config.num_attention_heads) == (6, 4, 4)


def test_tokenizer_of_a_file_has_the_rows_of_its_words(word_vectors):
    tokenizer = load_tokenizer(word_vectors)
    ids = {word: tokenizer.vocab[word] for word in ("[PAD]", "[UNK]", "moon", "bread", "new york", "king")}
    assert ids == {"[PAD]": 0, "[UNK]": 1, "moon": 2, "bread": 3, "new york": 4, "king": 5}
    assert tokenizer("King, moon-bread?", add_special_tokens=False)["input_ids"] == [5, 1, 2, 1, 3, 1]
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 1)


def test_first_line_of_word2vec_is_skipped(word_vectors, tmp_path):
    (tmp_path / "glove.txt").write_text(WORD_VECTORS.partition("\n")[2])
    tables = [kd.TK.from_encoder(path).word_embeddings.weight for path in (word_vectors, tmp_path / "glove.txt")]
    assert torch.equal(*tables)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("moon 1 2 3\nbread 1 2\n", r"line 2: "),
        ("moon 1 2 3\n1998 0.5\n", r"line 2: "),  # a word that is a number too
        ("moon 1 2 3\n1 2 3\n", r"line 2: 2 values where others have 3"),
        ("moon 1 2\nbread 1 two\n", r"line 2: could not convert string to float: 'two'; needed a word and 2 numbers"),
        ("moon 1 2\nbread 3 4\nmoon 5 6\n", r"line 3: a word that came before \('moon 5 6"),
        ("moon 1 2\n\nbread 3 4\n", r"line 2: 0 values where others have 2"),
        ("moon 1 2\nbread 3 nan\n", r"has a value that is not finite"),
        ("", r"is empty, needed lines of a word and its vector"),
        ("2 300\n", r"is empty, needed lines of a word and its vector"),
    ],
)
def test_malformed_word_vectors_name_the_file_and_the_line(tmp_path, text, message):
    (tmp_path / "vectors.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"vectors\.txt {message}"):
        kd.TK.from_encoder(tmp_path / "vectors.txt")


def test_ranker_on_word_vectors_scores_texts(file_ranker):
    scores = file_ranker.score(["moon"] * 3, ["moon", "bread king", "a word that no file has"])
    assert np.isfinite(scores).all()
    assert len(set(scores.tolist())) == 3
    model, tokens = file_ranker.model, {"moon": [2], "bread king": [3, 5], "a word that no file has": [1] * 6}
    by_hand = [score(model, side([[2]]), side([ids])).item() for ids in tokens.values()]
    assert scores == pytest.approx(by_hand, abs=1e-6)


def test_saved_ranker_on_word_vectors_keeps_its_tokenizer(file_ranker, tmp_path):
    file_ranker.save_pretrained(tmp_path / "saved")
    again = kd.Ranker.from_pretrained(tmp_path / "saved", device="cpu")
    queries, documents = ["moon", "the king", "Bread!"], ["king bread", "moon, moon", "nothing known"]
    np.testing.assert_allclose(again.score(queries, documents), file_ranker.score(queries, documents), atol=1e-6)
    assert again.tokenizer.get_vocab() == file_ranker.tokenizer.get_vocab()
    assert (again.tokenizer.pad_token_id, again.tokenizer.unk_token_id) == (0, 1)


def test_empty_texts_change_no_other_score_of_a_file_ranker(file_ranker):
    queries, documents = ["moon", "moon", "", ""], ["bread king", "", "bread king", ""]
    scores = file_ranker.score(queries, documents)
    assert np.isfinite(scores).all()
    assert scores[0] == pytest.approx(file_ranker.score("moon", ["bread king"])[0], abs=1e-6)
    assert scores[2] == scores[3] == 0  # no query token adds anything
    assert file_ranker.score("", [""]).tolist() == [0]  # nor where a whole batch is empty


@pytest.mark.parametrize("empty", ["query", "document"])
def test_row_of_padding_changes_no_other_row(published, empty):
    model, batch = published["tk"], sides(EXPECTED["tk"]["cases"]["batch4"])
    wanted = score(model, **batch)
    for tensor in batch[empty].values():
        tensor[1] = 0
    got = score(model, **batch)
    assert got.isfinite().all()
    np.testing.assert_allclose(got[[0, 2, 3]], wanted[[0, 2, 3]], **TOLERANCE)
    assert abs(got[1] - wanted[1]) > 0.1
