"""Average and diagnose teacher files: time and memory on made-up files of N rows.

    python examples/benchmarks/ensemble.py [--rows 4000000] [--files 3] [--folder DIR] [--verbs ensemble diagnose]

The files have the same rows, each in an order of its own, with ids of the size of MS MARCO's. Each verb runs in a
process of its own. Seconds are wall time and CPU time without the start of Python; `diagnose` includes loading the
files into the cache. Memory is the largest resident size of the process and its largest anonymous part (mapped pages
are cache), of which the imports are 0.5 GB. The last line is one JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

RUN = """
import json, resource, sys, time
import datasets
import hf_kd_ranking as kd

verb, folder, *files = sys.argv[1:]
datasets.config.HF_DATASETS_CACHE = f"{folder}/cache"
functions = {"ensemble": kd.ensemble_teachers, "diagnose": kd.diagnose_teachers}
arguments = {"ensemble": {"output": f"{folder}/mean.tsv", "overwrite": True}, "diagnose": {}}
start, cpu_start = time.perf_counter(), time.process_time()
functions[verb](files, **arguments[verb])
figures = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
figures["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps(figures))
"""


def main() -> None:
    """Make the files, and measure each verb."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--files", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keeps the files (180 MB for each at the default size)")
    parser.add_argument("--verbs", nargs="+", default=["ensemble", "diagnose"], choices=["ensemble", "diagnose"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        files = [folder / f"teacher{i}.tsv" for i in range(args.files)]
        if not files[-1].is_file():
            make_files(files, args.rows)
        results = {verb: measure(verb, folder, files) for verb in args.verbs}
    print(json.dumps({"rows": args.rows, "files": args.files, **results}))


def make_files(files: list[Path], rows: int) -> None:
    """Write files of the same rows with scores of their own."""
    rng = np.random.default_rng(0)
    ids = np.stack([rng.integers(0, limit, rows) for limit in (rows // 80 + 1, 8_841_823, 8_841_823)])
    options = pa.csv.WriteOptions(include_header=False, delimiter="\t")
    for path in files:
        scores = rng.normal(5, 5, (2, rows)).round(6)
        columns = dict(zip("abcde", [*scores, *ids[:, rng.permutation(rows)]], strict=True))
        pa.csv.write_csv(pa.table(columns), path, options)


def measure(verb: str, folder: Path, files: list[Path]) -> dict[str, float]:
    """Return the figures of one run."""
    command = [sys.executable, "-c", RUN, verb, str(folder), *map(str, files)]
    anonymous = 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                anonymous = max(anonymous, int(line.split()[1]))
        time.sleep(0.05)
    if process.returncode:
        sys.exit(f"{verb} failed with {process.returncode}")
    figures = json.loads(process.stdout.read()) | {"peak_anonymous_mib": anonymous / 1024}
    rounded = {name: round(value, 1) for name, value in figures.items()}
    print(verb, *(f"{name} {value:,}" for name, value in rounded.items()))
    return rounded


if __name__ == "__main__":
    main()
