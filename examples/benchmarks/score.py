"""Measure scoring throughput: pairs per second of `Ranker.score` and of sentence-transformers with the same weights.

    OMP_NUM_THREADS=1 python examples/benchmarks/score.py --model MODEL --collection collection.tsv \
        --queries queries.tsv [--pairs 1000] [--repetitions 5] [--architectures bert_cat bert_dot colbert]

MODEL is an encoder; each architecture is built on it, exported, and read by both libraries in float32. Pair i is
document i with one of the queries, so no document is scored twice; queries are cut to 30 tokens, documents to 200.
The libraries take turns, with batches of the size that each has by default. sentence-transformers encodes every
distinct query and document once (`encode_query`, `encode_document`) and multiplies; for BERT_CAT it is
`CrossEncoder.predict`. The last line is one JSON object: per architecture the pairs per second of the repetitions, the
median of the ratios (ours over theirs) with the smallest and largest, and the largest difference of the scores.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch

import hf_kd_ranking as kd

FORMATS = {"bert_cat": "cross-encoder", "bert_dot": "sentence-transformer", "colbert": "multi-vector"}
# The fields that sentence-transformers can express; without the activation CrossEncoder would run our code.
FIELDS = {"bert_cat": {"head_activation": "tanh"}, "colbert": {"compression_dim": 128, "query_augmentation": 0}}

Score = Callable[[list[str], list[str]], np.ndarray]


def main() -> None:
    """Measure each architecture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("model", "collection", "queries"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--pairs", type=int, default=1_000)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--architectures", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    args = parser.parse_args()
    distinct = list(dict(kd.TextStore.from_file(args.queries).items()).values())
    documents = list(dict(islice(kd.TextStore.from_file(args.collection).items(), args.pairs)).values())
    queries = list(islice(cycle(distinct), len(documents)))
    results = {}
    for architecture in args.architectures:
        with tempfile.TemporaryDirectory() as folder:
            scorers = load_scorers(args.model, architecture, Path(folder))
            results[architecture] = compare(scorers, queries, documents, args.repetitions)
        print(architecture, json.dumps(results[architecture]), flush=True)
    print(json.dumps(results))


def load_scorers(model: str, architecture: str, folder: Path) -> tuple[Score, Score]:
    """Return the functions that score pairs, ours and theirs, with the same weights."""
    torch.manual_seed(0)
    ranker = kd.Ranker.from_pretrained(model, architecture, "cpu", **FIELDS.get(architecture, {}))
    ranker.save_pretrained(folder / "ranker")
    kd.export_ranker(folder / "ranker", FORMATS[architecture], folder / "exported")
    return ranker.score, their_score(architecture, str(folder / "exported"))


def their_score(architecture: str, folder: str) -> Score:
    """Return the function of sentence-transformers."""
    import sentence_transformers as st

    if architecture == "bert_cat":
        cross_encoder = st.CrossEncoder(folder, device="cpu")
        return lambda queries, documents: cross_encoder.predict(list(zip(queries, documents, strict=True)))
    classes = {"bert_dot": st.SentenceTransformer, "colbert": st.MultiVectorEncoder}
    encoder = classes[architecture](folder, device="cpu")

    def score(queries: list[str], documents: list[str]) -> np.ndarray:
        distinct = list(dict.fromkeys(queries))
        vectors = dict(zip(distinct, encoder.encode_query(distinct, convert_to_tensor=True), strict=True))
        document_vectors = encoder.encode_document(documents, convert_to_tensor=True)
        query_vectors = [vectors[query] for query in queries]
        if architecture == "bert_dot":
            query_vectors = torch.stack(query_vectors)
        return encoder.similarity_pairwise(query_vectors, document_vectors).numpy()

    return score


def compare(scorers: tuple[Score, Score], queries: list[str], documents: list[str], repetitions: int) -> dict:
    """Return pairs per second of both, the ratios and the largest difference of the scores."""
    ours, theirs = scorers[0](queries[:64], documents[:64]), scorers[1](queries[:64], documents[:64])  # warms up
    speeds, ratios = {"ours": [], "theirs": []}, []
    for _ in range(repetitions):
        for name, score in zip(speeds, scorers, strict=True):
            start = time.perf_counter()
            score(queries, documents)
            speeds[name].append(round(len(documents) / (time.perf_counter() - start), 1))
        ratios.append(speeds["ours"][-1] / speeds["theirs"][-1])
    return {
        "pairs_per_second": speeds,
        "ratio": {"median": float(np.median(ratios)), "least": min(ratios), "most": max(ratios)},
        "largest_difference": float(np.abs(ours - theirs).max()),
    }


if __name__ == "__main__":
    main()
