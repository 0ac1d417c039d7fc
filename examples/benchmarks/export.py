"""What a ranker's exports give: equality on 100 texts for every format, and what 8-bit weights buy and cost.

    python examples/benchmarks/export.py --model MODEL [--architecture bert_dot] (--dataset DATASET |
        --queries queries.tsv --collection collection.tsv [--qrels qrels.txt --candidates bm25.trec]) [--depth 100]

Each format is written, loaded by the library whose layout it is, and scores 100 pairs of the collection's texts; what
cannot be exported is printed with the reason. For ONNX: milliseconds to score these pairs, torch in float32, ONNX in
float32 and in int8 in turns, one thread each, after a warm-up round; and, where there are judgments and candidates,
RR@10 of the re-ranked candidates by each. The last line is one JSON object. A ranker of six layers takes minutes.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch

import hf_kd_ranking as kd
from hf_kd_ranking.cli.options import open_collection
from hf_kd_ranking.data.collections import RankingCollection
from hf_kd_ranking.interop.export import FORMATS, WRITERS, largest_difference
from hf_kd_ranking.interop.onnx import OnnxRanker

ROUNDS = 5


def main() -> None:
    """Export, time and measure each of the named rankers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--architecture")
    parser.add_argument("--dataset")
    for name in ("queries", "collection", "qrels", "candidates"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--depth", type=int, default=100)
    parser.add_argument("--judged", type=int, help="re-rank the first judged queries only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # 1. The ranker, and 100 pairs of texts
    ranker = kd.Ranker.from_pretrained(args.model, args.architecture, device="cpu")
    files = {"queries": args.queries, "documents": args.collection, "qrels": args.qrels, "candidates": args.candidates}
    data = open_collection(args.dataset, args.split, **{name: path for name, path in files.items() if path})
    documents = [text for _, text in islice(data.documents.items(), 100)]
    queries = list(islice(cycle([text for _, text in islice(data.queries.items(), 100)]), len(documents)))
    expected = ranker.score(queries, documents)
    results = {"model": type(ranker.model).__name__, "spread": float(np.ptp(expected)), "formats": {}}
    with tempfile.TemporaryDirectory() as folder:
        # 2. Each format, by the library whose layout it is
        for name in FORMATS:
            try:
                kd.export_ranker(args.model, name, Path(folder) / name, args.architecture)
                difference = largest_difference(expected, WRITERS[name][1](Path(folder) / name, queries, documents))
                results["formats"][name] = difference
                print(f"{name}: largest difference {difference:.2g}")
            except ValueError as error:
                results["formats"][name] = str(error)
                print(f"{name}: refused. {error}")
        # 3. ONNX against torch: bytes, milliseconds, ranking
        scorers = {"torch": ranker.score}
        for name in ("onnx", "onnx-int8"):
            scorers[name] = partial(sorted_scores, OnnxRanker(Path(folder) / name, threads=1))
            results[f"{name}_mb"] = (Path(folder) / name / "model.onnx").stat().st_size / 1e6
        results["ms"] = milliseconds(scorers, queries, documents)
        if args.dataset or args.qrels:
            candidates = first_stage(data, args.depth, args.judged)
            results["judged"] = len(candidates)
            results["RR@10"] = {name: reciprocal_rank(score, candidates, data) for name, score in scorers.items()}
    print(json.dumps(results))


def first_stage(data: RankingCollection, depth: int, judged: int | None) -> kd.Run:
    """The candidates of the judged queries: the collection's, or BM25's."""
    queries = dict(islice(data.judged_queries().items(), judged))
    run = data.candidates or kd.BM25Index.build(data.documents).search(queries, depth)
    return kd.Run({query: run[query] for query in queries if query in run}).top(depth)


def sorted_scores(ranker: OnnxRanker, queries: list[str], documents: list[str]) -> np.ndarray:
    """In batches of similar length, as `Ranker.score` makes them."""
    order, scores = np.argsort([-len(text) for text in documents]), np.empty(len(documents), dtype=np.float32)
    scores[order] = ranker.score([queries[i] for i in order], [documents[i] for i in order])
    return scores


def milliseconds(scorers: dict, queries: list[str], documents: list[str]) -> dict[str, float]:
    """Median of the rounds after the first, the scorers in turns."""
    times = {name: [] for name in scorers}
    for _ in range(ROUNDS + 1):
        for name, score in scorers.items():
            start = time.perf_counter()
            score(queries, documents)
            times[name].append((time.perf_counter() - start) * 1000)
    return {name: float(np.median(of_scorer[1:])) for name, of_scorer in times.items()}


def reciprocal_rank(score: Callable, candidates: kd.Run, data: RankingCollection) -> float:
    """RR@10 of candidates in the order of some scores."""
    query_ids, doc_ids = zip(*((query, doc) for query, docs in candidates.items() for doc, _ in docs), strict=True)
    run = kd.Run.from_scores(query_ids, doc_ids, score(data.queries[query_ids], data.documents[doc_ids]))
    return kd.evaluate_run(run, {query: data.qrels[query] for query in candidates}, ["RR@10"])["RR@10"]


if __name__ == "__main__":
    main()
