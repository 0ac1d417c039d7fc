"""Write a ranker in the layout of another library or runtime, with equal scores, or say why that is not possible.

    export_ranker("my_ranker", "onnx", "my_ranker_onnx")

The output is loaded again and scores some texts before it gets its name.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..artifacts import building, refuse_existing
from ..errors import InputError
from ..models import BertCat, BertDot, ColBERT, RankerConfig, RankerModel, Splade
from ..ranker import Ranker
from . import onnx
from . import sentence_transformers as layouts

MODEL_FILES = ("config.json", "modules.json")
TOLERANCE = 1e-4  # absolute up to a score of 1, relative above: float32 has seven digits
# Short, empty and too long for most rankers: both sides must cut texts in the same way.
QUERIES = ("what is a neural network", "how long do cats live", "capital of france", "why " * 90, "sort a list")
DOCUMENTS = (
    "A neural network is a model made of layers of simple units, inspired by the brain.",
    "Cats live twelve to eighteen years.",
    "",
    "The sun is a star.",
    "To sort a list in place, call its sort method; sorted() returns a new one. " * 30,
)


@dataclass(frozen=True)
class Format:
    """A layout that rankers are exported to.

    Args:
        write: writes a model and its tokenizer into a folder.
        score: scores pairs of texts with the written folder, (N,).
        model_class: the architecture that the layout belongs to; None for every ranker.
        find_obstacles: returns what the layout cannot express: "field=value: reason" of config fields.
        is_exact: False if the scores may differ from the ranker's.
    """

    write: Callable[[RankerModel, PreTrainedTokenizerBase, Path], None]
    score: Callable[[Path, Sequence[str], Sequence[str]], np.ndarray]
    model_class: type[RankerModel] | None = None
    find_obstacles: Callable[[RankerConfig, PreTrainedTokenizerBase], list[str]] | None = None
    is_exact: bool = True


_score_vectors = partial(layouts.score, "MultiVectorEncoder")  # which reads PyLate's layout as well
FORMATS = {
    "cross-encoder": Format(
        layouts.write_cross_encoder, partial(layouts.score, "CrossEncoder"), BertCat, layouts.cross_encoder_obstacles
    ),
    "sentence-transformer": Format(layouts.write_encoder, partial(layouts.score, "SentenceTransformer"), BertDot),
    "multi-vector": Format(layouts.write_encoder, _score_vectors, ColBERT, layouts.multi_vector_obstacles),
    "sparse-encoder": Format(
        layouts.write_sparse_encoder, partial(layouts.score, "SparseEncoder"), Splade, layouts.sparse_encoder_obstacles
    ),
    "pylate": Format(layouts.write_pylate, _score_vectors, ColBERT, layouts.pylate_obstacles),
    "onnx": Format(onnx.write_onnx, onnx.score_onnx, find_obstacles=onnx.onnx_obstacles),
    "onnx-int8": Format(onnx.write_onnx_int8, onnx.score_onnx, find_obstacles=onnx.onnx_obstacles, is_exact=False),
}


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
        name_or_path: the ranker, see `load_ranker`, with its tokenizer.
        format: "cross-encoder", "sentence-transformer", "multi-vector" and "sparse-encoder" are sentence-transformers'
            classes for BERT_CAT, BERT_DOT, ColBERT and SPLADE; "pylate" is PyLate's layout of a ColBERT; "onnx" is a
            graph in float32, see `OnnxRanker`; "onnx-int8" is the same graph with 8-bit weights, whose scores are not
            equal.
        output: a new folder.
        architecture: architecture of a plain encoder.
        overwrite: True replaces an output that is a model's folder.
        **overrides: config fields, for example `query_augmentation=0`.

    Returns:
        `output`, `format`, `architecture` (the model_type) and `largest_difference` of the scores of a few texts.

    Raises:
        InputError: if the format is unknown, cannot express the ranker (with the fields and reasons), or the scores
            differ by more than 1e-4 (for scores above 1, by more than 1e-4 of the score); or a library is missing.
        FileExistsError: if the output exists.
        FileNotFoundError: if the ranker or its tokenizer does not exist.

    Example:
        >>> result = kd.export_ranker("bert_dot", "sentence-transformer", "exported")
        >>> result["largest_difference"] < 1e-4
        True
    """
    if format not in FORMATS:
        raise InputError(f"Unknown format {format!r}; choose one of {', '.join(FORMATS)}.")
    layout, output = FORMATS[format], Path(output)
    refuse_existing(output, overwrite)
    if output.exists() and not any((output / file).is_file() for file in MODEL_FILES):
        raise FileExistsError(f"{output} exists and is not a model's folder, so it is kept; give another output.")
    if output.resolve() == Path(name_or_path).resolve():
        raise InputError(
            f"The output {output} is the ranker itself, which an export would replace; give another output."
        )
    overrides.setdefault("dtype", torch.float32)
    ranker = Ranker.from_pretrained(name_or_path, architecture, "cpu", **overrides)
    config = ranker.model.config
    obstacles = []
    if layout.model_class not in (None, type(ranker.model)):
        owner = layout.model_class.config_class.model_type
        obstacles = [f"model_type={config.model_type}: this layout is for {owner}; every ranker has the format onnx"]
    elif layout.find_obstacles is not None:
        obstacles = layout.find_obstacles(config, ranker.tokenizer)
    if obstacles:
        reasons = "; ".join(obstacles)
        raise InputError(f"The format {format} cannot give the scores of this {config.model_type}. {reasons}.")
    with building(output, replaces=overwrite) as temporary:
        try:
            layout.write(ranker.model, ranker.tokenizer, temporary)
            scores = layout.score(temporary, QUERIES, DOCUMENTS)
        except ImportError as error:
            libraries = 'pip install "hf_kd_ranking[export]"'
            raise InputError(f"The format {format} needs more libraries: {libraries} ({error}).") from error
        difference = largest_difference(ranker.score(QUERIES, DOCUMENTS), scores)
        if layout.is_exact and not difference <= TOLERANCE:  # also if it is NaN
            raise InputError(
                f"The scores in {format} differ from the ranker's by {difference:.2g}, more than {TOLERANCE}; nothing "
                "was written."
            )
    result = {"output": str(output), "format": format, "architecture": config.model_type}
    return result | {"largest_difference": difference}


def largest_difference(expected: np.ndarray, scores: np.ndarray) -> float:
    """Return the largest difference of two lists of scores, relative to the score if that is above 1."""
    return float((np.abs(scores - expected) / np.maximum(np.abs(expected), 1)).max())
