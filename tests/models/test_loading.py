"""Checkpoints as the authors published them load with every weight in its place.

Numbers of the original classes are in the golden cases of each architecture; test_refused_checkpoints.py has the
checkpoints that must not load.
"""

import json
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from published_checkpoints import (
    ENCODER,
    GOLDEN,
    LOADERS,
    PLAIN,
    PUBLISHED,
    SIZED,
    SIZES,
    WRAPPER,
    Published,
    loaders_of,
    refused,
    write,
    write_tokenizer,
)
from transformers import AutoConfig, AutoModelForSequenceClassification, DistilBertConfig

import hf_kd_ranking as kd
from hf_kd_ranking.errors import InputError
from hf_kd_ranking.models import ARCHITECTURES
from hf_kd_ranking.ranker import load_tokenizer


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "checkpoint"


@pytest.mark.parametrize(("name", "loader"), [(name, loader) for name in PUBLISHED for loader in loaders_of(name)])
def test_every_published_weight_is_in_its_place(name, loader, folder):
    wanted = PUBLISHED[name].write(folder)
    model = LOADERS[loader](PUBLISHED[name], folder)
    assert type(model) is PUBLISHED[name].cls
    assert not model.training
    weights = model.state_dict()
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[key], wanted[key]) for key in wanted)


def test_published_bert_cat_is_a_sequence_classifier(folder):
    wanted = PUBLISHED["bert_cat"].write(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, **SIZED)
    assert type(model) is kd.BertCat
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


def test_published_settings_become_the_config(folder):
    PUBLISHED["colbert"].write(folder)
    colbert = kd.load_ranker(folder, **SIZED).config
    assert (colbert.compression_dim, colbert.query_augmentation, colbert.normalize) == (24, 8, False)
    PUBLISHED["prettr"].write(folder)
    prettr = kd.load_ranker(folder).config
    assert (prettr.join_layer_idx, prettr.query_augmentation) == (3, 8)
    assert prettr.document_position_offset == "query_length"
    PUBLISHED["tas_b"].write(folder)
    dot = kd.load_ranker(folder, "bert_dot").config
    assert (dot.pooling, dot.compression_dim, dot.query_augmentation) == ("cls", None, 0)
    for config in (colbert, prettr, dot):
        assert (config.max_query_length, config.max_document_length) == (30, 200)
        assert {name: getattr(config.encoder_config, name) for name in SIZES} == SIZES


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoint_saved_again_loads_by_its_name(name, folder, tmp_path):
    PUBLISHED[name].write(folder)
    ranker = kd.Ranker(PUBLISHED[name].load(folder), load_tokenizer(folder))
    ranker.save_pretrained(tmp_path / "again")
    again = kd.Ranker.from_pretrained(tmp_path / "again", device="cpu")
    assert type(again.model) is PUBLISHED[name].cls
    documents = ["the bread of the house", "a king", ""]
    wanted = ranker.score("bread", documents)
    np.testing.assert_allclose(again.score("bread", documents), wanted, rtol=1e-5)  # weights lie elsewhere in memory


@pytest.mark.parametrize("model_type", ["BERT_Cat", "BERT_Dot", "ColBERT", "PreTTR"])
def test_published_backbone_is_known_without_a_download(model_type, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    write(tmp_path, {"model_type": model_type} | WRAPPER)
    found = AutoConfig.from_pretrained(tmp_path).encoder_config
    assert type(found) is DistilBertConfig
    assert found.to_dict() == DistilBertConfig().to_dict()


# ---- The published tokenizers: vocab.txt with CRLF, no tokenizer.json -----------------------------------------------

TEXTS = ["What is the transformers library?", "Café, unbelievable 123 [SEP] 北京", ""]
# tokenizer_config.json -> the fields that it lacks.
TOKENIZER_CONFIGS = {"full": (), "without class": ("tokenizer_class",), "absent": None}


def with_line_ends(published: Published, folder: Path) -> list[Path]:
    """The checkpoint with LF and with CRLF in its vocab.txt."""
    folders = []
    for name, end in {"lf": b"\n", "crlf": b"\r\n"}.items():
        folders.append(folder.with_name(name))
        published.write(folders[-1])
        write_tokenizer(folders[-1], end)
    assert [(path / "vocab.txt").read_bytes().count(b"\r\n") for path in folders] == [0, 2000]
    return folders


@pytest.mark.parametrize("name", PUBLISHED)
def test_scores_do_not_depend_on_line_ends(name, folder):
    settings = PUBLISHED[name].overrides | {"architecture": PUBLISHED[name].architecture}
    scores = [
        kd.Ranker.from_pretrained(path, device="cpu", **settings).score("the library", TEXTS)
        for path in with_line_ends(PUBLISHED[name], folder)
    ]
    assert scores[0].std() > 0.01, "scores too alike to tell a change"
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-5)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("config", TOKENIZER_CONFIGS)
def test_tokens_do_not_depend_on_line_ends_or_config(name, config, folder):
    found = []
    for path in with_line_ends(PUBLISHED[name], folder):
        if TOKENIZER_CONFIGS[config] is None:
            (path / "tokenizer_config.json").unlink()
        else:
            kept = json.loads((path / "tokenizer_config.json").read_text())
            kept = {key: value for key, value in kept.items() if key not in TOKENIZER_CONFIGS[config]}
            (path / "tokenizer_config.json").write_text(json.dumps(kept))
        found.append(load_tokenizer(path))
    with_lf, with_crlf = found
    assert len(with_lf) == len(with_crlf) == 2000
    assert with_crlf.get_vocab() == with_lf.get_vocab()
    ids = with_crlf(TEXTS)["input_ids"]
    assert ids == with_lf(TEXTS)["input_ids"]
    assert ids == load_tokenizer(GOLDEN / "bert_cat")(TEXTS)["input_ids"]
    special = with_crlf.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    assert special == [0, 100, 101, 102, 103]


def test_tokenizer_larger_than_the_embeddings_is_refused(folder):
    PUBLISHED["prettr"].write(folder)
    with (folder / "vocab.txt").open("ab") as file:
        file.write(b"surplus\r\n")
    with refused(ValueError, "tokenizer has 2001 tokens, the encoder embeddings for 2000"):
        kd.Ranker.from_pretrained(folder, device="cpu")


def test_checkpoint_without_a_tokenizer_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    with refused(FileNotFoundError, r"^No tokenizer in .*save the one that the model was trained"):
        kd.Ranker.from_pretrained(tmp_path, device="cpu")


# ---- The arguments of load_ranker -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
def test_plain_encoder_needs_an_architecture(name, folder):
    PUBLISHED[name].write(folder)
    choices = r"architecture=bert_cat\|bert_dot\|colbert\|prettr\|splade\|tk\|tkl"
    with refused(ValueError, rf"is a plain distilbert encoder: say which .*{choices}"):
        kd.load_ranker(folder)


def test_unknown_architecture_lists_all(encoder):
    message = r"^Unknown architecture 'bert'; choose one of bert_cat, bert_dot, colbert, prettr, splade, tk, tkl\.$"
    with pytest.raises(ValueError, match=message):
        kd.load_ranker(encoder, "bert")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_unknown_config_field_of_a_fresh_ranker_is_refused(architecture, encoder):
    model_type = ARCHITECTURES[architecture].config_class.model_type
    with refused(ValueError, rf"^{model_type} has no config field max_length; it has .*max_query_length"):
        kd.load_ranker(encoder, architecture, max_length=20)


def test_unknown_config_field_of_a_checkpoint_is_refused(folder):
    PUBLISHED["colbert"].write(folder)
    with refused(ValueError, "^ColBERT has no config field max_length"):
        kd.load_ranker(folder, max_length=20, **SIZED)


@pytest.mark.parametrize("load", [kd.BertDot.from_pretrained, lambda folder: kd.load_ranker(folder, "bert_dot")])
def test_local_path_of_the_encoder_is_not_saved(folder, tmp_path, load):
    PUBLISHED["bert_dot"].write(folder)
    (folder / "config.json").write_text(json.dumps(ENCODER | {"_name_or_path": "/home/me/encoder"}))
    load(folder).save_pretrained(tmp_path / "again")
    assert "/home/me" not in (tmp_path / "again" / "config.json").read_text()


@pytest.mark.parametrize("as_dict", [True, False])
def test_encoder_config_overrides_that_of_a_plain_encoder(encoder, as_dict):
    changed = AutoConfig.from_pretrained(encoder, hidden_dropout_prob=0.3)
    override = {"hidden_dropout_prob": 0.3} if as_dict else changed
    model = kd.load_ranker(encoder, "bert_dot", encoder_config=override, max_document_length=16)
    assert model.config.encoder_config.hidden_dropout_prob == model.bert_model.embeddings.dropout.p == 0.3
    plain = kd.load_ranker(encoder, "bert_dot", max_document_length=16).state_dict()
    assert all(torch.equal(weights, plain[name]) for name, weights in model.state_dict().items())


def test_encoder_config_that_does_not_fit_the_weights_is_refused(encoder):
    with pytest.raises(InputError, match="does not hold the weights of the bert encoder of its config"):
        kd.load_ranker(encoder, "bert_dot", encoder_config={"hidden_size": 32}, max_document_length=16)
