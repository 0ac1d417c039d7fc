"""Feed a training: choose the number of worker processes, and whether batches are joined from stored token ids."""

import os
import warnings
from collections.abc import Sized
from dataclasses import replace

import datasets
from transformers import TrainingArguments

from ..data.collate import RankingCollator
from ..data.tokens import StoredInputs
from ..errors import InputError

MOST_WORKERS = 4  # of a process, unless more are set


def default_workers() -> int:
    """Return the number of worker processes that suit a process which trains on a GPU: its cores, at most 4."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # only Linux says which cores a process may use
        cores = len(os.sched_getaffinity(0))
    return max(1, min(MOST_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def with_stored_tokens(
    collator: RankingCollator, rows: datasets.Dataset | datasets.IterableDataset, args: TrainingArguments
) -> RankingCollator:
    """Return a collator that reads token ids, if `token_cache` is set and training reads the collection once or more.

    If it reads fewer documents, to tokenise all of them would be more work than to tokenise the texts of each batch.
    That is also done, with a warning, where inputs cannot be joined from the ids of texts. A collator that was put in
    place of the trainer's own stays as it is.
    """
    if not isinstance(collator, RankingCollator):
        return collator
    if not args.token_cache or _documents_read(rows, args) < len(collator.documents):
        return collator
    stored = {}
    for name in ("processor", "teacher_processor"):
        processor = getattr(collator, name)
        if processor is None or isinstance(processor, StoredInputs):
            continue
        try:
            with args.main_process_first():
                stored[name] = StoredInputs.build(processor, collator.queries, collator.documents)
        except InputError as error:
            warnings.warn(f"Texts are tokenised again for every batch. {error}", stacklevel=2)
    return replace(collator, **stored)


def _documents_read(rows: datasets.Dataset | datasets.IterableDataset, args: TrainingArguments) -> int:
    """Return about how many documents training reads, each as often as it is in a batch."""
    is_stream = not isinstance(rows, Sized)
    n = 2 if is_stream else len(rows[0]["doc_ids"])
    if is_stream or args.max_steps > 0:
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return args.max_steps * per_step * n
    return int(args.num_train_epochs * len(rows)) * n
