"""The paper's loss ablation in small: each architecture and loss on the same triples of PyDocs, with significance.

    python examples/loss_ablation.py --output demo_output [--architectures bert_dot colbert tk] [--seeds 3]

Reads what `make demo` leaves in the folder, and runs those stages first where they are not there. The learning rate of
each architecture and loss is chosen on the development split from one grid, with one seed; the test split is scored
with the chosen one. Prints a Markdown table; every trained run is kept, so that an interrupted ablation goes on.
"""

import argparse
from pathlib import Path
from statistics import fmean

import hf_kd_ranking as kd
from hf_kd_ranking.demo.stages import MEASURE, SEED, Inputs, prepare, run_once, score_triples, train_teacher, training
from hf_kd_ranking.evaluation.metrics import evaluate_queries
from hf_kd_ranking.evaluation.significance import paired_t_test

LOSSES = ("ranknet", "weighted_ranknet", "mse", "margin_mse")  # the first is the paper's "no teacher"
STUDENTS = {
    "bert_dot": {"layers": [0, 1, 5], "config_overrides": {"pooling": "mean"}},
    "colbert": {"layers": [0, 1, 5], "config_overrides": {"compression_dim": 128}},
    "prettr": {"layers": [0, 1, 5], "config_overrides": {"join_layer_idx": 1}},
    "bert_cat": {"layers": [0, 1, 5]},
    "tk": {},
}
RATES = {"tk": (1e-3, 3e-3)}  # no pretrained layers
EPOCHS = {"tk": 6}


def train(inputs: Inputs, scores: Path, architecture: str, loss: str, rate: float, seed: int) -> tuple[Path, float]:
    """The folder of a trained student, and its measure on the development split."""
    job = STUDENTS[architecture] | {"architecture": architecture, "teacher_scores": str(scores)}
    name = f"ablation-{architecture}-{loss}-{rate:g}-seed{seed}"
    scale = {} if loss == "ranknet" else {"teacher_scale": "match"}
    job, args = training(inputs, name, job, loss, rate, EPOCHS.get(architecture, 2), seed, **scale)
    return Path(args.output_dir), run_once(job, args)["after"][f"eval_{MEASURE}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--architectures", nargs="+", default=["bert_dot", "colbert", "tk"], choices=STUDENTS)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()

    # 1. Collection, triples, their scores by the mean of two teachers
    inputs = prepare(args.output)
    train_teacher(inputs)
    scores = score_triples(inputs)["T2"]
    stores = kd.TextStore.from_tsv(inputs.queries), kd.TextStore.from_tsv(inputs.collection)
    candidates, qrels = kd.read_run(inputs.candidates("test")), kd.read_qrels(inputs.qrels("test"))
    evaluator = kd.RerankingEvaluator(candidates, qrels, *stores, (MEASURE,))

    # 2. Each architecture and loss: a learning rate, then seeds, then the test split
    print(f"| architecture | loss | learning rate | {MEASURE} | without a teacher | p |\n|---|---|---|---|---|---|")
    for architecture in args.architectures:
        control = None
        for loss in LOSSES:
            rates = RATES.get(architecture, (5e-5, 1.5e-4))
            rate = max(rates, key=lambda rate: train(inputs, scores, architecture, loss, rate, SEED)[1])
            by_seed = []
            for seed in range(SEED, SEED + args.seeds):
                folder, _ = train(inputs, scores, architecture, loss, rate, seed)
                run = evaluator.rerank(kd.Ranker.from_pretrained(folder))
                by_seed.append(evaluate_queries(run, qrels, (MEASURE,))[MEASURE])
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
