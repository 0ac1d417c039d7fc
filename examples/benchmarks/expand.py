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
        results[passages] = {name: measure(code, folder) for name, code in (("plain", PLAIN), ("ours", OURS))}
        same = subprocess.run(["cmp", folder / "plain.tsv", folder / "ours.tsv"], check=False).returncode == 0
        shutil.rmtree(folder)
        for name, (seconds, memory) in results[passages].items():
            print(f"{passages:,} passages, {4 * passages:,} triples: {name:5} {seconds:6.1f} s  {memory:7.0f} MiB")
        print("the outputs are identical" if same else "THE OUTPUTS DIFFER")
    small, large = results.values()
    growth = {name: (large[name][0] - small[name][0]) / (3 * args.passages) for name in large}  # seconds a triple
    print(json.dumps({  # growth: without what does not depend on the size
        "time_ratio": large["plain"][0] / large["ours"][0],
        "memory_mib": {name: large[name][1] for name in large},
        "memory_growth": {name: large[name][1] / small[name][1] for name in large},
        "minutes_at_40M_triples": {name: 40e6 * seconds / 60 for name, seconds in growth.items()},
    }))  # fmt: skip


def make_files(folder: Path, passages: int) -> None:
    """Write a collection, queries and rows of teacher scores, of random words."""
    rng = np.random.default_rng(0)
    words = np.array(["".join(rng.choice(list("etaoinshrdlu"), n)) for n in rng.integers(2, 10, 5000)])
    pool = [" ".join(rng.choice(words, n)) for n in rng.integers(20, 90, 20_000)]
    with (folder / "collection.tsv").open("w") as file:
        for start in range(0, passages, 100_000):
            file.writelines(f"{i}\t{i} {pool[i % len(pool)]}\n" for i in range(start, min(start + 100_000, passages)))
    queries = rng.choice(10 * passages, passages // 10, replace=False)
    (folder / "queries.tsv").write_text("".join(f"{i}\twhat is {pool[i % len(pool)][:30]}\n" for i in queries))
    with (folder / "scores.tsv").open("w") as file:
        for _ in range(4):
            scores, ids = rng.normal(5, 5, (passages, 2)).round(6), rng.integers(0, passages, (passages, 2))
            chosen = rng.choice(queries, passages)
            rows = zip(scores.tolist(), chosen.tolist(), ids.tolist(), strict=True)
            file.writelines(f"{p}\t{n}\t{q}\t{a}\t{b}\n" for (p, n), q, (a, b) in rows)


def measure(code: str, folder: Path) -> tuple[float, float]:
    """Return seconds and MiB of anonymous memory of a process that runs the code."""
    peak = 0
    process = subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))])
        time.sleep(0.05)
    if process.returncode:
        sys.exit(f"a run failed with {process.returncode}")
    return float(process.stdout.read()), peak / 1024


if __name__ == "__main__":
    main()
