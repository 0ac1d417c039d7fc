"""The paper's loss ablation in small: each architecture and loss on the same triples of PyDocs, with significance.

    python examples/loss_ablation.py --output demo_output [--architectures bert_dot colbert tk] [--seeds 3]

Reads what `make demo` leaves in the folder, and runs those stages first where they are not there. The learning rate of
each architecture and loss is chosen on the development split from one grid, with one seed; the test split is scored
with the chosen one. Prints a Markdown table; every trained run is kept, so that an interrupted ablation goes on.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import hf_kd_ranking as kd
from hf_kd_ranking.demo.experiment import demo_job
from hf_kd_ranking.distillation.job import NO_TEACHER, TEACHER
from hf_kd_ranking.distillation.students import Distillation
from hf_kd_ranking.evaluation.metrics import evaluate_queries
from hf_kd_ranking.evaluation.significance import paired_t_test
from hf_kd_ranking.models import ARCHITECTURES

LOSSES = ("ranknet", "weighted_ranknet", "mse", "margin_mse")  # the first is the paper's "no teacher"


def main() -> None:
    """Train and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--architectures", nargs="+", default=["bert_dot", "colbert", "tk"], choices=ARCHITECTURES)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()

    # 1. Collection, triples, their scores by the mean of two teachers
    args.output.mkdir(parents=True, exist_ok=True)
    job = demo_job(args.output, args.seeds, is_complete=True)
    parts = Distillation(job)
    _ = parts.scores
    candidates, qrels = kd.read_run(parts.run("test")), kd.read_qrels(parts.judgments("test"))
    evaluator = kd.RerankingEvaluator(candidates, qrels, parts.queries, parts.documents, (job.measure,))

    # 2. Each architecture and loss: a learning rate, then seeds, then the test split
    print(
        f"| architecture | loss | learning rate | {job.measure} | without a teacher | p |\n|---|---|---|---|---|---|"
    )
    for architecture in args.architectures:
        control = None
        for loss in LOSSES:
            parts.job = replace(job, loss=loss)
            condition = NO_TEACHER if loss == LOSSES[0] else TEACHER
            rate, by_seed = parts.best_rate(architecture, condition), []
            for seed in range(args.seeds):
                student = parts.train_student(architecture, condition, rate, seed)
                run = evaluator.rerank(kd.Ranker.from_pretrained(student.folder))
                by_seed.append(evaluate_queries(run, qrels, (job.measure,))[job.measure])
            values = {query_id: fmean(run[query_id] for run in by_seed) for query_id in qrels}
            control = control or values
            test = paired_t_test(values, control)
            print(
                f"| {architecture} | {loss} | {rate:g} | {fmean(values.values()):.4f} | {test['difference']:+.4f} | "
                f"{test['p_value']:.2g} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
