"""Tests of every architecture, over the `model` fixture."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModel, PreTrainedConfig

import hf_kd_ranking as kd
from hf_kd_ranking.models import RankingProcessor

ROWS = [
    ("what is bread", ["bread apple iron", "moon", "house of the king under the lake"]),
    ("moon", ["night", "yellow zebra and violin", "how to paper"]),
    ("how to jam the fire", ["jam", "glass river stone tree water earth", "where is a dog"]),
]
LENGTHS = {"max_query_length": 8, "max_document_length": 16}
# Another value for every config field that the package declares; a new field joins by one entry.
NOT_DEFAULT = {
    "bert_model": "distilbert-base-uncased",
    "max_query_length": 9,
    "max_document_length": 17,
    "query_prefix": "query: ",
    "document_prefix": "passage: ",
    "initializer_range": 0.3,
    "pooling": "mean",
    "compression_dim": 5,
    "query_augmentation": 3,
    "normalize": True,
    "head_activation": "gelu",
    "passage_length": 12,
    "passage_stride": 5,
    "passage_pooling": "attention",
    "join_layer_idx": 2,
    "document_position_offset": "query_width",
    "vocab_size": 50,
    "hidden_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "has_document_positions": False,
    "mixes_embeddings": False,
    "expansion": "tied",
    "query_encoding": "lexical",
    "special_token_ids": [2, 3],
    "query_top_k": 4,
    "document_top_k": 6,
    "threshold": 0.1,
    "chunk_size": 30,
    "chunk_overlap": 4,
    "region_size": 12,
    "region_step": 3,
    "region_count": 4,
    "region_neighbors": 1,
    "kernel_mu": [0.9, 0.1],
    "kernel_sigma": [0.2, 0.3],
}
FIXED = {"problem_type"}  # BERT_CAT's is "regression", whatever a published config says


def batch_of(model, tokenizer, rows: list[tuple[str, list[str]]]) -> dict:
    """The model's inputs for a list of (query, documents): (B, L) sides and (B, n, L) documents or pairs."""
    processor = RankingProcessor.from_config(tokenizer, model.config)
    return processor([query for query, _ in rows], [text for _, texts in rows for text in texts])


def mapped(batch: Mapping, change: Callable, only: str | None = None) -> dict:
    """A copy of a (nested) batch with `change(name, tensor)` in place of each tensor (of one side only)."""
    return {
        name: mapped(value, change) if isinstance(value, Mapping) and only in (None, name)
        else value if isinstance(value, Mapping)
        else change(name, value)
        for name, value in batch.items()
    }  # fmt: skip


def by_document(batch: dict, change: Callable) -> dict:
    """Change what is (B, n, L)."""
    return mapped(batch, change, only="document" if "document" in batch else None)


@torch.no_grad()
def scores_of(model, batch: dict) -> torch.Tensor:
    return model(**batch).scores


def test_padding_does_not_change_scores(model, tokenizer):
    batch = batch_of(model, tokenizer, ROWS)

    def pad(name: str, tensor: torch.Tensor) -> torch.Tensor:
        # Ids of words, not of [PAD]: only the mask may decide.
        return torch.nn.functional.pad(tensor, (0, 5), value=9 if name == "input_ids" else 0)

    wanted = scores_of(model, batch)
    assert wanted.std() > 0.1, "scores too alike to tell a change"
    assert torch.allclose(scores_of(model, mapped(batch, pad)), wanted, atol=1e-5)


def test_splitting_a_batch_does_not_change_scores(model, tokenizer):
    together = scores_of(model, batch_of(model, tokenizer, ROWS))
    alone = [scores_of(model, batch_of(model, tokenizer, [row])) for row in ROWS]
    assert torch.allclose(torch.cat(alone), together, atol=1e-5)


def test_scores_follow_the_order_of_documents(model, tokenizer):
    batch = batch_of(model, tokenizer, ROWS)
    reversed_documents = by_document(batch, lambda _, tensor: tensor.flip(1))
    assert torch.allclose(scores_of(model, reversed_documents), scores_of(model, batch).flip(1), atol=1e-5)


@pytest.mark.parametrize("column", [0, 2])
def test_one_document_per_query_scores_as_a_column_of_many(model, tokenizer, column):
    batch = batch_of(model, tokenizer, ROWS)
    flat = by_document(batch, lambda _, tensor: tensor[:, column])  # (B, L)
    assert scores_of(model, flat).shape == (len(ROWS),)
    assert torch.allclose(scores_of(model, flat), scores_of(model, batch)[:, column], atol=1e-5)


def test_stored_vectors_score_as_forward_does(model, tokenizer):
    if not model.config.is_storable:
        pytest.skip("its vectors are not stored")
    batch = batch_of(model, tokenizer, ROWS)
    documents = mapped(batch["document"], lambda _, tensor: tensor.flatten(0, 1))  # stored without their queries
    with torch.no_grad():
        query, document = model(query=batch["query"]), model(document=documents)
        scores = model.score_vectors(
            query.query_vectors,
            document.document_vectors.unflatten(0, (3, 3)),
            query.query_mask,
            None if document.document_mask is None else document.document_mask.unflatten(0, (3, 3)),
        )
    assert query.scores is None and document.scores is None
    assert torch.allclose(scores, scores_of(model, batch), atol=1e-5)


WITH_EMPTY = [(query, [*documents, ""]) for query, documents in ROWS] + [("", ["bread", "", "moon and king", "jam"])]


def test_empty_texts_change_no_other_score(model, tokenizer):
    scores = scores_of(model, batch_of(model, tokenizer, WITH_EMPTY))
    assert scores.isfinite().all()
    assert torch.allclose(scores[:3, :3], scores_of(model, batch_of(model, tokenizer, ROWS)), atol=1e-5)


def test_empty_texts_leave_gradients_finite(model, tokenizer):
    found = gradients(model, batch_of(model, tokenizer, WITH_EMPTY))
    assert [name for name, gradient in found.items() if not gradient.isfinite().all()] == []


def test_document_with_nothing_attended_changes_no_other_score(model, tokenizer):
    def attend_to_nothing(name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        if name == "attention_mask":
            tensor[1, 2] = 0
        return tensor

    batch = batch_of(model, tokenizer, ROWS)
    scores, wanted = scores_of(model, by_document(batch, attend_to_nothing)), scores_of(model, batch)
    assert scores.isfinite().all()
    wanted[1, 2] = scores[1, 2]
    assert torch.allclose(scores, wanted, atol=1e-5)


def compiled_scores(model, batch: dict, backend: str) -> torch.Tensor:
    torch._dynamo.reset()  # architectures share code, which is compiled a few times and then no more
    counters.clear()
    scores = scores_of(torch.compile(model, backend=backend), batch)
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    return scores


def test_compiled_model_scores_as_eager(model, tokenizer):
    batch = batch_of(model, tokenizer, ROWS)
    assert torch.allclose(compiled_scores(model, batch, "aot_eager"), scores_of(model, batch), atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")
def test_inductor_scores_as_eager(encoder, tokenizer):
    model = kd.BertDot.from_encoder(str(encoder), **LENGTHS)
    batch = batch_of(model, tokenizer, ROWS)
    assert torch.allclose(compiled_scores(model, batch, "inductor"), scores_of(model, batch), atol=1e-4)


LOADERS = {
    "load_ranker": lambda cls, folder: kd.load_ranker(str(folder)),
    "AutoModel": lambda cls, folder: AutoModel.from_pretrained(folder),
    "class": lambda cls, folder: cls.from_pretrained(folder),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS.keys())
def test_saved_model_loads_as_its_class_with_the_same_scores(model, tokenizer, tmp_path, load):
    model.save_pretrained(tmp_path)
    again, batch = load(type(model), tmp_path), batch_of(model, tokenizer, ROWS)
    assert type(again) is type(model)
    assert not again.training
    weights = again.state_dict()
    assert all(torch.equal(weights.pop(name), tensor) for name, tensor in model.state_dict().items()) and not weights
    # Not bit by bit: matrix products may depend on where in memory their weights lie.
    assert torch.allclose(scores_of(again, batch), scores_of(model, batch), atol=1e-6)


def test_every_config_field_survives_save_and_load(model, tmp_path):
    cls = type(model.config)
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    own = {field.name for field in dataclasses.fields(cls)} - inherited - FIXED - {"encoder_config"}
    values = {name: NOT_DEFAULT[name] for name in own}
    assert all(getattr(cls(), name) != value for name, value in values.items())
    encoder = {} if issubclass(cls, kd.TKConfig) else {"encoder_config": model.config.encoder_config}
    cls(**encoder, **values).save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is cls
    assert {name: getattr(again, name) for name in own} == values
    if encoder:
        assert again.encoder_config.to_dict() == model.config.encoder_config.to_dict()


def test_bfloat16_scores_are_close_to_float32(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    batch, half = batch_of(model, tokenizer, ROWS), kd.load_ranker(str(tmp_path), dtype=torch.bfloat16)
    assert next(half.parameters()).dtype == torch.bfloat16
    wanted, got = scores_of(model, batch), scores_of(half, batch)
    assert got.dtype == torch.float32
    assert (got - wanted).abs().max() < 0.05 * wanted.abs().max()  # eight bits of mantissa through two layers


def test_eager_and_sdpa_attention_agree(encoder_model, tokenizer, tmp_path):
    encoder_model.save_pretrained(tmp_path)
    batch, scores = batch_of(encoder_model, tokenizer, ROWS), {}
    for attention in ("eager", "sdpa"):
        loaded = kd.load_ranker(str(tmp_path), attn_implementation=attention)
        assert loaded.bert_model.config._attn_implementation == attention  # it reaches the encoder
        scores[attention] = scores_of(loaded, batch)
    assert torch.allclose(scores["eager"], scores["sdpa"], atol=1e-5)


def gradients(model, batch: dict) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    torch.manual_seed(0)  # dropout is on
    model.train()
    model(**batch).scores.square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_a_gradient_reaches_every_parameter(model, tokenizer):
    found = gradients(model, batch_of(model, tokenizer, ROWS))
    assert [name for name, gradient in found.items() if gradient is None] == []


def test_activation_checkpointing_gives_the_same_gradients(model, tokenizer):
    batch, calls = batch_of(model, tokenizer, ROWS), []
    for module in model.modules():  # recomputed layers draw other dropout where the last one spares states
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain = {name: gradient.clone() for name, gradient in gradients(model, batch).items()}
    # Inside a layer: its own hooks stand outside of what is run again.
    layer = (
        model.contextualizer.layers[0].linear1
        if isinstance(model, kd.TK)
        else model.bert_model.encoder.layer[0].attention
    )
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients(model, batch)
    forwards = len(calls)
    model.activation_checkpointing_enable()
    again = gradients(model, batch)
    assert len(calls) == 3 * forwards, "each layer runs again in the backward pass"
    rounding = 1e-6 * max(gradient.abs().max().item() for gradient in plain.values())
    assert all(torch.allclose(again[name], plain[name], atol=rounding) for name in plain)


def drop(weights: dict) -> str:
    name = next(name for name in weights if name.endswith(("layer.1.output.dense.weight", "linear1.weight")))
    weights.pop(name)
    return f"missing keys: {re.escape(name)}"


def add(weights: dict) -> str:
    weights["compressor_of_another.weight"] = torch.zeros(2)
    return r"unexpected keys: compressor_of_another\.weight"


def widen(weights: dict) -> str:
    name = next(name for name in weights if name.endswith("word_embeddings.weight"))
    weights[name] = torch.zeros(99, 16)
    return f"mismatched keys: .*{re.escape(name)}"


def poison(weights: dict) -> str:
    name = next(name for name in weights if name.endswith("word_embeddings.weight"))
    weights[name][3, 1] = torch.nan
    return f"the weights of {re.escape(name)} are not finite"


@pytest.mark.parametrize("damage", [drop, add, widen, poison])
def test_weights_that_do_not_fit_name_the_key(model, tmp_path, damage):
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    message = damage(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for load in LOADERS.values():
        with pytest.raises(ValueError, match=message):
            load(type(model), tmp_path)


def test_from_encoder_takes_the_encoders_weights_bit_by_bit(encoder_model, encoder):
    wanted = AutoModel.from_pretrained(encoder).state_dict()
    weights = encoder_model.bert_model.state_dict()
    assert weights.keys() == {name for name in wanted if not name.startswith("pooler.")}
    assert all(torch.equal(weights[name], wanted[name]) for name in weights)


def test_kept_layers_are_the_named_ones_in_their_order(encoder_model, encoder, tmp_path):
    layers = AutoModel.from_pretrained(encoder).encoder.layer
    for chosen in ([1], [1, 0]):
        settings = {"join_layer_idx": 1} if is_prettr(encoder_model) else {}
        small = type(encoder_model).from_encoder(str(encoder), layers=chosen, **LENGTHS, **settings)
        small.save_pretrained(tmp_path)
        again = kd.load_ranker(str(tmp_path))
        assert len(again.bert_model.encoder.layer) == again.config.encoder_config.num_hidden_layers == len(chosen)
        for kept, index in zip(again.bert_model.encoder.layer, chosen, strict=True):
            assert all(
                torch.equal(kept.state_dict()[name], layers[index].state_dict()[name]) for name in kept.state_dict()
            )
    with pytest.raises(ValueError, match=r"layers must be one or more of 0\.\.1, got \[2\]"):
        type(encoder_model).from_encoder(str(encoder), layers=[2], **LENGTHS)


def test_lengths_beyond_the_positions_are_refused(model, encoder, tmp_path):
    positions = model.config.max_positions  # 64, TK 16
    limited = "passage_length" if reads_passages(model) else "max_document_length"
    longer = {limited: positions + 1, "max_query_length": 8}
    if model.config.joins_texts:
        longer[limited] -= 8
    message = rf"{limited} is {positions + 1} tokens, but the encoder .*has positions for {positions}"
    if not isinstance(model, kd.TK):  # whose positions are as many as it needs
        with pytest.raises(ValueError, match=message):
            type(model).from_encoder(str(encoder), **longer, **({"join_layer_idx": 1} if is_prettr(model) else {}))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        type(model).from_pretrained(tmp_path, **longer)


def test_texts_beyond_the_positions_are_refused(model, tokenizer):
    if reads_passages(model):
        pytest.skip("its passages are never too long")

    def pad(_: str, tensor: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (0, 65), value=1)

    batch = batch_of(model, tokenizer, ROWS)
    with pytest.raises(
        ValueError, match=rf"needs positions for \d+ tokens, the model has {model.config.max_positions}"
    ):
        scores_of(model, mapped(batch, pad))


def reads_passages(model) -> bool:
    return isinstance(model, kd.BertCat) and model.config.passage_length is not None


def is_prettr(model) -> bool:
    return isinstance(model, kd.PreTTR)


def test_saved_config_holds_no_local_path(model, encoder, tmp_path):
    model.save_pretrained(tmp_path)
    assert str(encoder.parent) not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 3}, {"intermediate_size": 48}], ids=["missing", "mismatched"]
)
def test_encoder_weights_that_do_not_match_raise(encoder_model, encoder, tmp_path, change):
    folder = Path(shutil.copytree(encoder, tmp_path / "encoder"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=r"does not hold the weights of the bert encoder.*encoder\.layer\."):
        type(encoder_model).from_encoder(str(folder), **LENGTHS)
