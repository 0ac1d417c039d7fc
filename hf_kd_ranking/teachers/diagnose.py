"""Inspect teacher files before training on them: margins, agreement, and negatives that look like positives.

A row is (query, positive, negative) with a signed margin, the positive's score minus the negative's. A list of n
documents counts as n - 1 rows, its first document against each other one. Memory stays bounded: the scores of one
file are held at a time, and the rows of all files are matched in buckets on disk.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from ..artifacts import existing_file
from ..data.rows import TeacherRows, load_teacher_scores
from ..data.texts import TextStore
from ..errors import InputError
from .buckets import BucketFile, id_keys, matched_buckets, number_rows
from .orders import agreement, mean_agreement

QUANTILES = {"1%": 0.01, "5%": 0.05, "25%": 0.25, "50%": 0.5, "75%": 0.75, "95%": 0.95, "99%": 0.99}
SPEARMAN_ROWS = 1_000_000  # about so many of two files' shared rows give the Spearman correlation, or all
COMPARED_LISTS = 10_000  # of two files, whose orders are compared
ROWS_AT_ONCE = 1 << 18  # of a file that is read
MAX_DOCUMENTS = 1 << 20  # of a list; a place is its row times this, plus the position of the negative
# What a bucket stores of a row: keys of its ids, its place in the file, its margin.
ENTRY = np.dtype([("query", "i8"), ("positive", "i8"), ("negative", "i8"), ("place", "i8"), ("margin", "f4")])


def diagnose_teachers(
    files: Sequence[str | os.PathLike] | str | os.PathLike,
    queries: TextStore | None = None,
    documents: TextStore | None = None,
    examples: int = 10,
) -> dict:
    """Compute what each teacher file contains, where the files disagree, and which negatives may be positives.

    Args:
        files: files that `load_teacher_scores` reads; 36 bytes per row are written to the cache of `datasets` for the
            time of the call.
        queries: query_id -> text, to show texts.
        documents: doc_id -> text, to show texts.
        examples: number of rows to show, and of queries for each two files.

    Returns:
        A diagnosis that `json` accepts: `files`, `comparisons` of each two (in the order of `itertools.combinations`)
        and `false_negatives`. Shares are within [0, 1], ids are strings. None means that a figure is not defined,
        that a store lacks a text, or that a file has only margins and no scores. Rows are matched by their three ids
        whatever the order; the last one of repeated rows is used. For comparisons margins are standardized by their
        file's mean and deviation. For `false_negatives` they are only divided by the deviation, so that the sign
        stays, and averaged over the files that have the row: below 0, the teachers prefer the negative. Files of
        lists have the mean `kendall_tau` and share of `inversions` of a query's lists, others None.

    Raises:
        FileNotFoundError: if a file is missing.
        InputError: if no file is given; for rows without scores; for what `load_teacher_scores` refuses.

    Example:
        >>> diagnosis = kd.diagnose_teachers(["scores.tsv", "other.tsv"])
        >>> [file["rows"] for file in diagnosis["files"]]
        [40, 40]
    """
    if isinstance(files, (str, os.PathLike)):
        files = [files]
    paths = [existing_file(path, "teacher scores") for path in files]
    if not paths or examples < 0:
        raise InputError(f"Needed one teacher file or more and examples >= 0, got {len(paths)} and {examples}.")
    cache = Path(datasets.config.HF_DATASETS_CACHE)  # has room for files of this size; /tmp may be memory
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="diagnose.", dir=cache) as folder:
        teachers = []
        for i, path in enumerate(paths):
            rows = load_teacher_scores(path)
            rows.check_scores()
            teachers.append(_read_teacher(rows, BucketFile(Path(folder, f"{i}.bin"), ENTRY)))
        return {
            "files": [teacher.figures | _count_distinct(teacher) for teacher in teachers],
            "comparisons": [_compare(pair, queries, examples) for pair in combinations(teachers, 2)],
            "false_negatives": _find_false_negatives(teachers, queries, documents, examples),
        }


@dataclass(frozen=True)
class _Teacher:
    """A file: its rows, their entries in buckets, and its figures."""

    rows: TeacherRows
    buckets: BucketFile
    figures: dict

    def look_up(self, place: int) -> tuple[list[str], list[float]]:
        """Return the ids of query, positive and negative of a place, and the scores of the two."""
        number, position = divmod(place, MAX_DOCUMENTS)
        row = self.rows[number]
        ids = row["query_id"], row["doc_ids"][0], row["doc_ids"][position]
        return list(map(str, ids)), [row["teacher_scores"][0], row["teacher_scores"][position]]


def _read_teacher(rows: TeacherRows, buckets: BucketFile) -> _Teacher:
    """Read a file once, for its figures and into buckets."""
    scores, margins = [], []
    same_ids = 0
    with tqdm(total=len(rows), desc=f"Reading {rows.source}", unit="row", unit_scale=True) as progress:
        for start, columns in rows.batches(size=ROWS_AT_ONCE):
            entries = _entries(columns, start)
            buckets.add(entries, "query")
            same_ids += int((entries["positive"] == entries["negative"]).sum())
            scores.append(columns["teacher_scores"].flatten().to_numpy())
            margins.append(entries["margin"].copy())
            progress.update(len(columns["query_id"]))
    figures = {"file": rows.source, "rows": len(buckets), "same_ids": same_ids}
    figures["scores"] = None if rows.has_only_margins else _distribution(scores)
    del scores
    figures["margins"] = _distribution(margins)
    margins = np.concatenate(margins)
    quantiles = np.quantile(margins, list(QUANTILES.values())).tolist()
    figures["margins"] |= {
        "negative": float((margins < 0).mean()),
        "zero": float((margins == 0).mean()),
        "quantiles": dict(zip(QUANTILES, quantiles, strict=True)),
    }
    figures["warnings"] = list(_warnings(figures))
    return _Teacher(rows, buckets, figures)


def _entries(columns: dict[str, pa.Array], start: int) -> np.ndarray:
    """Return an entry for each negative of some lists, of which the first is row `start` of the file."""
    lengths = pc.list_value_length(columns["doc_ids"]).to_numpy()
    row = np.repeat(np.arange(len(lengths)), lengths)  # of each document
    first = (np.cumsum(lengths) - lengths)[row]  # its positive, among the documents of all
    place = np.arange(len(row))
    is_negative = place > first
    row, first, place = row[is_negative], first[is_negative], place[is_negative]
    documents = id_keys(columns["doc_ids"].flatten())
    scores = columns["teacher_scores"].flatten().to_numpy()
    entries = np.empty(len(row), dtype=ENTRY)
    entries["query"] = id_keys(columns["query_id"])[row]
    entries["positive"] = documents[first]
    entries["negative"] = documents[place]
    entries["place"] = (start + row) * MAX_DOCUMENTS + place - first
    entries["margin"] = scores[first] - scores[place]
    return entries


def _distribution(parts: list[np.ndarray]) -> dict:
    """Return the figures of float32 values, without a copy of all of them in double precision."""
    count = sum(map(len, parts))
    low, high = float(min(map(np.min, parts))), float(max(map(np.max, parts)))
    mean = sum(float(part.sum(dtype=np.float64)) for part in parts) / count
    squares = 0.0
    for part in parts:
        squares += float(((part.astype(np.float64) - mean) ** 2).sum())
    return {"min": low, "max": high, "mean": mean, "std": (squares / count) ** 0.5}


def _warnings(figures: dict) -> Iterator[str]:
    scores, margins = figures["scores"], figures["margins"]
    if scores is None:
        yield "The file holds only margins, so losses on single scores cannot use it; choose a loss on margins."
    elif scores["min"] == scores["max"]:
        yield f"All scores are {scores['min']:g}: nothing can be learned. Check the teacher, and score again."
    elif scores["min"] >= 0 and scores["max"] <= 1:
        yield "All scores are within [0, 1], as after a sigmoid: their margins are tiny. Score again with raw logits."
    if margins["zero"] == 1:
        yield "All margins are zero: a student would learn to score all alike. Check what was scored, and score again."
    elif margins["negative"] > 0.5:
        yield "Most margins are negative: the teacher prefers the negatives. Is the positive's score the first?"
    if figures["same_ids"]:
        yield f"{figures['same_ids']:,} rows name one document as positive and negative and teach nothing. Drop them."


def _count_distinct(teacher: _Teacher) -> dict[str, int]:
    queries = pairs = rows = 0
    for (matched,), _, _ in matched_buckets([teacher.buckets], "Counting"):
        documents = np.concatenate([matched["positive"], matched["negative"]])
        queries += len(np.unique(matched["query"]))
        pairs += int(number_rows(np.tile(matched["query"], 2), documents).max()) + 1
        rows += len(matched)
    return {"queries": queries, "pairs": pairs, "duplicate_rows": len(teacher.buckets) - rows}


def _compare(teachers: tuple[_Teacher, _Teacher], queries: TextStore | None, examples: int) -> dict:
    """Correlate the margins of two files, and find the queries on which they disagree most."""
    first, second = teachers
    rows = same_sign = 0
    sums, samples = np.zeros(5), []
    worst: list[tuple[float, int, int]] = []  # disagreement, rows, a place in the first file
    random = np.random.default_rng(0)
    share = SPEARMAN_ROWS / min(len(first.buckets), len(second.buckets))
    means, deviations = _scales(teachers)
    for matched, _, _ in matched_buckets([first.buckets, second.buckets], "Comparing"):
        matched = matched[:, (matched["place"] >= 0).all(0)]  # (2, rows)
        margins = matched["margin"]
        rows += matched.shape[1]
        same_sign += int((np.sign(margins[0]) == np.sign(margins[1])).sum())
        samples.append(margins[:, random.random(matched.shape[1]) < share])
        a, b = (margins.astype(np.float64, order="C") - means) / deviations
        sums += [a.sum(), b.sum(), a @ a, b @ b, a @ b]
        _, where, number = np.unique(matched["query"][0], return_index=True, return_inverse=True)
        counts = np.bincount(number)
        disagreement = np.bincount(number, np.abs(a - b)) / counts
        top = np.argsort(-disagreement, kind="stable")[:examples]
        places = matched["place"][0, where[top]]
        worst.extend(zip(disagreement[top].tolist(), counts[top].tolist(), places.tolist(), strict=True))
        worst = sorted(worst, reverse=True)[:examples]
    shown = []
    for value, count, place in worst:
        query_id = first.look_up(place)[0][0]
        example = {"query_id": query_id, "rows": count, "disagreement": value}
        shown.append(example | _texts(query=(queries, query_id)))
    sample = np.concatenate(samples, 1)
    return {
        "files": [first.figures["file"], second.figures["file"]],
        "shared_rows": rows,
        "agreement": same_sign / rows if rows else None,
        "pearson": _pearson(sums / max(rows, 1)),
        "spearman": _spearman(sample),
        "spearman_rows": sample.shape[1],
        **mean_agreement(_compare_lists(first.rows, second.rows)),
        "queries": shown,
    }


def _compare_lists(first: TeacherRows, second: TeacherRows) -> list[tuple[float, float] | None]:
    """Return the agreement of the two files' orders of a query's documents; nothing for files of pairs."""
    for rows in (first, second):
        if max(map(len, rows.rows[:ROWS_AT_ONCE]["doc_ids"])) < 3:
            return []
    rows_by_query = {}
    for start, columns in second.batches(["query_id"]):
        for number, query_id in enumerate(columns["query_id"].to_pylist(), start):
            rows_by_query[str(query_id)] = number
    agreements = []
    for row in first.rows:
        number = rows_by_query.get(str(row["query_id"]))
        if number is not None:
            agreements.append(agreement(_order(row), _order(second[number])))
        if len(agreements) == COMPARED_LISTS:
            break
    return agreements


def _order(row: dict) -> list[str]:
    """Return the documents of a list as strings, the best first; ties in the order of the list."""
    scored = zip(row["doc_ids"], row["teacher_scores"], strict=True)
    return [str(doc_id) for doc_id, _ in sorted(scored, key=lambda pair: -pair[1])]


def _scales(teachers: Sequence[_Teacher]) -> np.ndarray:
    """Return the means and the standard deviations of the files' margins, (2, files, 1)."""
    margins = [teacher.figures["margins"] for teacher in teachers]
    return np.array([(figures["mean"], figures["std"] or 1.0) for figures in margins]).T[:, :, None]


def _pearson(means: np.ndarray) -> float | None:
    """Return the correlation of a and b from the means of a, b, a * a, b * b and a * b."""
    a, b, *squares, product = means
    variances = squares - np.array([a, b]) ** 2
    if (variances <= 1e-12 * np.array(squares)).any():  # constant but for rounding
        return None
    return float(np.clip((product - a * b) / variances.prod() ** 0.5, -1, 1))


def _spearman(sample: np.ndarray) -> float | None:
    from scipy.stats import spearmanr  # 0.6 s, and only needed here

    if not sample.shape[1] or (sample.min(1) == sample.max(1)).any():
        return None
    return float(spearmanr(*sample).statistic)


def _find_false_negatives(
    teachers: Sequence[_Teacher], queries: TextStore | None, documents: TextStore | None, examples: int
) -> dict:
    """Find the rows on which the teachers prefer the negative most."""
    rows = count = 0
    worst: list[tuple[float, list[int]]] = []  # mean margin, the row's place in each file
    deviations = _scales(teachers)[1]
    for matched, _, _ in matched_buckets([teacher.buckets for teacher in teachers], "Comparing"):
        places = matched["place"]  # (files, rows)
        means = np.nanmean(np.where(places < 0, np.nan, matched["margin"].astype(np.float64) / deviations), 0)
        negative = int((means < 0).sum())
        rows += len(means)
        count += negative
        top = np.argsort(means, kind="stable")[: min(examples, negative)]
        worst.extend(zip(means[top].tolist(), places[:, top].T.tolist(), strict=True))
        worst = sorted(worst)[:examples]
    shown = []
    for margin, places in worst:
        scores = [None] * len(teachers)
        for i, place in enumerate(places):
            if place >= 0:
                (query_id, pos_id, neg_id), scores[i] = teachers[i].look_up(place)
        example = {"query_id": query_id, "pos_id": pos_id, "neg_id": neg_id, "margin": margin, "scores": scores}
        example |= _texts(query=(queries, query_id), positive=(documents, pos_id), negative=(documents, neg_id))
        shown.append(example)
    return {"rows": rows, "count": count, "share": count / rows, "examples": shown}


def _texts(**ids: tuple[TextStore | None, str]) -> dict[str, str | None]:
    """Return the texts of ids from the stores that are given; None for an id that its store lacks."""
    texts = {}
    for name, (store, id_) in ids.items():
        if store is not None:
            texts[name] = None
            if id_ in store:
                texts[name] = store[id_]
    return texts
