"""Measures as computed by the paper's training code, for comparison with published tables.

https://github.com/sebastian-hofstaetter/matchmaker, core_metrics.py. It differs from trec_eval: means are over the
queries that have both a ranking and a document graded above 0; ties keep the given order; run files are read in the
order of their lines; a document that is ranked twice counts twice.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..artifacts import existing_file
from ..data.runs import Run
from ..data.tables import read_lines

if TYPE_CHECKING:
    from ir_measures.measures import Measure

MEASURES = ("nDCG", "RR", "R", "AP")


def read_ranking(path: str | os.PathLike) -> Run:
    """Read a run file in the order of its lines; ranks and scores in it are ignored.

    A line has three columns (query_id doc_id rank), four (with a score) or six (TREC); others raise a ValueError.
    """
    path = existing_file(path, "run")
    run = Run()
    for line, text in read_lines(path):
        fields = text.split()
        if len(fields) not in (3, 4, 6):
            raise ValueError(f"{path} line {line}: needed 3, 4 or 6 columns, got {len(fields)}: {text[:80]!r}.")
        doc_id = fields[2] if len(fields) == 6 else fields[1]
        ranking = run.setdefault(fields[0], [])
        ranking.append((doc_id, -float(len(ranking))))
    return run


def evaluate_queries(run: Run, qrels: Mapping[str, Mapping[str, int]], measure: "Measure") -> dict[str, float]:
    """Compute a measure for each query that the training code evaluates: query_id -> value.

    Args:
        run, qrels: as `evaluation.metrics.evaluate_run`; the order of the run counts, not its scores.
        measure: RR, R, AP or nDCG of ir_measures, with a cutoff and, except for nDCG, the lowest relevant grade.

    Raises:
        ValueError: for another measure, or if no query has both a ranking and a relevant document.
    """
    if measure.NAME not in MEASURES or "cutoff" not in measure.params:
        needed = f"{', '.join(MEASURES)}, each with a cutoff (AP(rel=2)@1000)"
        raise ValueError(f"The matchmaker dialect has {needed}; got {measure}.")
    cutoff, lowest_grade = measure.params["cutoff"], measure.params.get("rel", 1)
    values = {}
    for query_id, ranking in run.items():
        judgments = qrels.get(query_id, {})
        judged_grades = np.array(list(judgments.values()))
        ideal = np.sort(judged_grades[judged_grades > 0])[::-1]
        if len(ideal) == 0:
            continue
        grades = np.array([max(0, judgments.get(doc_id, 0)) for doc_id, _ in ranking[:cutoff]], dtype=float)
        ranks = np.flatnonzero(grades >= lowest_grade) + 1
        relevant = (ideal >= lowest_grade).sum()
        value = 0.0
        if measure.NAME == "nDCG":
            value = _dcg(grades) / _dcg(ideal[:cutoff])
        elif measure.NAME == "RR" and len(ranks):
            value = 1 / ranks[0]
        elif measure.NAME == "R" and len(ranks):
            value = len(ranks) / relevant
        elif len(ranks):
            value = (np.arange(1, len(ranks) + 1) / ranks).sum() / relevant
        values[query_id] = float(value)
    if not values:
        raise ValueError("No query of the run has a document graded above 0; the training code would print NaN.")
    return values


def _dcg(grades: np.ndarray) -> float:
    return (grades / np.log2(np.arange(2, len(grades) + 2))).sum()
