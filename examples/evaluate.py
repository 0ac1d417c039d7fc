"""Re-rank BM25's candidates with a ranker, measure both, and test the difference.

    python examples/evaluate.py                       # the test queries and the ranker of `make demo`: a minute
    python examples/evaluate.py --model RANKER --collection collection.tsv --queries queries.tsv --qrels qrels.txt

Prints the means, and the difference with its interval and p-value.
"""

import argparse

import hf_kd_ranking as kd
from hf_kd_ranking.evaluation.significance import comparison_text

MEASURES = ["RR@10", "nDCG@10"]

# 1. Arguments
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="demo_output/best")
parser.add_argument("--collection", default="demo_output/collection/collection.tsv")
parser.add_argument("--queries", default="demo_output/queries.tsv")
parser.add_argument("--qrels", default="demo_output/qrels.test.txt")
parser.add_argument("--k", type=int, default=20, help="candidates per query")
args = parser.parse_args()
queries, documents = kd.TextStore.from_file(args.queries), kd.TextStore.from_file(args.collection)
qrels = kd.read_qrels(args.qrels)

# 2. The first stage: candidates of the judged queries
texts = {query_id: queries[query_id] for query_id in qrels}
candidates = kd.BM25Index.build(documents).search(texts, args.k)

# 3. Re-rank them
ranker = kd.Ranker.from_pretrained(args.model)
run = kd.RerankingEvaluator(candidates, qrels, queries, documents, MEASURES).rerank(ranker)

# 4. Measure and test
print(kd.evaluate_run(run, qrels, MEASURES))
print(comparison_text(kd.compare_runs({"BM25": candidates, "ranker": run}, qrels, MEASURES)))
