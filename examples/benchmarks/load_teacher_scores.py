"""Time and memory of loading teacher scores: a five-column TSV of N random rows into the memory-mapped table.

    python examples/benchmarks/load_teacher_scores.py [--rows 2000000]

Timed: `load_teacher_scores` on a file not seen before (parse, check, write the Arrow file), and again (open it).
Memory is the growth of the peak resident size over the first load, and of its anonymous part (mapped pages
are cache, not cost). The last line is one JSON object.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

import hf_kd_ranking as kd


def anonymous_kb() -> int:
    """Anonymous memory of this process in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def main() -> None:
    """Time the first and the second opening."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        # 1. A file like the published ones, written in pieces so that the peak before loading stays low
        path, rng = Path(folder) / "scores.tsv", np.random.default_rng(0)
        with path.open("wb") as file:
            for start in range(0, rows, 100_000):
                n = min(100_000, rows - start)
                columns = [rng.normal(size=n).round(6) for _ in range(2)]
                columns += [rng.integers(0, limit, n) for limit in (808_731, 8_841_823, 8_841_823)]
                options = pa.csv.WriteOptions(include_header=False, delimiter="\t")
                pa.csv.write_csv(pa.table(dict(zip("abcde", columns, strict=True))), file, options)
        load = kd.load_teacher_scores  # imported before the clock starts

        # 2. Load, twice
        anonymous_before = anonymous_kb()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        dataset = load(path, cache_dir=folder)
        first = time.perf_counter() - start
        growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        start = time.perf_counter()
        load(path, cache_dir=folder)
        second = time.perf_counter() - start

        # 3. The figures
        figures = {
            "rows": len(dataset),
            "first_load_seconds": round(first, 2),
            "second_load_seconds": round(second, 3),
            "peak_resident_growth_mb": round(growth / 1024),
            "anonymous_growth_mb": round((anonymous_kb() - anonymous_before) / 1024),
        }
    for name, value in figures.items():
        print(f"{name:26} {value:,}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
