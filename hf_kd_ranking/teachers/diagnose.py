"""Look into teacher files before training on them: margins, agreement, and negatives that look like positives.

A row is (query, positive, negative) with a signed margin, the positive's score minus the negative's; a list of n
documents counts as n - 1 rows, its first document against each other. Memory stays bounded: the scores of one file
are held at a time; the rows of all files are dealt by query into buckets on disk, and those are compared in turn.
"""

import base64
import html
import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import nlargest, nsmallest
from itertools import combinations, pairwise
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from tqdm.auto import tqdm

from ..artifacts import existing_file, refuse_existing, writing
from ..data.collate import teacher_scores_of
from ..data.rows import LIST_COLUMNS, TEACHER_COLUMNS, has_only_margins, load_teacher_scores
from ..data.texts import TextStore
from .ensemble import numbered

PERCENTS, BINS = (1, 5, 25, 50, 75, 95, 99), 40
SPEARMAN_ROWS = 1_000_000  # about so many of two files' shared rows give the Spearman correlation; or all
ROWS_AT_ONCE = 1 << 19  # of a file that is read
ROWS_PER_BUCKET = 1 << 18  # of all files
# What a bucket stores of a row: its ids (or their hashes), its place in the file, its margin.
ENTRY = np.dtype([("query", "i8"), ("pos", "i8"), ("neg", "i8"), ("place", "i8"), ("margin", "f4")])
STYLE = "<style>body{font:15px sans-serif}td{border-bottom:1px solid #ccc;padding:.2em .8em}</style>"


def diagnose_teachers(
    files: Sequence[str | os.PathLike] | str | os.PathLike,
    queries: TextStore | None = None,
    documents: TextStore | None = None,
    examples: int = 10,
) -> dict:
    """Report what each teacher file holds, where the files disagree, and which negatives may be positives.

    Args:
        files: of what `load_teacher_scores` reads; meanwhile 36 bytes a row go to the disk of the `datasets` cache.
        queries: query_id -> text, to show texts.
        documents: doc_id -> text, to show texts.
        examples: rows, and queries for each two files, to show.

    Returns:
        What `json` takes: `files`, `comparisons` of each two (in the order of `itertools.combinations`) and
        `false_negatives`. Shares lie within [0, 1], ids are strings, None is a figure that is not defined, a text
        that a store lacks, or the scores of a file that holds only margins. Rows are matched by their three ids,
        whatever the order; of a file's repeated rows the last counts. For comparisons margins are standardised by
        their file's mean and deviation. For `false_negatives` they are divided by the deviation alone, so that the
        sign stays, and averaged over the files that hold the row: below 0, the teachers prefer the negative.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if there are no files; for what `load_teacher_scores` refuses; for lists of several lengths.
    """
    files = [files] if isinstance(files, (str, os.PathLike)) else files
    paths = [existing_file(path, "teacher scores") for path in files]
    if not paths or examples < 0:
        raise ValueError(f"Needed one teacher file or more and examples >= 0, got {len(paths)} and {examples}.")
    tables = [load_teacher_scores(path) for path in paths]
    id_columns = [ids for path, table in zip(paths, tables, strict=True) for ids in _columns(path, table, 0, 1)[0]]
    are_integers = all(pa.types.is_integer(ids.type) for ids in id_columns)
    buckets = 1 + sum(map(len, tables)) // ROWS_PER_BUCKET
    cache = Path(datasets.config.HF_DATASETS_CACHE)  # has room for files of this size; /tmp may be memory
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="diagnose.", dir=cache) as folder:
        teachers = [
            _read(path, table, Path(folder) / str(i), buckets, are_integers)
            for i, (path, table) in enumerate(zip(paths, tables, strict=True))
        ]
        return {
            "files": [teacher.facts | _distinct(teacher) for teacher in teachers],
            "comparisons": [_comparison(pair, queries, examples) for pair in combinations(teachers, 2)],
            "false_negatives": _false_negatives(teachers, queries, documents, examples),
        }


# ---- One file -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Teacher:
    """A file: figures, rows, and their entries (rows,) on disk, where `starts` (batches, buckets + 1) cuts them."""

    facts: dict
    table: datasets.Dataset
    entries: np.ndarray
    starts: np.ndarray

    def buckets(self) -> Iterator[np.ndarray]:
        """Entries of each bucket, in the order of the file."""
        for begins, ends in pairwise(self.starts.T):
            yield np.concatenate([self.entries[begin:end] for begin, end in zip(begins, ends, strict=True)])

    def row(self, place: int) -> tuple[list[str], list[float]]:
        """Ids of query, positive and negative; scores of the two."""
        row, column = divmod(place, len(self.entries) // len(self.table))
        row = self.table[row]
        doc_ids, scores = row.get("doc_ids") or [row["pos_id"], row["neg_id"]], teacher_scores_of(row)
        return [str(i) for i in (row["query_id"], doc_ids[0], doc_ids[column + 1])], [scores[0], scores[column + 1]]

    def scaled(self, margins: np.ndarray, mean: float) -> np.ndarray:
        """Margins less a mean, in the file's standard deviations."""
        return (margins - mean) / (self.facts["margins"]["std"] or 1.0)


def _read(path: Path, table: datasets.Dataset, file: Path, buckets: int, are_integers: bool) -> _Teacher:
    """Read a file once, for its figures and into buckets."""
    n = len(_columns(path, table, 0, 1)[1])
    scores = np.empty((len(table), n), dtype=np.float32)
    starts, same_ids, step = [], 0, ROWS_AT_ONCE // n
    with file.open("wb") as output:
        for first in tqdm(range(0, len(table), step), desc=f"Reading {path}", unit="batch"):
            ids, columns = _columns(path, table, first, step)
            queries, *documents = (_keys(column, are_integers) for column in ids)
            batch = scores[first : first + step] = np.stack(columns, 1).astype(np.float32)
            entries = np.empty((len(batch), n - 1), dtype=ENTRY)
            entries["query"], entries["pos"] = queries[:, None], documents[0][:, None]
            entries["neg"], entries["margin"] = np.stack(documents[1:], 1), batch[:, :1] - batch[:, 1:]
            entries = entries.ravel()
            entries["place"] = np.arange(len(entries)) + first * (n - 1)
            # times 2^64 / the golden ratio: neighbouring ids go to different buckets
            hashes = entries["query"].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            bucket = ((hashes >> np.uint64(40)) % np.uint64(buckets)).astype(np.int64)
            entries[np.argsort(bucket, kind="stable")].tofile(output)
            starts.append(first * (n - 1) + np.cumsum([0, *np.bincount(bucket, minlength=buckets)]))
            same_ids += int((entries["pos"] == entries["neg"]).sum())
    margins = (scores[:, :1] - scores[:, 1:]).ravel()
    facts = {"file": str(path), "rows": len(margins), "same_ids": same_ids}
    facts["scores"] = None if has_only_margins(table) else _distribution(scores.ravel())
    quantiles = np.quantile(margins, np.array(PERCENTS) / 100).tolist()
    facts["margins"] = _distribution(margins) | {
        "negative": float((margins < 0).mean()),
        "zero": float((margins == 0).mean()),
        "quantiles": {f"{percent}%": value for percent, value in zip(PERCENTS, quantiles, strict=True)},
    }
    facts["warnings"] = list(_warnings(facts))
    return _Teacher(facts, table, np.memmap(file, dtype=ENTRY, mode="r"), np.stack(starts))


def _columns(path: Path, table: datasets.Dataset, first: int, count: int) -> tuple[list[pa.Array], list[pa.Array]]:
    """Ids of queries and of their documents, and the documents' scores; the positive's first."""
    batch = table.with_format("arrow")[first : first + count]
    if "doc_ids" not in batch.column_names:
        columns = [batch[name].combine_chunks() for name in TEACHER_COLUMNS]
        return columns[2:], columns[:2]
    queries, *lists = (batch[name].combine_chunks() for name in LIST_COLUMNS)
    n = len(table[0]["doc_ids"])
    if any(pc.any(pc.not_equal(pc.list_value_length(column), n)).as_py() for column in lists):
        raise ValueError(f"{path}: all lists need one length; the first has {n} documents, others differ. Cut them.")
    doc_ids, scores = ([pc.list_element(column, i) for i in range(n)] for column in lists)
    return [queries, *doc_ids], scores


def _keys(ids: pa.Array, are_integers: bool) -> np.ndarray:
    """64 bits for each id: two of 10 million strings share theirs with a probability of 3e-6."""
    if are_integers:
        return ids.cast(pa.int64()).to_numpy()
    coded = ids.cast(pa.string()).dictionary_encode()
    hashes = np.array(
        [xxhash.xxh3_64_intdigest(text.encode()) for text in coded.dictionary.to_pylist()], dtype=np.uint64
    )
    return hashes.view(np.int64)[coded.indices.to_numpy()]


def _distribution(values: np.ndarray) -> dict:
    low, high, mean = float(values.min()), float(values.max()), float(values.mean(dtype=np.float64))
    pad = 0.0 if low < high else max(0.5, abs(low) / 100)
    edges = np.linspace(low - pad, high + pad, BINS + 1)
    squares, counts = 0.0, np.zeros(BINS, dtype=np.int64)
    for first in range(0, len(values), ROWS_AT_ONCE):  # so that no copy in float64 is made of all
        part = values[first : first + ROWS_AT_ONCE].astype(np.float64)
        squares += float(((part - mean) ** 2).sum())
        counts += np.histogram(part, BINS, (edges[0], edges[-1]))[0]
    histogram = {"edges": edges.tolist(), "counts": counts.tolist()}
    return {"min": low, "max": high, "mean": mean, "std": (squares / len(values)) ** 0.5, "histogram": histogram}


def _warnings(facts: dict) -> Iterator[str]:
    scores, margins = facts["scores"], facts["margins"]
    if scores is None:
        yield "The file holds only margins, so losses on single scores cannot use it; take one on margins."
    elif scores["min"] == scores["max"]:
        yield f"All scores are {scores['min']:g}: nothing can be learned. Check the teacher, and score again."
    elif scores["min"] >= 0 and scores["max"] <= 1:
        yield (
            "All scores lie within [0, 1], as a sigmoid squashes them: Margin-MSE would learn tiny margins. "
            "Score again with raw logits."
        )
    if margins["zero"] == 1:
        yield "All margins are zero: a student would learn to score all alike. Check what was scored, and score again."
    elif margins["negative"] > 0.5:
        yield "Most margins are negative: the teacher prefers the negatives. Is the positive's score the first?"
    if facts["same_ids"]:
        yield f"{facts['same_ids']:,} rows name one document as positive and negative and teach nothing. Drop them."


# ---- Rows of all files ----------------------------------------------------------------------------------------------


def _distinct(teacher: _Teacher) -> dict[str, int]:
    queries = pairs = rows = 0
    for entries in teacher.buckets():
        query, positive, negative = (entries[name] for name in ("query", "pos", "neg"))
        queries += len(np.unique(query))
        pairs += _count(np.tile(query, 2), np.concatenate([positive, negative]))
        rows += _count(query, positive, negative)
    return {"queries": queries, "pairs": pairs, "duplicate_rows": teacher.facts["rows"] - rows}


def _count(*columns: np.ndarray) -> int:
    return int(numbered(*columns).max(initial=-1)) + 1


def _matched(teachers: Sequence[_Teacher]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """By bucket: keys of the queries (rows,), margins and places (files, rows), NaN and -1 where a file lacks one."""
    buckets = zip(*(teacher.buckets() for teacher in teachers), strict=True)
    for entries in tqdm(buckets, total=teachers[0].starts.shape[1] - 1, desc="Comparing", unit="bucket"):
        together = np.concatenate(entries)
        rows = numbered(together["query"], together["pos"], together["neg"])
        _, first = np.unique(rows, return_index=True)
        margins, places = np.full((len(teachers), len(first)), np.nan), np.full((len(teachers), len(first)), -1)
        for i, mine in enumerate(np.split(rows, np.cumsum([len(of) for of in entries])[:-1])):
            # of several entries for one row numpy keeps the last
            margins[i, mine], places[i, mine] = entries[i]["margin"], entries[i]["place"]
        yield together["query"][first], margins, places


def _comparison(teachers: Sequence[_Teacher], queries: TextStore | None, examples: int) -> dict:
    """Correlations of two files' margins, and the queries on which they disagree most."""
    rows, agreeing, sums = 0, 0, np.zeros(5)
    worst: list[tuple[float, int, int]] = []  # disagreement, rows, a place in the first file
    sample, random = [], np.random.default_rng(0)
    share = SPEARMAN_ROWS / min(len(teacher.entries) for teacher in teachers)
    for query_keys, margins, places in _matched(teachers):
        is_shared = (places >= 0).all(0)
        margins, places = margins[:, is_shared], places[0, is_shared]
        rows, agreeing = rows + len(places), agreeing + int((np.sign(margins[0]) == np.sign(margins[1])).sum())
        sample.append(margins[:, random.random(len(places)) < share].astype(np.float32))
        a, b = (t.scaled(of, t.facts["margins"]["mean"]) for t, of in zip(teachers, margins, strict=True))
        sums += [a.sum(), b.sum(), a @ a, b @ b, a @ b]
        _, first, number, counts = np.unique(query_keys[is_shared], True, True, True)
        means = np.bincount(number, np.abs(a - b)) / counts
        top = np.argsort(-means, kind="stable")[:examples]
        found = zip(means[top].tolist(), counts[top].tolist(), places[first[top]].tolist(), strict=True)
        worst = nlargest(examples, [*worst, *found])
    shown = [{"query_id": teachers[0].row(place)[0][0], "rows": n, "disagreement": by} for by, n, place in worst]
    return {
        "files": [teacher.facts["file"] for teacher in teachers],
        "shared_rows": rows,
        "agreement": agreeing / rows if rows else None,
        "pearson": _pearson(sums / max(rows, 1)),
        **_spearman(np.concatenate(sample, 1)),
        "queries": [example | _texts(query=(queries, example["query_id"])) for example in shown],
    }


def _pearson(means: np.ndarray) -> float | None:
    """From the means of a, b, a * a, b * b, a * b."""
    a, b, *squares, product = means
    variances = squares - np.array([a, b]) ** 2
    if (variances <= 1e-12 * np.array(squares)).any():  # constant but for rounding
        return None
    return float(np.clip((product - a * b) / variances.prod() ** 0.5, -1, 1))


def _spearman(sample: np.ndarray) -> dict:
    from scipy.stats import spearmanr  # 0.6 s, and only needed here

    is_defined = sample.shape[1] > 0 and (sample.min(1) < sample.max(1)).all()
    value = float(spearmanr(*sample).statistic) if is_defined else None
    return {"spearman": value, "spearman_rows": sample.shape[1]}


def _false_negatives(
    teachers: Sequence[_Teacher], queries: TextStore | None, documents: TextStore | None, examples: int
) -> dict:
    """The rows on which the teachers prefer the negative most."""
    rows = count = 0
    worst: list[tuple[float, list[int]]] = []  # mean margin, the row's place in each file
    for _, margins, places in _matched(teachers):
        means = np.nanmean([t.scaled(of, 0.0) for t, of in zip(teachers, margins, strict=True)], 0)
        rows, negative = rows + len(means), int((means < 0).sum())
        count += negative
        top = np.argsort(means, kind="stable")[: min(examples, negative)]
        worst = nsmallest(examples, [*worst, *zip(means[top].tolist(), places[:, top].T.tolist(), strict=True)])
    shown = []
    for margin, places in worst:
        found = [None if place < 0 else t.row(place) for t, place in zip(teachers, places, strict=True)]
        query, positive, negative = next(of for of in found if of is not None)[0]
        example = {"query_id": query, "pos_id": positive, "neg_id": negative, "margin": margin}
        example["scores"] = [of and of[1] for of in found]
        texts = {"query": (queries, query), "positive": (documents, positive), "negative": (documents, negative)}
        shown.append(example | _texts(**texts))
    return {"rows": rows, "count": count, "share": count / rows, "examples": shown}


def _texts(**wanted: tuple[TextStore | None, str]) -> dict[str, str | None]:
    """Texts of ids from those stores that are given; None for an id that its store lacks."""
    known = {name: pair for name, pair in wanted.items() if pair[0] is not None}
    return dict.fromkeys(known) | {name: store[id_] for name, (store, id_) in known.items() if id_ in store}


# ---- For people -----------------------------------------------------------------------------------------------------


def diagnosis_text(report: dict) -> str:
    """Render what `diagnose_teachers` returns as tables; cells are cut at 60 characters."""
    lines = []
    for title, notes, table in _sections(report):
        cells = [[" ".join(cell.split())[:60] for cell in row] for row in table]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines += [title, *notes, *("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells), ""]
    return "\n".join(lines)


def diagnosis_html(report: dict, path: str | os.PathLike) -> None:
    """Write what `diagnose_teachers` returns as a page that loads nothing; its histograms need matplotlib.

    Raises:
        FileNotFoundError: if the folder of the path does not exist.
    """
    refuse_existing(path, overwrite=True)
    parts = ['<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Teacher scores</title>', STYLE]
    for title, notes, table in _sections(report):
        parts += [f"<h2>{title}</h2>", *(f"<p>{html.escape(note)}</p>" for note in notes), "<table>"]
        parts += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table]
        parts += ["</table>"]
    with writing(path) as file:
        file.write("\n".join([*parts, "<h2>Histograms</h2>", _histograms(report["files"]), "</html>\n"]))


def _sections(report: dict) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Titles, sentences, and tables whose first row names the columns."""
    files, found = dict(enumerate(report["files"], 1)), report["false_negatives"]
    notes = [f"{i}: {facts['file']}" for i, facts in files.items()]
    notes += [f"Warning, file {i}: {warning}" for i, facts in files.items() for warning in facts["warnings"]]
    figures = [_figures(facts) for facts in files.values()]
    yield "Files", notes, [["", *map(str, files)], *([name, *(of[name] for of in figures)] for name in figures[0])]
    pairs = {f"{a} and {b}": of for (a, b), of in zip(combinations(files, 2), report["comparisons"], strict=True)}
    if pairs:
        keys = ("shared_rows", "pearson", "spearman", "spearman_rows", "agreement")
        table = [["files", *keys], *([name, *(_shown(of[key]) for key in keys)] for name, of in pairs.items())]
        yield "Margins of two files; agreement is the share of rows with the same sign", [], table
    for name, of in pairs.items():
        yield f"Queries on which {name} disagree most", [], _table(of["queries"])
    note = (
        f"In {found['count']:,} of {found['rows']:,} rows ({found['share']:.2%}) the negative scores above the "
        "positive, averaged over the files. It may be relevant but not judged: look at it, and drop such rows."
    )
    yield "Suspected false negatives", [note], _table(found["examples"])


def _figures(facts: dict) -> dict[str, str]:
    figures = {name: _shown(facts[name]) for name in ("rows", "queries", "pairs", "duplicate_rows", "same_ids")}
    moments = [(kind, name) for kind in ("scores", "margins") for name in ("min", "max", "mean", "std")]
    figures |= {f"{kind} {name}": _shown(facts[kind] and facts[kind][name]) for kind, name in moments}
    figures |= {f"margins {name}": _shown(value) for name, value in facts["margins"]["quantiles"].items()}
    return figures | {f"{name} margins": f"{facts['margins'][name]:.2%}" for name in ("negative", "zero")}


def _table(examples: list[dict]) -> list[list[str]]:
    return [list(examples[0]), *([_shown(value) for value in row.values()] for row in examples)] if examples else []


def _shown(value: str | float | list | None) -> str:
    if isinstance(value, list):  # of a positive's and a negative's score for each file
        return " | ".join("-" if pair is None else " / ".join(map(_shown, pair)) for pair in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else value


def _histograms(files: list[dict]) -> str:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "<p>matplotlib is missing; install it (extra [report]) to see them.</p>"
    figure = Figure(figsize=(10, 2.5 * len(files)), layout="constrained")
    for i, (facts, axes) in enumerate(zip(files, figure.subplots(len(files), 2, squeeze=False), strict=True), 1):
        for kind, axis in zip(("scores", "margins"), axes, strict=True):
            histogram = facts[kind]["histogram"] if facts[kind] else {"counts": [0], "edges": [0, 1]}
            axis.stairs(histogram["counts"], histogram["edges"], fill=True)
            axis.set_title(f"{kind} of file {i}")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return f'<img alt="Histograms" src="data:image/png;base64,{base64.b64encode(image.getvalue()).decode()}">'
