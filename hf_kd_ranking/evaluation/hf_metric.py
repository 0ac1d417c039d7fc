"""ir_measures as a metric of the `evaluate` library, for `compute_metrics` and `evaluate.combine`."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from ..data.runs import Run
from .metrics import DEFAULT_MEASURES, evaluate_queries, mean_values

DESCRIPTION = "Measures of rankings in ir_measures' notation: nDCG@10, RR@10, RR(rel=2)@10, AP, R@1000."
INPUTS = """
Args:
    predictions: for each query the scores of its documents.
    references: for each query the grades of the same documents, in the same order; 0 where a document is not relevant.
    measures: names of measures.
Returns:
    dict: each measure's mean over the queries. What a query does not list is not there: nDCG's ideal ranking and
    recall are of the listed documents.
"""


class RankingMetric(evaluate.Metric):
    """Measures of scored lists: `RankingMetric().compute(predictions=[[2.0, 1.0]], references=[[0, 1]])`.

    Documents with equal scores are ranked worst first, so that a model that scores all alike gains nothing.

    Args:
        measures: in ir_measures' notation; those of a `compute` call win.
        **options: of `evaluate.Metric`.
    """

    def __init__(self, measures: Sequence[str] = DEFAULT_MEASURES, **options: Any) -> None:
        super().__init__(**options)
        self.measures = tuple(measures)

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.Sequence(datasets.Value("float64")),
            "references": datasets.Sequence(datasets.Value("int64")),
        }
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation="", inputs_description=INPUTS, features=datasets.Features(features)
        )

    def _compute(
        self,
        predictions: Sequence[Sequence[float]],
        references: Sequence[Sequence[int]],
        measures: Sequence[str] | None = None,
    ) -> dict[str, float]:
        run, qrels = Run(), {}
        for query, (scores, grades) in enumerate(zip(predictions, references, strict=True)):
            if len(scores) != len(grades) or not np.isfinite(scores).all():
                raise ValueError(
                    f"Query {query} needs a grade for each of its scores, which must be numbers; got {len(scores)} "
                    f"scores ({scores[:3]} ...) and {len(grades)} grades."
                )
            # Names that trec_eval, which ranks ties by falling name, puts into order of rising grade.
            order = np.argsort(np.asarray(grades), kind="stable")[::-1]
            names = {int(place): f"{rank:09d}" for rank, place in enumerate(order)}
            run[str(query)] = [(names[place], score) for place, score in enumerate(scores)]
            qrels[str(query)] = {names[place]: grade for place, grade in enumerate(grades)}
        return mean_values(evaluate_queries(run, qrels, measures or self.measures))
