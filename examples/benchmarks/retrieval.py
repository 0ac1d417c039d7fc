"""Retrieval on one machine: encoding against sentence-transformers, growth of the exact index, recall of faster ones.

    OMP_NUM_THREADS=2 python examples/benchmarks/retrieval.py --collection collection.tsv --queries queries.tsv \
        --model MODEL [--passages 1000] [--sizes 3000 10000 30000 100000]

MODEL is a sentence-transformers bi-encoder with mean pooling. Encoding: both read the same passages, cut to 200
tokens, with the same weights in float32; twice in turn, the better time of each; ours is `VectorStore.build` with
everything it writes. Growth and recall: the vectors of these passages, repeated with noise up to each size; each size
in a process of its own, whose memory before and after is compared; one query at a time, best of 3. The last line is
one JSON object.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np

import hf_kd_ranking as kd
from hf_kd_ranking.retrieval.dense import search_index

APPROXIMATE = {
    "HNSW32": ["efSearch=16", "efSearch=64", "efSearch=256"],
    "IVF256,Flat": ["nprobe=1", "nprobe=8", "nprobe=32"],
    "IVF256,PQ48": ["nprobe=8", "nprobe=32"],
}


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("collection", "queries", "model"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--passages", type=int, default=1_000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[3_000, 10_000, 30_000, 100_000])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # 1. Encode the same passages with both
        texts = list(kd.TextStore.from_file(args.collection).texts[: args.passages].to_pylist())
        (folder / "texts.tsv").write_text("".join(f"{i}\t{text}\n" for i, text in enumerate(texts)), encoding="utf-8")
        documents = kd.TextStore.from_tsv(folder / "texts.tsv", folder / "texts")
        ranker = kd.Ranker.from_pretrained(args.model, "bert_dot", "cpu", pooling="mean", max_document_length=200)
        encoding, vectors = encode(ranker, args.model, documents, texts, folder)
        print(json.dumps(encoding))
        # 2. The exact index at growing sizes
        queries = ranker.encode_queries(list(kd.TextStore.from_file(args.queries).texts.to_pylist()))
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            growth = {size: pool.apply(grow, (vectors, size, queries)) for size in args.sizes}
        print(json.dumps(growth))
        # 3. Approximate indexes against it
        recall = approximate(noisy(vectors, args.sizes[-1]), queries)
    print(json.dumps({"encoding": encoding, "growth": growth, "recall": recall}))


def encode(ranker: kd.Ranker, model: str, documents: kd.TextStore, texts: list, folder: Path) -> tuple:
    """Passages a second of `index` and of sentence-transformers, and the largest difference."""
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(model, device="cpu")
    theirs.max_seq_length, found, seconds = 200, {}, {"theirs": [], "ours": []}

    def run_ours() -> None:
        found["ours"] = kd.VectorStore.build(ranker, documents, folder / f"store{len(seconds['ours'])}")

    def run_theirs() -> None:
        found["theirs"] = theirs.encode(texts, batch_size=32, show_progress_bar=False)

    for _ in range(2):
        seconds["ours"].append(timed(run_ours))
        seconds["theirs"].append(timed(run_theirs))
    vectors, speed = (
        found["ours"].take(np.arange(len(texts))),
        {name: len(texts) / min(s) for name, s in seconds.items()},
    )
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)  # theirs are normalised where the model says so
    wanted = found["theirs"] / np.linalg.norm(found["theirs"], axis=1, keepdims=True)
    difference = float(np.abs(unit - wanted).max())
    facts = {"passages_per_second": speed, "ratio": speed["ours"] / speed["theirs"], "difference": difference}
    return facts, vectors


def noisy(vectors: np.ndarray, size: int) -> np.ndarray:
    """Vectors repeated with noise, as many as are asked for."""
    rng = np.random.default_rng(0)
    repeated = vectors[np.arange(size) % len(vectors)]
    return repeated + rng.normal(scale=0.5 * vectors.std(), size=repeated.shape).astype(np.float32)


def grow(vectors: np.ndarray, size: int, queries: np.ndarray) -> dict:
    """Time and bytes a passage of the exact index, by the size of the collection."""
    vectors = noisy(vectors, size)
    before, index = memory(), faiss.IndexFlatIP(vectors.shape[1])
    build = timed(lambda: index.add(vectors))
    grown = memory() - before
    seconds = min(timed(lambda: [search_index(index, query[None], 100) for query in queries]) for _ in range(3))
    return {
        "build_us_per_passage": 1e6 * build / len(vectors),
        "search_us_per_passage": 1e6 * seconds / len(queries) / len(vectors),
        "bytes_per_passage": grown / len(vectors),
    }


def approximate(vectors: np.ndarray, queries: np.ndarray) -> list[dict]:
    """Recall and time of approximate indexes against the exact one."""
    flat, rows = faiss.IndexFlatIP(vectors.shape[1]), []
    flat.add(vectors)
    exact = [set(found.tolist()) for _, found in search_index(flat, queries, 100)]
    for factory, settings in APPROXIMATE.items():
        index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        build = timed(lambda index=index: (index.train(vectors), index.add(vectors)))
        for setting in settings:
            faiss.ParameterSpace().set_index_parameters(index, setting)
            found = [search_index(index, query[None], 100)[0][1].tolist() for query in queries]
            seconds = min(
                timed(lambda index=index: [search_index(index, q[None], 100) for q in queries]) for _ in range(3)
            )
            recall = float(np.mean([len(some & set(r)) / 100 for some, r in zip(exact, found, strict=True)]))
            rows.append(
                {"index": factory, "setting": setting, "R@100 of exact": recall, "build_seconds": build}
                | {"ms_per_query": 1e3 * seconds / len(queries)}
            )
            print(json.dumps(rows[-1]))
    return rows


def memory() -> int:
    """Resident memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def timed(function: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
