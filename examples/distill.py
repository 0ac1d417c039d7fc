"""Distil a search pipeline within a latency budget from a collection, queries, judgments and a teacher.

    python examples/distill.py                        # the files of `make demo`, one BERT_DOT: about 5 minutes
    python examples/distill.py --teacher cross-encoder/ms-marco-MiniLM-L6-v2 --collection collection.tsv \
        --queries queries.tsv --qrels qrels.txt --model distilbert/distilbert-base-uncased --output distilled

Prints the measures on the test queries, the verdict and the answers of the chosen pipeline. The same command resumes
after an interruption.
"""

import argparse

import hf_kd_ranking as kd

# 1. Arguments
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--teacher", nargs="+", default=["demo_output/all-MiniLM-L6-v2"])
parser.add_argument("--model", default="demo_output/all-MiniLM-L6-v2", help="the students' encoder")
parser.add_argument("--collection", default="demo_output/collection/collection.tsv")
parser.add_argument("--queries", default="demo_output/queries.tsv")
parser.add_argument("--qrels", default="demo_output/qrels.train.txt")
parser.add_argument("--output", default="results/distilled")
parser.add_argument("--force", action="store_true", help="continue if the teacher is no better than BM25")
args = parser.parse_args()

# 2. The job: files, teachers, and what the ranker should be
files = {"collection": args.collection, "queries": args.queries, "qrels": args.qrels, "output": args.output}
student = {"model_name": args.model, "architectures": ["bert_dot"], "overrides": {"bert_dot": {"pooling": "mean"}}}
settings = {"k": 20, "learning_rates": [5e-5], "max_document_length": 48, "budget_ms": 100, "force": args.force}
job = kd.DistillJob(**files, teachers=args.teacher, **student, **settings)

# 3. Candidates, the teacher's scores, lists, students with and without the teacher, choice, test, delivery
outcome = kd.distill(job)
for name, value in outcome["test"].items():
    print(f"{name:30}{job.measure} {value:.4f}")
print(f"chosen: {outcome['chosen']} in {outcome['folder']}, report: {outcome['page']}\n{outcome['verdict']}")

# 4. Search with the delivered pipeline
print(kd.load_pipeline(outcome["folder"]).search("parse a date", k=3))
