"""Rows of ids and scores to batches; runs inside the dataloader workers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .texts import TextStore

# What of a batch is not for the student.
TARGETS = ("teacher_scores", "rows", "teacher_inputs")


@dataclass(frozen=True)
class RankingCollator:
    """Rows of ids and teacher scores to a batch.

    In:  [{"query_id": 7, "pos_id": 1, "neg_id": 2, "pos_score": 9.0, "neg_score": 4.0}], or lists
         [{"query_id": 7, "doc_ids": [1, 2], "teacher_scores": [9.0, 4.0]}]
    Out: {"query": {"input_ids": (B, Lq), ...}, "document": {"input_ids": (B, n, Ld), ...},
          "rows": {"query": (B,), "document": (B, n)}, "teacher_scores": [[9.0, 4.0]]}, column 0 the positive; for a
         ranker that joins texts the pair's {"input_ids": (B, n, L), ...} stand in place of query and document. `rows`
         are the places of the texts in their stores. Rows without scores give no `teacher_scores`.

    Args:
        processor: of B queries and B * n documents a ranker's inputs, see `models.RankingProcessor`.
        queries: query_id -> text.
        documents: doc_id -> text.
        teacher_processor: of the same texts the inputs of a live teacher, `teacher_inputs`; None for none.
    """

    processor: Callable[[Sequence[str], Sequence[str]], dict[str, Any]]
    queries: TextStore
    documents: TextStore
    teacher_processor: Callable[[Sequence[str], Sequence[str]], dict[str, Any]] | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate rows.

        Raises:
            KeyError: if a store lacks an id.
            ValueError: if the lists of the rows differ in length.
        """
        doc_ids = [row["doc_ids"] if "doc_ids" in row else [row["pos_id"], row["neg_id"]] for row in rows]
        n = len(doc_ids[0])
        if any(len(ids) != n for ids in doc_ids):
            lengths = sorted({len(ids) for ids in doc_ids})
            raise ValueError(
                f"The documents per query differ within a batch ({lengths}); cut all lists to one length."
            )
        query_ids = [row["query_id"] for row in rows]
        all_ids = [doc_id for ids in doc_ids for doc_id in ids]
        texts = self.queries[query_ids], self.documents[all_ids]
        batch = self.processor(*texts)
        if self.teacher_processor is not None:
            batch["teacher_inputs"] = self.teacher_processor(*texts)
        batch["rows"] = {
            "query": torch.from_numpy(self.queries.rows_of(query_ids)),
            "document": torch.from_numpy(self.documents.rows_of(all_ids)).view(len(rows), n),
        }
        if "teacher_scores" in rows[0] or "pos_score" in rows[0]:
            batch["teacher_scores"] = torch.tensor([teacher_scores_of(row) for row in rows], dtype=torch.float32)
        return batch


def teacher_scores_of(row: Mapping[str, Any]) -> list[float]:
    """The teacher's scores of a row's documents, positive first."""
    return row["teacher_scores"] if "teacher_scores" in row else [row["pos_score"], row["neg_score"]]


def split_batch(batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A batch's inputs for the student, and the rest, see `TARGETS`."""
    inputs = {name: value for name, value in batch.items() if name not in TARGETS}
    return inputs, {name: value for name, value in batch.items() if name in TARGETS}
