"""Measure effectiveness and bytes per passage of stored vectors: float32, float16, int8 and faiss codes.

    python examples/benchmarks/storage.py --model RANKER --queries queries.tsv --collection collection.tsv \
        --candidates bm25.trec --qrels qrels.txt [--measure nDCG@10] [--code IVF256,SQ4 IVF256,PQ32]

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
    """Store, re-rank and measure with every form of storage."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("model", "queries", "collection", "candidates", "qrels"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--measure", default="nDCG@10")
    parser.add_argument("--code", nargs="*", default=[], help="factory strings of faiss")
    args = parser.parse_args()
    ranker = kd.Ranker.from_pretrained(args.model)
    queries, collection = kd.TextStore.from_file(args.queries), kd.TextStore.from_file(args.collection)
    qrels = kd.read_qrels(args.qrels)
    candidates, texts, doc_ids = kd.Run(), {}, set()
    for query_id, ranking in kd.read_run(args.candidates).items():
        if query_id in qrels:
            candidates[query_id] = ranking
            texts[query_id] = queries[query_id]
            doc_ids.update(dict(ranking))
    judged = {query_id: qrels[query_id] for query_id in candidates}
    rows, exact = [], None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # 1. The candidates' passages as a collection
        with (folder / "documents.tsv").open("w", encoding="utf-8") as file:
            for doc_id in sorted(doc_ids):
                file.write(f"{doc_id}\t{collection[doc_id]}\n")
        documents = kd.TextStore.from_tsv(folder / "documents.tsv", folder / "texts")
        # 2. Each form of storage
        stores = {}
        for form in ("float32", "float16", "int8"):
            stores[form] = kd.VectorStore.build(ranker, documents, folder / form, form)
        for number, code in enumerate(args.code):
            stores[code] = stores["float32"].compress(folder / f"code{number}", code)
        # 3. Re-rank from it
        for form, store in stores.items():
            run = kd.StoredReranker(store).rerank(candidates, texts)
            row = {"storage": form, **kd.evaluate_run(run, judged, (args.measure,))}
            row["bytes_per_passage"] = store.bytes_per_document
            scores = np.array([score for query_id in candidates for _, score in sorted(run[query_id])])
            if exact is None:
                exact = scores
            row["error_in_sd"] = float(np.abs(scores - exact).max() / exact.std())
            rows.append(row)
            print(json.dumps(row), flush=True)
    print(json.dumps({"model": args.model, "passages": len(doc_ids), "queries": len(candidates), "storage": rows}))


if __name__ == "__main__":
    main()
