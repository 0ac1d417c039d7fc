"""Measure time and memory of evaluating and comparing two runs, against ir_measures' command line, in one run.

    python examples/benchmarks/evaluate_runs.py FOLDER [--queries 6980] [--k 1000] [--measures nDCG@10 RR@10]

Writes two random runs and qrels of the size of MS MARCO's development set into FOLDER (ids like MS MARCO's, one or two
relevant passages per query). Timed as separate processes, from their start: `hf-kd-ranking compare` of both runs
(reading, measures, all tests), `evaluate` of one, and `ir_measures QRELS RUN` with the same measures. `peak_mb` is the
largest resident memory of the process. The last line is one JSON object.
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
    parser.add_argument("--k", type=int, default=1_000)
    parser.add_argument("--measures", nargs="+", default=["nDCG@10", "RR@10"])
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    rng, qrels = np.random.default_rng(0), args.folder / "qrels.txt"
    runs = [args.folder / "a.trec", args.folder / "b.trec"]
    with qrels.open("w") as file:
        for query in range(args.queries):
            for doc in {100 * query, 100 * query + rng.integers(2)}:
                file.write(f"{1_000_000 + query} 0 {doc} 1\n")
    for run in runs:
        write_run(run, args.queries, args.k, rng)

    package, options = [sys.executable, "-m", "hf_kd_ranking"], ["--qrels", qrels, "--measure", *args.measures]
    theirs = Path(sys.executable).with_name("ir_measures")
    figures = {
        "compare": measure([*package, "compare", "--run", *runs, *options]),
        "evaluate": measure([*package, "evaluate", "--run", runs[0], *options]),
        "ir_measures": measure([theirs, qrels, runs[0], *args.measures]),
    }
    ratio = figures["ir_measures"]["seconds"] / figures["evaluate"]["seconds"]
    print(json.dumps(figures | {"ir_measures_over_evaluate": round(ratio, 2)}))


def write_run(path: Path, queries: int, k: int, rng: np.random.Generator) -> None:
    """Write a run of random documents and scores."""
    with path.open("w") as file:
        for query in range(queries):
            docs = rng.choice(8_800_000, k, replace=False)
            docs[rng.integers(k)] = 100 * query
            scores = np.sort(rng.normal(0, 5, k))[::-1]
            for rank, doc in enumerate(dict.fromkeys(docs.tolist())):
                file.write(f"{1_000_000 + query} Q0 {doc} {rank + 1} {scores[rank]:.6f} {path.stem}\n")


def measure(command: list) -> dict[str, float]:
    """Run a command, and return its wall and CPU seconds and its peak memory."""
    start = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command} failed")
    seconds, cpu = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
    return {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "peak_mb": usage.ru_maxrss // 1024}


if __name__ == "__main__":
    main()
