"""Export a ranker for other runtimes, and compare its scores there.

    python examples/export.py                         # the ranker of `make demo` as an ONNX graph: a minute
    python examples/export.py --model RANKER --to sentence-transformer --output exported

`export_ranker` refuses what the format cannot express. Prints the largest difference of the scores, below 1e-4 for all
formats but onnx-int8. Needs the extra `export`.
"""

import argparse

import hf_kd_ranking as kd
from hf_kd_ranking.interop.onnx import OnnxRanker

QUERY, DOCUMENTS = "what is a list", ["A list is a mutable sequence.", "Bread is baked from flour, water and yeast."]

# 1. Arguments
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="demo_output/best")
parser.add_argument("--to", default="onnx", help="onnx, onnx-int8, cross-encoder, sentence-transformer, ...")
parser.add_argument("--output", default="results/exported", help="a new folder")
args = parser.parse_args()

# 2. Write the ranker, load it with the library that reads the layout, and compare scores
print(kd.export_ranker(args.model, args.to, args.output))

# 3. Use it: here a graph, without torch
if args.to.startswith("onnx"):
    ranker = kd.Ranker.from_pretrained(args.model)
    print("this package ", ranker.score(QUERY, DOCUMENTS))
    print("onnxruntime  ", OnnxRanker(args.output).score([QUERY] * len(DOCUMENTS), DOCUMENTS))
