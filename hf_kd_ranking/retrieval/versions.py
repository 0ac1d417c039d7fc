"""Which model made the vectors of a folder, and whether a ranker is that model."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..inference import fingerprint
from ..models import RankerConfig
from ..ranker import Ranker

FACTS = "index.json"
# Config fields that change no document's vector; those of the query side are left out by their names.
NOT_OF_DOCUMENTS = {"encoder_config", "initializer_range", *(field.name for field in fields(RankerConfig))}


def model_facts(ranker: Ranker) -> dict[str, str]:
    """What identifies the model that makes vectors: architecture, dtype, fingerprint of weights and settings."""
    config = ranker.model.config
    own = {field.name for field in fields(type(config))} - NOT_OF_DOCUMENTS
    own |= {"max_document_length", "document_prefix"}
    settings = {name: vars(config)[name] for name in sorted(own) if not name.startswith("query_")}
    return {
        "architecture": config.model_type,
        "model_dtype": str(ranker.model.dtype).removeprefix("torch."),
        "model": fingerprint(ranker.model, settings),
    }


def check_model(facts: Mapping[str, Any], ranker: Ranker, folder: Path) -> None:
    """Refuse a ranker that did not make the vectors of a folder.

    Raises:
        ValueError: naming the first difference.
    """
    for name, value in model_facts(ranker).items():
        if facts[name] != value:
            raise ValueError(
                f"{folder} was built by another model: {name.replace('_', ' ')} {facts[name]} there, {value} here; "
                "open it with that model, or build it again."
            )
