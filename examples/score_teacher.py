"""Sample triples from a collection, and score them with a teacher.

    python examples/score_teacher.py                  # the collection of `make demo`, all-MiniLM-L6-v2: a minute
    python examples/score_teacher.py --model cross-encoder/ms-marco-MiniLM-L6-v2 --collection collection.tsv \
        --queries queries.tsv --qrels qrels.txt --output scores

Prints the first rows and the warnings of the diagnosis. `train.py --scores OUTPUT/scores.tsv` trains on the result.
"""

import argparse
from pathlib import Path

import hf_kd_ranking as kd
from hf_kd_ranking.data.rows import write_teacher_scores

# 1. Arguments
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="demo_output/all-MiniLM-L6-v2", help="any ranker, classifier or bi-encoder")
parser.add_argument("--collection", default="demo_output/collection/collection.tsv")
parser.add_argument("--queries", default="demo_output/queries.tsv")
parser.add_argument("--qrels", default="demo_output/qrels.train.txt")
parser.add_argument("--output", type=Path, default=Path("results/teacher"), help="a new folder")
args = parser.parse_args()
args.output.mkdir(parents=True)
queries, documents = kd.TextStore.from_file(args.queries), kd.TextStore.from_file(args.collection)
qrels = kd.read_qrels(args.qrels)

# 2. Triples: positives from the judgments, negatives from BM25's candidates
candidates = kd.BM25Index.build(documents).search({query_id: queries[query_id] for query_id in qrels}, k=20)
write_teacher_scores(kd.sample_triples(candidates, qrels, per_query=2), args.output / "triples.tsv")

# 3. Score every distinct pair once; the same call resumes after an interruption
teacher = kd.load_teacher(args.model)
kd.score_teacher(teacher, args.output / "triples.tsv", queries, documents, args.output / "scores.tsv")

# 4. Look at the result
rows = kd.load_teacher_scores(args.output / "scores.tsv")
print(f"{len(rows):,} rows, the first: {rows[0]}")
print(kd.diagnose_teachers([args.output / "scores.tsv"], queries, documents)["files"][0]["warnings"])
