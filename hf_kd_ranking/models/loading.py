"""One entry for every checkpoint that can become a ranker: our own, and plain encoders."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from .base import RankerConfig, RankerModel
from .bert_cat import BertCat
from .bert_dot import BertDot

ARCHITECTURES: dict[str, type[RankerModel]] = {"bert_cat": BertCat, "bert_dot": BertDot}


def load_ranker(name_or_path: str, architecture: str | None = None, **config_overrides: Any) -> RankerModel:
    """Load a ranker checkpoint, or build a fresh ranker on a plain encoder.

    Args:
        name_or_path: a ranker checkpoint, or any encoder `AutoModel` can load; a folder or a Hub name.
        architecture: one of `ARCHITECTURES`. Needed for a plain encoder; for a ranker checkpoint it must be the one
            the checkpoint has.
        **config_overrides: fields of the architecture's config, for example `max_document_length=180`. For a plain
            encoder also `layers`, see `RankerModel.from_encoder`.

    Raises:
        ValueError: if the architecture is unknown, missing, or not the checkpoint's, or weights are incomplete.
        FileNotFoundError: if there is no such model.
    """
    if architecture is not None and architecture not in ARCHITECTURES:
        raise ValueError(f"Unknown architecture {architecture!r}; choose one of {', '.join(ARCHITECTURES)}.")
    config = _read_config(name_or_path)
    if isinstance(config, RankerConfig):
        cls = next(model for model in ARCHITECTURES.values() if model.config_class is type(config))
        if architecture is not None and ARCHITECTURES[architecture] is not cls:
            raise ValueError(
                f"{name_or_path} is a {config.model_type} checkpoint, not {architecture!r}; leave the architecture "
                "out or name a plain encoder."
            )
        return cls.from_pretrained(name_or_path, **config_overrides)
    if architecture is None:
        raise ValueError(
            f"{name_or_path} is a plain {config.model_type} encoder: say which ranker to build on it, "
            f"architecture={'|'.join(ARCHITECTURES)}."
        )
    return ARCHITECTURES[architecture].from_encoder(name_or_path, **config_overrides)


def _read_config(name_or_path: str) -> Any:
    path = Path(name_or_path)
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} is no model folder: it has no config.json.")
    try:
        return AutoConfig.from_pretrained(name_or_path)
    except OSError as error:
        raise FileNotFoundError(
            f"No model {str(name_or_path)!r}: it is no folder with a config.json, and the Hub gave none "
            f"({str(error).splitlines()[0]})."
        ) from error
