"""Checks before training starts, so that bad input is one line now and not a wrong ranker later."""

import math
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from ..data.rows import LIST_COLUMNS, TeacherRows
from ..data.texts import TextStore
from ..errors import InputError, UnknownIdError
from ..evaluation.rerank import RerankingEvaluator
from ..losses import IN_BATCH, check_data, get_loss
from ..models import RankerConfig
from .arguments import RankingTrainingArguments


@dataclass
class RowSummary:
    """Queries, teacher scores and list lengths of all rows."""

    is_query_used: np.ndarray  # (len(queries),) bool, the queries of the store that have rows
    lowest: float = np.inf
    highest: float = -np.inf
    has_margins: bool = False  # a row has two different scores
    longest: int = 0


def check_options(
    args: RankingTrainingArguments, has_model: bool, query_clusters: np.ndarray | None, options: Mapping[str, Any]
) -> None:
    """Refuse arguments of `RankingTrainer` that it cannot have, or not together; `options` are those of `Trainer`."""
    if not isinstance(args, RankingTrainingArguments):
        raise TypeError(f"args must be RankingTrainingArguments, which has the loss; got {type(args).__name__}.")
    args.check_devices()
    if options.get("data_collator") is not None:
        raise InputError(
            "data_collator must stay unset: a collator that has the texts makes batches of ids, with the lengths and "
            "prefixes of the student's config."
        )
    if has_model == (options.get("model_init") is not None):
        raise InputError("RankingTrainer needs either a model or a model_init that makes one, not both or none.")
    if options.get("compute_loss_func") is not None and args.loss != "margin_mse":
        raise InputError(f"compute_loss_func replaces the loss, and loss is {args.loss!r}; give one of them.")
    if args.lora_r is not None and options.get("optimizers", (None, None)) != (None, None):
        raise InputError(
            "optimizers cannot have the weights of the adapters that lora_r adds; give optimizer_cls_and_kwargs."
        )
    if query_clusters is not None and args.train_sampling_strategy != "random":
        raise InputError("query_clusters decides the order of the rows; leave train_sampling_strategy out.")
    if query_clusters is not None and args.auto_find_batch_size:
        raise InputError("query_clusters makes batches of one size; leave auto_find_batch_size out.")


def check_evaluation(
    args: RankingTrainingArguments,
    held_out: Collection[str],
    evaluator: Any,
    losses: Collection[str],
    has_own_metrics: bool,
) -> None:
    """Refuse an evaluation that measures nothing, or not what decides about the best model.

    `held_out` names the data sets of `eval_dataset`, a single one is ""; `losses` are none if the user's own function
    computes the loss; `has_own_metrics` means a `compute_metrics`, whose names are known only after it ran.
    """
    is_stopping = args.early_stopping_patience is not None
    if is_stopping and (args.eval_strategy == "no" or args.metric_for_best_model is None):
        raise InputError("early_stopping_patience needs an eval_strategy and a metric_for_best_model.")
    if args.eval_strategy == "no" and not args.eval_on_start:
        return
    if not held_out and evaluator is None:
        raise InputError(
            "Evaluation during training (eval_strategy, eval_on_start) needs something to measure: an evaluator, such "
            "as RerankingEvaluator (--candidates and --qrels), or an eval_dataset of held-out teacher rows."
        )
    is_known = evaluator is None or type(evaluator) is RerankingEvaluator  # a subclass may measure anything
    if args.metric_for_best_model is None or has_own_metrics or not is_known:
        return
    measured = [] if evaluator is None else [*evaluator.measures]
    own = ["pairwise_agreement"]
    if not losses or not all(name.startswith(IN_BATCH) for name in losses):
        own.append("loss")
    for data_set in held_out:
        measured += [f"{data_set}_{name}".removeprefix("_") for name in own]
    if args.metric_for_best_model.removeprefix("eval_") not in measured:
        raise InputError(
            f"metric_for_best_model is {args.metric_for_best_model!r}, and evaluation measures {', '.join(measured)}."
        )


def check_temperature(losses: Collection[str], config: RankerConfig) -> None:
    """Refuse InfoNCE over cosines without a temperature.

    Cosines differ by 2 at most: with 32 documents the loss of a perfect student would still be 1.6.
    """
    is_cosine = config.vectors_per_text == "one" and config.to_dict().get("normalize", False)
    for name in losses:
        if is_cosine and name.removeprefix(IN_BATCH) == "info_nce":
            raise InputError(
                f"{name} takes a softmax of the student's scores, which are cosines (normalize=True) and differ too "
                f"little for it; give a temperature, {name}(temperature=0.05)."
            )


def check_data_sets(
    training: TeacherRows | None,
    held_out: Mapping[str, TeacherRows],
    evaluator: RerankingEvaluator | None,
    queries: TextStore,
    documents: TextStore,
    args: RankingTrainingArguments,
    losses: Collection[str],
) -> None:
    """Check all rows of a run and what the losses read of them; warn if held-out queries are training queries.

    `held_out` and `losses` are those of `check_evaluation`.
    """
    places = {}
    for name, rows in held_out.items():
        summary = check_rows(rows, queries, documents, show_progress=not args.disable_tqdm)
        places[f"eval_dataset {name}".strip()] = np.flatnonzero(summary.is_query_used)
    if training is None:
        return
    summary = check_rows(training, queries, documents, show_progress=not args.disable_tqdm)
    _check_losses(training, summary, args, losses)
    if isinstance(evaluator, RerankingEvaluator):
        places["evaluator"] = queries.rows_of(list(evaluator.candidates))
    for name, rows in places.items():
        shared = int(summary.is_query_used[rows[rows >= 0]].sum())
        if shared:
            warnings.warn(
                f"{shared:,} of the {len(rows):,} queries of the {name} are training queries too, so its figures "
                "will flatter the student; hold them out of training.",
                stacklevel=3,
            )


def _check_losses(
    rows: TeacherRows, summary: RowSummary, args: RankingTrainingArguments, losses: Collection[str]
) -> None:
    check_data(losses, summary.longest, rows.has_only_margins)
    reading, reading_scores = [], []
    for name in losses:
        if name.startswith(IN_BATCH):
            continue
        loss = get_loss(name)
        if loss.needs_teacher:
            reading.append(name)
            if not (loss.needs_grades or loss.needs_order):
                reading_scores.append(name)
    if reading and not summary.has_margins:
        raise InputError(
            f"All teacher margins are 0: in each of the {len(rows):,} rows, the first of them {rows.row_name(0)}, all "
            f"scores are equal, so that {reading[0]} learns nothing; check the teacher, or train with ranknet."
        )
    bound = max(abs(summary.lowest), abs(summary.highest))
    if args.teacher_factor() == 1 and bound <= 1 and not rows.has_only_margins and reading_scores:
        kind, margin = ("sigmoid outputs", 1) if summary.lowest >= 0 else ("cosines", 2)
        warnings.warn(
            f"All teacher scores lie in [{summary.lowest:g}, {summary.highest:g}] and look like {kind}, with margins "
            f"of at most {margin}; give raw logits (`teacher score` writes them), or teacher_scale match.",
            stacklevel=4,
        )


def endless(
    stream: datasets.IterableDataset, args: RankingTrainingArguments, query_clusters: np.ndarray | None
) -> datasets.IterableDataset:
    """Return a stream that begins again where it ends: one epoch for Trainer, which resumes only within an epoch."""
    columns = next(iter(stream), {}).keys()
    if not columns >= set(LIST_COLUMNS):
        found = ", ".join(columns) or "none"
        raise InputError(
            f"The first row of the stream needs the columns {', '.join(LIST_COLUMNS)}, got {found}; "
            "load_teacher_scores reads other layouts, from a file or a datasets.Dataset."
        )
    if query_clusters is not None:
        raise InputError("Batches on one topic need all rows at once, got a stream; leave query_clusters out.")
    args.accelerator_config.dispatch_batches = False  # one process that reads for all joins batches of unlike lengths
    return stream.repeat(None)


@dataclass
class _Fault:
    first: int = 0
    rows: int = 0
    ids: list = field(default_factory=list)  # up to three

    def add(self, bad_rows: np.ndarray, ids: pa.Array) -> None:
        """Count bad rows, given in ascending order, and keep the first of their ids."""
        if self.rows == 0 and len(bad_rows):
            self.first = int(bad_rows[0])
        self.rows += len(np.unique(bad_rows))
        if len(self.ids) < 3:
            self.ids = list(dict.fromkeys(self.ids + ids.unique()[:3].to_pylist()))[:3]


def check_rows(
    rows: TeacherRows,
    queries: TextStore,
    documents: TextStore,
    batch_size: int = 1_000_000,
    show_progress: bool = False,
) -> RowSummary:
    """Look at every row once, about `batch_size` documents at a time.

    Raises:
        UnknownIdError: for queries or documents without a text, with file and line of the first and how many rows.
        InputError: with file and line, for a document that appears twice in a row; for rows without scores, and for
            an empty selection.
    """
    rows.check_scores()
    if len(rows) == 0:
        raise InputError("There are no teacher rows to train or evaluate on, got 0.")
    summary = RowSummary(np.zeros(len(queries), dtype=bool))
    no_query, no_document, repeated = _Fault(), _Fault(), _Fault()
    step = max(1, batch_size // len(rows[0]["doc_ids"]))
    total, hidden = math.ceil(len(rows) / step), not show_progress
    for start, batch in tqdm(rows.batches(size=step), "Checking teacher rows", total, delay=3, disable=hidden):
        lengths = pc.list_value_length(batch["doc_ids"]).to_numpy()
        row_numbers = np.repeat(np.arange(start, start + len(lengths)), lengths)  # of each document
        doc_ids, scores = batch["doc_ids"].flatten(), batch["teacher_scores"].flatten().to_numpy()
        places, is_missing = _look_up(queries, batch["query_id"])
        summary.is_query_used[places[places >= 0]] = True
        no_query.add(start + np.flatnonzero(is_missing), batch["query_id"].filter(pa.array(is_missing)))
        _, is_missing = _look_up(documents, doc_ids)
        no_document.add(row_numbers[is_missing], doc_ids.filter(pa.array(is_missing)))
        repeated.add(_rows_with_repeated(doc_ids, row_numbers), doc_ids[:0])
        summary.lowest = min(summary.lowest, float(scores.min()))
        summary.highest = max(summary.highest, float(scores.max()))
        first_scores = scores[np.cumsum(lengths) - lengths]
        summary.has_margins |= bool((scores != np.repeat(first_scores, lengths)).any())
        summary.longest = max(summary.longest, int(lengths.max()))
    messages = []
    for name, fault, store in (("query_id", no_query, queries), ("doc_id", no_document, documents)):
        if fault.rows:
            ids = ", ".join(repr(str(i)) for i in fault.ids)
            messages.append(
                f"{rows.row_name(fault.first)}: {name} {str(fault.ids[0])!r} is not among the {len(store):,} texts of "
                f"{store.source} ({fault.rows:,} of {len(rows):,} rows have such ids: {ids})"
            )
    if messages:
        raise UnknownIdError(f"{'; '.join(messages)}; do scores and texts belong to one release?")
    if repeated.rows:
        doc_ids = rows[repeated.first]["doc_ids"]
        raise InputError(
            f"{rows.row_name(repeated.first)}: document {max(doc_ids, key=doc_ids.count)!r} appears twice in the row "
            f"({repeated.rows:,} of {len(rows):,} rows have such), and has no margin over itself; drop these rows."
        )
    return summary


def _look_up(store: TextStore, ids: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of all distinct ids, -1 where one has no text; and for every id whether it has none."""
    distinct = ids.unique()
    if pa.types.is_integer(ids.type):
        distinct = pa.array(np.sort(distinct))  # the look-up then walks through the index: ten times as fast
    places = store.rows_of_array(distinct)
    missing = distinct.filter(pa.array(places < 0))
    return places, pc.is_in(ids, missing).to_numpy(zero_copy_only=False)


def _rows_with_repeated(doc_ids: pa.Array, row_numbers: np.ndarray) -> np.ndarray:
    """Return the numbers of the rows in which a document appears twice, ascending."""
    codes = doc_ids.dictionary_encode().indices.to_numpy().astype(np.int64)
    keys = np.sort(row_numbers << 32 | codes)
    return keys[1:][keys[1:] == keys[:-1]] >> 32
