"""Checkpoints as the authors published them load with every weight in its place; everything else is refused.

The layouts are those of the five repositories on the Hub, with tiny weights; numbers of the original classes are in
the golden cases of each architecture.
"""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertModel,
)

import hf_kd_ranking as kd
from hf_kd_ranking.models import ARCHITECTURES, RankerModel
from hf_kd_ranking.ranker import load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
SIZES = {"dim": 16, "hidden_dim": 32, "n_heads": 2, "n_layers": 4, "vocab_size": 2000}
# What transformers 4.8.1 wrote for an encoder.
ENCODER = {
    "_name_or_path": "distilbert-base-uncased",
    "activation": "gelu",
    "attention_dropout": 0.1,
    "dropout": 0.1,
    "initializer_range": 0.02,
    "max_position_embeddings": 512,
    "model_type": "distilbert",
    "pad_token_id": 0,
    "qa_dropout": 0.1,
    "seq_classif_dropout": 0.2,
    "sinusoidal_pos_embds": False,
    "tie_weights_": True,
    "transformers_version": "4.8.1",
} | SIZES
WRAPPER = {"bert_model": "distilbert-base-uncased", "trainable": True}
# The published weights have the sizes of this backbone, which their configs therefore leave out; the tiny ones not.
SIZED = {"encoder_config": ENCODER}


@dataclass
class Published:
    """One published repository."""

    cls: type[RankerModel]
    config: dict
    head: dict[str, tuple[int, ...]] = field(default_factory=dict)
    prefix: str = ""  # of the encoder's weights
    overrides: dict = field(default_factory=dict)
    architecture: str | None = None  # what load_ranker must be told

    def write(self, folder: Path) -> dict[str, torch.Tensor]:
        """Make the folder; returns the weights under the names that they have in our class."""
        torch.manual_seed(0)
        encoder = DistilBertModel(DistilBertConfig(**SIZES, initializer_range=0.3)).state_dict()
        head = {name: torch.randn(shape) for name, shape in self.head.items()}
        write(folder, self.config, {self.prefix + name: tensor for name, tensor in encoder.items()} | head)
        return {f"bert_model.{name}": tensor for name, tensor in encoder.items()} | head

    def load(self, folder: Path, **settings) -> RankerModel:
        return kd.load_ranker(folder, self.architecture, **self.overrides, **settings)


PUBLISHED = {
    "bert_cat": Published(
        kd.BertCat,
        {"architectures": ["BERT_Cat"], "model_type": "BERT_Cat"} | WRAPPER,
        {"_classification_layer.weight": (1, 16), "_classification_layer.bias": (1,)},
        "bert_model.",
        SIZED,
    ),
    "colbert": Published(
        kd.ColBERT,
        {"architectures": ["ColBERT"], "model_type": "ColBERT", "compression_dim": 24, "return_vecs": True} | WRAPPER,
        {"compressor.weight": (24, 16), "compressor.bias": (24,)},
        "bert_model.",
        SIZED,
    ),
    "prettr": Published(kd.PreTTR, ENCODER | {"architectures": ["PreTTR"]}, {"_classification_layer.weight": (1, 16)}),
    "bert_dot": Published(kd.BertDot, ENCODER | {"architectures": ["DistilBertModel"]}, architecture="bert_dot"),
    "tas_b": Published(
        kd.BertDot,
        ENCODER | {"architectures": ["DistilBertForMaskedLM"], "transformers_version": "4.3.3"},
        architecture="bert_dot",
    ),
}
OWN_MODEL_TYPE = ["bert_cat", "colbert"]
PLAIN = ["bert_dot", "tas_b"]


def write(folder: Path, config: dict, weights: dict | None = None) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if weights is not None:
        torch.save(weights, folder / "pytorch_model.bin")
    write_tokenizer(folder)


def write_tokenizer(folder: Path, line_end: bytes = b"\r\n") -> None:
    vocabulary = (GOLDEN / "bert_cat" / "vocab.txt").read_bytes()
    assert b"\r" not in vocabulary
    (folder / "vocab.txt").write_bytes(vocabulary.replace(b"\n", line_end))
    (folder / "tokenizer_config.json").write_bytes((GOLDEN / "bert_cat" / "tokenizer_config.json").read_bytes())


def change_weights(folder: Path, changes: dict) -> None:
    """Replace or add weights; None takes one out."""
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True) | changes
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    torch.save(weights, folder / "pytorch_model.bin")


@contextmanager
def refused(error: type[Exception], message: str) -> Iterator[None]:
    """The block raises the error, whose text is one line."""
    with pytest.raises(error, match=message) as caught:
        yield
    assert "\n" not in str(caught.value)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "checkpoint"


# ---- The five published repositories --------------------------------------------------------------------------------

LOADERS = {
    "load_ranker": lambda published, folder: published.load(folder),
    "class": lambda published, folder: published.cls.from_pretrained(folder, **published.overrides),
    "AutoModel": lambda published, folder: AutoModel.from_pretrained(folder, **published.overrides),
}


def loaders_of(name: str) -> list[str]:
    """AutoModel goes by the model_type, which is the encoder's in some of the repositories."""
    return [loader for loader in LOADERS if loader != "AutoModel" or name in OWN_MODEL_TYPE]


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
def test_a_published_checkpoint_saved_again_loads_without_being_told_anything(name, folder, tmp_path):
    PUBLISHED[name].write(folder)
    ranker = kd.Ranker(PUBLISHED[name].load(folder), load_tokenizer(folder))
    ranker.save_pretrained(tmp_path / "again")
    again = kd.Ranker.from_pretrained(tmp_path / "again", device="cpu")
    assert type(again.model) is PUBLISHED[name].cls
    documents = ["the bread of the house", "a king", ""]
    np.testing.assert_allclose(again.score("bread", documents), ranker.score("bread", documents), atol=1e-6)


@pytest.mark.parametrize("model_type", ["BERT_Cat", "BERT_Dot", "ColBERT", "PreTTR"])
def test_the_published_backbones_name_means_its_sizes_without_a_download(model_type, tmp_path, monkeypatch):
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
def test_scores_do_not_depend_on_the_line_ends_of_the_vocabulary(name, folder):
    settings = PUBLISHED[name].overrides | {"architecture": PUBLISHED[name].architecture}
    scores = [
        kd.Ranker.from_pretrained(path, device="cpu", **settings).score("the library", TEXTS)
        for path in with_line_ends(PUBLISHED[name], folder)
    ]
    assert scores[0].std() > 0.01, "scores too alike to tell a change"
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-5)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("config", TOKENIZER_CONFIGS)
def test_tokens_do_not_depend_on_line_ends_or_a_whole_tokenizer_config(name, config, folder):
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


def test_a_tokenizer_with_more_words_than_the_checkpoint_has_embeddings_is_refused(folder):
    PUBLISHED["prettr"].write(folder)
    with (folder / "vocab.txt").open("ab") as file:
        file.write(b"surplus\r\n")
    with refused(ValueError, "tokenizer has 2001 tokens, the encoder embeddings for 2000"):
        kd.Ranker.from_pretrained(folder, device="cpu")


def test_a_checkpoint_without_a_tokenizer_says_so(model, tmp_path):
    model.save_pretrained(tmp_path)
    with refused(FileNotFoundError, r"^No tokenizer in .*save the one that the model was trained"):
        kd.Ranker.from_pretrained(tmp_path, device="cpu")


# ---- Heads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in PUBLISHED if PUBLISHED[name].head])
def test_a_published_checkpoint_without_its_head_is_refused(name, folder):
    published = PUBLISHED[name]
    published.write(folder)
    change_weights(folder, dict.fromkeys(published.head))
    message = (
        rf"is not a complete {published.cls.__name__} checkpoint \(missing keys: {', '.join(sorted(published.head))}\)"
    )
    for loader in loaders_of(name):
        with refused(ValueError, message):
            LOADERS[loader](published, folder)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_head_that_the_architecture_does_not_have_is_refused(name, folder):
    published = PUBLISHED[name]
    published.write(folder)
    head = "compressor.weight" if "compressor.weight" not in published.head else "_classification_layer.weight"
    change_weights(folder, {head: torch.zeros(1, 16)})
    with refused(ValueError, rf"unexpected keys: {head}\)"):
        published.cls.from_pretrained(folder, **published.overrides)
    message = rf"is a ranker and not a plain encoder \({head}\)" if name in PLAIN else rf"unexpected keys: {head}\)"
    with refused(ValueError, message):
        published.load(folder)


# ---- Another architecture's checkpoint ------------------------------------------------------------------------------


def test_no_class_loads_a_saved_checkpoint_of_another(model, tmp_path):
    model.save_pretrained(tmp_path)
    found = model.config.model_type
    for name, other in ARCHITECTURES.items():
        if other is type(model):
            assert type(other.from_pretrained(tmp_path)) is type(kd.load_ranker(tmp_path, name)) is other
            continue
        with refused(ValueError, rf"is a {found} checkpoint, not {other.config_class.model_type}: load"):
            other.from_pretrained(tmp_path)
        with refused(ValueError, rf"is a {found} checkpoint, not '{name}'; leave the arch"):
            kd.load_ranker(tmp_path, name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_no_class_loads_a_published_checkpoint_of_another(name, folder):
    published = PUBLISHED[name]
    published.write(folder)
    for other in ARCHITECTURES.values():
        if other is not published.cls:
            with refused(ValueError, r"is a \w+ checkpoint, not|is not a complete \w+ checkpoint"):
                other.from_pretrained(folder, **(published.overrides if other is not kd.TK else {}))


@pytest.mark.parametrize("name", ["bert_cat", "colbert", "prettr"])
def test_load_ranker_builds_no_other_ranker_on_a_published_one(name, folder):
    PUBLISHED[name].write(folder)
    found = PUBLISHED[name].cls.config_class.model_type
    for architecture in ARCHITECTURES.keys() - {name}:
        with refused(ValueError, rf"is a {found} checkpoint, not '{architecture}'; leave the arch"):
            kd.load_ranker(folder, architecture, **PUBLISHED[name].overrides)


def test_no_ranker_is_built_on_a_ranker(encoder_model, tmp_path):
    encoder_model.save_pretrained(tmp_path)
    for cls in (kd.BertCat, kd.BertDot, kd.ColBERT, kd.PreTTR):
        with refused(ValueError, r"is a ranker and not a plain encoder \(\w+\): load_ranker"):
            cls.from_encoder(str(tmp_path))


# ---- What load_ranker must be told ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_encoder_needs_an_architecture(name, folder):
    PUBLISHED[name].write(folder)
    choices = r"architecture=bert_cat\|bert_dot\|colbert\|prettr\|tk"
    with refused(ValueError, rf"is a plain distilbert encoder: say which .*{choices}"):
        kd.load_ranker(folder)


def test_an_unknown_architecture_lists_the_five(encoder):
    message = r"^Unknown architecture 'bert'; choose one of bert_cat, bert_dot, colbert, prettr, tk\.$"
    with pytest.raises(ValueError, match=message):
        kd.load_ranker(encoder, "bert")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_config_field_that_the_architecture_does_not_have_is_refused(architecture, encoder):
    model_type = ARCHITECTURES[architecture].config_class.model_type
    with refused(ValueError, rf"^{model_type} has no config field max_length; it has .*max_query_length"):
        kd.load_ranker(encoder, architecture, max_length=20)


# ---- Broken folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [None, *ARCHITECTURES])
def test_a_folder_with_neither_config_nor_weights_is_no_model(architecture, tmp_path):
    with refused(FileNotFoundError, r"is not a model folder: it has no config\.json"):
        kd.load_ranker(tmp_path, architecture)
    if architecture is not None:
        with refused(FileNotFoundError, r"^No model .*no file named model.safetensors"):
            ARCHITECTURES[architecture].from_pretrained(tmp_path)


def test_a_folder_with_a_config_only_has_no_weights(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    for load in (kd.load_ranker, type(model).from_pretrained, AutoModel.from_pretrained):
        with refused(FileNotFoundError, r"^No model .*no file named model.safetensors"):
            load(tmp_path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_that_are_not_finite_are_refused(name, folder):
    published = PUBLISHED[name]
    weights = published.write(folder)
    key = "embeddings.word_embeddings.weight"
    table = weights[f"bert_model.{key}"].clone()
    table[7, 3] = torch.nan
    change_weights(folder, {published.prefix + key: table})
    for loader in loaders_of(name):
        with refused(ValueError, rf"weights of (bert_model\.)?{key} are not finite; .*damaged"):
            LOADERS[loader](published, folder)


class Payload:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_pickle_that_would_run_code_is_refused_and_not_run(name, folder, tmp_path):
    published, path = PUBLISHED[name], tmp_path / "executed"
    published.write(folder)
    change_weights(folder, {"payload": Payload(path)})
    for loader in loaders_of(name):
        with refused(ValueError, "^The weights of .* are pickled together with code, which is not run"):
            LOADERS[loader](published, folder)
    assert not path.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert path.exists(), "the payload is harmless, the test could not fail"


def test_a_tk_training_run_that_would_run_code_is_refused_and_not_run(tmp_path):
    folder, path = tmp_path / "run", tmp_path / "executed"
    folder.mkdir()
    (folder / "config.yaml").write_text("model: TK\n")
    torch.save({"payload": Payload(path)}, folder / "best-model.pytorch-state-dict")
    with refused(ValueError, "^The weights of .* are pickled together with code, which is not run"):
        kd.load_ranker(folder)
    assert not path.exists()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_checkpoint_without_a_vocabulary_has_no_tokenizer(name, folder):
    PUBLISHED[name].write(folder)
    for file in ("vocab.txt", "tokenizer_config.json"):
        (folder / file).unlink()
    settings = PUBLISHED[name].overrides | {"architecture": PUBLISHED[name].architecture}
    with refused(FileNotFoundError, r"^No tokenizer in .*save the one that the model was trained"):
        kd.Ranker.from_pretrained(folder, device="cpu", **settings)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("architecture", ["bert_cat", "bert_dot", "colbert", "prettr", "tk"])
def test_an_encoder_folder_without_weights_says_so(name, architecture, folder):
    PUBLISHED[name].write(folder)
    (folder / "pytorch_model.bin").unlink()
    with refused(FileNotFoundError, r"no file named model\.safetensors"):
        kd.load_ranker(folder, architecture)


def test_embeddings_that_are_not_finite_are_refused(folder):
    weights = PUBLISHED["bert_dot"].write(folder)
    table = weights["bert_model.embeddings.word_embeddings.weight"].clone()
    table[7, 3] = torch.nan
    change_weights(folder, {"embeddings.word_embeddings.weight": table})
    with refused(ValueError, "not finite"):
        kd.TK.from_encoder(folder)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_error_of_an_unsafe_pickle_is_one_line(name, folder, tmp_path):
    PUBLISHED[name].write(folder)
    change_weights(folder, {"payload": Payload(tmp_path / "executed")})
    for loader in loaders_of(name):
        with refused(ValueError, "weights"):
            LOADERS[loader](PUBLISHED[name], folder)


def test_an_unknown_config_field_is_refused_for_a_checkpoint_too(folder):
    PUBLISHED["colbert"].write(folder)
    with refused(ValueError, "^ColBERT has no config field max_length"):
        kd.load_ranker(folder, max_length=20, **SIZED)


@pytest.mark.parametrize("load", [kd.BertDot.from_pretrained, lambda folder: kd.load_ranker(folder, "bert_dot")])
def test_the_encoders_local_path_is_not_saved(folder, tmp_path, load):
    PUBLISHED["bert_dot"].write(folder)
    (folder / "config.json").write_text(json.dumps(ENCODER | {"_name_or_path": "/home/me/encoder"}))
    load(folder).save_pretrained(tmp_path / "again")
    assert "/home/me" not in (tmp_path / "again" / "config.json").read_text()
