"""sentence-transformers in the measurements of `gpu.py`: its models, losses and loops on the same texts."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_setup import Bench
from torch import Tensor, nn

# The architectures that it has.
PEERS = ("bert_dot", "bert_cat", "colbert")


def load_peer(folder: Path, architecture: str, bench: Bench, dtype: torch.dtype | None = None) -> nn.Module:
    """Return its model on an encoder, with our lengths; an ImportError if it is not installed."""
    import sentence_transformers as st

    settings = {"device": str(bench.device), "model_kwargs": {"dtype": dtype or torch.float32}}
    if architecture == "bert_cat":
        return st.CrossEncoder(str(folder), num_labels=1, max_length=230, **settings)
    if architecture == "colbert":
        model = st.MultiVectorEncoder(str(folder), **settings)
    else:
        model = st.SentenceTransformer(str(folder), **settings)
    model.max_seq_length = 200
    return model


def peer_step(model: nn.Module, architecture: str) -> Callable[[Any], Tensor]:
    """Return a function from a batch of `peer_batches` to the Margin-MSE of its library."""
    from sentence_transformers import cross_encoder, sentence_transformer

    if architecture == "bert_cat":
        loss = cross_encoder.losses.MarginMSELoss(model)
    elif architecture == "bert_dot":
        loss = sentence_transformer.losses.MarginMSELoss(model)
    else:
        from sentence_transformers.multi_vector_encoder.losses import MultiVectorMarginMSELoss

        loss = MultiVectorMarginMSELoss(model)
    return lambda batch: loss(*batch)


def peer_batches(model: nn.Module, architecture: str, bench: Bench, pairs: int) -> Iterator[tuple[Any, Tensor]]:
    """Yield inputs and margins of its losses, on the device; its cross-encoder tokenises within the loss."""
    queries, passages = bench.texts["queries"], bench.texts["passages"]
    for start in range(0, bench.sizes.batch_count(pairs) * pairs, pairs):
        rows = bench.rows[start : start + pairs]
        columns = [[queries[row["query_id"]] for row in rows]]
        for place in (0, 1):
            columns.append([passages[row["doc_ids"][place]] for row in rows])
        margins = [row["teacher_scores"][0] - row["teacher_scores"][1] for row in rows]
        if architecture != "bert_cat":
            inputs = []
            for texts, task in zip(columns, ("query", "document", "document"), strict=True):
                inputs.append(to_device(model.preprocess(texts, task=task), bench.device))
            columns = inputs
        yield columns, torch.tensor(margins, device=bench.device)


def to_device(value: Any, device: torch.device) -> Any:
    """Copy the tensors of a nested batch."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {name: to_device(entry, device) for name, entry in value.items()}
    return value
