"""One entry for every checkpoint that can become a ranker: ours, published ones, other libraries', plain encoders."""

import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedConfig

from .base import RankerModel, clear_errors
from .bert_cat import BertCat
from .bert_dot import BertDot
from .colbert import ColBERT
from .errors import InputError
from .foreign import is_foreign_ranker, load_foreign
from .prettr import PreTTR
from .sparse_encoder import ROUTER_FILE, load_sparse_encoder
from .splade import Splade
from .tk import TK, TRAINING_CONFIG
from .tkl import TKL

ARCHITECTURES: dict[str, type[RankerModel]] = {}
AUTO_CLASSES = {"AutoModel": AutoModel, "AutoModelForSequenceClassification": AutoModelForSequenceClassification}


def register_ranker(architecture: str, model_class: type[RankerModel]) -> None:
    """Make an architecture known to this package, and to transformers' Auto classes.

    Args:
        architecture: a short name, for `load_ranker` and the command line.
        model_class: its config class has a `model_type` of its own.

    Raises:
        InputError: if the name or the `model_type` is taken.
    """
    model_type = model_class.config_class.model_type
    for name, known in ARCHITECTURES.items():
        if name == architecture or known.config_class.model_type == model_type:
            raise InputError(f"The architecture {architecture!r} ({model_type}) is taken by {known.__name__}.")
    AutoConfig.register(model_type, model_class.config_class)
    for name in model_class.auto_classes:
        AUTO_CLASSES[name].register(model_class.config_class, model_class)
    ARCHITECTURES[architecture] = model_class


# Not in the models' own files, which also run as remote code and must not register themselves.
register_ranker("bert_cat", BertCat)
register_ranker("bert_dot", BertDot)
register_ranker("colbert", ColBERT)
register_ranker("prettr", PreTTR)
register_ranker("splade", Splade)
register_ranker("tk", TK)
register_ranker("tkl", TKL)


def find_architecture(config: PreTrainedConfig) -> type[RankerModel] | None:
    """Return the ranker class that a checkpoint's config belongs to; None for other models."""
    for model_class in ARCHITECTURES.values():
        # The published PreTTR has the model_type of its encoder, and is recognised by its class' name only.
        is_named = model_class.__name__ in (config.architectures or [])
        if config.model_type == model_class.config_class.model_type or is_named:
            return model_class
    return None


def load_ranker(name_or_path: str | os.PathLike, architecture: str | None = None, **overrides: Any) -> RankerModel:
    """Load a ranker checkpoint, or build a fresh ranker on a plain encoder.

    Args:
        name_or_path: a folder or a Hub name: a ranker checkpoint, ours or a published one; the folder of a TK training
            run; another library's checkpoint, see `load_foreign`; any encoder `AutoModel` can load; or, for TK and
            TKL, a file of word vectors.
        architecture: one of `ARCHITECTURES`. Needed for plain encoders, the published dot models among them; builds a
            fresh ranker on the encoder of another library's checkpoint; must be that of our checkpoint.
        **overrides: fields of the architecture's config, and `dtype`. For a plain encoder also `layers`, see
            `EncoderRanker.from_encoder`.

    Raises:
        InputError: if the architecture is unknown, missing, or not the checkpoint's, weights are incomplete, or no
            ranker computes the scores of another library's checkpoint.
        FileNotFoundError: if the model does not exist.

    Example:
        >>> kd.load_ranker("bert_dot").config.model_type  # a trained ranker knows what it is
        'BERT_Dot'
        >>> kd.load_ranker("distilbert/distilbert-base-uncased", "colbert", compression_dim=64).config.compression_dim
        64
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise TypeError(f"A model is a folder or a name on the Hub, got {name_or_path!r}.")
    if architecture is not None and architecture not in list(ARCHITECTURES):
        raise InputError(f"Unknown architecture {architecture!r}; choose one of {', '.join(ARCHITECTURES)}.")
    name_or_path = str(name_or_path)
    model_class, description = _read_architecture(name_or_path)
    if model_class is not None:
        if architecture is not None and ARCHITECTURES[architecture] is not model_class:
            raise InputError(f"{name_or_path} is a {description}, not {architecture!r}; leave the architecture out.")
        return model_class.from_pretrained(name_or_path, **overrides)
    if architecture is not None:
        model = ARCHITECTURES[architecture].from_encoder(name_or_path, **overrides)
        # Without a new layer too it has other scores than the ranker of another library that its encoder is from.
        model.is_fresh = model.is_fresh or is_foreign_ranker(name_or_path)
        return model
    with clear_errors(name_or_path):
        model = None
        if not Path(name_or_path).is_file():
            model = load_sparse_encoder(name_or_path, **overrides) or load_foreign(name_or_path, **overrides)
    if model is None:
        choices = "|".join(ARCHITECTURES)
        raise InputError(
            f"{name_or_path} is a plain {description}: say which ranker to build, architecture={choices}."
        )
    return model


def _read_architecture(name_or_path: str) -> tuple[type[RankerModel] | None, str]:
    """Return the ranker class of a checkpoint, None for an encoder or a file; and what it is, in words."""
    path = Path(name_or_path)
    if path.is_file():
        return None, "file of word vectors"
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / TRAINING_CONFIG).is_file():
            return TK, "TK checkpoint"
        if (path / ROUTER_FILE).is_file():
            return None, "SparseEncoder with a Router"
        raise FileNotFoundError(f"{path} is not a model folder: it has no config.json.")
    with clear_errors(name_or_path):
        config = AutoConfig.from_pretrained(name_or_path)
    model_class = find_architecture(config)
    if model_class is None:
        return None, f"{config.model_type} encoder"
    return model_class, f"{model_class.config_class.model_type} checkpoint"
