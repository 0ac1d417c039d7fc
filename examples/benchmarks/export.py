"""Measure the exports of a ranker: equality of every format, and latency, size and effectiveness of ONNX graphs.

    python examples/benchmarks/export.py --model MODEL [--architecture bert_dot] --queries queries.tsv \
        --collection collection.tsv [--qrels qrels.txt] [--k 20]

Each format is written, loaded by the library that reads it, and compared on a few texts; if it cannot be exported, the
reason is printed. For ONNX: milliseconds to score 100 pairs, torch in float32, ONNX in float32 and in int8 in turns,
one thread each, after a warm-up round; with judgments also RR@10 of BM25's re-ranked candidates. The last line is one
JSON object. A ranker of six layers takes minutes.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch

import hf_kd_ranking as kd
from hf_kd_ranking.interop.export import FORMATS
from hf_kd_ranking.interop.onnx import OnnxRanker

ROUNDS = 5


def main() -> None:
    """Export, time and measure a ranker."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("model", "queries", "collection"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--architecture")
    parser.add_argument("--qrels")
    parser.add_argument("--k", type=int, default=20, help="candidates per query")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # 1. The ranker, and 100 pairs of texts
    ranker = kd.Ranker.from_pretrained(args.model, args.architecture, device="cpu")
    queries, collection = kd.TextStore.from_file(args.queries), kd.TextStore.from_file(args.collection)
    documents = list(dict(islice(collection.items(), 100)).values())
    texts = list(islice(cycle(dict(queries.items()).values()), len(documents)))
    results = {"model": type(ranker.model).__name__, "formats": {}}
    scorers = {"torch": ranker.score}
    with tempfile.TemporaryDirectory() as folder:
        # 2. Each format, with the library that reads it
        for name in FORMATS:
            try:
                exported = kd.export_ranker(args.model, name, Path(folder) / name, args.architecture)
                results["formats"][name] = exported["largest_difference"]
            except ValueError as error:
                results["formats"][name] = str(error)
            print(f"{name}: {results['formats'][name]}", flush=True)
        # 3. ONNX against torch: bytes, milliseconds, ranking
        for name in ("onnx", "onnx-int8"):
            scorers[name] = by_length(OnnxRanker(Path(folder) / name, threads=1))
            results[f"{name}_mb"] = (Path(folder) / name / "model.onnx").stat().st_size / 1e6
        results["ms"] = milliseconds(scorers, texts, documents)
        if args.qrels:
            qrels = kd.read_qrels(args.qrels)
            judged = dict(zip(qrels, queries[list(qrels)], strict=True))
            candidates = kd.BM25Index.build(collection).search(judged, args.k)
            results["RR@10"] = {}
            for name, score in scorers.items():
                run = rerank(score, candidates, queries, collection)
                results["RR@10"][name] = kd.evaluate_run(run, qrels, ["RR@10"])["RR@10"]
    print(json.dumps(results))


def by_length(ranker: OnnxRanker) -> Callable:
    """Return a function that scores in batches of similar length, as `Ranker.score` does."""

    def score(queries: list[str], documents: list[str]) -> np.ndarray:
        order, scores = np.argsort(list(map(len, documents)))[::-1], np.empty(len(documents), dtype=np.float32)
        scores[order] = ranker.score(np.array(queries)[order].tolist(), np.array(documents)[order].tolist())
        return scores

    return score


def milliseconds(scorers: dict[str, Callable], queries: list[str], documents: list[str]) -> dict[str, float]:
    """Return the median of the rounds after the first, the scorers in turns."""
    times = np.zeros((ROUNDS + 1, len(scorers)))
    for number in range(ROUNDS + 1):
        for place, score in enumerate(scorers.values()):
            start = time.perf_counter()
            score(queries, documents)
            times[number, place] = 1000 * (time.perf_counter() - start)
    return dict(zip(scorers, np.median(times[1:], axis=0).tolist(), strict=True))


def rerank(score: Callable, candidates: kd.Run, queries: kd.TextStore, documents: kd.TextStore) -> kd.Run:
    """Return the candidates with a scorer's scores."""
    query_ids, doc_ids = [], []
    for query_id, ranking in candidates.items():
        for doc_id, _ in ranking:
            query_ids.append(query_id)
            doc_ids.append(doc_id)
    return kd.Run.from_scores(query_ids, doc_ids, score(queries[query_ids], documents[doc_ids]))


if __name__ == "__main__":
    main()
