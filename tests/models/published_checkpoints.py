"""Checkpoints as the authors published them: the layouts of the five repositories on the Hub, with tiny weights."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, DistilBertConfig, DistilBertModel

import hf_kd_ranking as kd
from hf_kd_ranking.models import RankerModel

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
    architecture: str | None = None  # the argument of load_ranker

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


LOADERS = {
    "load_ranker": lambda published, folder: published.load(folder),
    "class": lambda published, folder: published.cls.from_pretrained(folder, **published.overrides),
    "AutoModel": lambda published, folder: AutoModel.from_pretrained(folder, **published.overrides),
}


def loaders_of(name: str) -> list[str]:
    """AutoModel goes by the model_type, which is the encoder's in some of the repositories."""
    return [loader for loader in LOADERS if loader != "AutoModel" or name in OWN_MODEL_TYPE]
