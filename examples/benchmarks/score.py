"""Score pairs with a cross-encoder: pairs per second against sentence-transformers' CrossEncoder, in one run.

    python examples/benchmarks/score.py --collection collection.tsv --queries queries.tsv --triples triples.tsv \
        [--model MODEL] [--rows 500] [--dtypes fp32 bf16]

Both read the same pairs with the same weights (a sequence classifier; from a plain encoder one with a random head is
made), batches of 32, pairs cut to 230 tokens; a short warm-up first, then twice in turn, the better time of each. Ours
is `score_teacher` with everything it does: the distinct pairs, the blocks it saves, the file it writes. The last line
is one JSON object.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_kd_ranking as kd

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Score the same pairs with both."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("collection", "queries", "triples", "model"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--dtypes", nargs="+", default=["fp32"], choices=DTYPES)
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as name:
        # 1. Pairs and a classifier
        folder = Path(name)
        queries, documents = kd.TextStore.from_file(args.queries), kd.TextStore.from_file(args.collection)
        lines = Path(args.triples).read_text(encoding="utf-8").splitlines()[: args.rows]
        (folder / "triples.tsv").write_text("".join("\t".join(line.split("\t")[-3:]) + "\n" for line in lines))
        rows = [line.split("\t")[-3:] for line in lines]
        texts = [(queries[query], documents[doc]) for query, *docs in rows for doc in docs]
        model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1)
        model.save_pretrained(folder / "model")
        AutoTokenizer.from_pretrained(args.model).save_pretrained(folder / "model")
        # 2. Both, in each precision
        for dtype in args.dtypes:
            results[dtype] = compare(folder, texts, queries, documents, DTYPES[dtype])
            print(dtype, json.dumps(results[dtype]))
    print(json.dumps(results))


def compare(folder: Path, texts: list, queries: kd.TextStore, documents: kd.TextStore, dtype: torch.dtype) -> dict:
    """Pairs a second of both libraries in turns, and the largest difference."""
    from sentence_transformers import CrossEncoder

    model = str(folder / "model")
    theirs = CrossEncoder(model, max_length=230, device="cpu", model_kwargs={"dtype": dtype})
    ours = kd.load_teacher(model, max_length=230, dtype=dtype, device="cpu")
    scores, raw = {}, torch.nn.Identity()

    def run_theirs() -> None:
        scores["theirs"] = theirs.predict(texts, batch_size=32, activation_fn=raw, show_progress_bar=False)

    def run_ours() -> None:
        output = folder / "scores.tsv"
        kd.score_teacher(ours, folder / "triples.tsv", queries, documents, output, overwrite=True)
        scores["ours"] = np.loadtxt(output, usecols=(0, 1)).ravel()

    theirs.predict(texts[:64], show_progress_bar=False)
    ours.score(*zip(*texts[:64], strict=True))
    seconds = {"theirs": [], "ours": []}
    for _ in range(2):
        seconds["theirs"].append(timed(run_theirs))
        seconds["ours"].append(timed(run_ours))
    speed = {name: len(texts) / min(values) for name, values in seconds.items()}
    return {
        "pairs_per_second": speed,
        "ratio": speed["ours"] / speed["theirs"],
        "largest_difference": float(np.abs(scores["ours"] - scores["theirs"]).max()),
    }


def timed(function: Callable[[], None]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
