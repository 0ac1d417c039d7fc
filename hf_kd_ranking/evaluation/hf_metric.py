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
    predictions: for each query, the scores of its documents.
    references: for each query, the grades of the same documents in the same order; 0 means not relevant.
    measures: names of measures.
Returns:
    dict: the mean of each measure over the queries. Only the listed documents count: the ideal ranking of nDCG and the
    number of relevant documents of recall are those of the list.
"""


class RankingMetric(evaluate.Metric):
    """Measure scored lists: `RankingMetric().compute(predictions=[[2.0, 1.0]], references=[[0, 1]])`.

    Documents with equal scores are ranked worst first, so that a model with constant scores gains nothing.

    Args:
        measures: in ir_measures' notation; the `measures` of a `compute` call take precedence.
        **options: passed to `evaluate.Metric`.
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
                    f"Query {query} needs a grade for each of its scores, which must be finite; got {len(scores)} "
                    f"scores ({scores[:3]} ...) and {len(grades)} grades."
                )
            ranking, judgments = [], {}
            best_first = sorted(zip(grades, scores, strict=True), reverse=True)
            for place, (grade, score) in enumerate(best_first):
                doc_id = f"{place:09d}"  # trec_eval ranks ties by descending id: the lowest grade first
                ranking.append((doc_id, score))
                judgments[doc_id] = grade
            run[str(query)] = ranking
            qrels[str(query)] = judgments
        return mean_values(evaluate_queries(run, qrels, measures or self.measures))
