"""Rankers as ONNX graphs, in float32 or with 8-bit weights, and a class that runs them.

A graph has dynamic batch and length axes. Its inputs are the tokenizer's outputs, (batch, length) integers:

| ranker | inputs | output |
| --- | --- | --- |
| reads both texts as one sequence (BERT_CAT) | a pair per row | `scores` (batch,) |
| compares one vector per text (BERT_DOT, SPLADE) | a query or document per row | `vectors` (batch, D) |
| compares one vector per token (ColBERT) | the same; a query with its [MASK] tokens | `vectors` (batch, length, D) |
| others (PreTTR, TK, TKL) | `query_*` and `document_*`, a pair per row | `scores` (batch,) |
"""

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from ..errors import InputError
from ..models import BertCatConfig, RankerConfig, RankerModel, RankingProcessor
from ..models.scoring import dot_product, max_sim

GRAPH = "model.onnx"


class OnnxRanker:
    """An exported graph with its tokenizer: texts in, scores out.

    Args:
        folder: folder that `export_ranker` wrote.
        threads: threads of the runtime; None takes one per core.

    Raises:
        FileNotFoundError: if the folder has no graph.
        InputError: if onnxruntime is not installed.
    """

    def __init__(self, folder: str | os.PathLike, threads: int | None = None) -> None:
        folder = Path(folder)
        if not (folder / GRAPH).is_file():
            raise FileNotFoundError(f"{folder} has no {GRAPH}; export_ranker(model, 'onnx', folder) writes one.")
        try:
            import onnxruntime
        except ImportError as error:
            raise InputError("Running a graph needs onnxruntime: pip install onnxruntime.") from error
        self.folder = folder
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        self.session = onnxruntime.InferenceSession(str(folder / GRAPH), options, providers=["CPUExecutionProvider"])
        self.config: RankerConfig = AutoConfig.from_pretrained(folder)
        self.processor = RankingProcessor.from_config(AutoTokenizer.from_pretrained(folder), self.config)

    def score(self, queries: str | Sequence[str], documents: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """Score pairs, (N,) float32, higher is better; a single query is scored with every document."""
        if isinstance(queries, str):
            queries = [queries] * len(documents)
        scores = []
        for start in range(0, len(queries), batch_size):
            stop = start + batch_size
            batch = self.processor(queries[start:stop], documents[start:stop])
            scores.append(self._score_batch(batch))
        return np.concatenate(scores)

    def _score_batch(self, batch: Mapping[str, Tensor | Mapping[str, Tensor]]) -> np.ndarray:
        if not self.config.is_searchable:
            return self._run(_graph_inputs(self.config, batch))
        query = _graph_inputs(self.config, {"document": batch["query"]})
        document = _graph_inputs(self.config, batch)
        query_vectors, document_vectors = torch.from_numpy(self._run(query)), torch.from_numpy(self._run(document))
        if self.config.similarity == "dot":
            return dot_product(query_vectors, document_vectors).numpy()
        masks = query["attention_mask"], document["attention_mask"]
        return max_sim(query_vectors, document_vectors, *masks).numpy()

    def _run(self, inputs: Mapping[str, Tensor]) -> np.ndarray:
        return self.session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]


class _RankerGraph(nn.Module):
    """A ranker as a function of plain tensors, whose names in order are those of `_graph_inputs`."""

    def __init__(self, model: RankerModel, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *tensors: Tensor) -> Tensor:
        inputs = dict(zip(self.names, tensors, strict=True))
        if self.model.config.joins_texts:
            return self.model(**inputs).scores
        if self.model.config.is_searchable:
            return self.model(document=inputs).document_vectors
        sides = {"query": {}, "document": {}}
        for name, tensor in inputs.items():
            side, _, name_in_side = name.partition("_")
            sides[side][name_in_side] = tensor
        return self.model(**sides).scores


def _graph_inputs(config: RankerConfig, batch: Mapping[str, Tensor | Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the graph's inputs for a batch: name -> (N, L); those of the documents if vectors are compared."""
    if config.joins_texts:
        sides = {"": batch}
    elif config.is_searchable:
        sides = {"": batch["document"]}
    else:
        sides = {"query_": batch["query"], "document_": batch["document"]}
    inputs = {}
    for prefix, tensors in sides.items():
        for name, tensor in tensors.items():
            inputs[f"{prefix}{name}"] = tensor.flatten(0, -2)
    return inputs


def onnx_obstacles(config: RankerConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the fields of a ranker that a graph, which encodes queries as documents, cannot express; with reasons."""
    obstacles = []
    if isinstance(config, BertCatConfig) and config.passage_length is not None:
        obstacles.append(f"passage_length={config.passage_length}: the graph reads a pair as one sequence")
    if config.vectors_per_text == "sparse" and config.query_encoding != "model":
        obstacles.append(f"query_encoding={config.query_encoding!r}: the graph encodes queries as documents")
    if config.vectors_per_text == "sparse" and config.query_top_k != config.document_top_k:
        obstacles.append(f"query_top_k={config.query_top_k}: the graph has one limit for both sides")
    return obstacles


def write_onnx(model: RankerModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write `model.onnx` in float32, with tokenizer and config."""
    config = model.config
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = RankingProcessor.from_config(tokenizer, config)
    # Two pairs of different lengths: an axis of size 1 would be taken for a constant.
    inputs = _graph_inputs(config, processor(["what is it", "where"], ["it is a text", "here in a list of texts"]))
    has_sides = "input_ids" not in inputs
    axes = []
    for name in inputs:
        axes.append({0: "batch", 1: f"{name.partition('_')[0]}_length" if has_sides else "length"})
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that torchvision is missing
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _RankerGraph(model, list(inputs)).eval(),
                tuple(inputs.values()),
                input_names=list(inputs),
                output_names=["vectors" if config.is_searchable else "scores"],
                dynamic_shapes=(tuple(axes),),
                dynamo=True,
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    program.save(folder / GRAPH)


def write_onnx_int8(model: RankerModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write `model.onnx` with 8-bit weights, one scale per column; activations are quantised at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with TemporaryDirectory() as scratch:
        write_onnx(model, tokenizer, Path(scratch))
        prepared = Path(scratch) / "prepared.onnx"
        quant_pre_process(Path(scratch) / GRAPH, prepared, skip_symbolic_shape=True)
        quantize_dynamic(prepared, folder / GRAPH, weight_type=QuantType.QInt8, per_channel=True)
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def score_onnx(folder: Path, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
    """Score pairs in one batch, (N,)."""
    return OnnxRanker(folder).score(queries, documents, batch_size=len(queries))
