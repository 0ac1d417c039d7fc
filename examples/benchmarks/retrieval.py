"""Measure retrieval on one machine: encoding, growth of the exact index, and recall of approximate indexes.

    OMP_NUM_THREADS=2 python examples/benchmarks/retrieval.py --collection collection.tsv --queries queries.tsv \
        --model MODEL [--passages 1000] [--sizes 3000 10000 30000 100000]

MODEL is a sentence-transformers bi-encoder with mean pooling. Encoding: this package and sentence-transformers read
the same passages, cut to 200 tokens, with the same weights in float32; twice in turn, the better time of each; ours
is `VectorStore.build` with everything it writes. Growth and recall: the vectors of these passages, repeated with noise
up to each size; one query at a time, best of 3. The last line is one JSON object.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import faiss
import numpy as np

import hf_kd_ranking as kd
from hf_kd_ranking.retrieval.dense import search_index

K = 100
APPROXIMATE = {
    "HNSW32": ["efSearch=16", "efSearch=64", "efSearch=256"],
    "IVF256,Flat": ["nprobe=1", "nprobe=8", "nprobe=32"],
    "IVF256,PQ48": ["nprobe=8", "nprobe=32"],
}


def main() -> None:
    """Measure encoding, growth and recall."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("collection", "queries", "model"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--passages", type=int, default=1_000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[3_000, 10_000, 30_000, 100_000])
    args = parser.parse_args()
    ranker = kd.Ranker.from_pretrained(args.model, "bert_dot", "cpu", pooling="mean", max_document_length=200)
    texts = [text for _, text in islice(kd.TextStore.from_file(args.collection).items(), args.passages)]
    queries = ranker.encode_queries([text for _, text in kd.TextStore.from_file(args.queries).items()])
    # 1. Encode the same passages with both libraries
    results, vectors = encode(ranker, args.model, texts)
    print(json.dumps(results), flush=True)
    # 2. The exact index at growing sizes, each in a new process, whose memory before and after is compared
    growth = {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for size in args.sizes:
            growth[size] = pool.apply(grow, (vectors, size, queries))
            print(size, json.dumps(growth[size]), flush=True)
    # 3. Approximate indexes against it
    recall = approximate(with_noise(vectors, args.sizes[-1]), queries)
    print(json.dumps({"encoding": results, "growth": growth, "recall": recall}))


def encode(ranker: kd.Ranker, model: str, texts: list[str]) -> tuple[dict, np.ndarray]:
    """Return passages per second of both libraries with the largest difference, and the vectors."""
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(model, device="cpu")
    theirs.max_seq_length = 200
    ours_seconds, their_seconds = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "texts.tsv").open("w", encoding="utf-8") as file:
            for number, text in enumerate(texts):
                file.write(f"{number}\t{text}\n")
        documents = kd.TextStore.from_tsv(folder / "texts.tsv", folder / "texts")
        for turn in range(2):
            start = time.perf_counter()
            store = kd.VectorStore.build(ranker, documents, folder / f"store{turn}")
            ours_seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
            wanted = theirs.encode(texts, batch_size=32, show_progress_bar=False)
            their_seconds.append(time.perf_counter() - start)
        vectors = np.array(store.take(np.arange(len(texts))))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)  # theirs are normalised if the model has it
    wanted = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
    results = {
        "ours_passages_per_second": len(texts) / min(ours_seconds),
        "theirs_passages_per_second": len(texts) / min(their_seconds),
        "difference": float(np.abs(unit - wanted).max()),
    }
    return results, vectors


def with_noise(vectors: np.ndarray, size: int) -> np.ndarray:
    """Return `size` vectors: the given ones, repeated with noise."""
    rng = np.random.default_rng(0)
    repeated = vectors[np.arange(size) % len(vectors)]
    return repeated + rng.normal(scale=0.5 * vectors.std(), size=repeated.shape).astype(np.float32)


def grow(vectors: np.ndarray, size: int, queries: np.ndarray) -> dict[str, float]:
    """Return time and bytes per passage of the exact index of one size."""
    vectors = with_noise(vectors, size)
    before, index = resident_bytes(), faiss.IndexFlatIP(vectors.shape[1])
    build = seconds(lambda: index.add(vectors))
    bytes_per_passage = (resident_bytes() - before) / size
    search = min(seconds(lambda: search_exactly(index, queries)) for _ in range(3))
    return {
        "build_us_per_passage": 1e6 * build / size,
        "search_us_per_passage": 1e6 * search / len(queries) / size,
        "bytes_per_passage": bytes_per_passage,
    }


def approximate(vectors: np.ndarray, queries: np.ndarray) -> list[dict]:
    """Return recall and time of approximate indexes against the exact one."""
    flat, rows = faiss.IndexFlatIP(vectors.shape[1]), []
    flat.add(vectors)
    exact = search_each(flat, queries)
    for factory, settings in APPROXIMATE.items():
        index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        index.add(vectors)
        for setting in settings:
            faiss.ParameterSpace().set_index_parameters(index, setting)
            best = min(seconds(lambda index=index: search_each(index, queries)) for _ in range(3))
            shared = [len(np.intersect1d(*pair)) for pair in zip(search_each(index, queries), exact, strict=True)]
            row = {"index": factory, "setting": setting, "recall_of_exact": float(np.mean(shared)) / K}
            rows.append(row | {"ms_per_query": 1e3 * best / len(queries)})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def search_each(index: faiss.Index, queries: np.ndarray) -> list[np.ndarray]:
    """Return the best rows of every query, searched one at a time."""
    return [index.search(query[None], K)[1][0] for query in queries]


def search_exactly(index: faiss.Index, queries: np.ndarray) -> None:
    """Search every query as `DenseIndex` does, whose order is that of float64 scores."""
    for query in queries:
        search_index(index, query[None], K)


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def seconds(function: Callable[[], object]) -> float:
    """Return the time of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
