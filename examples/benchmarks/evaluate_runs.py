"""Time and memory of evaluating and comparing two runs, against ir_measures' command line, in one run.

    python examples/benchmarks/evaluate_runs.py FOLDER [--queries 6980] [--depth 1000] [--measures nDCG@10 RR@10]

Writes two random runs and qrels of the size of MS MARCO's development set in FOLDER (ids like MS MARCO's, one or two
relevant passages a query). Timed, each as a process of its own from its start: `hf-kd-ranking compare` of both runs
(reading, the measures, all tests), `evaluate` of one, and `ir_measures QRELS RUN` with the same measures. `peak_mb` is
the process's largest resident memory. The last line is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np


def main() -> None:
    """Time reading, measuring and comparing two runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--queries", type=int, default=6_980)
    parser.add_argument("--depth", type=int, default=1_000)
    parser.add_argument("--measures", nargs="+", default=["nDCG@10", "RR@10"])
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    runs, qrels = [args.folder / f"{name}.trec" for name in "ab"], args.folder / "qrels.txt"
    write_data(runs, qrels, args.queries, args.depth)

    measures = [part for measure in args.measures for part in ("--measure", measure)]
    ours = [sys.executable, "-m", "hf_kd_ranking"]
    commands = {
        "compare": [*ours, "compare", *(f"--run={run}" for run in runs), "--qrels", str(qrels), *measures],
        "evaluate": [*ours, "evaluate", f"--run={runs[0]}", "--qrels", str(qrels), *measures],
        "ir_measures": [str(Path(sys.executable).with_name("ir_measures")), str(qrels), str(runs[0]), *args.measures],
    }
    figures = {}
    for name, command in commands.items():
        start = time.perf_counter()
        process = subprocess.Popen(command)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"{' '.join(command)} failed")
        figures[name] = {"seconds": round(time.perf_counter() - start, 2), "peak_mb": usage.ru_maxrss // 1024}
        figures[name]["cpu_seconds"] = round(usage.ru_utime + usage.ru_stime, 2)
    figures["ir_measures_over_evaluate"] = round(figures["ir_measures"]["seconds"] / figures["evaluate"]["seconds"], 2)
    print(json.dumps(figures))


def write_data(runs: list[Path], qrels: Path, queries: int, depth: int) -> None:
    """Two runs and their judgments, of random scores."""
    rng = np.random.default_rng(0)
    with qrels.open("w") as file:
        for query in range(queries):
            file.writelines(f"{1_000_000 + query} 0 {doc} 1\n" for doc in {100 * query, 100 * query + rng.integers(2)})
    for run in runs:
        with run.open("w") as file:
            for query in range(queries):
                docs, scores = rng.choice(8_800_000, depth, replace=False), np.sort(rng.normal(0, 5, depth))[::-1]
                docs[rng.integers(depth)] = 100 * query
                lines = enumerate(zip(dict.fromkeys(docs.tolist()), scores.tolist(), strict=False), start=1)
                file.writelines(
                    f"{1_000_000 + query} Q0 {doc} {rank} {score:.6f} {run.stem}\n" for rank, (doc, score) in lines
                )


if __name__ == "__main__":
    main()
