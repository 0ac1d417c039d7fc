"""What stored vectors cost in effectiveness and what they take: float32, float16, int8 and faiss codes of a ranker.

    python examples/benchmarks/storage.py --model RANKER --queries queries.tsv --collection collection.tsv \
        --candidates bm25.trec --qrels qrels.txt [--measure nDCG@10] [--code PQ48]

RANKER is a trained BERT_DOT, ColBERT, PreTTR or TK. The candidates' passages are encoded, stored in each form, and
re-ranked from the store; float32 equals re-ranking from the texts. The last line is one JSON object.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

import hf_kd_ranking as kd


def main() -> None:
    """Store, re-rank and measure by every kind of storage."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("model", "queries", "collection", "candidates", "qrels"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--measure", default="nDCG@10")
    parser.add_argument("--code", action="append", default=[], help="A factory string of faiss; several may be given.")
    args = parser.parse_args()
    ranker, candidates, qrels = (
        kd.Ranker.from_pretrained(args.model),
        kd.read_run(args.candidates),
        kd.read_qrels(args.qrels),
    )
    queries, collection = kd.TextStore.from_file(args.queries), kd.TextStore.from_file(args.collection)
    candidates = kd.Run((query_id, ranking) for query_id, ranking in candidates.items() if query_id in qrels)
    with tempfile.TemporaryDirectory() as name:
        folder, rows, exact = Path(name), [], None
        # 1. The candidates' passages as a collection of their own
        doc_ids = sorted({doc_id for ranking in candidates.values() for doc_id, _ in ranking})
        lines = (f"{doc_id}\t{text}\n" for doc_id, text in zip(doc_ids, collection[doc_ids], strict=True))
        (folder / "documents.tsv").write_text("".join(lines), encoding="utf-8")
        documents = kd.TextStore.from_tsv(folder / "documents.tsv", folder / "texts")
        # 2. Each form of storage
        stores = {
            form: kd.VectorStore.build(ranker, documents, folder / form, form)
            for form in ("float32", "float16", "int8")
        }
        for number, code in enumerate(args.code):
            stores[code] = stores["float32"].compress(folder / f"code{number}", code)
        # 3. Re-ranking from it
        for form, store in stores.items():
            run = kd.StoredReranker(ranker, store).rerank(
                candidates, {query_id: queries[query_id] for query_id in candidates}
            )
            value = kd.evaluate_run(run, {query_id: qrels[query_id] for query_id in candidates}, (args.measure,))
            scores = np.array([score for query_id in candidates for _, score in sorted(run[query_id])])
            exact = scores if exact is None else exact
            error = float(np.abs(scores - exact).max() / exact.std())
            rows.append(
                {"storage": form, **value, "bytes_per_passage": store.bytes_per_document, "error_in_sd": error}
            )
            print(json.dumps(rows[-1]), flush=True)
    print(json.dumps({"model": args.model, "passages": len(doc_ids), "queries": len(candidates), "storage": rows}))


if __name__ == "__main__":
    main()
