"""Rankers as ONNX graphs, in float32 or with weights of 8 bits, and what runs them without torch's model.

A graph has dynamic batch and length axes. Its inputs are the tokenizer's, (batch, length) integers, and its output:

| ranker | inputs | output |
| --- | --- | --- |
| BERT_CAT | of pairs | `scores` (batch,) |
| BERT_DOT | of texts, queries or documents | `vectors` (batch, D) |
| ColBERT | of texts; those of queries with the [MASK] terms behind them | `vectors` (batch, length, D) |
| PreTTR, TK | `query_*` and `document_*`, each row a pair | `scores` (batch,) |
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

from ..models import RankerConfig, RankerModel, RankingProcessor
from ..models.scoring import dot_product, max_sim

GRAPH = "model.onnx"
TEXT_RANKERS = ("BERT_Dot", "ColBERT")  # one graph for both sides; the score is a function of the vectors


class OnnxRanker:
    """An exported graph with its tokenizer and lengths: texts in, scores out.

    Args:
        folder: as `export_ranker` wrote it.
        threads: of the runtime; None takes a thread a core.

    Raises:
        FileNotFoundError: if there is no graph.
        ValueError: if onnxruntime is not installed.
    """

    def __init__(self, folder: str | os.PathLike, threads: int | None = None) -> None:
        folder = Path(folder)
        if not (folder / GRAPH).is_file():
            raise FileNotFoundError(f"{folder} has no {GRAPH}; export_ranker(model, 'onnx', folder) writes one.")
        try:
            import onnxruntime
        except ImportError as error:
            raise ValueError("Running a graph needs onnxruntime: pip install onnxruntime.") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        self.session = onnxruntime.InferenceSession(str(folder / GRAPH), options, providers=["CPUExecutionProvider"])
        self.config: RankerConfig = AutoConfig.from_pretrained(folder)
        self.processor = RankingProcessor.from_config(AutoTokenizer.from_pretrained(folder), self.config)

    def score(self, queries: Sequence[str], documents: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """Scores of pairs, (N,) float32, higher is better."""
        parts = []
        for start in range(0, len(queries), batch_size):
            batch = self.processor(queries[start : start + batch_size], documents[start : start + batch_size])
            parts.append(self._score_batch(batch))
        return np.concatenate(parts)

    def _score_batch(self, batch: Mapping[str, Tensor | Mapping[str, Tensor]]) -> np.ndarray:
        if self.config.model_type not in TEXT_RANKERS:
            return self._run(graph_inputs(self.config, batch))
        sides = [graph_inputs(self.config, {"document": batch[side]}) for side in ("query", "document")]
        vectors = [torch.from_numpy(self._run(side)) for side in sides]
        if self.config.model_type == "BERT_Dot":
            return dot_product(*vectors).numpy()
        return max_sim(*vectors, *(side["attention_mask"] for side in sides)).numpy()

    def _run(self, inputs: Mapping[str, Tensor]) -> np.ndarray:
        return self.session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]


class RankerGraph(nn.Module):
    """A ranker as a function of plain tensors, which is what is traced.

    Args:
        model: the ranker.
        names: of the tensors, in order, see `graph_inputs`.
    """

    def __init__(self, model: RankerModel, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *tensors: Tensor) -> Tensor:
        """Scores of pairs, or vectors of texts."""
        inputs = dict(zip(self.names, tensors, strict=True))
        if self.model.config.joins_texts:
            return self.model(**inputs).scores
        if self.model.config.model_type in TEXT_RANKERS:
            return self.model(document=inputs).document_vectors
        sides = {
            side: {name.removeprefix(f"{side}_"): inputs[name] for name in self.names if name.startswith(f"{side}_")}
            for side in ("query", "document")
        }
        return self.model(**sides).scores


def graph_inputs(config: RankerConfig, batch: Mapping[str, Tensor | Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What `RankingProcessor` makes of pairs, as the graph's inputs: name -> (N, L)."""
    if config.joins_texts or config.model_type in TEXT_RANKERS:
        return {name: tensor.flatten(0, -2) for name, tensor in batch.get("document", batch).items()}
    return {f"{side}_{name}": tensor.flatten(0, -2) for side in batch for name, tensor in batch[side].items()}


def write_onnx(model: RankerModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """`model.onnx` in float32, with tokenizer and config beside it."""
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = RankingProcessor.from_config(tokenizer, model.config)
    # Two pairs of different lengths: an axis of size 1 would be taken for a constant.
    inputs = graph_inputs(
        model.config, processor(["what is it", "where"], ["it is a text", "here in a list of texts"])
    )
    axes = tuple({0: "batch", 1: f"{name.split('_')[0]}_length"} for name in inputs)
    if "input_ids" in inputs:
        axes = tuple({0: "batch", 1: "length"} for _ in inputs)
    output = "vectors" if model.config.model_type in TEXT_RANKERS else "scores"
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that torchvision is not there
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                RankerGraph(model, list(inputs)).eval(),
                tuple(inputs.values()),
                input_names=list(inputs),
                output_names=[output],
                dynamic_shapes=(axes,),
                dynamo=True,
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    program.save(folder / GRAPH)


def write_onnx_int8(model: RankerModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The same with weights of 8 bits, a scale for each column; activations are quantised as they come."""
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
    """Scores of pairs in one batch, (N,)."""
    return OnnxRanker(folder).score(queries, documents, batch_size=len(queries))
