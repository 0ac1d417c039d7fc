"""Measure expanding id rows to text rows, against the plain script that keeps all texts in dictionaries.

    python examples/benchmarks/expand.py [--passages 1000000] [--folder DIR]

Both run as separate processes on the same random files (passages of 20 to 90 words, four triples per passage), the
plain script first, at a quarter of the size and at the full one. Time is wall time without the start of Python (6 s
with torch and transformers) and, for ours, with the building of the text stores. Memory is the largest anonymous
resident memory (RssAnon; mapped pages are cache), of which the imports are 0.5 GB.
Prints a line per run, and as its last line one JSON object with the ratios and the extrapolation to MS MARCO.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

PLAIN = """
import sys
import time
folder, start = sys.argv[1], time.perf_counter()
def load(name):
    with open(f"{folder}/{name}", encoding="utf8") as file:
        return {fields[0]: fields[1].rstrip() for fields in (line.split("\\t") for line in file)}
queries, collection = load("queries.tsv"), load("collection.tsv")
with open(f"{folder}/scores.tsv", encoding="utf8") as scores, open(f"{folder}/plain.tsv", "w", encoding="utf8") as out:
    for line in scores:
        pos_score, neg_score, query, positive, negative = line.split("\\t")
        texts = queries[query], collection[positive], collection[negative.rstrip()]
        out.write("\\t".join((pos_score, neg_score, *texts)) + "\\n")
print(time.perf_counter() - start)
"""
OURS = """
import sys
import time
import datasets
import hf_kd_ranking as kd
kd.expand_ids, kd.TextStore
folder, start = sys.argv[1], time.perf_counter()
datasets.config.HF_DATASETS_CACHE = f"{folder}/cache"
stores = kd.TextStore.from_tsv(f"{folder}/collection.tsv"), kd.TextStore.from_tsv(f"{folder}/queries.tsv")
kd.expand_ids(f"{folder}/scores.tsv", *stores, f"{folder}/ours.tsv", overwrite=True)
print(time.perf_counter() - start)
"""


def main() -> None:
    """Time both on the same files and compare their output."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where the files go (6 GB at the default size); a temporary one")
    args = parser.parse_args()
    results = {}
    for passages in (args.passages // 4, args.passages):
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        make_files(folder, passages)
        results[passages] = {"plain": measure(PLAIN, folder), "ours": measure(OURS, folder)}
        same = subprocess.run(["cmp", folder / "plain.tsv", folder / "ours.tsv"], check=False).returncode == 0
        shutil.rmtree(folder)
        for name, (seconds, memory) in results[passages].items():
            print(f"{passages:,} passages, {4 * passages:,} triples: {name:5} {seconds:6.1f} s  {memory:7.0f} MiB")
        print("the outputs are identical" if same else "THE OUTPUTS DIFFER")
    small, large = results.values()
    summary = {"time_ratio": large["plain"][0] / large["ours"][0]}
    summary |= {"memory_mib": {}, "memory_growth": {}, "minutes_at_40M_triples": {}}
    for name in large:
        seconds_per_triple = (large[name][0] - small[name][0]) / (3 * args.passages)  # without the constant part
        summary["memory_mib"][name] = large[name][1]
        summary["memory_growth"][name] = large[name][1] / small[name][1]
        summary["minutes_at_40M_triples"][name] = 40e6 * seconds_per_triple / 60
    print(json.dumps(summary))


def make_files(folder: Path, passages: int) -> None:
    """Write a collection, queries and rows of teacher scores, of random words."""
    rng = np.random.default_rng(0)
    words, pool = [], []
    for length in rng.integers(2, 10, 5000):
        words.append("".join(rng.choice(list("etaoinshrdlu"), length)))
    for length in rng.integers(20, 90, 20_000):
        pool.append(" ".join(rng.choice(words, length)))
    with (folder / "collection.tsv").open("w") as file:
        for number in range(passages):
            file.write(f"{number}\t{number} {pool[number % len(pool)]}\n")
    queries = rng.choice(10 * passages, passages // 10, replace=False)
    with (folder / "queries.tsv").open("w") as file:
        for number in queries:
            file.write(f"{number}\twhat is {pool[number % len(pool)][:30]}\n")
    with (folder / "scores.tsv").open("w") as file:
        for _ in range(4):
            scores, ids = rng.normal(5, 5, (passages, 2)).round(6), rng.integers(0, passages, (passages, 2))
            chosen = rng.choice(queries, passages)
            for pair, query, documents in zip(scores.tolist(), chosen.tolist(), ids.tolist(), strict=True):
                file.write(f"{pair[0]}\t{pair[1]}\t{query}\t{documents[0]}\t{documents[1]}\n")


def measure(code: str, folder: Path) -> tuple[float, float]:
    """Return seconds and MiB of anonymous memory of a process that runs the code."""
    peak = 0
    process = subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                peak = max(peak, int(line.split()[1]))
        time.sleep(0.05)
    if process.returncode:
        sys.exit(f"a run failed with {process.returncode}")
    return float(process.stdout.read()), peak / 1024


if __name__ == "__main__":
    main()
