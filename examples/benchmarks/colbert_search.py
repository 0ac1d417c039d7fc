"""Compare ways to search the token vectors of a ColBERT: recall of exact MaxSim against CPU time.

    hf-kd-ranking index --model MODEL --collection collection.tsv --output vectors --storage float16
    OMP_NUM_THREADS=1 python examples/benchmarks/colbert_search.py --model MODEL --index vectors \
        --queries queries.tsv [--k 100] [--rounds 2] [--fast-plaid]

Each folder of --index is a `VectorStore` of one collection; centroids are added to those that have none. Recall is
the share of the k documents of exact MaxSim over the first folder that a search finds. All searches get all queries in
one call, in turn, --rounds times; the least CPU time counts. --fast-plaid indexes the vectors of the first folder with
the library of that name, which needs the version of torch that its own version ends with (1.7.0.2110: torch 2.11.0).
The last line is one JSON object.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

import hf_kd_ranking as kd

PROBES = ((1, 256), (2, 256), (4, 400), (8, 400), (8, 1_600), (16, 1_600), (32, 4_096))  # with candidates
FAST_PLAID = ((1, 256), (2, 512), (4, 1_024), (8, 1_024), (8, 4_096), (16, 4_096), (32, 8_192))
BITS = (2, 4)

Search = Callable[[], list[np.ndarray]]


def main() -> None:
    """Measure all searches in turn."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--index", nargs="+", type=Path, required=True)
    parser.add_argument("--queries", required=True)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="that of the encoded collection")
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--fast-plaid", action="store_true")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    ranker = kd.Ranker.from_pretrained(args.model, device="cpu", dtype=dtype)
    queries = ranker.encode_queries(list(dict(kd.TextStore.from_file(args.queries).items()).values()))
    # 1. Exact search
    stores = [kd.VectorStore.open(folder, ranker) for folder in args.index]
    exact = kd.ColBERTIndex(stores[0])
    start = time.process_time()
    truth = only_rows(exact.search_vectors(queries, args.k))
    exact_rate = len(queries) / (time.process_time() - start)
    print(f"exact: {len(stores[0]):,} passages, {exact_rate:.2f} queries per CPU second", flush=True)
    # 2. Build the indexes
    indexes, searches = {}, {}
    for store in stores:
        name = f"ColBERTIndex {store.folder.name}"
        index, indexes[name] = build_ours(store)
        for probes, candidates in PROBES:
            searches[name, probes, candidates] = search_ours(index, queries, args.k, probes, candidates)
        print(name, json.dumps(indexes[name]), flush=True)
    every_bits = ()
    if args.fast_plaid:
        every_bits = BITS
    with tempfile.TemporaryDirectory() as folder:
        for bits in every_bits:
            name = f"fast-plaid {bits} bits"
            index, indexes[name] = build_fast_plaid(stores[0], Path(folder) / str(bits), bits)
            for probes, scores in FAST_PLAID:
                searches[name, probes, scores] = search_fast_plaid(index, queries, args.k, probes, scores)
            print(name, json.dumps(indexes[name]), flush=True)
        # 3. Search, all in turn
        rows = measure(searches, truth, args.rounds)
    for row in rows:
        print(json.dumps(row))
    print(json.dumps({"exact_queries_per_cpu_second": exact_rate, "indexes": indexes, "searches": rows}))


def measure(searches: dict[tuple, Search], truth: list[np.ndarray], rounds: int) -> list[dict]:
    """Return recall and queries per second of CPU time of every search."""
    seconds, recall = dict.fromkeys(searches, float("inf")), {}
    for _ in range(rounds):
        for key, search in searches.items():
            start = time.process_time()
            found = search()
            seconds[key] = min(seconds[key], time.process_time() - start)
            shared = []
            for wanted, rows in zip(truth, found, strict=True):
                shared.append(len(np.intersect1d(wanted, rows)) / len(wanted))
            recall[key] = float(np.mean(shared))
    rows = []
    for name, probes, candidates in searches:
        key = (name, probes, candidates)
        row = {"index": name, "probes": probes, "candidates": candidates, "recall": recall[key]}
        rows.append(row | {"queries_per_cpu_second": len(truth) / seconds[key]})
    return rows


def build_ours(store: kd.VectorStore) -> tuple[kd.ColBERTIndex, dict[str, float]]:
    """Return our index, the CPU time of its centroids (0 if they were there), and bytes per passage."""
    start = time.process_time()
    if not (store.folder / "centroids").is_dir():
        kd.ColBERTIndex.build(store, centroids=0)
    seconds = time.process_time() - start
    index = kd.ColBERTIndex.open(store.folder, store.ranker)
    return index, {"build_cpu_seconds": seconds, "bytes_per_passage": size_of(store.folder) / len(store)}


def search_ours(index: kd.ColBERTIndex, queries: list, k: int, probes: int, candidates: int) -> Search:
    """Return a search that returns the rows found for every query."""

    def search() -> list[np.ndarray]:
        return only_rows(index.search_vectors(queries, k, probes, candidates))

    return search


def only_rows(results: Iterable[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """Return the rows of results, which also have the scores."""
    found = []
    for _, rows in results:
        found.append(rows)
    return found


def build_fast_plaid(store: kd.VectorStore, folder: Path, bits: int) -> tuple[object, dict[str, float]]:
    """Return an index of fast-plaid over the vectors of a store, the CPU time of it, and bytes per passage."""
    from fast_plaid.search import FastPlaid

    vectors = list(map(torch.from_numpy, store.take(np.arange(len(store)))))
    start = time.process_time()
    index = FastPlaid(str(folder), device="cpu")
    index.create(vectors, nbits=bits)
    seconds = time.process_time() - start
    return index, {"build_cpu_seconds": seconds, "bytes_per_passage": size_of(folder) / len(store)}


def search_fast_plaid(index: object, queries: list, k: int, probes: int, scores: int) -> Search:
    """Return a search by fast-plaid; `scores` is the number of documents whose centroids it scores."""
    tensors = []
    for query in queries:
        tensors.append(torch.from_numpy(np.ascontiguousarray(query)))

    def search() -> list[np.ndarray]:
        options = {"n_ivf_probe": probes, "n_full_scores": scores, "show_progress": False}
        found = []
        for ranking in index.search(tensors, top_k=k, **options):
            found.append(np.array(list(dict(ranking))))  # (row, score) pairs
        return found

    return search


def size_of(folder: Path) -> int:
    """Return the bytes of the files in a folder."""
    size = 0
    for path in folder.rglob("*"):
        if path.is_file():
            size += path.stat().st_size
    return size


if __name__ == "__main__":
    main()
