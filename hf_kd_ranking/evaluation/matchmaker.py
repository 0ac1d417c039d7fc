"""Measures as the paper's training code computes them, for comparison with tables that it made.

https://github.com/sebastian-hofstaetter/matchmaker, core_metrics.py. Where they differ from trec_eval's: means are
over the queries that have both a ranking and a document graded above 0; ties keep the order given; run files are read
in the order of their lines; a document that is ranked twice counts twice.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..artifacts import existing_file
from ..data.runs import Run
from ..data.tables import read_lines

if TYPE_CHECKING:
    from ir_measures.measures import Measure


def read_ranking(path: str | os.PathLike) -> Run:
    """Read a run file in the order of its lines, which may have three columns (query_id doc_id rank), four (and a
    score) or six (TREC); ranks and scores in it are not read.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: with file and line, for another number of columns; for an empty file.
    """
    run, path = Run(), Path(path)
    for line, text in read_lines(existing_file(path, "run")):
        fields = text.split()
        if len(fields) not in (3, 4, 6):
            raise ValueError(f"{path} line {line}: needed 3, 4 or 6 columns, got {len(fields)}: {text[:80]!r}.")
        ranking = run.setdefault(fields[0], [])
        ranking.append((fields[2 if len(fields) == 6 else 1], -float(len(ranking))))
    return run


def evaluate_queries(run: Run, qrels: Mapping[str, Mapping[str, int]], measure: "Measure") -> dict[str, float]:
    """One measure of each query that the training code evaluates: query_id -> value.

    Args:
        measure: RR, R, AP or nDCG of ir_measures, with a cutoff and, but for nDCG, the least relevant grade.

    Raises:
        ValueError: for another measure, or if no query has both a ranking and a relevant document.
    """
    if measure.NAME not in ("nDCG", *BINARY_MEASURES) or "cutoff" not in measure.params:
        names = ", ".join(("nDCG", *BINARY_MEASURES))
        raise ValueError(f"The matchmaker dialect has {names}, each with a cutoff (AP(rel=2)@1000); got {measure}.")
    cutoff, least = measure.params["cutoff"], measure.params.get("rel", 1)
    values = {}
    for query_id, ranking in run.items():
        judged = {doc_id: grade for doc_id, grade in qrels.get(query_id, {}).items() if grade > 0}
        if not judged:
            continue
        grades = np.array([judged.get(doc_id, 0) for doc_id, _ in ranking[:cutoff]], dtype=float)
        if measure.NAME == "nDCG":
            values[query_id] = _dcg(grades) / _dcg(sorted(judged.values(), reverse=True)[:cutoff])
        else:
            ranks, relevant = np.flatnonzero(grades >= least) + 1, sum(grade >= least for grade in judged.values())
            values[query_id] = float(BINARY_MEASURES[measure.NAME](ranks, relevant)) if len(ranks) else 0.0
    if not values:
        raise ValueError("No query of the run has a document graded above 0; the training code would print NaN.")
    return values


def _dcg(grades: Sequence[float]) -> float:
    return float((np.asarray(grades) / np.log2(np.arange(2, len(grades) + 2))).sum())


# Of the ranks of relevant documents, at least one, and the number of relevant documents there are.
BINARY_MEASURES = {
    "RR": lambda ranks, relevant: 1 / ranks[0],
    "R": lambda ranks, relevant: len(ranks) / relevant,
    "AP": lambda ranks, relevant: (np.arange(1, len(ranks) + 1) / ranks).sum() / relevant,
}
