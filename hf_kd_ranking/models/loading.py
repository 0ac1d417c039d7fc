"""One entry for every checkpoint that can become a ranker: our own, the published, others', and plain encoders."""

import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from .base import RankerModel
from .bert_cat import BertCat
from .bert_dot import BertDot
from .colbert import ColBERT
from .foreign import load_foreign
from .prettr import PreTTR
from .tk import TK, TRAINING_CONFIG

ARCHITECTURES: dict[str, type[RankerModel]] = {}
AUTO_CLASSES = {"AutoModel": AutoModel, "AutoModelForSequenceClassification": AutoModelForSequenceClassification}


def register_ranker(architecture: str, model_class: type[RankerModel]) -> None:
    """Make an architecture known to this package by a short name, and to transformers' Auto classes by its config.

    Here and not in the models' files, which also run as remote code, where they must not register themselves.
    """
    ARCHITECTURES[architecture] = model_class
    AutoConfig.register(model_class.config_class.model_type, model_class.config_class)
    for name in model_class.auto_classes:
        AUTO_CLASSES[name].register(model_class.config_class, model_class)


for _architecture, _model_class in (
    ("bert_cat", BertCat),
    ("bert_dot", BertDot),
    ("colbert", ColBERT),
    ("prettr", PreTTR),
    ("tk", TK),
):
    register_ranker(_architecture, _model_class)


def load_ranker(name_or_path: str | os.PathLike, architecture: str | None = None, **overrides: Any) -> RankerModel:
    """Load a ranker checkpoint, or build a fresh ranker on a plain encoder.

    Args:
        name_or_path: a folder or a Hub name: a ranker checkpoint, ours or a published one; the folder of a TK training
            run; another library's checkpoint, see `load_foreign`; or any encoder `AutoModel` can load. Also a file of
            word vectors, for TK.
        architecture: one of `ARCHITECTURES`. Needed for a plain encoder, and so for the published dot models, which
            are plain encoders; of another library's checkpoint it takes the encoder alone; for any other ranker it
            must be the one the checkpoint has.
        **overrides: fields of the architecture's config, for example `max_document_length=180`, and `dtype`. For a
            plain encoder also `layers`, see `EncoderRanker.from_encoder`.

    Raises:
        ValueError: if the architecture is unknown, missing, or not the checkpoint's, weights are incomplete, or no
            ranker has the scores of another library's checkpoint.
        FileNotFoundError: if there is no such model.
    """
    if architecture is not None and architecture not in ARCHITECTURES:
        raise ValueError(f"Unknown architecture {architecture!r}; choose one of {', '.join(ARCHITECTURES)}.")
    name_or_path = str(name_or_path)
    found, described = _read_architecture(name_or_path)
    if found is not None:
        if architecture is not None and ARCHITECTURES[architecture] is not found:
            raise ValueError(
                f"{name_or_path} is a {found.config_class.model_type} checkpoint, not {architecture!r}; leave the "
                "architecture out or name a plain encoder."
            )
        return found.from_pretrained(name_or_path, **overrides)
    if architecture is None:
        if not Path(name_or_path).is_file() and (model := load_foreign(name_or_path, **overrides)) is not None:
            return model
        raise ValueError(
            f"{name_or_path} is a plain {described}: say which ranker to build on it, "
            f"architecture={'|'.join(ARCHITECTURES)}."
        )
    return ARCHITECTURES[architecture].from_encoder(name_or_path, **overrides)


def _read_architecture(name_or_path: str) -> tuple[type[RankerModel] | None, str]:
    """The ranker class of a checkpoint, None for a plain encoder or file; and what the checkpoint is, in words."""
    path = Path(name_or_path)
    if path.is_file():
        return None, "file of word vectors"
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / TRAINING_CONFIG).is_file():
            return TK, "TK training folder"
        raise FileNotFoundError(f"{path} is no model folder: it has no config.json.")
    try:
        config = AutoConfig.from_pretrained(name_or_path)
    except OSError as error:
        raise FileNotFoundError(
            f"No model {name_or_path!r}: it is no folder with a config.json, and the Hub gave none "
            f"({str(error).splitlines()[0]})."
        ) from error
    for cls in ARCHITECTURES.values():
        # The published PreTTR has the model_type of its encoder, and says what it is by its class' name only.
        if isinstance(config, cls.config_class) or cls.__name__ in (config.architectures or []):
            return cls, f"{config.model_type} ranker"
    return None, f"{config.model_type} encoder"
