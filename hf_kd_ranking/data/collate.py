"""Turn rows of ids and scores into batches; runs inside the dataloader workers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .passages import split_id
from .texts import TextStore
from .tokens import StoredInputs

# Entries of a batch that are not inputs of the student.
TARGETS = ("teacher_scores", "is_listed", "rows", "teacher_inputs")
Processor = Callable[[Sequence[str], Sequence[str]], dict[str, Any]]


@dataclass(frozen=True)
class RankingCollator:
    """Turn rows of ids and teacher scores into a batch.

    In:  [{"query_id": 7, "doc_ids": [1, 2], "teacher_scores": [9.0, 4.0]}]
    Out: {"query": {"input_ids": (B, Lq), ...}, "document": {"input_ids": (B, n, Ld), ...},
          "rows": {"query": (B,), "document": (B, n)}, "teacher_scores": [[9.0, 4.0]]}, column 0 the positive; for a
         ranker that joins texts, the pair's {"input_ids": (B, n, L), ...} replace query and document. `rows` are the
         places of the texts in their stores; if those are passages, with `whole` (B, n), the places of the first
         passages of their documents. Rows without scores give no `teacher_scores`.

    Inputs of a side, or of pairs, contain `lengths`, (B,) or (B, n), the number of tokens of each text as an array of
    numpy, which no library copies to a GPU: models group rows by length without reading the mask back.

    Shorter lists are filled up with their positive and the score 0; only then the batch has `is_listed` (B, n), False
    at what was filled in.

    Args:
        processor: turns B queries and B * n documents into a ranker's inputs, see `models.RankingProcessor`; or joins
            them from stored token ids.
        queries, documents: the texts of the ids.
        teacher_processor: turns the same texts into the inputs of a live teacher, `teacher_inputs`, if there is one.
    """

    processor: Processor | StoredInputs
    queries: TextStore
    documents: TextStore
    teacher_processor: Processor | StoredInputs | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate rows; an UnknownIdError names an id that a store lacks."""
        query_ids = [row["query_id"] for row in rows]
        lengths = [len(row["doc_ids"]) for row in rows]
        n = max(lengths)
        doc_ids: list = []
        scores: list[list[float]] = []
        for row in rows:
            filled_in = n - len(row["doc_ids"])
            doc_ids += [*row["doc_ids"], *row["doc_ids"][:1] * filled_in]
            if "teacher_scores" in row:
                scores.append([*row["teacher_scores"], *[0.0] * filled_in])
        query_rows, document_rows = self.queries.rows_of_texts(query_ids), self.documents.rows_of_texts(doc_ids)
        batch = self._inputs(self.processor, query_rows, document_rows)
        if self.teacher_processor is not None:
            batch["teacher_inputs"] = self._inputs(self.teacher_processor, query_rows, document_rows)
        batch["rows"] = {
            "query": torch.from_numpy(query_rows),
            "document": torch.from_numpy(document_rows).view(len(rows), n),
        }
        if self.documents.aggregation is not None:
            firsts = self.documents.rows_of_documents([split_id(str(doc_id))[0] for doc_id in doc_ids])
            batch["rows"]["whole"] = torch.from_numpy(firsts).view(len(rows), n)
        if scores:
            batch["teacher_scores"] = torch.tensor(scores, dtype=torch.float32)
        if min(lengths) < n:
            batch["is_listed"] = torch.arange(n) < torch.tensor(lengths).unsqueeze(1)
        return batch

    def _inputs(
        self, processor: Processor | StoredInputs, query_rows: np.ndarray, document_rows: np.ndarray
    ) -> dict[str, Any]:
        if isinstance(processor, StoredInputs):
            inputs = processor(query_rows, document_rows)
        else:
            inputs = processor(self.queries.take(query_rows), self.documents.take(document_rows))
        for side in sides(inputs):
            side["lengths"] = side["attention_mask"].sum(-1).numpy()
        return inputs

    def describe(self, batch: Mapping[str, Any]) -> str:
        """Return the ids in a batch: `query: document, document; query: ...`."""
        rows = batch["rows"]
        queries = self.queries.ids_of(rows["query"].cpu().numpy())
        lists = []
        for query_id, places in zip(queries, rows["document"].cpu().numpy(), strict=True):
            lists.append(f"{query_id}: {', '.join(self.documents.ids_of(places))}")
        return "; ".join(lists)


def sides(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the inputs of query and document, or those of pairs, which are one side."""
    return [side for side in inputs.values() if isinstance(side, Mapping)] or [inputs]


def split_batch(batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a batch's inputs for the student, and the rest, see `TARGETS`."""
    targets = {name: batch[name] for name in TARGETS if name in batch}
    return {name: value for name, value in batch.items() if name not in targets}, targets
