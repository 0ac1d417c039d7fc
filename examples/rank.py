"""Rank passages for a query with a trained ranker.

    python examples/rank.py                                       # the ranker that `make demo` chose
    python examples/rank.py --model sebastian-hofstaetter/colbert-distilbert-margin_mse-T2-msmarco

Prints the passages with their scores, best first; a trained ranker has the first passage on top. A few seconds.
"""

import argparse

from transformers import pipeline

import hf_kd_ranking as kd

QUERY = "how do I read a file line by line"
PASSAGES = [
    "Iterate over the open file object: each step gives one line of the file.",
    "A passage ranker orders passages by their relevance for a query.",
    "Bread is baked from flour, water and yeast.",
]

# 1. Arguments
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="demo_output/best", help="a ranker, or an encoder with --architecture")
parser.add_argument("--architecture", help="the ranker to build on a plain encoder: bert_dot, colbert, ...")
args = parser.parse_args()

# 2. Load the model with its tokenizer and lengths
ranker = kd.Ranker.from_pretrained(args.model, args.architecture)

# 3. Rank: indices of the passages and scores, best first
for index, score in ranker.rerank(QUERY, PASSAGES):
    print(f"{score:9.3f}  {PASSAGES[index]}")

# 4. The same as a pipeline of transformers
rank = pipeline("text-ranking", model=ranker.model, tokenizer=ranker.tokenizer)
print(rank({"query": QUERY, "documents": PASSAGES})[0])
