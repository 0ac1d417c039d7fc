"""A ranker in the layout of another library or runtime, with its scores; or the reason why it cannot have them there.

    export_ranker("my_ranker", "onnx", "my_ranker_onnx")

What is written is loaded again and scores some texts before it gets its name.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..artifacts import building, refuse_existing
from ..models import RankerConfig, RankerModel
from ..ranker import Ranker
from . import onnx
from . import sentence_transformers as layouts

TOLERANCE = 1e-4  # of a score, and of each unit of a larger one: float32 has seven digits
# Short, empty and too long for most rankers: what is cut must be cut alike.
QUERIES = ("what is a neural network", "how long do cats live", "capital of france", "why " * 90, "sort a list")
DOCUMENTS = (
    "A neural network is a model made of layers of simple units, inspired by the brain.",
    "Cats live twelve to eighteen years.",
    "",
    "The sun is a star.",
    "To sort a list in place, call its sort method; sorted() returns a new one. " * 30,
)

Writer = Callable[[RankerModel, PreTrainedTokenizerBase, Path], None]
Scorer = Callable[[Path, Sequence[str], Sequence[str]], np.ndarray]
# Of each format: what writes it, what scores by it, and the model_type whose layout it is.
WRITERS: dict[str, tuple[Writer, Scorer, str | None]] = {
    "cross-encoder": (layouts.write_cross_encoder, partial(layouts.score, "CrossEncoder"), "BERT_Cat"),
    "sentence-transformer": (layouts.write_bi_encoder, partial(layouts.score, "SentenceTransformer"), "BERT_Dot"),
    "multi-vector": (layouts.write_multi_vector, partial(layouts.score, "MultiVectorEncoder"), "ColBERT"),
    "pylate": (layouts.write_pylate, partial(layouts.score, "MultiVectorEncoder"), "ColBERT"),
    "onnx": (onnx.write_onnx, onnx.score_onnx, None),
    "onnx-int8": (onnx.write_onnx_int8, onnx.score_onnx, None),
}
FORMATS = tuple(WRITERS)


def export_ranker(
    name_or_path: str | os.PathLike,
    format: str,
    output: str | os.PathLike,
    architecture: str | None = None,
    overwrite: bool = False,
    **overrides: Any,
) -> dict[str, Any]:
    """Write a ranker in another layout, and compare its scores there with its own.

    Args:
        name_or_path: of the ranker, see `load_ranker`; its tokenizer must be beside it.
        format: "cross-encoder", "sentence-transformer" and "multi-vector" are sentence-transformers' classes for
            BERT_CAT, BERT_DOT and ColBERT; "pylate" is PyLate's layout of a ColBERT; "onnx" has a graph in float32,
            see `OnnxRanker`; "onnx-int8" the same with weights of 8 bits, which are not equal.
        output: the folder, which must not exist.
        architecture: of a plain encoder.
        overwrite: True replaces an output that is a model's folder.
        **overrides: config fields, for example `query_augmentation=0`.

    Returns:
        `output`, `format`, `architecture` (the model_type) and `largest_difference` of the scores of a few texts.

    Raises:
        ValueError: if the format is unknown, cannot express the ranker (naming the fields and why), or the scores
            differ by more than 1e-4 (of scores above 1, 1e-4 of the score); or a library is not installed.
        FileExistsError: if the output exists.
        FileNotFoundError: if there is no such ranker, or no tokenizer beside it.
    """
    if format not in WRITERS:
        raise ValueError(f"Unknown format {format!r}; choose one of {', '.join(FORMATS)}.")
    output = Path(output)
    refuse_existing(output, overwrite)
    if output.exists() and not (output / "config.json").is_file():
        raise FileExistsError(f"{output} exists and is no model's folder, which is not replaced; give another output.")
    ranker = Ranker.from_pretrained(name_or_path, architecture, "cpu", **({"dtype": torch.float32} | overrides))
    model, tokenizer = ranker.model, ranker.tokenizer
    if cannot := obstacles(model.config, tokenizer, format):
        reasons = "; ".join(f"{field}: {reason}" for field, reason in cannot.items())
        raise ValueError(f"The format {format} cannot give the scores of this {model.config.model_type}. {reasons}.")
    write, score, _ = WRITERS[format]
    with building(output) as temporary:
        try:
            write(model, tokenizer, temporary)
            found = score(temporary, QUERIES, DOCUMENTS)
        except ImportError as error:
            raise ValueError(
                f'The format {format} needs more libraries: pip install "hf_kd_ranking[export]" ({error}).'
            ) from error
        difference = largest_difference(ranker.score(QUERIES, DOCUMENTS), found)
        if not difference <= TOLERANCE and format != "onnx-int8":
            raise ValueError(
                f"The scores in the format {format} differ from the ranker's by {difference:.2g}, more than "
                f"{TOLERANCE}; nothing was written."
            )
        if output.exists():
            shutil.rmtree(output)
    return {
        "output": str(output),
        "format": format,
        "architecture": model.config.model_type,
        "largest_difference": difference,
    }


def obstacles(config: RankerConfig, tokenizer: PreTrainedTokenizerBase, format: str) -> dict[str, str]:
    """What a format cannot express of a ranker: config field (or model_type) and value -> why; empty if nothing."""
    reader, kind = WRITERS[format][2], config.model_type
    if reader is None:
        return {}
    if kind != reader:
        return {f"model_type={kind}": f"it is a layout of {reader}; any ranker has the format onnx"}
    found = {}
    if kind == "BERT_Cat" and config.document_prefix:
        found[f"document_prefix={config.document_prefix!r}"] = "a CrossEncoder has a prompt before the query only"
    if config.query_augmentation:
        found[f"query_augmentation={config.query_augmentation}"] = (
            "these [MASK] terms follow the [SEP] of a query of any length, where this layout pads queries to one "
            "length; query_augmentation=0 leaves them out, which changes the scores: train with it"
        )
    if format == "pylate":
        if not config.normalize:
            found["normalize=False"] = "PyLate scales every vector to length 1; train with normalize=True"
        for name in ("query_prefix", "document_prefix"):
            text = config.to_dict()[name]
            if text and tokenizer.tokenize(text) != [text]:
                found[f"{name}={text!r}"] = "PyLate's prefix is one token, and the tokenizer makes several of it"
    return found


def largest_difference(expected: np.ndarray, found: np.ndarray) -> float:
    """Largest difference of two lists of scores, as a part of the score where that is above 1."""
    return float((np.abs(found - expected) / np.maximum(np.abs(expected), 1)).max())
