"""Compare engines for BM25 on a large collection: time and memory of the build, size on disk, queries per second.

    python examples/benchmarks/bm25.py --collection c.tsv [d.tsv ...] --queries q.tsv [--engines numpy numba]

`numpy` and `numba` are the backends of bm25s, of which `BM25Index` chooses one by the size of the collection.
`tantivy` is the library of that name, which has to be installed; it has k1 1.2 and b 0.75, and two threads while it
builds. All get the words of `BM25Index`, stemmed by `--language english`. Collections that are smaller than
`--passages` are extended by passages that consist of the first half of one text and the second half of another, so
that the vocabulary and the lengths stay real. Every engine runs in a process of its own and answers one query at a
time. The last line is one JSON object.
"""

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import numpy as np
from tqdm.auto import tqdm

import hf_kd_ranking as kd
from hf_kd_ranking.retrieval import bm25

ENGINES = ("numpy", "numba", "tantivy")


def main() -> None:
    """Extend the collection, and measure every engine in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--collection", nargs="+", required=True)
    parser.add_argument("--queries", required=True)
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--searched", type=int, default=200, help="queries")
    parser.add_argument("--language")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # engine and folder, in a process of its own
    args = parser.parse_args()
    if args.measure:
        engine, folder = args.measure
        print(json.dumps(measure(engine, Path(folder), args)))
        return
    for engine in args.engines:
        if engine != "numpy" and importlib.util.find_spec(engine) is None:
            raise SystemExit(f"The engine {engine} is not installed: pip install {engine}.")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        write_collection(args.collection, args.passages, Path(name))
        for engine in args.engines:
            command = [sys.executable, *sys.argv, "--measure", engine, name]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows.append(json.loads(output.splitlines()[-1]))
            print(json.dumps(rows[-1]), flush=True)
    print(json.dumps({"passages": args.passages, "language": args.language, "engines": rows}))


def write_collection(paths: list[str], count: int, folder: Path) -> None:
    """Write the passages of some collections, extended to `count`, as `collection.tsv`."""
    texts = []
    for path in paths:
        texts += dict(kd.TextStore.from_file(path).items()).values()
    rng = np.random.default_rng(0)
    pairs = rng.integers(len(texts), size=(max(0, count - len(texts)), 2))
    with (folder / "collection.tsv").open("w", encoding="utf-8") as file:
        for row, text in enumerate(texts[:count]):
            file.write(f"{row}\t{text}\n")
        for row, (first, second) in enumerate(tqdm(pairs, desc="Passages"), len(texts)):
            start, end = texts[first].split(), texts[second].split()
            file.write(f"{row}\t{' '.join(start[: len(start) // 2] + end[len(end) // 2 :])}\n")
    kd.TextStore.from_tsv(folder / "collection.tsv", folder / "texts")


def measure(engine: str, folder: Path, args: argparse.Namespace) -> dict:
    """Build an index with one engine, and search it one query at a time."""
    documents = kd.TextStore.open(folder / "texts")
    distinct = dict(kd.TextStore.from_file(args.queries).items()).values()
    queries = list(islice(cycle(distinct), args.searched))
    index_folder = folder / engine
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    if engine == "tantivy":
        search = build_tantivy(documents, index_folder, args.language)
    else:
        bm25.NUMBA_FROM = 0 if engine == "numba" else len(documents) + 1
        index = kd.BM25Index.build(documents, index_folder, language=args.language)

        def search(query: str) -> int:
            return len(index.search({"query": query}, k=100)["query"])

    built = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    start = time.perf_counter()
    search(queries[0])
    first, times = time.perf_counter() - start, []
    for query in queries:
        start = time.perf_counter()
        search(query)
        times.append(1_000 * (time.perf_counter() - start))
    size = sum(path.stat().st_size for path in index_folder.rglob("*") if path.is_file())
    row = {"engine": engine, "build_seconds": built, "build_peak_gb": peak / 1e6, "index_gb": size / 1e9}
    row |= {"first_query_ms": 1_000 * first, "query_ms": median(times)}
    return row | {"query_ms_p95": float(np.percentile(times, 95)), "queries_per_second": 1_000 / float(np.mean(times))}


def build_tantivy(documents: kd.TextStore, folder: Path, language: str | None) -> Callable[[str], int]:
    """Index the same words by tantivy; returns query -> number of hits."""
    import tantivy  # not needed by the others

    folder.mkdir()
    builder = tantivy.SchemaBuilder()
    builder.add_integer_field("row", stored=True, indexed=False)
    builder.add_text_field("text", stored=False, tokenizer_name="whitespace")
    index = tantivy.Index(builder.build(), path=str(folder))
    writer = index.writer(heap_size=512_000_000, num_threads=2)
    for start in range(0, len(documents), bm25.TEXTS_AT_ONCE):
        rows = np.arange(start, min(start + bm25.TEXTS_AT_ONCE, len(documents)))
        for row, words in zip(rows, stemmed(documents.take(rows), language), strict=True):
            writer.add_document(tantivy.Document(row=int(row), text=" ".join(words)))
    writer.commit()
    writer.wait_merging_threads()
    index.reload()
    searcher = index.searcher()

    def search(query: str) -> int:
        terms = []
        for word in stemmed([query], language)[0]:
            terms.append((tantivy.Occur.Should, tantivy.Query.term_query(index.schema, "text", word)))
        hits = searcher.search(tantivy.Query.boolean_query(terms), 100, count=False).hits
        for _, address in hits:
            searcher.doc(address)  # the row
        return len(hits)

    return search


def stemmed(texts: list[str], language: str | None) -> list[list[str]]:
    """Return the words of texts as `BM25Index` stems and filters them."""
    tokens = bm25._tokenize(texts, language)
    names = {number: word for word, number in tokens.vocab.items()}
    return [[names[number] for number in numbers] for numbers in tokens.ids]


if __name__ == "__main__":
    main()
