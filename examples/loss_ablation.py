"""Compare losses on the demo's lists: the paper's loss ablation in small, with significance tests.

    python examples/loss_ablation.py [--output results/ablation] [--architectures bert_dot colbert tk] [--seeds 3]

Distils once per loss, in a folder with the demo's collection and lists. Every loss has its own learning rate, chosen
on the validation queries; the control is RankNet on the labels. Prints a Markdown table; three seeds take hours on 2
CPU cores. The same command resumes after an interruption.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import hf_kd_ranking as kd
from hf_kd_ranking.demo.experiment import demo_job

# 1. Arguments
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", type=Path, default=Path("results/ablation"))
parser.add_argument("--architectures", nargs="+", default=["bert_dot", "colbert", "tk"])
parser.add_argument("--losses", nargs="+", default=["weighted_ranknet", "mse", "margin_mse"])
parser.add_argument("--seeds", type=int, default=3)
args = parser.parse_args()

# 2. The demo's collection, queries and teacher
args.output.mkdir(parents=True, exist_ok=True)
job = replace(demo_job(args.output, args.seeds), architectures=args.architectures)

# 3. Distil with each loss; steps that do not depend on the loss run once
print(f"| loss | student | {job.measure} | difference to ranknet | p |\n| --- | --- | --- | --- | --- |")
for loss in args.losses:
    outcome = kd.distill(replace(job, loss=loss))
    for test in outcome["tests"]:
        name = test["treatment"]
        if not test["control"].endswith("no_teacher"):
            continue  # of the chosen pipeline
        value = outcome["test"][name]
        print(f"| {loss} | {name} | {value:.4f} | {test['difference']:+.4f} | {test['p_value']:.2g} |", flush=True)
