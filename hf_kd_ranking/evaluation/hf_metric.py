"""ir_measures as a metric of the `evaluate` library, for `compute_metrics` and `evaluate.combine`."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from ..data.runs import Run
from ..errors import InputError
from .metrics import DEFAULT_MEASURES, evaluate_queries, mean_values


class RankingMetric(evaluate.Metric):
    """Measure scored lists: `RankingMetric().compute(predictions=[[2.0, 1.0]], references=[[0, 1]])`.

    For each query, `predictions` has the scores of its documents and `references` their grades, 0 for not relevant;
    only these documents count in ideal rankings and numbers of relevant documents. Documents with equal scores are
    ranked worst first, so that a model with constant scores gains nothing.

    Args:
        measures: in ir_measures' notation; the `measures` of a `compute` call take precedence.
        **options: passed to `evaluate.Metric`.

    Example:
        >>> kd.RankingMetric(["RR@10"]).compute(predictions=[[2.0, 1.0]], references=[[0, 1]])
        {'RR@10': 0.5}
    """

    def __init__(self, measures: Sequence[str] = DEFAULT_MEASURES, **options: Any) -> None:
        super().__init__(**options)
        self.measures = tuple(measures)

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            predictions=datasets.Sequence(datasets.Value("float64")),
            references=datasets.Sequence(datasets.Value("int64")),
        )
        return evaluate.MetricInfo(__doc__, citation="", inputs_description=self.__doc__, features=features)

    def _compute(
        self, predictions: Sequence, references: Sequence, measures: Sequence[str] | None = None
    ) -> dict[str, float]:
        run, qrels = Run(), {}
        for query, (scores, grades) in enumerate(zip(predictions, references, strict=True)):
            if len(scores) != len(grades) or not np.isfinite(scores).all():
                raise InputError(
                    f"Query {query} needs a grade for each of its scores, which must be finite; got {len(scores)} "
                    f"scores ({scores[:3]} ...) and {len(grades)} grades."
                )
            ranking, judgments = run.setdefault(str(query), []), qrels.setdefault(str(query), {})
            for place, (grade, score) in enumerate(sorted(zip(grades, scores, strict=True), reverse=True)):
                doc_id = f"{place:09d}"  # trec_eval ranks ties by descending id: the lowest grade first
                ranking.append((doc_id, score))
                judgments[doc_id] = grade
        return mean_values(evaluate_queries(run, qrels, measures or self.measures))
