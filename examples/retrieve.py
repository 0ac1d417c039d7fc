"""Encode a collection, search it, and fuse the result with BM25.

    python examples/retrieve.py                       # the collection and the ranker of `make demo`: a few minutes

Prints the three best documents of the first query by BM25, by the ranker (a BERT_DOT or ColBERT) and by both.
"""

import argparse
from itertools import islice
from pathlib import Path

import hf_kd_ranking as kd
from hf_kd_ranking.retrieval.base import open_index
from hf_kd_ranking.retrieval.fusion import fuse_runs

# 1. Arguments
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="demo_output/best")
parser.add_argument("--collection", default="demo_output/collection/collection.tsv")
parser.add_argument("--queries", default="demo_output/queries.tsv")
parser.add_argument("--output", type=Path, default=Path("results/indexes"), help="a new folder")
args = parser.parse_args()
documents = kd.TextStore.from_file(args.collection)
queries = dict(islice(kd.TextStore.from_file(args.queries).items(), 10))

# 2. BM25
bm25 = kd.BM25Index.build(documents, args.output / "bm25").search(queries, k=100)

# 3. Encode the collection in resumable blocks, and search it
ranker = kd.Ranker.from_pretrained(args.model)
kd.VectorStore.build(ranker, documents, args.output / "vectors")
dense = open_index(args.output / "vectors", ranker).search(queries, k=100)

# 4. Fuse both runs, and compare
runs = {"BM25": bm25, "ranker": dense, "fused": fuse_runs([bm25, dense])}
query_id, text = next(iter(queries.items()))
print(f"query: {text}")
for name, run in runs.items():
    for doc_id, score in run[query_id][:3]:
        print(f"{name:8}{score:9.3f}  {documents[doc_id][:90]}")
