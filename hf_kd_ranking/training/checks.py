"""What is looked at before training starts, so that bad input is one line now and not a wrong ranker later."""

import warnings
from dataclasses import dataclass, field

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from ..data.rows import LIST_COLUMNS, TEACHER_COLUMNS, arrow_batches, has_only_margins, row_name
from ..data.texts import TextStore
from ..evaluation.rerank import RerankingEvaluator
from ..losses import IGNORE_TEACHER, IN_BATCH, READ_GRADES, get_losses
from .arguments import RankingTrainingArguments


def check_data_sets(
    train_dataset: datasets.Dataset | datasets.IterableDataset | None,
    eval_dataset: datasets.Dataset | None,
    evaluator: RerankingEvaluator | None,
    queries: TextStore,
    documents: TextStore,
    args: RankingTrainingArguments,
) -> None:
    """Check all rows that a run is given and what the teacher's scores are; warn where held-out queries are not.

    A stream is not read ahead: its ids are looked up batch by batch, in training.

    Raises:
        KeyError, ValueError: as `check_rows`; and where no row has a margin, for a loss that reads the teacher.
    """
    facts = {
        name: check_rows(rows, queries, documents, show_progress=not args.disable_tqdm)
        for name, rows in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset))
        if isinstance(rows, datasets.Dataset)
    }
    training = facts.pop("train_dataset", None)
    if training is None:
        return
    _check_scores(train_dataset, training, args)
    held_out = {name: np.flatnonzero(found.is_query_used) for name, found in facts.items()}
    if isinstance(evaluator, RerankingEvaluator):
        held_out["evaluator"] = queries.rows_of(list(evaluator.candidates))
    for name, places in held_out.items():
        if shared := int(training.is_query_used[places[places >= 0]].sum()):
            warnings.warn(
                f"{shared:,} of the {len(places):,} queries of the {name} are training queries too, so its figures "
                "will flatter the student; hold them out of training.",
                stacklevel=3,
            )


def _check_scores(rows: datasets.Dataset, facts: "RowFacts", args: RankingTrainingArguments) -> None:
    losses = [name for name in get_losses(args.loss) if name not in IGNORE_TEACHER and not name.startswith(IN_BATCH)]
    if losses and not facts.has_margins:
        raise ValueError(
            f"All teacher margins are 0: in each of the {len(rows):,} rows from {row_name(rows, 0)} on, all documents "
            f"have one score, of which {losses[0]} learns nothing; check the teacher, or train with ranknet."
        )
    bound = max(abs(facts.lowest), abs(facts.highest))
    if args.teacher_factor() == 1 and bound <= 1 and not has_only_margins(rows) and set(losses) - READ_GRADES:
        kind, margin = ("sigmoid outputs", 1) if facts.lowest >= 0 else ("cosines", 2)
        warnings.warn(
            f"All teacher scores lie in [{facts.lowest:g}, {facts.highest:g}] and look like {kind}, with margins of "
            f"at most {margin}; give raw logits (`teacher score` writes them), or teacher_scale match.",
            stacklevel=4,
        )


def endless(stream: datasets.IterableDataset, args: RankingTrainingArguments) -> datasets.IterableDataset:
    """A stream that begins again where it ends: one epoch for Trainer, so that a resumed run finds its place in it.

    Raises:
        ValueError: if its rows lack columns, or the settings need rows that can be read twice.
    """
    columns = set(next(iter(stream), {}))
    if not any(columns >= set(wanted) for wanted in (TEACHER_COLUMNS, LIST_COLUMNS)):
        raise ValueError(
            f"The stream's first row has the columns {', '.join(columns) or 'of no row'}; teacher rows need "
            f"{', '.join(TEACHER_COLUMNS)} or {', '.join(LIST_COLUMNS)}."
        )
    if args.teacher_factor() is None:
        raise ValueError("teacher_scale 'match' needs rows that can be read twice, got a stream; give a number.")
    args.accelerator_config.dispatch_batches = False  # one process's reading for all joins batches of unlike lengths
    return stream.repeat(None)


@dataclass
class RowFacts:
    """What `check_rows` saw: which queries of their store are used, (len(queries),) bool, and the scores' range."""

    is_query_used: np.ndarray
    lowest: float = np.inf
    highest: float = -np.inf
    has_margins: bool = False

    def add(self, scores: np.ndarray) -> None:
        """Count (N, n) scores."""
        self.lowest, self.highest = min(self.lowest, float(scores.min())), max(self.highest, float(scores.max()))
        self.has_margins = self.has_margins or bool((scores != scores[:, :1]).any())


@dataclass
class _Fault:
    """The rows with one fault: the first of them, how many there are, up to three of the ids at fault."""

    first: int = 0
    rows: int = 0
    ids: list = field(default_factory=list)

    def add(self, start: int, is_bad: np.ndarray, ids: pa.Array | None = None, width: int = 1) -> None:
        """Count the rows from `start` on, by marks of their values, `width` a row."""
        bad_rows = np.flatnonzero(is_bad.reshape(-1, width).any(1))
        if not len(bad_rows):
            return
        self.first = self.first if self.rows else start + int(bad_rows[0])
        self.rows += len(bad_rows)
        if ids is not None and len(self.ids) < 3:
            met = ids.filter(pa.array(is_bad)).unique()[:3].to_pylist()
            self.ids = list(dict.fromkeys(self.ids + met))[:3]


def check_rows(
    rows: datasets.Dataset,
    queries: TextStore,
    documents: TextStore,
    batch_size: int = 1_000_000,
    show_progress: bool = False,
) -> RowFacts:
    """Look at every row once, a batch at a time.

    Raises:
        KeyError: for ids without a text; per column file and line of the first, its id, and how many rows have such.
        ValueError: with file and line, for a document that stands twice in a row, a score that is not finite, lists
            of several lengths, a missing value; for no rows.
    """
    if len(rows) == 0:
        raise ValueError("The data set holds no teacher rows; at least one is needed.")
    names = LIST_COLUMNS if "doc_ids" in rows.column_names else TEACHER_COLUMNS
    width = len(rows[0]["doc_ids"]) if names is LIST_COLUMNS else 1
    stores = {name: queries if name == "query_id" else documents for name in names if "id" in name}
    missing, repeated = {name: _Fault() for name in stores}, _Fault()
    facts = RowFacts(np.zeros(len(queries), dtype=bool))
    step = max(1, batch_size // width)
    bar = {"desc": "Checking teacher rows", "unit": "batch", "delay": 3, "disable": not show_progress}
    for start, batch in tqdm(arrow_batches(rows, names, step), total=-(-len(rows) // step), **bar):
        columns = {name: _values(rows, start, name, column, width) for name, column in batch.items()}
        for name, store in stores.items():
            places, is_missing = _look_up(store, columns[name])
            missing[name].add(start, is_missing, columns[name], width if name == "doc_ids" else 1)
            if store is queries:
                facts.is_query_used[places[places >= 0]] = True
        repeated.add(start, _has_repeated(columns, width))
        facts.add(_scores(rows, start, columns, width))
    _raise_missing(rows, stores, missing)
    if repeated.rows:
        row = rows[repeated.first]
        ids = row.get("doc_ids") or [row["pos_id"], row["neg_id"]]
        raise ValueError(
            f"{row_name(rows, repeated.first)}: document {max(ids, key=ids.count)!r} stands twice in the row "
            f"({repeated.rows:,} of {len(rows):,} rows have such), and has no margin over itself; drop these rows."
        )
    return facts


def _values(rows: datasets.Dataset, start: int, name: str, column: pa.Array, width: int) -> pa.Array:
    """A column's values without its lists, none missing: one a row, or `width` where it holds lists."""
    is_scalar = not pa.types.is_nested(column.type)
    values = column if is_scalar else column.flatten()
    lengths = column.is_valid().cast(pa.int32()) if is_scalar else pc.list_value_length(column).fill_null(0)
    wanted = 1 if is_scalar else width
    bad = pc.not_equal(lengths, wanted).index(True).as_py()
    if bad < 0 and values.null_count:
        bad = values.is_null().index(True).as_py() // wanted
    if bad >= 0:
        raise ValueError(
            f"{row_name(rows, start + bad)}: {name} must be {wanted} values as in the first row, got {column[bad]}; "
            "drop the odd rows, or cut all lists to one length."
        )
    return values


def _look_up(store: TextStore, ids: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The places of all distinct ids, -1 where one has no text; and for every id whether it has none."""
    if pa.types.is_integer(ids.type):
        distinct = np.sort(ids)  # the look-up then walks through the index: ten times as fast as in random order
        places = store.rows_of(distinct)
        gone = pa.array(distinct[places < 0], ids.type)
    else:
        distinct = ids.unique()
        places = store.rows_of_strings(distinct)
        gone = distinct.filter(pa.array(places < 0))
    return places, pc.is_in(ids, gone).to_numpy(zero_copy_only=False)


def _has_repeated(columns: dict[str, pa.Array], width: int) -> np.ndarray:
    """For every row whether a document stands in it twice."""
    if "doc_ids" not in columns:
        return pc.equal(columns["pos_id"], columns["neg_id"]).to_numpy(zero_copy_only=False)
    ids = columns["doc_ids"]
    codes = ids if pa.types.is_integer(ids.type) else ids.dictionary_encode().indices
    codes = np.sort(codes.to_numpy().reshape(-1, width), axis=1)
    return (codes[:, 1:] == codes[:, :-1]).any(1)


def _scores(rows: datasets.Dataset, start: int, columns: dict[str, pa.Array], width: int) -> np.ndarray:
    """(N, n) teacher scores."""
    if "teacher_scores" in columns:
        scores = columns["teacher_scores"].to_numpy().reshape(-1, width)
    else:
        scores = np.stack([columns["pos_score"], columns["neg_score"]], axis=1)
    if len(bad := np.flatnonzero(~np.isfinite(scores).all(1))):
        raise ValueError(
            f"{row_name(rows, start + int(bad[0]))}: teacher scores must be finite, got {scores[bad[0]].tolist()}."
        )
    return scores


def _raise_missing(rows: datasets.Dataset, stores: dict[str, TextStore], missing: dict[str, _Fault]) -> None:
    faults = [
        f"{row_name(rows, fault.first)}: {name} {str(fault.ids[0])!r} is not among the {len(stores[name]):,} texts of "
        f"{stores[name].source} ({fault.rows:,} of {len(rows):,} rows have such ids: "
        f"{', '.join(repr(str(i)) for i in fault.ids)})"
        for name, fault in missing.items()
        if fault.rows
    ]
    if faults:
        raise KeyError(f"{'; '.join(faults)}; do scores and texts belong to one release?")
