"""Turn rows of ids and scores into batches; runs inside the dataloader workers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .texts import TextStore

# Entries of a batch that are not inputs of the student.
TARGETS = ("teacher_scores", "is_listed", "rows", "teacher_inputs")


@dataclass(frozen=True)
class RankingCollator:
    """Turn rows of ids and teacher scores into a batch.

    In:  [{"query_id": 7, "doc_ids": [1, 2], "teacher_scores": [9.0, 4.0]}]
    Out: {"query": {"input_ids": (B, Lq), ...}, "document": {"input_ids": (B, n, Ld), ...},
          "rows": {"query": (B,), "document": (B, n)}, "teacher_scores": [[9.0, 4.0]]}, column 0 the positive; for a
         ranker that joins texts, the pair's {"input_ids": (B, n, L), ...} replace query and document. `rows` are the
         places of the texts in their stores. Rows without scores give no `teacher_scores`.

    Shorter lists are filled up with their positive and the score 0; only then the batch has `is_listed` (B, n), False
    at what was filled in.

    Args:
        processor: turns B queries and B * n documents into a ranker's inputs, see `models.RankingProcessor`.
        queries, documents: the texts of the ids.
        teacher_processor: turns the same texts into the inputs of a live teacher, `teacher_inputs`, if there is one.
    """

    processor: Callable[[Sequence[str], Sequence[str]], dict[str, Any]]
    queries: TextStore
    documents: TextStore
    teacher_processor: Callable[[Sequence[str], Sequence[str]], dict[str, Any]] | None = None

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
        texts = self.queries[query_ids], self.documents[doc_ids]
        batch = self.processor(*texts)
        if self.teacher_processor is not None:
            batch["teacher_inputs"] = self.teacher_processor(*texts)
        batch["rows"] = {
            "query": torch.from_numpy(self.queries.rows_of(query_ids)),
            "document": torch.from_numpy(self.documents.rows_of(doc_ids)).view(len(rows), n),
        }
        if scores:
            batch["teacher_scores"] = torch.tensor(scores, dtype=torch.float32)
        if min(lengths) < n:
            batch["is_listed"] = torch.arange(n) < torch.tensor(lengths).unsqueeze(1)
        return batch

    def describe(self, batch: Mapping[str, Any]) -> str:
        """Return the ids in a batch: `query: document, document; query: ...`."""
        rows = batch["rows"]
        queries = self.queries.ids_of(rows["query"].cpu().numpy())
        lists = []
        for query_id, places in zip(queries, rows["document"].cpu().numpy(), strict=True):
            lists.append(f"{query_id}: {', '.join(self.documents.ids_of(places))}")
        return "; ".join(lists)


def split_batch(batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a batch's inputs for the student, and the rest, see `TARGETS`."""
    targets = {name: batch[name] for name in TARGETS if name in batch}
    return {name: value for name, value in batch.items() if name not in targets}, targets
